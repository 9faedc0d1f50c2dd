/* ldmatrix and stmatrix: tiles of 8 x 8 16-bit numbers or 16 x 8 bytes between shared memory and a warp's registers; and mma.sync, the
 * warp's own product of register fragments. */
#include "machine.h"

#include <string.h>

#define ADDRESS_WIDE 0x80000000u
enum { TRANSPOSED = 16, BYTES = 32 };

static uint32_t row_address(Warp *w, const Instr *in, int lane)
{
    return (uint32_t)((in->sub & ADDRESS_WIDE ? R64(0)[lane] : R32(0)[lane]) + (uint64_t)in->imm);
}

/* The first `rows` lanes give the addresses of 16 bytes each. */
static void count_rows(Warp *w, const Instr *in, int rows, int loading)
{
    uint32_t addresses[LANES];
    for (int lane = 0; lane < rows; lane++)
        addresses[lane] = row_address(w, in, lane);
    count_wavefronts(w->machine, loading ? SHARED_LDMATRIX : SHARED_STMATRIX, addresses, FULL_MASK >> (LANES - rows), 16);
}

static uint8_t *matrix_row(Warp *w, const Instr *in, uint32_t address, int loading)
{
    uint8_t *bytes = loading ? shared_read(w, in, address, 16) : shared_write(w, in, address, 16);
    if (w->machine->races)
        race_touch(w, SHARED_WINDOW | address, 16, LANE_WARP, loading ? 0 : TOUCH_WRITE);
    return bytes;
}

/* r[0]: address; pool: registers. sub: tiles | transposed << 4. Lane 8 i + j gives the address of row j of tile i. */
static void move_tiles(Warp *w, const Instr *in, int loading)
{
    if (!require_lanes(w, FULL_MASK))
        return;
    int tiles = (int)in->sub & 15, transposed = (in->sub & TRANSPOSED) != 0;
    count_rows(w, in, 8 * tiles, loading);
    for (int tile = 0; tile < tiles; tile++) {
        uint32_t *registers = lanes32(w, POOL(tile));
        for (int row = 0; row < 8; row++) {
            int from = tile * 8 + row;
            uint32_t address = row_address(w, in, from);
            if (address & 15)
                fault(w, in, FAULT_MISALIGNED, "a matrix row at shared address 0x%x is not aligned to 16 bytes", address);
            uint8_t *bytes = matrix_row(w, in, address, loading);
            for (int column = 0; column < 8; column++) {
                int lane = transposed ? column * 4 + row / 2 : row * 4 + column / 2;
                int half = transposed ? row & 1 : column & 1;
                uint16_t value;
                if (loading) {
                    memcpy(&value, bytes + 2 * column, 2);
                    registers[lane] = half ? (registers[lane] & 0xffff) | (uint32_t)value << 16
                                           : (registers[lane] & 0xffff0000u) | value;
                } else {
                    value = (uint16_t)(registers[lane] >> (16 * half));
                    memcpy(bytes + 2 * column, &value, 2);
                }
            }
        }
    }
}

/* Transposed tiles of bytes, whose stored rows are columns of 16. In a load (m16n16), register j of lane 4 g + t has byte g + 8 j of
 * rows 4 t to 4 t + 3. In a store (m16n8) its register has byte g of rows 2 t and 2 t + 1, then byte g + 8 of both. */
static void move_byte_tiles(Warp *w, const Instr *in, int loading)
{
    if (!require_lanes(w, FULL_MASK))
        return;
    int tiles = (int)in->sub & 15, registers = loading ? 2 : 1, rows = 8 * registers;
    count_rows(w, in, rows * tiles, loading);
    for (int tile = 0; tile < tiles; tile++)
        for (int row = 0; row < rows; row++) {
            int from = tile * rows + row;
            uint32_t address = row_address(w, in, from);
            if (address & 15)
                fault(w, in, FAULT_MISALIGNED, "a matrix row at shared address 0x%x is not aligned to 16 bytes", address);
            uint8_t *bytes = matrix_row(w, in, address, loading);
            for (int column = 0; column < 16; column++) {
                int g = column % 8, upper = column / 8;
                uint32_t *to = &lanes32(w, POOL(tile * registers + (loading ? upper : 0)))[4 * g + (loading ? row / 4 : row / 2)];
                int shift = 8 * (loading ? row % 4 : row % 2 + 2 * upper);
                if (loading)
                    *to = (*to & ~(255u << shift)) | (uint32_t)bytes[column] << shift;
                else
                    bytes[column] = (uint8_t)(*to >> shift);
            }
        }
}

static void move_matrix(Warp *w, const Instr *in, int loading)
{
    if (!require_lanes(w, FULL_MASK))
        return;
    if (w->machine->races)
        race_begin_warp(w, in, FULL_MASK);
    if (in->sub & BYTES)
        move_byte_tiles(w, in, loading);
    else
        move_tiles(w, in, loading);
}

void op_ldmatrix(Warp *w, const Instr *in, uint32_t mask) { UNUSED(mask), move_matrix(w, in, 1); }
void op_stmatrix(Warp *w, const Instr *in, uint32_t mask) { UNUSED(mask), move_matrix(w, in, 0); }

/* mma.sync m16n8kK. sub: format of a | format of b << 4 | bytes of K in a row << 8 | f16 sums << 16. pool: d, a, b, c registers */
void op_mma(Warp *w, const Instr *in, uint32_t mask)
{
    UNUSED(mask);
    if (!require_lanes(w, FULL_MASK))
        return;
    int a_format = (int)in->sub & 15, b_format = (int)(in->sub >> 4) & 15, row_bytes = (int)(in->sub >> 8 & 255);
    int half_sums = in->sub >> 16 & 1, bytes = format_bytes(a_format), k_count = row_bytes / bytes, sums = half_sums ? 2 : 4;
    int a_words = row_bytes / 8, b_words = row_bytes / 16, per_word = 4 / bytes;
    float a[16][32], b[32][8], d[16][8];
    for (int r = 0; r < a_words; r++)
        for (int lane = 0; lane < LANES; lane++) {
            uint8_t raw[4];
            memcpy(raw, &lanes32(w, POOL(sums + r))[lane], 4);
            decode_row(&a[lane / 4 + 8 * (r & 1)][((r >> 1) * 16 + (lane & 3) * 4) / bytes], raw, per_word, a_format);
        }
    for (int r = 0; r < b_words; r++)
        for (int lane = 0; lane < LANES; lane++) {
            uint8_t raw[4];
            float part[4];
            memcpy(raw, &lanes32(w, POOL(sums + a_words + r))[lane], 4);
            decode_row(part, raw, per_word, b_format);
            for (int i = 0; i < per_word; i++)
                b[(r * 16 + (lane & 3) * 4) / bytes + i][lane / 4] = part[i];
        }
    for (int r = 0; r < 4; r++)
        for (int lane = 0; lane < LANES; lane++) {
            uint32_t raw = lanes32(w, POOL(sums + a_words + b_words + (half_sums ? r / 2 : r)))[lane];
            d[lane / 4 + 8 * (r >> 1)][(lane & 3) * 2 + (r & 1)] = half_sums ? half_to_float((uint16_t)(raw >> (16 * (r & 1)))) : float_of(raw);
        }
    matmul_rows(d[0], 8, a[0], 32, b[0], 8, 16, 8, k_count);
    for (int r = 0; r < 4; r++)
        for (int lane = 0; lane < LANES; lane++) {
            float value = d[lane / 4 + 8 * (r >> 1)][(lane & 3) * 2 + (r & 1)];
            uint32_t *to = &lanes32(w, POOL(half_sums ? r / 2 : r))[lane];
            if (!half_sums)
                *to = bits_of(value);
            else if (r & 1)
                *to = (*to & 0xffff) | (uint32_t)float_to_half(value) << 16;
            else
                *to = (*to & 0xffff0000u) | float_to_half(value);
        }
    w->machine->totals.mma_flops += 16ll * 8 * k_count;
    w->machine->totals.mma_cycles_x16 += 16ll * 16 * 8 * k_count * bytes / (2048 * 2);
}
