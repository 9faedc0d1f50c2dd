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
from flash_attn_cute.device.output_rows import OutputRows, token_of_row
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
    """What one thread adds to the scores in its registers: `rows` rows in turn, `run` columns of each at a time.

    Element (j * rows + r) * run + c of its scores is row r, column step * j + c behind the thread's first. Rows that
    `masks` or `biases` have are added to.
    """

    spec: QuerySideSpec
    masks: tuple  # of each row: (max_seqlen_k,); empty where there is no mask
    biases: tuple
    factor: Float32
    last: Int32  # the last key that is looked at
    column: Int32  # the thread's first
    tile_n: int
    rows: int
    run: int
    step: int

    @staticmethod
    def of_accumulator(spec, rows: OutputRows, computed: int, seqlens: Seqlens, column: Int32, source: QuerySide):
        """For WGMMA accumulators. spec: a ForwardSpec with a `query_side`; rows: the thread's, of which the first
        `computed` are added to."""
        in_tile = [rows.row(r) for r in range(computed)]
        return BiasOfQueries._create(spec, rows.work, in_tile, seqlens, source, column, rows=2, run=2, step=8)

    @staticmethod
    def of_row(spec, work, row: Int32, seqlens: Seqlens, source: QuerySide):
        """For one row of a query tile, all columns of which the thread has."""
        return BiasOfQueries._create(spec, work, [row], seqlens, source, Int32(0), rows=1, run=4, step=4)

    @staticmethod
    def _create(spec, work, in_tile: list, seqlens: Seqlens, source: QuerySide, column: Int32, **places):
        """Rows that are no queries take the numbers of one that is, and keys behind the last those of the last: what
        comes of either is dropped, and nothing outside of a sequence is read."""
        kinds = spec.query_side
        tokens = [cutlass.max(cutlass.min(token_of_row(spec, work, row), seqlens.len_q - 1), 0) for row in in_tile]
        q_rows = [seqlens.offset_q + token for token in tokens]
        in_group = [Int32(0)] * len(in_tile)
        head_q, head_kv = work.head, work.head // spec.qheads_per_kvhead
        if spec.packed:
            head_q, head_kv = work.head * spec.qheads_per_kvhead, work.head
            in_group = [cutlass.min(row % spec.rows_per_token, spec.qheads_per_kvhead - 1) for row in in_tile]

        def of_rows(x: cute.Tensor | None, kind: str | None) -> tuple:
            if kind is None:
                return ()
            heads = [{ALL_HEADS: Int32(0), KV_HEADS: head_kv, QUERY_HEADS: head_q + i}[kind] for i in in_group]
            return tuple(x[row, head, None] for row, head in zip(q_rows, heads, strict=True))

        masks, biases = of_rows(source.mask, kinds.mask), of_rows(source.bias, kinds.bias)
        columns = cute.size((*masks, *biases)[0])
        last = cutlass.max(cutlass.min(seqlens.len_k, columns) - 1, 0)
        return BiasOfQueries(kinds, masks, biases, source.factor, last, column, spec.tile.tile_n, **places)

    @cute.jit
    def add(self, scores: cute.Tensor, kv_tile: Int32, column: cutlass.Constexpr = 0):
        """To scores of a KV tile, from the thread's column `column` on."""
        first = cutlass.max(kv_tile, 0) * self.tile_n + self.column + column
        for j in cutlass.range_constexpr(cute.size(scores) // (self.rows * self.run)):
            # A branch a group of columns: without any, all loads are begun at once, and what they find is spilled.
            if first + self.step * j <= self.last:
                for c in cutlass.range_constexpr(self.run):
                    key = cutlass.min(first + self.step * j + c, self.last)
                    for r in cutlass.range_constexpr(max(len(self.masks), len(self.biases))):
                        bias, i = self._value(r, key), (j * self.rows + r) * self.run + c
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
