"""Online softmax where a thread holds a whole row of scores, as it does when they come out of tensor memory.

The running maximum and sum are those of `softmax.py`, with one difference: the maximum that scores are taken relative
to moves only when the true one has outgrown it by RESCALE_THRESHOLD, so that the output accumulator is hardly ever
rescaled (the conditional rescaling of FlashAttention-4). What decides is the row alone, so a row's bits do not depend
on its tile. Masked and unmasked tiles share every operation, and each column is exponentiated in one way in both.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr

from flash_attn_cute.device import packed
from flash_attn_cute.device.exp2 import exp2_by_polynomial
from flash_attn_cute.device.softmax import exp2, fma

# In powers of two: probabilities stay below 2^8, far from the largest fp16 (2^16), and sums from that of fp32.
RESCALE_THRESHOLD = 8.0
# Pairs of columns in a block, over which the pattern of polynomial pairs repeats.
BLOCK_PAIRS = 16
# Independent partial maxima and (packed) sums: enough to hide the latency of dependent operations.
CHAINS = 4
SUM_CHAINS = 2


def is_polynomial(pair: int, polynomial_pairs: int) -> bool:
    """Whether a pair of a block goes through the polynomial: `polynomial_pairs` of BLOCK_PAIRS, evenly spread."""
    pair = pair % BLOCK_PAIRS
    return (pair + 1) * polynomial_pairs // BLOCK_PAIRS > pair * polynomial_pairs // BLOCK_PAIRS


@dataclass(frozen=True)
class RowSoftmax:
    """State of one row. Tensors of one element are registers that outlive the loop bodies which change them."""

    scale_log2: Float32
    row_max: cute.Tensor  # what probabilities are relative to: an earlier maximum, at most the threshold behind
    row_sum: cute.Tensor
    polynomial_pairs: int

    @staticmethod
    def create(scale_log2: Float32, polynomial_pairs: int):
        row_max, row_sum = [cute.make_rmem_tensor(1, Float32) for _ in range(2)]
        return RowSoftmax(scale_log2, row_max, row_sum, polynomial_pairs)

    def reset(self):
        self.row_max[0] = -Float32.inf
        self.row_sum[0] = Float32(0.0)

    @cute.jit
    def raise_max(self, scores: cute.Tensor):
        """Takes the scores into the maximum. Returns (factor that earlier results need, what to add to scaled scores).

        The factor is exactly 1 where the maximum was not moved, and a tile that the row does not see never moves it.
        """
        previous = self.row_max[0]
        # NaN wins every comparison here, so that a row with one shows it: the polynomial alone would lose it.
        chains = [packed.max3(previous, scores[0], scores[1])]
        chains += [packed.max3(scores[3 * i - 1], scores[3 * i], scores[3 * i + 1]) for i in range(1, CHAINS)]
        columns = cute.size(scores)
        for i in cutlass.range_constexpr(3 * CHAINS - 1, columns - 1, 2):
            chain = (i - 3 * CHAINS + 1) // 2 % CHAINS
            chains[chain] = packed.max3(chains[chain], scores[i], scores[i + 1])
        if const_expr((columns - 3 * CHAINS + 1) % 2):
            chains[0] = packed.max3(chains[0], scores[columns - 1], scores[columns - 1])
        row_max = packed.max3(packed.max3(chains[0], chains[1], chains[2]), chains[3], chains[3])
        # Where nothing has been visible yet the maximum is -inf; any finite number gives exp2(-inf) = 0 there.
        finite_max = 0.0 if row_max == -Float32.inf else row_max
        growth = (previous - finite_max) * self.scale_log2
        keep = growth >= -RESCALE_THRESHOLD
        factor = 1.0 if keep else exp2(growth)
        self.row_max[0] = previous if keep else row_max
        offset = -(previous if keep else finite_max) * self.scale_log2
        return factor, offset

    @cute.jit
    def exponentiate(self, scores: cute.Tensor, offset: Float32, sums: tuple):
        """Replaces an even number of scores by exp2(scale * score + offset). Returns the partial sums with them added.

        `sums` is empty for the first columns of a tile.
        """
        scale, offset = packed.both(self.scale_log2), packed.both(offset)
        chains = list(sums)
        for i in cutlass.range_constexpr(cute.size(scores) // 2):
            x = packed.fma((scores[2 * i], scores[2 * i + 1]), scale, offset)
            if const_expr(is_polynomial(i, self.polynomial_pairs)):
                p = exp2_by_polynomial(x)
            else:
                p = (exp2(x[0]), exp2(x[1]))
            scores[2 * i], scores[2 * i + 1] = p
            if const_expr(len(chains) < SUM_CHAINS):
                chains.append(p)
            else:
                chains[i % SUM_CHAINS] = packed.add(chains[i % SUM_CHAINS], p)
        return tuple(chains)

    @cute.jit
    def add(self, sums: tuple, factor: Float32):
        """Takes the partial sums of a tile into the row's, which `factor` rescales first."""
        total = sums[0]
        for other in sums[1:]:
            total = packed.add(total, other)
        self.row_sum[0] = fma(self.row_sum[0], factor, total[0] + total[1])
