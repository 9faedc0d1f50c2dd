/* How many wavefronts accesses to shared memory take: 32 banks of 4 bytes serve one word each at a time. */
#include "machine.h"

#define BANKS 32

/* The wavefronts of one pass: the most different words that the active lanes want of one bank. */
static int pass_wavefronts(const uint32_t *addresses, uint32_t mask, uint32_t size)
{
    uint32_t seen[BANKS][LANES];
    uint8_t count[BANKS] = {0};
    int most = 0;
    for (; mask; mask &= mask - 1) {
        uint32_t address = addresses[__builtin_ctz(mask)];
        for (uint32_t word = address >> 2; word <= (address + size - 1) >> 2; word++) {
            uint32_t bank = word % BANKS;
            int known = 0;
            for (int j = 0; j < count[bank] && !known; j++)
                known = seen[bank][j] == word;
            if (known)
                continue;
            seen[bank][count[bank]++] = word;
            most = count[bank] > most ? count[bank] : most;
        }
    }
    return most;
}

/* Counts one access of `size` bytes a lane. A pass serves 128 bytes at most, so that accesses of 8 bytes go by halves of a
 * warp and those of 16 by quarters; each pass with an active lane needs one wavefront, and what goes beyond is a conflict. */
void count_wavefronts(Machine *m, SharedAccess access, const uint32_t *addresses, uint32_t mask, uint32_t size)
{
    SharedTotals *t = &m->totals.shared[access];
    int lanes = size >= 16 ? 8 : size == 8 ? 16 : LANES;
    t->accesses++;
    for (int first = 0; first < LANES; first += lanes) {
        uint32_t active = mask & (FULL_MASK >> (LANES - lanes) << first);
        if (!active)
            continue;
        int wavefronts = pass_wavefronts(addresses, active, size);
        t->wavefronts += wavefronts;
        t->conflicts += wavefronts - 1;
    }
}
