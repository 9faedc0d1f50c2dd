/* Atomic operations. The emulator runs one warp at a time, so an operation on each lane in turn is atomic. */
#include "machine.h"

#include <string.h>

enum { ATOM_ADD, ATOM_MIN, ATOM_MAX, ATOM_AND, ATOM_OR, ATOM_XOR, ATOM_EXCH, ATOM_CAS, ATOM_INC, ATOM_DEC };
enum { TYPE_UNSIGNED, TYPE_SIGNED, TYPE_FLOAT, TYPE_HALF2, TYPE_BFLOAT2 };
enum { SPACE_GENERIC, SPACE_GLOBAL, SPACE_SHARED };
#define ADDRESS_WIDE 0x80000000u

/* A pair of 16-bit floats, or one: their sum, minimum or maximum. */
static uint64_t combine_halves(uint32_t what, int bf16, int bytes, uint64_t old, uint64_t value)
{
    uint64_t out = 0;
    for (int k = 0; k < bytes / 2; k++) {
        uint16_t a = (uint16_t)(old >> (16 * k)), b = (uint16_t)(value >> (16 * k));
        float x = bf16 ? bfloat_to_float(a) : half_to_float(a), y = bf16 ? bfloat_to_float(b) : half_to_float(b);
        float r = what == ATOM_ADD ? x + y : float_minmax(x, y, what == ATOM_MAX ? 128 : 0);
        out |= (uint64_t)(bf16 ? float_to_bfloat(r) : float_to_half(r)) << (16 * k);
    }
    return out;
}

uint64_t atomic_combine(uint32_t what, uint32_t type, int bytes, uint64_t old, uint64_t value, uint64_t other)
{
    uint64_t ones = bytes == 8 ? ~0ull : (1ull << (8 * bytes)) - 1;
    int64_t signed_old = bytes == 8 ? (int64_t)old : (int32_t)old, signed_value = bytes == 8 ? (int64_t)value : (int32_t)value;
    if (type >= TYPE_HALF2 && what <= ATOM_MAX)
        return combine_halves(what, type == TYPE_BFLOAT2, bytes, old, value);
    switch (what) {
    case ATOM_ADD:
        if (type == TYPE_FLOAT && bytes == 4)
            return bits_of(float_of((uint32_t)old) + float_of((uint32_t)value));
        if (type == TYPE_FLOAT) {
            double a, b;
            memcpy(&a, &old, 8);
            memcpy(&b, &value, 8);
            a += b;
            memcpy(&old, &a, 8);
            return old;
        }
        return (old + value) & ones;
    case ATOM_MIN:
        if (type == TYPE_FLOAT)
            return bits_of(float_minmax(float_of((uint32_t)old), float_of((uint32_t)value), 0));
        return type == TYPE_SIGNED ? (signed_value < signed_old ? value : old) : (value < old ? value : old);
    case ATOM_MAX:
        if (type == TYPE_FLOAT)
            return bits_of(float_minmax(float_of((uint32_t)old), float_of((uint32_t)value), 128));
        return type == TYPE_SIGNED ? (signed_value > signed_old ? value : old) : (value > old ? value : old);
    case ATOM_AND: return old & value;
    case ATOM_OR: return old | value;
    case ATOM_XOR: return old ^ value;
    case ATOM_EXCH: return value;
    case ATOM_CAS: return old == value ? other : old;
    case ATOM_INC: return old >= value ? 0 : old + 1;
    default: return old == 0 || old > value ? value : old - 1;
    }
}

/* r: d (-1: red), address, value, other (cas), all lists of `count` values when vectors. sub: operation | type << 4 |
 * log2(bytes) << 8 | space << 12 | count << 16 | acquires << 20 | releases << 21 | scope << 22 */
void op_atom(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t what = in->sub & 15, type = (in->sub >> 4) & 15, bytes = 1u << ((in->sub >> 8) & 15);
    uint32_t space = (in->sub >> 12) & 7, count = (in->sub >> 16) & 15;
    const int32_t *values = w->machine->program.pool + in->pool, *results = values + count;
    if (w->machine->races)
        race_begin_warp(w, in, mask);
    for (uint32_t left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        uint64_t address = (in->sub & ADDRESS_WIDE ? R64(1)[i] : R32(1)[i]) + (uint64_t)in->imm;
        uint32_t size = bytes * count;
        if ((address & (size - 1)) && (w->machine->checks & CHECK_ALIGNMENT))
            fault(w, in, FAULT_MISALIGNED, "atomic on %u bytes at address 0x%llx", size, (unsigned long long)address);
        uint8_t *where;
        if (space == SPACE_SHARED) {
            shared_read(w, in, (uint32_t)address, size);
            where = shared_write(w, in, (uint32_t)address, size);
        } else if (space == SPACE_GLOBAL)
            where = global_span(w, in, address, size, 1);
        else
            where = generic_span(w, in, i, address, size, 1);
        if (space != SPACE_SHARED && address < SHARED_WINDOW) {
            w->machine->totals.global_load_bytes += results[0] >= 0 ? size : 0;
            w->machine->totals.global_store_bytes += size;
        }
        if (w->machine->races) {
            uint64_t place = space == SPACE_SHARED ? SHARED_WINDOW | (uint32_t)address : address;
            race_touch(w, place, size, i, TOUCH_WRITE | TOUCH_STRONG | (in->sub >> 22 & 3) << TOUCH_SCOPE_SHIFT);
            race_order(w, i, place, in->sub >> 20 & 15, 1, 1);
        }
        for (uint32_t k = 0; k < count; k++, where += bytes) {
            uint64_t old = 0, value = bytes == 8 ? lanes64(w, values[k])[i] : lanes32(w, values[k])[i];
            uint64_t other = what == ATOM_CAS ? (bytes == 8 ? R64(3)[i] : R32(3)[i]) : 0;
            if (bytes == 2)
                value &= 0xffff, other &= 0xffff;
            memcpy(&old, where, bytes);
            uint64_t out = atomic_combine(what, type, (int)bytes, old, value, other);
            memcpy(where, &out, bytes);
            w->machine->progress += out != old; /* a spinning compare-and-swap is no progress */
            if (results[k] >= 0) {
                if (bytes == 8)
                    lanes64(w, results[k])[i] = old;
                else
                    lanes32(w, results[k])[i] = (uint32_t)old;
            }
        }
    }
}
