"""The kernel that a decode step begins with: writes new keys and values into their cache, rotating keys and queries.

One launch does all of it. A CTA takes a token's keys, a token's values, or a token's queries: loads of different kinds
then fly together even where there are few tokens. The last CTAs write how long each sequence is afterwards, which is
what the attention behind this launch reads.

Lengths and page tables are only known here, so this is also where they are checked: what has no place in the cache, by
a position past its end or a table entry that is no page, is not written.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from flash_attn_cute.device.rotary import RotaryTable
from flash_attn_cute.device.search import last_at_most
from flash_attn_cute.device.token_rows import KEYS_IN_FLIGHT, QUERIES_IN_FLIGHT, THREADS, copy_token, rotate_token


@dataclass(frozen=True)
class AppendSpec:
    """What is fixed when a kernel is compiled."""

    rotary_dim: int  # 0: nothing is rotated
    interleaved: bool
    queries_advance: bool  # query i of a sequence is at the i-th position behind its cache, or all at the first


class AppendTensors(NamedTuple):
    """Tensors of a call, with any strides but for the contiguous last dimension.

    The cache is (rows, positions, Hk, D or Dv): a row is a page where there is a page table, and otherwise belongs to a
    sequence. Queries and tables are there where there is something to rotate.
    """

    k: cute.Tensor  # (total_new, Hk, D) with cu_seqlens_k, else (B, new, Hk, D)
    v: cute.Tensor
    k_cache: cute.Tensor
    v_cache: cute.Tensor
    cache_seqlens: cute.Tensor  # (B,) int32
    seqused: cute.Tensor  # (B,) int32, written: lengths with the new keys
    page_table: cute.Tensor | None  # (B, W) int32
    cache_batch_idx: cute.Tensor | None  # (B,) int32
    cu_seqlens_k: cute.Tensor | None  # (B + 1,) int32
    q: cute.Tensor | None  # (total_q, H, D) with cu_seqlens_q, else (B, Sq, H, D)
    q_rotated: cute.Tensor | None
    cu_seqlens_q: cute.Tensor | None
    cos: cute.Tensor | None  # (positions, rotary_dim / 2)
    sin: cute.Tensor | None
    rotary_seqlens: cute.Tensor | None  # (B,) int32


class Token(NamedTuple):
    """Where a row of q or k belongs. Not in any sequence: batch is -1."""

    batch: Int32
    row: Int32  # of its tensor, packed or within its sequence
    index: Int32  # within its sequence


class Place(NamedTuple):
    """Where a position of a sequence lies in the cache, if it does."""

    exists: Boolean
    row: Int32
    offset: Int32


class AppendKv:
    """Compile with `cute.compile(AppendKv(spec), AppendTensors, grid, stream)`."""

    def __init__(self, spec: AppendSpec):
        self.spec = spec

    @cute.jit
    def __call__(self, tensors: AppendTensors, grid: Int32, stream: cuda.CUstream):
        self.kernel(tensors).launch(grid=[grid, 1, 1], block=[THREADS, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, tensors: AppendTensors):
        t = tensors
        new_rows, query_rows = _rows(t.k), Int32(0)
        if const_expr(t.q is not None):
            query_rows = _rows(t.q)
        batch_size = cute.size(t.seqused)
        before_queries = 2 * new_rows
        before_lengths = before_queries + query_rows
        end = before_lengths + cute.ceil_div(batch_size, THREADS)
        index, _, _ = cute.arch.block_idx()
        step, _, _ = cute.arch.grid_dim()
        while index < end:
            if index < new_rows:
                self._append_key(t, index)
            elif index < before_queries:
                self._append_value(t, index - new_rows)
            elif index < before_lengths:
                if const_expr(t.q is not None):
                    self._rotate_query(t, index - before_queries)
            else:
                thread, _, _ = cute.arch.thread_idx()
                batch = (index - before_lengths) * THREADS + thread
                if batch < batch_size:
                    t.seqused[batch] = self._length(t, batch)
            index = index + step

    @cute.jit
    def _append_key(self, t: AppendTensors, row: Int32):
        token = _token(t.k, t.cu_seqlens_k, row)
        if token.batch >= 0:
            place = _place(t, token.batch, t.cache_seqlens[token.batch] + token.index)
            if place.exists:
                source, target = _heads(t.k, token), t.k_cache[place.row, place.offset, None, None]
                if const_expr(self.spec.rotary_dim > 0):
                    rotate_token(source, target, self._table(t, token.batch, token.index), KEYS_IN_FLIGHT)
                else:
                    copy_token(source, target)

    @cute.jit
    def _append_value(self, t: AppendTensors, row: Int32):
        token = _token(t.v, t.cu_seqlens_k, row)
        if token.batch >= 0:
            place = _place(t, token.batch, t.cache_seqlens[token.batch] + token.index)
            if place.exists:
                copy_token(_heads(t.v, token), t.v_cache[place.row, place.offset, None, None])

    @cute.jit
    def _rotate_query(self, t: AppendTensors, row: Int32):
        token = _token(t.q, t.cu_seqlens_q, row)
        source, target = _heads(t.q, token), _heads(t.q_rotated, token)
        if token.batch >= 0:
            index = token.index if const_expr(self.spec.queries_advance) else Int32(0)
            rotate_token(source, target, self._table(t, token.batch, index), QUERIES_IN_FLIGHT)
        else:
            # Nobody's query, but attention may load it beside others.
            copy_token(source, target)

    @cute.jit
    def _table(self, t: AppendTensors, batch: Int32, index: Int32) -> RotaryTable:
        first = t.cache_seqlens[batch]
        if const_expr(t.rotary_seqlens is not None):
            first = t.rotary_seqlens[batch]
        position = first + index
        is_inside = position >= 0 and position < cute.size(t.cos, mode=[0])
        row = position if is_inside else Int32(0)
        return RotaryTable(t.cos[row, None], t.sin[row, None], is_inside, self.spec.rotary_dim, self.spec.interleaved)

    @cute.jit
    def _length(self, t: AppendTensors, batch: Int32) -> Int32:
        """The keys of a sequence afterwards. Where the first new one has no place it is what it was."""
        if const_expr(t.cu_seqlens_k is not None):
            added = t.cu_seqlens_k[batch + 1] - t.cu_seqlens_k[batch]
        else:
            added = cute.size(t.k, mode=[1])
        cached = t.cache_seqlens[batch]
        first = _place(t, batch, cached)
        length = cached + added if first.exists else cached
        return cutlass.max(cutlass.min(length, _capacity(t)), 0)


def _rows(x: cute.Tensor) -> Int32:
    """Tokens of a packed (rows, heads, D) or batched (B, rows, heads, D) tensor."""
    return cute.size(x, mode=[0]) if cute.rank(x) == 3 else cute.size(x, mode=[0]) * cute.size(x, mode=[1])


def _heads(x: cute.Tensor, token: Token) -> cute.Tensor:
    """(heads, D) of a token."""
    return x[token.row, None, None] if cute.rank(x) == 3 else x[token.batch, token.row, None, None]


@cute.jit
def _token(x: cute.Tensor, cu_seqlens: cute.Tensor | None, row: Int32) -> Token:
    """The token in a row of a packed or batched tensor. All lanes of a warp call it with the same row."""
    if const_expr(cu_seqlens is None):
        rows = cute.size(x, mode=[1])
        token = Token(row // rows, row % rows, row % rows)
    else:
        entries = cute.size(cu_seqlens)
        batch = last_at_most(cu_seqlens, entries, row)
        if batch == entries - 1:
            batch = Int32(-1)
        start = cu_seqlens[cutlass.max(batch, 0)]
        token = Token(batch, row, row - start)
    return token


@cute.jit
def _place(t: AppendTensors, batch: Int32, position: Int32) -> Place:
    exists = position >= 0 and position < _capacity(t)
    row, offset = batch, position
    if const_expr(t.page_table is not None):
        page_size = cute.size(t.k_cache, mode=[1])
        offset = position % page_size
        if exists:
            row = t.page_table[batch, position // page_size]
    elif const_expr(t.cache_batch_idx is not None):
        row = t.cache_batch_idx[batch]
    exists = exists and row >= 0 and row < cute.size(t.k_cache, mode=[0])
    return Place(exists, row, offset)


def _capacity(t: AppendTensors) -> Int32:
    """Positions of a sequence."""
    positions = cute.size(t.k_cache, mode=[1])
    return positions if t.page_table is None else positions * cute.size(t.page_table, mode=[1])
