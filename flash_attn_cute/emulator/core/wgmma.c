/* wgmma: a warpgroup's product of shared memory (or registers) with shared memory, accumulated in registers.
 *
 * Each warp of the group computes its own sixteen rows. Accumulators stay where they are: a register's 32 lanes are eight
 * rows of four columns, so both factors are laid out to match and a register is four vectors of eight. */
#include "machine.h"

#include <string.h>

typedef float v8 __attribute__((vector_size(32), aligned(4)));
#define MAX_N 256
#define MAX_K 32

/* sub: format of a | format of b << 4 | N / 8 << 8 | a in registers << 16 | a MN-major << 17 | b MN-major << 18 | negate a << 19 |
 * negate b << 20 | f16 accumulators << 21 | s32 accumulators << 22 | saturating << 23. r: descriptor or nothing, descriptor of b, scale-d. pool: d..., a... */
enum { A_REGISTERS = 1 << 16, A_MN = 1 << 17, B_MN = 1 << 18, A_NEGATED = 1 << 19, B_NEGATED = 1 << 20, HALF_SUMS = 1 << 21,
       INTEGER_SUMS = 1 << 22, SATURATE = 1 << 23 };

static SharedOperand describe(uint64_t d, int format, int mn_major)
{
    static const uint32_t widths[] = {16, 128, 64, 32}, swizzles[] = {0, 0x70, 0x30, 0x10};
    SharedOperand o = {.start = (uint32_t)(d & 0x3fff) << 4, .lbo = (uint32_t)(d >> 16 & 0x3fff) << 4,
                       .sbo = (uint32_t)(d >> 32 & 0x3fff) << 4, .width = widths[d >> 62], .swizzle = swizzles[d >> 62],
                       .shift = 3, .group = 8, .mn_major = mn_major, .format = format};
    return o;
}

/* Sixteen rows of a, each k as 2 x 32 lanes: rows g and g + 8 of lane 4 g + t. */
static void spread_a(const float a[16][MAX_K], float *out, int k_count)
{
    for (int k = 0; k < k_count; k++)
        for (int half = 0; half < 2; half++)
            for (int g = 0; g < 8; g++)
                for (int t = 0; t < 4; t++)
                    out[k * 64 + half * 32 + g * 4 + t] = a[half * 8 + g][k];
}

/* Columns 8 j + 2 t + e of b, each k as 2 N floats: four t, twice, for each (j, e). */
static void spread_b(const float *b, float *out, int n, int k_count)
{
    for (int k = 0; k < k_count; k++)
        for (int column = 0; column < n; column++) {
            float *to = out + (size_t)k * 2 * (size_t)n + (column / 8 * 2 + (column & 1)) * 8 + (column % 8) / 2;
            to[0] = to[4] = b[(size_t)k * MAX_N + column];
        }
}

CLONED static void multiply(float *const *d, const float *a, const float *b, int n, int k_count)
{
    /* d holds, for each j: (half 0, e 0), (half 0, e 1), (half 1, e 0), (half 1, e 1) */
    for (int j = 0; j < n / 8; j++)
        for (int half = 0; half < 2; half++) {
            float *d0 = d[4 * j + 2 * half], *d1 = d[4 * j + 2 * half + 1];
            v8 x0 = *(v8 *)d0, x1 = *(v8 *)(d0 + 8), x2 = *(v8 *)(d0 + 16), x3 = *(v8 *)(d0 + 24);
            v8 y0 = *(v8 *)d1, y1 = *(v8 *)(d1 + 8), y2 = *(v8 *)(d1 + 16), y3 = *(v8 *)(d1 + 24);
            for (int k = 0; k < k_count; k++) {
                const float *row = a + k * 64 + half * 32, *column = b + (size_t)k * 2 * (size_t)n + 16 * j;
                v8 b0 = *(const v8 *)column, b1 = *(const v8 *)(column + 8);
                v8 a0 = *(const v8 *)row, a1 = *(const v8 *)(row + 8), a2 = *(const v8 *)(row + 16), a3 = *(const v8 *)(row + 24);
                x0 += a0 * b0, x1 += a1 * b0, x2 += a2 * b0, x3 += a3 * b0;
                y0 += a0 * b1, y1 += a1 * b1, y2 += a2 * b1, y3 += a3 * b1;
            }
            *(v8 *)d0 = x0, *(v8 *)(d0 + 8) = x1, *(v8 *)(d0 + 16) = x2, *(v8 *)(d0 + 24) = x3;
            *(v8 *)d1 = y0, *(v8 *)(d1 + 8) = y1, *(v8 *)(d1 + 16) = y2, *(v8 *)(d1 + 24) = y3;
        }
}

static void registers_to_rows(Warp *w, const int32_t *slots, float a[16][MAX_K], int format)
{
    int bytes = format_bytes(format), per_word = 4 / bytes;
    for (int r = 0; r < 4; r++) {
        const uint32_t *lanes = lanes32(w, slots[r]);
        for (int lane = 0; lane < LANES; lane++) {
            uint8_t raw[4];
            memcpy(raw, &lanes[lane], 4);
            decode_row(&a[lane / 4 + 8 * (r & 1)][((r >> 1) * 16 + (lane & 3) * 4) / bytes], raw, per_word, format);
        }
    }
}

static float a_rows[16][MAX_K], a_spread[MAX_K * 64], b_rows[MAX_K * MAX_N], b_spread[MAX_K * 2 * MAX_N];
static float sums[MAX_N / 2][LANES];

/* args: descriptor of a, descriptor of b, keep the accumulator */
static void run_wgmma(Machine *m, AsyncOp *op)
{
    Warp *w = op->warp;
    const Instr *in = op->in;
    int n = (int)(in->sub >> 8 & 255) * 8, a_format = (int)in->sub & 15, b_format = (int)(in->sub >> 4) & 15;
    int k_count = 32 / format_bytes(b_format), registers = n / 2;
    const int32_t *d_slots = m->program.pool + in->pool;
    int packed = (in->sub & HALF_SUMS) != 0, integer = (in->sub & INTEGER_SUMS) != 0;
    if (in->sub & A_REGISTERS)
        registers_to_rows(w, d_slots + (packed ? registers / 2 : registers), a_rows, a_format);
    else {
        SharedOperand a = describe(op->args[0], a_format, (in->sub & A_MN) != 0);
        decode_operand(m, in->line, w->cta, &a, (w->index & 3) * 16, 16, k_count, a_rows[0], MAX_K, 1);
    }
    SharedOperand b = describe(op->args[1], b_format, (in->sub & B_MN) != 0);
    decode_operand(m, in->line, w->cta, &b, 0, n, k_count, b_rows, 1, MAX_N);
    if ((in->sub & A_NEGATED ? 1 : 0) ^ (in->sub & B_NEGATED ? 1 : 0))
        for (int row = 0; row < 16; row++)
            for (int k = 0; k < k_count; k++)
                a_rows[row][k] = -a_rows[row][k];
    spread_a(a_rows, a_spread, k_count);
    spread_b(b_rows, b_spread, n, k_count);
    float *d[MAX_N / 2];
    for (int r = 0; r < registers; r++) {
        d[r] = packed || integer ? sums[r] : (float *)lanes32(w, d_slots[r]);
        if (!op->args[2] || integer)
            memset(d[r], 0, sizeof(float) * LANES);
        else if (packed)
            for (int lane = 0; lane < LANES; lane++)
                d[r][lane] = half_to_float((uint16_t)(lanes32(w, d_slots[r / 2])[lane] >> (16 * (r & 1))));
    }
    multiply(d, a_spread, b_spread, n, k_count);
    /* One instruction's sum of 8-bit products is exact in a float; the running sum may not be. */
    for (int r = 0; integer && r < registers; r++)
        for (int lane = 0; lane < LANES; lane++) {
            int32_t *to = (int32_t *)&lanes32(w, d_slots[r])[lane];
            int64_t sum = (op->args[2] ? *to : 0) + (int64_t)d[r][lane];
            if (in->sub & SATURATE)
                sum = sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum;
            *to = (int32_t)sum;
        }
    for (int r = 0; packed && r < registers; r += 2)
        for (int lane = 0; lane < LANES; lane++)
            lanes32(w, d_slots[r / 2])[lane] = float_to_half(d[r][lane]) | ((uint32_t)float_to_half(d[r + 1][lane]) << 16);
}

void op_wgmma(Warp *w, const Instr *in, uint32_t mask)
{
    if (!require_lanes(w, FULL_MASK))
        return;
    int lane = __builtin_ctz(mask), n = (int)(in->sub >> 8 & 255) * 8;
    AsyncOp op = {.kind = ASYNC_WGMMA, .stream = w, .cluster = w->cta->cluster, .warp = w, .in = in, .run = run_wgmma};
    op.args[0] = in->sub & A_REGISTERS ? 0 : R64(0)[lane];
    op.args[1] = R64(1)[lane];
    op.args[2] = R32(2)[lane] != 0;
    if (w->machine->races)
        race_product_registers(w, in, n / (in->sub & HALF_SUMS ? 4 : 2));
    Totals *t = &w->machine->totals;
    int bytes = format_bytes((int)(in->sub >> 4) & 15), k_count = 32 / bytes;
    t->mma_flops += 16ll * n * k_count;
    /* A warp's quarter of 64 x n x k at 2048 16-bit multiply-adds a clock and SM; half for tf32, double for 8 bits. */
    t->mma_cycles_x16 += 16ll * 16 * n * k_count * bytes / (2048 * 2);
    async_issue(w->machine, &op);
}
