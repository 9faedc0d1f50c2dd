"""A small model of Llama's shape with random weights: RMSNorm, rotary positions, grouped query heads, SwiGLU.

Two ways to run it: `TinyLlama.step` on a packed batch, leaving attention to a function it is given, as an engine does;
and `TinyLlama.greedy`, one request alone, without a cache, in plain PyTorch. Activations are float32; queries, keys,
values and what attention returns are rounded to `cache_dtype` in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    vocabulary: int = 256
    layers: int = 3
    width: int = 256
    hidden: int = 512
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    positions: int = 1024
    cache_dtype: torch.dtype = torch.float32


class Layer(NamedTuple):
    qkv: Tensor  # ((heads + 2 * kv_heads) * head_dim, width)
    output: Tensor  # (width, heads * head_dim)
    gate_up: Tensor  # (2 * hidden, width)
    down: Tensor  # (width, hidden)


# (layer number, q (tokens, heads, D), k and v (tokens, kv_heads, D), none of them rotated) -> (tokens, heads, D)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class TinyLlama:
    def __init__(self, config: Config, device: torch.device | str = "cpu", seed: int = 0):
        self.config = c = config
        generator = torch.Generator().manual_seed(seed)

        def normal(rows: int, columns: int) -> Tensor:
            return (torch.randn(rows, columns, generator=generator) / math.sqrt(columns)).to(device)

        rows = (c.heads + 2 * c.kv_heads) * c.head_dim
        self.layers = [
            Layer(
                normal(rows, c.width),
                normal(c.width, c.heads * c.head_dim),
                normal(2 * c.hidden, c.width),
                normal(c.width, c.hidden),
            )
            for _ in range(c.layers)
        ]
        self.embedding, self.head = normal(c.vocabulary, c.width), normal(c.vocabulary, c.width)
        frequencies = 10000.0 ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        angles = torch.arange(c.positions)[:, None] * frequencies
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)  # (positions, head_dim / 2) float32

    def step(self, tokens: Tensor, attend: Attend) -> Tensor:
        """tokens: (T,) of any number of sequences. Returns their last hidden states, (T, width)."""
        c = self.config
        x = self.embedding[tokens]
        for number, layer in enumerate(self.layers):
            qkv = F.linear(_normalised(x), layer.qkv).to(c.cache_dtype).unflatten(-1, (-1, c.head_dim))
            q, k, v = qkv.split([c.heads, c.kv_heads, c.kv_heads], dim=1)
            x = x + F.linear(attend(number, q, k, v).flatten(1).float(), layer.output)
            gate, up = F.linear(_normalised(x), layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(_normalised(hidden), self.head)

    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        """`count` tokens after the prompt, and by how much each logit was ahead of the next best."""
        tokens, leads = list(prompt), []
        for _ in range(count):
            batch = torch.tensor(tokens, device=self.head.device)
            best = self.logits(self.step(batch, self._plain_attention)[-1]).topk(2)
            leads.append(float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
        return tokens[len(prompt) :], leads

    def _plain_attention(self, number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self._rotated(q), self._rotated(k)
        group = self.config.heads // self.config.kv_heads
        q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
        k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
        scores = q @ k.mT / math.sqrt(self.config.head_dim)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        out = scores.masked_fill(hidden, -math.inf).softmax(dim=-1) @ v
        return out.transpose(0, 1).to(self.config.cache_dtype)

    def _rotated(self, x: Tensor) -> Tensor:
        """Token i at position i, elements j and j + head_dim / 2 together."""
        a, b = x.float().chunk(2, dim=-1)
        cos, sin = self.cos[: len(x), None], self.sin[: len(x), None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def _normalised(x: Tensor) -> Tensor:
    """RMSNorm with unit weights: random ones would say no more."""
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)
