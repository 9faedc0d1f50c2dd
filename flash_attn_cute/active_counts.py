"""What a plan counts of a key mask: the arguments of `get_scheduler_metadata` that say so, and the counts."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from flash_attn_cute.active_tiles import KeyTensors, ListShape, PreparedPacking, active_tiles_of


def _fail(name: str, got: Any, takes: str, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"{name}: got {got}; takes {takes}")


def check_key_mask(mask: Tensor, keys: KeyTensors, batch_size: int, num_heads: int, num_heads_kv: int) -> None:
    """Raises where a plan's key_mask, or what says where its keys are, is wrong."""
    if not isinstance(mask, Tensor):
        _fail("key_mask", type(mask).__name__, "a torch.Tensor or None", TypeError)
    packed = keys.cu_seqlens_k is not None
    if packed and any(tensor is not None for tensor in keys[2:]):
        _fail("cu_seqlens_k", "a tensor with page_table, cache_leftpad or cache_batch_idx", "None: keys are of a cache")
    rank = 2 if packed else 3
    if mask.dtype != torch.bool or mask.dim() != rank or mask.shape[-1] not in (1, num_heads_kv, num_heads):
        takes = f"torch.bool of {rank} dimensions, the last one 1, {num_heads_kv} or {num_heads}"
        _fail("key_mask", f"{mask.dtype} of shape {tuple(mask.shape)}", takes)
    if not packed and keys.page_table is None and keys.cache_batch_idx is None and mask.shape[0] not in (1, batch_size):
        _fail("key_mask", f"{mask.shape[0]} rows", f"1 or batch_size, {batch_size}")
    shapes = {"cache_leftpad": 1, "page_table": 2, "cache_batch_idx": 1}
    for (name, dims), tensor in zip(shapes.items(), keys[2:], strict=True):
        if tensor is None:
            continue
        if tensor.dtype != torch.int32 or tensor.dim() != dims or tensor.shape[0] != batch_size:
            _fail(
                name, f"{tensor.dtype} of shape {tuple(tensor.shape)}", f"int32 of {dims} dimensions, {batch_size} rows"
            )
    for tensor in keys:
        if tensor is not None and tensor.device != mask.device:
            _fail("key_mask", f"device {mask.device}", f"{tensor.device}, as lengths are")


def keys_of_mask(mask: Tensor, keys: KeyTensors) -> int:
    """Keys of all sequences where they are packed, the most of each where not: ListShape.keys."""
    if keys.cu_seqlens_k is not None:
        return mask.shape[0]
    return mask.shape[1] * (1 if keys.page_table is None else keys.page_table.shape[1])


def active_counts(mask: Tensor, keys: KeyTensors, shape: ListShape, architecture: str, backend: str) -> Tensor:
    """(B, groups) int32: KV tiles that a checked mask leaves. backend: "cute", "emulator" or "reference", as in
    scheduler_metadata.plan_batch."""
    if not shape.is_countable:
        _fail("key_mask", f"room for {shape.tiles_shape} KV tiles", "no more than an int32 counts")
    if backend == "reference":
        counts = [[len(of_group) for of_group in lists] for lists in active_tiles_of(mask, keys, shape)]
        return torch.tensor(counts, dtype=torch.int32, device=mask.device).view(shape.batch_size, shape.groups)
    rows = mask.view(torch.uint8)
    if not shape.packed and keys.page_table is None and keys.cache_batch_idx is None:
        rows = rows.expand(shape.batch_size, -1, -1)
    page_size = None if keys.page_table is None else mask.shape[1]
    if backend == "cute":
        return PreparedPacking.of(architecture, shape, keys, page_size).run(rows, keys).counts
    from flash_attn_cute.emulator.backend import session, to_device

    with session():
        keys = KeyTensors(*map(to_device, keys))
        return PreparedPacking.of(architecture, shape, keys, page_size).run(to_device(rows), keys).counts.cpu()
