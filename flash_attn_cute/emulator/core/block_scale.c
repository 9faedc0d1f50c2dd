/* Block scales of a tensor core product: numbers in tensor memory, one for each 16 or 32 elements of a row along k.
 *
 * Row r (of M or of N) has its scales in lane r % 32, column r / 32, one to four bytes of that word; every quarter of the lanes
 * holds a copy. (PTX ISA, "Scale factors" of tcgen05.mma.) */
#include "machine.h"

#include <math.h>

static float scale_value(uint8_t byte, int is_exponent)
{
    if (!is_exponent)
        return e4m3_to_float(byte & 127); /* ue4m3: no sign */
    return byte == 255 ? NAN : ldexpf(1.0f, (int)byte - 127);
}

/* Multiplies each block of the decoded rows with its scale. `lane` is the first of the quarter whose copy counts. */
void apply_scales(Machine *m, int32_t line, Cta *cta, const ScaleVector *scales, uint32_t lane, int rows, int k_count, float *out,
                  size_t row_stride, size_t k_stride)
{
    int block = k_count / (int)scales->count;
    uint32_t first = scales->address & 0xffff;
    for (int row = 0; row < rows; row++) {
        uint32_t word = *tmem_read(m, line, cta, lane + (uint32_t)row % 32, first + (uint32_t)row / 32, 1);
        for (int k = 0; k < k_count; k++) {
            uint32_t byte = scales->first_byte + (uint32_t)(k / block);
            out[(size_t)row * row_stride + (size_t)k * k_stride] *= scale_value((uint8_t)(word >> (8 * byte)), (int)scales->is_exponent);
        }
    }
}
