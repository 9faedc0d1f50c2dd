"""Merging the partial results of one output row: what each split of its keys contributed.

A split's partial is a softmax of its own over its own keys: an output o_s and the log-sum-exp l_s of its scores, a
natural logarithm. The row is sum_s exp(l_s - l) o_s with l = log(sum_s exp(l_s)) (Flash-Decoding, Dao et al., 2023).

The order of the sum is fixed, whoever computes it: split s belongs to chain s % CHAINS, a chain is summed in the order
of s by explicit fma, and the chains as (0 + 1) + (2 + 3). A split without keys (l_s = -inf) adds nothing, whatever its
o_s holds, and so do splits that do not exist: the bits are a function of the row's own splits alone.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from flash_attn_cute.device.softmax import LN2, LOG2_E, exp2, fma, join_sink
from flash_attn_cute.plan import MAX_SPLITS
from flash_attn_cute.tuning import MERGE_LANE_COLUMNS, merge_blocks

WARP = 32
CHAINS = 4
# Bytes of a wave of splits that a lane loads at once: 128 splits, where four warps share a row. With fewer, many splits
# take that many more memory latencies one after another. A wave comes in halves, of which few splits skip the second.
WAVE_BYTES = 256
# Numbers between the weights of two chains: a warp writes those of all chains, and does so in 32 banks.
WEIGHTS_PITCH = MAX_SPLITS // CHAINS + 32 // CHAINS


class RowWeights(NamedTuple):
    """What the log-sum-exps of a row's splits come to."""

    factor: Float32  # for the weighted sum; 0 where there is nothing
    lse: Float32  # of the whole row, with the sink where there is one


@dataclass(frozen=True)
class RowMerger:
    """One warp's part of merging rows.

    A warp has a whole row, or `warps` of a CTA share a block of its columns, each taking some of its chains.
    """

    weights: cute.Tensor  # (WEIGHTS_PITCH, CHAINS) float32 in shared memory, of this warp alone
    exchange: cute.Tensor | None  # (columns of a block, warps) float32 in shared memory, where several warps share one
    warp: Int32  # within those that share the block
    warps: int  # 1 or CHAINS
    head_dim_v: int

    @property
    def chains(self) -> int:
        return CHAINS // self.warps

    @property
    def vector(self) -> int:
        """Columns that a lane takes at once."""
        return MERGE_LANE_COLUMNS[self.warps]

    @property
    def blocks(self) -> int:
        """Of columns, that a row is merged in."""
        return merge_blocks(self.head_dim_v, self.warps)

    @property
    def most_splits(self) -> int:
        """That a lane looks at the weights of, in steps of a warp."""
        return WARP if self.warps == 1 else MAX_SPLITS

    @property
    def pieces(self) -> int:
        """Vectors that a lane holds: of a block, or of a row."""
        return 1 if self.warps > 1 else -(-self.head_dim_v // (self.vector * WARP))

    @property
    def width(self) -> int:
        """Columns that a lane holds."""
        return self.pieces * self.vector

    @property
    def loads(self) -> int:
        """Splits that this warp loads at once."""
        return WAVE_BYTES // (4 * self.width)

    @property
    def wave_splits(self) -> int:
        """Splits that all warps of a row load at once."""
        return self.loads * self.warps

    @cute.jit
    def _load_lse(self, lse: cute.Tensor, num_splits: Int32) -> list:
        """Starts to load what `_weigh` needs. lse: (splits,)."""
        lane, values = cute.arch.lane_idx(), []
        for i in cutlass.range_constexpr(self.most_splits // WARP):
            value = -Float32.inf
            if i * WARP + lane < num_splits:
                value = lse[i * WARP + lane]
            values.append(value)
        return values

    @cute.jit
    def _weigh(self, values: list, sink: Float32 | None) -> RowWeights:
        """Fills `weights` with exp(lse - largest), 0 behind the last split. values: of `_load_lse`."""
        lane = cute.arch.lane_idx()
        largest = values[0]
        for value in values[1:]:
            largest = cute.arch.fmax(largest, value)
        for i in cutlass.range_constexpr(5):
            largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=1 << i))
        # Any finite number does where there is nothing: exp2(-inf) is 0.
        largest = 0.0 if largest == -Float32.inf else largest
        total = Float32(0.0)
        # Lanes of this warp may still be reading the weights of the row before.
        cute.arch.sync_warp()
        for i in cutlass.range_constexpr(len(values)):
            weight = exp2((values[i] - largest) * LOG2_E)
            self.weights[(i * WARP + lane) // CHAINS, lane % CHAINS] = weight
            total = total + weight
        cute.arch.sync_warp()
        for i in cutlass.range_constexpr(5):
            total = total + cute.arch.shuffle_sync_bfly(total, offset=1 << i)
        lse_of_row = fma(cute.math.log2(total, fastmath=True), Float32(LN2), largest)
        lse_of_row = -Float32.inf if total == 0.0 else lse_of_row
        factor = 0.0 if total == 0.0 else 1.0 / total
        if const_expr(sink is not None):
            share, lse_of_row = join_sink(lse_of_row, sink)
            factor = factor * share
        return RowWeights(factor, lse_of_row)

    @cute.jit
    def merge(
        self, partial: cute.Tensor, lse: cute.Tensor, num_splits: Int32, block: Int32, sink: Float32 | None
    ) -> tuple:
        """(Sum of weight x partial over all splits, of this lane's columns; RowWeights), in warp 0 of those that share
        the columns.

        partial: (splits, head_dim_v), lse: (splits,) float32; block: of columns. The lane has vector
        32 * (block + i) + lane of the row as its i-th. A split of weight 0 may hold anything: it is not counted.
        """
        sums = [cute.make_rmem_tensor(self.width, Float32) for _ in range(self.chains)]
        for chain in sums:
            chain.fill(0.0)
        # Behind the last split it holds anything, and has weight 0.
        loaded = cute.make_rmem_tensor((self.width, self.loads), Float32)
        first_chain = self.warp * self.chains
        weights = RowWeights(Float32(0.0), -Float32.inf)
        # All that the first wave needs is on its way before anything waits for it.
        values = self._load_lse(lse, num_splits)
        waves = cutlass.max((num_splits + self.wave_splits - 1) // self.wave_splits, 1)
        for wave in cutlass.range(waves, unroll=1):
            first = wave * self.wave_splits
            left = num_splits - first - first_chain
            columns = self._columns(partial, first + first_chain, block)
            has_more = left > self._split(self.loads // 2)
            self._load_splits(columns, left, 0, loaded)
            if has_more:
                self._load_splits(columns, left, 1, loaded)
            if wave == 0:
                weights = self._weigh(values, sink)
            self._add_splits(sums, wave, 0, loaded)
            if has_more:
                self._add_splits(sums, wave, 1, loaded)
        if const_expr(self.warps == 1):
            for i in cutlass.range_constexpr(self.width):
                sums[0][i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i])
        else:
            self._add_warps(sums[0])
        return sums[0], weights

    @cute.jit
    def for_piece(self, i: int, block: Int32, use: cutlass.Constexpr):
        """Calls use(vector number in the row) for the i-th vector of this lane, if the row has it."""
        column = (block + i) * WARP + cute.arch.lane_idx()
        if const_expr(self.head_dim_v % (WARP * self.vector) == 0):
            use(column)
        else:
            if column < self.head_dim_v // self.vector:
                use(column)

    def _split(self, i: int) -> int:
        """The split that the i-th load of a wave is of, counted from the first of this warp."""
        return i // self.chains * CHAINS + i % self.chains

    def _half(self, half: int) -> range:
        """Its loads."""
        return range(half * self.loads // 2, (half + 1) * self.loads // 2)

    def _columns(self, partial: cute.Tensor, first: Int32, block: Int32) -> list:
        """(vector, splits) of this lane, from split `first` on, for each piece: addresses that differ by constants."""
        columns = []
        for piece in range(self.pieces):
            # Past the last column, that is read again.
            last = self.head_dim_v // self.vector - 1
            column = cutlass.min((block + piece) * WARP + cute.arch.lane_idx(), last) * self.vector
            start = cute.domain_offset((first, column), partial)
            layout = cute.make_layout((self.vector, MAX_SPLITS), stride=(1, start.stride[0]))
            columns.append(cute.make_tensor(start.iterator.align(4 * self.vector), layout))
        return columns

    @cute.jit
    def _load_splits(self, columns: list, left: Int32, half: int, loaded: cute.Tensor):
        """Half of a wave. left: splits from the first of this warp on; what is behind stays as it is in `loaded`."""
        for i in self._half(half):
            if left > self._split(i):
                for piece in cutlass.range_constexpr(self.pieces):
                    to = cute.local_tile(loaded[None, i], (self.vector,), (piece,))
                    cute.autovec_copy(columns[piece][None, self._split(i)], to)

    @cute.jit
    def _add_splits(self, sums: list, wave: Int32, half: int, loaded: cute.Tensor):
        # Weights of a chain lie side by side.
        per_chain = self.loads // self.chains // 2
        weights = cute.make_rmem_tensor((per_chain, self.chains), Float32)
        for chain in cutlass.range_constexpr(self.chains):
            of_chain = self.weights[None, self.warp * self.chains + chain]
            cute.autovec_copy(cute.local_tile(of_chain, (per_chain,), (2 * wave + half,)), weights[None, chain])
        for i in self._half(half):
            chain = i % self.chains
            weight = weights[i // self.chains - half * per_chain, chain]
            for j in cutlass.range_constexpr(self.width):
                value = 0.0 if weight == 0.0 else loaded[j, i]
                sums[chain][j] = fma(weight, value, sums[chain][j])

    @cute.jit
    def _add_warps(self, own: cute.Tensor):
        """Adds the chains of all warps into those of warp 0."""
        cute.autovec_copy(own, self._exchanged(self.warp))
        cute.arch.sync_threads()
        if self.warp == 0:
            others = []
            for warp in cutlass.range_constexpr(1, CHAINS):
                values = cute.make_rmem_tensor(self.vector, Float32)
                cute.autovec_copy(self._exchanged(warp), values)
                others.append(values)
            for j in cutlass.range_constexpr(self.vector):
                own[j] = (own[j] + others[0][j]) + (others[1][j] + others[2][j])
        # Before the next row's chains are written.
        cute.arch.sync_threads()

    def _exchanged(self, warp) -> cute.Tensor:
        """This lane's place."""
        return cute.local_tile(self.exchange[None, warp], (self.vector,), (cute.arch.lane_idx(),))

    def store(self, sums: cute.Tensor, factor: Float32, out_row: cute.Tensor, block: Int32):
        """sums * factor, rounded to the type of `out_row` (head_dim_v,)."""
        pieces = cute.logical_divide(out_row, cute.make_layout(self.vector))
        for i in range(self.pieces):
            rounded = cute.make_rmem_tensor(self.vector, out_row.element_type)
            scaled = cute.make_rmem_tensor(self.vector, Float32)
            for j in range(self.vector):
                scaled[j] = sums[self.vector * i + j] * factor
            rounded.store(scaled.load().to(out_row.element_type))
            self.for_piece(i, block, lambda column, rounded=rounded: cute.autovec_copy(rounded, pieces[None, column]))
