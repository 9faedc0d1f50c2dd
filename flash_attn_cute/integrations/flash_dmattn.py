"""The call of flash-dmattn (https://github.com/HKUSTDial/flash-sparse-attention) for ragged batches, by its keywords.

Only names are translated; flash-dmattn itself is neither imported nor needed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash_attn_cute.interface import flash_attn_varlen_func


def flash_dmattn_varlen_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    return_attn_probs: bool | None = None,
    block_table: Tensor | None = None,
    *,
    scale: float | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_varlen_func` under the names of flash-dmattn.

    query: (total_q, H, D); key, value: (total_k, Hk, D or Dv), or (pages, page_size, Hk, D or Dv) with block_table,
        whose lengths are the differences of cu_seqlens_k.
    attn_mask, attn_bias: as there, (total_k, H*) of keys or (total_q, H*, max_seqlen_k) of queries.
    scale: softmax_scale, as some versions of flash-dmattn call it.
    is_causal, softcap, deterministic: None is off.
    return_attn_probs: not taken; return_lse=True, among the options, returns the log-sum-exp.
    options: any other option of `flash_attn_varlen_func`.

    Raises what `flash_attn_varlen_func` raises, which names its own arguments (q for query), TypeError where both names
    of the scale are given, and NotImplementedError for return_attn_probs.
    """
    if return_attn_probs:
        raise NotImplementedError("return_attn_probs: probabilities are never in memory; return_lse=True returns lse")
    if scale is not None:
        if softmax_scale is not None:
            raise TypeError("scale: got a value beside softmax_scale; takes one of the two")
        softmax_scale = scale
    if block_table is not None:
        options["page_table"] = block_table
        if cu_seqlens_k is not None:
            options["seqused_k"], cu_seqlens_k = cu_seqlens_k.diff(), None
    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        attn_mask=attn_mask,
        attn_bias=attn_bias,
        softmax_scale=softmax_scale,
        causal=bool(is_causal),
        softcap=0.0 if softcap is None else softcap,
        deterministic=bool(deterministic),
        **options,
    )
