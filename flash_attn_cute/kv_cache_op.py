"""`flash_attn_with_kvcache` and `store_kv_cache` as torch operators, so that torch.compile takes each as one node.

The caches are written in place: the schemas say so, and the compiler keeps reads of them behind. A call without new
keys writes nothing, and is another operator, which the compiler may move.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn_cute import kv_cache

_TENSORS = """
    Tensor? k, Tensor? v, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? cache_seqlens, Tensor? cache_batch_idx,
    Tensor? cache_leftpad, Tensor? page_table, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k_new, Tensor? rotary_seqlens,
    Tensor? learnable_sink, Tensor? key_mask, Tensor? key_bias
"""
_OPTIONS = """
    SymInt? max_seqlen_q, float? softmax_scale, bool causal, int? window_left, int? window_right, float softcap,
    bool rotary_interleaved, bool plans, int num_splits, bool? pack_gqa, bool return_softmax_lse, SymInt? max_seqlen_k,
    int? seqlen_k_per_split, bool deterministic, str scheduler, str backend
"""
_NAMES = ("q", "k_cache", "v_cache", *(x.split()[1] for x in f"{_TENSORS},{_OPTIONS}".split(",")))

_library = torch.library.Library("flash_attn_cute", "FRAGMENT")
_TAGS = (torch.Tag.needs_fixed_stride_order,)
_READ = f"(Tensor q, Tensor k_cache, Tensor v_cache, {_TENSORS}, {_OPTIONS}"
_WRITTEN = f"(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, {_TENSORS}, {_OPTIONS}"
_library.define(f"attend_cache{_READ}) -> (Tensor, Tensor)", tags=_TAGS)
_library.define(f"attend_cache_out{_READ}, Tensor(c!) out) -> Tensor", tags=_TAGS)
_library.define(f"append_and_attend{_WRITTEN}) -> (Tensor, Tensor)", tags=_TAGS)
_library.define(f"append_and_attend_out{_WRITTEN}, Tensor(c!) out) -> Tensor", tags=_TAGS)
_library.define(
    "store_kv_cache(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, str backend) -> ()"
)


def _run(arguments: tuple, out: Tensor | None) -> tuple[Tensor, Tensor]:
    given = dict(zip(_NAMES, arguments, strict=True))
    given["window_size"] = (given.pop("window_left"), given.pop("window_right"))
    given["scheduler_metadata"] = None if given.pop("plans") else False
    result = kv_cache.flash_attn_with_kvcache(**given, out=out)
    # An operator returns a tensor in each place.
    return result if given["return_softmax_lse"] else (result, given["q"].new_empty(0, dtype=torch.float32))


def _forward(*arguments):
    return _run(arguments, None)


def _forward_out(*arguments_and_out):
    return _run(arguments_and_out[:-1], arguments_and_out[-1])[1]


def _forward_fake(*arguments):
    given = dict(zip(_NAMES, arguments, strict=True))
    q, v_cache = given["q"], given["v_cache"]
    *lead, heads, _ = q.shape
    lse = (heads, *lead) if len(lead) == 1 else (lead[0], heads, lead[1])
    lse = q.new_empty(lse if given["return_softmax_lse"] else (0,), dtype=torch.float32)
    return q.new_empty((*q.shape[:-1], v_cache.shape[-1])), lse


def _forward_out_fake(*arguments_and_out):
    return _forward_fake(*arguments_and_out[:-1])[1]


def _store(k, v, k_cache, v_cache, slot_mapping, backend):
    kv_cache.store_kv_cache(k, v, k_cache, v_cache, slot_mapping, backend=backend)


for _name, _function, _fake in (
    ("attend_cache", _forward, _forward_fake),
    ("attend_cache_out", _forward_out, _forward_out_fake),
    ("append_and_attend", _forward, _forward_fake),
    ("append_and_attend_out", _forward_out, _forward_out_fake),
    ("store_kv_cache", _store, lambda *_: None),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_attn_cute::{_name}", _fake, lib=_library)


def call(arguments: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
    """The operator call for the arguments of `flash_attn_with_kvcache`, by name, aliases resolved.

    Raises NotImplementedError for a plan, which is no argument of an operator, and where gradients are asked for.
    """
    arguments = dict(arguments)
    out = arguments.pop("out")
    metadata = arguments.pop("scheduler_metadata")
    if metadata is not None and metadata is not False:
        raise NotImplementedError("scheduler_metadata under torch.compile: leave it out, or call outside the region")
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments.values()):
        raise NotImplementedError("flash_attn_with_kvcache has no backward: call it under torch.no_grad()")
    arguments["plans"] = metadata is None
    arguments["window_left"], arguments["window_right"] = arguments.pop("window_size")
    ordered = [arguments[name] for name in _NAMES]
    operators = torch.ops.flash_attn_cute
    if out is None:
        run = operators.attend_cache if arguments["k"] is None else operators.append_and_attend
        result, lse = run(*ordered)
    else:
        run = operators.attend_cache_out if arguments["k"] is None else operators.append_and_attend_out
        result, lse = out, run(*ordered, out)
    return (result, lse) if arguments["return_softmax_lse"] else result


def call_store(*tensors_and_backend) -> None:
    torch.ops.flash_attn_cute.store_kv_cache(*tensors_and_backend)
