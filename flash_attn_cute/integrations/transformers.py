"""Attention functions for transformers: `register()`, then `attn_implementation="fa-invariant"`.

Three ways to call them, told apart by what there is:

- a `KVCacheContext` of this thread: the new tokens of a step, packed, over an engine's paged cache;
- cu_seq_lens_q and cu_seq_lens_k among the arguments: packed sequences without a cache, differentiable;
- neither: a batch of equal lengths, with transformers' own dynamic caches if any.

Nothing is ignored: an argument that would change the result and is not taken raises.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from flash_attn_cute import flash_attn_varlen_func, interface, launch, split_policy, store_kv_cache
from flash_attn_cute.batch_invariant.kv_context import KVCacheContext, get_kv_cache_context


class Kind(NamedTuple):
    """backend: as of `flash_attn_varlen_func`, without gradients. num_splits: 1 is invariant, 0 as a batch asks for."""

    backend: str
    num_splits: int


KINDS = {
    "fa-invariant": Kind("auto", 1),
    "fa-variant": Kind("auto", 0),
    "fa-invariant-cute": Kind("cute", 1),
    "fa-variant-cute": Kind("cute", 0),
    "triton-invariant": Kind("triton", 1),
}

# What stands for "position_ids hold packed sequences" in the place of a mask: a tensor without elements.
_PACKED_POSITIONS = torch.empty(0, dtype=torch.bool)
# Arguments that models pass on and that change nothing here, position_ids because masks were made of them already.
_WITHOUT_EFFECT = frozenset(("position_ids", "cache_position", "use_cache", "return_dict", "num_items_in_batch"))
_SPELLINGS = {
    "cu_seq_lens_q": ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlen_q"),
    "cu_seq_lens_k": ("cu_seq_lens_k", "cu_seqlens_k", "cu_seqlens_kv", "cu_seqlen_k"),
    "max_length_q": ("max_length_q", "max_seqlen_q", "max_seq_len_q"),
    "max_length_k": ("max_length_k", "max_seqlen_k", "max_seqlen_kv", "max_seq_len_k"),
}


def register() -> tuple[str, ...]:
    """Makes the functions known to transformers, with their masks. Returns their names. May be called again."""
    for name, kind in KINDS.items():
        AttentionInterface.register(name, _attention_function(name, kind))
        AttentionMaskInterface.register(name, attention_mask)
    return tuple(KINDS)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **options: Any,
) -> Tensor | None:
    """None where causality, windows and lengths say everything; otherwise what makes the attention function raise.

    Raises NotImplementedError for masks that a caller adds, and for caches with room that is not used yet.
    """
    if use_vmap or "or_mask" in getattr(mask_function, "__qualname__", ""):
        raise NotImplementedError("attention_mask: mask functions beyond causality and windows")
    if isinstance(q_offset, Tensor) or kv_offset + kv_length != q_offset + q_length:
        raise NotImplementedError("past_key_values: a cache with unused room; use a DynamicCache or a KVCacheContext")
    if attention_mask is not None:
        attention_mask = attention_mask[:, -kv_length:]
        is_empty = attention_mask.shape[1] == kv_length and bool(attention_mask.all())
        return None if is_empty else attention_mask
    # Beside what was refused above, only packed sequences keep transformers from leaving out a causal mask.
    return None if allow_is_causal_skip or q_length == 1 else _PACKED_POSITIONS


def _attention_function(name: str, kind: Kind):
    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        s_aux: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """query (B, H, S, D), key and value (B, Hk, Sk, D or Dv) -> ((B, S, H, Dv), None).

        Raises NotImplementedError or TypeError for arguments that are not taken, ValueError for packed sequences whose
        lengths nobody gives, RuntimeError where the mode in force is the opposite.
        """
        _check_mode(name, kind)
        packed = _packed_arguments(others)
        _refuse(name, attention_mask, dropout, others)
        context = get_kv_cache_context()
        if attention_mask is not None and context is None and not packed:
            raise ValueError("position_ids: got several sequences; takes them with cu_seq_lens_q and cu_seq_lens_k")
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        options = dict(
            softmax_scale=scaling,
            causal=causal,
            window_size=_window(sliding_window, causal),
            softcap=softcap or 0.0,
            learnable_sink=s_aux,
            num_splits=kind.num_splits,
        )
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if context is not None:
            if packed:
                raise TypeError(f"{name}: got {sorted(packed)} with a KVCacheContext, which says them itself")
            return _over_pages(context, module.layer_idx, kind.backend, _rows(q), _rows(k), _rows(v), options)[
                None
            ], None
        backend = _backend(kind.backend, (q, k, v, s_aux))
        if packed:
            out = flash_attn_varlen_func(_rows(q), _rows(k), _rows(v), **packed, **options, backend=backend)
            return out[None], None
        return flash_attn_varlen_func(q, k, v, **options, backend=backend), None

    attention.__name__ = attention.__qualname__ = name.replace("-", "_")
    return attention


def _check_mode(name: str, kind: Kind) -> None:
    policy = split_policy.current()
    if policy is None or (policy.num_splits == 0) == (kind.num_splits == 0):
        return
    mode = "variant" if policy.num_splits == 0 else "invariant"
    raise RuntimeError(f"{name}: batch-{mode} mode is on; disable it, or select the other attention function")


def _packed_arguments(others: dict[str, Any]) -> dict[str, Any]:
    """Takes lengths of packed sequences out of `others`, whatever they are called there: those of the public function,
    or nothing."""
    found = {}
    for name, spellings in _SPELLINGS.items():
        given = {spelling: others.pop(spelling) for spelling in spellings if others.get(spelling) is not None}
        if len(given) > 1:
            raise TypeError(f"{name}: got {' and '.join(given)}, which are one argument")
        found[name] = next(iter(given.values()), None)
    starts = {"cu_seqlens_q": found["cu_seq_lens_q"], "cu_seqlens_k": found["cu_seq_lens_k"]}
    if all(value is None for value in found.values()):
        return {}
    for name, value in starts.items():
        if value is None:
            raise TypeError(f"{name}: got None with other lengths of packed sequences; takes a tensor (B + 1,)")
    packed = {name: value.to(torch.int32) for name, value in starts.items()}
    for name, value in (("max_seqlen_q", found["max_length_q"]), ("max_seqlen_k", found["max_length_k"])):
        # Hints, not worth waiting for a device.
        packed[name] = None if isinstance(value, Tensor) else value
    return packed


def _refuse(name: str, attention_mask: Tensor | None, dropout: float, others: dict[str, Any]) -> None:
    if attention_mask is not None and attention_mask.numel():
        shape = tuple(attention_mask.shape)
        raise NotImplementedError(f"{name}: attention_mask of shape {shape}; takes packed sequences, without padding")
    if dropout:
        raise NotImplementedError(f"{name}: dropout={dropout}")
    for argument, value in others.items():
        if value is not None and value is not False and argument not in _WITHOUT_EFFECT:
            raise NotImplementedError(f"{name}: {argument}={type(value).__name__}")


def _window(sliding_window: int | None, causal: bool) -> tuple[int | None, int | None]:
    """transformers counts the query's own key among those of the window."""
    if sliding_window is None:
        return None, None
    if not causal:
        raise NotImplementedError("sliding_window: without causality")
    return sliding_window - 1, None


def _rows(x: Tensor) -> Tensor:
    """(1, S, H, D) -> (S, H, D)."""
    if x.shape[0] != 1:
        raise ValueError(f"query: got batch size {x.shape[0]} with packed sequences; takes 1")
    return x[0]


def _backend(backend: str, differentiable: tuple[Tensor | None, ...]) -> str:
    """CuTe kernels have no backward of their own."""
    wants_gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable)
    has_cute = interface.capability_of(differentiable[0]) in launch.ARCHITECTURES
    return "cute+triton" if wants_gradients and has_cute and backend in ("auto", "cute") else backend


def _over_pages(
    context: KVCacheContext, layer: int, backend: str, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> Tensor:
    """Writes the new keys and values, then attends over all of each sequence: (T, H, Dv)."""
    k_cache, v_cache = context.k_caches[layer], context.v_caches[layer]
    store_kv_cache(k, v, k_cache, v_cache, context.slot_mapping, backend=backend)
    return flash_attn_varlen_func(
        q,
        k_cache,
        v_cache,
        context.query_starts,
        seqused_k=context.context_lengths,
        page_table=context.block_tables,
        max_seqlen_q=context.max_query_length,
        scheduler_metadata=context.scheduler_metadata,
        backend=backend,
        **options,
    )
