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
  touched.
- A bias of -inf, or of the least finite number of its own dtype, masks as False in a mask does.
- A key that a query does not see has no part in its row or its gradients, NaN or not. Kernels owe this to what
  `key_mask` and `key_bias` mask; what `causal` or a window hides inside a sequence they may multiply by 0.
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
    `compute_dtype` with `round_output=False`. `tensors.out` is not written. Gradients flow to q, k, v, learnable_sink,
    key_bias and query_bias. Raises ValueError for lengths that do not fit the tensors.
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
        rows, queries = sequence.k_rows, slice(sequence.q_start, filled)
        own_k = k[rows].to(product_dtype)
        out, lse = _attend(
            q[queries].to(product_dtype),
            own_k,
            v[rows].to(product_dtype),
            _of_scores(key_mask, tensors.query_mask, rows, queries, len(own_k), problem),
            _of_scores(key_bias, tensors.query_bias, rows, queries, len(own_k), problem),
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


def _of_scores(
    key_side: Tensor | None,
    query_side: Tensor | None,
    k_rows: slice | Tensor,
    q_rows: slice,
    seqlen_k: int,
    problem: Problem,
) -> list[Tensor]:
    """The masks, or the biases, of one sequence in the layout of its scores: (H, 1, Sk) of keys, (H, Sq, Sk) of
    queries."""
    found = []
    if key_side is not None:
        found.append(key_side[k_rows].transpose(0, 1)[:, None])
    if query_side is not None:
        if seqlen_k > query_side.shape[2]:
            raise ValueError(
                f"max_seqlen_k: got {query_side.shape[2]} for a sequence of {seqlen_k} keys; takes a bound"
            )
        found.append(query_side[q_rows, :, :seqlen_k].transpose(0, 1))
    return [x.repeat_interleave(problem.num_heads // x.shape[0], dim=0) for x in found]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: list[Tensor],
    biases: list[Tensor],
    sink: Tensor | None,
    problem: Problem,
    softmax_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """One sequence: q (Sq, H, D), k (Sk, Hk, D), v (Sk, Hk, Dv), masks and biases (H, 1 or Sq, Sk).

    Returns out (Sq, H, Dv) in the dtype of q and lse (H, Sq) in `softmax_dtype`.
    """
    hidden = ~_visible(q.shape[0], k.shape[0], problem, q.device)
    for mask in masks:
        hidden = hidden | ~mask
    for bias in biases:
        hidden = hidden | (bias <= torch.finfo(bias.dtype).min)
    hidden = hidden.expand(q.shape[1], -1, -1)

    scores = _query_key_products(q * problem.softmax_scale, k, hidden)
    if problem.softcap > 0.0:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    scores = scores.to(softmax_dtype)
    for bias in biases:
        scores = scores + bias.to(softmax_dtype)
    weights, lse = _softmax(scores.masked_fill(hidden, float("-inf")), sink)
    return _weighted_values(weights.to(v.dtype), v, hidden).transpose(0, 1), lse


def _query_key_products(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    """(H, Sq, Sk) of q (Sq, H, D) and k (Sk, Hk, D); finite where hidden (H, Sq, Sk), whatever the keys hold."""
    (seqlen_q, heads, head_dim), (seqlen_k, kv_heads, _) = q.shape, k.shape
    finite, odd = _split_finite(k)
    # Query heads of a group are rows of one product with their KV head: (Hk, group * Sq, D).
    grouped_q = q.permute(1, 0, 2).reshape(kv_heads, -1, head_dim)
    scores = torch.matmul(grouped_q, finite.permute(1, 2, 0)).reshape(heads, seqlen_q, seqlen_k)
    if len(odd):
        products = q.transpose(0, 1)[:, :, None] * _where_seen(k, odd, hidden)
        scores = scores.index_copy(2, odd, products.sum(dim=-1))
    return scores


def _weighted_values(weights: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """(H, Sq, Dv) of weights (H, Sq, Sk) and v (Sk, Hk, Dv); what is hidden (H, Sq, Sk) adds nothing."""
    (heads, seqlen_q, seqlen_k), (_, kv_heads, head_dim_v) = weights.shape, v.shape
    finite, odd = _split_finite(v)
    grouped_weights = weights.reshape(kv_heads, heads // kv_heads * seqlen_q, seqlen_k)
    out = torch.matmul(grouped_weights, finite.permute(1, 0, 2)).reshape(heads, seqlen_q, head_dim_v)
    if len(odd):
        out = out + (weights[:, :, odd, None] * _where_seen(v, odd, hidden)).sum(dim=2)
    return out


def _split_finite(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(S, Hk, D) with rows that hold an infinity or NaN set to 0, and the numbers of those rows.

    Where there are none it is the tensor itself: whether a call has masks does not change the products of what it sees.
    """
    is_odd = ~rows.isfinite().flatten(1).all(dim=1)
    odd = is_odd.nonzero()[:, 0]
    return (rows.masked_fill(is_odd[:, None, None], 0.0) if len(odd) else rows), odd


def _where_seen(rows: Tensor, odd: Tensor, hidden: Tensor) -> Tensor:
    """Rows `odd` of (S, Hk, D) for each query, (H, Sq, odd, D): 0 where hidden, also in what gradients multiply by."""
    per_head = rows[odd].transpose(0, 1).repeat_interleave(hidden.shape[0] // rows.shape[1], dim=0)
    return per_head[:, None].masked_fill(hidden[:, :, odd, None], 0.0)


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
