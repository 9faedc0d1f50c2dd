/* Integer and bitwise instructions. Every handler is a loop over lanes that the compiler turns into vector code. */
#include "machine.h"

#define BINARY(name, type, lanes, expression)                      \
    CLONED void op_##name(Warp *w, const Instr *in, uint32_t mask) \
    {                                                              \
        type *d = (type *)lanes(0), *pa = (type *)lanes(1), *pb = (type *)lanes(2); \
        FOR_LANES(type a = pa[i]; type b = pb[i]; d[i] = (type)(expression)); \
    }
#define UNARY(name, type, lanes, expression)                       \
    CLONED void op_##name(Warp *w, const Instr *in, uint32_t mask) \
    {                                                              \
        type *d = (type *)lanes(0), *pa = (type *)lanes(1);        \
        FOR_LANES(type a = pa[i]; d[i] = (type)(expression));      \
    }
#define TERNARY(name, type, lanes, expression)                     \
    CLONED void op_##name(Warp *w, const Instr *in, uint32_t mask) \
    {                                                              \
        type *d = (type *)lanes(0), *pa = (type *)lanes(1), *pb = (type *)lanes(2), *pc = (type *)lanes(3); \
        FOR_LANES(type a = pa[i]; type b = pb[i]; type c = pc[i]; d[i] = (type)(expression)); \
    }
/* 16-bit registers are kept zero-extended in 32-bit slots. */
#define BINARY16(name, type, expression)                           \
    CLONED void op_##name(Warp *w, const Instr *in, uint32_t mask) \
    {                                                              \
        uint32_t *d = R32(0), *pa = R32(1), *pb = R32(2);          \
        FOR_LANES(type a = (type)pa[i]; type b = (type)pb[i]; d[i] = (uint16_t)(expression)); \
    }
#define UNARY16(name, type, expression)                            \
    CLONED void op_##name(Warp *w, const Instr *in, uint32_t mask) \
    {                                                              \
        uint32_t *d = R32(0), *pa = R32(1);                        \
        FOR_LANES(type a = (type)pa[i]; d[i] = (uint16_t)(expression)); \
    }

UNARY(mov_b32, uint32_t, R32, a)
UNARY(mov_b64, uint64_t, R64, a)
BINARY(add_b32, uint32_t, R32, a + b)
BINARY(sub_b32, uint32_t, R32, a - b)
BINARY(mul_lo_b32, uint32_t, R32, a * b)
BINARY(mul_hi_u32, uint32_t, R32, ((uint64_t)a * b) >> 32)
BINARY(mul_hi_s32, int32_t, R32, ((int64_t)a * b) >> 32)
BINARY(mul24_lo_u32, uint32_t, R32, (a & 0xffffff) * (b & 0xffffff))
BINARY(mul24_lo_s32, int32_t, R32, (uint32_t)((int32_t)((uint32_t)a << 8) >> 8) * (uint32_t)((int32_t)((uint32_t)b << 8) >> 8))
BINARY(and_b32, uint32_t, R32, a & b)
BINARY(or_b32, uint32_t, R32, a | b)
BINARY(xor_b32, uint32_t, R32, a ^ b)
UNARY(not_b32, uint32_t, R32, ~a)
UNARY(cnot_b32, uint32_t, R32, a == 0)
UNARY(neg_b32, uint32_t, R32, 0u - a)
UNARY(abs_s32, int32_t, R32, a < 0 ? 0u - (uint32_t)a : (uint32_t)a)
BINARY(min_s32, int32_t, R32, a < b ? a : b)
BINARY(max_s32, int32_t, R32, a > b ? a : b)
BINARY(min_u32, uint32_t, R32, a < b ? a : b)
BINARY(max_u32, uint32_t, R32, a > b ? a : b)
BINARY(min_relu_s32, int32_t, R32, (a < b ? a : b) > 0 ? (a < b ? a : b) : 0)
BINARY(max_relu_s32, int32_t, R32, (a > b ? a : b) > 0 ? (a > b ? a : b) : 0)
/* Shifts past the width give zero, or the sign. */
BINARY(shl_b32, uint32_t, R32, b > 31 ? 0 : a << (b & 31))
BINARY(shr_u32, uint32_t, R32, b > 31 ? 0 : a >> (b & 31))
BINARY(shr_s32, uint32_t, R32, (uint32_t)((int32_t)a >> (b > 31 ? 31 : b)))
TERNARY(mad_lo_b32, uint32_t, R32, a * b + c)
TERNARY(mad_hi_u32, uint32_t, R32, (uint32_t)(((uint64_t)a * b) >> 32) + c)
TERNARY(mad_hi_s32, uint32_t, R32, (uint32_t)(((int64_t)(int32_t)a * (int32_t)b) >> 32) + c)
TERNARY(sad_u32, uint32_t, R32, (a > b ? a - b : b - a) + c)
TERNARY(sad_s32, uint32_t, R32, ((int32_t)a > (int32_t)b ? a - b : b - a) + c)
UNARY(popc_b32, uint32_t, R32, (uint32_t)__builtin_popcount(a))
UNARY(clz_b32, uint32_t, R32, a ? (uint32_t)__builtin_clz(a) : 32u)
TERNARY(selp_b32, uint32_t, R32, (a & c) | (b & ~c))

/* Dividing by zero gives all ones on the hardware; so does its remainder the dividend. */
BINARY(div_u32, uint32_t, R32, b ? a / b : 0xffffffffu)
BINARY(rem_u32, uint32_t, R32, b ? a % b : a)
BINARY(div_s32, int32_t, R32, b == 0 ? -1 : b == -1 ? (int32_t)(0u - (uint32_t)a) : a / b)
BINARY(rem_s32, int32_t, R32, b == 0 ? a : b == -1 ? 0 : a % b)

BINARY(add_b64, uint64_t, R64, a + b)
BINARY(sub_b64, uint64_t, R64, a - b)
BINARY(mul_lo_b64, uint64_t, R64, a * b)
BINARY(mul_hi_u64, uint64_t, R64, (uint64_t)(((unsigned __int128)a * b) >> 64))
BINARY(mul_hi_s64, int64_t, R64, (int64_t)(((__int128)a * b) >> 64))
BINARY(and_b64, uint64_t, R64, a & b)
BINARY(or_b64, uint64_t, R64, a | b)
BINARY(xor_b64, uint64_t, R64, a ^ b)
UNARY(not_b64, uint64_t, R64, ~a)
UNARY(cnot_b64, uint64_t, R64, a == 0)
UNARY(neg_b64, uint64_t, R64, 0ull - a)
UNARY(abs_s64, int64_t, R64, a < 0 ? 0ull - (uint64_t)a : (uint64_t)a)
BINARY(min_s64, int64_t, R64, a < b ? a : b)
BINARY(max_s64, int64_t, R64, a > b ? a : b)
BINARY(min_u64, uint64_t, R64, a < b ? a : b)
BINARY(max_u64, uint64_t, R64, a > b ? a : b)
TERNARY(mad_lo_b64, uint64_t, R64, a * b + c)
BINARY(div_u64, uint64_t, R64, b ? a / b : ~0ull)
BINARY(rem_u64, uint64_t, R64, b ? a % b : a)
BINARY(div_s64, int64_t, R64, b == 0 ? -1 : b == -1 ? (int64_t)(0ull - (uint64_t)a) : a / b)
BINARY(rem_s64, int64_t, R64, b == 0 ? a : b == -1 ? 0 : a % b)

BINARY16(add_b16, uint16_t, a + b)
BINARY16(sub_b16, uint16_t, a - b)
BINARY16(mul_lo_b16, uint16_t, (uint32_t)a * b)
BINARY16(mul_hi_u16, uint16_t, ((uint32_t)a * b) >> 16)
BINARY16(mul_hi_s16, int16_t, ((int32_t)a * b) >> 16)
BINARY16(min_s16, int16_t, a < b ? a : b)
BINARY16(max_s16, int16_t, a > b ? a : b)
BINARY16(min_u16, uint16_t, a < b ? a : b)
BINARY16(max_u16, uint16_t, a > b ? a : b)
BINARY16(div_u16, uint16_t, b ? a / b : 0xffff)
BINARY16(rem_u16, uint16_t, b ? a % b : a)
BINARY16(div_s16, int16_t, b ? a / b : -1)
BINARY16(rem_s16, int16_t, b ? a % b : a)
UNARY16(not_b16, uint16_t, ~a)
UNARY16(neg_b16, uint16_t, -a)
UNARY16(abs_s16, int16_t, a < 0 ? -a : a)

/* Shift counts are 32-bit whatever the width of what is shifted. */
#define SHIFT16(name, type, expression)                            \
    CLONED void op_##name(Warp *w, const Instr *in, uint32_t mask) \
    {                                                              \
        uint32_t *d = R32(0), *pa = R32(1), *pb = R32(2);          \
        FOR_LANES(type a = (type)pa[i]; uint32_t b = pb[i]; d[i] = (uint16_t)(expression)); \
    }
SHIFT16(shl_b16, uint16_t, b > 15 ? 0 : (uint32_t)a << b)
SHIFT16(shr_u16, uint16_t, b > 15 ? 0 : a >> b)
SHIFT16(shr_s16, int16_t, a >> (b > 15 ? 15 : b))
#define SHIFT64(name, expression)                                  \
    CLONED void op_##name(Warp *w, const Instr *in, uint32_t mask) \
    {                                                              \
        uint64_t *d = R64(0), *pa = R64(1);                        \
        uint32_t *pb = R32(2);                                     \
        FOR_LANES(uint64_t a = pa[i]; uint32_t b = pb[i]; d[i] = (uint64_t)(expression)); \
    }
SHIFT64(shl_b64, b > 63 ? 0 : a << (b & 63))
SHIFT64(shr_u64, b > 63 ? 0 : a >> (b & 63))
SHIFT64(shr_s64, (int64_t)a >> (b > 63 ? 63 : b))

CLONED void op_selp_b64(Warp *w, const Instr *in, uint32_t mask)
{
    uint64_t *d = R64(0), *a = R64(1), *b = R64(2);
    uint32_t *c = R32(3);
    FOR_LANES(d[i] = c[i] ? a[i] : b[i]);
}

/* slct: by the sign of a 32-bit integer (sub 0) or float (sub 1) */
void op_slct_b32(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0), *a = R32(1), *b = R32(2), *c = R32(3);
    FOR_LANES(d[i] = (in->sub ? float_of(c[i]) >= 0 : (int32_t)c[i] >= 0) ? a[i] : b[i]);
}

/* Products twice as wide as their factors. */
#define WIDE(name, narrow, wide, shorter, out)                     \
    CLONED void op_mul_wide_##name(Warp *w, const Instr *in, uint32_t mask) \
    {                                                              \
        wide *d = (wide *)out(0);                                  \
        uint32_t *a = R32(1), *b = R32(2);                         \
        FOR_LANES(d[i] = (wide)((shorter)(narrow)a[i] * (shorter)(narrow)b[i])); \
    }                                                              \
    CLONED void op_mad_wide_##name(Warp *w, const Instr *in, uint32_t mask) \
    {                                                              \
        wide *d = (wide *)out(0), *c = (wide *)out(3);             \
        uint32_t *a = R32(1), *b = R32(2);                         \
        FOR_LANES(d[i] = (wide)((shorter)(narrow)a[i] * (shorter)(narrow)b[i]) + c[i]); \
    }
WIDE(u32, uint32_t, uint64_t, uint64_t, R64)
WIDE(s32, int32_t, uint64_t, int64_t, R64)
WIDE(u16, uint16_t, uint32_t, uint32_t, R32)
WIDE(s16, int16_t, uint32_t, int32_t, R32)

void op_popc_b64(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0);
    uint64_t *a = R64(1);
    FOR_LANES(d[i] = (uint32_t)__builtin_popcountll(a[i]));
}

void op_clz_b64(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0);
    uint64_t *a = R64(1);
    FOR_LANES(d[i] = a[i] ? (uint32_t)__builtin_clzll(a[i]) : 64u);
}

static uint64_t reverse_bits(uint64_t value, int width)
{
    uint64_t out = 0;
    for (int bit = 0; bit < width; bit++)
        out |= ((value >> bit) & 1) << (width - 1 - bit);
    return out;
}

void op_brev_b32(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0), *a = R32(1);
    FOR_LANES(d[i] = (uint32_t)reverse_bits(a[i], 32));
}

void op_brev_b64(Warp *w, const Instr *in, uint32_t mask)
{
    uint64_t *d = R64(0), *a = R64(1);
    FOR_LANES(d[i] = reverse_bits(a[i], 64));
}

/* bfind: position of the most significant bit that differs from the sign; sub bit 0: signed, bit 1: shift amount */
static uint32_t find_bit(uint64_t value, int width, uint32_t sub)
{
    if ((sub & 1) && (value >> (width - 1)) & 1)
        value = ~value & (width == 64 ? ~0ull : 0xffffffffull);
    if (!value)
        return 0xffffffffu;
    uint32_t position = 63u - (uint32_t)__builtin_clzll(value);
    return sub & 2 ? (uint32_t)width - 1 - position : position;
}

void op_bfind_b32(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0), *a = R32(1);
    FOR_LANES(d[i] = find_bit(a[i], 32, in->sub));
}

void op_bfind_b64(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0);
    uint64_t *a = R64(1);
    FOR_LANES(d[i] = find_bit(a[i], 64, in->sub));
}

/* bfe: position and length are taken modulo 256; bits past the top repeat the sign (sub 1) or are zero. */
static uint64_t extract_field(uint64_t a, uint32_t position, uint32_t length, int width, int is_signed)
{
    position &= 255;
    length &= 255;
    if (length == 0)
        return 0;
    uint32_t last = position + length - 1;
    uint64_t sign = is_signed ? (a >> (last < (uint32_t)width - 1 ? last : (uint32_t)width - 1)) & 1 : 0;
    uint64_t out = 0;
    for (uint32_t bit = 0; bit < (uint32_t)width; bit++) {
        uint64_t value = bit < length && position + bit < (uint32_t)width ? (a >> (position + bit)) & 1 : sign;
        out |= value << bit;
    }
    return out;
}

void op_bfe_b32(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0), *a = R32(1), *b = R32(2), *c = R32(3);
    FOR_LANES(d[i] = (uint32_t)extract_field(a[i], b[i], c[i], 32, (int)in->sub));
}

void op_bfe_b64(Warp *w, const Instr *in, uint32_t mask)
{
    uint64_t *d = R64(0), *a = R64(1);
    uint32_t *b = R32(2), *c = R32(3);
    FOR_LANES(d[i] = extract_field(a[i], b[i], c[i], 64, (int)in->sub));
}

static uint64_t insert_field(uint64_t a, uint64_t b, uint32_t position, uint32_t length, uint32_t width)
{
    position &= 255;
    length &= 255;
    if (position >= width || length == 0)
        return b;
    uint64_t ones = length >= 64 ? ~0ull : (1ull << length) - 1;
    uint64_t field = ones << position;
    return (b & ~field) | ((a << position) & field);
}

void op_bfi_b32(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0), *a = R32(1), *b = R32(2), *c = R32(3), *e = R32(4);
    FOR_LANES(d[i] = (uint32_t)insert_field(a[i], b[i], c[i], e[i], 32));
}

void op_bfi_b64(Warp *w, const Instr *in, uint32_t mask)
{
    uint64_t *d = R64(0), *a = R64(1), *b = R64(2);
    uint32_t *c = R32(3), *e = R32(4);
    FOR_LANES(d[i] = insert_field(a[i], b[i], c[i], e[i], 64));
}

void op_bmsk_b32(Warp *w, const Instr *in, uint32_t mask) /* sub 1: wrap, 0: clamp */
{
    uint32_t *d = R32(0), *a = R32(1), *b = R32(2);
    FOR_LANES(uint32_t from = in->sub ? a[i] & 31 : a[i]; uint32_t count = in->sub ? b[i] & 31 : b[i];
              uint64_t ones = count >= 32 ? 0xffffffffull : (1ull << count) - 1;
              d[i] = from > 31 ? 0 : (uint32_t)(ones << from));
}

/* lop3: the truth table is in the immediate. */
CLONED void op_lop3_b32(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0), *pa = R32(1), *pb = R32(2), *pc = R32(3);
    uint32_t select[8];
    for (int term = 0; term < 8; term++)
        select[term] = (in->imm >> term) & 1 ? 0xffffffffu : 0;
    FOR_LANES(uint32_t a = pa[i]; uint32_t b = pb[i]; uint32_t c = pc[i];
              d[i] = (~a & ~b & ~c & select[0]) | (~a & ~b & c & select[1]) | (~a & b & ~c & select[2]) |
                     (~a & b & c & select[3]) | (a & ~b & ~c & select[4]) | (a & ~b & c & select[5]) |
                     (a & b & ~c & select[6]) | (a & b & c & select[7]));
}

/* prmt: sub 0 is the general form, then f4e, b4e, rc8, ecl, ecr, rc16. */
static uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t mode)
{
    uint64_t both = ((uint64_t)b << 32) | a;
    uint32_t selector = c & 0xffff, step = c & 3, chosen[4];
    for (uint32_t k = 0; k < 4; k++) {
        switch (mode) {
        case 1: chosen[k] = (step + k) & 7; break;
        case 2: chosen[k] = (step - k) & 7; break;
        case 3: chosen[k] = step; break;
        case 4: chosen[k] = k > step ? k : step; break;
        case 5: chosen[k] = k < step ? k : step; break;
        case 6: chosen[k] = (step & 1) * 2 + (k & 1); break;
        default: chosen[k] = (selector >> (4 * k)) & 15; break;
        }
    }
    uint32_t out = 0;
    for (uint32_t k = 0; k < 4; k++) {
        uint32_t byte = (uint32_t)(both >> (8 * (chosen[k] & 7))) & 0xff;
        if (chosen[k] & 8)
            byte = byte & 0x80 ? 0xff : 0;
        out |= byte << (8 * k);
    }
    return out;
}

void op_prmt_b32(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0), *a = R32(1), *b = R32(2), *c = R32(3);
    FOR_LANES(d[i] = permute_bytes(a[i], b[i], c[i], in->sub));
}

/* shf: sub bit 0 right, bit 1 wrap (clamp otherwise) */
void op_shf_b32(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0), *a = R32(1), *b = R32(2), *c = R32(3);
    FOR_LANES(uint64_t both = ((uint64_t)b[i] << 32) | a[i];
              uint32_t n = in->sub & 2 ? c[i] & 31 : (c[i] > 32 ? 32 : c[i]);
              d[i] = in->sub & 1 ? (uint32_t)(n == 32 ? both >> 32 : both >> n) : (uint32_t)((both << n) >> 32));
}

/* Saturating 32-bit sums: sub 0 add, 1 subtract. */
void op_addsub_sat_s32(Warp *w, const Instr *in, uint32_t mask)
{
    int32_t *d = (int32_t *)R32(0), *a = (int32_t *)R32(1), *b = (int32_t *)R32(2);
    FOR_LANES(int64_t sum = in->sub ? (int64_t)a[i] - b[i] : (int64_t)a[i] + b[i];
              d[i] = (int32_t)(sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum));
}

/* Sums with the carry flag. sub bit 0: subtract, bit 1: carry in, bit 2: carry out, bit 3: 64 bits. */
void op_add_carry(Warp *w, const Instr *in, uint32_t mask)
{
    for (int i = 0; i < LANES; i++) {
        if (!(mask >> i & 1))
            continue;
        int wide = (in->sub & 8) != 0;
        uint64_t a = wide ? R64(1)[i] : R32(1)[i], b = wide ? R64(2)[i] : R32(2)[i];
        uint64_t ones = wide ? ~0ull : 0xffffffffull;
        unsigned __int128 carry = in->sub & 2 ? (w->carry >> i) & 1 : 0, sum;
        uint32_t out;
        if (in->sub & 1) {
            sum = (unsigned __int128)a - b - carry;
            out = (unsigned __int128)a < (unsigned __int128)b + carry;
        } else {
            sum = (unsigned __int128)a + b + carry;
            out = sum > ones;
        }
        if (wide)
            R64(0)[i] = (uint64_t)sum;
        else
            R32(0)[i] = (uint32_t)sum;
        if (in->sub & 4)
            w->carry = (w->carry & ~(1u << i)) | (out << i);
    }
}

/* mad with the carry flag: sub bits 1-3 as above, bit 4: high half, bit 5: signed */
void op_mad_carry(Warp *w, const Instr *in, uint32_t mask)
{
    for (int i = 0; i < LANES; i++) {
        if (!(mask >> i & 1))
            continue;
        int wide = (in->sub & 8) != 0, is_signed = (in->sub & 32) != 0;
        unsigned __int128 product;
        if (wide)
            product = is_signed ? (unsigned __int128)((__int128)(int64_t)R64(1)[i] * (int64_t)R64(2)[i])
                                : (unsigned __int128)R64(1)[i] * R64(2)[i];
        else
            product = is_signed ? (unsigned __int128)(uint64_t)((int64_t)(int32_t)R32(1)[i] * (int32_t)R32(2)[i])
                                : (unsigned __int128)((uint64_t)R32(1)[i] * R32(2)[i]);
        uint64_t ones = wide ? ~0ull : 0xffffffffull;
        uint64_t part = (uint64_t)(in->sub & 16 ? product >> (wide ? 64 : 32) : product) & ones;
        unsigned __int128 sum = (unsigned __int128)part + (wide ? R64(3)[i] : R32(3)[i]);
        if (in->sub & 2)
            sum += (w->carry >> i) & 1;
        if (wide)
            R64(0)[i] = (uint64_t)sum;
        else
            R32(0)[i] = (uint32_t)sum;
        if (in->sub & 4)
            w->carry = (w->carry & ~(1u << i)) | ((uint32_t)(sum > ones) << i);
    }
}

/* dp4a, dp2a: sub bit 0: a signed, bit 1: b signed, bit 2: dp2a, bit 3: its high half */
void op_dot(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0), *a = R32(1), *b = R32(2), *c = R32(3);
    FOR_LANES(int64_t sum = (int32_t)c[i]; int pair = (in->sub & 4) != 0;
              for (int k = 0; k < (pair ? 2 : 4); k++) {
                  int64_t x = pair ? (in->sub & 1 ? (int16_t)(a[i] >> (16 * k)) : (uint16_t)(a[i] >> (16 * k)))
                                   : (in->sub & 1 ? (int8_t)(a[i] >> (8 * k)) : (uint8_t)(a[i] >> (8 * k)));
                  int byte = pair ? k + (in->sub & 8 ? 2 : 0) : k;
                  int64_t y = in->sub & 2 ? (int8_t)(b[i] >> (8 * byte)) : (uint8_t)(b[i] >> (8 * byte));
                  sum += x * y;
              } d[i] = (uint32_t)sum);
}

/* Vectors into wider registers and back. Parts are in r[1..4] (pack) or r[0..3] (unpack, source in r[4]). */
void op_pack_b32_b16(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0), *a = R32(1), *b = R32(2);
    FOR_LANES(d[i] = (a[i] & 0xffff) | (b[i] << 16));
}

void op_unpack_b32_b16(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *source = R32(4), *a = R32(0), *b = R32(1);
    FOR_LANES(uint32_t value = source[i]; a[i] = value & 0xffff; b[i] = value >> 16);
}

CLONED void op_pack_b64_b32(Warp *w, const Instr *in, uint32_t mask)
{
    uint64_t *d = R64(0);
    uint32_t *a = R32(1), *b = R32(2);
    FOR_LANES(d[i] = a[i] | ((uint64_t)b[i] << 32));
}

CLONED void op_unpack_b64_b32(Warp *w, const Instr *in, uint32_t mask)
{
    uint64_t *source = R64(4);
    uint32_t *a = R32(0), *b = R32(1);
    FOR_LANES(uint64_t value = source[i]; a[i] = (uint32_t)value; b[i] = (uint32_t)(value >> 32));
}

/* The general forms: `sub` parts of `imm` bits each. */
void op_pack(Warp *w, const Instr *in, uint32_t mask)
{
    int bits = (int)in->imm, wide = bits * (int)in->sub > 32;
    FOR_LANES(uint64_t value = 0; for (uint32_t k = 0; k < in->sub; k++) value |=
              ((uint64_t)R32(1 + k)[i] & ((1ull << bits) - 1)) << (bits * (int)k);
              if (wide) R64(0)[i] = value; else R32(0)[i] = (uint32_t)value);
}

void op_unpack(Warp *w, const Instr *in, uint32_t mask)
{
    int bits = (int)in->imm, wide = bits * (int)in->sub > 32;
    FOR_LANES(uint64_t value = wide ? R64(4)[i] : R32(4)[i]; for (uint32_t k = 0; k < in->sub; k++)
              if (in->r[k] >= 0) R32(k)[i] = (uint32_t)((value >> (bits * (int)k)) & ((1ull << bits) - 1)));
}
