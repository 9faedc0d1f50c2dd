"""Keys and values in pages: where the rows of a KV tile are, and two ways to load them.

Row i of a sequence is row i % page_size of the page that its table names at i // page_size. A KV tile is loaded in
spans, the longest runs of rows that divide both pages and tiles, so that a span never leaves its page. Where a span has
whole swizzle patterns of 8 rows, TMA loads it (`PagedTileLoader`); otherwise threads gather rows with cp.async
(`RowGatherer`, as FlashAttention-3 does for all pages but its own size), which takes any start of a row. Either way
rows behind the last key arrive as zeros, and neither their pages nor their table entries are read.

A table entry takes a trip to memory, so loading is in two steps: `find` starts to read the entries of a KV tile, and
`load`, called one KV tile later, uses them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, const_expr
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import cpasync
from cutlass.cutlass_dsl import dsl_user_op

from flash_attn_cute.device.divisor import Divisor
from flash_attn_cute.device.pipelines import MbarrierRing, RingPosition
from flash_attn_cute.device.ragged_tma import cache_policy, swizzled_columns

WARP = 32
CHUNK = 8  # elements in the 16 bytes that one cp.async moves; all of this is of elements of 16 bits


def page_view(x: cute.Tensor) -> cute.Tensor:
    """(page_size, D, Hk, pages) of a (pages, page_size, Hk, D) cache."""
    return cute.make_tensor(x.iterator, cute.select(x.layout, mode=[1, 3, 2, 0]))


def page_end_view(x: cute.Tensor) -> cute.Tensor:
    """(page_size, D, Hk, pages, page_size + 1) of a (pages, page_size, Hk, D) cache: pages that end early.

    The last mode is that of ragged_tma, applied to a page: with n rows of it in use, row i has the coordinates
    (page_size - n + i, n), and rows from n on are out of bounds. For boxes that have a row in use only: the copy engine
    looks up the first address of a tensor for a box that is out of bounds as a whole (seen on an H200, as an illegal
    address), and this one begins a page before the cache.
    """
    view = page_view(x)
    rows = view.shape[0]
    start = cute.domain_offset((-rows, 0, 0, 0), view).iterator
    return cute.make_tensor(start, cute.make_layout((*view.shape, rows + 1), stride=(*view.stride, view.stride[0])))


@dataclass(frozen=True)
class PageTable:
    """Pages of one sequence."""

    entries: cute.Tensor  # (W,) int32
    page_size: Int32
    by_page_size: Divisor
    num_pages: Int32
    len_k: Int32
    leftpad: Int32 | None  # rows before the first key; None: there is no such thing
    span: int  # rows; of no meaning where rows are gathered

    def position(self, row: Int32) -> Int32:
        return row if const_expr(self.leftpad is None) else row + self.leftpad

    @cute.jit
    def entry(self, row: Int32) -> Int32:
        """What the table has for the page that holds a row; 0 for a page without keys.

        `page` makes a page of it, when it is used: a comparison here would wait for memory.
        """
        number = self.by_page_size.floor(self.position(row))
        entry = Int32(0)
        if number * self.page_size < self.position(self.len_k) and number < cute.size(self.entries):
            entry = self.entries[number]
        return entry

    def entry_of_key(self, row: Int32) -> Int32:
        """`entry` of a row that holds a key, of a table that has an entry: no condition, so that many are on their way
        at once. Behind a condition ptxas loads strides with each, and where it waits for those, waits for entries."""
        number = cutlass.min(self.by_page_size.floor(self.position(row)), cute.size(self.entries) - 1)
        return self.entries[number]

    @cute.jit
    def page(self, entry: Int32) -> Int32:
        """The page that an entry names, page 0 for one that the cache does not have: a table that is wrong reads wrong
        keys, and nothing but the cache."""
        return entry if Uint32(entry) < Uint32(self.num_pages) else Int32(0)


class PageCopies(NamedTuple):
    """What loads boxes of one operand from pages: whole boxes of rows in use or of none, and the one where they end."""

    atom: cute.CopyAtom
    source: cute.Tensor  # coordinates of `page_view`
    end_atom: cute.CopyAtom
    end_source: cute.Tensor  # coordinates of `page_end_view`

    @staticmethod
    def create(x: cute.Tensor, box_layout: cute.ComposedLayout, box):
        """x: the cache. box_layout: of a box in shared memory."""
        load = cpasync.CopyBulkTensorTileG2SOp()
        whole = cpasync.make_tiled_tma_atom(load, page_view(x), box_layout, box)
        return PageCopies(*whole, *cpasync.make_tiled_tma_atom(load, page_end_view(x), box_layout, box))


class PagesOfTile(NamedTuple):
    """A KV tile whose table entries are on their way. Lanes hold them as the loader has asked."""

    kv_tile: Int32
    entries: tuple


@dataclass(frozen=True)
class PagedTileLoader:
    """Loads one operand with TMA into the stages of a ring, box by box. One warp calls it.

    A stage is (rows, columns) of a KV tile: all of it, or a piece.
    """

    pages: PageCopies
    head: Int32
    boxes: cute.Tensor  # (rows of a box, columns of a box, row boxes, column boxes, stages) of shared memory
    ring: MbarrierRing
    table: PageTable
    tile_n: int
    once: bool  # nobody else loads the same

    @staticmethod
    def create(pages: PageCopies, head: Int32, box, smem: cute.Tensor, *rest):
        """smem: (rows, columns, stages); box: (rows, columns); rest: the fields behind `boxes`."""
        return PagedTileLoader(pages, head, cute.flat_divide(smem, box), *rest)

    def find(self, kv_tile: Int32) -> PagesOfTile:
        return find_spans(self.table, kv_tile, self.tile_n)

    @cute.jit
    def load(self, position: RingPosition, tile: PagesOfTile, row_piece: Int32 = 0, column_piece: Int32 = 0):
        """Acquires the stage and starts its copies. Pieces count stages."""
        table = self.table
        box_rows, box_columns, row_boxes, column_boxes = [cute.size(self.boxes, mode=[i]) for i in range(4)]
        stage_bytes = box_rows * box_columns * row_boxes * column_boxes * self.boxes.element_type.width // 8
        self.ring.acquire_for_bytes(position, stage_bytes)
        stage, barrier = self.ring.stage(position), self.ring.full_barrier(position)
        for i in cutlass.range(row_boxes, unroll=1):
            in_tile = (row_piece * row_boxes + i) * box_rows
            page = table.page(cute.arch.shuffle_sync(tile.entries[0], in_tile // table.span))
            row = tile.kv_tile * self.tile_n + in_tile
            first = table.by_page_size.floor(row) * table.page_size
            to = self.boxes[None, None, i, None, stage]
            if row < table.len_k and row + box_rows > table.len_k:
                used = table.len_k - first
                rows = self.pages.end_source[None, None, self.head, page, used]
                rows = cute.domain_offset((table.page_size - used + row - first, 0), rows)
                self._copy_columns(self.pages.end_atom, rows, to, column_piece, barrier)
            else:
                # Behind the last key, a row that no page has.
                row_in_page = row - first if row < table.len_k else table.page_size
                rows = cute.domain_offset((row_in_page, 0), self.pages.source[None, None, self.head, page])
                self._copy_columns(self.pages.atom, rows, to, column_piece, barrier)

    @cute.jit
    def _copy_columns(self, atom: cute.CopyAtom, rows: cute.Tensor, to: cute.Tensor, column_piece: Int32, barrier):
        """rows: coordinates from the first row of a box on; to: (rows, columns, column boxes) of shared memory."""
        box_rows, box_columns, column_boxes = [cute.size(to, mode=[i]) for i in range(3)]
        for j in cutlass.range(column_boxes, unroll=1):
            source = cute.local_tile(rows, (box_rows, box_columns), (0, column_piece * column_boxes + j))
            to_box, from_box = cpasync.tma_partition(
                atom,
                0,
                cute.make_layout(1),
                cute.group_modes(to[None, None, j], 0, 2),
                cute.group_modes(source, 0, 2),
            )
            cute.copy(atom, from_box, to_box, tma_bar_ptr=barrier, cache_policy=cache_policy(self.once))


@cute.jit
def find_spans(table: PageTable, kv_tile: Int32, tile_n: int) -> PagesOfTile:
    """Lane i gets the entry of span i of a KV tile; of a negative tile, which is none, 0."""
    entry, lane = Int32(0), cute.arch.lane_idx()
    if lane < tile_n // table.span and kv_tile >= 0:
        entry = table.entry(kv_tile * tile_n + lane * table.span)
    return PagesOfTile(kv_tile, (entry,))


@dataclass(frozen=True)
class RowGatherer:
    """Loads one operand with cp.async into the stages of a ring, row by row. `warps` warps share the work.

    The full barriers of the ring take an arrival from each of their threads. What cp.async writes belongs to the
    generic proxy: who waits for it has to fence before the tensor cores read it.
    """

    rows: cute.Tensor  # (pages, page_size, columns) of one head
    stages: cute.Tensor  # (rows, columns, stages) of shared memory; columns that `rows` does not have become zeros
    ring: MbarrierRing
    table: PageTable
    tile_n: int
    warp: Int32  # of the `warps` that load
    warps: int
    unroll: int  # of the loop over rows: as many as a warp has registers for

    @staticmethod
    def create(x, head: Int32, *rest):
        """x: (pages, page_size, Hk, columns); rest: the fields behind `rows`."""
        return RowGatherer(x[None, None, head, None], *rest)

    @property
    def swizzle_bytes(self) -> int:
        return 2 * swizzled_columns(cute.size(self.stages, mode=[1]))

    @property
    def groups(self) -> int:
        """Of 32 rows of a KV tile, those that a warp takes care of."""
        return -(-self.tile_n // (WARP * self.warps))

    def _group_row(self, i: int) -> Int32:
        """The first row of a warp's i-th group in a KV tile."""
        return (i * self.warps + self.warp) * WARP

    @cute.jit
    def find(self, kv_tile: Int32) -> PagesOfTile:
        """Lane i gets the entries of row i of each of its warp's groups; 0 where there is no key."""
        entries, lane = [Int32(0)] * self.groups, cute.arch.lane_idx()
        for i in cutlass.range_constexpr(self.groups):
            row = kv_tile * self.tile_n + self._group_row(i) + lane
            if row >= 0 and row < self.table.len_k:
                entries[i] = self.table.entry(row)
        return PagesOfTile(kv_tile, tuple(entries))

    @cute.jit
    def load(self, position: RingPosition, tile: PagesOfTile, row_piece: Int32 = 0, column_piece: Int32 = 0):
        """Waits until the stage is empty and starts its copies. Pieces count stages."""
        self.ring.wait_empty(position)
        table, lane = self.table, cute.arch.lane_idx()
        stage = self.stages[None, None, self.ring.stage(position)].iterator.toint()
        for i in cutlass.range_constexpr(self.groups):
            in_tile = self._group_row(i)
            row = tile.kv_tile * self.tile_n + in_tile + lane
            padded_row = table.position(row)
            in_page = padded_row - table.by_page_size.floor(padded_row) * table.page_size
            offset, has_key = Int64(0), Int32(0)
            if row < table.len_k:
                page = table.page(tile.entries[i])
                offset, has_key = Int64(cute.crd2idx((page, in_page, 0), self.rows.layout)), Int32(1)
            stage_rows = cute.size(self.stages, mode=[0])
            in_stage = in_tile - row_piece * stage_rows
            # Lanes agree about this: a piece of a tile has some of its groups, or a part of one.
            if in_stage > -WARP and in_stage < stage_rows:
                self._copy_group(stage, in_stage, offset, has_key, column_piece)
        cute.arch.cp_async_mbarrier_arrive_noinc(self.ring.full_barrier(position))

    @cute.jit
    def _copy_group(self, stage: Int32, first_row: Int32, offset: Int64, has_key: Int32, column_piece: Int32):
        """32 rows, of which each lane knows one. first_row: in the stage; rows that are not in it are left out."""
        chunks = self.swizzle_bytes // 16  # of a row in a block of columns
        rows_at_once = WARP // chunks
        stage_rows, stage_columns = (cute.size(self.stages, mode=[i]) for i in range(2))
        lane = cute.arch.lane_idx()
        chunk, lane_row = lane % chunks, lane // chunks
        address = self.rows.iterator.toint() + 2 * offset
        num_bytes = has_key * 16
        # Several at once: a row's shuffles would otherwise wait for those of the row before.
        for r in cutlass.range(0, WARP, rows_at_once, unroll=self.unroll):
            row = first_row + r + lane_row
            row_address = cute.arch.shuffle_sync(address, r + lane_row)
            row_bytes = cute.arch.shuffle_sync(num_bytes, r + lane_row)
            if row >= 0 and row < stage_rows:
                in_block = row * self.swizzle_bytes + chunk * 16
                to = stage + (in_block ^ ((in_block >> 3) & (self.swizzle_bytes - 16)))
                for block in cutlass.range_constexpr(2 * stage_columns // self.swizzle_bytes):
                    column = column_piece * stage_columns + (block * chunks + chunk) * CHUNK
                    source, source_bytes = row_address + 2 * column, row_bytes
                    if const_expr(cute.size(self.rows, mode=[2]) % stage_columns != 0):
                        has_column = column < cute.size(self.rows, mode=[2])
                        source = source if has_column else row_address
                        source_bytes = row_bytes if has_column else Int32(0)
                    _copy_or_zero(to + block * (stage_rows * self.swizzle_bytes), source, source_bytes)


@dsl_user_op
def _copy_or_zero(to: Int32, source: Int64, num_bytes: Int32, *, loc=None, ip=None):
    """Starts a copy of 16 bytes of global to shared memory, the last 16 - num_bytes of which are zeros, not read."""
    llvm.inline_asm(
        None,
        [x.ir_value(loc=loc, ip=ip) for x in (Int32(to), Int64(source), Int32(num_bytes))],
        "cp.async.cg.shared.global [$0], [$1], 16, $2;",
        "r,l,r",
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )
