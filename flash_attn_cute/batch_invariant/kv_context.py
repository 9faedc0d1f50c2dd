"""The paged key-value cache that a model's attention layers use in the step that is running.

A model's forward hands its attention functions no cache of an engine's; the engine sets it here around the forward.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from flash_attn_cute.scheduler_metadata import SchedulerMetadata


@dataclass(frozen=True)
class KVCacheContext:
    """One step of B sequences with T new tokens between them, packed, of all layers.

    k_caches, v_caches: a layer each, (pages, page_size, Hk, D or Dv); may be views of one tensor.
    block_tables: (B, W) int32, the pages of each sequence, -1 where there is none.
    slot_mapping: (T,) int32 or int64, the slot (page * page_size + offset) of each new token; -1 writes nothing.
    context_lengths: (B,) int32, keys of each sequence, the new tokens included.
    query_starts: (B + 1,) int32, where the new tokens of each sequence begin.
    max_query_length: a bound on the new tokens of a sequence, if it is known.
    scheduler_metadata: a plan for these lengths, for all layers.
    """

    k_caches: Sequence[Tensor]
    v_caches: Sequence[Tensor]
    block_tables: Tensor
    slot_mapping: Tensor
    context_lengths: Tensor
    query_starts: Tensor
    max_query_length: int | None = None
    scheduler_metadata: SchedulerMetadata | None = None

    def __post_init__(self):
        if len(self.k_caches) != len(self.v_caches):
            raise ValueError(
                f"v_caches: got {len(self.v_caches)} layers; takes those of k_caches, {len(self.k_caches)}"
            )


_here = threading.local()


def get_kv_cache_context() -> KVCacheContext | None:
    """That of this thread."""
    return getattr(_here, "context", None)


def set_kv_cache_context(context: KVCacheContext) -> None:
    """For this thread, until it is cleared or another is set. Raises TypeError for anything else."""
    if not isinstance(context, KVCacheContext):
        raise TypeError(f"context: got {type(context).__name__}; takes a KVCacheContext")
    _here.context = context


def clear_kv_cache_context() -> None:
    _here.context = None


@contextmanager
def kv_cache_context(context: KVCacheContext) -> Iterator[KVCacheContext]:
    """The context inside a with statement; what was before comes back."""
    before = get_kv_cache_context()
    set_kv_cache_context(context)
    try:
        yield context
    finally:
        _here.context = before
