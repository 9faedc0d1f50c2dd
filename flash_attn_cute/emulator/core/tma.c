/* The tensor memory accelerator: bulk copies between global and shared memory, plain or through a tensor map, with
 * swizzles, zero fill outside the tensor, multicast and reductions. An address is touched only where every coordinate is
 * inside the tensor, so a map may start outside memory as long as nothing there is asked for and no load is outside as a whole. */
#include "machine.h"

#include <string.h>

#define ADDRESS_WIDE 0x80000000u
enum { TMA_LOAD, TMA_STORE, TMA_REDUCE };

typedef struct {
    uint64_t base, strides[5];
    uint32_t dims[5], box[5];
    int rank, type;
    int bits, shared_bits;   /* of an element in global and in shared memory: 4 and 6 bits may be spread there, 16 to 16 bytes */
    uint32_t swizzle, shift; /* as in SharedOperand */
} TensorMap;

static TensorMap read_map(Machine *m, int32_t line, const uint32_t *words)
{
    /* 8- to 64-bit integers, halves, floats (7, flushing 8), doubles, bf16; 11: 4 bits packed, 12: 4 bits spread, 13: 6 bits spread */
    static const int sizes[16] = {8, 16, 32, 32, 64, 64, 16, 32, 32, 64, 16, 4, 4, 6, 0, 0};
    static const uint32_t swizzles[8] = {0, 0x10, 0x30, 0x70, 0, 0, 0, 0};
    TensorMap t;
    memset(&t, 0, sizeof t);
    if (!(words[2] & 2))
        machine_fault(m, FAULT_OUT_OF_BOUNDS, line, "the memory that a tensor copy takes as its tensor map holds none");
    t.base = words[0] | (uint64_t)words[1] << 32;
    t.rank = (int)(words[2] >> 4 & 7) + 1;
    t.type = (int)(words[2] >> 7 & 15);
    t.bits = sizes[t.type];
    t.shared_bits = t.type == 12 || t.type == 13 ? 8 : t.bits;
    t.swizzle = swizzles[words[2] >> 13 & 7];
    t.shift = 3;
    uint32_t atom = words[2] >> 19 & 3; /* 0: pieces of 16 bytes are moved, 1: of 32 */
    if (atom == 1 && t.swizzle == 0x70)
        t.swizzle = 0x60, t.shift = 2;
    if (!t.bits || t.rank > 5 || (words[2] >> 13 & 7) > 3 || atom > 1)
        machine_fault(m, FAULT_UNSUPPORTED, line, "tensor map of type %d, rank %d, swizzle %u", t.type, t.rank, words[2] >> 13 & 7);
    for (int d = 1; d < 5; d++)
        t.strides[d] = (words[2 + d] | (uint64_t)(words[7] >> (4 * (d - 1)) & 15) << 32) << 4;
    for (int d = 0; d < 5; d++)
        t.dims[d] = words[8 + d] + 1;
    t.box[0] = (words[13] >> 24) + 1;
    for (int d = 1; d < 5; d++)
        t.box[d] = (words[14] >> (8 * (d - 1)) & 255) + 1;
    return t;
}

static uint8_t *global_or_fault(Machine *m, AsyncOp *op, uint64_t address, uint64_t size, int write)
{
    const char *why = "";
    uint8_t *where = global_range(m, &op->warp->last_allocation, address, size, write, &why);
    if (!where)
        machine_fault(m, FAULT_OUT_OF_BOUNDS, op->in->line, "bulk %s of %llu bytes at global address 0x%llx, %s",
                      write ? "write" : "read", (unsigned long long)size, (unsigned long long)address, why);
    *(write ? &m->totals.global_store_bytes : &m->totals.global_load_bytes) += (int64_t)size;
    return where;
}

/* The race check, for the global side of a bulk copy. */
static void touch_global(Machine *m, const AsyncOp *op, uint64_t address, uint64_t size, int what)
{
    if (!m->races || !race_may_write(op->warp))
        return;
    if (what == TMA_LOAD)
        race_touch_global(m, address, size, LANE_NONE, TOUCH_ASYNC);
    else
        race_store_global(m, address, size, what == TMA_REDUCE);
}

static void touch_shared(Machine *m, Cta *cta, uint32_t offset, uint64_t size, int write)
{
    if (m->races)
        race_touch_shared(m, cta, offset, (uint32_t)size, LANE_NONE, TOUCH_ASYNC | (write ? TOUCH_WRITE : 0));
}

static void shared_bounds(Machine *m, AsyncOp *op, Cta *cta, uint32_t offset, uint64_t size)
{
    if (offset < SHARED_FIRST || offset + size > cta->shared_bytes)
        machine_fault(m, FAULT_OUT_OF_BOUNDS, op->in->line, "bulk copy of %llu bytes at shared address 0x%x, outside the CTA's memory",
                      (unsigned long long)size, offset);
}

/* Reduces `size` bytes into memory; type numbers as in the tensor map. */
static void reduce_bytes(uint8_t *to, const uint8_t *from, uint64_t size, int element, int type, uint32_t what)
{
    uint32_t kind = type == 6 ? 3 : type == 10 ? 4 : type == 7 || type == 8 || type == 9 ? 2 : type == 3 || type == 5 ? 1 : 0;
    for (uint64_t at = 0; at < size; at += (uint64_t)element) {
        uint64_t old = 0, value = 0;
        memcpy(&old, to + at, (size_t)element);
        memcpy(&value, from + at, (size_t)element);
        uint64_t out = atomic_combine(what, kind, element, old, value, 0);
        memcpy(to + at, &out, (size_t)element);
    }
}

/* Sixteen numbers of less than a byte lie at the start of sixteen bytes; the rest of those is padding. */
static void spread(uint8_t *shared, const uint8_t *memory, const TensorMap *t)
{
    size_t packed = (size_t)(16 * t->bits / 8);
    memcpy(shared, memory, packed);
    memset(shared + packed, 0, 16 - packed);
}

/* One row of a box between global memory and swizzled shared memory, in the 16-byte pieces that the swizzle moves. `skip`, `bytes` and
 * `row_bytes` are of shared memory. */
static void copy_row(Machine *m, AsyncOp *op, const TensorMap *t, Cta *cta, uint32_t offset, uint64_t global, int64_t skip, int64_t bytes,
                     int64_t row_bytes, int what)
{
    int load = what == TMA_LOAD;
    int spreads = t->shared_bits != t->bits;
    uint8_t *memory = bytes > 0 ? global_or_fault(m, op, global, (uint64_t)(bytes * t->bits / t->shared_bits), !load) : NULL;
    if (memory)
        touch_global(m, op, global, (uint64_t)(bytes * t->bits / t->shared_bits), what);
    for (int64_t at = 0; at < row_bytes;) {
        uint32_t address = offset + (uint32_t)at;
        int64_t piece = 16 - (address & 15);
        if (piece > row_bytes - at)
            piece = row_bytes - at;
        uint32_t physical = address ^ ((address >> t->shift) & t->swizzle);
        uint8_t *shared = cta->shared + physical;
        int64_t from = at > skip ? at : skip, to = at + piece < skip + bytes ? at + piece : skip + bytes;
        if (load) {
            touch_shared(m, cta, physical, (uint64_t)piece, 1);
            if (to - from < piece)
                memset(shared, 0, (size_t)piece);
            if (to > from && spreads)
                spread(shared, memory + (from - skip) * t->bits / t->shared_bits, t);
            else if (to > from)
                memcpy(shared + (from - at), memory + (from - skip), (size_t)(to - from));
            memset(cta->shadow + physical, 1, (size_t)piece);
        } else if (to > from) {
            shared_check_written(m, op->in->line, cta, physical + (uint32_t)(from - at), (uint32_t)(to - from), "read by a bulk store");
            touch_shared(m, cta, physical + (uint32_t)(from - at), (uint64_t)(to - from), 0);
            if (what == TMA_STORE)
                memcpy(memory + (from - skip), shared + (from - at), (size_t)(to - from));
            else
                reduce_bytes(memory + (from - skip), shared + (from - at), (uint64_t)(to - from), t->bits / 8, t->type,
                             op->in->sub >> 8 & 15);
        }
        at += piece;
    }
}

/* An H200 answers a load whose box is outside the tensor as a whole with cudaErrorIllegalAddress where nothing lies at the
 * tensor's first address. csrc_notes/emulator.md has the measurement. */
static void check_start(Machine *m, AsyncOp *op, const TensorMap *t)
{
    const char *why = "";
    if (!global_range(m, &op->warp->last_allocation, t->base, 1, 0, &why))
        machine_fault(m, FAULT_OUT_OF_BOUNDS, op->in->line,
                      "load of a box outside its tensor, whose first address 0x%llx, which is looked up all the same, is %s",
                      (unsigned long long)t->base, why);
}

static void copy_box(Machine *m, AsyncOp *op, const TensorMap *t, Cta *cta, uint32_t offset, const int32_t *coordinates, int what)
{
    int64_t row_bytes = (int64_t)t->box[0] * t->shared_bits / 8, rows = 1;
    for (int d = 1; d < t->rank; d++)
        rows *= t->box[d];
    shared_bounds(m, op, cta, offset, (uint64_t)(rows * row_bytes));
    /* In bounds along the first dimension: from `first`, `count` elements. */
    int64_t first = coordinates[0] < 0 ? -(int64_t)coordinates[0] : 0;
    int64_t count = (int64_t)t->dims[0] - coordinates[0];
    count = (count > t->box[0] ? t->box[0] : count) - first;
    int touched = 0;
    for (int64_t row = 0; row < rows; row++) {
        int64_t rest = row;
        int inside = count > 0;
        uint64_t global = t->base + (uint64_t)((coordinates[0] + first) * t->bits / 8);
        for (int d = 1; d < t->rank; d++) {
            int64_t at = coordinates[d] + rest % t->box[d];
            rest /= t->box[d];
            inside = inside && at >= 0 && at < (int64_t)t->dims[d];
            global += (uint64_t)at * t->strides[d];
        }
        touched |= inside;
        copy_row(m, op, t, cta, offset + (uint32_t)(row * row_bytes), global, first * t->shared_bits / 8,
                 inside ? count * t->shared_bits / 8 : 0, row_bytes, what);
    }
    if (!touched && what == TMA_LOAD)
        check_start(m, op, t);
}

/* Whose barrier a copy into CTA `rank` completes on: beside the data, or in the pair's CTA that the address names. */
static Cta *barrier_owner(const AsyncOp *op, uint32_t rank, uint32_t barrier, int pair)
{
    return &op->cluster->ctas[pair ? (rank & ~1u) | (barrier >> 24 & 1) : rank];
}

static void load_box(Machine *m, AsyncOp *op, const TensorMap *t, Cta *to, Cta *owner, const int32_t *coordinates, int32_t bytes)
{
    uint32_t barrier = (uint32_t)op->args[1] & SHARED_OFFSET_MASK;
    if (m->races)
        race_on_barrier(m, owner, barrier);
    copy_box(m, op, t, to, (uint32_t)op->args[0] & SHARED_OFFSET_MASK, coordinates, TMA_LOAD);
    mbarrier_complete_tx(m, op->in->line, owner, barrier, bytes);
}

/* An H200 answers either with cudaErrorIllegalInstruction, on loads and on stores, whoever encoded the map: a box may leave the
 * tensor at its far ends alone, and begins at a multiple of 16 bytes. csrc_notes/emulator.md has the measurement. */
static void check_coordinates(Machine *m, AsyncOp *op, const TensorMap *t, const int32_t *coordinates)
{
    for (int d = 0; d < t->rank; d++)
        if (coordinates[d] < 0)
            machine_fault(m, FAULT_OUT_OF_BOUNDS, op->in->line, "tensor copy from coordinate %d of dimension %d: none may be negative",
                          coordinates[d], d);
    if ((int64_t)coordinates[0] * t->bits % 128)
        machine_fault(m, FAULT_MISALIGNED, op->in->line,
                      "tensor copy from coordinate %d of dimension 0, elements of %d bits: not a multiple of 16 bytes", coordinates[0],
                      t->bits);
}

/* args: shared address, barrier, CTA mask or 0. words: the map's 16, then coordinates */
static void run_tensor(Machine *m, AsyncOp *op)
{
    TensorMap t = read_map(m, op->in->line, op->words);
    const int32_t *coordinates = (const int32_t *)op->words + 16;
    int what = (int)op->in->sub & 3, pair = (op->in->sub >> 12 & 1) != 0;
    uint32_t shared = (uint32_t)op->args[0], barrier = (uint32_t)op->args[1], offset = shared & SHARED_OFFSET_MASK;
    int64_t bytes = t.bits; /* what a barrier counts: of spread numbers, without the padding */
    if (offset & (t.swizzle ? 127 : 15))
        machine_fault(m, FAULT_MISALIGNED, op->in->line, "tensor copy at shared address 0x%x, not aligned to %d bytes", offset,
                      t.swizzle ? 128 : 16);
    check_coordinates(m, op, &t, coordinates);
    for (int d = 0; d < t.rank; d++)
        bytes *= t.box[d];
    bytes /= 8;
    if (what != TMA_LOAD && t.shared_bits != t.bits)
        machine_fault(m, FAULT_UNSUPPORTED, op->in->line, "a store through a tensor map of type %d, which spreads its numbers", t.type);
    if (what != TMA_LOAD) {
        copy_box(m, op, &t, &op->cluster->ctas[shared >> 24], offset, coordinates, what);
        *(what == TMA_STORE ? &m->totals.tma_store_bytes : &m->totals.tma_reduce_bytes) += bytes;
        return;
    }
    if (!op->args[2]) {
        Cta *owner = barrier_owner(op, (pair ? shared : barrier) >> 24, barrier, pair);
        load_box(m, op, &t, &op->cluster->ctas[shared >> 24], owner, coordinates, (int32_t)bytes);
    } else {
        int64_t before = m->totals.global_load_bytes, once = 0; /* a multicast reads global memory once */
        for (uint32_t rank = 0; rank < (uint32_t)op->cluster->size; rank++)
            if (op->args[2] >> rank & 1) {
                load_box(m, op, &t, &op->cluster->ctas[rank], barrier_owner(op, rank, barrier, pair), coordinates, (int32_t)bytes);
                once = once ? once : m->totals.global_load_bytes - before;
            }
        m->totals.global_load_bytes = before + once;
    }
    m->totals.tma_load_bytes += bytes;
}

static uint32_t shared_operand(Warp *w, const Instr *in, int operand, int lane, int wide, int64_t offset)
{
    return (uint32_t)((wide ? R64(operand)[lane] : R32(operand)[lane]) + (uint64_t)offset);
}

/* r: shared address, map, barrier (-1: bulk group), CTA mask (-1). imm, target: offsets of shared address and barrier.
 * pool: coordinates. sub: what | rank << 4 | reduction << 8 | pair << 12 | barrier address 64-bit << 13 | shared 64-bit: top bit */
void op_tma_tensor(Warp *w, const Instr *in, uint32_t mask)
{
    AsyncOp before = {.warp = NULL};
    for (uint32_t left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left), what = (int)in->sub & 3, rank = (int)(in->sub >> 4) & 15;
        AsyncOp op = {.kind = what == TMA_LOAD ? ASYNC_TMA_LOAD : ASYNC_TMA_STORE, .cluster = w->cta->cluster, .warp = w, .in = in,
                      .lane = (uint32_t)i, .run = run_tensor};
        op.args[0] = shared_operand(w, in, 0, i, (in->sub & ADDRESS_WIDE) != 0, in->imm);
        if (in->r[2] >= 0)
            op.args[1] = shared_operand(w, in, 2, i, in->sub >> 13 & 1, in->target);
        if (in->r[3] >= 0)
            op.args[2] = R32(3)[i];
        uint64_t map = R64(1)[i];
        const uint8_t *bytes = generic_span(w, in, i, map, 64, 0);
        if (map & 63)
            fault(w, in, FAULT_MISALIGNED, "tensor map at 0x%llx is not aligned to 64 bytes", (unsigned long long)map);
        memcpy(op.words, bytes, 64);
        if ((int)(op.words[2] >> 4 & 7) + 1 != rank)
            fault(w, in, FAULT_OUT_OF_BOUNDS, "a %dd copy with a tensor map of rank %u", rank, (op.words[2] >> 4 & 7) + 1);
        shared_owner(w, in, (uint32_t)op.args[0]);
        for (int d = 0; d < rank; d++)
            op.words[16 + d] = lanes32(w, POOL(d))[i];
        /* A store that all lanes ask for alike is one: ptxas makes it an instruction of the whole warp (UTMASTG). */
        if (what == TMA_STORE && before.warp && op.args[0] == before.args[0] && !memcmp(op.words, before.words, sizeof op.words))
            continue;
        before = op;
        async_issue(w->machine, &op);
    }
}

enum { BULK_GLOBAL_TO_SHARED, BULK_SHARED_TO_GLOBAL, BULK_SHARED_TO_SHARED };

/* args: destination, source, size, barrier, mask */
static void run_bulk(Machine *m, AsyncOp *op)
{
    uint64_t size = op->args[2];
    uint32_t way = op->in->sub & 3, barrier = (uint32_t)op->args[3];
    Cluster *cluster = op->cluster;
    if ((op->args[0] | op->args[1] | size) & 15)
        machine_fault(m, FAULT_MISALIGNED, op->in->line, "bulk copy of %llu bytes from 0x%llx to 0x%llx: all must be multiples of 16",
                      (unsigned long long)size, (unsigned long long)op->args[1], (unsigned long long)op->args[0]);
    if (way == BULK_SHARED_TO_GLOBAL) {
        Cta *cta = &cluster->ctas[op->args[1] >> 24 & 255];
        uint32_t offset = (uint32_t)op->args[1] & SHARED_OFFSET_MASK;
        shared_bounds(m, op, cta, offset, size);
        shared_check_written(m, op->in->line, cta, offset, (uint32_t)size, "read by a bulk store");
        uint8_t *to = global_or_fault(m, op, op->args[0], size, 1);
        touch_shared(m, cta, offset, size, 0);
        touch_global(m, op, op->args[0], size, op->in->sub >> 4 & 1 ? TMA_REDUCE : TMA_STORE);
        if (op->in->sub >> 4 & 1)
            reduce_bytes(to, cta->shared + offset, size, 1 << (op->in->sub >> 12 & 3), (int)(op->in->sub >> 16 & 15), op->in->sub >> 8 & 15);
        else
            memcpy(to, cta->shared + offset, size);
        *(op->in->sub >> 4 & 1 ? &m->totals.tma_reduce_bytes : &m->totals.tma_store_bytes) += (int64_t)size;
        return;
    }
    const uint8_t *from;
    Cta *source = NULL;
    if (way == BULK_SHARED_TO_SHARED) {
        source = &cluster->ctas[op->args[1] >> 24 & 255];
        shared_bounds(m, op, source, (uint32_t)op->args[1] & SHARED_OFFSET_MASK, size);
        from = source->shared + (op->args[1] & SHARED_OFFSET_MASK);
    } else {
        from = global_or_fault(m, op, op->args[1], size, 0);
        m->totals.tma_load_bytes += (int64_t)size;
    }
    uint64_t ranks = op->args[4] ? op->args[4] : 1ull << (op->args[0] >> 24 & 255);
    for (uint32_t rank = 0; rank < (uint32_t)cluster->size; rank++) {
        if (!(ranks >> rank & 1))
            continue;
        Cta *cta = &cluster->ctas[rank];
        uint32_t offset = (uint32_t)op->args[0] & SHARED_OFFSET_MASK;
        shared_bounds(m, op, cta, offset, size);
        Cta *owner = op->args[4] ? cta : &cluster->ctas[barrier >> 24 & 255];
        if (m->races) {
            race_on_barrier(m, owner, barrier & SHARED_OFFSET_MASK);
            if (source)
                touch_shared(m, source, (uint32_t)op->args[1] & SHARED_OFFSET_MASK, size, 0);
            else
                touch_global(m, op, op->args[1], size, TMA_LOAD);
            touch_shared(m, cta, offset, size, 1);
        }
        if (op->in->sub >> 4 & 1)
            reduce_bytes(cta->shared + offset, from, size, 1 << (op->in->sub >> 12 & 3), (int)(op->in->sub >> 16 & 15), op->in->sub >> 8 & 15);
        else
            memmove(cta->shared + offset, from, size);
        shared_mark(cta, offset, (uint32_t)size);
        mbarrier_complete_tx(m, op->in->line, owner, barrier & SHARED_OFFSET_MASK, (int32_t)size);
    }
}

/* r: destination, source, size, barrier (-1), mask (-1); pool: 64-bit flags and offsets of destination, source and barrier.
 * sub: way | reduce << 4 | operation << 8 | log2(element) << 12 | type << 16 */
void op_tma_bulk(Warp *w, const Instr *in, uint32_t mask)
{
    for (uint32_t left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left), way = (int)in->sub & 3;
        AsyncOp op = {.kind = way == BULK_SHARED_TO_GLOBAL ? ASYNC_TMA_STORE : ASYNC_TMA_LOAD, .cluster = w->cta->cluster, .warp = w,
                      .in = in, .lane = (uint32_t)i, .run = run_bulk};
        for (int k = 0; k < 2; k++) {
            op.args[k] = (POOL(2 * k) ? R64(k)[i] : R32(k)[i]) + (uint64_t)(int64_t)POOL(2 * k + 1);
            if (way == BULK_SHARED_TO_SHARED || k == (way == BULK_SHARED_TO_GLOBAL))
                op.args[k] = (uint32_t)op.args[k];
        }
        op.args[2] = R32(2)[i];
        if (in->r[3] >= 0)
            op.args[3] = (uint32_t)((POOL(4) ? R64(3)[i] : R32(3)[i]) + (uint64_t)(int64_t)POOL(5));
        if (in->r[4] >= 0)
            op.args[4] = R32(4)[i] & 0xffff;
        if (op.args[2])
            async_issue(w->machine, &op);
    }
}
