"""What `flash_attn_with_kvcache` and `store_kv_cache` are given: the tensors by name, and the checks of what `Problem`
does not know of. Nothing here reads the contents of a tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from flash_attn_cute.problem import INT32_MAX, MAX_HEAD_DIM, AttentionTensors, Problem

ROTARY_STEP = 16  # rotary dimensions come in multiples of it, as in the family

# What the attention core calls by another name than the caller did.
_CALLERS_NAMES = {"k": "k_cache", "v": "v_cache", "leftpad_k": "cache_leftpad", "return_lse": "return_softmax_lse"}


class KvCacheTensors(NamedTuple):
    """The tensors of one call of `flash_attn_with_kvcache`; what is not given is None. cache_seqlens is a tensor."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    cache_seqlens: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    page_table: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k_new: Tensor | None = None
    rotary_seqlens: Tensor | None = None
    learnable_sink: Tensor | None = None
    key_mask: Tensor | None = None
    key_bias: Tensor | None = None
    out: Tensor | None = None

    def attention(self, q: Tensor, seqused_k: Tensor | None) -> AttentionTensors:
        """The attention over the cache once it holds the new keys: queries as rotated, lengths with the new keys."""
        return AttentionTensors(
            q,
            self.k_cache,
            self.v_cache,
            self.cu_seqlens_q,
            None,
            None,
            seqused_k,
            self.page_table,
            self.learnable_sink,
            self.key_mask,
            self.key_bias,
            self.out,
            self.cache_leftpad,
            self.cache_batch_idx,
        )


class Rotary(NamedTuple):
    """How positions are encoded."""

    dim: int
    interleaved: bool
    queries_advance: bool  # query i is at the i-th position behind the cache (causal, windows); else all at the first


def fail(name: str, got: Any, takes: str, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"{name}: got {got}; takes {takes}")


def one_of_aliases(name: str, value: Any, alias: str, aliased: Any) -> Any:
    """What was given under one of two names. Raises TypeError where both were."""
    if aliased is None:
        return value
    if value is not None:
        fail(alias, f"a value beside {name}", f"one of the two, which are names of one argument: {name}", TypeError)
    return aliased


def check(tensors: KvCacheTensors, interleaved: bool, **options) -> tuple[Problem, Rotary | None]:
    """What is asked of attention, and how new keys and queries are rotated before it.

    options: those of `Problem.from_arguments`. Raises TypeError or ValueError, naming the argument.
    """
    t = tensors
    for name, value in zip(t._fields[3:], t[3:], strict=True):
        if value is not None and not isinstance(value, Tensor):
            fail(name, type(value).__name__, "a torch.Tensor or None", TypeError)
    problem = _problem(t, options)
    # Attention takes lengths of any cache; where they are missing there is no place for new keys.
    if (t.k is None) != (t.v is None):
        missing = "v" if t.v is None else "k"
        fail(missing, "None", f"the new {'values' if missing == 'v' else 'keys'} beside those of the other")
    if t.k is None:
        for name in ("rotary_cos", "rotary_sin", "cu_seqlens_k_new", "rotary_seqlens"):
            if getattr(t, name) is not None:
                fail(name, "a tensor without k and v", "None, or new keys and values beside it")
        return problem, None
    if t.cache_seqlens is None:
        fail("cache_seqlens", "None with new keys", "the lengths before them, an int or (B,) int32")
    _check_new(t, problem.batch_size)
    return problem, _check_rotary(t, problem, interleaved)


def _problem(t: KvCacheTensors, options: dict) -> Problem:
    try:
        return Problem.from_arguments(t.attention(t.q, t.cache_seqlens), **options)
    except (TypeError, ValueError) as error:
        name, colon, rest = str(error).partition(":")
        named = "cache_seqlens" if name == "seqused_k" else _CALLERS_NAMES.get(name, name)
        raise type(error)(named + colon + rest) from None


def _check_new(t: KvCacheTensors, batch_size: int) -> None:
    if t.cu_seqlens_k_new is None:
        rows = (batch_size, t.k.shape[1] if t.k.dim() == 4 else "new")
    else:
        check_integers("cu_seqlens_k_new", t.cu_seqlens_k_new, (batch_size + 1,), t.q.device)
        rows = (t.k.shape[0] if t.k.dim() == 3 else "total_new",)
    for name, new, cache in (("k", t.k, t.k_cache), ("v", t.v, t.v_cache)):
        shape = (*rows, *cache.shape[2:])
        if tuple(new.shape) != shape:
            fail(name, f"shape {tuple(new.shape)}", f"({', '.join(map(str, shape))})")
        check_like(name, new, t.q, "q")
    if t.k.shape[:-2].numel() > INT32_MAX // 4:  # tokens of k, v and q are numbered together
        fail("k", f"{t.k.shape[:-2].numel()} tokens", f"at most {INT32_MAX // 4}")


def _check_rotary(t: KvCacheTensors, problem: Problem, interleaved: bool) -> Rotary | None:
    cos, sin = t.rotary_cos, t.rotary_sin
    if (cos is None) != (sin is None):
        missing = "rotary_sin" if sin is None else "rotary_cos"
        fail(missing, "None", f"the table beside {'rotary_cos' if sin is None else 'rotary_sin'}")
    if cos is None:
        if t.rotary_seqlens is not None:
            fail("rotary_seqlens", "a tensor without rotary_cos and rotary_sin", "None, or tables beside it")
        return None
    if interleaved is not True and interleaved is not False:
        fail("rotary_interleaved", repr(interleaved), "True or False", TypeError)
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        if table.dtype not in (t.q.dtype, torch.float32):
            fail(name, f"dtype {table.dtype}", f"the dtype of q, {t.q.dtype}, or torch.float32")
        if table.dim() != 2 or table.shape[0] == 0:
            fail(name, f"shape {tuple(table.shape)}", "(positions, rotary_dim / 2), of one position at least")
        if table.device != t.q.device:
            fail(name, f"device {table.device}", f"the device of q, {t.q.device}")
        if table.stride(-1) != 1:
            fail(name, f"strides {table.stride()}", "a contiguous last dimension (stride 1)")
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        fail("rotary_sin", f"{sin.dtype} of shape {tuple(sin.shape)}", f"that of rotary_cos, {cos.dtype} {cos.shape}")
    dim = 2 * cos.shape[1]
    if dim % ROTARY_STEP or not 0 < dim <= problem.head_dim:
        takes = f"a multiple of {ROTARY_STEP} up to the head dimension, {problem.head_dim}"
        fail("rotary_cos", f"a rotary dimension of {dim}", takes)
    if t.rotary_seqlens is not None:
        check_integers("rotary_seqlens", t.rotary_seqlens, (problem.batch_size,), t.q.device)
    return Rotary(dim, interleaved, problem.causal or problem.is_local)


def check_integers(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
        fail(name, f"{tensor.dtype} of shape {tuple(tensor.shape)}", f"torch.int32 of shape {shape}")
    if tensor.device != device:
        fail(name, f"device {tensor.device}", f"{device}")
    if not tensor.is_contiguous():
        fail(name, f"strides {tensor.stride()}", "a contiguous tensor")


def check_like(name: str, tensor: Tensor, other: Tensor, other_name: str) -> None:
    """dtype and device are those of another tensor, and the last dimension is contiguous."""
    if tensor.dtype != other.dtype:
        fail(name, f"dtype {tensor.dtype}", f"the dtype of {other_name}, {other.dtype}")
    if tensor.device != other.device:
        fail(name, f"device {tensor.device}", f"the device of {other_name}, {other.device}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        fail(name, f"strides {tensor.stride()}", "a contiguous last dimension (stride 1)")


def check_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """The arguments of `store_kv_cache`. Raises TypeError or ValueError, naming the argument."""
    given = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slot_mapping}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            fail(name, type(tensor).__name__, "a torch.Tensor", TypeError)
    if k.dtype not in (torch.bfloat16, torch.float16) and k.device.type != "cpu":
        fail("k", f"dtype {k.dtype} on {k.device.type}", "torch.bfloat16 or torch.float16")
    if slot_mapping.dtype not in (torch.int32, torch.int64) or slot_mapping.dim() != 1:
        fail("slot_mapping", f"{slot_mapping.dtype} of shape {tuple(slot_mapping.shape)}", "(T,) int32 or int64")
    if slot_mapping.device != k.device:
        fail("slot_mapping", f"device {slot_mapping.device}", f"the device of k, {k.device}")
    if not slot_mapping.is_contiguous():
        fail("slot_mapping", f"strides {slot_mapping.stride()}", "a contiguous tensor")
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new.dim() != 3 or new.shape[0] < slot_mapping.shape[0]:
            takes = f"(tokens, Hk, D), at least the {slot_mapping.shape[0]} of slot_mapping"
            fail(name, f"shape {tuple(new.shape)}", takes)
        if new.shape[-1] % 8 or not 8 <= new.shape[-1] <= MAX_HEAD_DIM:
            fail(name, f"head dimension {new.shape[-1]}", f"a multiple of 8 from 8 to {MAX_HEAD_DIM}")
        if cache.dim() != 4 or cache.shape[2:] != new.shape[1:]:
            takes = f"(pages, page_size, {new.shape[1]}, {new.shape[2]}), as {name}"
            fail(f"{name}_cache", f"shape {tuple(cache.shape)}", takes)
        check_like(name, new, k, "k")
        check_like(f"{name}_cache", cache, k, "k")
    if v.shape[1] != k.shape[1] or v_cache.shape[:2] != k_cache.shape[:2]:
        name = "v" if v.shape[1] != k.shape[1] else "v_cache"
        fail(name, f"shape {tuple(given[name].shape)}", "that of its counterpart but for the last dimension")
    if k_cache.shape[1] == 0:
        fail("k_cache", "pages of 0 keys", "a page size of at least 1")
