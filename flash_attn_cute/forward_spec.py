"""What a forward kernel of any architecture is compiled for, and what a launch of it is given."""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from flash_attn_cute.device.active_tiles import ActiveTiles
from flash_attn_cute.device.divisor import Divisor
from flash_attn_cute.device.key_bias import ALL_HEADS, KV_HEADS, KeySideSpec, Place
from flash_attn_cute.device.kv_range import KvPart, KvRange, Window
from flash_attn_cute.device.paged_kv import PageTable
from flash_attn_cute.device.query_bias import QuerySideSpec
from flash_attn_cute.device.seqlens import Seqlens, SeqlenSource, SeqlenTensors, row_of_cache
from flash_attn_cute.tile_scheduler import PlannedOrder, PlannedWork, TileOrder, WorkTile
from flash_attn_cute.tuning import Sm90Tile, Sm100Tile


@dataclass(frozen=True)
class ForwardSpec:
    """What is fixed when a kernel is compiled."""

    dtype: type  # cutlass.BFloat16 or cutlass.Float16
    tile: Sm90Tile | Sm100Tile
    qheads_per_kvhead: int
    rows_per_token: int  # rows a token takes in a query tile: 1, or at least qheads_per_kvhead where heads are packed
    causal: bool
    window_left: bool
    window_right: bool  # causal excludes it
    softcap: bool
    splits: bool = False  # work tiles may be splits, whose results are partial
    clc: bool = False  # tiles are handed out by cluster launch control
    page_span: int = 0  # of paged keys: rows of a span that TMA loads (see device.paged_kv)
    gathers: bool = False  # rows of paged keys are gathered with cp.async
    key_side: KeySideSpec | None = None
    skips: bool = False  # KV tiles that the key mask hides whole are not visited
    query_side: QuerySideSpec | None = None

    @property
    def packed(self) -> bool:
        return self.rows_per_token > 1

    @property
    def qheads_per_tile(self) -> int:
        return self.qheads_per_kvhead if self.packed else 1

    @property
    def bias_vectors(self) -> int:
        """Numbers that a key-side bias has staged a key."""
        return self.key_side.vectors(self.qheads_per_tile)

    @property
    def tokens_per_tile(self) -> int:
        return self.tile.tile_m // self.rows_per_token

    @property
    def query_tiles(self) -> int:
        return self.tile.tile_m // self.tile.query_rows

    @property
    def query_box(self) -> tuple:
        """((heads, tokens), columns) that one load of queries takes; see ragged_tma.query_view."""
        return (self.rows_per_token, self.tile.query_rows // self.rows_per_token), self.tile.head_dim


class ForwardTensors(NamedTuple):
    """Tensors of a call. q, out: (total_q, H, D) or (B, Sq, H, D); lse: (H, total_q) or (B, H, Sq); k, v likewise."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    out: cute.Tensor
    lse: cute.Tensor | None
    cu_seqlens_q: cute.Tensor | None
    cu_seqlens_k: cute.Tensor | None
    seqused_q: cute.Tensor | None
    seqused_k: cute.Tensor | None
    sink: cute.Tensor | None
    semaphore: cute.Tensor | None
    partial: cute.Tensor | None = None  # (slots, tile_m, Dv) float32: outputs of splits, rows as in the query tile
    lse_partial: cute.Tensor | None = None  # (slots, tile_m) float32
    work: PlannedWork | None = None
    page_table: cute.Tensor | None = None  # (B, W) int32; then k and v are (pages, page_size, Hk, D or Dv)
    leftpad_k: cute.Tensor | None = None
    cache_batch_idx: cute.Tensor | None = None  # which row of batched k and v a sequence has
    key_mask: cute.Tensor | None = None  # uint8; as key_bias (total_k, H*), (B, Sk, H*) or (pages, page_size, H*)
    key_bias: cute.Tensor | None = None
    active: ActiveTiles | None = None  # where the kernel skips
    query_mask: cute.Tensor | None = None  # uint8; as query_bias (total_q, H*, max_seqlen_k)
    query_bias: cute.Tensor | None = None

    @property
    def packed_q(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def packed_k(self) -> bool:
        return self.cu_seqlens_k is not None

    @property
    def ragged_k(self) -> bool:
        """Whether keys of a sequence may end before the tensor does, so that loads have to be told where."""
        lengths = (self.cu_seqlens_k, self.seqused_k, self.leftpad_k)
        return any(length is not None for length in lengths)


class ForwardScalars(NamedTuple):
    """Numbers of a call, none of which is compiled in."""

    softmax_scale: Float32
    softcap: Float32  # read where the kernel was compiled with one
    window_left: Int32
    window_right: Int32
    seqlen_k: Int32  # of batched k, which may be 0 where a tensor map's extent may not
    num_tiles: Int32
    grid: Int32
    section_heads: Int32
    section_tiles: Int32
    short_from: Int32  # the tile number from which on all tiles are short; see TileScheduler
    tiles_per_split: Int32  # read where the kernel was compiled with splits
    combine_x: Int32  # the grid of the combine launch, where the kernel was compiled with splits
    combine_y: Int32
    combine_beside: Int32  # how many of its CTAs find room beside those of the forward
    by_page_size: Divisor  # read where keys are paged
    bias_factor: Float32  # read where there is a bias: 1 over the scale of scores, or over their soft cap


def seqlen_source(tensors: ForwardTensors, scalars: ForwardScalars) -> SeqlenSource:
    q, cu_seqlens_q = tensors.q, tensors.cu_seqlens_q
    return SeqlenSource(
        SeqlenTensors(cu_seqlens_q, tensors.cu_seqlens_k, tensors.seqused_q, tensors.seqused_k, tensors.leftpad_k),
        cute.size(cu_seqlens_q) - 1 if const_expr(tensors.packed_q) else cute.size(q, mode=[0]),
        cute.size(q, mode=[0 if const_expr(tensors.packed_q) else 1]),
        scalars.seqlen_k,
    )


def window_of(spec: ForwardSpec, scalars: ForwardScalars) -> Window:
    right = None
    if const_expr(spec.causal):
        right = Int32(0)
    elif const_expr(spec.window_right):
        right = scalars.window_right
    left = scalars.window_left if const_expr(spec.window_left) else None
    return Window(left, right, scalars.tiles_per_split if const_expr(spec.splits) else None)


def page_table(
    spec: ForwardSpec, tensors: ForwardTensors, scalars: ForwardScalars, seqlens: Seqlens, batch: Int32
) -> PageTable:
    return PageTable(
        tensors.page_table[batch, None],
        cute.size(tensors.k, mode=[1]),
        scalars.by_page_size,
        cute.size(tensors.k, mode=[0]),
        seqlens.len_k,
        seqlens.offset_k if const_expr(tensors.leftpad_k is not None) else None,
        spec.page_span,
    )


def cache_row(tensors: ForwardTensors, batch: Int32) -> Int32:
    """The row of batched k and v that a sequence has."""
    return row_of_cache(tensors.cache_batch_idx, batch, cute.size(tensors.k, mode=[0]))


def key_side_place(
    spec: ForwardSpec, tensors: ForwardTensors, scalars: ForwardScalars, work: WorkTile, seqlens: Seqlens
) -> Place:
    table = None
    if tensors.page_table is not None:
        table = page_table(spec, tensors, scalars, seqlens, work.batch)
    head_kv = work.head if spec.packed else work.head // spec.qheads_per_kvhead
    head_q = work.head * spec.qheads_per_kvhead if spec.packed else work.head
    return Place(cache_row(tensors, work.batch), seqlens, table, head_kv, head_q)


def num_tile_heads(spec: ForwardSpec, tensors: ForwardTensors) -> Int32:
    """Query tiles of a range of tokens: one a query head, or one a KV head where query heads are packed."""
    heads = cute.size(tensors.q, mode=[cute.rank(tensors.q) - 2])
    return heads // spec.qheads_per_kvhead if spec.packed else heads


def tile_order(
    spec: ForwardSpec, tensors: ForwardTensors, scalars: ForwardScalars, source: SeqlenSource
) -> TileOrder | PlannedOrder:
    heads = num_tile_heads(spec, tensors)
    longest_first = spec.causal or spec.window_right
    if const_expr(tensors.work is not None):
        return PlannedOrder.create(source, tensors.work, heads, longest_first, spec.tile.scheduler_keeps_sequences)
    return TileOrder(
        source,
        heads,
        scalars.num_tiles,
        scalars.section_heads,
        scalars.section_tiles,
        spec.tokens_per_tile,
        longest_first,
    )


@cute.jit
def kv_range(spec: ForwardSpec, work: WorkTile, seqlens: Seqlens, window: Window) -> KvRange:
    """KV tiles that the queries of a work tile see, or the part of them that its split has.

    Where the kernel skips, the range is one of entries: `kv_tile` says which KV tile is in a place of it.
    """
    if const_expr(spec.skips):
        return KvRange.union(work.entries)
    visible = _visible(spec, work, seqlens, window)
    return visible.within(work.part) if const_expr(spec.splits) else visible


@cute.jit
def kv_tile(spec: ForwardSpec, tensors: ForwardTensors, place: Int32, first: Int32 | None = None) -> Int32:
    """The number of the KV tile in a place of `kv_range`.

    first: of the range, for who looks at the place before it, too. Where the kernel skips, that is the first again.
    """
    if const_expr(not spec.skips):
        return place
    return tensors.active.entries()[place if const_expr(first is None) else cutlass.max(place, first)]


@cute.jit
def with_keys(spec: ForwardSpec, work: WorkTile, seqlens: Seqlens, window: Window, tensors: ForwardTensors) -> WorkTile:
    """A work tile of an order with what everyone else is told of its KV tiles, who would have to divide, or to load, to
    find out: which part a split has, or, where the kernel skips, what each of its query tiles visits. All 32 lanes of
    a warp call it."""
    if const_expr(spec.skips):
        return work._replace(entries=_entries_of_query_tiles(spec, work, seqlens, window, tensors))
    part = KvPart.all()
    if const_expr(spec.splits):
        if work.num_splits > 1:
            kv = _visible(spec, work, seqlens, window)
            kv = kv.of_split(work.split, work.num_splits, window.tiles_per_split)
            part = KvPart(kv.first, kv.end)
    return work._replace(part=part)


@cute.jit
def _entries_of_query_tiles(
    spec: ForwardSpec, work: WorkTile, seqlens: Seqlens, window: Window, tensors: ForwardTensors
) -> tuple:
    """What each query tile visits, where the kernel skips.

    It follows from the mask of the call alone: a plan, which may be of another mask, says how many splits there are,
    and no more. Absolute boundaries are between KV tiles, whatever is hidden; otherwise splits share what is not.
    """
    tiles = _visible(spec, work, seqlens, window)
    if const_expr(spec.splits):
        if work.num_splits > 1 and window.tiles_per_split > 0:
            tiles = tiles.of_split(work.split, work.num_splits, window.tiles_per_split)
    entries = _entries(spec, work, seqlens, window, tensors, tiles)
    if const_expr(spec.splits):
        if work.num_splits > 1 and window.tiles_per_split <= 0:
            entries = entries.of_split(work.split, work.num_splits, Int32(0))
    of_query_tiles = (entries,)
    if const_expr(spec.query_tiles > 1):
        seen = [_visible(spec, work, seqlens, window, i) for i in range(spec.query_tiles)]
        of_query_tiles = tuple(_entries(spec, work, seqlens, window, tensors, kv).within(entries) for kv in seen)
    return of_query_tiles


def _entries(
    spec: ForwardSpec, work: WorkTile, seqlens: Seqlens, window: Window, tensors: ForwardTensors, tiles: KvRange
) -> KvRange:
    """Those that hold KV tiles of a range."""
    group, tile_n = _list_group(spec, work), spec.tile.tile_n
    return tensors.active.entries_of(tiles, window, seqlens, work.batch, group, tile_n)


def _list_group(spec: ForwardSpec, work: WorkTile) -> Int32:
    """Which list of its sequence a work tile has: active_tiles.ListShape."""
    if spec.key_side.mask == ALL_HEADS:
        return Int32(0)
    if spec.key_side.mask == KV_HEADS and not spec.packed:
        return work.head // spec.qheads_per_kvhead
    return work.head


def _visible(
    spec: ForwardSpec, work: WorkTile, seqlens: Seqlens, window: Window, query_tile: int | None = None
) -> KvRange:
    """Of all query tiles of a work tile, or of one."""
    first, tokens = work.m_block * spec.tokens_per_tile, spec.tokens_per_tile
    if query_tile is not None:
        tokens = tokens // spec.query_tiles
        first = first + query_tile * tokens
    return KvRange.of_query_tile(seqlens, window, first, tokens, spec.tile.tile_n)
