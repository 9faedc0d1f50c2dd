/* tcgen05: tensor memory, and the products that accumulate in it.
 *
 * Tensor memory is 128 lanes of 512 columns of 32 bits for each CTA; an address is lane << 16 | column. Products, copies into
 * it and commits run in the order of one stream a CTA pair. Loads and stores of registers happen where they are issued. */
#include "machine.h"

#include <string.h>

#define ADDRESS_WIDE 0x80000000u
#define MAX_N 256
#define MAX_K 64

static uint32_t *cell(Cta *cta, uint32_t lane, uint32_t column) { return cta->tmem + (size_t)lane * TMEM_COLUMNS + column; }

static const void *stream_of(const Cta *cta) { return &cta->cluster->ctas[cta->rank & ~1]; }

static void check_columns(Machine *m, int32_t line, const Cta *cta, uint32_t column, uint32_t count)
{
    if (column + count > TMEM_COLUMNS)
        machine_fault(m, FAULT_OUT_OF_BOUNDS, line, "tensor memory columns %u to %u, of %d", column, column + count - 1, TMEM_COLUMNS);
    for (uint32_t c = column; c < column + count && (m->checks & CHECK_BOUNDS); c++)
        if (!cta->tmem_owner[c])
            machine_fault(m, FAULT_OUT_OF_BOUNDS, line, "tensor memory column %u of CTA (%u,%u,%u) is not allocated", c, cta->id[0],
                          cta->id[1], cta->id[2]);
}

static void check_written(Machine *m, int32_t line, Cta *cta, uint32_t lane, uint32_t column, uint32_t count)
{
    if (m->races && !(lane & 15)) /* rows come in sixteens */
        race_touch_tensor(m, cta, lane, column, count, 0);
    if (!(m->checks & CHECK_UNINITIALISED))
        return;
    const uint8_t *first = cta->tmem_written + (size_t)lane * TMEM_COLUMNS + column, *missing = memchr(first, 0, count);
    if (missing)
        machine_fault(m, FAULT_UNINITIALISED, line, "read of tensor memory lane %u column %u of CTA (%u,%u,%u), which nobody wrote", lane,
                      column + (uint32_t)(missing - first), cta->id[0], cta->id[1], cta->id[2]);
}

const uint32_t *tmem_read(Machine *m, int32_t line, Cta *cta, uint32_t lane, uint32_t column, uint32_t count)
{
    check_columns(m, line, cta, column, count);
    check_written(m, line, cta, lane, column, count);
    return cell(cta, lane, column);
}

static void mark_written(Cta *cta, uint32_t lane, uint32_t column, uint32_t count)
{
    if (cta->machine->races && !(lane & 15))
        race_touch_tensor(cta->machine, cta, lane, column, count, TOUCH_WRITE);
    memset(cta->tmem_written + (size_t)lane * TMEM_COLUMNS + column, 1, count);
}

/* r: shared address, columns. Waits for room, as the hardware does. */
void op_tcgen05_alloc(Warp *w, const Instr *in, uint32_t mask)
{
    if (!require_lanes(w, w->live))
        return;
    int i = __builtin_ctz(mask);
    Cta *cta = w->cta;
    uint32_t count = R32(1)[i], address = (uint32_t)((in->sub & ADDRESS_WIDE ? R64(0)[i] : R32(0)[i]) + (uint64_t)in->imm);
    if (count < 32 || count > TMEM_COLUMNS || (count & (count - 1)))
        fault(w, in, FAULT_OUT_OF_BOUNDS, "%u tensor memory columns: takes a power of two from 32 to 512", count);
    if (cta->tmem_permit_given_up)
        fault(w, in, FAULT_BARRIER, "tensor memory is allocated after the permit to do so was given up");
    for (uint32_t first = 0; first + count <= TMEM_COLUMNS; first += count) {
        uint32_t used = 0;
        for (uint32_t c = 0; c < count; c++)
            used |= cta->tmem_owner[first + c];
        if (used)
            continue;
        memset(cta->tmem_owner + first, (int)(first / 32 + 1), count);
        memcpy(shared_write(w, in, address, 4), &first, 4);
        if (w->machine->races) {
            race_take_columns(cta, first, count);
            race_begin_warp(w, in, mask);
            race_touch(w, SHARED_WINDOW | address, 4, LANE_WARP, TOUCH_WRITE);
        }
        w->machine->progress++;
        return;
    }
    warp_retry(w);
    w->event = EVENT_YIELD;
}

void op_tcgen05_dealloc(Warp *w, const Instr *in, uint32_t mask)
{
    if (!require_lanes(w, w->live))
        return;
    int i = __builtin_ctz(mask);
    uint32_t first = R32(0)[i] & 0xffff, count = R32(1)[i];
    check_columns(w->machine, in->line, w->cta, first, count);
    for (uint32_t c = first; c < first + count; c++)
        if (w->cta->tmem_owner[c] != first / 32 + 1)
            fault(w, in, FAULT_OUT_OF_BOUNDS, "columns %u to %u were not allocated together", first, first + count - 1);
    if (w->machine->races)
        race_free_columns(w, in, first, count);
    memset(w->cta->tmem_owner + first, 0, count);
    for (uint32_t lane = 0; lane < TMEM_LANES; lane++)
        memset(w->cta->tmem_written + (size_t)lane * TMEM_COLUMNS + first, 0, count);
    w->machine->progress++;
}

void op_tcgen05_relinquish(Warp *w, const Instr *in, uint32_t mask)
{
    UNUSED(in), UNUSED(mask);
    w->cta->tmem_permit_given_up = 1;
}

/* Where register r of a thread lies. shape: 0 32x32b, 1 16x64b, 2 16x128b, 3 16x256b, 4 16x32bx2 */
static void place(uint32_t shape, int thread, int r, uint32_t split, uint32_t *lane, uint32_t *column)
{
    uint32_t t = (uint32_t)thread, n = (uint32_t)r;
    switch (shape) {
    case 0: *lane = t, *column = n; break;
    case 1: *lane = t / 4 + 8 * (t & 1), *column = 2 * n + (t >> 1 & 1); break;
    case 2: *lane = t / 4 + 8 * (n & 1), *column = 4 * (n >> 1) + (t & 3); break;
    case 3: *lane = t / 4 + 8 * (n >> 1 & 1), *column = 8 * (n >> 2) + 2 * (t & 3) + (n & 1); break;
    default: *lane = t & 15, *column = n + (t >> 4) * split; break;
    }
}

/* r: address. pool: registers. sub: shape | packed << 4 | registers << 8; imm: the second half's distance */
static void move_registers(Warp *w, const Instr *in, uint32_t mask, int loading)
{
    if (!require_lanes(w, FULL_MASK))
        return;
    uint32_t shape = in->sub & 15, packed = in->sub >> 4 & 1, count = in->sub >> 8 & 255;
    uint32_t base = R32(0)[__builtin_ctz(mask)] + (uint32_t)in->target, base_lane = base >> 16, base_column = base & 0xffff;
    Cta *cta = w->cta;
    Machine *m = w->machine;
    uint32_t first = 32 * ((uint32_t)w->index & 3), high = 0;
    if (base_lane < 32) /* programs leave the warp's part out: each reaches its own quarter only, so nothing else can be meant */
        base_lane += first;
    if (base_lane < first || base_lane + (shape ? 16 : 32) > first + 32)
        fault(w, in, FAULT_OUT_OF_BOUNDS, "tensor memory lane %u: warp %d reaches lanes %u to %u", base_lane, w->index, first, first + 31);
    for (int r = 0; r < (int)count; r++)
        for (int thread = 0; thread < LANES; thread += 3) {
            uint32_t lane, column;
            place(shape, thread, r, (uint32_t)in->imm, &lane, &column);
            high = column > high ? column : high;
        }
    check_columns(m, in->line, cta, base_column, (high + 1) << packed);
    if (m->races)
        race_begin_tensor(w, in, loading);
    for (int r = 0; r < (int)count; r++) {
        uint32_t *registers = lanes32(w, POOL(r));
        for (int thread = 0; thread < LANES; thread++) {
            uint32_t lane, column;
            place(shape, thread, r, (uint32_t)in->imm, &lane, &column);
            lane += base_lane;
            column = base_column + (packed ? 2 * column : column);
            uint32_t *at = cell(cta, lane, column);
            if (loading) {
                check_written(m, in->line, cta, lane, column, 1 + packed);
                registers[thread] = packed ? (at[0] & 0xffff) | at[1] << 16 : at[0];
            } else {
                at[0] = packed ? registers[thread] & 0xffff : registers[thread];
                if (packed)
                    at[1] = registers[thread] >> 16;
                mark_written(cta, lane, column, 1 + packed);
            }
        }
    }
    m->progress += !loading;
    if (m->races && loading)
        race_loaded_registers(w, in);
}

void op_tcgen05_ld(Warp *w, const Instr *in, uint32_t mask) { move_registers(w, in, mask, 1); }
void op_tcgen05_st(Warp *w, const Instr *in, uint32_t mask) { move_registers(w, in, mask, 0); }

/* Arrives on a barrier, once what was issued before is complete. args: address, CTA mask or 0 */
static void run_commit(Machine *m, AsyncOp *op)
{
    uint32_t address = (uint32_t)op->args[0];
    uint64_t ranks = op->args[1] ? op->args[1] : 1ull << (address >> 24);
    for (uint32_t rank = 0; rank < (uint32_t)op->cluster->size; rank++)
        if (ranks >> rank & 1) {
            if (m->races)
                race_bring(m, op, &op->cluster->ctas[rank], address & SHARED_OFFSET_MASK);
            mbarrier_arrive(m, op->in->line, &op->cluster->ctas[rank], address & SHARED_OFFSET_MASK, 1);
        }
}

/* r: address, CTA mask (-1) */
void op_tcgen05_commit(Warp *w, const Instr *in, uint32_t mask)
{
    for (uint32_t left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        AsyncOp op = {.kind = ASYNC_TCGEN05, .stream = stream_of(w->cta), .cluster = w->cta->cluster, .warp = w, .in = in,
                      .lane = (uint32_t)i, .run = run_commit};
        op.args[0] = (uint32_t)((in->sub & ADDRESS_WIDE ? R64(0)[i] : R32(0)[i]) + (uint64_t)in->imm);
        op.args[1] = in->r[1] >= 0 ? R32(1)[i] & 0xffff : 0;
        async_issue(w->machine, &op);
    }
}

static SharedOperand describe(Machine *m, int32_t line, uint64_t d, int format, int mn_major)
{
    static const uint32_t widths[8] = {16, 0, 128, 0, 64, 0, 32, 0}, swizzles[8] = {0, 0, 0x70, 0, 0x30, 0, 0x10, 0};
    SharedOperand o = {.start = (uint32_t)(d & 0x3fff) << 4, .lbo = (uint32_t)(d >> 16 & 0x3fff) << 4,
                       .sbo = (uint32_t)(d >> 32 & 0x3fff) << 4, .width = widths[d >> 61], .swizzle = swizzles[d >> 61],
                       .shift = 3, .group = 8, .mn_major = mn_major, .format = format};
    if (d >> 61 == 1) /* 128 bytes in pieces of 32: atoms of four rows, for tf32 that is not K-major */
        o.width = 128, o.swizzle = 0x60, o.shift = 2, o.group = 4;
    if (!o.width)
        machine_fault(m, FAULT_UNSUPPORTED, line, "shared memory descriptor of layout %d", (int)(d >> 61));
    return o;
}

static float a_rows[TMEM_LANES * MAX_K], b_rows[MAX_K * MAX_N];

/* Rows of a from tensor memory: packed to 32-bit columns. */
static void rows_from_tmem(Machine *m, int32_t line, Cta *cta, uint32_t address, int format, uint32_t lane, int rows, float *out)
{
    uint32_t column = address & 0xffff;
    check_columns(m, line, cta, column, 8);
    for (int row = 0; row < rows; row++) {
        check_written(m, line, cta, lane + (uint32_t)row, column, 8);
        const uint8_t *bytes = (const uint8_t *)cell(cta, lane + (uint32_t)row, column);
        if (format > FORMAT_E2M1_PACKED) /* tensor memory has a byte for each */
            decode_bytes(out + row * MAX_K, bytes, 32, format);
        else
            decode_row(out + row * MAX_K, bytes, format_elements(format), format);
    }
}

/* One block of rows of d: lanes from `lane`, `columns` of b from `from`. */
static void accumulate(Machine *m, int32_t line, Cta *cta, uint32_t lane, uint32_t column, const float *a, int rows, const float *b, int n,
                       int k, int keep, int type)
{
    int half = type == 0;
    if (type == 2) { /* one instruction's sum of 8-bit products is exact in a float; the running sum may not be */
        static float sums[MAX_N];
        for (int row = 0; row < rows; row++) {
            memset(sums, 0, sizeof sums);
            matmul_rows(sums, MAX_N, a + row * MAX_K, MAX_K, b, MAX_N, 1, n, k);
            int32_t *d = (int32_t *)cell(cta, lane + (uint32_t)row, column);
            if (keep)
                check_written(m, line, cta, lane + (uint32_t)row, column, (uint32_t)n);
            for (int c = 0; c < n; c++)
                d[c] = (keep ? d[c] : 0) + (int32_t)sums[c];
            mark_written(cta, lane + (uint32_t)row, column, (uint32_t)n);
        }
        return;
    }
    for (int row = 0; row < rows; row++) {
        uint32_t *d = cell(cta, lane + (uint32_t)row, column);
        if (!keep)
            memset(d, 0, sizeof(uint32_t) * (size_t)n);
        else
            check_written(m, line, cta, lane + (uint32_t)row, column, (uint32_t)n);
        for (int c = 0; half && keep && c < n; c++)
            d[c] = bits_of(half_to_float((uint16_t)d[c]));
        mark_written(cta, lane + (uint32_t)row, column, (uint32_t)n);
    }
    matmul_rows((float *)cell(cta, lane, column), TMEM_COLUMNS, a, MAX_K, b, MAX_N, rows, n, k);
    for (int row = 0; half && row < rows; row++)
        for (int c = 0; c < n; c++) {
            uint32_t *d = cell(cta, lane + (uint32_t)row, column) + c;
            *d = float_to_half(float_of(*d));
        }
}

static float b_scaled[MAX_K * MAX_N];

/* b with the scales that a CTA holds of it. Folded, the lanes from 64 on multiply the second half of its columns, with their own. */
static void scaled_b(Machine *m, int32_t line, Cta *cta, const ScaleVector *scales, int n, int k, int folded)
{
    memcpy(b_scaled, b_rows, sizeof(float) * MAX_N * (size_t)k);
    for (int part = 0; part < (folded ? 2 : 1); part++)
        apply_scales(m, line, cta, scales, 64 * (uint32_t)part, folded ? n / 2 : n, k, b_scaled + part * n / 2, 1, MAX_N);
}

enum { KIND_F16, KIND_TF32, KIND_F8F6F4, KIND_I8, KIND_MXF8F6F4, KIND_MXF4, KIND_MXF4NVF4, KINDS }; /* as in lower_tensor.py */

static int operand_format(Machine *m, int32_t line, uint32_t kind, uint32_t code)
{
#define SMALL {FORMAT_E4M3, FORMAT_E5M2, -1, FORMAT_E2M3_SPREAD, FORMAT_E3M2_SPREAD, FORMAT_E2M1_SPREAD, -1, -1}
#define FOUR_BITS {-1, FORMAT_E2M1_PACKED, -1, -1, -1, FORMAT_E2M1_PACKED, -1, -1} /* 5: its number in the other kinds, also seen */
    static const int16_t formats[KINDS][8] = {[KIND_F16] = {FORMAT_F16, FORMAT_BF16, -1, -1, -1, -1, -1, -1},
                                              [KIND_TF32] = {-1, -1, FORMAT_TF32, -1, -1, -1, -1, -1},
                                              [KIND_F8F6F4] = SMALL,
                                              [KIND_I8] = {FORMAT_U8, FORMAT_S8, -1, -1, -1, -1, -1, -1},
                                              [KIND_MXF8F6F4] = SMALL,
                                              [KIND_MXF4] = FOUR_BITS,
                                              [KIND_MXF4NVF4] = FOUR_BITS};
    int format = formats[kind][code];
    if (format < 0)
        machine_fault(m, FAULT_UNSUPPORTED, line, "operand format %u of this kind of tcgen05.mma", code);
    return format;
}

/* args: d, a (descriptor or address), b, instruction descriptor, keep d, scales of a and of b. sub: kind | a in tensor memory << 4 |
 * pair << 5 | scales of a row << 16, 0 where there are none */
static void run_mma(Machine *m, AsyncOp *op)
{
    int32_t line = op->in->line;
    uint32_t idesc = (uint32_t)op->args[3], kind = op->in->sub & 15, d = (uint32_t)op->args[0];
    int pair = op->in->sub >> 5 & 1, from_tmem = op->in->sub >> 4 & 1, keep = op->args[4] != 0;
    int a_format = operand_format(m, line, kind, idesc >> 7 & 7), b_format = operand_format(m, line, kind, idesc >> 10 & 7);
    int n = (int)(idesc >> 17 & 63) * 8, rows = (int)(idesc >> 24 & 31) * 16, k = format_elements(a_format);
    uint32_t scales = op->in->sub >> 16 & 7;
    int type = scales ? 1 : (int)(idesc >> 4 & 3), negative = (idesc >> 13 & 1) ^ (idesc >> 14 & 1);
    if (n < 8 || n > MAX_N || (rows != 64 && rows != 128 && rows != 256) || (rows == 256 && !pair) || (rows == 64 && pair))
        machine_fault(m, FAULT_UNSUPPORTED, line, "tcgen05.mma of %d x %d", rows, n);
    if (scales && (idesc >> 31))
        machine_fault(m, FAULT_UNSUPPORTED, line, "tcgen05.mma with 96 elements along k");
    ScaleVector a_scales = {(uint32_t)op->args[5], idesc >> 29 & 3, scales, idesc >> 23 & 1};
    ScaleVector b_scales = {(uint32_t)op->args[6], idesc >> 4 & 3, scales, idesc >> 23 & 1};
    Cluster *cluster = op->cluster;
    Cta *own = op->warp->cta;
    int first = pair ? own->rank & ~1 : own->rank, ctas = pair ? 2 : 1, own_rows = rows / ctas;
    uint32_t column = d & 0xffff, d_lane = d >> 16;
    for (int c = 0; c < ctas; c++) {
        SharedOperand b = describe(m, line, op->args[2], b_format, idesc >> 16 & 1);
        decode_operand(m, line, &cluster->ctas[first + c], &b, 0, n / ctas, k, b_rows + c * (n / ctas), 1, MAX_N);
    }
    int spread = own_rows == 64 && !pair; /* four blocks of sixteen rows, each in a warp's own lanes */
    int folded = own_rows == 64 && pair;  /* the second half of the columns goes to lanes 64 and up */
    for (int c = 0; c < ctas; c++) {
        Cta *cta = &cluster->ctas[first + c];
        check_columns(m, line, cta, column, (uint32_t)(folded ? n / 2 : n));
        if (from_tmem) {
            for (int block = 0; block < (spread ? 4 : 1); block++)
                rows_from_tmem(m, line, cta, (uint32_t)op->args[1], a_format,
                               ((uint32_t)op->args[1] >> 16) + 32 * (uint32_t)block, spread ? 16 : own_rows, a_rows + block * 16 * MAX_K);
        } else {
            SharedOperand a = describe(m, line, op->args[1], a_format, idesc >> 15 & 1);
            decode_operand(m, line, cta, &a, 0, own_rows, k, a_rows, MAX_K, 1);
        }
        for (int x = 0; negative && x < own_rows * MAX_K; x++)
            a_rows[x] = -a_rows[x];
        if (scales) {
            apply_scales(m, line, cta, &a_scales, 0, own_rows, k, a_rows, MAX_K, 1);
            scaled_b(m, line, cta, &b_scales, n, k, folded);
        }
        const float *b = scales ? b_scaled : b_rows;
        if (spread)
            for (int block = 0; block < 4; block++)
                accumulate(m, line, cta, d_lane + 32 * (uint32_t)block, column, a_rows + block * 16 * MAX_K, 16, b, n, k, keep, type);
        else if (folded)
            for (int part = 0; part < 2; part++)
                accumulate(m, line, cta, 64 * (uint32_t)part, column, a_rows, 64, b + part * n / 2, n / 2, k, keep, type);
        else
            accumulate(m, line, cta, d_lane, column, a_rows, own_rows, b, n, k, keep, type);
    }
}

/* r: d, a, b, idesc, keep, scales of a, scales of b. imm, target: offsets of d and of a in tensor memory. */
void op_tcgen05_mma(Warp *w, const Instr *in, uint32_t mask)
{
    for (uint32_t left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        AsyncOp op = {.kind = ASYNC_TCGEN05, .stream = stream_of(w->cta), .cluster = w->cta->cluster, .warp = w, .in = in,
                      .lane = (uint32_t)i, .run = run_mma};
        uint32_t idesc = R32(3)[i];
        op.args[0] = R32(0)[i] + (uint32_t)in->imm;
        op.args[1] = in->sub >> 4 & 1 ? R32(1)[i] + (uint32_t)in->target : R64(1)[i];
        op.args[2] = R64(2)[i];
        op.args[3] = idesc;
        op.args[4] = R32(4)[i] != 0;
        for (int k = 5; k < 7 && in->r[k] >= 0; k++)
            op.args[k] = R32(k)[i];
        for (int k = 0; k < (int)(in->sub >> 8 & 15); k++)
            if (lanes32(w, POOL(k))[i])
                fault(w, in, FAULT_UNSUPPORTED, "tcgen05.mma with lanes that are not written");
        if ((in->sub >> 5 & 1) && w->cta->cluster->size < 2)
            fault(w, in, FAULT_OUT_OF_BOUNDS, "a product of two CTAs in a cluster of one");
        static const int elements[KINDS] = {16, 8, 32, 32, 32, 64, 64};
        int n = (int)(idesc >> 17 & 63) * 8, rows = (int)(idesc >> 24 & 31) * 16;
        Totals *t = &w->machine->totals;
        t->mma_flops += (int64_t)rows * n * elements[in->sub & 15];
        t->mma_cycles_x16 += 16ll * rows * n * 32 / (2048 * 2); /* of one SM: a pair of CTAs has two for half as long */
        async_issue(w->machine, &op);
    }
}

/* tcgen05.cp: rows of shared memory into tensor memory. args: address, descriptor. sub: rows | 16-byte pieces a row << 8 | pair << 12 |
 * bits of a spread number, to become a byte, << 20, or 0 | copies << 16 (4: to every quarter; 2: quarters 0 and 2 get the first half, 1 and 3 the second; 3: 0, 1 and 2, 3) */
static void run_cp(Machine *m, AsyncOp *op)
{
    uint32_t address = (uint32_t)op->args[0], column = address & 0xffff;
    int spread = (int)(op->in->sub >> 20 & 7), rows = (int)(op->in->sub & 255), pieces = (int)(op->in->sub >> 8 & 15), copies = (int)(op->in->sub >> 16 & 15);
    int pair = op->in->sub >> 12 & 1, rank = op->warp->cta->rank;
    for (int c = pair ? rank & ~1 : rank; c <= (pair ? rank | 1 : rank); c++) {
        Cta *cta = &op->cluster->ctas[c];
        SharedOperand o = describe(m, op->in->line, op->args[1], FORMAT_E4M3, 0);
        check_columns(m, op->in->line, cta, column, (uint32_t)pieces * 4);
        for (int row = 0; row < rows; row++)
            for (int piece = 0; piece < pieces; piece++) {
                uint32_t from = operand_address(&o, row, piece * 16, 0, 0);
                if (from < SHARED_FIRST || from + 16 > cta->shared_bytes)
                    machine_fault(m, FAULT_OUT_OF_BOUNDS, op->in->line, "tcgen05.cp reads shared address 0x%x", from);
                shared_check_written(m, op->in->line, cta, from, 16, "read by tcgen05.cp");
                if (m->races)
                    race_touch_shared(m, cta, from, 16, LANE_NONE, TOUCH_ASYNC);
                uint8_t bytes[16];
                if (spread)
                    widen_chunk(bytes, cta->shared + from, spread);
                else
                    memcpy(bytes, cta->shared + from, 16);
                for (int copy = 0; copy < (copies == 4 ? 4 : copies ? 2 : 1); copy++) {
                    int lane = copies == 4 ? row + 32 * copy : copies == 2 ? row + 64 * copy
                               : copies == 3 ? row % 32 + 64 * (row / 32) + 32 * copy : row;
                    memcpy(cell(cta, (address >> 16) + (uint32_t)lane, column + (uint32_t)piece * 4), bytes, 16);
                    mark_written(cta, (address >> 16) + (uint32_t)lane, column + (uint32_t)piece * 4, 4);
                }
            }
    }
}

void op_tcgen05_cp(Warp *w, const Instr *in, uint32_t mask)
{
    for (uint32_t left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        AsyncOp op = {.kind = ASYNC_TCGEN05, .stream = stream_of(w->cta), .cluster = w->cta->cluster, .warp = w, .in = in,
                      .lane = (uint32_t)i, .run = run_cp};
        op.args[0] = R32(0)[i] + (uint32_t)in->imm;
        op.args[1] = R64(1)[i];
        async_issue(w->machine, &op);
    }
}
