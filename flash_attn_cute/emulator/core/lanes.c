/* Comparisons, and instructions by which the lanes of a warp see each other. */
#include "machine.h"

#include <math.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

uint32_t mask_of(const uint32_t *lanes)
{
#ifdef __SSE2__
    uint32_t out = 0;
    for (int part = 0; part < 8; part++) {
        __m128i four = _mm_load_si128((const __m128i *)(lanes + 4 * part));
        __m128i zero = _mm_cmpeq_epi32(four, _mm_setzero_si128());
        out |= (uint32_t)(_mm_movemask_ps(_mm_castsi128_ps(zero)) ^ 15) << (4 * part);
    }
    return out;
#else
    uint32_t out = 0;
    for (int i = 0; i < LANES; i++)
        out |= (uint32_t)(lanes[i] != 0) << i;
    return out;
#endif
}

void lanes_of(uint32_t *lanes, uint32_t bits, uint32_t mask)
{
    FOR_LANES(lanes[i] = 0u - ((bits >> i) & 1));
}

/* setp: sub is the comparison | combining operation << 8 (0 none, 1 and, 2 or, 3 xor). r: p, q, a, b, c. */
enum { CMP_EQ, CMP_NE, CMP_LT, CMP_LE, CMP_GT, CMP_GE, CMP_EQU, CMP_NEU, CMP_LTU, CMP_LEU, CMP_GTU, CMP_GEU, CMP_NUM, CMP_NAN };

static void combine(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *p = R32(0), *q = in->r[1] >= 0 ? R32(1) : NULL, *c = in->r[4] >= 0 ? R32(4) : NULL;
    uint32_t how = in->sub >> 8;
    FOR_LANES(uint32_t yes = p[i]; uint32_t no = ~yes; uint32_t with = c ? c[i] : 0;
              p[i] = how == 1 ? yes & with : how == 2 ? yes | with : how == 3 ? yes ^ with : yes;
              if (q) q[i] = how == 1 ? no & with : how == 2 ? no | with : how == 3 ? no ^ with : no);
}

#define COMPARE(condition) FOR_LANES(d[i] = (condition) ? ~0u : 0)

#define SETP_INTEGER(name, type, storage, lanes)                   \
    CLONED void op_setp_##name(Warp *w, const Instr *in, uint32_t mask) \
    {                                                              \
        uint32_t *d = R32(0);                                      \
        storage *a = (storage *)lanes(2), *b = (storage *)lanes(3); \
        switch (in->sub & 255) {                                   \
        case CMP_EQ: COMPARE((type)a[i] == (type)b[i]); break;     \
        case CMP_NE: COMPARE((type)a[i] != (type)b[i]); break;     \
        case CMP_LT: COMPARE((type)a[i] < (type)b[i]); break;      \
        case CMP_LE: COMPARE((type)a[i] <= (type)b[i]); break;     \
        case CMP_GT: COMPARE((type)a[i] > (type)b[i]); break;      \
        default: COMPARE((type)a[i] >= (type)b[i]); break;         \
        }                                                          \
        if ((in->sub >> 8) | (uint32_t)(in->r[1] >= 0))            \
            combine(w, in, mask);                                  \
    }
SETP_INTEGER(s32, int32_t, int32_t, R32)
SETP_INTEGER(u32, uint32_t, uint32_t, R32)
SETP_INTEGER(s64, int64_t, int64_t, R64)
SETP_INTEGER(u64, uint64_t, uint64_t, R64)
SETP_INTEGER(s16, int16_t, uint32_t, R32)
SETP_INTEGER(u16, uint16_t, uint32_t, R32)

#define SETP_FLOAT(name, type, read_a, read_b)                     \
    CLONED void op_setp_##name(Warp *w, const Instr *in, uint32_t mask) \
    {                                                              \
        uint32_t *d = R32(0);                                      \
        switch (in->sub & 255) {                                   \
        case CMP_EQ: COMPARE((read_a) == (read_b)); break;         \
        case CMP_NE: COMPARE(islessgreater((read_a), (read_b))); break; \
        case CMP_LT: COMPARE((read_a) < (read_b)); break;          \
        case CMP_LE: COMPARE((read_a) <= (read_b)); break;         \
        case CMP_GT: COMPARE((read_a) > (read_b)); break;          \
        case CMP_GE: COMPARE((read_a) >= (read_b)); break;         \
        case CMP_EQU: COMPARE(!islessgreater((read_a), (read_b))); break; \
        case CMP_NEU: COMPARE((read_a) != (read_b)); break;        \
        case CMP_LTU: COMPARE(!((read_a) >= (read_b))); break;     \
        case CMP_LEU: COMPARE(!((read_a) > (read_b))); break;      \
        case CMP_GTU: COMPARE(!((read_a) <= (read_b))); break;     \
        case CMP_GEU: COMPARE(!((read_a) < (read_b))); break;      \
        case CMP_NUM: COMPARE((read_a) == (read_a) && (read_b) == (read_b)); break; \
        default: COMPARE((read_a) != (read_a) || (read_b) != (read_b)); break; \
        }                                                          \
        if ((in->sub >> 8) | (uint32_t)(in->r[1] >= 0))            \
            combine(w, in, mask);                                  \
    }
SETP_FLOAT(f32, float, RF(2)[i], RF(3)[i])
SETP_FLOAT(f64, double, RD(2)[i], RD(3)[i])
SETP_FLOAT(f16, float, half_to_float((uint16_t)R32(2)[i]), half_to_float((uint16_t)R32(3)[i]))
SETP_FLOAT(bf16, float, bfloat_to_float((uint16_t)R32(2)[i]), bfloat_to_float((uint16_t)R32(3)[i]))

/* shfl.sync: sub 0 up, 1 down, 2 bfly, 3 idx. r: d, p, a, b, c, members. */
void op_shfl(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t members = R32(5)[__builtin_ctz(mask)];
    if (!require_lanes(w, members))
        return;
    uint32_t *d = R32(0), *p = in->r[1] >= 0 ? R32(1) : NULL, *a = R32(2), *b = R32(3), *c = R32(4);
    uint32_t before[LANES];
    for (int i = 0; i < LANES; i++)
        before[i] = a[i];
    FOR_LANES(uint32_t clamp = c[i] & 31; uint32_t segment = (c[i] >> 8) & 31; uint32_t distance = b[i] & 31;
              uint32_t lane = (uint32_t)i; uint32_t most = (lane & segment) | (clamp & ~segment);
              uint32_t least = lane & segment; int32_t source; int valid;
              switch (in->sub) {
              case 0: source = (int32_t)lane - (int32_t)distance; valid = source >= (int32_t)most; break;
              case 1: source = (int32_t)(lane + distance); valid = source <= (int32_t)most; break;
              case 2: source = (int32_t)(lane ^ distance); valid = source <= (int32_t)most; break;
              default: source = (int32_t)(least | (distance & ~segment)); valid = source <= (int32_t)most; break;
              } d[i] = before[valid ? source : i]; if (p) p[i] = valid ? ~0u : 0);
}

/* vote.sync: sub 0 all, 1 any, 2 uni, 3 ballot. r: d, a, members. */
void op_vote(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t members = R32(2)[__builtin_ctz(mask)];
    if (!require_lanes(w, members))
        return;
    uint32_t voters = members & mask, yes = mask_of(R32(1)) & voters, *d = R32(0), out;
    switch (in->sub) {
    case 0: out = yes == voters ? ~0u : 0; break;
    case 1: out = yes ? ~0u : 0; break;
    case 2: out = yes == voters || !yes ? ~0u : 0; break;
    default: out = yes; break;
    }
    FOR_LANES(d[i] = out);
}

/* match.sync: sub 0 any, 1 all; bit 8: 64 bits. r: d, p, a, members. */
void op_match(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t members = R32(3)[__builtin_ctz(mask)];
    if (!require_lanes(w, members))
        return;
    uint32_t out[LANES] = {0}, group = members & mask;
    for (uint32_t left = group; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        for (uint32_t other = group; other; other &= other - 1) {
            int j = __builtin_ctz(other);
            if (in->sub & 256 ? R64(2)[i] == R64(2)[j] : R32(2)[i] == R32(2)[j])
                out[i] |= 1u << j;
        }
    }
    int all = out[__builtin_ctz(group)] == group;
    uint32_t *d = R32(0);
    FOR_LANES(d[i] = in->sub & 1 ? (all ? group : 0) : out[i]; if (in->r[1] >= 0) R32(1)[i] = all ? ~0u : 0);
}

/* redux.sync: sub 0 add, 1 min, 2 max, 3 and, 4 or, 5 xor; bit 8 signed, bit 9 float, bit 10 NaN, bit 11 abs. r: d, a, members. */
void op_redux(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t members = R32(2)[__builtin_ctz(mask)];
    if (!require_lanes(w, members))
        return;
    uint32_t group = members & mask, *a = R32(1), *d = R32(0), what = in->sub & 7;
    uint32_t out = a[__builtin_ctz(group)];
    if ((in->sub & 0x800) != 0)
        out &= 0x7fffffffu;
    for (uint32_t left = group & (group - 1); left; left &= left - 1) {
        uint32_t value = a[__builtin_ctz(left)];
        if (in->sub & 0x200) {
            uint32_t how = (what == 2 ? 128u : 0) | (in->sub & 0x400 ? 32u : 0) | (in->sub & 0x800 ? 256u : 0);
            out = bits_of(float_minmax(float_of(out), float_of(value), how));
            continue;
        }
        int less = in->sub & 0x100 ? (int32_t)value < (int32_t)out : value < out;
        switch (what) {
        case 0: out += value; break;
        case 1: out = less ? value : out; break;
        case 2: out = less ? out : value; break;
        case 3: out &= value; break;
        case 4: out |= value; break;
        default: out ^= value; break;
        }
    }
    FOR_LANES(d[i] = out);
}

/* elect.sync: the lowest member leads. r: d, p, members. Alone among the .sync instructions it passes nothing between lanes, so for
 * the race check they do not synchronise here: what it elects a lane for has to come behind something that does. */
void op_elect(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t members = R32(2)[__builtin_ctz(mask)];
    if (!gather_lanes(w, members))
        return;
    uint32_t leader = (uint32_t)__builtin_ctz(members & mask), *d = R32(0), *p = R32(1);
    FOR_LANES(d[i] = leader; p[i] = (uint32_t)i == leader ? ~0u : 0);
}

void op_activemask(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0);
    FOR_LANES(d[i] = mask);
}

/* Clocks: a count that only ever grows. sub 1: 64 bits. */
void op_clock(Warp *w, const Instr *in, uint32_t mask)
{
    uint64_t now = (uint64_t)++w->machine->totals.slices * 16;
    FOR_LANES(if (in->sub) R64(0)[i] = now; else R32(0)[i] = (uint32_t)now);
}
