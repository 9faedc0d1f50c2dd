"""`attn_mask` and `attn_bias`: one argument for what belongs to keys and for what belongs to queries.

The rank says which, and nothing else does: 2 dimensions, (total_k, H*), belong to packed keys and are `key_mask` and
`key_bias` under another name; 3 dimensions, (total_q, H*, max_seqlen_k), are a mask and a bias of each query. So a
batch with total_q == total_k reads as any other, and the two arguments of one call may differ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from flash_attn_cute.problem import AttentionTensors, Problem

_RANKS = "2, (total_k, H*), of keys, or 3, (total_q, H*, max_seqlen_k), of queries"


class MasksAndBiases(NamedTuple):
    """As in `AttentionTensors`."""

    key_mask: Tensor | None
    key_bias: Tensor | None
    query_mask: Tensor | None
    query_bias: Tensor | None


def by_rank(
    attn_mask: Any, attn_bias: Any, key_mask: Tensor | None, key_bias: Tensor | None, k_packed: bool
) -> MasksAndBiases:
    """What a call with `attn_mask` or `attn_bias` asks for. k_packed: whether it gives cu_seqlens_k.

    Shapes are left to `checked_problem`. Raises TypeError for what is no tensor or is given twice, ValueError for
    another rank and for the form of keys with keys that are not packed.
    """
    key_mask, query_mask = _one_by_rank("attn_mask", attn_mask, "key_mask", key_mask, k_packed)
    key_bias, query_bias = _one_by_rank("attn_bias", attn_bias, "key_bias", key_bias, k_packed)
    return MasksAndBiases(key_mask, key_bias, query_mask, query_bias)


def _one_by_rank(
    name: str, given: Any, key_side_name: str, key_side: Tensor | None, k_packed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(of keys, of queries)."""
    if given is None:
        return key_side, None
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: got {type(given).__name__}; takes a torch.Tensor or None")
    if key_side is not None:
        raise TypeError(f"{name}: got a tensor beside {key_side_name}; takes one of the two")
    rank = given.dim()
    if rank == 3:
        return None, given
    if rank != 2:
        raise ValueError(f"{name}: got {rank} dimensions; takes {_RANKS}")
    if not k_packed:
        raise ValueError(
            f"{name}: got 2 dimensions with keys that are not packed; takes {key_side_name}, laid out as k"
        )
    return given, None


def checked_problem(tensors: AttentionTensors, attn_mask: Any, attn_bias: Any, **options) -> Problem:
    """`Problem.from_arguments`, whose errors have the names under which the caller gave mask and bias."""
    try:
        return Problem.from_arguments(tensors, **options)
    except (TypeError, ValueError) as error:
        name, colon, rest = str(error).partition(":")
        renamed = {}
        if attn_mask is not None:
            renamed["key_mask"] = "attn_mask"
        if attn_bias is not None:
            renamed["key_bias"] = "attn_bias"
        if name not in renamed:
            raise
        raise type(error)(renamed[name] + colon + rest) from None
