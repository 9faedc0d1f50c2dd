"""A small matrix of the library's own Hopper forward: what is compared between the emulator and a GPU."""

import zlib
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tests.emulated.kernels.random_integers import RandomIntegers

# Sequences of more than one query tile, of one row, and shorter in queries than in keys.
LENGTHS_Q = (150, 1, 77)
LENGTHS_K = (150, 190, 130)
USED_K = (101, 190, 3)  # of the keys, where seqused is given
MASKS = {"full": {}, "causal": {"causal": True}, "window": {"window_size": (60, 20)}}


@dataclass(frozen=True)
class ForwardCase:
    """One call of flash_attn_varlen_func that returns (out, lse)."""

    name: str
    head_dim: int
    heads: int = 4
    kv_heads: int = 2
    dtype: torch.dtype = torch.bfloat16
    cached: bool = False  # keys and values as (batch, capacity, heads, dim), used up to seqused_k
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self, device: str) -> dict[str, Any]:
        """About normal numbers, the same bits everywhere: sums of four integers."""
        random = RandomIntegers(zlib.crc32(self.name.encode()))

        def about_normal(*shape: int) -> Tensor:
            return (random.draw((4, *shape), -128, 127).sum(0) / 128.0).to(device, self.dtype)

        def integers(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        keys = (len(LENGTHS_K), max(LENGTHS_K)) if self.cached else (sum(LENGTHS_K),)
        return {
            "q": about_normal(sum(LENGTHS_Q), self.heads, self.head_dim),
            "k": about_normal(*keys, self.kv_heads, self.head_dim),
            "v": about_normal(*keys, self.kv_heads, self.head_dim),
            "cu_seqlens_q": integers(0, *accumulate(LENGTHS_Q)),
            "cu_seqlens_k": None if self.cached else integers(0, *accumulate(LENGTHS_K)),
            "seqused_k": integers(*USED_K) if self.cached else None,
            **self.options,
        }

    def run(self, device: str = "cuda", backend: str = "cute") -> tuple[Tensor, Tensor]:
        """(out, lse) on the CPU."""
        from flash_attn_cute import flash_attn_varlen_func

        with torch.no_grad():
            outputs = flash_attn_varlen_func(**self.arguments(device), backend=backend, return_lse=True)
        return tuple(output.cpu() for output in outputs)


def cases() -> list[ForwardCase]:
    found = [
        ForwardCase(f"forward-d{head_dim}-{mask}", head_dim, options=options)
        for head_dim in (64, 128, 256)
        for mask, options in MASKS.items()
    ]
    found += [
        ForwardCase(f"forward-d{head_dim}-{mask}-gqa8-packed", head_dim, 8, 1, options=MASKS[mask] | {"pack_gqa": True})
        for head_dim, mask in ((64, "full"), (128, "causal"))
    ]
    found += [
        ForwardCase("forward-d128-causal-seqused", 128, cached=True, options=MASKS["causal"]),
        ForwardCase("forward-d64-full-seqused", 64, cached=True),
        ForwardCase("forward-d128-causal-fp16", 128, dtype=torch.float16, options=MASKS["causal"]),
    ]
    return found
