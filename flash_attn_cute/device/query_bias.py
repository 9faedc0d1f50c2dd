"""A mask and a bias of each query, read by the threads that hold its scores.

Every number belongs to one score, or to those of the query heads that share it, so nothing is gained by staging: each
thread reads what its own elements need, from global memory. As of keys (`key_bias`) a bias joins scores as they come
out of the product, after a soft cap, as bias / scale, so that 0 adds nothing; -inf hides. What it hides it hides from
the scores alone: a value may be seen by another row of the tile and stays, so that its NaN would spread.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from flash_attn_cute.device.key_bias import ALL_HEADS, KV_HEADS, QUERY_HEADS
from flash_attn_cute.device.output_rows import OutputRows
from flash_attn_cute.device.seqlens import Seqlens


class QuerySideSpec(NamedTuple):
    """What is compiled in. mask, bias: ALL_HEADS, KV_HEADS or QUERY_HEADS, or None where there is none."""

    mask: str | None
    bias: str | None
    lowest: float  # the least finite number of the bias's type, which hides as -inf does


class QuerySide(NamedTuple):
    """Mask (uint8, 0 hides) and bias of a call: (total_q, H*, max_seqlen_k), any strides, of 64 bits."""

    mask: cute.Tensor | None
    bias: cute.Tensor | None
    factor: Float32  # of a bias: 1 / scale


@dataclass(frozen=True)
class BiasOfQueries:
    """What one thread of a consumer warpgroup adds to its rows of scores."""

    spec: QuerySideSpec
    masks: tuple  # of each row: (max_seqlen_k,); empty where there is no mask
    biases: tuple
    factor: Float32
    last: Int32  # the last key that is looked at
    column: Int32  # the thread's first
    tile_n: int

    @staticmethod
    def create(spec, rows: OutputRows, computed: int, seqlens: Seqlens, column: Int32, source: QuerySide):
        """spec: a ForwardSpec with a `query_side`; rows: the thread's, of which the first `computed` are added to.

        Rows that are no queries take the numbers of one that is, and keys behind the last those of the last: what comes
        of either is dropped, and nothing outside of a sequence is read.
        """
        kinds = spec.query_side
        tokens = [cutlass.max(cutlass.min(rows.token(r), seqlens.len_q - 1), 0) for r in range(computed)]
        q_rows = [seqlens.offset_q + token for token in tokens]
        in_group = [Int32(0)] * computed
        head_q, head_kv = rows.work.head, rows.work.head // spec.qheads_per_kvhead
        if spec.packed:
            head_q, head_kv = rows.work.head * spec.qheads_per_kvhead, rows.work.head
            in_group = [
                cutlass.min(rows.row(r) % spec.rows_per_token, spec.qheads_per_kvhead - 1) for r in range(computed)
            ]

        def of_rows(x: cute.Tensor | None, kind: str | None) -> tuple:
            if kind is None:
                return ()
            heads = [{ALL_HEADS: Int32(0), KV_HEADS: head_kv, QUERY_HEADS: head_q + i}[kind] for i in in_group]
            return tuple(x[row, head, None] for row, head in zip(q_rows, heads, strict=True))

        masks, biases = of_rows(source.mask, kinds.mask), of_rows(source.bias, kinds.bias)
        columns = cute.size((*masks, *biases)[0])
        last = cutlass.max(cutlass.min(seqlens.len_k, columns) - 1, 0)
        return BiasOfQueries(kinds, masks, biases, source.factor, last, column, spec.tile.tile_n)

    @property
    def rows(self) -> int:
        return max(len(self.masks), len(self.biases))

    @cute.jit
    def add(self, scores: cute.Tensor, kv_tile: Int32):
        """scores: flat accumulator registers, element 4j + 2r + c is row r, column 8j + c."""
        first = cutlass.max(kv_tile, 0) * self.tile_n + self.column
        for j in cutlass.range_constexpr(cute.size(scores) // 4):
            # A branch a group of columns: without any, all loads are begun at once, and what they find is spilled.
            if first + 8 * j <= self.last:
                for c in cutlass.range_constexpr(2):
                    key = cutlass.min(first + 8 * j + c, self.last)
                    for r in cutlass.range_constexpr(self.rows):
                        bias, i = self._value(r, key), 4 * j + 2 * r + c
                        # Selected, and not only added: what is masked may be NaN.
                        scores[i] = -Float32.inf if bias == -Float32.inf else scores[i] + bias

    @cute.jit
    def _value(self, r: cutlass.Constexpr, key: Int32) -> Float32:
        value = Float32(0.0)
        if const_expr(self.spec.bias is not None):
            given = self.biases[r][key].to(Float32)
            value = -Float32.inf if given <= self.spec.lowest else given * self.factor
        if const_expr(self.spec.mask is not None):
            value = value if self.masks[r][key] != 0 else -Float32.inf
        return value
