"""Online softmax of score tiles held in WGMMA accumulator registers.

The running maximum and sum of Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), as used by
FlashAttention (Dao et al., 2022). Every tile, masked or not, goes through the same operations in the same order, and a
row's rescaling depends on that row alone: both are what batch invariance needs. So is that every product which feeds a
sum is an explicit fma: left to the compiler, the masked and the unmasked copy of the loop fuse differently.
"""

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr

LOG2_E = math.log2(math.e)
LN2 = math.log(2.0)
# Independent partial maxima and sums a row: four chains hide the latency of dependent adds without costing registers.
CHAINS = 4


@cute.jit
def exp2(x: Float32) -> Float32:
    return cute.math.exp2(x, fastmath=True)


def fma(a: Float32, b: Float32, c: Float32) -> Float32:
    return cute.math.fma(a, b, c)


@cute.jit
def tanh(x: Float32) -> Float32:
    """1 - 2 / (e^2x + 1): within 1e-6 absolute, where tanh.approx has 5e-4, far too much under a soft cap of 50."""
    return fma(Float32(-2.0), cute.arch.rcp_approx(exp2(x * (2.0 * LOG2_E)) + 1.0), Float32(1.0))


@dataclass(frozen=True)
class OnlineSoftmax:
    """State of the two rows that a thread holds in an accumulator: flat element 4j + 2r + c is row r, column 8j + c.

    Where only the first is a query's, `rows` of 1 leaves the other alone.
    """

    scale_log2: Float32
    row_max: cute.Tensor
    row_sum: cute.Tensor
    row_scale: cute.Tensor  # what the last update asks of the output accumulator

    @staticmethod
    def create(scale_log2: Float32):
        return OnlineSoftmax(scale_log2, *(cute.make_rmem_tensor(2, Float32) for _ in range(3)))

    def reset(self):
        self.row_max.fill(-Float32.inf)
        self.row_sum.fill(0.0)
        self.row_scale.fill(1.0)

    @cute.jit
    def update(self, scores: cute.Tensor, rows: cutlass.Constexpr):
        """Replaces scores by exp2(scale * (score - row maximum)) and takes them into the running maximum and sum."""
        columns = cute.size(scores) // 2
        for r in cutlass.range_constexpr(rows):
            previous = self.row_max[r]
            chains = [previous] + [self._score(scores, r, i) for i in range(1, CHAINS)]
            chains[0] = cute.arch.fmax(chains[0], self._score(scores, r, 0))
            for i in cutlass.range_constexpr(CHAINS, columns):
                chains[i % CHAINS] = cute.arch.fmax(chains[i % CHAINS], self._score(scores, r, i))
            row_max = cute.arch.fmax(cute.arch.fmax(chains[0], chains[1]), cute.arch.fmax(chains[2], chains[3]))
            row_max = cute.arch.fmax(row_max, cute.arch.shuffle_sync_bfly(row_max, offset=1))
            row_max = cute.arch.fmax(row_max, cute.arch.shuffle_sync_bfly(row_max, offset=2))
            self.row_max[r] = row_max
            # Where nothing has been visible yet the maximum is -inf; any finite number gives exp2(-inf) = 0 there.
            finite_max = 0.0 if row_max == -Float32.inf else row_max
            offset = -finite_max * self.scale_log2
            # The difference first: where the maximum stays, the factor is 1 exactly, and a tile that a row does not see
            # changes none of its bits.
            self.row_scale[r] = exp2((previous - finite_max) * self.scale_log2)
            sums = [None] * CHAINS
            for i in cutlass.range_constexpr(columns):
                p = exp2(fma(self._score(scores, r, i), self.scale_log2, offset))
                scores[4 * (i // 2) + 2 * r + i % 2] = p
                sums[i % CHAINS] = p if const_expr(sums[i % CHAINS] is None) else sums[i % CHAINS] + p
            tile_sum = (sums[0] + sums[1]) + (sums[2] + sums[3])
            self.row_sum[r] = fma(self.row_sum[r], self.row_scale[r], tile_sum)

    @staticmethod
    def _score(scores: cute.Tensor, row: int, i: int) -> Float32:
        return scores[4 * (i // 2) + 2 * row + i % 2]

    @cute.jit
    def rescale(self, accumulator: cute.Tensor, rows: cutlass.Constexpr):
        """Multiplies the flat output accumulator by the factors of the last update."""
        for j in cutlass.range_constexpr(cute.size(accumulator) // 4):
            for r in cutlass.range_constexpr(rows):
                for c in cutlass.range_constexpr(2):
                    accumulator[4 * j + 2 * r + c] = accumulator[4 * j + 2 * r + c] * self.row_scale[r]

    @cute.jit
    def finish(self, row: int, sink: Float32 | None):
        """`normalise` for a row of this thread."""
        row_sum = self.row_sum[row]
        row_sum = row_sum + cute.arch.shuffle_sync_bfly(row_sum, offset=1)
        row_sum = row_sum + cute.arch.shuffle_sync_bfly(row_sum, offset=2)
        return normalise(self.row_max[row], row_sum, self.scale_log2, sink)


@cute.jit
def normalise(row_max: Float32, row_sum: Float32, scale_log2: Float32, sink: Float32 | None):
    """(factor, share, log-sum-exp) of a row that was summed relative to `row_max`, an unscaled score.

    The output is output * factor * share, in this order. Where nothing was visible the factor is 0 and the log-sum-exp
    -inf or the sink. The share is 1 without a sink.
    """
    # Not told by the maximum, which is -inf too where every score is NaN: those rows have to show it.
    nothing = row_sum == 0.0
    row_max = 0.0 if row_max == -Float32.inf else row_max
    lse = fma(row_max, scale_log2, cute.math.log2(row_sum, fastmath=True)) * LN2
    lse = -Float32.inf if nothing else lse
    factor = 0.0 if nothing else cute.arch.rcp_approx(row_sum)
    share = Float32(1.0)
    if const_expr(sink is not None):
        share, lse = join_sink(lse, sink)
    return factor, share, lse


@cute.jit
def join_sink(lse: Float32, sink: Float32):
    """(share of the output that is left, log-sum-exp) of a row when a sink joins: a logit that has no value.

    The forward kernels call it for rows of one split, the combine kernel for the others. It works on a finished row in
    both, or a row's bits would depend on whether keys that it does not see split its sequence.
    """
    # Infinite where there is nothing but the sink, or it is far above everything: then it is the log-sum-exp.
    total = 1.0 + exp2((sink - lse) * LOG2_E)
    joined = fma(cute.math.log2(total, fastmath=True), Float32(LN2), lse)
    joined = sink if lse == -Float32.inf or total == Float32.inf else joined
    return 0.0 if lse == -Float32.inf else 1.0 / total, joined
