"""`flash_attn_with_kvcache` and `store_kv_cache`: what an inference engine calls in each layer, over its own cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn_cute import interface, launch, launch_append_kv, prepared_calls
from flash_attn_cute.batch_invariant import backend as triton_backend
from flash_attn_cute.kv_cache_arguments import KvCacheTensors, Rotary, check, check_store, fail, one_of_aliases
from flash_attn_cute.launch_append_kv import PreparedAppend
from flash_attn_cute.problem import Problem
from flash_attn_cute.scheduler_metadata import SchedulerMetadata, check_scheduler_metadata
from flash_attn_cute.split_policy import splits_of

# In the family's signature, so that arguments by position arrive where they belong; nothing here takes them.
_NOT_TAKEN = ("qv", "q_descale", "k_descale", "v_descale", "attention_chunk", "sm_margin")


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    max_seqlen_k: int | None = None,
    seqlen_k_per_split: int | None = None,
    deterministic: bool = False,
    scheduler: str = "auto",
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a cache of keys and values, to which new ones are appended first, in place.

    q: (B, Sq, H, D), or (total_q, H, D) with cu_seqlens_q; bf16 or fp16.
    k_cache, v_cache: (B_cache, Sk, Hk, D or Dv), or (pages, page_size, Hk, D or Dv) with page_table; any page size, any
        strides but for the contiguous last dimension.
    k, v: keys and values to append, (B, Snew, Hk, D or Dv), or (total_new, Hk, D or Dv) with cu_seqlens_k_new. They are
        written at positions cache_seqlens, cache_seqlens + 1, ...; where the first of a sequence falls on a negative
        entry of page_table or cache_batch_idx, nothing is appended to it.
    rotary_cos, rotary_sin: (positions, rotary_dim / 2) in the dtype of q or float32, rotary_dim a multiple of 16 up to
        D. k is rotated by its positions in the cache; q by cache_seqlens + i where causal or a window is asked for, and
        else, all of a sequence, by cache_seqlens. They need k and v. Positions that the tables lack give NaN.
    rotary_interleaved: whether elements 2j and 2j + 1 are rotated together (GPT-J), or j and j + rotary_dim / 2 (NeoX).
    rotary_seqlens: (B,) int32, positions to rotate from in place of cache_seqlens.
    cache_seqlens: an int or (B,) int32, the length of each sequence in its cache before this call; None: all of it.
        seqused_k is the same argument.
    cache_batch_idx: (B,) int32, the row of an unpaged cache that is a sequence's.
    cache_leftpad: (B,) int32, the position at which the keys of a sequence begin.
    page_table: (B, W) int32, the pages of each sequence; block_table is the same argument. Entries of pages that hold
        no key in use are not read.
    scheduler_metadata: a plan for the lengths with the new keys.
    num_splits: 0 as the batch asks for; otherwise as in `flash_attn_varlen_func`, as are the other options.
    key_mask, key_bias: laid out as the cache, (rows, positions, H*), new keys included.
    qv, q_descale, k_descale, v_descale, attention_chunk, sm_margin: not taken; they hold the places that arguments have
        in FlashAttention-3.

    Returns out, as q with Dv, or (out, lse) with lse (B, H, Sq) or (H, total_q) float32. Nothing synchronises with the
    host, and nothing is allocated but results, rotated queries, B lengths and, where the plan may split, the workspace:
    a CUDA graph that holds the call may be replayed with other lengths, pages and fewer sequences (no queries or used
    length 0).

    Raises ValueError or TypeError for wrong arguments, each naming the argument, before anything is launched;
    NotImplementedError for what the backend does not have, and for gradients.
    """
    page_table = one_of_aliases("page_table", page_table, "block_table", block_table)
    cache_seqlens = one_of_aliases("cache_seqlens", cache_seqlens, "seqused_k", seqused_k)
    if qv is not None or q_descale is not None or k_descale is not None or v_descale is not None:
        _refuse(qv, q_descale, k_descale, v_descale)
    if attention_chunk != 0 or sm_margin != 0:
        _refuse(None, None, None, None, attention_chunk or None, sm_margin or None)
    if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
        cache_seqlens = _as_tensor(cache_seqlens, q, cu_seqlens_q)
    tensors = KvCacheTensors(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        page_table,
        cu_seqlens_q,
        cu_seqlens_k_new,
        rotary_seqlens,
        learnable_sink,
        key_mask,
        key_bias,
        out,
    )
    if torch.compiler.is_compiling():
        return _compiled_call(
            tensors,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            rotary_interleaved=rotary_interleaved,
            scheduler_metadata=scheduler_metadata,
            num_splits=num_splits,
            seqlen_k_per_split=seqlen_k_per_split,
            pack_gqa=pack_gqa,
            deterministic=deterministic,
            scheduler=scheduler,
            return_softmax_lse=return_softmax_lse,
            backend=backend,
        )
    num_splits, seqlen_k_per_split = splits_of(num_splits, seqlen_k_per_split, backend)
    options = (
        "with_kvcache",
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_size,
        softcap,
        num_splits,
        seqlen_k_per_split,
        pack_gqa,
        deterministic,
        scheduler,
        rotary_interleaved,
        interface.what_decides(scheduler_metadata),
        return_softmax_lse,
        backend,
    )
    signature = prepared_calls.signature(tensors, options)
    prepared = prepared_calls.find(signature)
    if prepared is not None and not _wants_gradients(tensors):
        result, lse = prepared.run(tensors, scheduler_metadata)
    else:
        problem, rotary = check(
            tensors,
            rotary_interleaved,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            num_splits=num_splits,
            seqlen_k_per_split=seqlen_k_per_split,
            pack_gqa=pack_gqa,
            deterministic=deterministic,
            scheduler=scheduler,
            return_lse=return_softmax_lse,
        )
        check_scheduler_metadata(problem, scheduler_metadata)
        result, lse = _first_call(_Call(tensors, problem, rotary, scheduler_metadata), backend, signature)
    return (result, lse) if return_softmax_lse else result


def _compiled_call(tensors: KvCacheTensors, **options) -> Tensor | tuple[Tensor, Tensor]:
    from flash_attn_cute import kv_cache_op

    return kv_cache_op.call(tensors._asdict() | options)


def _refuse(*values: Any) -> None:
    name = next(name for name, value in zip(_NOT_TAKEN, values, strict=False) if value is not None)
    raise NotImplementedError(f"{name}: flash_attn_with_kvcache does not take it")


def _as_tensor(length: Any, q: Tensor, cu_seqlens_q: Tensor | None) -> Tensor:
    """One length for every sequence."""
    if type(length) is not int or length < 0:
        fail("cache_seqlens", repr(length), "an int >= 0 or a (B,) int32 tensor", TypeError)
    if not isinstance(q, Tensor):
        fail("q", type(q).__name__, "a torch.Tensor", TypeError)
    batch_size = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    return torch.full((batch_size,), length, dtype=torch.int32, device=q.device)


def _wants_gradients(tensors: KvCacheTensors) -> bool:
    return torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors])


class _Call(NamedTuple):
    """A call that has been checked."""

    tensors: KvCacheTensors
    problem: Problem
    rotary: Rotary | None
    metadata: SchedulerMetadata | bool | None


class _PreparedCall(NamedTuple):
    """What is left of a call like one before: an append where there are new keys, and attention."""

    append: PreparedAppend | None
    attention: launch.PreparedLaunch

    @classmethod
    def of(cls, call: _Call) -> _PreparedCall:
        t, problem = call.tensors, call.problem
        append = None if t.k is None else PreparedAppend.of(t, call.rotary, problem.batch_size)
        q = t.q if call.rotary is None else torch.empty_like(t.q)  # as the append will make it
        return cls(append, launch.PreparedLaunch.of(t.attention(q, t.cache_seqlens), problem, call.metadata))

    def run(self, tensors: KvCacheTensors, metadata: SchedulerMetadata | bool | None) -> tuple[Tensor, Tensor | None]:
        q, seqused_k = tensors.q, tensors.cache_seqlens
        if self.append is not None:
            q, seqused_k = self.append.run(tensors)
        return self.attention.run(tensors.attention(q, seqused_k), metadata)


def _first_call(call: _Call, backend: str, signature: tuple | None) -> tuple[Tensor, Tensor | None]:
    t = call.tensors
    if _wants_gradients(t):
        raise NotImplementedError("flash_attn_with_kvcache has no backward: call it under torch.no_grad()")
    chosen = interface.choose(call.problem, backend, t.q)
    if chosen == "reference":
        return _run_reference(call)
    if chosen == "emulator":
        return _run_emulated(call)
    if chosen == "triton":
        if t.k is not None:
            raise NotImplementedError(f"backend={backend!r}: k and v to append, which store_kv_cache can write")
        return triton_backend.run(t.attention(t.q, t.cache_seqlens), call.problem, call.metadata, False)
    prepared = _PreparedCall.of(call)
    prepared_calls.keep(signature, prepared)
    return prepared.run(t, call.metadata)


def _run_reference(call: _Call) -> tuple[Tensor, Tensor | None]:
    from flash_attn_cute import kv_cache_reference
    from flash_attn_cute.reference import attention_reference

    t = call.tensors
    q, seqused_k = t.q, t.cache_seqlens
    if t.k is not None:
        q, seqused_k = kv_cache_reference.append(t, call.rotary)
    out, lse = attention_reference(t.attention(q, seqused_k), call.problem)
    return (out if t.out is None else t.out.copy_(out)), lse


def _run_emulated(call: _Call) -> tuple[Tensor, Tensor | None]:
    """For CPU tensors, by the kernels of the emulated GPU."""
    from flash_attn_cute.emulator import backend as emulator

    with emulator.session():
        t = KvCacheTensors(*map(emulator.to_device, call.tensors))
        moved = call._replace(tensors=t, metadata=emulator.to_device(call.metadata))
        out, lse = _PreparedCall.of(moved).run(t, moved.metadata)
        given = call.tensors
        if given.k is not None:
            given.k_cache.copy_(t.k_cache.cpu())
            given.v_cache.copy_(t.v_cache.cpu())
        out = out.cpu() if given.out is None else given.out.copy_(out.cpu())
        return out, None if lse is None else lse.cpu()


def store_kv_cache(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, *, backend: str = "auto"
) -> None:
    """Writes keys and values of tokens into a paged cache, in place.

    k, v: (tokens, Hk, D or Dv), bf16 or fp16 (the reference takes any dtype on the CPU).
    k_cache, v_cache: (pages, page_size, Hk, D or Dv), of the dtype of k. Any strides but for the contiguous last
        dimension, so keys and values may be interleaved in one tensor.
    slot_mapping: (T,) int32 or int64 with T at most `tokens`: token i goes to slot page * page_size + offset, and
        nowhere where the slot is negative. Tokens from T on are padding. Two tokens in one slot leave either.
    backend: as in `flash_attn_varlen_func`.

    Nothing synchronises with the host or is allocated. Raises ValueError or TypeError for wrong arguments, each naming
    the argument; NotImplementedError where there is no kernel.
    """
    if torch.compiler.is_compiling():
        from flash_attn_cute import kv_cache_op

        return kv_cache_op.call_store(k, v, k_cache, v_cache, slot_mapping, backend)
    check_store(k, v, k_cache, v_cache, slot_mapping)
    if backend not in interface.BACKENDS:
        fail("backend", repr(backend), f"one of {', '.join(interface.BACKENDS)}")
    device = k.device.type
    if backend == "reference" or (backend == "auto" and device == "cpu"):
        from flash_attn_cute import kv_cache_reference

        kv_cache_reference.store(k, v, k_cache, v_cache, slot_mapping)
    elif backend == "emulator":
        if device != "cpu":
            raise NotImplementedError("backend='emulator' takes CPU tensors")
        _store_emulated(k, v, k_cache, v_cache, slot_mapping)
    elif triton_backend.stores(backend, interface.capability_of(k)):
        triton_backend.store(k, v, k_cache, v_cache, slot_mapping)
    elif device != "cuda":
        raise NotImplementedError(f"backend={backend!r} on device type {device}: the kernel needs a CUDA device")
    else:
        launch_append_kv.store(k, v, k_cache, v_cache, slot_mapping)


def _store_emulated(*tensors: Tensor) -> None:
    from flash_attn_cute.emulator import backend as emulator

    with emulator.session():
        moved = tuple(map(emulator.to_device, tensors))
        launch_append_kv.store(*moved)
        for given, written in zip(tensors[2:4], moved[2:4], strict=True):
            given.copy_(written.cpu())
