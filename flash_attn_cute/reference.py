"""The public function in plain PyTorch: the executable specification, differentiable, on any device.

It is written to be read and to be right. It loops over sequences, reads lengths on the host, and builds the whole score
matrix of a sequence at once.

What it settles beyond the table of the public function:

- The bottom-right alignment of `causal` and of windows uses the lengths in use, `seqused_*` where given, less what
  `leftpad_k` leaves out in front.
- A row that sees no key gives out = 0. Its lse is -inf, or, with a sink, the sink itself: the sink is a logit of the
  softmax like any other, and the row does see it.
- Rows that belong to no sequence (past `seqused_q`, or outside `cu_seqlens_q`) give out = 0 and lse = -inf.
- Keys past the length in use or before `leftpad_k`, and page-table entries of pages that hold none in use, are never
  touched. A key inside a sequence that is masked has weight 0, and 0 times a NaN value is NaN, as in any
  implementation.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_cute.problem import AttentionTensors, Problem


def attention_reference(
    tensors: AttentionTensors,
    problem: Problem,
    *,
    compute_dtype: torch.dtype = torch.float64,
    round_output: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention computed in `compute_dtype` throughout.

    Returns out of `problem.out_shape` and lse of `problem.lse_shape`: in the dtype of q and in float32, or both in
    `compute_dtype` with `round_output=False`. `tensors.out` is not written. Gradients flow to q, k, v,
    learnable_sink and key_bias. Raises ValueError for lengths that do not fit the tensors.
    """
    out, lse = _attention(tensors, problem, product_dtype=compute_dtype, softmax_dtype=compute_dtype)
    if round_output:
        out, lse = out.to(problem.dtype), lse.to(torch.float32)
    return out, lse


def attention_plain(tensors: AttentionTensors, problem: Problem) -> tuple[Tensor, Tensor]:
    """What a plain PyTorch program computes: products in the input dtype, softmax in float32 (float64 for float64).

    The yardstick of the error rule: its distance from `attention_reference` is what the input dtype costs. Returns
    out in the dtype of q, and lse in the dtype of the softmax.
    """
    softmax_dtype = torch.promote_types(problem.dtype, torch.float32)
    return _attention(tensors, problem, product_dtype=problem.dtype, softmax_dtype=softmax_dtype)


def combine_reference(
    out_partial: Tensor,
    lse_partial: Tensor,
    cu_seqlens: Tensor | None = None,
    seqused: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    *,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_combine` computed in `compute_dtype`: what the argument names mean stands there.

    Returns (out, lse) in `compute_dtype`. Differentiable in the partial results and the sink.
    """
    lse_partial = lse_partial.to(compute_dtype)
    scores = lse_partial.movedim(0, -1)
    if learnable_sink is not None:
        sink = learnable_sink.to(compute_dtype)[:, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    largest = scores.detach().amax(dim=-1)
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    total = torch.exp(scores - largest[..., None]).sum(dim=-1)
    nothing = total == 0.0
    total = total.masked_fill(nothing, 1.0)
    weights = torch.exp(lse_partial - largest) / total
    # What a split without keys holds is never looked at, NaN or not.
    empty = (lse_partial == float("-inf"))[..., None]
    out = (weights[..., None] * out_partial.to(compute_dtype).masked_fill(empty, 0.0)).sum(dim=0)
    lse = (largest + torch.log(total)).masked_fill(nothing, float("-inf"))
    padding = _padding_rows(lse.shape[:-1], cu_seqlens, seqused).to(out.device)[..., None]
    return out.masked_fill(padding[..., None], 0.0), lse.masked_fill(padding, float("-inf")).transpose(-1, -2)


def _padding_rows(lead: torch.Size, cu_seqlens: Tensor | None, seqused: Tensor | None) -> Tensor:
    """Which rows of (total_q,) or (B, Sq) belong to no sequence, or lie past what is used of theirs."""
    if len(lead) == 2:
        used = [lead[1]] * lead[0] if seqused is None else seqused.tolist()
        return torch.arange(lead[1])[None, :] >= torch.tensor(used, dtype=torch.long)[:, None]
    if cu_seqlens is None:
        return torch.zeros(lead, dtype=torch.bool)
    padding = torch.ones(lead, dtype=torch.bool)
    bounds = cu_seqlens.tolist()
    for index, (start, stop) in enumerate(pairwise(bounds)):
        padding[start : stop if seqused is None else min(stop, start + int(seqused[index]))] = False
    return padding


class _Sequence(NamedTuple):
    """One sequence: its rows of q, and its rows among all slots of k (a slice, or slot numbers where paged)."""

    q_start: int
    q_length: int
    k_rows: slice | Tensor


def _attention(
    tensors: AttentionTensors, problem: Problem, *, product_dtype: torch.dtype, softmax_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both products take and give `product_dtype`; what lies between them is computed in `softmax_dtype`."""
    q = _rows(tensors.q, not problem.q_packed)
    k, v = _rows(tensors.k, not problem.k_packed), _rows(tensors.v, not problem.k_packed)
    key_mask = _key_side_rows(tensors.key_mask, tensors.k, problem)
    key_bias = _key_side_rows(tensors.key_bias, tensors.k, problem)

    outs, lses = [], []
    filled = 0
    for sequence in _sequences(tensors, problem):
        gap = sequence.q_start - filled
        filled = sequence.q_start + sequence.q_length
        if gap:
            _append_padding(outs, lses, gap, problem, q.device, product_dtype, softmax_dtype)
        rows = sequence.k_rows
        out, lse = _attend(
            q[sequence.q_start : filled].to(product_dtype),
            k[rows].to(product_dtype),
            v[rows].to(product_dtype),
            None if key_mask is None else key_mask[rows],
            None if key_bias is None else key_bias[rows],
            tensors.learnable_sink,
            problem,
            softmax_dtype,
        )
        outs.append(out)
        lses.append(lse)
    _append_padding(outs, lses, problem.total_q - filled, problem, q.device, product_dtype, softmax_dtype)

    out, lse = torch.cat(outs, dim=0), torch.cat(lses, dim=1)
    if not problem.q_packed:
        out = out.reshape(problem.out_shape)
        lse = lse.reshape(problem.num_heads, problem.batch_size, problem.seqlen_q).transpose(0, 1)
    return out.contiguous(), lse.contiguous()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    key_bias: Tensor | None,
    sink: Tensor | None,
    problem: Problem,
    softmax_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """One sequence: q (Sq, H, D), k (Sk, Hk, D), v (Sk, Hk, Dv), key_mask and key_bias (Sk, H*).

    Returns out (Sq, H, Dv) in the dtype of q and lse (H, Sq) in `softmax_dtype`.
    """
    seqlen_q, seqlen_k, heads, kv_heads = q.shape[0], k.shape[0], q.shape[1], k.shape[1]
    group = heads // kv_heads

    # Query heads of a group are rows of one product with their KV head: (Hk, group * Sq, D).
    grouped_q = (q * problem.softmax_scale).permute(1, 0, 2).reshape(kv_heads, group * seqlen_q, q.shape[2])
    scores = torch.matmul(grouped_q, k.permute(1, 2, 0)).reshape(heads, seqlen_q, seqlen_k)
    if problem.softcap > 0.0:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    scores = scores.to(softmax_dtype)
    if key_bias is not None:
        scores = scores + _per_query_head(key_bias, heads).to(softmax_dtype)
    hidden = ~_visible(seqlen_q, seqlen_k, problem, q.device)
    if key_mask is not None:
        hidden = hidden | ~_per_query_head(key_mask, heads)
    scores = scores.masked_fill(hidden, float("-inf"))

    weights, lse = _softmax(scores, sink)
    grouped_weights = weights.to(v.dtype).reshape(kv_heads, group * seqlen_q, seqlen_k)
    out = torch.matmul(grouped_weights, v.permute(1, 0, 2)).reshape(heads, seqlen_q, v.shape[2])
    # Exactly zero where nothing is seen, whatever the values hold.
    out = out.masked_fill(hidden.all(dim=-1).expand(heads, seqlen_q).unsqueeze(-1), 0.0)
    return out.transpose(0, 1), lse


def _softmax(scores: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights (H, Sq, Sk) and lse (H, Sq) of scores (H, Sq, Sk), with a logit (H,) that joins and has no weight.

    Rows of -inf have weights 0 and no NaN, in the gradient either.
    """
    if sink is not None:
        sink = sink.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], -1)
        scores = torch.cat([scores, sink], dim=-1)
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:2], float("-inf"))
    # The maximum is a shift that cancels, in value and in gradient.
    maximum = scores.detach().amax(dim=-1, keepdim=True)
    maximum = maximum.masked_fill(maximum == float("-inf"), 0.0)
    exponentials = torch.exp(scores - maximum)
    total = exponentials.sum(dim=-1, keepdim=True)
    empty = total == 0.0
    total = total.masked_fill(empty, 1.0)
    lse = (maximum + torch.log(total)).masked_fill(empty, float("-inf")).squeeze(-1)
    weights = exponentials / total
    return (weights if sink is None else weights[..., :-1]), lse


def _visible(seqlen_q: int, seqlen_k: int, problem: Problem, device: torch.device) -> Tensor:
    """(Sq, Sk) bool: which keys a query sees by position, aligned to the bottom right."""
    key = torch.arange(seqlen_k, device=device)[None, :]
    diagonal = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_k - seqlen_q)
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if problem.window_right is not None:
        visible &= key <= diagonal + problem.window_right
    if problem.window_left is not None:
        visible &= key >= diagonal - problem.window_left
    return visible


def _per_query_head(key_side: Tensor, heads: int) -> Tensor:
    """(Sk, H*) -> (H, 1, Sk), head h taking h // (H // H*)."""
    return key_side.repeat_interleave(heads // key_side.shape[1], dim=1).transpose(0, 1).unsqueeze(1)


def _rows(tensor: Tensor, has_batch: bool) -> Tensor:
    """Merge (B, S) or (pages, page_size) into one dimension of rows."""
    return tensor.flatten(0, 1) if has_batch else tensor


def _key_side_rows(tensor: Tensor | None, k: Tensor, problem: Problem) -> Tensor | None:
    if tensor is None or problem.k_packed:
        return tensor
    if not problem.is_paged:  # one for every sequence, or one a sequence
        tensor = tensor.expand(k.shape[0], -1, -1)
    return tensor.flatten(0, 1)


def _sequences(tensors: AttentionTensors, problem: Problem) -> list[_Sequence]:
    q_starts, q_lengths = _extents("q", tensors.cu_seqlens_q, tensors.seqused_q, problem.seqlen_q, problem)
    k_starts, k_ends = _extents("k", tensors.cu_seqlens_k, tensors.seqused_k, problem.seqlen_k, problem)
    if problem.has_cache_batch_idx:
        k_starts = [row * problem.seqlen_k for row in _cache_rows(tensors, k_ends)]
    leftpads = _leftpads(tensors, k_ends)
    sequences = []
    for index in range(problem.batch_size):
        leftpad, k_end = leftpads[index], k_ends[index]
        if problem.is_paged:
            k_rows = page_slots(tensors.page_table[index], leftpad, k_end, problem.page_size)
        else:
            k_rows = slice(k_starts[index] + leftpad, k_starts[index] + k_end)
        sequences.append(_Sequence(q_starts[index], q_lengths[index], k_rows))
    return sequences


def _extents(
    side: str, cu_seqlens: Tensor | None, seqused: Tensor | None, seqlen: int | None, problem: Problem
) -> tuple[list[int], list[int]]:
    """First row and length in use of every sequence of one side."""
    if cu_seqlens is None:
        starts = [index * seqlen for index in range(problem.batch_size)]
        room = [seqlen] * problem.batch_size
    else:
        bounds = cu_seqlens.tolist()
        starts, room = bounds[:-1], [stop - start for start, stop in pairwise(bounds)]
        rows = problem.total_q if side == "q" else problem.total_k
        if min(bounds) < 0 or bounds[-1] > rows or any(length < 0 for length in room):
            raise ValueError(f"cu_seqlens_{side}: got {bounds}; takes values that do not fall, from 0 to {rows} rows")
    if seqused is None:
        return starts, room
    lengths = seqused.tolist()
    if any(not 0 <= length <= limit for length, limit in zip(lengths, room, strict=True)):
        raise ValueError(f"seqused_{side}: got {lengths}; takes lengths from 0 to {room}")
    return starts, lengths


def _leftpads(tensors: AttentionTensors, k_ends: list[int]) -> list[int]:
    if tensors.leftpad_k is None:
        return [0] * len(k_ends)
    leftpads = tensors.leftpad_k.tolist()
    if any(not 0 <= leftpad <= end for leftpad, end in zip(leftpads, k_ends, strict=True)):
        raise ValueError(f"leftpad_k: got {leftpads}; takes values from 0 to {k_ends}")
    return leftpads


def _cache_rows(tensors: AttentionTensors, k_ends: list[int]) -> list[int]:
    """Where a sequence has no key its row is not looked at."""
    rows, count = tensors.cache_batch_idx.tolist(), tensors.k.shape[0]
    if any(end > 0 and not 0 <= row < count for row, end in zip(rows, k_ends, strict=True)):
        raise ValueError(f"cache_batch_idx: got {rows}; takes rows of k, from 0 to {count - 1}")
    return rows


def page_slots(pages: Tensor, start: int, stop: int, page_size: int) -> Tensor:
    """Slot numbers (stop - start,) of positions of a sequence; only entries of pages that hold them are looked at."""
    positions = torch.arange(start, stop, device=pages.device)
    return pages[positions // page_size].long() * page_size + positions % page_size


def _append_padding(
    outs: list[Tensor],
    lses: list[Tensor],
    rows: int,
    problem: Problem,
    device: torch.device,
    out_dtype: torch.dtype,
    lse_dtype: torch.dtype,
) -> None:
    """Rows that belong to no sequence: out = 0 and lse = -inf."""
    outs.append(torch.zeros(rows, problem.num_heads, problem.head_dim_v, dtype=out_dtype, device=device))
    lses.append(torch.full((problem.num_heads, rows), float("-inf"), dtype=lse_dtype, device=device))
