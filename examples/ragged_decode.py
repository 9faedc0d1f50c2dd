"""What the examples share: a ragged batch, its attention one sequence at a time, and what a layout takes in memory."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_cute import flash_attn_varlen_func, supports

HEADS, HEADS_KV, HEAD_DIM = 8, 2, 64
# How far a result in bf16 may be from fp64: two of its steps for values from 1 to 2.
LARGEST_ERROR = 2.0**-6


class Batch(NamedTuple):
    """Packed sequences: q (total_q, H, D), k and v (total_k, Hk, D), bf16; offsets are int32."""

    lengths_q: list[int]
    lengths_k: list[int]
    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor

    @classmethod
    def random(cls, lengths_q: list[int], lengths_k: list[int], seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)

        def rows(count: int, heads: int) -> Tensor:
            return torch.randn(count, heads, HEAD_DIM, generator=generator).bfloat16()

        def offsets(lengths: list[int]) -> Tensor:
            return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

        total_q, total_k = sum(lengths_q), sum(lengths_k)
        q, k, v = rows(total_q, HEADS), rows(total_k, HEADS_KV), rows(total_k, HEADS_KV)
        return cls(lengths_q, lengths_k, q, k, v, offsets(lengths_q), offsets(lengths_k))

    @property
    def max_seqlen_k(self) -> int:
        return max(self.lengths_k)

    def memory_saved(self) -> float:
        """The part of a per-query layout's elements that the key-side layout does without, at equal H*."""
        return 1 - len(self.k) / (len(self.q) * self.max_seqlen_k)


def attend(batch: Batch, **masks: Tensor) -> tuple[Tensor, str]:
    """out (total_q, H, D) of causal attention, and what computed it: a GPU where its kernel takes the call."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = [x.to(device) for x in (batch.q, batch.k, batch.v, batch.cu_seqlens_q, batch.cu_seqlens_k)]
    options = dict(max_seqlen_q=max(batch.lengths_q), max_seqlen_k=batch.max_seqlen_k, causal=True)
    options |= {name: x.to(device) for name, x in masks.items()}
    support = supports(*call, **options)
    if not support:
        print(f"{torch.cuda.get_device_name()}: {support.reason}; the reference computes it")
        return flash_attn_varlen_func(*call, **options, backend="reference").cpu(), "the reference"
    computed_by = "the reference" if device == "cpu" else torch.cuda.get_device_name()
    return flash_attn_varlen_func(*call, **options).cpu(), computed_by


def check(batch: Batch, out: Tensor, mask: Tensor, bias: Tensor, **masks: Tensor) -> None:
    """Compares `out` with the reference in fp64, and the reference with torch's own attention.

    mask, bias: (total_q, H, max_seqlen_k), what `masks` mean for each query and query head. Raises AssertionError.
    """
    wide = [x.double() for x in (batch.q, batch.k, batch.v)]
    options = dict(max_seqlen_k=batch.max_seqlen_k, causal=True, backend="reference")
    reference = flash_attn_varlen_func(*wide, batch.cu_seqlens_q, batch.cu_seqlens_k, **options, **masks)
    dense = _one_sequence_at_a_time(batch, wide, mask, bias)
    assert (reference - dense).abs().max() < 1e-12, "the reference is not what torch computes"
    error = (out.double() - reference).abs().max().item()
    assert error < LARGEST_ERROR, f"off by {error}"
    print(f"largest error against the fp64 reference: {error:.1e} (bf16: below {LARGEST_ERROR:.1e})")


def _one_sequence_at_a_time(batch: Batch, wide: list[Tensor], mask: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1) for x in wide)
    out = torch.zeros_like(q)
    q_start = k_start = 0
    for length_q, length_k in zip(batch.lengths_q, batch.lengths_k, strict=True):
        rows, keys = slice(q_start, q_start + length_q), slice(k_start, k_start + length_k)
        q_start, k_start = rows.stop, keys.stop
        later = torch.ones(length_q, length_k, dtype=torch.bool).triu(length_k - length_q + 1)
        added = bias[rows, :, :length_k].transpose(0, 1).double()
        added = added.masked_fill(later | ~mask[rows, :, :length_k].transpose(0, 1), float("-inf"))
        own = torch.nn.functional.scaled_dot_product_attention(
            q[:, rows], k[:, keys], v[:, keys], attn_mask=added, enable_gqa=True
        )
        blind = (added == float("-inf")).all(dim=-1, keepdim=True)  # torch leaves the result of such rows open
        out[:, rows] = own.masked_fill(blind, 0.0)
    return out.transpose(0, 1)


def for_each_query(batch: Batch, key_side: Tensor) -> Tensor:
    """(total_k, H*) -> (total_q, H, max_seqlen_k): the same for every query of a sequence and every head of a group."""
    spread = key_side.new_zeros(len(batch.q), HEADS, batch.max_seqlen_k)
    per_head = key_side.repeat_interleave(HEADS // key_side.shape[1], dim=1)
    q_start = k_start = 0
    for length_q, length_k in zip(batch.lengths_q, batch.lengths_k, strict=True):
        spread[q_start : q_start + length_q, :, :length_k] = per_head[k_start : k_start + length_k].T
        q_start, k_start = q_start + length_q, k_start + length_k
    return spread


def all_heads(query_side: Tensor) -> Tensor:
    """(total_q, H*, max_seqlen_k) -> (total_q, H, max_seqlen_k)."""
    return query_side.repeat_interleave(HEADS // query_side.shape[1], dim=1)


def print_memory(batch: Batch, what: str) -> None:
    key_side, per_query = len(batch.k), len(batch.q) * batch.max_seqlen_k
    print(
        f"{what}: total_k = {key_side} elements a head in place of total_q x max_seqlen_k = {len(batch.q)} x "
        f"{batch.max_seqlen_k} = {per_query}: {batch.memory_saved():.1%} less"
    )
