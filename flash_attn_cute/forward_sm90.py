"""Attention forward on Hopper (SM90).

One persistent CTA a SM: a producer warpgroup (one warp loads with TMA, one decides what is next) and two or three
consumer warpgroups that hold 64 query rows each. A consumer issues the scores of one KV tile before the output product
of the tile before it, so that softmax runs while the tensor cores work, and the consumers take turns issuing, so that
one's softmax falls into another's products (the ping-pong of FlashAttention-3, Shah et al., 2024).
See csrc_notes/forward_sm90.md for the pipeline, the barriers and what was measured.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from flash_attn_cute.device import ragged_tma, wgmma
from flash_attn_cute.device.dependent_launch import let_dependents_start, wait_for_prerequisites
from flash_attn_cute.device.key_bias import CLEARS, BiasOfRows, KeyBiasStager, KeySide, allocate_staged, told_of
from flash_attn_cute.device.kv_range import KvRange, Window
from flash_attn_cute.device.masking import RowLimits, mask_scores
from flash_attn_cute.device.output_rows import ROW_STEP, OutputRows
from flash_attn_cute.device.paged_kv import PageCopies, PagedTileLoader, RowGatherer
from flash_attn_cute.device.pipelines import MbarrierRing, RingPosition
from flash_attn_cute.device.query_bias import BiasOfQueries, QuerySide
from flash_attn_cute.device.scheduling_warp import prefetch_lengths, schedule
from flash_attn_cute.device.seqlens import Seqlens, SeqlenSource
from flash_attn_cute.device.softmax import LOG2_E, OnlineSoftmax, tanh
from flash_attn_cute.forward_spec import (
    ForwardScalars,
    ForwardSpec,
    ForwardTensors,
    cache_row,
    key_side_place,
    kv_range,
    kv_tile,
    page_table,
    seqlen_source,
    tile_order,
    window_of,
)
from flash_attn_cute.tile_scheduler import (
    LONG_TILE_KEYS,
    MAILBOX_STAGES,
    TileMailbox,
    TileScheduler,
    WorkTile,
    mailbox_words,
)
from flash_attn_cute.tuning import BIAS_STAGES

WARP, WARPGROUP = 32, 128
LOAD_WARP, SCHEDULE_WARP = 0, 1
# The producer's other two warps gather keys, or stage a key-side bias, where either is asked for. With both, the
# loading warp, which then loads queries alone, stages the bias.
FIRST_SPARE_WARP, SPARE_WARPS = 2, 2
# Steps of gathering at once. Decodes wait for nothing else: one at a time they took 735 us, eight at a time 485
# (csrc_notes/paged_kv.md). Beside more than one consumer a gathering warp has registers for fewer.
GATHER_UNROLL_OF_FEW_ROWS, GATHER_UNROLL = 8, 4
# Numbers of masks and biases that a staging lane reads at once, and that it holds from tile to tile, by consumers: it
# has 96, 40 or 32 registers.
STAGED_AT_ONCE, STAGED_AHEAD = {1: 8, 2: 4, 3: 2}, {1: 32, 2: 0, 3: 0}
# KV tiles of a CTA's first work tile that are on their way before the merge, or what else comes next, may start: its
# CTAs take their place beside ours, and that of ours as they leave. Both kernels begin with instructions that come from
# memory, one after the other: beside those of a merge, a decode found its first tile 0.5 us later
# (csrc_notes/scheduling.md).
LOADED_BEFORE_DEPENDENTS = 2
# Named barrier 0 is __syncthreads; consumer warpgroup i waits for its turn on FIRST_TURN + i.
FIRST_TURN = 1


class Operand(NamedTuple):
    """One operand: the TMA copy, its coordinate tensor, and where it lands.

    Of paged keys there is no copy here: source is the copies of pages, or the tensor itself where rows are gathered.
    """

    atom: cute.CopyAtom | None
    source: cute.Tensor | PageCopies
    smem_layout: cute.ComposedLayout


class Operands(NamedTuple):
    q: Operand
    k: Operand
    v: Operand


class Stages(NamedTuple):
    """Shared memory: (rows, columns, stages) of each operand."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    bias: cute.Tensor | None = None  # (tile_n, vectors, stages) float32


@dataclass(frozen=True)
class Consumer:
    """What one thread of a consumer warpgroup holds for a whole launch."""

    warpgroup: Int32
    thread: Int32  # within the warpgroup
    s_mma: cute.TiledMma
    o_mma: cute.TiledMma
    q: cute.Tensor  # fragments (descriptors) over all stages
    k: cute.Tensor
    v: cute.Tensor
    s: cute.Tensor  # registers, as are p and o
    p: cute.Tensor
    o: cute.Tensor
    softmax: OnlineSoftmax
    rows: int  # how many of the two rows that a thread holds are computed
    told: cute.Tensor | None  # beside a bias: what each staging warp tells of the KV tile whose values come next
    clearings: cute.Tensor | None  # likewise: how often it has cleared values so far


class Biases(NamedTuple):
    """What a consumer thread adds to its scores, if anything."""

    of_keys: BiasOfRows | None
    of_queries: BiasOfQueries | None


@dataclass(frozen=True)
class Rings:
    """What warps meet on: stages of Q, K and V, and the tiles to work on."""

    q: MbarrierRing
    k: MbarrierRing
    v: MbarrierRing
    bias: MbarrierRing | None
    cleared: tuple  # of each staging warp; full: once more hidden values have been cleared; nobody releases
    tiles: TileMailbox


class Launch(NamedTuple):
    """What every role of a CTA works with."""

    stages: Stages
    rings: Rings
    window: Window
    tensors: ForwardTensors
    scalars: ForwardScalars


class ForwardSm90:
    """Compile with `cute.compile(ForwardSm90(spec), ForwardTensors, ForwardScalars, stream)`."""

    def __init__(self, spec: ForwardSpec):
        self.spec = spec
        tile = spec.tile
        self.threads = WARPGROUP * (tile.consumers + 1)
        self.consumer_warps = 4 * tile.consumers
        self.bias_warps = 0 if spec.key_side is None else 1 if spec.gathers else SPARE_WARPS
        self.loading_warps = 1 + SPARE_WARPS if spec.gathers or self.bias_warps else 1
        # Turns pay where softmax is a large part of a step. With wide heads the products dominate, and warpgroups that
        # issue whenever they can keep the tensor cores busier.
        self.take_turns = tile.consumers > 1 and tile.head_dim <= 128
        # CTAs of the merge wait on the same SMs where there are registers for them (`Sm90Tile.launch_bound`).
        merges_beside = spec.splits and tile.leaves_room_for_merge
        bias_vectors = 0 if spec.key_side is None else spec.bias_vectors
        self.launch_smem = tile.smem_beside_merge(bias_vectors) if merges_beside else None
        # Whether a work tile's first KV tiles are looked up before the last values of the one before are waited for.
        # Loading warps beside more than one consumer have no registers for what is found.
        self.finds_early = tile.consumers == 1 and (spec.gathers or spec.page_span > 0 or spec.skips)
        # A wide output takes long to rescale: do it while the scores of the next tile are being computed.
        self.rescale_late = tile.head_dim_v > 128

    # ---------------------------------------------------------------------------------------------------------------
    # Host side: descriptors, layouts, launch
    # ---------------------------------------------------------------------------------------------------------------

    @cute.jit
    def __call__(self, tensors: ForwardTensors, scalars: ForwardScalars, stream: cuda.CUstream):
        spec, tile = self.spec, self.spec.tile
        s_mma, o_mma = self._tiled_mmas()
        q_layout = self._smem_layout(tile.tile_m, tile.head_dim, tile.q_stages)
        k_layout = self._smem_layout(tile.tile_n, tile.head_dim, tile.kv_stages)
        v_layout = self._smem_layout(tile.tile_n, tile.head_dim_v, tile.kv_stages)
        q_view = ragged_tma.query_view(tensors.q, ragged=tensors.packed_q)
        operands = Operands(
            Operand(*self._tma(q_view, q_layout, spec.query_box), q_layout),
            self._key_operand(tensors.k, k_layout, tensors),
            self._key_operand(tensors.v, v_layout, tensors),
        )
        source = seqlen_source(tensors, scalars)
        self.kernel(operands, tensors, scalars, source, s_mma, o_mma).launch(
            grid=[scalars.grid, 1, 1],
            block=[self.threads, 1, 1],
            stream=stream,
            smem=self.launch_smem,
            min_blocks_per_mp=1,
            max_number_threads=[tile.launch_bound, 1, 1],
            use_pdl=True,  # see `wait_for_prerequisites`
        )

    def _key_operand(self, x: cute.Tensor, smem_layout: cute.ComposedLayout, tensors: ForwardTensors) -> Operand:
        """Keys or values. Loads stop at the last used key: rows behind it arrive as zeros, so that nothing there can
        reach a product."""
        if self.spec.gathers:
            return Operand(None, x, smem_layout)
        rows, columns = (cute.size(smem_layout, mode=[i]) for i in range(2))
        if tensors.page_table is not None:
            # A copy takes a span of a page, as wide as the swizzle: where a span ends another page goes on.
            box = (self.spec.page_span, ragged_tma.swizzled_columns(columns))
            return Operand(
                None, PageCopies.create(x, cute.select(self._smem_layout(*box, 1), mode=[0, 1]), box), smem_layout
            )
        view = ragged_tma.key_view(x, packed=tensors.packed_k, ragged=tensors.ragged_k)
        return Operand(*self._tma(view, smem_layout, (rows, columns)), smem_layout)

    def _tiled_mmas(self):
        """S = Q K^T from shared memory; O = P V with P in registers. Each warpgroup has 64 rows of both."""
        dtype, tile = self.spec.dtype, self.spec.tile
        rows = (tile.consumers, 1, 1)
        s_mma = hopper.make_trivial_tiled_mma(
            dtype, dtype, OperandMajorMode.K, OperandMajorMode.K, Float32, rows, (64, tile.tile_n)
        )
        o_mma = hopper.make_trivial_tiled_mma(
            dtype,
            dtype,
            OperandMajorMode.K,
            OperandMajorMode.MN,
            Float32,
            rows,
            (64, tile.head_dim_v),
            warpgroup.OperandSource.RMEM,
        )
        return s_mma, o_mma

    def _smem_layout(self, rows: int, columns: int, stages: int) -> cute.ComposedLayout:
        kind = hopper.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, self.spec.dtype, columns)
        atom = warpgroup.make_smem_layout_atom(kind, self.spec.dtype)
        return cute.tile_to_shape(atom, (rows, columns, stages), order=(0, 1, 2))

    @staticmethod
    def _tma(view: cute.Tensor, smem_layout: cute.ComposedLayout, box):
        stage = cute.select(smem_layout, mode=[0, 1])
        return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), view, stage, box)

    # ---------------------------------------------------------------------------------------------------------------
    # Device side
    # ---------------------------------------------------------------------------------------------------------------

    @cute.kernel
    def kernel(
        self,
        operands: Operands,
        tensors: ForwardTensors,
        scalars: ForwardScalars,
        source: SeqlenSource,
        s_mma: cute.TiledMma,
        o_mma: cute.TiledMma,
    ):
        spec = self.spec
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == LOAD_WARP:
            for operand in operands:
                if const_expr(operand.atom is not None):
                    cpasync.prefetch_descriptor(operand.atom)
        if warp == SCHEDULE_WARP:
            prefetch_lengths(tensors)
        smem = SmemAllocator()
        stages = Stages(*(self._allocate(smem, operand) for operand in operands))
        if const_expr(spec.key_side is not None):
            stages = stages._replace(bias=allocate_staged(smem, spec.tile, spec.bias_vectors))
        rings = self._rings(smem)
        if warp == LOAD_WARP:
            with cute.arch.elect_one():
                key_arrivals = WARP * SPARE_WARPS if const_expr(spec.gathers) else 1
                rings.q.init(full_arrivals=1, empty_arrivals=self.consumer_warps)
                rings.k.init(full_arrivals=key_arrivals, empty_arrivals=self.consumer_warps)
                rings.v.init(full_arrivals=key_arrivals, empty_arrivals=self.consumer_warps)
                if const_expr(spec.key_side is not None):
                    rings.bias.init(full_arrivals=self.bias_warps, empty_arrivals=self.consumer_warps)
                    for ring in rings.cleared:
                        ring.init(full_arrivals=1, empty_arrivals=1)
                rings.tiles.init()
                cute.arch.mbarrier_init_fence()
        wait_for_prerequisites()
        cute.arch.sync_threads()

        launch = Launch(stages, rings, window_of(spec, scalars), tensors, scalars)
        registers = spec.tile.registers(spec.gathers or spec.key_side is not None)
        if warp < 4:
            cute.arch.setmaxregister_decrease(registers[0])
            if warp == LOAD_WARP:
                if const_expr(not spec.gathers):
                    self.load(operands, launch, None)
                elif const_expr(spec.key_side is None):
                    self.load_queries(operands, launch)
                else:
                    self.stage_bias(operands, launch, Int32(0))
            if warp == SCHEDULE_WARP:
                order = tile_order(spec, tensors, scalars, source)
                scheduler = TileScheduler(tensors.semaphore, scalars.short_from)
                schedule(spec, order, scheduler, rings.tiles, launch.window, tensors)
            if warp >= FIRST_SPARE_WARP:
                if const_expr(spec.gathers):
                    gatherer = warp - FIRST_SPARE_WARP
                    self.load(operands, launch, gatherer)
                elif const_expr(spec.key_side is not None):
                    self.stage_bias(operands, launch, warp - FIRST_SPARE_WARP)
        else:
            cute.arch.setmaxregister_increase(registers[1])
            consumer = self._consumer(s_mma, o_mma, launch)
            self.compute(consumer, launch)

    def _allocate(self, smem: SmemAllocator, operand: Operand) -> cute.Tensor:
        layout = operand.smem_layout
        # 1024 bytes: the period of the 128-byte swizzle, which works on absolute addresses.
        return smem.allocate_tensor(self.spec.dtype, layout.outer, byte_alignment=1024, swizzle=layout.inner)

    def _rings(self, smem: SmemAllocator) -> Rings:
        tile = self.spec.tile

        def barriers(stages):
            return smem.allocate_array(cutlass.Int64, MbarrierRing.words(stages))

        readers, words = self.consumer_warps + self.loading_warps, mailbox_words(ranges=int(self.spec.skips))
        slots = smem.allocate_tensor(Int32, cute.make_layout((words, MAILBOX_STAGES)), byte_alignment=16)
        return Rings(
            MbarrierRing(barriers(tile.q_stages), tile.q_stages),
            MbarrierRing(barriers(tile.kv_stages), tile.kv_stages),
            MbarrierRing(barriers(tile.kv_stages), tile.kv_stages),
            None if self.spec.key_side is None else MbarrierRing(barriers(BIAS_STAGES), BIAS_STAGES),
            tuple(MbarrierRing(barriers(tile.kv_stages), tile.kv_stages) for _ in range(self.bias_warps)),
            TileMailbox(slots, MbarrierRing(barriers(MAILBOX_STAGES), MAILBOX_STAGES), readers),
        )

    @cute.jit
    def load(
        self,
        operands: Operands,
        launch: Launch,
        gatherer: Int32 | None,
    ):
        """A loading warp: for every tile Q, then K one KV tile ahead of V, in the order in which they are needed.

        Where keys are gathered, the warps that do so, which are numbered by `gatherer`, have K and V alone.
        """
        spec, (stages, rings, window, tensors, _) = self.spec, launch
        # The keys of a decode are what it waits for; a prefill may have to wait for room for keys, but not for queries.
        keys_first = spec.tile.consumers == 1 and not spec.gathers
        tile_position = q_position = k_position = v_position = MbarrierRing.start()
        work, seqlens = rings.tiles.receive(tile_position)
        if work.is_work():
            first = None
            if const_expr(self.finds_early):
                first = self._find_keys(operands, launch, work, seqlens, gatherer)
            while work.is_work():
                if const_expr(gatherer is None and not keys_first):
                    q_position = self._load_queries(q_position, operands, launch, work, seqlens)
                keys, values = [
                    self._key_loader(operand, smem, ring, launch, work, seqlens, gatherer)
                    for operand, smem, ring in ((operands.k, stages.k, rings.k), (operands.v, stages.v, rings.v))
                ]
                kv = kv_range(spec, work, seqlens, window)
                tile, following, number = (
                    first
                    if const_expr(self.finds_early)
                    else self._find_keys(operands, launch, work, seqlens, gatherer)
                )
                keys.load(k_position, tile)
                k_position = k_position.next()
                if const_expr(keys_first):
                    q_position = self._load_queries(q_position, operands, launch, work, seqlens)
                for i in cutlass.range(1, kv.num_tiles(), unroll=1):
                    previous, tile = tile, following
                    if const_expr(spec.skips):
                        # A load, whose answer `find` needs at once.
                        following = keys.find(number)
                        number = kv_tile(spec, tensors, kv.end - 3 - i, kv.first)
                    else:
                        following = keys.find(kv.end - 2 - i)
                    keys.load(k_position, tile)
                    k_position = k_position.next()
                    values.load(v_position, previous)
                    v_position = v_position.next()
                    if i == LOADED_BEFORE_DEPENDENTS:
                        let_dependents_start()
                let_dependents_start()
                tile_position = tile_position.next()
                if const_expr(self.finds_early):
                    is_long = self._is_long(kv)
                    if not is_long:
                        values.load(v_position, tile)
                    work, seqlens = rings.tiles.receive(tile_position)
                    first = tile, following, number  # of no more work, as good as any
                    if work.is_work():
                        first = self._find_keys(operands, launch, work, seqlens, gatherer)
                    if is_long:
                        values.load(v_position, tile)
                else:
                    values.load(v_position, tile)
                    work, seqlens = rings.tiles.receive(tile_position)
                v_position = v_position.next()

    def _find_keys(
        self,
        operands: Operands,
        launch: Launch,
        work: WorkTile,
        seqlens: Seqlens,
        gatherer: Int32 | None,
    ) -> tuple:
        """(First KV tile, second, number of the third) of a work tile, on their way."""
        keys = self._key_loader(operands.k, launch.stages.k, launch.rings.k, launch, work, seqlens, gatherer)
        tile, following, number = self._first_tiles(launch, work, seqlens)
        return keys.find(tile), keys.find(following), number

    @cute.jit
    def load_queries(self, operands: Operands, launch: Launch):
        """The loading warp where other warps gather keys."""
        rings = launch.rings  # not `launch` in the loop: the DSL would carry it, and its constants with it
        tile_position = position = MbarrierRing.start()
        work, seqlens = rings.tiles.receive(tile_position)
        while work.is_work():
            position = self._load_queries(position, operands, launch, work, seqlens)
            tile_position = tile_position.next()
            work, seqlens = rings.tiles.receive(tile_position)

    @cute.jit
    def _load_queries(
        self,
        position: RingPosition,
        operands: Operands,
        launch: Launch,
        work: WorkTile,
        seqlens: Seqlens,
    ):
        spec = self.spec
        rows = ragged_tma.query_rows(
            operands.q.source,
            seqlens,
            work.batch,
            work.head * spec.qheads_per_kvhead if const_expr(spec.packed) else work.head,
            work.m_block * spec.tokens_per_tile,
            ragged=launch.tensors.packed_q,
        )
        stages, ring = launch.stages.q, launch.rings.q
        queries = ragged_tma.TileLoader.create(operands.q.atom, rows, spec.query_box, stages, ring)
        queries.load(position, queries.find(0))
        return position.next()

    @cute.jit
    def stage_bias(
        self,
        operands: Operands,
        launch: Launch,
        warp: Int32,
    ):
        """A warp that turns key-side masks and biases into what consumers add, KV tile by KV tile.

        Where keys are gathered it is the loading warp, and loads queries as well.
        """
        spec, (stages, rings, window, tensors, scalars) = self.spec, launch
        stager = self._stager(launch, warp)
        tile_position = q_position = position = times = MbarrierRing.start()
        cleared = rings.cleared[0]
        if const_expr(self.bias_warps > 1):
            cleared = replace(cleared, full=cleared.full + warp * MbarrierRing.words(cleared.stages))
        work, seqlens = rings.tiles.receive(tile_position)
        if work.is_work():
            first = None
            if const_expr(stager.holds):
                first = self._find_bias(stager, launch, work, seqlens)
            while work.is_work():
                if const_expr(spec.gathers):
                    q_position = self._load_queries(q_position, operands, launch, work, seqlens)
                kv = kv_range(spec, work, seqlens, window)
                place = key_side_place(spec, tensors, scalars, work, seqlens)
                # What is said of keys, table entries, which KV tile: each begins a tile before it is used.
                given, found, number = (
                    first if const_expr(stager.holds) else self._find_bias(stager, launch, work, seqlens)
                )
                hidden = stager.stage(position, given, place)
                given, found = stager.read(found, place), stager.find(number, place)
                number = kv_tile(spec, tensors, kv.end - 4, kv.first)
                for i in cutlass.range(1, kv.num_tiles(), unroll=1):
                    following = stager.stage(position.next(), given, place)
                    given, found = stager.read(found, place), stager.find(number, place)
                    number = kv_tile(spec, tensors, kv.end - 4 - i, kv.first)
                    times = stager.clear_where_told(position, hidden, stages.v, rings.v, cleared, times)
                    hidden = following
                    position = position.next()
                tile_position = tile_position.next()
                if const_expr(stager.holds):
                    is_long = self._is_long(kv)
                    if not is_long:
                        times = stager.clear_where_told(position, hidden, stages.v, rings.v, cleared, times)
                    work, seqlens = rings.tiles.receive(tile_position)
                    first = given, found, number  # of no more work, as good as any
                    if work.is_work():
                        first = self._find_bias(stager, launch, work, seqlens)
                    if is_long:
                        times = stager.clear_where_told(position, hidden, stages.v, rings.v, cleared, times)
                else:
                    times = stager.clear_where_told(position, hidden, stages.v, rings.v, cleared, times)
                    work, seqlens = rings.tiles.receive(tile_position)
                position = position.next()

    def _find_bias(self, stager: KeyBiasStager, launch: Launch, work: WorkTile, seqlens: Seqlens) -> tuple:
        """(First KV tile, second, number of the third) of a work tile, on their way; of the first, what is said of its
        keys."""
        place = key_side_place(self.spec, launch.tensors, launch.scalars, work, seqlens)
        tile, following, number = self._first_tiles(launch, work, seqlens)
        return stager.read(stager.find(tile, place), place), stager.find(following, place), number

    def _stager(self, launch: Launch, warp: Int32):
        tensors = launch.tensors
        source = KeySide(tensors.key_mask, tensors.key_bias, launch.scalars.bias_factor)
        consumers = self.spec.tile.consumers
        return KeyBiasStager(
            self.spec.key_side,
            source,
            launch.stages.bias,
            launch.rings.bias,
            warp,
            self.bias_warps,
            tells=True,
            at_once=STAGED_AT_ONCE[consumers],
            ahead=STAGED_AHEAD[consumers],
        )

    def _first_tiles(self, launch: Launch, work: WorkTile, seqlens: Seqlens) -> tuple:
        """Numbers of the first three KV tiles of a work tile."""
        kv = kv_range(self.spec, work, seqlens, launch.window)
        return tuple(kv_tile(self.spec, launch.tensors, kv.end - 1 - i, kv.first) for i in range(3))

    def _is_long(self, kv: KvRange) -> Boolean:
        """Whether the work tile behind this one has been sent by the time that the last values are loaded. Behind a
        short one they would wait for it."""
        return kv.num_tiles() * self.spec.tile.tile_n >= LONG_TILE_KEYS

    def _key_loader(
        self,
        operand: Operand,
        smem: cute.Tensor,
        ring: MbarrierRing,
        launch: Launch,
        work: WorkTile,
        seqlens: Seqlens,
        gatherer: Int32 | None,
    ):
        """What loads keys or values of a work tile, in the way in which they lie in memory."""
        spec, tensors, tile_n = self.spec, launch.tensors, self.spec.tile.tile_n
        head = work.head if spec.packed else work.head // spec.qheads_per_kvhead
        # The tile of few rows has all queries of a KV head, where its query heads are packed.
        once = spec.tile.consumers == 1 and (spec.packed or spec.qheads_per_kvhead == 1)
        if tensors.page_table is None:
            rows = ragged_tma.key_rows(
                operand.source,
                seqlens,
                cache_row(tensors, work.batch),
                head,
                packed=tensors.packed_k,
                ragged=tensors.ragged_k,
            )
            box = tile_n, cute.size(smem, mode=[1])
            return ragged_tma.TileLoader.create(operand.atom, rows, box, smem, ring, once=once)
        table = page_table(spec, tensors, launch.scalars, seqlens, work.batch)
        if spec.gathers:
            unroll = GATHER_UNROLL_OF_FEW_ROWS if spec.tile.consumers == 1 else GATHER_UNROLL
            return RowGatherer.create(operand.source, head, smem, ring, table, tile_n, gatherer, SPARE_WARPS, unroll)
        box = spec.page_span, ragged_tma.swizzled_columns(cute.size(smem, mode=[1]))
        return PagedTileLoader.create(operand.source, head, box, smem, ring, table, tile_n, once)

    def _consumer(self, s_mma, o_mma, launch: Launch) -> Consumer:
        tile, stages, scalars = self.spec.tile, launch.stages, launch.scalars
        thread = cute.arch.thread_idx()[0] - WARPGROUP
        index = cute.arch.make_warp_uniform(thread // WARPGROUP)
        # Slices of a whole warpgroup (of its first thread): WGMMA operands are descriptors, the same for all 128
        # threads.
        s_slice, o_slice = s_mma.get_slice(index * WARPGROUP), o_mma.get_slice(index * WARPGROUP)
        v_transposed = cute.make_tensor(stages.v.iterator, cute.select(stages.v.layout, mode=[1, 0, 2]))

        def staging():
            """A number a staging warp, where there are any."""
            return cute.make_rmem_tensor(self.bias_warps, Int32) if self.bias_warps else None

        scale = scalars.softcap if const_expr(self.spec.softcap) else scalars.softmax_scale
        return Consumer(
            index,
            thread % WARPGROUP,
            s_mma,
            o_mma,
            s_slice.make_fragment_A(s_slice.partition_A(stages.q)),
            s_slice.make_fragment_B(s_slice.partition_B(stages.k)),
            o_slice.make_fragment_B(o_slice.partition_B(v_transposed)),
            cute.make_rmem_tensor(s_slice.partition_shape_C((tile.tile_m, tile.tile_n)), Float32),
            o_slice.make_fragment_A(o_slice.partition_shape_A((tile.tile_m, tile.tile_n))),
            cute.make_rmem_tensor(o_slice.partition_shape_C((tile.tile_m, tile.head_dim_v)), Float32),
            OnlineSoftmax.create(scale * LOG2_E),
            rows=2,
            told=staging(),
            clearings=staging(),
        )

    @cute.jit
    def compute(self, me: Consumer, launch: Launch):
        """A consumer warpgroup: for every tile the loop over its KV tiles, then the output rows.

        The first scores of the next tile are issued before the output of this one is written, so that the tensor cores
        work through the epilogue; with sequences of one KV tile that is half of all products.
        """
        tile, rings = self.spec.tile, launch.rings
        if const_expr(self.spec.key_side is not None):
            me.clearings.fill(0)
        if me.warpgroup == 0:
            self._give_turn(Int32(tile.consumers - 1))  # to warpgroup 0 itself: it issues first
        tile_position = q_position = kv_position = MbarrierRing.start()
        work, seqlens = rings.tiles.receive(tile_position)
        if work.is_work():
            self._wait_first(rings, q_position, kv_position)
            self._issue_scores(me, rings, q_position, kv_position, fence=True)
            warpgroup.wait_group(0)
        while work.is_work():
            me.softmax.reset()
            wgmma.flat(me.o).fill(0.0)
            if const_expr(tile.consumers > 1):
                if self._has_queries(me, work, seqlens):
                    kv_position = self._keys_of_rows(me, launch, work, seqlens, q_position, kv_position)
                else:
                    kv_position = self._pass_keys(me, launch, work, seqlens, kv_position)
            else:
                kv_position = self._keys_of_rows(me, launch, work, seqlens, q_position, kv_position)
            rings.q.release_converged(q_position)
            self._issue_output(me, rings, kv_position, fence=True)

            tile_position = tile_position.next()
            following, following_seqlens = rings.tiles.receive(tile_position)
            q_following, k_following = q_position, kv_position
            if following.is_work():
                q_following, k_following = q_position.next(), kv_position.next()
                self._wait_first(rings, q_following, k_following)
            # Not under that condition: what is in flight has to be the same on every path, or ptxas serialises all
            # products. At the end it computes the last scores again, from stages that nobody fills any more.
            self._issue_scores(me, rings, q_following, k_following, fence=False)
            warpgroup.wait_group(1)
            rings.v.release_converged(kv_position)
            self._write(me, work, seqlens, launch.tensors)
            warpgroup.wait_group(0)
            work, seqlens = following, following_seqlens
            q_position, kv_position = q_position.next(), kv_position.next()

    @cute.jit
    def _write(self, me: Consumer, work: WorkTile, seqlens: Seqlens, tensors: ForwardTensors):
        rows = OutputRows.of_thread(self.spec, work, me.warpgroup, me.thread)
        if const_expr(self.spec.splits):
            if work.num_splits > 1:
                rows.write_partial(wgmma.flat(me.o), me.softmax, seqlens, work.slot, tensors)
            else:
                rows.write(wgmma.flat(me.o), me.softmax, seqlens, tensors)
        else:
            rows.write(wgmma.flat(me.o), me.softmax, seqlens, tensors)

    def _has_queries(self, me: Consumer, work: WorkTile, seqlens: Seqlens):
        """Whether any of the rows of a consumer is a query. A decode fills the first consumer's at most."""
        spec = self.spec
        rows = spec.tile.tile_m // spec.tile.consumers
        return work.m_block * spec.tokens_per_tile + me.warpgroup * rows // spec.rows_per_token < seqlens.len_q

    @cute.jit
    def _pass_keys(self, me: Consumer, launch: Launch, work: WorkTile, seqlens: Seqlens, position: RingPosition):
        """`_keys` for a consumer without queries: it leaves the tensor cores to the others, and goes along."""
        # As words: as 16-bit floats the compiler keeps halves, and joins them behind the fence of the product.
        cute.recast_tensor(me.p, Int32).fill(0)
        rings = launch.rings
        rings.k.release_converged(position)
        self._pass_bias(me, launch, position)
        for _ in cutlass.range(kv_range(self.spec, work, seqlens, launch.window).num_tiles() - 1, unroll=1):
            following = position.next()
            rings.k.wait_full(following)
            self._wait_turn(me.warpgroup)
            self._give_turn(me.warpgroup)
            rings.k.release(following)
            self._wait_values(me, rings, position)
            self._pass_bias(me, launch, following)
            rings.v.release(position)
            position = following
        return position

    @cute.jit
    def _pass_bias(self, me: Consumer, launch: Launch, position: RingPosition):
        if const_expr(self.spec.key_side is not None):
            ring = launch.rings.bias
            ring.wait_full(position)
            self._hear(me, told_of(launch.stages.bias, ring, position, self.bias_warps))
            ring.release(position)

    def _hear(self, me: Consumer, told: tuple):
        """Keeps what staging warps tell of a KV tile until its values are waited for."""
        for warp in range(self.bias_warps):
            me.told[warp] = told[warp]

    @cute.jit
    def _keys_of_rows(
        self,
        me: Consumer,
        launch: Launch,
        work: WorkTile,
        seqlens: Seqlens,
        q_position: RingPosition,
        kv_position: RingPosition,
    ):
        """`_keys`. Most decodes have no more than 8 rows, which are the first of a thread's two: then it computes one,
        with two thirds of the instructions. What goes through the products for the other, scores as they are, is
        dropped: it is no query."""
        spec = self.spec
        # A large tile has a decode where a plan mixes them; beside a bias it has no registers for both ways.
        mixes = spec.tile.consumers == 1 or (launch.tensors.work is not None and spec.key_side is None)
        if const_expr(spec.rows_per_token > ROW_STEP or not mixes):
            return self._keys(me, launch, work, seqlens, q_position, kv_position)
        num_rows = (seqlens.len_q - work.m_block * spec.tokens_per_tile) * spec.rows_per_token
        if num_rows <= ROW_STEP:
            kv_position = self._keys(replace(me, rows=1), launch, work, seqlens, q_position, kv_position)
        else:
            kv_position = self._keys(me, launch, work, seqlens, q_position, kv_position)
        return kv_position

    @cute.jit
    def _keys(
        self,
        me: Consumer,
        launch: Launch,
        work: WorkTile,
        seqlens: Seqlens,
        q_position: RingPosition,
        kv_position: RingPosition,
    ):
        """All KV tiles of a query tile but the last output product, whose place it returns. The first scores are there.

        Tiles that need a mask come first and, with a left window, last: only they pay for it.
        """
        stages, rings, window, tensors, scalars = launch
        kv = kv_range(self.spec, work, seqlens, window)
        column = 2 * (me.thread % 4)
        rows = OutputRows.of_thread(self.spec, work, me.warpgroup, me.thread)
        limits = tuple(RowLimits.of_row(seqlens, window, rows.token(r), column) for r in range(me.rows))
        masked_end = cutlass.max(cutlass.min(kv.full_end, kv.end - 1), kv.first)
        full_first = cutlass.max(cutlass.min(kv.full_first, masked_end), kv.first)
        rings.k.release_converged(kv_position)
        bias = Biases(None, None)
        if const_expr(self.spec.key_side is not None):
            of_keys = BiasOfRows.of_accumulator(
                self.spec, rows, me.rows, column, stages.bias, rings.bias, self.bias_warps
            )
            bias = bias._replace(of_keys=of_keys)
        if const_expr(self.spec.query_side is not None):
            source = QuerySide(tensors.query_mask, tensors.query_bias, scalars.bias_factor)
            of_queries = BiasOfQueries.of_accumulator(self.spec, rows, me.rows, seqlens, column, source)
            bias = bias._replace(of_queries=of_queries)
        last = kv_tile(self.spec, tensors, kv.end - 1)
        self._softmax(me, scalars, limits, last, bias, kv_position)
        self._store_p(me)
        if const_expr(window.right is not None):
            for i in cutlass.range(kv.end - 1 - masked_end, unroll=1):
                number = kv_tile(self.spec, tensors, kv.end - 2 - i)
                self._step(me, rings, q_position, kv_position, scalars, limits, bias, number)
                kv_position = kv_position.next()
        for i in cutlass.range(masked_end - full_first, unroll=1):
            number = None
            if const_expr(bias.of_queries is not None):
                number = kv_tile(self.spec, tensors, masked_end - 1 - i)
            self._step(me, rings, q_position, kv_position, scalars, None, bias, number)
            kv_position = kv_position.next()
        if const_expr(window.left is not None):
            for i in cutlass.range(full_first - kv.first, unroll=1):
                number = kv_tile(self.spec, tensors, full_first - 1 - i)
                self._step(me, rings, q_position, kv_position, scalars, limits, bias, number)
                kv_position = kv_position.next()
        return kv_position

    @cute.jit
    def _step(
        self,
        me: Consumer,
        rings: Rings,
        q_position: RingPosition,
        position: RingPosition,
        scalars: ForwardScalars,
        limits,
        bias,
        number: Int32 | None,
    ):
        """Scores of this KV tile, and meanwhile the output product of the one before, which is at `position`.

        number: of the KV tile, where `limits` mask it or something is added for each query.
        """
        following = position.next()
        self._wait_keys(rings.k, following)
        self._wait_turn(me.warpgroup)
        self._issue_scores(me, rings, q_position, following, fence=True)
        self._issue_output(me, rings, position, fence=self.rescale_late)
        self._give_turn(me.warpgroup)
        warpgroup.wait_group(1)
        rings.k.release_converged(following)
        self._softmax(me, scalars, limits, number, bias, following)
        warpgroup.wait_group(0)
        rings.v.release_converged(position)
        self._store_p(me)
        if const_expr(not self.rescale_late):
            me.softmax.rescale(wgmma.flat(me.o), me.rows)

    @cute.jit
    def _wait_first(self, rings: Rings, q_position: RingPosition, k_position: RingPosition):
        rings.q.wait_full(q_position)
        self._wait_keys(rings.k, k_position)

    @cute.jit
    def _wait_keys(self, ring: MbarrierRing, position: RingPosition):
        """Until a stage of keys or values is there, for the tensor cores to read."""
        ring.wait_full(position)
        if const_expr(self.spec.gathers):
            # cp.async wrote it through the generic proxy.
            cute.arch.fence_proxy("async.shared", space="cta")

    @cute.jit
    def _wait_values(self, me: Consumer, rings: Rings, position: RingPosition):
        """Until values are there, and those that a staging warp clears are cleared."""
        self._wait_keys(rings.v, position)
        for warp in cutlass.range_constexpr(self.bias_warps):
            if me.told[warp] & CLEARS != 0:
                rings.cleared[warp].wait_full(RingPosition(me.clearings[warp]))
                me.clearings[warp] = me.clearings[warp] + 1

    @cute.jit
    def _issue_scores(
        self, me: Consumer, rings: Rings, q_position: RingPosition, k_position: RingPosition, fence: cutlass.Constexpr
    ):
        q = me.q[None, None, None, rings.q.stage(q_position)]
        wgmma.issue(me.s_mma, me.s, q, me.k[None, None, None, rings.k.stage(k_position)], False, fence)

    @cute.jit
    def _issue_output(self, me: Consumer, rings: Rings, position: RingPosition, fence: cutlass.Constexpr):
        """The output product of a KV tile, behind the rescaling of the output where that is late."""
        # Waiting for clearings is a branch, and across one the compiler moves the last of the rescaling behind the
        # product's fence. Without them it is done while values are waited for.
        if const_expr(self.spec.key_side is not None):
            self._wait_values(me, rings, position)
        if const_expr(self.rescale_late):
            me.softmax.rescale(wgmma.flat(me.o), me.rows)
        if const_expr(self.spec.key_side is None):
            self._wait_values(me, rings, position)
        wgmma.issue(me.o_mma, me.o, me.p, me.v[None, None, None, rings.v.stage(position)], True, fence)

    @cute.jit
    def _softmax(self, me: Consumer, scalars: ForwardScalars, limits, number, bias, position: RingPosition):
        """Turns the scores into probabilities, in place."""
        s = wgmma.flat(me.s)
        if const_expr(self.spec.softcap):
            factor = scalars.softmax_scale / scalars.softcap
            for i in cutlass.range_constexpr(cute.size(s)):
                if const_expr(i // 2 % 2 < me.rows):
                    s[i] = tanh(s[i] * factor)
        if const_expr(bias.of_keys is not None):
            self._hear(me, bias.of_keys.add(s, position))
        if const_expr(bias.of_queries is not None):
            bias.of_queries.add(s, number)
        if const_expr(limits is not None):
            mask_scores(s, limits, number, self.spec.tile.tile_n)
        me.softmax.update(s, me.rows)

    def _store_p(self, me: Consumer):
        """Rounds the probabilities to the input type, into the registers from which the output product reads them."""
        wgmma.round_to(wgmma.flat(me.s), wgmma.flat(me.p))

    # Turns: a warpgroup issues its products when it has the turn, then hands it to the next. It keeps the order of the
    # warpgroups fixed, so that they do not drift into doing their softmaxes all at the same time.

    def _wait_turn(self, index: Int32):
        if self.take_turns:
            cute.arch.barrier(barrier_id=FIRST_TURN + index, number_of_threads=2 * WARPGROUP)

    def _give_turn(self, index: Int32):
        if self.take_turns:
            following = (index + 1) % self.spec.tile.consumers
            cute.arch.barrier_arrive(barrier_id=FIRST_TURN + following, number_of_threads=2 * WARPGROUP)
