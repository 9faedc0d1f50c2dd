"""A small random-weights Qwen3 of transformers over a paged cache: what verify_logits.py and throughput.py run."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_cute.batch_invariant.kv_context import KVCacheContext, kv_cache_context


class Size(NamedTuple):
    """Of the model."""

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str = "silu"


SIZES = {
    # For interpreters. torch's silu on the CPU has other bits in the tail of a tensor than before it; its relu has not.
    "tiny": Size(64, 32, 48, 2, 4, 2, 16, "relu"),
    "small": Size(4096, 512, 1536, 4, 8, 2, 128),
    "0.6b": Size(32768, 1024, 3072, 28, 16, 8, 128),  # Qwen3-0.6B's, with fewer words
}


def build_model(size: Size, device: str, dtype: torch.dtype, seed: int = 0):
    """Qwen3ForCausalLM with random weights; nothing is downloaded."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        hidden_act=size.activation,
        max_position_embeddings=1 << 17,
    )
    return Qwen3ForCausalLM(config).to(device=device, dtype=dtype).eval()


@dataclass
class Sequence:
    tokens: list[int]
    cached: int = 0  # tokens whose keys and values are in the cache
    pages: list[int] = field(default_factory=list)


class PagedModel:
    """The model and a pool of pages. All that is unused of the pool is NaN at first, and pages are handed out in no
    order."""

    def __init__(self, model, pages: int, page_size: int = 16, seed: int = 0):
        c = model.config
        self.model, self.page_size, self.device = model, page_size, model.device
        shape = (c.num_hidden_layers, 2, pages, page_size, c.num_key_value_heads, c.head_dim)
        self.cache = torch.full(shape, float("nan"), dtype=model.dtype, device=model.device)
        self.free = list(range(pages))
        random.Random(seed).shuffle(self.free)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def release(self, sequence: Sequence) -> None:
        self.free.extend(sequence.pages)
        sequence.pages, sequence.cached = [], 0

    def step(self, work: list[tuple[Sequence, int]], last_only: bool = False) -> Tensor:
        """The next `count` tokens of each sequence, in one packed batch. Returns their logits, (T, vocabulary), or,
        with last_only, those of each sequence's last, (sequences, vocabulary)."""
        tokens, positions, slots = [], [], []
        for sequence, count in work:
            stop = sequence.cached + count
            missing = self.pages_for(stop) - len(sequence.pages)
            sequence.pages += [self.free.pop() for _ in range(missing)]
            for place in range(sequence.cached, stop):
                tokens.append(sequence.tokens[place])
                positions.append(place)
                slots.append(sequence.pages[place // self.page_size] * self.page_size + place % self.page_size)
            sequence.cached = stop
        width = max(len(sequence.pages) for sequence, _ in work)
        counts = [count for _, count in work]
        context = KVCacheContext(
            self.cache[:, 0],
            self.cache[:, 1],
            self._integers([s.pages + [-1] * (width - len(s.pages)) for s, _ in work]),
            self._integers(slots),
            self._integers([s.cached for s, _ in work]),
            self._integers([0, *accumulate(counts)]),
            max_query_length=max(counts),
        )
        keep = torch.tensor(counts, device=self.device).cumsum(0) - 1 if last_only else 0
        with kv_cache_context(context), torch.no_grad():
            return self.model(
                self._integers([tokens]).long(),
                position_ids=self._integers([positions]).long(),
                use_cache=False,
                logits_to_keep=keep,
            ).logits[0]

    def _integers(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


def packed_logits(model, texts: Iterable[list[int]]) -> list[Tensor]:
    """Logits of all tokens of whole texts, packed, without a cache: what a trainer computes. Differentiable."""
    texts = list(texts)
    lengths = [len(text) for text in texts]
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=model.device)
    logits = model(
        torch.tensor([[token for text in texts for token in text]], device=model.device),
        position_ids=torch.tensor([[place for n in lengths for place in range(n)]], device=model.device),
        use_cache=False,
        cu_seq_lens_q=starts,
        cu_seq_lens_k=starts,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
    ).logits[0]
    return list(logits.split(lengths))
