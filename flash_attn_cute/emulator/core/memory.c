/* Memory: global (the host's own addresses, bounded by the launch's allocations), shared with its shadow, local; loads,
 * stores and atomics on all of them. Parameters, constants and module variables are allocations too. */
#include "machine.h"

#include <string.h>

#define ADDRESS_WIDE 0x80000000u

/* Where reads that begin inside an allocation have to end: memory comes in pieces of at least 16 bytes, aligned to more, so a
 * vector load may take what lies between a tensor's end and the next multiple of 16, and compilers make use of that. */
static uint64_t end_of(const Allocation *a, int write)
{
    uint64_t end = a->address + a->size;
    return write ? end : (end + 15) & ~15ull;
}

static int holds(const Allocation *a, uint64_t address, uint64_t size, int write)
{
    return address >= a->address && (address + size <= a->address + a->size ||
                                     (address < a->address + a->size && address + size <= end_of(a, write)));
}

uint8_t *global_range(Machine *m, int32_t *hint, uint64_t address, uint64_t size, int write, const char **why)
{
    const Allocation *all = m->allocations;
    if (!(m->checks & CHECK_BOUNDS))
        return (uint8_t *)(uintptr_t)address;
    int32_t guess = *hint;
    if (!(guess < m->allocation_count && holds(&all[guess], address, size, write))) {
        int32_t low = 0, high = m->allocation_count; /* sorted by address: the last that starts at or below */
        while (low < high) {
            int32_t middle = (low + high) / 2;
            if (all[middle].address <= address)
                low = middle + 1;
            else
                high = middle;
        }
        guess = low - 1;
        /* Tensors may be views of one another, so an earlier and longer one can hold what the nearest does not. */
        while (guess >= 0 && !(holds(&all[guess], address, size, write) && (!write || all[guess].writable)))
            guess--;
        if (guess < 0) {
            *why = "outside every tensor of the launch";
            return NULL;
        }
    }
    if (write && !all[guess].writable) {
        *why = "in memory that is read only";
        return NULL;
    }
    *hint = guess;
    return (uint8_t *)(uintptr_t)address;
}

uint8_t *global_span(Warp *w, const Instr *in, uint64_t address, uint64_t size, int write)
{
    const char *why = "";
    uint8_t *where = global_range(w->machine, &w->last_allocation, address, size, write, &why);
    if (!where) {
        const Machine *m = w->machine;
        const Allocation *near = NULL;
        for (int32_t k = 0; k < m->allocation_count; k++)
            if (m->allocations[k].address <= address && (!near || m->allocations[k].address > near->address))
                near = &m->allocations[k];
        fault(w, in, FAULT_OUT_OF_BOUNDS, "%s of %llu bytes at global address 0x%llx, %s; the nearest below is '%s', %llu bytes, %lld past its start",
              write ? "write" : "read", (unsigned long long)size, (unsigned long long)address, why, near ? near->name : "(none)",
              near ? (unsigned long long)near->size : 0, near ? (long long)(address - near->address) : 0);
    }
    return where;
}

Cta *shared_owner(Warp *w, const Instr *in, uint32_t address)
{
    Cluster *cluster = w->cta->cluster;
    uint32_t rank = address >> 24;
    if (rank >= (uint32_t)cluster->size)
        fault(w, in, FAULT_OUT_OF_BOUNDS, "shared address 0x%x names CTA %u of a cluster of %d", address, rank, cluster->size);
    Cta *cta = &cluster->ctas[rank];
    if (cta->live_warps == 0 && cta != w->cta && (w->machine->checks & CHECK_BOUNDS))
        fault(w, in, FAULT_OUT_OF_BOUNDS, "shared memory of CTA %u of the cluster, which has already exited", rank);
    return cta;
}

static uint8_t *shared_span(Warp *w, const Instr *in, uint32_t address, uint32_t size, Cta **owner)
{
    uint32_t offset = address & SHARED_OFFSET_MASK;
    Cta *cta = address >> 24 == (uint32_t)w->cta->rank ? w->cta : shared_owner(w, in, address);
    if (offset < SHARED_FIRST || offset + size > cta->shared_bytes)
        fault(w, in, FAULT_OUT_OF_BOUNDS, "%u bytes at shared address 0x%x; the CTA has 0x%x to 0x%x", size, address,
              SHARED_FIRST, cta->shared_bytes);
    *owner = cta;
    return cta->shared + offset;
}

void shared_check_written(Machine *m, int32_t line, Cta *cta, uint32_t offset, uint32_t size, const char *who)
{
    if (!(m->checks & CHECK_UNINITIALISED))
        return;
    const uint8_t *missing = memchr(cta->shadow + offset, 0, size);
    if (missing)
        machine_fault(m, FAULT_UNINITIALISED, line, "%s of shared address 0x%x of CTA (%u,%u,%u), which nobody wrote", who,
                      (uint32_t)(missing - cta->shadow), cta->id[0], cta->id[1], cta->id[2]);
}

uint8_t *shared_read(Warp *w, const Instr *in, uint32_t address, uint32_t size)
{
    Cta *cta;
    uint8_t *where = shared_span(w, in, address, size, &cta);
    if (w->machine->checks & CHECK_UNINITIALISED) {
        const uint8_t *missing = memchr(cta->shadow + (where - cta->shared), 0, size);
        if (missing)
            fault(w, in, FAULT_UNINITIALISED, "read of %u bytes at shared address 0x%x, of which byte 0x%x was never written", size,
                  address, (uint32_t)(missing - cta->shadow));
    }
    return where;
}

void shared_mark(Cta *cta, uint32_t offset, uint32_t size) { memset(cta->shadow + offset, 1, size); }

uint8_t *shared_write(Warp *w, const Instr *in, uint32_t address, uint32_t size)
{
    Cta *cta;
    uint8_t *where = shared_span(w, in, address, size, &cta);
    shared_mark(cta, (uint32_t)(where - cta->shared), size);
    return where;
}

uint8_t *generic_span(Warp *w, const Instr *in, int lane, uint64_t address, uint32_t size, int write)
{
    uint64_t window = address >> 60;
    if (window == SHARED_WINDOW >> 60)
        return write ? shared_write(w, in, (uint32_t)address, size) : shared_read(w, in, (uint32_t)address, size);
    if (window == LOCAL_WINDOW >> 60) {
        uint32_t offset = (uint32_t)address;
        if (offset + size > (uint32_t)w->machine->program.local_bytes)
            fault(w, in, FAULT_OUT_OF_BOUNDS, "%u bytes at local address 0x%x of %d", size, offset, w->machine->program.local_bytes);
        return w->local + (size_t)lane * (size_t)w->machine->program.local_bytes + offset;
    }
    return global_span(w, in, address, size, write);
}

/* sub of ld and st: log2 of the element's bytes | count << 4 | signed << 8 | space << 9 | 64-bit registers << 12 | parameter or
 * constant memory << 15 | strong << 16 | acquires << 17 | releases << 18 | scope << 19 */
enum { SPACE_GENERIC, SPACE_GLOBAL, SPACE_SHARED, SPACE_LOCAL };
#define SUB_BYTES (1u << (in->sub & 15))
#define SUB_COUNT ((in->sub >> 4) & 15)
#define SUB_SPACE ((in->sub >> 9) & 7)
#define SUB_CONSTANT (1u << 15)
#define SUB_STRONG (1u << 16)

static inline uint64_t address_at(Warp *w, const Instr *in, int lane)
{
    uint64_t base = in->sub & ADDRESS_WIDE ? R64(0)[lane] : R32(0)[lane];
    return base + (uint64_t)in->imm;
}

static inline uint8_t *locate(Warp *w, const Instr *in, int lane, uint32_t size, int write)
{
    uint64_t address = address_at(w, in, lane);
    if ((address & (size - 1)) && (w->machine->checks & CHECK_ALIGNMENT))
        fault(w, in, FAULT_MISALIGNED, "%s of %u bytes at address 0x%llx (lane %d), which is not aligned to its size",
              write ? "store" : "load", size, (unsigned long long)address, lane);
    switch (SUB_SPACE) {
    case SPACE_SHARED: return write ? shared_write(w, in, (uint32_t)address, size) : shared_read(w, in, (uint32_t)address, size);
    case SPACE_LOCAL: return generic_span(w, in, lane, LOCAL_WINDOW | (uint32_t)address, size, write);
    case SPACE_GLOBAL: return global_span(w, in, address, size, write);
    default: return generic_span(w, in, lane, address, size, write);
    }
}

/* The race check, for one lane's load or store. */
static void check_race(Warp *w, const Instr *in, int lane, uint32_t size, int write)
{
    uint64_t address = address_at(w, in, lane);
    if (SUB_SPACE == SPACE_LOCAL || in->sub & SUB_CONSTANT)
        return;
    if (SUB_SPACE == SPACE_SHARED)
        address = SHARED_WINDOW | (uint32_t)address;
    uint32_t strong = in->sub & SUB_STRONG ? TOUCH_STRONG | (in->sub >> 19 & 3) << TOUCH_SCOPE_SHIFT : 0;
    race_touch(w, address, size, lane, strong | (write ? TOUCH_WRITE : 0));
    if (strong)
        race_order(w, lane, address, in->sub >> 17 & 15, write, !write);
}

/* What the report says of a load or store: bytes of global memory, wavefronts of shared memory. */
static void count_access(Warp *w, const Instr *in, uint32_t mask, uint32_t size, int write)
{
    Totals *t = &w->machine->totals;
    uint32_t shared = 0, global = 0, addresses[LANES];
    if (in->sub & SUB_CONSTANT || SUB_SPACE == SPACE_LOCAL)
        return;
    for (uint32_t left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        uint64_t address = address_at(w, in, i), window = SUB_SPACE == SPACE_GENERIC ? address >> 60 << 60 : 0;
        addresses[i] = (uint32_t)address;
        if (SUB_SPACE == SPACE_SHARED || window == SHARED_WINDOW)
            shared |= 1u << i;
        else if (window != LOCAL_WINDOW)
            global |= 1u << i;
    }
    if (shared)
        count_wavefronts(w->machine, write ? SHARED_STORE : SHARED_LOAD, addresses, shared, size);
    *(write ? &t->global_store_bytes : &t->global_load_bytes) += (int64_t)size * __builtin_popcount(global);
}

void op_ld(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t bytes = SUB_BYTES, count = SUB_COUNT, size = bytes * count, wide = in->sub >> 12 & 1;
    const int32_t *to = w->machine->program.pool + in->pool;
    count_access(w, in, mask, size, 0);
    if (w->machine->races)
        race_begin_warp(w, in, mask);
    for (uint32_t left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        const uint8_t *from = locate(w, in, i, size, 0);
        if (w->machine->races)
            check_race(w, in, i, size, 0);
        for (uint32_t k = 0; k < count; k++, from += bytes) {
            uint64_t value = 0;
            if (to[k] < 0)
                continue;
            if (bytes == 4) {
                uint32_t word;
                memcpy(&word, from, 4);
                if (!wide) {
                    lanes32(w, to[k])[i] = word;
                    continue;
                }
                value = in->sub & 256 ? (uint64_t)(int64_t)(int32_t)word : word;
            } else if (bytes == 16) {
                memcpy(&lanes64(w, to[k])[i], from, 8);
                memcpy(&lanes64(w, to[k] + 2)[i], from + 8, 8);
                continue;
            } else {
                memcpy(&value, from, bytes);
                if (in->sub & 256)
                    value = bytes == 1 ? (uint64_t)(int64_t)(int8_t)value : bytes == 2 ? (uint64_t)(int64_t)(int16_t)value : value;
            }
            if (wide)
                lanes64(w, to[k])[i] = value;
            else
                lanes32(w, to[k])[i] = in->sub >> 13 & 1 ? (uint16_t)value : (uint32_t)value;
        }
    }
}

void op_st(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t bytes = SUB_BYTES, count = SUB_COUNT, size = bytes * count;
    const int32_t *from = w->machine->program.pool + in->pool;
    w->machine->progress++;
    count_access(w, in, mask, size, 1);
    if (w->machine->races)
        race_begin_warp(w, in, mask);
    for (uint32_t left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        uint8_t *to = locate(w, in, i, size, 1);
        if (w->machine->races)
            check_race(w, in, i, size, 1);
        for (uint32_t k = 0; k < count; k++, to += bytes) {
            if (bytes == 16) {
                memcpy(to, &lanes64(w, from[k])[i], 8);
                memcpy(to + 8, &lanes64(w, from[k] + 2)[i], 8);
            } else if (bytes == 8)
                memcpy(to, &lanes64(w, from[k])[i], 8);
            else
                memcpy(to, &lanes32(w, from[k])[i], bytes); /* little-endian: the low bytes come first */
        }
    }
}

/* st.async and red.async: a store into a CTA of the cluster that completes bytes on that CTA's barrier. r: address, barrier;
 * sub as st; imm the offset. bit 14: a reduction by 32-bit addition. */
void op_st_async(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t bytes = SUB_BYTES, count = SUB_COUNT, size = bytes * count;
    const int32_t *from = w->machine->program.pool + in->pool;
    for (uint32_t left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        uint32_t address = (uint32_t)address_at(w, in, i), barrier = R32(1)[i];
        uint8_t *to = in->sub >> 14 & 1 ? shared_read(w, in, address, size) : shared_write(w, in, address, size);
        if (w->machine->races) { /* a reduction is atomic */
            race_begin_warp(w, in, 1u << i);
            race_on_barrier(w->machine, shared_owner(w, in, barrier), barrier & SHARED_OFFSET_MASK);
            race_touch_shared(w->machine, shared_owner(w, in, address), address & SHARED_OFFSET_MASK, size, LANE_NONE,
                              TOUCH_WRITE | TOUCH_ASYNC | (in->sub >> 14 & 1 ? TOUCH_STRONG | SCOPE_CLUSTER << TOUCH_SCOPE_SHIFT : 0));
        }
        for (uint32_t k = 0; k < count; k++, to += bytes) {
            uint64_t value = bytes == 8 ? lanes64(w, from[k])[i] : lanes32(w, from[k])[i];
            if (in->sub >> 14 & 1) {
                uint32_t old;
                memcpy(&old, to, 4);
                value += old;
            }
            memcpy(to, &value, bytes);
        }
        mbarrier_complete_tx(w->machine, in->line, shared_owner(w, in, barrier), barrier & SHARED_OFFSET_MASK, (int32_t)size);
    }
}

/* mapa: the same place in another CTA of the cluster. r: d, address, rank; sub bit 0: 64-bit generic. Whole warps compute addresses
 * of which few lanes use theirs, so a CTA that does not exist is an error only where its memory is touched. */
void op_mapa(Warp *w, const Instr *in, uint32_t mask)
{
    FOR_LANES(uint32_t rank = R32(2)[i] < 255 ? R32(2)[i] : 255;
              if (in->sub & 1) R64(0)[i] = (R64(1)[i] & ~0xff000000ull) | ((uint64_t)rank << 24);
              else R32(0)[i] = (R32(1)[i] & SHARED_OFFSET_MASK) | (rank << 24));
}

/* getctarank, from a shared address. sub bit 0: the address is 64-bit */
void op_getctarank(Warp *w, const Instr *in, uint32_t mask)
{
    FOR_LANES(uint32_t address = in->sub & 1 ? (uint32_t)R64(1)[i] : R32(1)[i]; R32(0)[i] = address >> 24);
}

/* isspacep: sub is the space as in ld; 4: shared of this CTA only */
void op_isspacep(Warp *w, const Instr *in, uint32_t mask)
{
    FOR_LANES(uint64_t window = R64(1)[i] >> 60; uint64_t expected = in->sub == SPACE_LOCAL ? 2 : in->sub == SPACE_GLOBAL ? 0 : 1;
              int yes = window == expected;
              if (in->sub == 4) yes = yes && ((R64(1)[i] >> 24) & 0xff) == (uint64_t)w->cta->rank;
              R32(0)[i] = yes ? ~0u : 0);
}

/* cvta between windows. sub: space as in ld | to that space (from generic) << 8 | 32-bit << 9 */
void op_cvta(Warp *w, const Instr *in, uint32_t mask)
{
    uint64_t window = (in->sub & 255) == SPACE_SHARED ? SHARED_WINDOW : (in->sub & 255) == SPACE_LOCAL ? LOCAL_WINDOW : 0;
    FOR_LANES(uint64_t a = R64(1)[i]; R64(0)[i] = in->sub & 256 ? (window ? (uint32_t)a : a) : (window ? (uint32_t)a | window : a));
}
