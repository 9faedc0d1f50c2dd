/* Barriers: mbarriers in shared memory, the sixteen named barriers of a CTA, and the cluster's barrier.
 *
 * An mbarrier's eight bytes hold its state: pending arrivals, arrivals a phase, the phase's parity, and the signed number
 * of bytes still expected. A phase ends when both counts are zero. The shadow of its bytes says that it is one, so that
 * using memory that is no barrier, or writing over one, is noticed. */
#include "machine.h"

#include <stdio.h>
#include <string.h>

#define COUNT_BITS 20
#define COUNT_MASK ((1u << COUNT_BITS) - 1)
#define TX_LIMIT ((1 << 20) - 1)
#define ADDRESS_WIDE 0x80000000u /* sub: the address register is 64 bits */

typedef struct { uint32_t pending, count, parity; int32_t tx; } Mbarrier;

static Mbarrier unpack(uint64_t state)
{
    Mbarrier out;
    out.pending = (uint32_t)state & COUNT_MASK;
    out.count = (uint32_t)(state >> COUNT_BITS) & COUNT_MASK;
    out.parity = (uint32_t)(state >> 40) & 1;
    out.tx = (int32_t)((uint32_t)(state >> 41) << 10) >> 10;
    return out;
}

static uint64_t pack(Mbarrier b)
{
    return (uint64_t)b.pending | ((uint64_t)b.count << COUNT_BITS) | ((uint64_t)b.parity << 40) |
           (((uint64_t)(uint32_t)b.tx & 0x3fffff) << 41);
}

static uint64_t *state_at(Machine *m, int32_t line, Cta *cta, uint32_t offset)
{
    if (offset & 7)
        machine_fault(m, FAULT_MISALIGNED, line, "mbarrier at shared address 0x%x is not 8-byte aligned", offset);
    if (offset < SHARED_FIRST || offset + 8 > cta->shared_bytes)
        machine_fault(m, FAULT_OUT_OF_BOUNDS, line, "mbarrier at shared address 0x%x, outside the CTA's %u bytes", offset,
                      cta->shared_bytes - SHARED_FIRST);
    if (cta->shadow[offset] != 2 && (m->checks & CHECK_BARRIERS))
        machine_fault(m, FAULT_BARRIER, line, "mbarrier at shared address 0x%x of CTA rank %d was used before it was initialised",
                      offset, cta->rank);
    return (uint64_t *)(cta->shared + offset);
}

static void store(Machine *m, Cta *cta, uint32_t offset, Mbarrier b)
{
    uint64_t *where = (uint64_t *)(cta->shared + offset);
    if (b.pending == 0 && b.tx == 0) {
        b.pending = b.count;
        b.parity ^= 1;
        if (m->races)
            race_mbarrier_passed(cta, offset);
    }
    m->progress++;
    *where = pack(b);
}

void mbarrier_complete_tx(Machine *m, int32_t line, Cta *cta, uint32_t offset, int32_t bytes)
{
    uint64_t *where = state_at(m, line, cta, offset);
    Mbarrier b = unpack(*where);
    int64_t tx = (int64_t)b.tx - bytes;
    if (tx < -TX_LIMIT || tx > TX_LIMIT)
        machine_fault(m, FAULT_BARRIER, line, "mbarrier at shared address 0x%x: %lld bytes outstanding, past what it can count",
                      offset, (long long)tx);
    b.tx = (int32_t)tx;
    store(m, cta, offset, b);
}

void mbarrier_arrive(Machine *m, int32_t line, Cta *cta, uint32_t offset, uint32_t count)
{
    uint64_t *where = state_at(m, line, cta, offset);
    Mbarrier b = unpack(*where);
    if (count > b.pending)
        machine_fault(m, FAULT_BARRIER, line,
                      "mbarrier at shared address 0x%x of CTA rank %d: %u more arrivals where %u of %u are pending", offset,
                      cta->rank, count, b.pending, b.count);
    b.pending -= count;
    store(m, cta, offset, b);
}

static uint32_t address_of(Warp *w, const Instr *in, int operand, int lane)
{
    uint64_t base = in->sub & ADDRESS_WIDE ? R64(operand)[lane] : R32(operand)[lane];
    return (uint32_t)(base + (uint64_t)in->imm);
}

void op_mbarrier_init(Warp *w, const Instr *in, uint32_t mask)
{
    EACH_LANE(uint32_t address = address_of(w, in, 0, i); uint32_t count = R32(1)[i];
              if (count == 0 || count > COUNT_MASK) fault(w, in, FAULT_BARRIER, "mbarrier count %u", count);
              if (address & 7) fault(w, in, FAULT_MISALIGNED, "mbarrier at shared address 0x%x is not 8-byte aligned", address);
              uint8_t *bytes = shared_write(w, in, address, 8);
              Mbarrier b = {count, count, 0, 0}; uint64_t state = pack(b); memcpy(bytes, &state, 8);
              Cta *cta = shared_owner(w, in, address); memset(cta->shadow + (address & SHARED_OFFSET_MASK), 2, 8);
              if (w->machine->races) race_mbarrier_init(w, in, i, cta, address & SHARED_OFFSET_MASK));
}

void op_mbarrier_inval(Warp *w, const Instr *in, uint32_t mask)
{
    EACH_LANE(uint32_t address = address_of(w, in, 0, i); Cta *cta = shared_owner(w, in, address);
              state_at(w->machine, in->line, cta, address & SHARED_OFFSET_MASK);
              memset(cta->shadow + (address & SHARED_OFFSET_MASK), 1, 8));
}

/* The lanes whose barrier is this lane's too: what they do at it, they do together. */
static uint32_t same_barrier(Warp *w, const Instr *in, uint32_t mask, int lane)
{
    uint32_t out = 0, address = address_of(w, in, 1, lane);
    for (uint32_t left = mask; left; left &= left - 1)
        out |= address_of(w, in, 1, __builtin_ctz(left)) == address ? left & -left : 0;
    return out;
}

/* r: state (-1 where not wanted), address, count (-1: one), bytes expected (-1: none). sub bit 0: drop; bit 1: no arrival, the
 * bytes only; bit 2: the bytes complete instead of being expected; bit 3: relaxed. */
void op_mbarrier_arrive(Warp *w, const Instr *in, uint32_t mask)
{
    Machine *m = w->machine;
    uint32_t told = m->races ? 0 : mask; /* lanes whose arrival the race check knows */
    for (uint32_t left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        uint32_t address = address_of(w, in, 1, i), offset = address & SHARED_OFFSET_MASK;
        Cta *cta = shared_owner(w, in, address);
        uint64_t *where = state_at(m, in->line, cta, offset);
        if (!(told >> i & 1)) {
            uint32_t together = same_barrier(w, in, mask, i);
            race_mbarrier_arrive(w, in, together, cta, offset, !(in->sub & 10));
            told |= together;
        }
        if (in->r[0] >= 0)
            R64(0)[i] = *where;
        if (in->r[3] >= 0 && !(in->sub & 2)) {
            /* Expected first: the arrival must not end the phase before the bytes count. */
            Mbarrier b = unpack(*where);
            int64_t tx = (int64_t)b.tx + (int32_t)R32(3)[i];
            if (tx > TX_LIMIT)
                fault(w, in, FAULT_BARRIER, "mbarrier at shared address 0x%x: expects %lld bytes", offset, (long long)tx);
            b.tx = (int32_t)tx;
            *where = pack(b);
        }
        if (in->sub & 2) {
            mbarrier_complete_tx(m, in->line, cta, offset, in->sub & 4 ? (int32_t)R32(3)[i] : -(int32_t)R32(3)[i]);
            continue;
        }
        uint32_t count = in->r[2] >= 0 ? R32(2)[i] : 1;
        if (in->sub & 1) {
            Mbarrier b = unpack(*where);
            if (b.count < count)
                fault(w, in, FAULT_BARRIER, "mbarrier at shared address 0x%x: dropped below zero", offset);
            b.count -= count;
            *where = pack(b);
        }
        mbarrier_arrive(m, in->line, cta, offset, count);
    }
}

/* r: result, address, parity or state. sub bit 0: by parity, bit 1: try_wait (may fail for no reason), bit 2: relaxed */
void op_mbarrier_wait(Warp *w, const Instr *in, uint32_t mask)
{
    Machine *m = w->machine;
    uint32_t *d = R32(0), passed = 0;
    int failed = 0;
    if ((in->sub & 2) && m->schedule != SCHEDULE_IN_ORDER && machine_random(m, 8) == 0) {
        FOR_LANES(d[i] = 0);
        w->event = EVENT_YIELD;
        return;
    }
    for (uint32_t left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        uint32_t address = address_of(w, in, 1, i), offset = address & SHARED_OFFSET_MASK;
        Cta *cta = shared_owner(w, in, address);
        Mbarrier b = unpack(*state_at(m, in->line, cta, offset));
        uint32_t parity = in->sub & 1 ? R32(2)[i] & 1 : unpack(R64(2)[i]).parity;
        d[i] = b.parity != parity ? ~0u : 0;
        passed |= b.parity != parity ? 1u << i : 0;
        if (b.parity == parity) {
            failed = 1;
            w->last_wait_line = in->line;
            w->last_wait_address = address;
            w->last_wait_phase = parity;
        }
    }
    for (uint32_t left = m->races ? passed : 0; left;) {
        int i = __builtin_ctz(left);
        uint32_t address = address_of(w, in, 1, i), together = same_barrier(w, in, passed, i);
        race_mbarrier_waited(w, in, together, shared_owner(w, in, address), address & SHARED_OFFSET_MASK, !(in->sub & 4));
        left &= ~together;
    }
    if (failed)
        w->event = EVENT_YIELD;
    else
        w->last_wait_line = 0, m->progress++;
}

void op_mbarrier_pending_count(Warp *w, const Instr *in, uint32_t mask)
{
    FOR_LANES(R32(0)[i] = unpack(R64(1)[i]).pending);
}

/* What a dump says of the barrier a warp failed to pass last. */
int mbarrier_describe(Warp *w, char *out, size_t size)
{
    Cluster *cluster = w->cta->cluster;
    uint32_t rank = w->last_wait_address >> 24, offset = w->last_wait_address & SHARED_OFFSET_MASK;
    if (!w->last_wait_line || rank >= (uint32_t)cluster->size)
        return 0;
    Mbarrier b = unpack(*(uint64_t *)(cluster->ctas[rank].shared + offset));
    return snprintf(out, size, "mbarrier 0x%x for parity %u: %u of %u arrivals pending, %d bytes outstanding, parity %u", offset,
                    w->last_wait_phase, b.pending, b.count, b.tx, b.parity);
}

/* Bytes that a barrier still expects when its CTA ends: reported as a leak. */
int mbarrier_outstanding(const Cta *cta, uint32_t offset) { return unpack(*(const uint64_t *)(cta->shared + offset)).tx; }

/* Named barriers. Whole warps count with all their lanes, exited ones too. */
static uint32_t arriving(Warp *w, uint32_t mask)
{
    return (mask | ~w->live) == FULL_MASK ? LANES : (uint32_t)__builtin_popcount(mask);
}

static void complete(Machine *m, NamedBarrier *b)
{
    b->phase++;
    b->arrived = 0;
    b->expected = 0;
    m->progress++;
}

/* r: number, thread count (-1: all), predicate of a reduction (-1: none). sub bit 0: arrive only, bit 1: the warp must be whole */
void op_bar(Warp *w, const Instr *in, uint32_t mask)
{
    int lane = __builtin_ctz(mask);
    if ((in->sub & 2) && !require_lanes(w, w->live))
        return;
    uint32_t number = R32(0)[lane];
    if (number >= NAMED_BARRIERS)
        fault(w, in, FAULT_BARRIER, "named barrier %u of %d", number, NAMED_BARRIERS);
    NamedBarrier *b = &w->cta->barriers[number];
    int32_t expected = in->r[1] >= 0 ? (int32_t)R32(1)[lane] : w->cta->live_warps * LANES;
    if (expected <= 0 || expected % LANES)
        fault(w, in, FAULT_BARRIER, "named barrier %u with %d threads, not a multiple of a warp", number, expected);
    if (b->arrived && in->r[1] >= 0 && b->expected != expected)
        fault(w, in, FAULT_BARRIER, "named barrier %u: %d threads here where others said %d", number, expected, b->expected);
    if (!b->arrived)
        b->result_and = ~0u, b->result_or = 0, b->result_count = 0;
    b->expected = expected;
    b->arrived += (int32_t)arriving(w, mask);
    if (in->r[2] >= 0) {
        uint32_t yes = mask_of(R32(2)) & mask;
        b->result_and &= yes == mask ? ~0u : 0;
        b->result_or |= yes ? ~0u : 0;
        b->result_count += (uint32_t)__builtin_popcount(yes);
    }
    if (b->arrived > b->expected)
        fault(w, in, FAULT_BARRIER, "named barrier %u: %d threads arrived where %d are expected", number, b->arrived, b->expected);
    uint32_t phase = b->phase;
    w->machine->progress++;
    if (w->machine->races) {
        race_named_arrive(w, mask, number);
        if (b->arrived == b->expected)
            race_named_complete(w, mask, number, !(in->sub & 1));
    }
    if (b->arrived == b->expected)
        complete(w->machine, b);
    else if (!(in->sub & 1))
        warp_block(w, WAIT_BARRIER, number, phase);
}

/* The result of a reduction at a barrier, after it. r: d, number. sub 0 and, 1 or, 2 popc */
void op_bar_result(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t *d = R32(0);
    NamedBarrier *b = &w->cta->barriers[R32(1)[__builtin_ctz(mask)] & 15];
    uint32_t value = in->sub == 0 ? b->result_and : in->sub == 1 ? b->result_or : b->result_count;
    FOR_LANES(d[i] = value);
}

static void check_cluster(Cluster *cluster)
{
    if (cluster->cluster_arrived && cluster->cluster_arrived >= cluster->live_threads) {
        cluster->cluster_arrived = 0;
        cluster->cluster_phase++;
        if (cluster->ctas[0].machine->races)
            race_cluster_complete(cluster);
        cluster->ctas[0].machine->progress++;
    }
}

/* sub 0 arrive, 1 wait; bit 1: the warp must be whole; bit 2: relaxed */
void op_cluster_barrier(Warp *w, const Instr *in, uint32_t mask)
{
    if ((in->sub & 2) && !require_lanes(w, w->live))
        return;
    Cluster *cluster = w->cta->cluster;
    if (in->sub & 1) {
        if (w->cluster_arrived == (int32_t)cluster->cluster_phase)
            warp_block(w, WAIT_CLUSTER, 0, cluster->cluster_phase);
        else if (w->machine->races)
            race_cluster_wait(w, mask);
        return;
    }
    w->cluster_arrived = (int32_t)cluster->cluster_phase;
    cluster->cluster_arrived += (int32_t)arriving(w, mask);
    w->machine->progress++;
    if (w->machine->races)
        race_cluster_arrive(w, mask, !(in->sub & 4));
    check_cluster(cluster);
}

/* Threads that are gone are not waited for. */
void barrier_lanes_exited(Warp *w, uint32_t lanes)
{
    UNUSED(lanes);
    if (w->live)
        return;
    w->cta->cluster->live_threads -= LANES;
    check_cluster(w->cta->cluster);
}

int fragment_ready(Warp *w, Fragment *f)
{
    switch (f->wait) {
    case WAIT_NONE: return 1;
    case WAIT_CONVERGE: return ((f->value & w->live) & ~f->mask) == 0;
    case WAIT_BARRIER: return w->cta->barriers[f->value].phase != f->phase;
    case WAIT_CLUSTER: return w->cta->cluster->cluster_phase != f->phase;
    case WAIT_WGMMA: return async_pending_groups(w, ASYNC_WGMMA, FULL_MASK) <= (int)f->value;
    case WAIT_TCGEN05: return async_pending_groups(w, ASYNC_TCGEN05, FULL_MASK) <= (int)f->value;
    case WAIT_CP_ASYNC: return async_pending_groups(w, ASYNC_CP, f->mask) <= (int)f->value;
    case WAIT_BULK: return async_pending_groups(w, ASYNC_TMA_STORE, f->mask) <= (int)f->value;
    case WAIT_WARP: {
        /* Members that exited no longer count. */
        uint32_t here = 0;
        for (int i = 0; i < w->fragment_count; i++)
            if (w->fragments[i].wait == WAIT_WARP)
                here |= w->fragments[i].mask;
        if ((f->value & w->live) & ~here)
            return 0;
        if (w->machine->races)
            race_warp_sync(w, f->value & w->live);
        return 1;
    }
    }
    return 1;
}
