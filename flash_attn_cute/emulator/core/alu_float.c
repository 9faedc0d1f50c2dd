/* Floating point in 32 and 64 bits. The common forms (round to nearest, subnormals kept) are vector loops; the others
 * go through one general routine that knows rounding mode, flush to zero and saturation. NaN results are the
 * hardware's canonical NaN. */
#include "machine.h"

#include <fenv.h>
#include <math.h>

#define CANONICAL_NAN 0x7fffffffu

/* `sub` of the general forms */
enum { ROUND_MASK = 3, ROUND_NEAREST = 0, ROUND_ZERO = 1, ROUND_DOWN = 2, ROUND_UP = 3, FTZ = 4, SAT = 8, WIDE_PAIR = 16 };

static inline float canonical(float x) { return x == x ? x : float_of(CANONICAL_NAN); }
static inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
static inline float saturated(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }

#define FLOAT2(name, expression)                                   \
    CLONED void op_##name(Warp *w, const Instr *in, uint32_t mask) \
    {                                                              \
        float *d = RF(0), *pa = RF(1), *pb = RF(2);                \
        FOR_LANES(float a = pa[i]; float b = pb[i]; d[i] = canonical(expression)); \
    }
FLOAT2(add_f32, a + b)
FLOAT2(sub_f32, a - b)
FLOAT2(mul_f32, a * b)

CLONED void op_fma_f32(Warp *w, const Instr *in, uint32_t mask)
{
    float *d = RF(0), *a = RF(1), *b = RF(2), *c = RF(3);
    FOR_LANES(d[i] = canonical(__builtin_fmaf(a[i], b[i], c[i])));
}

/* Pairs in 64-bit registers: 64 floats in a row when every lane is active. */
#define PAIRS(...)                                                          \
    do {                                                                    \
        if (mask == FULL_MASK) {                                            \
            _Pragma("GCC ivdep") for (int i = 0; i < 2 * LANES; i++) {      \
                __VA_ARGS__;                                                \
            }                                                               \
        } else {                                                            \
            for (int i = 0; i < 2 * LANES; i++)                             \
                if (mask >> (i / 2) & 1) {                                  \
                    __VA_ARGS__;                                            \
                }                                                           \
        }                                                                   \
    } while (0)

#define FLOAT2X2(name, expression)                                 \
    CLONED void op_##name(Warp *w, const Instr *in, uint32_t mask) \
    {                                                              \
        float *d = RF(0), *pa = RF(1), *pb = RF(2);                \
        PAIRS(float a = pa[i]; float b = pb[i]; d[i] = canonical(expression)); \
    }
FLOAT2X2(add_f32x2, a + b)
FLOAT2X2(sub_f32x2, a - b)
FLOAT2X2(mul_f32x2, a * b)

CLONED void op_fma_f32x2(Warp *w, const Instr *in, uint32_t mask)
{
    float *d = RF(0), *a = RF(1), *b = RF(2), *c = RF(3);
    PAIRS(d[i] = canonical(__builtin_fmaf(a[i], b[i], c[i])));
}

/* The compiler must not move arithmetic across a change of the rounding mode, so each step is opaque to it. */
#define OPAQUE(x) __asm__ volatile("" : "+m"(x))

static int enter_rounding(uint32_t sub)
{
    static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    int before = fegetround();
    fesetround(modes[sub & ROUND_MASK]);
    return before;
}

enum { GENERAL_ADD, GENERAL_SUB, GENERAL_MUL, GENERAL_FMA, GENERAL_DIV, GENERAL_SQRT, GENERAL_RCP };

static float general(int what, float a, float b, float c, uint32_t sub)
{
    if (sub & FTZ) {
        a = flushed(a);
        b = flushed(b);
        c = flushed(c);
    }
    volatile float va = a, vb = b, vc = c, out = 0;
    switch (what) {
    case GENERAL_ADD: out = va + vb; break;
    case GENERAL_SUB: out = va - vb; break;
    case GENERAL_MUL: out = va * vb; break;
    case GENERAL_FMA: out = fmaf(va, vb, vc); break;
    case GENERAL_DIV: out = va / vb; break;
    case GENERAL_SQRT: out = sqrtf(va); break;
    case GENERAL_RCP: out = 1.0f / va; break;
    }
    float result = canonical(out);
    if (sub & FTZ)
        result = flushed(result);
    return sub & SAT ? saturated(result) : result;
}

static void general_lanes(Warp *w, const Instr *in, uint32_t mask, int what, int inputs)
{
    int before = enter_rounding(in->sub);
    float *d = RF(0), *a = RF(1), *b = inputs > 1 ? RF(2) : a, *c = inputs > 2 ? RF(3) : a;
    int width = in->sub & WIDE_PAIR ? 2 : 1;
    for (int i = 0; i < LANES * width; i++)
        if (mask >> (i / width) & 1)
            d[i] = general(what, a[i], b[i], c[i], in->sub);
    fesetround(before);
}

void op_add_f32_general(Warp *w, const Instr *in, uint32_t mask) { general_lanes(w, in, mask, GENERAL_ADD, 2); }
void op_sub_f32_general(Warp *w, const Instr *in, uint32_t mask) { general_lanes(w, in, mask, GENERAL_SUB, 2); }
void op_mul_f32_general(Warp *w, const Instr *in, uint32_t mask) { general_lanes(w, in, mask, GENERAL_MUL, 2); }
void op_fma_f32_general(Warp *w, const Instr *in, uint32_t mask) { general_lanes(w, in, mask, GENERAL_FMA, 3); }
void op_div_f32(Warp *w, const Instr *in, uint32_t mask) { general_lanes(w, in, mask, GENERAL_DIV, 2); }
void op_sqrt_f32(Warp *w, const Instr *in, uint32_t mask) { general_lanes(w, in, mask, GENERAL_SQRT, 1); }
void op_rcp_f32(Warp *w, const Instr *in, uint32_t mask) { general_lanes(w, in, mask, GENERAL_RCP, 1); }

/* A 16-bit factor pair added to a float: sub bit 8 set for bf16. Registers are 16-bit a, b and float c. */
void op_fma_f32_mixed(Warp *w, const Instr *in, uint32_t mask)
{
    int before = enter_rounding(in->sub);
    float *d = RF(0), *c = RF(3);
    uint32_t *a = R32(1), *b = R32(2);
    int bf16 = (in->sub & 256) != 0;
    for (int i = 0; i < LANES; i++)
        if (mask >> i & 1) {
            float x = bf16 ? bfloat_to_float((uint16_t)a[i]) : half_to_float((uint16_t)a[i]);
            float y = bf16 ? bfloat_to_float((uint16_t)b[i]) : half_to_float((uint16_t)b[i]);
            d[i] = general(GENERAL_FMA, x, y, c[i], in->sub);
        }
    fesetround(before);
}

/* A 16-bit addend: add.f32.bf16 d, a, c. */
void op_add_f32_mixed(Warp *w, const Instr *in, uint32_t mask)
{
    int before = enter_rounding(in->sub);
    float *d = RF(0), *c = RF(2);
    uint32_t *a = R32(1);
    for (int i = 0; i < LANES; i++)
        if (mask >> i & 1) {
            float x = in->sub & 256 ? bfloat_to_float((uint16_t)a[i]) : half_to_float((uint16_t)a[i]);
            d[i] = general(in->sub & 512 ? GENERAL_SUB : GENERAL_ADD, x, c[i], 0, in->sub);
        }
    fesetround(before);
}

/* Minimum and maximum: a NaN loses against a number (unless bit 5 is set), and -0 is below +0. */
enum { PROPAGATE_NAN = 32, XOR_SIGN = 64, IS_MAX = 128, ABSOLUTE = 256 };

static inline float lesser(float a, float b) { return a < b || (a == b && signbit(a)) ? a : b; }

float float_minmax(float a, float b, uint32_t sub)
{
    if (sub & FTZ) {
        a = flushed(a);
        b = flushed(b);
    }
    uint32_t sign = (bits_of(a) ^ bits_of(b)) & 0x80000000u;
    if (sub & (ABSOLUTE | XOR_SIGN)) {
        a = fabsf(a);
        b = fabsf(b);
    }
    float out;
    if (a != a || b != b)
        out = (sub & PROPAGATE_NAN) || (a != a && b != b) ? float_of(CANONICAL_NAN) : a != a ? b : a;
    else
        out = sub & IS_MAX ? -lesser(-a, -b) : lesser(a, b);
    return sub & XOR_SIGN ? float_of((bits_of(out) & 0x7fffffffu) | sign) : out;
}

CLONED void op_max_f32(Warp *w, const Instr *in, uint32_t mask)
{
    float *d = RF(0), *pa = RF(1), *pb = RF(2);
    FOR_LANES(float a = pa[i]; float b = pb[i]; uint32_t zeros = bits_of(a) & bits_of(b);
              float greater = a > b ? a : b; greater = a == b ? float_of(a == 0 ? zeros : bits_of(a)) : greater;
              greater = a != a ? b : b != b ? a : greater; d[i] = canonical(greater));
}

CLONED void op_min_f32(Warp *w, const Instr *in, uint32_t mask)
{
    float *d = RF(0), *pa = RF(1), *pb = RF(2);
    FOR_LANES(float a = pa[i]; float b = pb[i]; uint32_t zeros = bits_of(a) | bits_of(b);
              float less = a < b ? a : b; less = a == b ? float_of(a == 0 ? zeros : bits_of(a)) : less;
              less = a != a ? b : b != b ? a : less; d[i] = canonical(less));
}

void op_minmax_f32(Warp *w, const Instr *in, uint32_t mask)
{
    float *d = RF(0), *a = RF(1), *b = RF(2), *c = in->r[3] >= 0 ? RF(3) : NULL;
    FOR_LANES(float out = float_minmax(a[i], b[i], in->sub); if (c) out = float_minmax(out, c[i], in->sub); d[i] = out);
}

/* Sign operations are on bits: sub bit 0 ftz */
CLONED void op_abs_f32(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0), *a = R32(1);
    FOR_LANES(uint32_t x = a[i] & 0x7fffffffu; d[i] = in->sub && x < 0x800000u ? 0 : x);
}

CLONED void op_neg_f32(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0), *a = R32(1);
    FOR_LANES(uint32_t x = a[i] ^ 0x80000000u; d[i] = in->sub && (x & 0x7fffffffu) < 0x800000u ? x & 0x80000000u : x);
}

void op_copysign_f32(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0), *a = R32(1), *b = R32(2);
    FOR_LANES(d[i] = (a[i] & 0x80000000u) | (b[i] & 0x7fffffffu));
}

/* 2 to the power x by splitting off the integer: the polynomial is a minimax fit on [-1/2, 1/2], and exact at 0, so that
 * integers come out exact as they do on the hardware. */
static inline float exp2_vector(float x)
{
    float clamped = x < -160.0f ? -160.0f : x > 160.0f ? 160.0f : x;
    float shifted = clamped + 12582912.0f; /* 1.5 * 2^23: the sum's low bits are the nearest integer */
    int32_t n = (int32_t)(bits_of(shifted) - bits_of(12582912.0f));
    float f = clamped - (shifted - 12582912.0f);
    float p = 1.535336188319500e-4f;
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    int32_t half = n >> 1; /* in two steps, so that each power of two is a normal number */
    return p * float_of((uint32_t)(half + 127) << 23) * float_of((uint32_t)(n - half + 127) << 23);
}

CLONED void op_ex2_f32(Warp *w, const Instr *in, uint32_t mask) /* sub: 1 flushes subnormals */
{
    float *d = RF(0), *pa = RF(1);
    uint32_t limit = in->sub ? 0x800000u : 0;
    FOR_LANES(float a = pa[i]; float e = exp2_vector(a); e = bits_of(e) < limit ? 0.0f : e;
              d[i] = a == a ? e : float_of(CANONICAL_NAN));
}

#define SPECIAL(name, expression)                                  \
    void op_##name(Warp *w, const Instr *in, uint32_t mask)        \
    {                                                              \
        float *d = RF(0), *pa = RF(1);                             \
        FOR_LANES(float a = in->sub ? flushed(pa[i]) : pa[i]; float out = canonical(expression); \
                  d[i] = in->sub ? flushed(out) : out);            \
    }
SPECIAL(lg2_f32, log2f(a))
SPECIAL(rcp_approx_f32, 1.0f / a)
SPECIAL(rsqrt_f32, (float)(1.0 / sqrt((double)a)))
SPECIAL(sqrt_approx_f32, sqrtf(a))
SPECIAL(sin_f32, sinf(a))
SPECIAL(cos_f32, cosf(a))
SPECIAL(tanh_f32, tanhf(a))

void op_div_approx_f32(Warp *w, const Instr *in, uint32_t mask)
{
    float *d = RF(0), *a = RF(1), *b = RF(2);
    FOR_LANES(d[i] = general(GENERAL_DIV, a[i], b[i], 0, in->sub));
}

/* testp: sub 0 finite, 1 infinite, 2 number, 3 not a number, 4 normal, 5 subnormal; bit 8: 64 bits */
void op_testp(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0);
    FOR_LANES(double a = in->sub & 256 ? RD(1)[i] : RF(1)[i];
              int kind = in->sub & 256 ? fpclassify(a) : fpclassify(RF(1)[i]); int yes = 0;
              switch (in->sub & 255) {
              case 0: yes = isfinite(a) != 0; break;
              case 1: yes = kind == FP_INFINITE; break;
              case 2: yes = kind != FP_NAN; break;
              case 3: yes = kind == FP_NAN; break;
              case 4: yes = kind == FP_NORMAL; break;
              default: yes = kind == FP_SUBNORMAL; break;
              } d[i] = yes ? ~0u : 0);
}

#define DOUBLE(name, inputs, expression)                           \
    void op_##name(Warp *w, const Instr *in, uint32_t mask)        \
    {                                                              \
        int before = enter_rounding(in->sub);                      \
        double *d = RD(0), *pa = RD(1), *pb = inputs > 1 ? RD(2) : pa, *pc = inputs > 2 ? RD(3) : pa; \
        for (int i = 0; i < LANES; i++)                            \
            if (mask >> i & 1) {                                   \
                volatile double a = pa[i], b = pb[i], c = pc[i];   \
                UNUSED(b);                                         \
                UNUSED(c);                                         \
                volatile double out = expression;                  \
                d[i] = out;                                        \
            }                                                      \
        fesetround(before);                                        \
    }
DOUBLE(add_f64, 2, a + b)
DOUBLE(sub_f64, 2, a - b)
DOUBLE(mul_f64, 2, a * b)
DOUBLE(div_f64, 2, a / b)
DOUBLE(fma_f64, 3, fma(a, b, c))
DOUBLE(sqrt_f64, 1, sqrt(a))
DOUBLE(rcp_f64, 1, 1.0 / a)
DOUBLE(rsqrt_f64, 1, 1.0 / sqrt(a))
DOUBLE(min_f64, 2, fmin(a, b))
DOUBLE(max_f64, 2, fmax(a, b))
DOUBLE(abs_f64, 1, fabs(a))
DOUBLE(neg_f64, 1, -a)
