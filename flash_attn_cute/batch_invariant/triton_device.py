"""What the Triton attention kernels share: finding a tile's sequence, scores, visibility, rounding.

A tile belongs to one sequence. Which one follows from the tile's number and cu_seqlens alone, so a grid is sized by the
rows that there are, without reading a length on the host.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def find_sequence(tile, cu_ptr, batch, ROWS: tl.constexpr):
    """The number of the sequence that a tile of ROWS rows belongs to, from 1; 0 and batch + 1 are the padding before
    the first sequence and behind the last. Sequence i has tiles from cu[i - 1] // ROWS + i on."""
    low = tile * 0
    high = batch + 1
    while low < high:
        middle = (low + high + 1) // 2
        is_behind = tl.load(cu_ptr + middle - 1) // ROWS + middle <= tile
        low = tl.where(is_behind, middle, low)
        high = tl.where(is_behind, high, middle - 1)
    return low


@triton.jit
def locate(tile, cu_ptr, batch, rows, PACKED: tl.constexpr, ROWS: tl.constexpr):
    """(sequence or -1 for padding, its first row in memory, its rows, the tile's first row among them).

    rows: of the packed tensor, or of each sequence of a batched one; then the first row counts within the sequence's
    own block of memory and is 0.
    """
    if PACKED:
        number = find_sequence(tile, cu_ptr, batch, ROWS)
        start = tl.load(cu_ptr + number - 1, mask=number > 0, other=0)
        stop = tl.load(cu_ptr + number, mask=number <= batch, other=rows)
        sequence = tl.where(number <= batch, number - 1, -1)
        first = (tile - start // ROWS - number) * ROWS
        span = stop - start
    else:
        tiles = tl.cdiv(rows, ROWS)
        sequence = tile // tiles
        start = sequence * 0
        first = (tile - sequence * tiles) * ROWS
        span = rows
    return sequence, start, span, first


@triton.jit
def length_in_use(sequence, span, used_ptr, HAS_USED: tl.constexpr):
    """Rows of a sequence that are used: none of padding."""
    if HAS_USED:
        used = tl.load(used_ptr + sequence, mask=sequence >= 0, other=0)
        span = tl.maximum(tl.minimum(span, used), 0)
    return tl.where(sequence >= 0, span, 0)


@triton.jit
def key_extent(sequence, cu_ptr, used_ptr, rows, PACKED: tl.constexpr, HAS_USED: tl.constexpr):
    """(first row, keys in use) of the sequence that a query tile belongs to."""
    is_real = sequence >= 0
    start = sequence * 0
    span = rows
    if PACKED:
        start = tl.load(cu_ptr + sequence, mask=is_real, other=0)
        span = tl.load(cu_ptr + sequence + 1, mask=is_real, other=0) - start
    return start, length_in_use(sequence, span, used_ptr, HAS_USED)


@triton.jit
def product(a, b, accumulator, INTERPRETED: tl.constexpr):
    """a b + accumulator in fp32, never in TF32."""
    if INTERPRETED:  # its dot takes bf16 for the integers that hold it
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 to the nearest of a narrower type, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # its conversion truncates
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tanh(x):
    """Absolute error about that of an fp32 1."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    magnitude = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def scores(qk, score_factor, SOFTCAP: tl.constexpr, FACTOR: tl.constexpr):
    """Scores of products, up to the positive factor that turns them into powers of two: their maximum is where the
    product's is. With softcap, tanh of the product times score_factor; without, FACTOR (1, -1, 0) times the product."""
    if SOFTCAP:
        qk = tanh(qk * score_factor)
    elif FACTOR != 1:
        qk = qk * FACTOR
    return qk


@triton.jit
def sees(position, key, length_k, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Whether queries see keys; position: of the key that a query is aligned with."""
    visible = key < length_k
    if HAS_RIGHT:
        visible = visible & (key <= position + right)
    if HAS_LEFT:
        visible = visible & (key >= position - left)
    return visible


@triton.jit
def key_blocks(
    first, last, offset, length_k, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, N: tl.constexpr
):
    """Blocks of N keys, counted from key 0 of the sequence, that queries first to last see any of: [begin, stop), all
    of whose keys every one of them sees in [full_begin, full_stop)."""
    least = first * 0
    most = length_k
    all_from = first * 0
    all_to = length_k
    if HAS_LEFT:
        least = tl.maximum(first + offset - left, 0)
        all_from = tl.maximum(last + offset - left, 0)
    if HAS_RIGHT:
        most = tl.maximum(tl.minimum(most, last + offset + right + 1), 0)
        all_to = tl.maximum(tl.minimum(all_to, first + offset + right + 1), 0)
    begin = least // N
    stop = tl.where(last >= first, tl.maximum(tl.cdiv(most, N), begin), begin)
    full_begin = tl.minimum(tl.maximum(tl.cdiv(all_from, N), begin), stop)
    full_stop = tl.minimum(tl.maximum(all_to // N, full_begin), stop)
    return begin, full_begin, full_stop, stop


@triton.jit
def key_row_offsets(
    key,
    start,
    sequence,
    table_ptr,
    table_stride,
    stride_block,
    stride_row,
    length_k,
    K_PACKED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Where rows of k or v begin. Entries of the page table are read for keys in use alone."""
    if PAGE_SIZE > 0:
        entry = table_ptr + sequence.to(tl.int64) * table_stride + key // PAGE_SIZE
        page = tl.load(entry, mask=key < length_k, other=0).to(tl.int64)
        return page * stride_block + (key % PAGE_SIZE).to(tl.int64) * stride_row
    if K_PACKED:
        return (start + key).to(tl.int64) * stride_row
    return sequence.to(tl.int64) * stride_block + key.to(tl.int64) * stride_row
