/* Number formats: conversions between them, and arithmetic in the 16-bit ones. */
#include "machine.h"

#include <fenv.h>
#include <math.h>
#include <string.h>

/* Rounds `value` to a format with `mantissa` stored bits and the given exponent range, in the current manner `round`:
 * 0 nearest even, 1 toward zero, 2 down, 3 up, 4 nearest away. The result is exact in a double. */
static double round_to(double value, int mantissa, int lowest_exponent, int round)
{
    if (value == 0 || !isfinite(value))
        return value;
    int exponent;
    frexp(value, &exponent);
    exponent -= 1;
    if (exponent < lowest_exponent)
        exponent = lowest_exponent;
    double unit = ldexp(1.0, exponent - mantissa), scaled = value / unit, out;
    switch (round) {
    case 1: out = trunc(scaled); break;
    case 2: out = floor(scaled); break;
    case 3: out = ceil(scaled); break;
    case 4: out = scaled < 0 ? -floor(-scaled + 0.5) : floor(scaled + 0.5); break;
    default: out = nearbyint(scaled); break;
    }
    return out == 0 ? copysign(0.0, value) : out * unit;
}

float half_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
    if (exponent == 31)
        return float_of(sign | 0x7f800000u | (mantissa << 13));
    if (exponent == 0)
        return float_of(sign | bits_of((float)mantissa * 0x1p-24f));
    return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

float bfloat_to_float(uint16_t b) { return float_of((uint32_t)b << 16); }

static uint16_t encode_half(double v, int round)
{
    if (v != v)
        return 0x7fff;
    double r = round_to(v, 10, -14, round);
    uint16_t sign = signbit(r) ? 0x8000 : 0;
    double size = fabs(r);
    if (size >= 65536.0) {
        int stays = !isinf(v) && (round == 1 || (round == 2 && !sign) || (round == 3 && sign));
        return sign | (stays ? 0x7bff : 0x7c00);
    }
    if (size < 0x1p-14)
        return sign | (uint16_t)(size * 0x1p24);
    int exponent;
    double fraction = frexp(size, &exponent);
    return sign | (uint16_t)(((exponent + 14) << 10) + (int)((fraction * 2 - 1) * 1024));
}

uint16_t double_to_half(double d) { return encode_half(d, 0); }
uint16_t float_to_half(float f) { return encode_half(f, 0); }

static uint16_t encode_bfloat(float f, int round)
{
    uint32_t bits = bits_of(f), low = bits & 0xffff;
    if (f != f)
        return 0x7fff;
    uint32_t up = 0;
    switch (round) {
    case 0: up = low > 0x8000 || (low == 0x8000 && (bits & 0x10000)); break;
    case 2: up = low && (bits >> 31); break;
    case 3: up = low && !(bits >> 31); break;
    case 4: up = low >= 0x8000; break;
    default: break;
    }
    return (uint16_t)((bits >> 16) + up);
}

uint16_t float_to_bfloat(float f) { return encode_bfloat(f, 0); }

/* Small formats: sign, exponent, mantissa; `special` 0: no infinities or NaN, 1: all-ones is NaN, 2: as in IEEE. */
typedef struct { int exponent_bits, mantissa_bits, bias, special; double largest; } Small;
static const Small E4M3 = {4, 3, 7, 1, 448}, E5M2 = {5, 2, 15, 2, 57344}, E2M3 = {2, 3, 1, 0, 7.5}, E3M2 = {3, 2, 3, 0, 28},
                   E2M1 = {2, 1, 1, 0, 6};

static float decode_small(uint8_t v, const Small *format)
{
    int mantissa = v & ((1 << format->mantissa_bits) - 1);
    int top = (1 << format->exponent_bits) - 1, exponent = (v >> format->mantissa_bits) & top;
    float sign = (v >> (format->mantissa_bits + format->exponent_bits)) & 1 ? -1.0f : 1.0f;
    if (exponent == top && format->special == 2)
        return mantissa ? float_of(0x7fffffffu) : sign * INFINITY;
    if (exponent == top && format->special == 1 && mantissa == (1 << format->mantissa_bits) - 1)
        return float_of(0x7fffffffu);
    if (exponent == 0)
        return sign * ldexpf((float)mantissa, 1 - format->bias - format->mantissa_bits);
    return sign * ldexpf((float)(mantissa + (1 << format->mantissa_bits)), exponent - format->bias - format->mantissa_bits);
}

static uint8_t encode_small(double v, const Small *format, int saturate)
{
    int width = format->exponent_bits + format->mantissa_bits;
    uint8_t ones = (uint8_t)((1 << width) - 1), sign = (uint8_t)(signbit(v) ? 1 << width : 0);
    uint8_t infinity = (uint8_t)(((1 << format->exponent_bits) - 1) << format->mantissa_bits);
    if (v != v)
        return format->special ? ones : (uint8_t)(ones & ~0);
    double size = fabs(round_to(v, format->mantissa_bits, 1 - format->bias, 0));
    if (size > format->largest) {
        if (!saturate && format->special)
            return sign | (format->special == 2 ? infinity : ones);
        size = format->largest;
    }
    if (size < ldexp(1.0, 1 - format->bias))
        return sign | (uint8_t)ldexp(size, format->bias - 1 + format->mantissa_bits);
    int exponent;
    double fraction = frexp(size, &exponent);
    return sign | (uint8_t)(((exponent - 1 + format->bias) << format->mantissa_bits) +
                            (int)((fraction * 2 - 1) * (1 << format->mantissa_bits)));
}

float e4m3_to_float(uint8_t v) { return decode_small(v, &E4M3); }
float e5m2_to_float(uint8_t v) { return decode_small(v, &E5M2); }
uint8_t float_to_e4m3(float f) { return encode_small(f, &E4M3, 1); }
uint8_t float_to_e5m2(float f) { return encode_small(f, &E5M2, 1); }
float small_to_float(int format, uint8_t v)
{
    const Small *which = format == FORMAT_E4M3 ? &E4M3 : format == FORMAT_E5M2 ? &E5M2 : format == FORMAT_E2M3 ? &E2M3
                         : format == FORMAT_E3M2 ? &E3M2 : &E2M1;
    return decode_small(v, which);
}

/* Integer to integer. sub: source kind | destination kind << 4 | saturate << 8; kinds: log2(bytes) | signed << 2 */
static int64_t read_integer(Warp *w, const Instr *in, int i, uint32_t kind)
{
    switch (kind) {
    case 0: return (uint8_t)R32(1)[i];
    case 1: return (uint16_t)R32(1)[i];
    case 2: return R32(1)[i];
    case 4: return (int8_t)R32(1)[i];
    case 5: return (int16_t)R32(1)[i];
    case 6: return (int32_t)R32(1)[i];
    default: return (int64_t)R64(1)[i];
    }
}

/* Bounds of an integer kind, as doubles for floats and as 128-bit for integers. */
static __int128 lowest(uint32_t kind) { return kind & 4 ? -((__int128)1 << (8 * (1 << (kind & 3)) - 1)) : 0; }
static __int128 highest(uint32_t kind)
{
    int bits = 8 << (kind & 3);
    return ((__int128)1 << (kind & 4 ? bits - 1 : bits)) - 1;
}

/* A register of its own width takes the value: narrower results are extended by their kind to what `imm` bytes hold. */
static void write_integer(Warp *w, const Instr *in, int i, uint32_t kind, int64_t value)
{
    switch (kind) {
    case 0: value = (uint8_t)value; break;
    case 1: value = (uint16_t)value; break;
    case 2: value = (uint32_t)value; break;
    case 4: value = (int8_t)value; break;
    case 5: value = (int16_t)value; break;
    case 6: value = (int32_t)value; break;
    default: break;
    }
    if (in->imm == 8)
        R64(0)[i] = (uint64_t)value;
    else
        R32(0)[i] = in->imm == 2 ? (uint16_t)value : (uint32_t)value;
}

void op_cvt_int(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t from = in->sub & 15, to = (in->sub >> 4) & 15;
    FOR_LANES(int64_t raw = read_integer(w, in, i, from); if (in->sub & 256) {
        __int128 value = from == 3 ? (__int128)(uint64_t)raw : raw;
        value = value < lowest(to) ? lowest(to) : value > highest(to) ? highest(to) : value;
        raw = (int64_t)value;
    } write_integer(w, in, i, to, raw));
}

CLONED void op_cvt_s64_s32(Warp *w, const Instr *in, uint32_t mask)
{
    int64_t *d = (int64_t *)R64(0);
    int32_t *a = (int32_t *)R32(1);
    FOR_LANES(d[i] = a[i]);
}

CLONED void op_cvt_u64_u32(Warp *w, const Instr *in, uint32_t mask)
{
    uint64_t *d = R64(0);
    uint32_t *a = R32(1);
    FOR_LANES(d[i] = a[i]);
}

CLONED void op_cvt_u32_u64(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0);
    uint64_t *a = R64(1);
    FOR_LANES(d[i] = (uint32_t)a[i]);
}

/* Float kinds: 0 f16, 1 bf16, 2 f32, 3 f64, 4 tf32 (destination only) */
static double read_float(Warp *w, const Instr *in, int i, uint32_t kind)
{
    switch (kind) {
    case 0: return half_to_float((uint16_t)R32(1)[i]);
    case 1: return bfloat_to_float((uint16_t)R32(1)[i]);
    case 3: return RD(1)[i];
    default: return RF(1)[i];
    }
}

static float double_to_float(double v, int round)
{
    if (v != v)
        return float_of(0x7fffffffu);
    double r = round_to(v, 23, -126, round);
    if (fabs(r) > 3.4028234663852886e38 && !isinf(v))
        return (round == 1 || (round == 2 && r > 0) || (round == 3 && r < 0)) ? copysignf(3.40282347e38f, (float)copysign(1, r))
                                                                               : copysignf(INFINITY, (float)copysign(1, r));
    return (float)r;
}

static void write_float(Warp *w, const Instr *in, int i, uint32_t kind, double value, int round)
{
    switch (kind) {
    case 0: R32(0)[i] = encode_half(value, round); break;
    case 1: R32(0)[i] = encode_bfloat(double_to_float(value, round), round); break;
    case 3: RD(0)[i] = value; break;
    case 4: R32(0)[i] = value != value ? 0x7fffffffu : bits_of((float)round_to(value, 10, -126, round)); break;
    default: RF(0)[i] = double_to_float(value, round); break;
    }
}

enum { CVT_FTZ = 1 << 12, CVT_SAT = 1 << 13, CVT_INTEGRAL = 1 << 14, CVT_RELU = 1 << 15, CVT_SATFINITE = 1 << 16 };

/* sub: source kind | destination kind << 4 | rounding << 8 | flags */
void op_cvt_float_float(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t from = in->sub & 15, to = (in->sub >> 4) & 15;
    int round = (int)(in->sub >> 8) & 7;
    FOR_LANES(double value = read_float(w, in, i, from);
              if ((in->sub & CVT_FTZ) && from == 2 && fabs(value) < 0x1p-126) value = copysign(0.0, value);
              if (in->sub & CVT_INTEGRAL) value = round == 1 ? trunc(value) : round == 2 ? floor(value)
                                                 : round == 3 ? ceil(value) : nearbyint(value);
              if (in->sub & CVT_SAT) value = value > 0 ? (value < 1 ? value : 1) : 0;
              if ((in->sub & CVT_RELU) && value < 0) value = 0;
              write_float(w, in, i, to, value, in->sub & CVT_INTEGRAL ? 0 : round);
              if ((in->sub & CVT_FTZ) && to == 2 && fabsf(RF(0)[i]) < 0x1p-126f) RF(0)[i] = copysignf(0, RF(0)[i]));
}

/* NaN becomes 0, or the lowest integer where 64 bits are involved; out of range clamps. */
void op_cvt_float_int(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t from = in->sub & 15, to = (in->sub >> 4) & 15;
    int round = (int)(in->sub >> 8) & 7;
    FOR_LANES(double value = read_float(w, in, i, from);
              if ((in->sub & CVT_FTZ) && fabs(value) < 0x1p-126) value = 0;
              value = round == 1 ? trunc(value) : round == 2 ? floor(value) : round == 3 ? ceil(value) : nearbyint(value);
              int64_t out;
              if (value != value) out = from == 3 || (to & 3) == 3 ? (int64_t)(1ull << ((8 << (to & 3)) - 1)) : 0;
              else if (value <= (double)lowest(to)) out = (int64_t)lowest(to);
              else if (value >= (double)highest(to)) out = (int64_t)highest(to);
              else out = to == 3 ? (int64_t)(uint64_t)value : (int64_t)value;
              write_integer(w, in, i, to, out));
}

void op_cvt_int_float(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t from = in->sub & 15, to = (in->sub >> 4) & 15;
    int round = (int)(in->sub >> 8) & 7;
    static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD, FE_TONEAREST};
    int before = fegetround();
    fesetround(modes[round]);
    for (int i = 0; i < LANES; i++) {
        if (!(mask >> i & 1))
            continue;
        volatile int64_t raw = read_integer(w, in, i, from);
        volatile uint64_t natural = (uint64_t)raw;
        if (to == 2) {
            volatile float out = from == 3 ? (float)natural : (float)raw;
            RF(0)[i] = out;
        } else if (to == 3) {
            volatile double out = from == 3 ? (double)natural : (double)raw;
            RD(0)[i] = out;
        } else {
            volatile double out = from == 3 ? (double)natural : (double)raw;
            fesetround(FE_TONEAREST);
            write_float(w, in, i, to, out, round);
            fesetround(modes[round]);
        }
    }
    fesetround(before);
}

/* Two floats into one register: cvt.rn.bf16x2.f32 d, high, low. */
CLONED void op_cvt_bf16x2_f32(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0), *pa = R32(1), *pb = R32(2);
    FOR_LANES(uint32_t a = pa[i]; uint32_t b = pb[i];
              uint32_t high = (a + 0x7fff + ((a >> 16) & 1)) & 0xffff0000u;
              uint32_t low = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
              high = (a & 0x7fffffffu) > 0x7f800000u ? 0x7fff0000u : high;
              low = (b & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : low; d[i] = high | low);
}

/* The general packed forms. sub: destination format | rounding << 8 | flags. */
static uint32_t encode_format(uint32_t format, double v, int round, uint32_t sub)
{
    if ((sub & CVT_RELU) && !(v > 0) && v == v)
        v = 0;
    switch (format) {
    case FORMAT_F16:
        if ((sub & CVT_SATFINITE) && fabs(v) > 65504)
            v = copysign(65504, v);
        return encode_half(v, round);
    case FORMAT_BF16: return encode_bfloat((float)v, round);
    case FORMAT_E4M3: return encode_small(v, &E4M3, 1);
    case FORMAT_E5M2: return encode_small(v, &E5M2, 1);
    case FORMAT_E2M3: return encode_small(v, &E2M3, 1);
    case FORMAT_E3M2: return encode_small(v, &E3M2, 1);
    default: return encode_small(v, &E2M1, 1);
    }
}

void op_cvt_pack_f32(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t format = in->sub & 15, *d = R32(0);
    int round = (int)(in->sub >> 8) & 7, bits = format <= FORMAT_BF16 ? 16 : format == FORMAT_E2M1 ? 4 : 8;
    FOR_LANES(uint32_t high = encode_format(format, RF(1)[i], round, in->sub);
              d[i] = (high << bits) | encode_format(format, RF(2)[i], round, in->sub));
}

/* Packed half pairs to packed fp8, and packed small formats to half pairs. sub: source | destination << 4 | ... */
void op_cvt_packed(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t from = in->sub & 15, to = (in->sub >> 4) & 15, *d = R32(0), *a = R32(1);
    int round = (int)(in->sub >> 8) & 7;
    int from_bits = from <= FORMAT_BF16 ? 16 : from == FORMAT_E2M1 ? 4 : 8;
    int to_bits = to <= FORMAT_BF16 ? 16 : to == FORMAT_E2M1 ? 4 : 8;
    FOR_LANES(uint32_t out = 0; for (int k = 0; k < 2; k++) {
        uint32_t raw = (a[i] >> (k * from_bits)) & ((1u << from_bits) - 1);
        float value = from == FORMAT_F16 ? half_to_float((uint16_t)raw) : from == FORMAT_BF16 ? bfloat_to_float((uint16_t)raw)
                      : small_to_float((int)from, (uint8_t)raw);
        out |= encode_format(to, value, round, in->sub) << (k * to_bits);
    } d[i] = out);
}

/* ue8m0: a power of two in a byte; rounding up (sub 3) or toward zero. */
void op_cvt_ue8m0x2_f32(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0);
    FOR_LANES(uint32_t out = 0; for (int k = 0; k < 2; k++) {
        uint32_t bits = R32(k ? 1 : 2)[i] & 0x7fffffffu;
        uint32_t e = bits > 0x7f800000u ? 255 : (bits >> 23) + (in->sub == 3 && (bits & 0x7fffff) ? 1 : 0);
        out |= (bits <= 0x7f800000u && e > 254 ? 254 : e) << (8 * k);
    } d[i] = out);
}

void op_cvt_bf16x2_ue8m0x2(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0), *a = R32(1);
    FOR_LANES(uint32_t low = a[i] & 255; uint32_t high = (a[i] >> 8) & 255;
              low = low == 255 ? 0x7fff : low ? low << 7 : 0x40; high = high == 255 ? 0x7fff : high ? high << 7 : 0x40;
              d[i] = low | (high << 16));
}

/* 16-bit arithmetic, one or two to a register. sub: operation | bf16 << 8 | two << 9 | ftz << 10 | sat << 11 | relu << 12 |
 * nan << 13 | xorsign << 14 */
enum { HALF_ADD, HALF_SUB, HALF_MUL, HALF_FMA, HALF_MIN, HALF_MAX, HALF_NEG, HALF_ABS, HALF_EX2, HALF_TANH };

static uint16_t half_operation(uint32_t sub, uint16_t ra, uint16_t rb, uint16_t rc)
{
    int bf16 = (sub >> 8) & 1;
    uint32_t what = sub & 255;
    if (what == HALF_NEG)
        return ra ^ 0x8000;
    if (what == HALF_ABS)
        return ra & 0x7fff;
    double a = bf16 ? bfloat_to_float(ra) : half_to_float(ra), b = bf16 ? bfloat_to_float(rb) : half_to_float(rb);
    double c = bf16 ? bfloat_to_float(rc) : half_to_float(rc), out;
    if (sub >> 10 & 1) {
        double least = bf16 ? 0x1p-126 : 0x1p-14;
        a = fabs(a) < least ? copysign(0, a) : a;
        b = fabs(b) < least ? copysign(0, b) : b;
        c = fabs(c) < least ? copysign(0, c) : c;
    }
    switch (what) {
    case HALF_ADD: out = a + b; break;
    case HALF_SUB: out = a - b; break;
    case HALF_MUL: out = a * b; break;
    case HALF_FMA: out = fma(a, b, c); break;
    case HALF_EX2: out = exp2(a); break;
    case HALF_TANH: out = tanh(a); break;
    default:
        out = float_minmax((float)a, (float)b, (what == HALF_MAX ? 128u : 0) | (sub >> 13 & 1 ? 32 : 0) | (sub >> 14 & 1 ? 64 : 0));
        break;
    }
    if (out != out)
        return 0x7fff;
    if (sub >> 11 & 1)
        out = out > 0 ? (out < 1 ? out : 1) : 0;
    if ((sub >> 12 & 1) && out < 0)
        out = 0;
    if (!bf16)
        return encode_half(out, 0);
    double exact = round_to(out, 7, -126, 0);
    return encode_bfloat((float)exact, 0);
}

void op_half(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0), *a = R32(1), *b = in->r[2] >= 0 ? R32(2) : a, *c = in->r[3] >= 0 ? R32(3) : a;
    FOR_LANES(uint32_t out = half_operation(in->sub, (uint16_t)a[i], (uint16_t)b[i], (uint16_t)c[i]);
              if (in->sub >> 9 & 1) out |= (uint32_t)half_operation(in->sub, (uint16_t)(a[i] >> 16), (uint16_t)(b[i] >> 16),
                                                                   (uint16_t)(c[i] >> 16)) << 16;
              d[i] = out);
}
