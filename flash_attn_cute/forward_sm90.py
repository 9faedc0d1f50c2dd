"""Attention forward on Hopper (SM90).

One persistent CTA a SM: a producer warpgroup (one warp loads with TMA, one decides what is next) and two or three
consumer warpgroups that hold 64 query rows each. A consumer issues the scores of one KV tile before the output product
of the tile before it, so that softmax runs while the tensor cores work, and the consumers take turns issuing, so that
one's softmax falls into another's products (the ping-pong of FlashAttention-3, Shah et al., 2024).
See csrc_notes/forward_sm90.md for the pipeline, the barriers and what was measured.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from flash_attn_cute.device import ragged_tma, wgmma
from flash_attn_cute.device.kv_range import Window
from flash_attn_cute.device.masking import RowLimits, mask_scores
from flash_attn_cute.device.output_rows import OutputRows
from flash_attn_cute.device.pipelines import MbarrierRing, RingPosition
from flash_attn_cute.device.scheduling_warp import schedule
from flash_attn_cute.device.seqlens import Seqlens, SeqlenSource
from flash_attn_cute.device.softmax import LOG2_E, OnlineSoftmax, tanh
from flash_attn_cute.forward_spec import (
    ForwardScalars,
    ForwardSpec,
    ForwardTensors,
    kv_range,
    seqlen_source,
    tile_order,
    window_of,
)
from flash_attn_cute.tile_scheduler import (
    MAILBOX_STAGES,
    MAILBOX_WORDS,
    TileMailbox,
    TileScheduler,
    WorkTile,
)

WARPGROUP = 128
LOAD_WARP, SCHEDULE_WARP = 0, 1
# Named barrier 0 is __syncthreads; consumer warpgroup i waits for its turn on FIRST_TURN + i.
FIRST_TURN = 1


class Operand(NamedTuple):
    """One TMA-loaded operand: the copy, its coordinate tensor, and where it lands."""

    atom: cute.CopyAtom
    source: cute.Tensor
    smem_layout: cute.ComposedLayout


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


@dataclass(frozen=True)
class Rings:
    """What warps meet on: stages of Q, K and V, and the tiles to work on."""

    q: MbarrierRing
    k: MbarrierRing
    v: MbarrierRing
    tiles: TileMailbox


class ForwardSm90:
    """Compile with `cute.compile(ForwardSm90(spec), ForwardTensors, ForwardScalars, stream)`."""

    def __init__(self, spec: ForwardSpec):
        self.spec = spec
        tile = spec.tile
        self.threads = WARPGROUP * (tile.consumers + 1)
        self.consumer_warps = 4 * tile.consumers
        # Turns pay where softmax is a large part of a step. With wide heads the products dominate, and warpgroups that
        # issue whenever they can keep the tensor cores busier.
        self.take_turns = tile.consumers > 1 and tile.head_dim <= 128
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
        # Loads stop at the last used key: rows behind it arrive as zeros, so that nothing there can reach a product.
        k_view, v_view = [
            ragged_tma.key_view(x, packed=tensors.packed_k, ragged=tensors.ragged_k) for x in (tensors.k, tensors.v)
        ]
        q = Operand(*self._tma(q_view, q_layout, spec.query_box), q_layout)
        k = Operand(*self._tma(k_view, k_layout, (tile.tile_n, tile.head_dim)), k_layout)
        v = Operand(*self._tma(v_view, v_layout, (tile.tile_n, tile.head_dim_v)), v_layout)
        source = seqlen_source(tensors, scalars)
        self.kernel(q, k, v, tensors, scalars, source, s_mma, o_mma).launch(
            grid=[scalars.grid, 1, 1], block=[self.threads, 1, 1], stream=stream, min_blocks_per_mp=1
        )

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
        q: Operand,
        k: Operand,
        v: Operand,
        tensors: ForwardTensors,
        scalars: ForwardScalars,
        source: SeqlenSource,
        s_mma: cute.TiledMma,
        o_mma: cute.TiledMma,
    ):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == LOAD_WARP:
            for operand in (q, k, v):
                cpasync.prefetch_descriptor(operand.atom)
        smem = SmemAllocator()
        sq, sk, sv = [self._allocate(smem, operand) for operand in (q, k, v)]
        rings = self._rings(smem)
        if warp == LOAD_WARP:
            with cute.arch.elect_one():
                rings.q.init(full_arrivals=1, empty_arrivals=self.consumer_warps)
                rings.k.init(full_arrivals=1, empty_arrivals=self.consumer_warps)
                rings.v.init(full_arrivals=1, empty_arrivals=self.consumer_warps)
                rings.tiles.init()
                cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if const_expr(self.spec.splits):
            # The combine kernel's CTAs may take the place of ours as they leave.
            cute.arch.griddepcontrol_launch_dependents()

        window = window_of(self.spec, scalars)
        producer_registers, consumer_registers = self.spec.tile.registers
        if warp < 4:
            cute.arch.setmaxregister_decrease(producer_registers)
            if warp == LOAD_WARP:
                self.load(q, k, v, sq, sk, sv, rings, window, tensors)
            if warp == SCHEDULE_WARP:
                order = tile_order(self.spec, tensors, scalars, source)
                scheduler = TileScheduler(tensors.semaphore, scalars.short_from)
                schedule(self.spec, order, scheduler, rings.tiles, window, tensors)
        else:
            cute.arch.setmaxregister_increase(consumer_registers)
            consumer = self._consumer(s_mma, o_mma, sq, sk, sv, scalars)
            self.compute(consumer, rings, window, tensors, scalars)

    def _allocate(self, smem: SmemAllocator, operand: Operand) -> cute.Tensor:
        layout = operand.smem_layout
        # 1024 bytes: the period of the 128-byte swizzle, which works on absolute addresses.
        return smem.allocate_tensor(self.spec.dtype, layout.outer, byte_alignment=1024, swizzle=layout.inner)

    def _rings(self, smem: SmemAllocator) -> Rings:
        tile = self.spec.tile

        def barriers(stages):
            return smem.allocate_array(cutlass.Int64, MbarrierRing.words(stages))

        slots = smem.allocate_tensor(Int32, cute.make_layout((MAILBOX_WORDS, MAILBOX_STAGES)), byte_alignment=16)
        return Rings(
            MbarrierRing(barriers(tile.q_stages), tile.q_stages),
            MbarrierRing(barriers(tile.kv_stages), tile.kv_stages),
            MbarrierRing(barriers(tile.kv_stages), tile.kv_stages),
            TileMailbox(slots, MbarrierRing(barriers(MAILBOX_STAGES), MAILBOX_STAGES), readers=self.consumer_warps + 1),
        )

    @cute.jit
    def load(
        self,
        q: Operand,
        k: Operand,
        v: Operand,
        sq: cute.Tensor,
        sk: cute.Tensor,
        sv: cute.Tensor,
        rings: Rings,
        window: Window,
        tensors: ForwardTensors,
    ):
        """The loading warp: for every tile Q, then K one KV tile ahead of V, in the order in which they are needed."""
        spec, tile = self.spec, self.spec.tile
        tile_position = q_position = k_position = v_position = MbarrierRing.start()
        work, seqlens = rings.tiles.receive(tile_position)
        while work.is_work():
            first_token = work.m_block * spec.tokens_per_tile
            kv = kv_range(spec, work, seqlens, window)
            head_kv = work.head if const_expr(spec.packed) else work.head // spec.qheads_per_kvhead
            head_q = work.head * spec.qheads_per_kvhead if const_expr(spec.packed) else work.head
            q_rows = ragged_tma.query_rows(q.source, seqlens, work.batch, head_q, first_token, ragged=tensors.packed_q)
            k_rows, v_rows = [
                ragged_tma.key_rows(
                    x.source, seqlens, work.batch, head_kv, packed=tensors.packed_k, ragged=tensors.ragged_k
                )
                for x in (k, v)
            ]
            load_q = ragged_tma.TileLoader.create(q.atom, q_rows, spec.query_box, sq, rings.q)
            load_k = ragged_tma.TileLoader.create(k.atom, k_rows, (tile.tile_n, tile.head_dim), sk, rings.k)
            load_v = ragged_tma.TileLoader.create(v.atom, v_rows, (tile.tile_n, tile.head_dim_v), sv, rings.v)

            load_q.load(q_position, 0)
            q_position = q_position.next()
            load_k.load(k_position, kv.end - 1)
            k_position = k_position.next()
            for i in cutlass.range(1, kv.num_tiles(), unroll=1):
                load_k.load(k_position, kv.end - 1 - i)
                k_position = k_position.next()
                load_v.load(v_position, kv.end - i)
                v_position = v_position.next()
            load_v.load(v_position, kv.first)
            v_position = v_position.next()
            tile_position = tile_position.next()
            work, seqlens = rings.tiles.receive(tile_position)

    def _consumer(self, s_mma, o_mma, sq, sk, sv, scalars: ForwardScalars) -> Consumer:
        tile = self.spec.tile
        thread = cute.arch.thread_idx()[0] - WARPGROUP
        index = cute.arch.make_warp_uniform(thread // WARPGROUP)
        # Slices of a whole warpgroup (of its first thread): WGMMA operands are descriptors, the same for all 128
        # threads.
        s_slice, o_slice = s_mma.get_slice(index * WARPGROUP), o_mma.get_slice(index * WARPGROUP)
        v_transposed = cute.make_tensor(sv.iterator, cute.select(sv.layout, mode=[1, 0, 2]))
        scale = scalars.softcap if const_expr(self.spec.softcap) else scalars.softmax_scale
        return Consumer(
            index,
            thread % WARPGROUP,
            s_mma,
            o_mma,
            s_slice.make_fragment_A(s_slice.partition_A(sq)),
            s_slice.make_fragment_B(s_slice.partition_B(sk)),
            o_slice.make_fragment_B(o_slice.partition_B(v_transposed)),
            cute.make_rmem_tensor(s_slice.partition_shape_C((tile.tile_m, tile.tile_n)), Float32),
            o_slice.make_fragment_A(o_slice.partition_shape_A((tile.tile_m, tile.tile_n))),
            cute.make_rmem_tensor(o_slice.partition_shape_C((tile.tile_m, tile.head_dim_v)), Float32),
            OnlineSoftmax.create(scale * LOG2_E),
        )

    @cute.jit
    def compute(self, me: Consumer, rings: Rings, window: Window, tensors: ForwardTensors, scalars: ForwardScalars):
        """A consumer warpgroup: for every tile the loop over its KV tiles, then the output rows.

        The first scores of the next tile are issued before the output of this one is written, so that the tensor cores
        work through the epilogue; with sequences of one KV tile that is half of all products.
        """
        if me.warpgroup == 0:
            self._give_turn(Int32(self.spec.tile.consumers - 1))  # to warpgroup 0 itself: it issues first
        tile_position = q_position = kv_position = MbarrierRing.start()
        work, seqlens = rings.tiles.receive(tile_position)
        if work.is_work():
            self._wait_first(rings, q_position, kv_position)
            self._issue_scores(me, rings, q_position, kv_position, fence=True)
            warpgroup.wait_group(0)
        while work.is_work():
            me.softmax.reset()
            wgmma.flat(me.o).fill(0.0)
            kv_position = self._keys(me, rings, window, scalars, work, seqlens, q_position, kv_position)
            rings.q.release_converged(q_position)
            if const_expr(self.rescale_late):
                me.softmax.rescale(wgmma.flat(me.o))
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
            self._write(me, work, seqlens, tensors)
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

    @cute.jit
    def _keys(
        self,
        me: Consumer,
        rings: Rings,
        window: Window,
        scalars: ForwardScalars,
        work: WorkTile,
        seqlens: Seqlens,
        q_position: RingPosition,
        kv_position: RingPosition,
    ):
        """All KV tiles of a query tile but the last output product, whose place it returns. The first scores are there.

        Tiles that need a mask come first and, with a left window, last: only they pay for it.
        """
        kv = kv_range(self.spec, work, seqlens, window)
        column = 2 * (me.thread % 4)
        rows = OutputRows.of_thread(self.spec, work, me.warpgroup, me.thread)
        limits = tuple(RowLimits.of_row(seqlens, window, rows.token(r), column) for r in range(2))
        masked_end = cutlass.max(cutlass.min(kv.full_end, kv.end - 1), kv.first)
        full_first = cutlass.max(cutlass.min(kv.full_first, masked_end), kv.first)
        rings.k.release_converged(kv_position)
        self._softmax(me, scalars, limits, kv.end - 1)
        self._store_p(me)
        if const_expr(window.right is not None):
            for i in cutlass.range(kv.end - 1 - masked_end, unroll=1):
                self._step(me, rings, q_position, kv_position, scalars, limits, kv.end - 2 - i)
                kv_position = kv_position.next()
        for i in cutlass.range(masked_end - full_first, unroll=1):
            self._step(me, rings, q_position, kv_position, scalars, None, masked_end - 1 - i)
            kv_position = kv_position.next()
        if const_expr(window.left is not None):
            for i in cutlass.range(full_first - kv.first, unroll=1):
                self._step(me, rings, q_position, kv_position, scalars, limits, full_first - 1 - i)
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
        kv_tile: Int32,
    ):
        """Scores of this KV tile, and meanwhile the output product of the one before, which is at `position`."""
        following = position.next()
        rings.k.wait_full(following)
        self._wait_turn(me.warpgroup)
        self._issue_scores(me, rings, q_position, following, fence=True)
        if const_expr(self.rescale_late):
            me.softmax.rescale(wgmma.flat(me.o))
        self._issue_output(me, rings, position, fence=self.rescale_late)
        self._give_turn(me.warpgroup)
        warpgroup.wait_group(1)
        rings.k.release_converged(following)
        self._softmax(me, scalars, limits, kv_tile)
        warpgroup.wait_group(0)
        rings.v.release_converged(position)
        self._store_p(me)
        if const_expr(not self.rescale_late):
            me.softmax.rescale(wgmma.flat(me.o))

    @cute.jit
    def _wait_first(self, rings: Rings, q_position: RingPosition, k_position: RingPosition):
        rings.q.wait_full(q_position)
        rings.k.wait_full(k_position)

    @cute.jit
    def _issue_scores(
        self, me: Consumer, rings: Rings, q_position: RingPosition, k_position: RingPosition, fence: cutlass.Constexpr
    ):
        q = me.q[None, None, None, rings.q.stage(q_position)]
        wgmma.issue(me.s_mma, me.s, q, me.k[None, None, None, rings.k.stage(k_position)], False, fence)

    @cute.jit
    def _issue_output(self, me: Consumer, rings: Rings, position: RingPosition, fence: cutlass.Constexpr):
        rings.v.wait_full(position)
        wgmma.issue(me.o_mma, me.o, me.p, me.v[None, None, None, rings.v.stage(position)], True, fence)

    @cute.jit
    def _softmax(self, me: Consumer, scalars: ForwardScalars, limits, kv_tile: Int32):
        """Turns the scores into probabilities, in place."""
        s = wgmma.flat(me.s)
        if const_expr(self.spec.softcap):
            factor = scalars.softmax_scale / scalars.softcap
            for i in cutlass.range_constexpr(cute.size(s)):
                s[i] = tanh(s[i] * factor)
        if const_expr(limits is not None):
            mask_scores(s, limits, kv_tile, self.spec.tile.tile_n)
        me.softmax.update(s)

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
