/* Matrix arithmetic that the tensor instructions share: decoding operands to floats, and blocked products.
 *
 * Products of the 16-bit and smaller formats are exact in a float, so fusing or not fusing the addition gives the same
 * sum; the order of the additions is k ascending. The hardware keeps more than a float's bits inside one instruction and
 * rounds in its own way, so sums agree to rounding, not to the bit. */
#include "machine.h"

#include <string.h>

typedef float v8 __attribute__((vector_size(32), aligned(4)));

int format_bytes(int format) { return format <= FORMAT_BF16 ? 2 : format == FORMAT_TF32 ? 4 : 1; }

int format_elements(int format) { return format == FORMAT_E2M1_PACKED ? 64 : 32 / format_bytes(format); }

static float small_table[5][256];
static int tables_ready;

static void make_tables(void)
{
    static const int formats[] = {FORMAT_E4M3, FORMAT_E5M2, FORMAT_E2M3, FORMAT_E3M2, FORMAT_E2M1};
    for (int k = 0; k < 5; k++)
        for (int v = 0; v < 256; v++)
            small_table[k][v] = small_to_float(formats[k], (uint8_t)v);
    tables_ready = 1;
}

static const float *table_of(int format)
{
    if (!tables_ready)
        make_tables();
    return small_table[format == FORMAT_E4M3 ? 0 : format == FORMAT_E5M2 ? 1 : format - FORMAT_E2M3 + 2];
}

static uint32_t take_bits(const uint8_t *bytes, int at, int bits)
{
    uint32_t pair = bytes[at / 8] | (at % 8 + bits > 8 ? (uint32_t)bytes[at / 8 + 1] << 8 : 0);
    return pair >> (at % 8) & ((1u << bits) - 1);
}

/* Numbers of `bits` bits, the lowest first; sixteen in each sixteen bytes where they are spread. */
static void decode_bits(float *out, const uint8_t *bytes, int count, int format, int bits, int spread)
{
    const float *table = table_of(format);
    for (int i = 0; i < count; i++)
        out[i] = table[take_bits(bytes, spread ? i / 16 * 128 + i % 16 * bits : i * bits, bits)];
}

/* In a byte, 6 bits stand at the end and 4 bits in the middle, two zeros on either side. */
void widen_chunk(uint8_t out[16], const uint8_t *bytes, int bits)
{
    for (int i = 0; i < 16; i++)
        out[i] = (uint8_t)(take_bits(bytes, i * bits, bits) << (bits == 4 ? 2 : 0));
}

void decode_bytes(float *out, const uint8_t *bytes, int count, int format)
{
    int four = format == FORMAT_E2M1_SPREAD;
    const float *table = table_of(four ? FORMAT_E2M1 : format == FORMAT_E2M3_SPREAD ? FORMAT_E2M3 : FORMAT_E3M2);
    for (int i = 0; i < count; i++)
        out[i] = table[four ? bytes[i] >> 2 & 15 : bytes[i] & 63];
}

CLONED void decode_row(float *out, const uint8_t *bytes, int count, int format)
{
    switch (format) {
    case FORMAT_BF16:
        for (int i = 0; i < count; i++) {
            uint16_t raw;
            memcpy(&raw, bytes + 2 * i, 2);
            out[i] = float_of((uint32_t)raw << 16);
        }
        return;
    case FORMAT_F16:
        for (int i = 0; i < count; i++) {
            uint16_t raw;
            memcpy(&raw, bytes + 2 * i, 2);
            /* A half's bits moved into place are the number times 2^-112, subnormals included. */
            uint32_t magnitude = (uint32_t)(raw & 0x7fff) << 13;
            float value = float_of(magnitude) * 0x1p112f;
            uint32_t bits = (raw & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000u : bits_of(value);
            out[i] = float_of(bits | ((uint32_t)(raw & 0x8000) << 16));
        }
        return;
    case FORMAT_TF32:
        for (int i = 0; i < count; i++) {
            uint32_t raw;
            memcpy(&raw, bytes + 4 * i, 4);
            out[i] = float_of(raw & 0xffffe000u);
        }
        return;
    case FORMAT_S8:
        for (int i = 0; i < count; i++)
            out[i] = (int8_t)bytes[i];
        return;
    case FORMAT_U8:
        for (int i = 0; i < count; i++)
            out[i] = bytes[i];
        return;
    case FORMAT_E2M1_PACKED: decode_bits(out, bytes, count, FORMAT_E2M1, 4, 0); return;
    case FORMAT_E2M1_SPREAD: decode_bits(out, bytes, count, FORMAT_E2M1, 4, 1); return;
    case FORMAT_E2M3_SPREAD: decode_bits(out, bytes, count, FORMAT_E2M3, 6, 1); return;
    case FORMAT_E3M2_SPREAD: decode_bits(out, bytes, count, FORMAT_E3M2, 6, 1); return;
    default: {
        const float *table = table_of(format);
        for (int i = 0; i < count; i++)
            out[i] = table[bytes[i]];
    }
    }
}

/* d (m x n) += a (m x k) * b (k x n), all row-major; n a multiple of 8. Four rows by sixteen columns at a time stay in
 * registers. */
CLONED void matmul_rows(float *d, size_t ds, const float *a, size_t as, const float *b, size_t bs, int m, int n, int k)
{
    for (int column = 0; column < n; column += 8) {
        int pair = column + 16 <= n;
        int row = 0;
        for (; row + 4 <= m; row += 4) {
            float *r0 = d + (size_t)row * ds + column, *r1 = r0 + ds, *r2 = r1 + ds, *r3 = r2 + ds;
            const float *a0 = a + (size_t)row * as, *a1 = a0 + as, *a2 = a1 + as, *a3 = a2 + as;
            v8 x0 = *(v8 *)r0, x1 = *(v8 *)r1, x2 = *(v8 *)r2, x3 = *(v8 *)r3;
            if (pair) {
                v8 y0 = *(v8 *)(r0 + 8), y1 = *(v8 *)(r1 + 8), y2 = *(v8 *)(r2 + 8), y3 = *(v8 *)(r3 + 8);
                for (int i = 0; i < k; i++) {
                    v8 b0 = *(const v8 *)(b + (size_t)i * bs + column), b1 = *(const v8 *)(b + (size_t)i * bs + column + 8);
                    x0 += b0 * a0[i], y0 += b1 * a0[i];
                    x1 += b0 * a1[i], y1 += b1 * a1[i];
                    x2 += b0 * a2[i], y2 += b1 * a2[i];
                    x3 += b0 * a3[i], y3 += b1 * a3[i];
                }
                *(v8 *)(r0 + 8) = y0, *(v8 *)(r1 + 8) = y1, *(v8 *)(r2 + 8) = y2, *(v8 *)(r3 + 8) = y3;
            } else {
                for (int i = 0; i < k; i++) {
                    v8 b0 = *(const v8 *)(b + (size_t)i * bs + column);
                    x0 += b0 * a0[i], x1 += b0 * a1[i], x2 += b0 * a2[i], x3 += b0 * a3[i];
                }
            }
            *(v8 *)r0 = x0, *(v8 *)r1 = x1, *(v8 *)r2 = x2, *(v8 *)r3 = x3;
        }
        for (; row < m; row++)
            for (int c = column; c < column + (pair ? 16 : 8); c++) {
                float sum = d[(size_t)row * ds + c];
                for (int i = 0; i < k; i++)
                    sum += a[(size_t)row * as + i] * b[(size_t)i * bs + c];
                d[(size_t)row * ds + c] = sum;
            }
        if (pair)
            column += 8;
    }
}

/* Where an operand in shared memory lies, in the terms of both generations' descriptors. */
uint32_t operand_address(const SharedOperand *o, int mn, int k_byte, int mn_byte, int k)
{
    uint32_t offset;
    uint32_t width = o->width;
    if (o->mn_major) {
        uint32_t lbo = width == 16 ? o->sbo : o->lbo, sbo = width == 16 ? o->lbo : o->sbo;
        offset = (uint32_t)mn_byte % width + (uint32_t)mn_byte / width * lbo + (uint32_t)k % o->group * width + (uint32_t)k / o->group * sbo;
    } else
        offset = (uint32_t)(mn % 8) * width + (uint32_t)(mn / 8) * o->sbo + (uint32_t)k_byte / width * o->lbo + (uint32_t)k_byte % width;
    uint32_t address = o->start + offset;
    return address ^ ((address >> o->shift) & o->swizzle);
}

/* Decodes `count` rows (of M or N) from `first`, k elements each: out[row * row_stride + k * k_stride]. */
CLONED void decode_operand(Machine *m, int32_t line, Cta *cta, const SharedOperand *o, int first, int count, int k_count, float *out,
                    size_t row_stride, size_t k_stride)
{
    int bytes = format_bytes(o->format), chunk = format_elements(o->format) / 2;
    float part[32];
    int outer = o->mn_major ? k_count : count, inner = o->mn_major ? count : k_count;
    for (int x = 0; x < outer; x++)
        for (int y = 0; y < inner; y += chunk) {
            uint32_t address = o->mn_major ? operand_address(o, 0, 0, (first + y) * bytes, x)
                                           : operand_address(o, first + x, y / chunk * 16, 0, 0);
            if (address < SHARED_FIRST || address + 16 > cta->shared_bytes)
                machine_fault(m, FAULT_OUT_OF_BOUNDS, line, "a matrix operand at shared address 0x%x, outside the CTA's memory", address);
            uint64_t written[2];
            memcpy(written, cta->shadow + address, 16);
            if (((written[0] & written[1]) & 0x0101010101010101ull) != 0x0101010101010101ull)
                shared_check_written(m, line, cta, address, 16, "read by a tensor instruction");
            int n = inner - y < chunk ? inner - y : chunk;
            if (m->races)
                race_touch_shared(m, cta, address, (uint32_t)(n * bytes), LANE_NONE, TOUCH_ASYNC);
            decode_row(part, cta->shared + address, n, o->format);
            float *to = out + (o->mn_major ? (size_t)x * k_stride + (size_t)y * row_stride : (size_t)x * row_stride + (size_t)y * k_stride);
            size_t step = o->mn_major ? row_stride : k_stride;
            for (int i = 0; i < n; i++)
                to[(size_t)i * step] = part[i];
        }
}
