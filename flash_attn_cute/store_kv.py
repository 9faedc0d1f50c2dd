"""The kernel that writes keys and values where a slot mapping says: a CTA a token's keys or a token's values."""

from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Int32

from flash_attn_cute.device.token_rows import THREADS, copy_token


class StoreTensors(NamedTuple):
    """Tensors of a call, with any strides but for the contiguous last dimension."""

    k: cute.Tensor  # (at least T, Hk, D)
    v: cute.Tensor  # (at least T, Hk, Dv)
    k_cache: cute.Tensor  # (pages, page_size, Hk, D)
    v_cache: cute.Tensor  # (pages, page_size, Hk, Dv)
    slot_mapping: cute.Tensor  # (T,) int32 or int64


@cute.jit
def store_kv(tensors: StoreTensors, grid: Int32, stream: cuda.CUstream):
    """Compile with `cute.compile(store_kv, StoreTensors, grid, stream)`."""
    _kernel(tensors).launch(grid=[grid, 1, 1], block=[THREADS, 1, 1], stream=stream)


@cute.kernel
def _kernel(t: StoreTensors):
    tokens = cute.size(t.slot_mapping)
    index, _, _ = cute.arch.block_idx()
    step, _, _ = cute.arch.grid_dim()
    while index < 2 * tokens:
        if index < tokens:
            _store(t.k, t.k_cache, t.slot_mapping, index)
        else:
            _store(t.v, t.v_cache, t.slot_mapping, index - tokens)
        index = index + step


@cute.jit
def _store(source: cute.Tensor, cache: cute.Tensor, slot_mapping: cute.Tensor, token: Int32):
    slot, page_size = slot_mapping[token], cute.size(cache, mode=[1])
    page = slot // page_size
    # A slot outside the cache is not written: -1 stands for a token that is not to be kept.
    if slot >= 0 and page < cute.size(cache, mode=[0]):
        copy_token(source[token, None, None], cache[page, slot % page_size, None, None])
