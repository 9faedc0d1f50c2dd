"""The attention call as torch operators, so that torch.compile takes it as one node of its graph.

Eager calls go past these: dispatch through an operator costs more than the rest of the host side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn_cute import interface

# The arguments of flash_attn_varlen_func in a form that a schema can hold: window_size is taken apart.
_ARGUMENTS = """
    Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q,
    SymInt? max_seqlen_k, Tensor? seqused_q, Tensor? seqused_k, Tensor? page_table, float? softmax_scale, bool causal,
    int? window_left, int? window_right, float softcap, Tensor? learnable_sink, Tensor? key_mask, Tensor? key_bias,
    Tensor? attn_mask, Tensor? attn_bias, int num_splits, int? seqlen_k_per_split, bool? pack_gqa, bool deterministic,
    str scheduler, bool plans, bool return_lse, str backend
"""
_NAMES = tuple(argument.split()[1] for argument in _ARGUMENTS.split(","))

_library = torch.library.Library("flash_attn_cute", "DEF")
_TAGS = (torch.Tag.needs_fixed_stride_order,)
_library.define(f"forward({_ARGUMENTS}) -> (Tensor, Tensor)", tags=_TAGS)
_library.define(f"forward_out({_ARGUMENTS}, Tensor(a!) out) -> Tensor", tags=_TAGS)


def _lse_shape(q: Tensor) -> tuple[int, ...]:
    return (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])


def _run(arguments: tuple, out: Tensor | None) -> tuple[Tensor, Tensor]:
    options = dict(zip(_NAMES, arguments, strict=True))
    options["window_size"] = (options.pop("window_left"), options.pop("window_right"))
    options["scheduler_metadata"] = None if options.pop("plans") else False
    result = interface.flash_attn_varlen_func(**options, out=out)
    # An operator returns a tensor in each place.
    return result if options["return_lse"] else (result, options["q"].new_empty(0, dtype=torch.float32))


def _forward(*arguments):
    return _run(arguments, None)


def _forward_out(*arguments_and_out):
    return _run(arguments_and_out[:-1], arguments_and_out[-1])[1]


def _forward_fake(*arguments):
    options = dict(zip(_NAMES, arguments, strict=True))
    q, v = options["q"], options["v"]
    return q.new_empty((*q.shape[:-1], v.shape[-1])), _lse_fake(options)


def _forward_out_fake(*arguments_and_out):
    return _lse_fake(dict(zip(_NAMES, arguments_and_out[:-1], strict=True)))


def _lse_fake(options: dict) -> Tensor:
    shape = _lse_shape(options["q"]) if options["return_lse"] else (0,)
    return options["q"].new_empty(shape, dtype=torch.float32)


def _refuse_gradients(*arguments):
    """Autograd's own fallback would hand out a result whose gradients silently never arrive."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        raise NotImplementedError(
            "attention under torch.compile has no backward: call it under torch.no_grad(), or outside the compiled "
            "region with backend='reference'"
        )


def _autograd(name: str):
    def forward(*arguments):
        _refuse_gradients(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.flash_attn_cute, name)(*arguments)

    return forward


for _name, _function, _fake in (
    ("forward", _forward, _forward_fake),
    ("forward_out", _forward_out, _forward_out_fake),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    _library.impl(_name, _autograd(_name), "Autograd")
    torch.library.register_fake(f"flash_attn_cute::{_name}", _fake, lib=_library)


def call(arguments: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
    """The operator call for the arguments of `flash_attn_varlen_func`, by name."""
    arguments = dict(arguments)
    out = arguments.pop("out")
    metadata = arguments.pop("scheduler_metadata")
    if metadata is not None and metadata is not False:
        raise NotImplementedError("scheduler_metadata under torch.compile: leave it out, or call outside the region")
    arguments["plans"] = metadata is None
    arguments["window_left"], arguments["window_right"] = arguments.pop("window_size")
    ordered = [arguments[name] for name in _NAMES]
    if out is None:
        result, lse = torch.ops.flash_attn_cute.forward(*ordered)
    else:
        result, lse = out, torch.ops.flash_attn_cute.forward_out(*ordered, out)
    return (result, lse) if arguments["return_lse"] else result
