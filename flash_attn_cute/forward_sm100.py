"""Attention forward on Blackwell (SM100 and SM103).

One persistent CTA a SM. Accumulators are in tensor memory, and every role has warps of its own: one warp issues all
products, a softmax warpgroup a query tile turns scores into probabilities, a correction warpgroup rescales outputs
where a row's maximum has grown and writes them out at the end, and one warp each loads, stores and schedules (the
division of labour of FlashAttention-4). Two query tiles of 128 rows are in flight where tensor memory has room for two
outputs, so that the tensor cores multiply for one while the other is exponentiated; a wide head has one query tile and
two score buffers instead. See csrc_notes/forward_sm100.md for the pipeline, the barriers and the budgets.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.blackwell_helpers as blackwell
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.memory import SmemAllocator

from flash_attn_cute.device import accumulator_rows, packed, ragged_tma, tensor_memory, umma
from flash_attn_cute.device.dependent_launch import let_dependents_start, wait_for_prerequisites
from flash_attn_cute.device.key_bias import BiasOfRows, Given, KeyBiasStager, KeySide, allocate_staged
from flash_attn_cute.device.kv_range import KvRange, Window
from flash_attn_cute.device.masking import RowLimits, mask_row
from flash_attn_cute.device.output_rows import RowPlace, clear_row, copy_rows, store_lse, token_of_row
from flash_attn_cute.device.paged_kv import PageCopies, PagedTileLoader, RowGatherer
from flash_attn_cute.device.pipelines import MbarrierRing, RingPosition
from flash_attn_cute.device.query_bias import BiasOfQueries, QuerySide
from flash_attn_cute.device.row_softmax import RowSoftmax
from flash_attn_cute.device.scheduling_warp import prefetch_lengths, schedule
from flash_attn_cute.device.seqlens import Seqlens, SeqlenSource
from flash_attn_cute.device.softmax import LOG2_E, normalise, tanh
from flash_attn_cute.device.tensor_memory import Row
from flash_attn_cute.device.umma import SharedOperand
from flash_attn_cute.forward_spec import (
    ForwardScalars,
    ForwardSpec,
    ForwardTensors,
    cache_row,
    key_side_place,
    kv_tile,
    page_table,
    seqlen_source,
    tile_order,
    window_of,
)
from flash_attn_cute.tile_scheduler import (
    MAILBOX_STAGES,
    ClcScheduler,
    TileMailbox,
    TileScheduler,
    WorkTile,
    mailbox_words,
)
from flash_attn_cute.tuning import BIAS_STAGES

WARP, WARPGROUP = 32, 128
# Warps of a warpgroup, one arrival each: all of softmax, of correction, or of staging a bias.
WARPS = 4
# Steps of gathering at once, for which the loading warp has registers; with all 8 at d128 it spilled.
GATHER_UNROLL = 4
# Keys whose mask and bias a lane reads at once, by the registers that it has.
STAGED_AT_ONCE = 2


class Operand(NamedTuple):
    """One tensor that TMA moves: the copy, its coordinate tensor, and its layout in shared memory, stages last.

    Of paged keys there is no copy here: source is the copies of pages, or the tensor itself where rows are gathered.
    `whole` is the copy and coordinates of the tensor without ends of sequences, for pieces behind one.
    """

    atom: cute.CopyAtom | None
    source: cute.Tensor | PageCopies
    smem_layout: cute.ComposedLayout
    whole: tuple | None = None


class Operands(NamedTuple):
    q: Operand
    k: Operand
    v: Operand
    out: Operand


@dataclass(frozen=True)
class SharedBias:
    """What a key-side mask and bias have in shared memory. A position in both rings is a KV tile."""

    staged: cute.Tensor  # (tile_n, vectors, stages) float32
    ring: MbarrierRing
    cleared: MbarrierRing  # full: hidden values have been zeroed; nobody releases


@dataclass(frozen=True)
class Shared:
    """Shared memory of a CTA: tiles as (rows, columns, stages), factors of rows, and what warps meet on.

    Rings that belong to a query tile come as functions of its index. Where outputs lie over queries, the next scores of
    a query tile come behind its stored output, when nothing of that is in use any more: the rings of factors and of
    outputs are then empty without being told.
    """

    q: cute.Tensor  # a stage a query tile, as out
    k: cute.Tensor  # k and v are two views of one ring of stages
    v: cute.Tensor
    out: cute.Tensor
    rescaling: cute.Tensor  # (128, 2): what each row's earlier output is multiplied by, a column a score buffer
    normalising: cute.Tensor  # (128, query tiles): what each row's finished output is multiplied by
    mailbox: TileMailbox
    kv_ring: MbarrierRing
    barriers: cute.Pointer  # of the other rings
    score_buffers: int  # of a query tile
    bias: SharedBias | None

    WORDS_OF_TILE = 16

    def _ring(self, index, first_word: int, stages: int = 1) -> MbarrierRing:
        return MbarrierRing(self.barriers + self.WORDS_OF_TILE * index + first_word, stages)

    def q_ring(self, index) -> MbarrierRing:
        return self._ring(index, 0)

    def score_ring(self, index) -> MbarrierRing:
        """Full: scores are there. Released: probabilities are, and the output takes their product."""
        return self._ring(index, 2, self.score_buffers)

    def product_ring(self, index) -> MbarrierRing:
        """Full: the output is complete; with two score buffers, after each product. Nobody releases."""
        return self._ring(index, 6)

    def factor_ring(self, index) -> MbarrierRing:
        """Full: the rows' normalising factors are there."""
        return self._ring(index, 8)

    def output_ring(self, index) -> MbarrierRing:
        """Full: the finished output is staged. Empty: it has been stored, or else the queries' ring is."""
        return self._ring(index, 10)

    @cute.jit
    def init_barriers(self, query_tiles: cutlass.Constexpr, key_arrivals: cutlass.Constexpr):
        self.mailbox.init()
        self.kv_ring.init(full_arrivals=key_arrivals, empty_arrivals=1)
        if const_expr(self.bias is not None):
            self.bias.ring.init(full_arrivals=WARPS, empty_arrivals=WARPS * query_tiles)
            self.bias.cleared.init(full_arrivals=WARPS, empty_arrivals=1)
        for i in cutlass.range_constexpr(query_tiles):
            self.q_ring(i).init(full_arrivals=1, empty_arrivals=1)
            self.score_ring(i).init(full_arrivals=1, empty_arrivals=2 * WARPS)
            self.product_ring(i).init(full_arrivals=1, empty_arrivals=1)
            self.factor_ring(i).init(full_arrivals=WARPS, empty_arrivals=WARPS)
            self.output_ring(i).init(full_arrivals=WARPS, empty_arrivals=1)


class Ranges(NamedTuple):
    """KV tiles of a work tile: of each of its query tiles, and the least range that holds them."""

    of: tuple
    first: Int32
    end: Int32


@dataclass(frozen=True)
class Products:
    """Operands of the two products S = Q K^T and O = P V."""

    q: SharedOperand  # a stage a query tile
    k: SharedOperand
    v: SharedOperand
    columns: Int32  # address of tensor memory


@dataclass(frozen=True)
class RowOfScores:
    """What one thread of a softmax warpgroup holds for a whole launch."""

    index: Int32  # of its query tile
    memory: Row
    softmax: RowSoftmax
    scores: cute.Tensor  # registers
    cap: Float32 | None  # what a soft cap multiplies scores by before their tanh
    bias: BiasOfRows | None


class ForwardSm100:
    """Compile with `cute.compile(ForwardSm100(spec), ForwardTensors, ForwardScalars, stream)`."""

    def __init__(self, spec: ForwardSpec):
        self.spec = spec
        tile = spec.tile
        self.query_tiles = tile.query_tiles
        self.alternates = tile.query_tiles == 2
        softmax_warps = WARPS * tile.query_tiles
        # Warp i of a warpgroup reaches the lanes 32 (i % 4) of tensor memory, so these begin at multiples of 4.
        self.correction_warp = softmax_warps
        self.mma_warp = softmax_warps + WARPS
        self.load_warp, self.store_warp, self.schedule_warp = [self.mma_warp + i for i in (1, 2, 3)]
        self.bias_warp = self.schedule_warp + 1
        self.bias_warps = 0 if spec.key_side is None else WARPS
        if spec.key_side is not None:
            self.registers = tile.registers_beside_bias
        elif spec.query_side is not None:
            self.registers = tile.registers_beside_bias_of_queries
        else:
            self.registers = tile.registers
        # Columns that correction holds at a time: fewer where others need its registers for a bias, and fewer still
        # beside the addresses of partial rows.
        has_bias = spec.key_side is not None or spec.query_side is not None
        pieces = 1 if not has_bias else 4 if spec.splits else 2
        self.correction_step = tensor_memory.STEP // pieces
        self.threads = WARP * (softmax_warps + 2 * WARPS + self.bias_warps)
        # All but the scheduling warp hear of tiles.
        self.mailbox_readers = softmax_warps + WARPS + 3 + self.bias_warps
        self.tokens_per_query_tile = tile.query_rows // spec.rows_per_token
        self.s_product = umma.describe(spec.dtype, tile.query_rows, tile.tile_n, sums_over_rows_of_b=False)
        self.o_product = umma.describe(spec.dtype, tile.query_rows, tile.head_dim_v, sums_over_rows_of_b=True)
        # What one TMA instruction moves: (rows, columns), as wide as the swizzle. Queries: ((heads, tokens), columns).
        rows_box = (spec.rows_per_token, self.tokens_per_query_tile)
        self.q_box = (rows_box, ragged_tma.swizzled_columns(tile.head_dim))
        self.k_box = (spec.page_span or tile.tile_n, ragged_tma.swizzled_columns(tile.k_columns))
        self.v_box = (
            math.gcd(spec.page_span or tile.tile_n, tile.v_rows),
            ragged_tma.swizzled_columns(tile.head_dim_v),
        )
        self.out_box = (rows_box, ragged_tma.swizzled_columns(tile.head_dim_v))
        # A box of queries is a box of outputs unless tokens take more rows than they have heads.
        self.stores_boxes = spec.rows_per_token in (1, spec.qheads_per_kvhead)

    # ---------------------------------------------------------------------------------------------------------------
    # Host side: descriptors, layouts, launch
    # ---------------------------------------------------------------------------------------------------------------

    @cute.jit
    def __call__(self, tensors: ForwardTensors, scalars: ForwardScalars, stream: cuda.CUstream):
        tile = self.spec.tile
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        q_view, out_view = [ragged_tma.query_view(x, ragged=tensors.packed_q) for x in (tensors.q, tensors.out)]
        query_stage = tile.query_rows * tile.head_dim
        q_layout = self._smem_layout(tile.query_rows, tile.head_dim, tile.query_tiles, query_stage)
        k_layout = self._smem_layout(tile.tile_n, tile.k_columns, tile.kv_stages, tile.stage_elements)
        v_layout = self._smem_layout(tile.v_rows, tile.head_dim_v, tile.kv_stages, tile.stage_elements)
        out_stage = query_stage if tile.output_over_queries else tile.query_rows * tile.head_dim_v
        out_layout = self._smem_layout(tile.query_rows, tile.head_dim_v, tile.query_tiles, out_stage)
        operands = Operands(
            self._operand(load, q_view, q_layout, self.q_box),
            self._key_operand(tensors.k, k_layout, self.k_box, tensors),
            self._key_operand(tensors.v, v_layout, self.v_box, tensors),
            self._operand(store, out_view, out_layout, self.out_box),
        )
        source = seqlen_source(tensors, scalars)
        self.kernel(operands, tensors, scalars, source).launch(
            grid=[scalars.grid, 1, 1],
            block=[self.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,  # see `wait_for_prerequisites`
        )

    def _smem_layout(self, rows: int, columns: int, stages: int, stage_elements: int) -> cute.ComposedLayout:
        """Rows of `columns` contiguous elements, swizzled; stages are `stage_elements` apart."""
        kind = blackwell.get_smem_layout_atom_ab(OperandMajorMode.K, self.spec.dtype, (rows, columns))
        atom = tcgen05.make_smem_layout_atom(kind, self.spec.dtype)
        layout = cute.tile_to_shape(atom, (rows, columns), order=(0, 1))
        outer = cute.append(layout.outer, cute.make_layout(stages, stride=stage_elements))
        return cute.make_composed_layout(layout.inner, 0, outer)

    def _key_operand(self, x: cute.Tensor, smem_layout: cute.ComposedLayout, box, tensors: ForwardTensors) -> Operand:
        """Keys or values. Loads stop at the last used key: rows behind it arrive as zeros."""
        if self.spec.gathers:
            return Operand(None, x, smem_layout)
        if tensors.page_table is not None:
            return Operand(None, PageCopies.create(x, _box_layout(smem_layout, box), box), smem_layout)
        load = cpasync.CopyBulkTensorTileG2SOp()
        operand = self._operand(load, ragged_tma.key_view(x, tensors.packed_k, tensors.ragged_k), smem_layout, box)
        if tensors.ragged_k and box[0] < self.spec.tile.tile_n:
            whole = self._operand(load, ragged_tma.key_view(x, tensors.packed_k, ragged=False), smem_layout, box)
            operand = operand._replace(whole=(whole.atom, whole.source))
        return operand

    @staticmethod
    def _operand(operation, view: cute.Tensor, smem_layout: cute.ComposedLayout, box) -> Operand:
        one = _box_layout(smem_layout, box)
        return Operand(*cpasync.make_tiled_tma_atom(operation, view, one, box), smem_layout)

    # ---------------------------------------------------------------------------------------------------------------
    # Device side
    # ---------------------------------------------------------------------------------------------------------------

    @cute.kernel
    def kernel(self, operands: Operands, tensors: ForwardTensors, scalars: ForwardScalars, source: SeqlenSource):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == self.load_warp:
            for operand in operands:
                if const_expr(operand.atom is not None):
                    cpasync.prefetch_descriptor(operand.atom)
        if warp == self.schedule_warp:
            prefetch_lengths(tensors)
        smem = SmemAllocator()
        shared = self._allocate(smem, operands)
        columns_start = smem.allocate_array(Int32, 1)
        scheduler = self._scheduler(smem, tensors, scalars)
        if warp == self.load_warp:
            with cute.arch.elect_one():
                shared.init_barriers(self.query_tiles, WARP if const_expr(self.spec.gathers) else 1)
                if const_expr(self.spec.clc):
                    scheduler.init()
                cute.arch.mbarrier_init_fence()
        if warp == self.mma_warp:
            cute.arch.alloc_tmem(tensor_memory.COLUMNS, columns_start)
        wait_for_prerequisites()
        cute.arch.sync_threads()
        columns = cute.arch.retrieve_tmem_ptr(Float32, 16, columns_start)
        # The merge's CTAs, or those of what else comes next, may take the place of ours as they leave.
        let_dependents_start()

        window = window_of(self.spec, scalars)
        registers = self.registers
        if warp < self.correction_warp:
            cute.arch.setmaxregister_increase(registers[0])
            self.softmax(shared, columns, window, tensors, scalars)
        elif warp < self.mma_warp:
            if const_expr(self.alternates):
                cute.arch.setmaxregister_decrease(registers[1])
            self.correct(shared, columns, window, tensors)
        elif const_expr(self.spec.key_side is None):
            cute.arch.setmaxregister_decrease(registers[2])
            self._other_roles(warp, operands, shared, scheduler, columns, window, tensors, scalars, source)
        else:
            if warp < self.bias_warp:
                cute.arch.setmaxregister_decrease(registers[2])
                self._other_roles(warp, operands, shared, scheduler, columns, window, tensors, scalars, source)
            else:
                cute.arch.setmaxregister_decrease(registers[3])
                self.stage_bias(shared, window, tensors, scalars, warp - self.bias_warp)
        # Whatever anyone did in tensor memory, that warp has waited for its end.
        cute.arch.sync_threads()
        if warp == self.mma_warp:
            cute.arch.relinquish_tmem_alloc_permit()
            cute.arch.dealloc_tmem(columns, tensor_memory.COLUMNS)

    @cute.jit
    def _other_roles(
        self,
        warp: Int32,
        operands: Operands,
        shared: Shared,
        scheduler,
        columns: cute.Pointer,
        window: Window,
        tensors: ForwardTensors,
        scalars: ForwardScalars,
        source: SeqlenSource,
    ):
        """Those of one warp each."""
        if warp == self.mma_warp:
            self.multiply(self._products(shared, columns), shared, window)
        if warp == self.load_warp:
            self.load(operands, shared, window, tensors, scalars)
        if warp == self.store_warp:
            self.store(operands.out, shared, window, tensors)
        if warp == self.schedule_warp:
            order = tile_order(self.spec, tensors, scalars, source)
            schedule(self.spec, order, scheduler, shared.mailbox, window, tensors)

    def _allocate(self, smem: SmemAllocator, operands: Operands) -> Shared:
        tile, dtype = self.spec.tile, self.spec.dtype

        def tiles(operand: Operand, start=None) -> cute.Tensor:
            layout = operand.smem_layout
            if start is None:
                # 1024 bytes: the period of the 128-byte swizzle, which works on absolute addresses.
                return smem.allocate_tensor(dtype, layout.outer, byte_alignment=1024, swizzle=layout.inner)
            return cute.make_tensor(cute.recast_ptr(start, layout.inner, dtype), layout.outer)

        def table(columns: int, element=Float32, rows: int = tile.query_rows) -> cute.Tensor:
            return smem.allocate_tensor(element, cute.make_layout((rows, columns)), byte_alignment=16)

        def ring(stages: int) -> MbarrierRing:
            return MbarrierRing(smem.allocate_array(cutlass.Int64, MbarrierRing.words(stages)), stages)

        q = tiles(operands.q)
        kv = smem.allocate_array(dtype, tile.kv_stages * tile.stage_elements, byte_alignment=1024)
        out = tiles(operands.out, q.iterator if tile.output_over_queries else None)
        # Behind all tiles: what is between two of them costs the 1024 bytes to which the second is aligned.
        ranges = tile.query_tiles if self.spec.skips else 0
        slots = table(MAILBOX_STAGES, Int32, mailbox_words(ranges))
        bias = None
        if self.spec.key_side is not None:
            staged = allocate_staged(smem, tile, self.spec.bias_vectors)
            bias = SharedBias(staged, ring(BIAS_STAGES), ring(tile.kv_stages))
        return Shared(
            q,
            tiles(operands.k, kv),
            tiles(operands.v, kv),
            out,
            table(2),
            table(tile.query_tiles),
            TileMailbox(slots, ring(MAILBOX_STAGES), readers=self.mailbox_readers),
            ring(tile.kv_stages),
            smem.allocate_array(cutlass.Int64, Shared.WORDS_OF_TILE * tile.query_tiles),
            tile.score_buffers,
            bias,
        )

    def _scheduler(self, smem: SmemAllocator, tensors: ForwardTensors, scalars: ForwardScalars):
        if self.spec.clc:
            return ClcScheduler(smem.allocate_array(Int32, 4, byte_alignment=16), smem.allocate_array(cutlass.Int64, 1))
        return TileScheduler(tensors.semaphore, scalars.short_from)

    # What every role derives from a work tile --------------------------------------------------------------------

    def _first_token(self, work: WorkTile, index) -> Int32:
        """Of query tile `index` of a work tile, in the sequence."""
        return work.m_block * self.spec.tokens_per_tile + index * self.tokens_per_query_tile

    def _range(self, index, work: WorkTile, seqlens: Seqlens, window: Window) -> KvRange:
        """KV tiles that query tile `index` of a work tile sees, or their entries (forward_spec.kv_range)."""
        if self.spec.skips:
            return KvRange.of_index(work.entries, index)
        tokens, tile_n = self.tokens_per_query_tile, self.spec.tile.tile_n
        visible = KvRange.of_query_tile(seqlens, window, self._first_token(work, index), tokens, tile_n)
        return visible.within(work.part) if self.spec.splits else visible

    @cute.jit
    def _ranges(self, work: WorkTile, seqlens: Seqlens, window: Window) -> Ranges:
        of = tuple(self._range(i, work, seqlens, window) for i in range(self.query_tiles))
        first, end = Int32(1 << 30), Int32(0)
        for kv in of:
            if kv.num_tiles() > 0:
                first, end = cutlass.min(first, kv.first), cutlass.max(end, kv.end)
        return Ranges(of, first, end)

    # Loading -----------------------------------------------------------------------------------------------------

    @cute.jit
    def load(
        self,
        operands: Operands,
        shared: Shared,
        window: Window,
        tensors: ForwardTensors,
        scalars: ForwardScalars,
    ):
        """The loading warp: queries, then keys and values in the order in which `multiply` takes them."""
        spec = self.spec
        tile_position = kv_position = MbarrierRing.start()
        q_positions = tuple(MbarrierRing.start() for _ in range(self.query_tiles))
        work, seqlens = shared.mailbox.receive(tile_position)
        while work.is_work():
            ranges = self._ranges(work, seqlens, window)
            keys = self._key_loader(operands.k, self.k_box, shared.k, 1, shared, work, seqlens, tensors, scalars)
            v_pieces = self.spec.tile.v_pieces
            values = self._key_loader(
                operands.v, self.v_box, shared.v, v_pieces, shared, work, seqlens, tensors, scalars
            )
            q_positions = self._load_queries(operands.q, shared, ranges, work, seqlens, q_positions, tensors)
            # V of a KV tile is loaded with K of the one before it, and where that is is looked up one step earlier.
            previous = tile = keys.find(kv_tile(spec, tensors, ranges.end - 1))
            for i in cutlass.range(ranges.end - ranges.first + 1, unroll=1):
                key_tile = ranges.end - 1 - i
                following = keys.find(kv_tile(spec, tensors, key_tile - 1, ranges.first))
                if const_expr(self.alternates):
                    kv_position = self._load_values(values, kv_position, previous, key_tile + 1 < ranges.end)
                    kv_position = self._load_keys(keys, kv_position, tile, key_tile >= ranges.first)
                else:
                    kv_position = self._load_keys(keys, kv_position, tile, key_tile >= ranges.first)
                    kv_position = self._load_values(values, kv_position, previous, key_tile + 1 < ranges.end)
                previous, tile = tile, following
            tile_position = tile_position.next()
            work, seqlens = shared.mailbox.receive(tile_position)

    def _key_loader(
        self,
        operand: Operand,
        box,
        stages: cute.Tensor,
        row_pieces: int,
        shared: Shared,
        work: WorkTile,
        seqlens: Seqlens,
        tensors: ForwardTensors,
        scalars: ForwardScalars,
    ):
        """What loads keys or values of a work tile, in the way in which they lie in memory."""
        spec, tile_n, ring = self.spec, self.spec.tile.tile_n, shared.kv_ring
        head = work.head if spec.packed else work.head // spec.qheads_per_kvhead
        if tensors.page_table is None:
            row = cache_row(tensors, work.batch)
            rows = ragged_tma.key_rows(
                operand.source, seqlens, row, head, packed=tensors.packed_k, ragged=tensors.ragged_k
            )
            no_rows = None
            if operand.whole is not None:
                atom, source = operand.whole
                view = source[None, None, 0] if tensors.packed_k else source[None, None, 0, 0]
                no_rows = ragged_tma.NoRows.create(atom, view, box, stages, seqlens.len_k)
            return ragged_tma.TileLoader.create(
                operand.atom, rows, box, stages, ring, row_pieces=row_pieces, no_rows=no_rows
            )
        table = page_table(spec, tensors, scalars, seqlens, work.batch)
        if spec.gathers:
            return RowGatherer.create(operand.source, head, stages, ring, table, tile_n, Int32(0), 1, GATHER_UNROLL)
        return PagedTileLoader.create(operand.source, head, box, stages, ring, table, tile_n, False)

    @cute.jit
    def _load_queries(
        self,
        q: Operand,
        shared: Shared,
        ranges: Ranges,
        work: WorkTile,
        seqlens: Seqlens,
        positions: tuple,
        tensors: ForwardTensors,
    ):
        spec = self.spec
        head = work.head * spec.qheads_per_kvhead if const_expr(spec.packed) else work.head
        advanced = []
        for i in cutlass.range_constexpr(self.query_tiles):
            position = positions[i]
            if ranges.of[i].num_tiles() > 0:
                rows = ragged_tma.query_rows(
                    q.source, seqlens, work.batch, head, self._first_token(work, i), ragged=tensors.packed_q
                )
                loader = ragged_tma.TileLoader.create(
                    q.atom, rows, self.q_box, shared.q, shared.q_ring(i), first_stage=i
                )
                loader.load(position, 0)
                position = position.next()
            advanced.append(position)
        return tuple(advanced)

    @cute.jit
    def _load_keys(self, loader, position: RingPosition, tile, is_seen):
        if is_seen:
            for piece in cutlass.range(self.spec.tile.k_pieces, unroll=1):
                loader.load(position, tile, column_piece=piece)
                position = position.next()
        return position

    @cute.jit
    def _load_values(self, loader, position: RingPosition, tile, is_seen):
        if is_seen:
            for piece in cutlass.range(self.spec.tile.v_pieces, unroll=1):
                loader.load(position, tile, row_piece=piece)
                position = position.next()
        return position

    # Staging a key-side bias -------------------------------------------------------------------------------------

    @cute.jit
    def stage_bias(
        self,
        shared: Shared,
        window: Window,
        tensors: ForwardTensors,
        scalars: ForwardScalars,
        warp: Int32,
    ):
        """A warp that turns masks and biases of keys into what softmax adds, and clears hidden values, KV tile by KV
        tile. `warp` numbers those that do."""
        tile_position = position = MbarrierRing.start()
        source = KeySide(tensors.key_mask, tensors.key_bias, scalars.bias_factor)
        staged, ring = shared.bias.staged, shared.bias.ring
        stager = KeyBiasStager(
            self.spec.key_side,
            source,
            staged,
            ring,
            warp,
            WARPS,
            tells=False,
            at_once=STAGED_AT_ONCE,
            ahead=0,
        )
        work, seqlens = shared.mailbox.receive(tile_position)
        while work.is_work():
            ranges = self._ranges(work, seqlens, window)
            place = key_side_place(self.spec, tensors, scalars, work, seqlens)
            # What was found of a KV tile is found again when it is staged: there are no registers to keep it.
            stager.read(stager.find(kv_tile(self.spec, tensors, ranges.end - 2, ranges.first), place), place)
            stager.stage(position, Given(stager.find(kv_tile(self.spec, tensors, ranges.end - 1), place)), place)
            for key_tile in cutlass.range(ranges.end - 2, ranges.first - 1, -1, unroll=1):
                stager.read(stager.find(kv_tile(self.spec, tensors, key_tile - 1, ranges.first), place), place)
                found = stager.find(kv_tile(self.spec, tensors, key_tile), place)
                stager.stage(position.next(), Given(found), place)
                self._clear_values(stager, shared, position, is_last=False)
                position = position.next()
            self._clear_values(stager, shared, position, is_last=True)
            position = position.next()
            tile_position = tile_position.next()
            work, seqlens = shared.mailbox.receive(tile_position)

    @cute.jit
    def _clear_values(self, stager: KeyBiasStager, shared: Shared, position: RingPosition, is_last: cutlass.Constexpr):
        """Clears the hidden values of the KV tile at `position`, the last of a work tile or not.

        A barrier's parity only tells its last phase from the one before. So before waiting for values, what was loaded
        into their stages before has to be known to have arrived. That are keys of the KV tile before at the latest, or
        with one query tile those of the same.
        """
        tile = self.spec.tile
        if const_expr(self.alternates):
            if const_expr(is_last):
                # Elsewhere staging the next KV tile has waited for this: the scores of that one have been read.
                if position.count > 0:
                    shared.bias.ring.wait_released(RingPosition(position.count - 1))
        else:
            shared.score_ring(0).wait_full(position)
        # Keys of the next KV tile lie before these values where there is one query tile.
        k_tiles = position.count + (1 if self.alternates or is_last else 2)
        first_piece = RingPosition(k_tiles * tile.k_pieces + position.count * tile.v_pieces)
        stager.clear_hidden_values(position, shared.v, shared.kv_ring, first_piece, shared.bias.cleared)

    # Multiplying -------------------------------------------------------------------------------------------------

    def _products(self, shared: Shared, columns: cute.Pointer) -> Products:
        tile = self.spec.tile
        q_stage = tile.query_rows * tile.head_dim
        return Products(
            SharedOperand.create(shared.q, self.q_box[1], q_stage, sums_over_rows=False),
            SharedOperand.create(shared.k, self.k_box[1], tile.stage_elements, sums_over_rows=False),
            SharedOperand.create(shared.v, self.v_box[1], tile.stage_elements, sums_over_rows=True),
            columns.toint().to(Int32),
        )

    @cute.jit
    def multiply(self, products: Products, shared: Shared, window: Window):
        """The warp that issues every product.

        With two query tiles in flight: for each of them the output product of one KV tile, then the scores of the next,
        in whose place it writes them. With one: the scores of the next KV tile, then the output product of this one.
        """
        tile = self.spec.tile
        tile_position = kv_position = MbarrierRing.start()
        q_positions = s_positions = p_positions = tuple(MbarrierRing.start() for _ in range(self.query_tiles))
        work, seqlens = shared.mailbox.receive(tile_position)
        while work.is_work():
            ranges = self._ranges(work, seqlens, window)
            for step in cutlass.range(ranges.end - ranges.first + 1, unroll=1):
                key_tile = ranges.end - 1 - step
                k_pieces = tile.k_pieces if key_tile >= ranges.first else 0
                v_pieces = tile.v_pieces if step > 0 else 0
                if const_expr(self.alternates):
                    k_position, v_position = kv_position.advanced(v_pieces), kv_position
                    for i in cutlass.range_constexpr(self.query_tiles):
                        p_positions = self._multiply_output(
                            products, shared, ranges.of[i], i, key_tile + 1, v_position, p_positions
                        )
                        if const_expr(i == self.query_tiles - 1):
                            _release_pieces(shared.kv_ring, v_position, v_pieces)
                        s_positions = self._multiply_scores(
                            products, shared, ranges.of[i], i, key_tile, k_position, q_positions, s_positions
                        )
                    _release_pieces(shared.kv_ring, k_position, k_pieces)
                else:
                    k_position, v_position = kv_position, kv_position.advanced(k_pieces)
                    s_positions = self._multiply_scores(
                        products, shared, ranges.of[0], 0, key_tile, k_position, q_positions, s_positions
                    )
                    _release_pieces(shared.kv_ring, k_position, k_pieces)
                    p_positions = self._multiply_output(
                        products, shared, ranges.of[0], 0, key_tile + 1, v_position, p_positions
                    )
                    _release_pieces(shared.kv_ring, v_position, v_pieces)
                kv_position = kv_position.advanced(k_pieces + v_pieces)
            q_positions = _advance_where(q_positions, ranges)
            tile_position = tile_position.next()
            work, seqlens = shared.mailbox.receive(tile_position)

    @cute.jit
    def _wait_keys(self, shared: Shared, position: RingPosition):
        """Until a stage of keys or values is there, for the tensor cores to read."""
        shared.kv_ring.wait_full(position)
        if const_expr(self.spec.gathers):
            # cp.async wrote it through the generic proxy.
            cute.arch.fence_proxy("async.shared", space="cta")

    @cute.jit
    def _wait_cleared(self, shared: Shared, v_position: RingPosition):
        """Until the values of a KV tile, whose pieces begin at `v_position`, are there and hidden ones cleared."""
        tile = self.spec.tile
        # One or two K tiles more than V tiles lie before these.
        v_tiles = (v_position.count - tile.k_pieces) // (tile.k_pieces + tile.v_pieces)
        shared.bias.cleared.wait_full(RingPosition(v_tiles))
        if const_expr(self.spec.gathers):
            cute.arch.fence_proxy("async.shared", space="cta")

    @cute.jit
    def _multiply_scores(
        self,
        products: Products,
        shared: Shared,
        kv: KvRange,
        i: cutlass.Constexpr,
        key_tile: Int32,
        k_position: RingPosition,
        q_positions: tuple,
        s_positions: tuple,
    ):
        """Scores of one query tile with one KV tile, if it sees that."""
        tile = self.spec.tile
        q, scores, position = shared.q_ring(i), shared.score_ring(i), s_positions[i]
        if key_tile >= kv.first and key_tile < kv.end:
            if key_tile == kv.end - 1:
                q.wait_full(q_positions[i])
            s = products.columns + (i + scores.stage(position)) * tile.tile_n
            for piece in cutlass.range(tile.k_pieces, unroll=1):
                self._wait_keys(shared, k_position.advanced(piece))
                a = products.q.at(Int32(i), piece * products.k.steps)
                b = products.k.at(shared.kv_ring.stage(k_position.advanced(piece)))
                umma.issue(self.s_product, s, a, products.q.step, b, products.k.step, products.k.steps, piece > 0)
            umma.commit(scores.full_barrier(position))
            if const_expr(not tile.output_over_queries):
                if key_tile == kv.first:
                    umma.commit(q.empty_barrier(q_positions[i]))
            position = position.next()
        return _replaced(s_positions, i, position)

    @cute.jit
    def _multiply_output(
        self,
        products: Products,
        shared: Shared,
        kv: KvRange,
        i: cutlass.Constexpr,
        key_tile: Int32,
        v_position: RingPosition,
        p_positions: tuple,
    ):
        """The product of probabilities and values of one KV tile, if the query tile sees that."""
        tile = self.spec.tile
        scores, position = shared.score_ring(i), p_positions[i]
        if key_tile >= kv.first and key_tile < kv.end:
            scores.wait_released(position)
            # Also for the next scores in this place: products of a thread keep their order.
            tensor_memory.fence_after_wait()
            # Probabilities are in the place of the scores that they come from, two a column.
            p = products.columns + (i + scores.stage(position)) * tile.tile_n
            o = products.columns + tile.output_column + i * tile.head_dim_v
            if const_expr(shared.bias is not None):
                self._wait_cleared(shared, v_position)
            for piece in cutlass.range(tile.v_pieces, unroll=1):
                if const_expr(shared.bias is None):
                    self._wait_keys(shared, v_position.advanced(piece))
                a = p + piece * (tile.v_rows // 2)
                b = products.v.at(shared.kv_ring.stage(v_position.advanced(piece)))
                accumulate = key_tile < kv.end - 1 or piece > 0
                umma.issue(self.o_product, o, a, _p_step, b, products.v.step, products.v.steps, accumulate)
            if const_expr(self.alternates):
                if key_tile == kv.first:
                    umma.commit(shared.product_ring(i).full_barrier(position))
            else:
                umma.commit(shared.product_ring(i).full_barrier(position))
            position = position.next()
        return _replaced(p_positions, i, position)

    # Softmax -----------------------------------------------------------------------------------------------------

    @cute.jit
    def softmax(
        self,
        shared: Shared,
        columns: cute.Pointer,
        window: Window,
        tensors: ForwardTensors,
        scalars: ForwardScalars,
    ):
        """A softmax warpgroup: turns the scores of one query tile into probabilities, a row a thread."""
        spec, tile = self.spec, self.spec.tile
        thread = cute.arch.thread_idx()[0] % WARPGROUP
        index = cute.arch.make_warp_uniform(cute.arch.warp_idx()) // WARPS
        scale, cap = scalars.softmax_scale, None
        if const_expr(spec.softcap):
            scale, cap = scalars.softcap, scalars.softmax_scale / scalars.softcap
        row_in_tile, normalising = index * tile.query_rows + thread, shared.normalising
        bias = None
        if const_expr(shared.bias is not None):
            bias = BiasOfRows.of_row(spec, row_in_tile, shared.bias.staged, shared.bias.ring)
        row = RowOfScores(
            index,
            Row.of_thread(columns, thread),
            RowSoftmax.create(scale * LOG2_E, tile.polynomial_pairs),
            cute.make_rmem_tensor(tile.tile_n, Float32),
            cap,
            bias,
        )
        tile_position = position = done = bias_position = MbarrierRing.start()
        work, seqlens = shared.mailbox.receive(tile_position)
        while work.is_work():
            kv = self._range(index, work, seqlens, window)
            if const_expr(row.bias is not None):
                ranges = self._ranges(work, seqlens, window)
                first_seen = kv.end if kv.num_tiles() > 0 else ranges.first
                bias_position = _pass_biases(row.bias, bias_position, ranges.end - first_seen)
            if kv.num_tiles() > 0:
                row.softmax.reset()
                place = RowPlace.of(spec, work, seqlens, row_in_tile)
                limits = RowLimits.of_row(seqlens, window, token_of_row(spec, work, row_in_tile), Int32(0))
                of_queries = None
                if const_expr(spec.query_side is not None):
                    source = QuerySide(tensors.query_mask, tensors.query_bias, scalars.bias_factor)
                    of_queries = BiasOfQueries.of_row(spec, work, row_in_tile, seqlens, source)
                for step in cutlass.range(kv.num_tiles(), unroll=1):
                    self._softmax_step(row, shared, kv, limits, of_queries, step, position, bias_position, tensors)
                    position = position.next()
                    if const_expr(row.bias is not None):
                        bias_position = bias_position.next()
                factor, share, lse = self._totals(row.softmax, work, place, tensors)
                if const_expr(not tile.output_over_queries):
                    shared.factor_ring(index).wait_empty(done)
                normalising[thread, index] = factor
                if const_expr(tensors.sink is not None):
                    self._send_share(row, shared, share, position)
                shared.factor_ring(index).fill(done)
                done = done.next()
                self._store_lse(work, place, row_in_tile, lse, tensors)
                if const_expr(row.bias is not None):
                    bias_position = _pass_biases(row.bias, bias_position, kv.first - ranges.first)
            tile_position = tile_position.next()
            work, seqlens = shared.mailbox.receive(tile_position)

    @cute.jit
    def _totals(self, softmax: RowSoftmax, work: WorkTile, place: RowPlace, tensors: ForwardTensors):
        """`normalise` for a row that has seen all the keys that this work tile has for it."""
        sink = None
        if const_expr(tensors.sink is not None):
            # Counts once a row: splits leave it to the combine kernel.
            sink = -Float32.inf
            if place.is_row and work.num_splits == 1:
                sink = tensors.sink[place.head].to(Float32)
        factor, share, lse = normalise(softmax.row_max[0], softmax.row_sum[0], softmax.scale_log2, sink)
        factor, lse = (factor, lse) if place.is_query else (Float32(0.0), -Float32.inf)
        return factor, share, lse

    @cute.jit
    def _send_share(self, row: RowOfScores, shared: Shared, share: Float32, position: RingPosition):
        """In the place of a factor for the buffer of the next scores, at `position`: shared memory has no room for it.

        Correction read the last factor there before it released the last scores. It releases the next scores when it
        is through with this work tile, and the next factor there comes behind that.
        """
        scores = shared.score_ring(row.index)
        scores.wait_released(RingPosition(position.count - 1))
        shared.rescaling[row.memory.thread, row.index + scores.stage(position)] = share

    @cute.jit
    def _store_lse(self, work: WorkTile, place: RowPlace, row: Int32, lse: Float32, tensors: ForwardTensors):
        if const_expr(self.spec.splits):
            if work.num_splits > 1:
                tensors.lse_partial[work.slot, row] = lse
            elif place.is_row:
                store_lse(tensors.lse, place, lse)
        else:
            if place.is_row:
                store_lse(tensors.lse, place, lse)

    @cute.jit
    def _softmax_step(
        self,
        row: RowOfScores,
        shared: Shared,
        kv: KvRange,
        limits: RowLimits,
        of_queries: BiasOfQueries | None,
        step: Int32,
        position: RingPosition,
        bias_position: RingPosition,
        tensors: ForwardTensors,
    ):
        """Scores in tensor memory to probabilities in their place."""
        spec, tile = self.spec, self.spec.tile
        key_tile = kv.end - 1 - step
        scores, rescaling = shared.score_ring(row.index), shared.rescaling
        buffer = row.index + scores.stage(position)
        column = buffer * tile.tile_n
        s = row.scores
        # For every KV tile, though few are masked: behind the scores there is no register left for an address.
        number = kv_tile(spec, tensors, key_tile)
        scores.wait_full(position)
        tensor_memory.fence_after_wait()
        self._load_scores(row, column, bias_position, of_queries, number)
        # One copy of all the rest for masked tiles and others: they cannot differ in their arithmetic.
        if key_tile >= kv.full_end or key_tile < kv.full_first:
            mask_row(s, limits, number, tile.tile_n)
        factor, offset = row.softmax.raise_max(s)
        if step > 0:
            rescaling[row.memory.thread, buffer] = factor
            if const_expr(self.alternates):
                # These scores came after the last output product: who hears of them may read the output.
                tensor_memory.fence_before_arrival()
            cute.arch.barrier_arrive(barrier_id=_factors_barrier(buffer, row.memory.thread), number_of_threads=2 * WARP)
        sums = ()
        for first in cutlass.range_constexpr(0, tile.tile_n, tensor_memory.STEP):
            block = cute.make_tensor(s.iterator + first, cute.make_layout(tensor_memory.STEP))
            sums = row.softmax.exponentiate(block, offset, sums)
            row.memory.store(column + first // 2, packed.rounded(block, spec.dtype))
        tensor_memory.wait_stored()
        tensor_memory.fence_before_arrival()
        scores.release_converged(position)
        row.softmax.add(sums, factor)

    @cute.jit
    def _load_scores(
        self,
        row: RowOfScores,
        column: Int32,
        bias_position: RingPosition,
        of_queries: BiasOfQueries | None,
        number: Int32,
    ):
        """A row of scores from tensor memory to registers, under the soft cap and with its biases."""
        tile_n, s = self.spec.tile.tile_n, row.scores
        columns = tile_n
        if const_expr(row.bias is not None or of_queries is not None):
            # In halves: biases of all columns at once would take more registers than there are.
            columns = tile_n // 2
        if const_expr(row.bias is not None):
            row.bias.ring.wait_full(bias_position)
        for first in cutlass.range_constexpr(0, tile_n, columns):
            part = cute.make_tensor(s.iterator + first, cute.make_layout(columns))
            row.memory.load(column + first, part)
            if const_expr(row.cap is not None):
                for i in cutlass.range_constexpr(columns):
                    part[i] = tanh(part[i] * row.cap)
            if const_expr(row.bias is not None):
                row.bias.add_from(part, bias_position, first)
            if const_expr(of_queries is not None):
                of_queries.add(part, number, first)
        if const_expr(row.bias is not None):
            row.bias.ring.release(bias_position)

    # Correction --------------------------------------------------------------------------------------------------

    @cute.jit
    def correct(
        self,
        shared: Shared,
        columns: cute.Pointer,
        window: Window,
        tensors: ForwardTensors,
    ):
        """The correction warpgroup: rescales outputs where a maximum moved, and stages the finished ones.

        Its arrival on a query tile's first scores also says that its output has been read and may be overwritten.
        """
        spec, tile = self.spec, self.spec.tile
        thread = cute.arch.thread_idx()[0] % WARPGROUP
        memory = Row.of_thread(columns, thread, self.correction_step)
        tile_position = MbarrierRing.start()
        positions = done = tuple(MbarrierRing.start() for _ in range(self.query_tiles))
        work, seqlens = shared.mailbox.receive(tile_position)
        while work.is_work():
            ranges = self._ranges(work, seqlens, window)
            for step in cutlass.range(ranges.end - ranges.first, unroll=1):
                key_tile = ranges.end - 1 - step
                for i in cutlass.range_constexpr(self.query_tiles):
                    positions = self._rescale(shared, memory, ranges.of[i], i, key_tile, positions)
            for i in cutlass.range_constexpr(self.query_tiles):
                place = RowPlace.of(spec, work, seqlens, i * tile.query_rows + thread)
                if ranges.of[i].num_tiles() > 0:
                    self._finish(shared, memory, i, work, place, positions[i], done[i], tensors)
                elif work.num_splits == 1:
                    clear_row(place, tensors)
                else:
                    self._store_lse(work, place, i * tile.query_rows + thread, -Float32.inf, tensors)
            done = _advance_where(done, ranges)
            tile_position = tile_position.next()
            work, seqlens = shared.mailbox.receive(tile_position)

    @cute.jit
    def _rescale(
        self,
        shared: Shared,
        memory: Row,
        kv: KvRange,
        i: cutlass.Constexpr,
        key_tile: Int32,
        positions: tuple,
    ):
        tile = self.spec.tile
        position = positions[i]
        scores = shared.score_ring(i)
        if key_tile >= kv.first and key_tile < kv.end:
            if key_tile < kv.end - 1:
                buffer = i + scores.stage(position)
                cute.arch.barrier(barrier_id=_factors_barrier(buffer, memory.thread), number_of_threads=2 * WARP)
                factor = shared.rescaling[memory.thread, buffer]
                if const_expr(not self.alternates):
                    # With two score buffers the scores may be ahead of the output. Waited for every time, because a
                    # barrier's parity only tells its last phase from the one before.
                    shared.product_ring(i).wait_full(RingPosition(position.count - 1))
                if cute.arch.vote_any_sync(factor != 1.0):
                    tensor_memory.fence_after_wait()
                    start = tile.output_column + i * tile.head_dim_v
                    accumulator_rows.rescale(memory, start, tile.head_dim_v, factor)
            tensor_memory.fence_before_arrival()
            scores.release_converged(position)  # a vote or a wait of all lanes is behind them
            position = position.next()
        return _replaced(positions, i, position)

    @cute.jit
    def _finish(
        self,
        shared: Shared,
        memory: Row,
        i: cutlass.Constexpr,
        work: WorkTile,
        place: RowPlace,
        position: RingPosition,
        done: RingPosition,
        tensors: ForwardTensors,
    ):
        """Normalises the output of a query tile into its stage, or that of a split into the workspace."""
        tile = self.spec.tile
        factors, output = shared.factor_ring(i), shared.output_ring(i)
        factors.wait_full(done)
        factor, share = shared.normalising[memory.thread, i], None
        if const_expr(tensors.sink is not None):
            share = shared.rescaling[memory.thread, i + shared.score_ring(i).stage(position)]
        shared.product_ring(i).wait_full(done if const_expr(self.alternates) else RingPosition(position.count - 1))
        tensor_memory.fence_after_wait()
        if const_expr(not tile.output_over_queries):
            output.wait_empty(done)
        start = tile.output_column + i * tile.head_dim_v
        if const_expr(self.spec.splits):
            if work.num_splits == 1:
                accumulator_rows.stage(memory, start, shared.out[memory.thread, None, i], factor, share)
            else:
                row = tensors.partial[work.slot, i * tile.query_rows + memory.thread, None]
                is_read = place.is_row and place.is_query
                accumulator_rows.write_partial(memory, start, tile.head_dim_v, row, is_read, factor)
        else:
            accumulator_rows.stage(memory, start, shared.out[memory.thread, None, i], factor, share)
        output.fill(done)
        if const_expr(not tile.output_over_queries):
            factors.release_converged(done)

    # Storing -----------------------------------------------------------------------------------------------------

    @cute.jit
    def store(self, out: Operand, shared: Shared, window: Window, tensors: ForwardTensors):
        """The storing warp: staged outputs to global memory."""
        spec = self.spec
        tile_position = MbarrierRing.start()
        done = tuple(MbarrierRing.start() for _ in range(self.query_tiles))
        work, seqlens = shared.mailbox.receive(tile_position)
        while work.is_work():
            ranges = self._ranges(work, seqlens, window)
            for i in cutlass.range_constexpr(self.query_tiles):
                if ranges.of[i].num_tiles() > 0:
                    shared.output_ring(i).wait_full(done[i])
                    if work.num_splits == 1:  # others have nothing staged
                        self._store_staged(out, shared, work, seqlens, i, tensors)
                    if const_expr(spec.tile.output_over_queries):
                        shared.q_ring(i).release(done[i])
                    else:
                        shared.output_ring(i).release(done[i])
            done = _advance_where(done, ranges)
            tile_position = tile_position.next()
            work, seqlens = shared.mailbox.receive(tile_position)

    @cute.jit
    def _store_staged(
        self,
        out: Operand,
        shared: Shared,
        work: WorkTile,
        seqlens: Seqlens,
        i: cutlass.Constexpr,
        tensors: ForwardTensors,
    ):
        if const_expr(self.stores_boxes):
            self._store_boxes(out, shared, work, seqlens, i, tensors)
        else:
            first_row = i * self.spec.tile.query_rows
            copy_rows(self.spec, work, seqlens, first_row, shared.out[None, None, i], tensors)

    @cute.jit
    def _store_boxes(
        self,
        out: Operand,
        shared: Shared,
        work: WorkTile,
        seqlens: Seqlens,
        i: cutlass.Constexpr,
        tensors: ForwardTensors,
    ):
        """One query tile by TMA, which stops at the sequence's last row as the loads do."""
        spec, tile = self.spec, self.spec.tile
        head = work.head * spec.qheads_per_kvhead if const_expr(spec.packed) else work.head
        rows = ragged_tma.output_rows(
            out.source, seqlens, work.batch, head, self._first_token(work, i), ragged=tensors.packed_q
        )
        tiles = cute.local_tile(rows, self.out_box, (None, None))
        boxes = cute.flat_divide(shared.out, (tile.query_rows, self.out_box[1]))
        source, target = cpasync.tma_partition(
            out.atom, 0, cute.make_layout(1), cute.group_modes(boxes, 0, 2), cute.group_modes(tiles, 0, 2)
        )
        for column in cutlass.range(cute.size(source, mode=[2]), unroll=1):
            cute.copy(out.atom, source[None, 0, column, i], target[None, 0, column])
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)


def _box_layout(smem_layout: cute.ComposedLayout, box):
    """Of the first box of a stage."""
    stage = cute.select(smem_layout, mode=[0, 1])
    return cute.select(cute.flat_divide(stage, (cute.size(box[0]), box[1])), mode=[0, 1])


def _factors_barrier(buffer: Int32, thread: Int32) -> Int32:
    """The named barrier of one softmax warp and the correction warp of the same rows. 0 is __syncthreads."""
    return 1 + WARPS * buffer + cute.arch.make_warp_uniform(thread // WARP)


def _p_step(index: int) -> int:
    """Columns of tensor memory from the first step of a product's probabilities to another."""
    return index * umma.STEP // 2


@cute.jit
def _release_pieces(ring: MbarrierRing, first: RingPosition, count: Int32):
    """Gives stages back when the products issued so far are complete."""
    for piece in cutlass.range(count, unroll=1):
        umma.commit(ring.empty_barrier(first.advanced(piece)))


@cute.jit
def _pass_biases(bias: BiasOfRows, first: RingPosition, count: Int32) -> RingPosition:
    """Past KV tiles that another query tile of the work tile sees."""
    for i in cutlass.range(count, unroll=1):
        bias.pass_by(first.advanced(i))
    return first.advanced(count)


def _replaced(positions: tuple, index: int, position: RingPosition) -> tuple:
    return tuple(position if i == index else old for i, old in enumerate(positions))


@cute.jit
def _advance_where(positions: tuple, ranges: Ranges) -> tuple:
    """The next position of each query tile that saw a KV tile."""
    advanced = []
    for position, kv in zip(positions, ranges.of, strict=True):
        advanced.append(RingPosition(position.count + (1 if kv.num_tiles() > 0 else 0)))
    return tuple(advanced)
