"""`flash_attn_combine` as torch operators, so that torch.compile takes it as one node of its graph."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn_cute import launch_combine
from flash_attn_cute.launch_combine import CombineCall

_ARGUMENTS = """
    Tensor out_partial, Tensor lse_partial, Tensor? cu_seqlens, Tensor? seqused, Tensor? learnable_sink,
    ScalarType out_dtype, bool return_lse, str backend
"""

_library = torch.library.Library("flash_attn_cute", "FRAGMENT")
_TAGS = (torch.Tag.needs_fixed_stride_order,)
_library.define(f"combine({_ARGUMENTS}) -> (Tensor, Tensor)", tags=_TAGS)
_library.define(f"combine_out({_ARGUMENTS}, Tensor(a!) out) -> Tensor", tags=_TAGS)


def _run(arguments: tuple, out: Tensor | None) -> tuple[Tensor, Tensor]:
    partial, lse_partial, cu_seqlens, seqused, sink, dtype, return_lse, backend = arguments
    result, lse = launch_combine.flash_attn_combine(
        partial,
        lse_partial,
        out,
        dtype,
        cu_seqlens,
        seqused,
        learnable_sink=sink,
        return_lse=return_lse,
        backend=backend,
    )
    # An operator returns a tensor in each place.
    return result, partial.new_empty(0) if lse is None else lse


def _combine(*arguments):
    return _run(arguments, None)


def _combine_out(*arguments_and_out):
    return _run(arguments_and_out[:-1], arguments_and_out[-1])[1]


def _combine_fake(partial, lse_partial, cu_seqlens, seqused, sink, dtype, return_lse, backend):
    *lead, rows, heads, _ = partial.shape[1:]
    lse = partial.new_empty((*lead, heads, rows) if return_lse else (0,))
    return partial.new_empty(partial.shape[1:], dtype=dtype), lse


def _combine_out_fake(*arguments_and_out):
    return _combine_fake(*arguments_and_out[:-1])[1]


for _name, _function, _fake in (
    ("combine", _combine, _combine_fake),
    ("combine_out", _combine_out, _combine_out_fake),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_attn_cute::{_name}", _fake, lib=_library)


def call(tensors: CombineCall, dtype: torch.dtype, return_lse: bool, backend: str) -> tuple[Tensor, Tensor | None]:
    """The operator call for checked arguments. Raises NotImplementedError where gradients are asked for."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError("flash_attn_combine under torch.compile has no backward: use torch.no_grad()")
    arguments = (
        tensors.out_partial,
        tensors.lse_partial,
        tensors.cu_seqlens,
        tensors.seqused,
        tensors.learnable_sink,
        dtype,
        return_lse,
        backend,
    )
    if tensors.out is None:
        out, lse = torch.ops.flash_attn_cute.combine(*arguments)
    else:
        out, lse = tensors.out, torch.ops.flash_attn_cute.combine_out(*arguments, tensors.out)
    return out, lse if return_lse else None
