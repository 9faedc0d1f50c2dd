"""Attention in Triton, for CUDA devices from compute capability 8.0: what is taken, the launches, autograd.

It never splits a row's keys, so `num_splits` (a cap, or the choice of a plan) has nothing to choose, and a row's bits
depend on its own query, keys and values alone, in every call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from flash_attn_cute.batch_invariant.triton_backward import gradient_of_keys, gradient_of_queries, row_dots
from flash_attn_cute.batch_invariant.triton_device import LOG2_E
from flash_attn_cute.batch_invariant.triton_forward import attention_forward
from flash_attn_cute.batch_invariant.triton_launch import INTERPRETED, on_device
from flash_attn_cute.batch_invariant.triton_tuning import KernelTiles, tiles_for
from flash_attn_cute.problem import AttentionTensors, Problem
from flash_attn_cute.scheduler_metadata import SchedulerMetadata

LEAST_CAPABILITY = (8, 0)
# Windows are added to positions in int32. No sequence that fits memory is this long, so a wider window is this one.
WIDEST_WINDOW = 2**30

Forward = Callable[[AttentionTensors, Problem], tuple[Tensor, Tensor]]


def unsupported_on(capability: tuple[int, int] | str) -> str | None:
    """Why the backend does not run on a device, or None: a compute capability, or the type of a device without one."""
    if capability == "cpu" and INTERPRETED:
        return None
    if isinstance(capability, str):
        return f"the Triton kernels need a CUDA device, not {capability} (or, on the CPU, TRITON_INTERPRET=1)"
    if capability < LEAST_CAPABILITY:
        return f"the Triton kernels need compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
    return None


def unsupported(problem: Problem) -> str | None:
    """Why the kernels do not take the problem, or None."""
    if problem.seqlen_k_per_split is not None:
        return "seqlen_k_per_split"
    if problem.scheduler != "auto":
        return f"scheduler={problem.scheduler!r}"
    return _unsupported_either_way(problem)


def unsupported_backward(problem: Problem) -> str | None:
    """Why there are no gradients, or None. Splits and schedulers are another forward's own business."""
    return "gradients over paged keys" if problem.is_paged else _unsupported_either_way(problem)


def _unsupported_either_way(problem: Problem) -> str | None:
    if problem.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {problem.dtype}"
    for given, name in (
        (problem.has_leftpad_k, "leftpad_k"),
        (problem.has_cache_batch_idx, "cache_batch_idx"),
        (problem.key_mask_heads is not None, "key_mask"),
        (problem.key_bias_heads is not None, "key_bias"),
        (problem.query_mask_heads is not None, "attn_mask of each query"),
        (problem.query_bias_heads is not None, "attn_bias of each query"),
    ):
        if given:
            return name
    return None


@dataclass(frozen=True)
class _Launch:
    """What all kernels of a problem are told: sizes, factors, tiles."""

    problem: Problem
    tiles: KernelTiles

    @classmethod
    def of(cls, problem: Problem, device: torch.device) -> _Launch:
        capability = None if INTERPRETED else torch.cuda.get_device_capability(device)
        widest = max(_padded(problem.head_dim), _padded(problem.head_dim_v))
        return cls(problem, tiles_for(capability, problem.dtype, widest))

    def pack(self, block_m: int) -> int:
        """Query heads of a KV head in one tile: all that fit, in equal parts."""
        group = self.problem.qheads_per_kvhead
        return max(part for part in range(1, min(group, block_m) + 1) if group % part == 0)

    def query_tiles(self, tokens: int) -> int:
        """No batch of these sizes has more: each sequence, and the padding on either side, has one that is not full."""
        p = self.problem
        if p.q_packed:
            return p.total_q // tokens + p.batch_size + 2
        return p.batch_size * -(-p.seqlen_q // tokens)

    def key_tiles(self, block_n: int) -> int:
        return self.problem.total_k // block_n + self.problem.batch_size + 2

    def factors(self) -> dict[str, Any]:
        """A score in powers of two is `scores(product)` times exponent_factor, which is positive."""
        p = self.problem
        if p.softcap > 0.0:
            return dict(
                score_factor=p.softmax_scale / p.softcap,
                exponent_factor=p.softcap * LOG2_E.value,
                SOFTCAP=True,
                FACTOR=1,
            )
        sign = 0 if p.softmax_scale == 0.0 else int(math.copysign(1, p.softmax_scale))
        return dict(
            score_factor=1.0,
            exponent_factor=abs(p.softmax_scale) * LOG2_E.value if sign else 1.0,
            SOFTCAP=False,
            FACTOR=sign,
        )

    def common(self, block_m: int, block_n: int) -> dict[str, Any]:
        p = self.problem
        return self.factors() | dict(
            batch=p.batch_size,
            window_left=min(p.window_left or 0, WIDEST_WINDOW),
            window_right=min(p.window_right or 0, WIDEST_WINDOW),
            HAS_USED_Q=p.has_seqused_q,
            HAS_USED_K=p.has_seqused_k,
            HAS_LEFT=p.window_left is not None,
            HAS_RIGHT=p.window_right is not None,
            GROUP=p.qheads_per_kvhead,
            HEAD_DIM=p.head_dim,
            HEAD_DIM_V=p.head_dim_v,
            PADDED_DIM=_padded(p.head_dim),
            PADDED_DIM_V=_padded(p.head_dim_v),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            INTERPRETED=INTERPRETED,
        )


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """(block, row, head): block is the batch or page dimension, 0 of a packed tensor."""
    return (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]


def forward(tensors: AttentionTensors, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None), of `problem.out_shape` and `problem.lse_shape`. Every row of both is written."""
    t, p = tensors, problem
    out = t.q.new_empty(p.out_shape) if t.out is None else t.out
    lse = t.q.new_empty(p.lse_shape, dtype=torch.float32) if p.return_lse else None
    launch = _Launch.of(p, t.q.device)
    block_m, block_n, num_warps, num_stages = launch.tiles.forward
    pack = launch.pack(block_m)
    grid = (launch.query_tiles(block_m // pack), p.num_heads // pack)
    if grid[0] == 0:
        return out, lse
    if p.q_packed:
        lse_strides = (0, p.total_q)
    else:
        lse_strides = (p.num_heads * p.seqlen_q, p.seqlen_q)
    with on_device(t.q):
        attention_forward[grid](
            t.q,
            t.k,
            t.v,
            out,
            lse,
            t.cu_seqlens_q,
            t.cu_seqlens_k,
            t.seqused_q,
            t.seqused_k,
            t.page_table,
            t.learnable_sink,
            *strides_of(t.q),
            *strides_of(t.k),
            *strides_of(t.v),
            *strides_of(out),
            *lse_strides,
            0 if t.page_table is None else t.page_table.stride(0),
            rows_q=p.total_q if p.q_packed else p.seqlen_q,
            rows_k=p.total_k if p.k_packed else p.seqlen_k,
            Q_PACKED=p.q_packed,
            K_PACKED=p.k_packed,
            HAS_SINK=p.sink_dtype is not None,
            HAS_LSE=p.return_lse,
            PAGE_SIZE=p.page_size or 0,
            PACK=pack,
            **launch.common(block_m, block_n),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out, lse


def backward(
    tensors: AttentionTensors, problem: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and learnable_sink (None without one) of a packed problem, in the dtypes of those.

    lse: (H, total_q) float32, natural logarithm, from any forward. dlse: its gradient, or None. The same call gives the
    same bits, and a sequence's gradients do not depend on its neighbours.
    """
    t, p = tensors, problem
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    launch = _Launch.of(p, t.q.device)
    delta = torch.empty_like(lse)
    dq, dk, dv = (x.new_empty(x.shape) for x in (t.q, t.k, t.v))
    rows = 64
    with on_device(t.q):
        if p.total_q:
            row_dots[(-(-p.total_q // rows), p.num_heads)](
                out,
                dout,
                dlse,
                delta,
                *out.stride()[:2],
                *dout.stride()[:2],
                *((0, 0) if dlse is None else (dlse.stride(1), dlse.stride(0))),
                p.total_q,
                HAS_DLSE=dlse is not None,
                HEAD_DIM_V=p.head_dim_v,
                PADDED_DIM_V=_padded(p.head_dim_v),
                ROWS=rows,
            )
        arguments = (t.q, t.k, t.v, dout, lse, delta)
        lengths = (t.cu_seqlens_q, t.cu_seqlens_k, t.seqused_q, t.seqused_k)
        strides = [stride for x in (t.q, t.k, t.v, dout) for stride in x.stride()[:2]]
        extents = dict(rows_q=p.total_q, rows_k=p.total_k, gradient_factor=p.softmax_scale)
        block_m, block_n, num_warps, num_stages = launch.tiles.dq
        pack = launch.pack(block_m)
        gradient_of_queries[(launch.query_tiles(block_m // pack), p.num_heads // pack)](
            *arguments,
            dq,
            *lengths,
            *strides,
            *dq.stride()[:2],
            PACK=pack,
            **extents,
            **launch.common(block_m, block_n),
            num_warps=num_warps,
            num_stages=num_stages,
        )
        block_m, block_n, num_warps, num_stages = launch.tiles.dkv
        gradient_of_keys[(launch.key_tiles(block_n), p.num_heads_kv)](
            *arguments,
            dk,
            dv,
            *lengths,
            *strides,
            *dk.stride()[:2],
            *dv.stride()[:2],
            **extents,
            **launch.common(block_m, block_n),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    dsink = None
    if t.learnable_sink is not None:
        # The sink's weight in a row times what its gradient is there: dP is 0, since it has no value.
        weight = torch.exp(t.learnable_sink.float()[:, None] - lse)
        weighted = torch.where(lse == float("-inf"), 0.0, weight * delta)  # also NaN of padding rows
        dsink = -weighted.sum(1).to(t.learnable_sink.dtype)
    return dq, dk, dv, dsink


class _Attention(torch.autograd.Function):
    """Any forward that gives out and LSE, and the backward above."""

    @staticmethod
    def forward(ctx, q, k, v, sink, tensors, problem, run):
        tensors = tensors._replace(q=q, k=k, v=v, learnable_sink=sink)
        out, lse = run(tensors, problem)
        lengths = (tensors.cu_seqlens_q, tensors.cu_seqlens_k, tensors.seqused_q, tensors.seqused_k)
        ctx.save_for_backward(q, k, v, sink, *lengths, out, lse)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, sink, cu_q, cu_k, used_q, used_k, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        tensors = AttentionTensors(q, k, v, cu_q, cu_k, used_q, used_k, learnable_sink=sink)
        return *backward(tensors, ctx.problem, out, lse, dout, dlse), None, None, None


def attend_with_gradients(tensors: AttentionTensors, problem: Problem, run: Forward = forward) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable in q, k, v and learnable_sink, with the forward `run` gives.

    Batched tensors go through as packed ones: gradients are those of one layout. Raises NotImplementedError for what
    has no gradients here.
    """
    reason = unsupported_backward(problem)
    if reason is None and tensors.out is not None:
        reason = "out together with gradients"
    if reason is not None:
        raise NotImplementedError(f"Triton backward: {reason}")
    packed, packed_problem = _as_packed(tensors, problem)
    t = packed
    out, lse = _Attention.apply(t.q, t.k, t.v, t.learnable_sink, t, packed_problem, run)
    if not problem.q_packed:
        out = out.view(problem.out_shape)
        lse = lse.view(problem.num_heads, problem.batch_size, problem.seqlen_q).transpose(0, 1)
    return out, lse


def _as_packed(t: AttentionTensors, p: Problem) -> tuple[AttentionTensors, Problem]:
    """The same call on packed tensors, LSE included."""

    def starts(length: int) -> Tensor:
        return torch.arange(p.batch_size + 1, dtype=torch.int32, device=t.q.device) * length

    if not p.q_packed:
        t = t._replace(q=t.q.flatten(0, 1), cu_seqlens_q=starts(p.seqlen_q))
        p = replace(p, q_packed=True, max_seqlen_q=p.max_seqlen_q or p.seqlen_q)
    if not p.k_packed:
        t = t._replace(k=t.k.flatten(0, 1), v=t.v.flatten(0, 1), cu_seqlens_k=starts(p.seqlen_k))
        p = replace(p, k_packed=True, max_seqlen_k=p.max_seqlen_k or p.seqlen_k)
    return t, replace(p, return_lse=True)


def run(
    tensors: AttentionTensors, problem: Problem, metadata: SchedulerMetadata | bool | None, wants_gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """The backend: (out, lse). Raises NotImplementedError for a plan, which is one of other kernels."""
    if isinstance(metadata, SchedulerMetadata):
        raise NotImplementedError("scheduler_metadata: the Triton kernels take no plan")
    if wants_gradients:
        return attend_with_gradients(tensors, problem)
    return forward(tensors, problem)
