/* Changing a tensor map on the device. Its layout is what tma.c reads: EMULATOR.md and host/tensor_map.c say where each field is. */
#include "machine.h"

#include <string.h>

enum { ADDRESS, RANK, BOX, DIMENSION, STRIDE, ELEMENT_STRIDE, TYPE, INTERLEAVE, SWIZZLE, ATOM, FILL }; /* as FIELDS in lower_async.py */

static void set_bits(uint32_t *word, int shift, int width, uint32_t value)
{
    uint32_t ones = (1u << width) - 1;
    *word = (*word & ~(ones << shift)) | (value & ones) << shift;
}

/* tensormap.replace. sub: field; imm: ordinal; r: generic address of the map, value (64-bit for address and stride) */
void op_tensormap_replace(Warp *w, const Instr *in, uint32_t mask)
{
    /* By the PTX number of an element's type: TF32 is a float here, and what is smaller than a byte follows bf16. */
    static const uint8_t types[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 7, 7, 11, 12, 13};
    for (uint32_t left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left), ordinal = (int)in->imm;
        uint64_t address = R64(0)[i], wide = in->sub == ADDRESS || in->sub == STRIDE ? R64(1)[i] : 0;
        if (address & 127)
            fault(w, in, FAULT_MISALIGNED, "tensor map at 0x%llx is not aligned to 128 bytes", (unsigned long long)address);
        uint32_t words[16], value = R32(1)[i];
        memcpy(words, generic_span(w, in, i, address, 64, 0), 64);
        switch (in->sub) {
        case ADDRESS: words[0] = (uint32_t)wide, words[1] = (uint32_t)(wide >> 32); break;
        case RANK: set_bits(&words[2], 4, 3, value); break;
        case BOX:
            if (ordinal == 0)
                set_bits(&words[13], 24, 8, value - 1);
            else
                set_bits(&words[14], 8 * (ordinal - 1), 8, value - 1);
            break;
        case DIMENSION: words[8 + ordinal] = value - 1; break;
        case STRIDE:
            words[3 + ordinal] = (uint32_t)(wide >> 4);
            set_bits(&words[7], 4 * ordinal, 4, (uint32_t)(wide >> 36));
            break;
        case TYPE: set_bits(&words[2], 7, 4, types[value & 15]); break;
        case SWIZZLE: set_bits(&words[2], 13, 3, value); break;
        case ATOM: set_bits(&words[2], 19, 2, value); break;
        case FILL: break; /* what lies outside the tensor is read as zeros */
        case ELEMENT_STRIDE:
            if (value != 1)
                fault(w, in, FAULT_UNSUPPORTED, "a tensor map with element stride %u", value);
            break;
        default:
            if (value)
                fault(w, in, FAULT_UNSUPPORTED, "an interleaved tensor map");
        }
        memcpy(generic_span(w, in, i, address, 64, 1), words, 64);
    }
}

/* tensormap.cp_fenceproxy: shared to global. r: generic addresses of both. The second half of a map's 128 bytes means nothing, and
 * programs leave it unwritten. */
void op_tensormap_copy(Warp *w, const Instr *in, uint32_t mask)
{
    int i = __builtin_ctz(mask);
    const uint8_t *from = generic_span(w, in, i, R64(1)[i], 64, 0);
    memcpy(generic_span(w, in, i, R64(0)[i], 128, 1), from, 64);
}
