/* cuTensorMapEncodeTiled: a TMA descriptor in the layout that compiled host code writes for itself, and the core reads.
 * What a descriptor cannot say here (interleaving, element strides other than 1) is refused as the driver would. */
#include <stdint.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, MAX_RANK = 5 };

/* By CUtensorMapDataType: from 64-bit floats on, a descriptor has other numbers, and TF32 is a float there. */
static const uint8_t TYPES[] = {0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 8, 7, 7, 11, 12, 13};

int _cuTensorMapEncodeTiled(uint32_t *map, uint32_t type, uint32_t rank, void *address, const uint64_t *dimensions,
                            const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,
                            uint32_t interleave, uint32_t swizzle, uint32_t promotion, uint32_t fill) {
    (void)promotion, (void)fill; /* neither changes what is read inside the tensor; outside, zeros */
    if (type >= sizeof TYPES || rank < 1 || rank > MAX_RANK || interleave != 0 || swizzle > 6) return INVALID_VALUE;
    if ((uintptr_t)address % 16) return INVALID_VALUE;
    uint32_t words[32] = {0};
    words[0] = (uint32_t)(uintptr_t)address;
    words[1] = (uint32_t)((uint64_t)(uintptr_t)address >> 32);
    /* Swizzles past 3 are the third with pieces of 32 or 64 bytes. */
    uint32_t atom = swizzle > 3 ? swizzle - 3 : 0, span = swizzle > 3 ? 3 : swizzle;
    words[2] = 2 | (rank - 1) << 4 | (uint32_t)TYPES[type] << 7 | span << 13 | 1u << 18 | atom << 19;
    for (uint32_t d = 0; d < rank; d++) {
        if (dimensions[d] == 0 || dimensions[d] > 1ull << 32 || box[d] == 0 || box[d] > 256) return INVALID_VALUE;
        if (element_strides && element_strides[d] != 1) return INVALID_VALUE;
        words[8 + d] = (uint32_t)(dimensions[d] - 1);
        if (d == 0) {
            words[13] = (box[0] - 1) << 24;
            continue;
        }
        words[14] |= (box[d] - 1) << 8 * (d - 1);
        if (strides[d - 1] % 16) return INVALID_VALUE;
        uint64_t units = strides[d - 1] / 16;
        words[2 + d] = (uint32_t)units;
        words[7] |= (uint32_t)(units >> 32 & 15) << 4 * (d - 1);
    }
    memcpy(map, words, sizeof words);
    return SUCCESS;
}
