/* Launches clusters into the places that the machine has, gives their warps turns, and notices when nothing moves. */
#include "machine.h"

#include <stdlib.h>
#include <string.h>

#define TURN 512           /* instructions a warp runs before the next one does, in order */
#define STAY 32             /* turns a cluster has, in order, before the next one does */
#define STUCK_PASSES 400   /* passes in which every warp only waited */
#define SPIN_PASSES 200000 /* passes in which warps ran but nothing came of it */

uint32_t machine_random(Machine *m, uint32_t below)
{
    m->random ^= m->random << 13; /* xorshift64 */
    m->random ^= m->random >> 7;
    m->random ^= m->random << 17;
    return below ? (uint32_t)((m->random >> 32) % below) : 0;
}

static void fill32(Warp *w, int32_t slot, uint32_t value)
{
    uint32_t *d = lanes32(w, slot);
    for (int i = 0; i < LANES; i++)
        d[i] = value;
}

static uint32_t special_value(Warp *w, const SpecialSlot *s, int lane)
{
    Machine *m = w->machine;
    Cta *cta = w->cta;
    uint32_t thread = (uint32_t)(w->index * LANES + lane);
    const uint32_t *b = m->block, *g = m->grid, *c = m->cluster_shape, *id = cta->id;
    switch ((Special)s->special) {
    case SPECIAL_TID_X: return thread % b[0];
    case SPECIAL_TID_Y: return thread / b[0] % b[1];
    case SPECIAL_TID_Z: return thread / b[0] / b[1];
    case SPECIAL_NTID_X: case SPECIAL_NTID_Y: case SPECIAL_NTID_Z: return b[s->special - SPECIAL_NTID_X];
    case SPECIAL_CTAID_X: case SPECIAL_CTAID_Y: case SPECIAL_CTAID_Z: return id[s->special - SPECIAL_CTAID_X];
    case SPECIAL_NCTAID_X: case SPECIAL_NCTAID_Y: case SPECIAL_NCTAID_Z: return g[s->special - SPECIAL_NCTAID_X];
    case SPECIAL_LANEID: return (uint32_t)lane;
    case SPECIAL_WARPID: return (uint32_t)w->index;
    case SPECIAL_NWARPID: return (uint32_t)cta->warp_count;
    case SPECIAL_SMID: return (uint32_t)(cta->cluster->slot * cta->cluster->size + cta->rank);
    case SPECIAL_NSMID: return (uint32_t)m->sms;
    case SPECIAL_CLUSTERID_X: case SPECIAL_CLUSTERID_Y: case SPECIAL_CLUSTERID_Z:
        return id[s->special - SPECIAL_CLUSTERID_X] / c[s->special - SPECIAL_CLUSTERID_X];
    case SPECIAL_NCLUSTERID_X: case SPECIAL_NCLUSTERID_Y: case SPECIAL_NCLUSTERID_Z:
        return g[s->special - SPECIAL_NCLUSTERID_X] / c[s->special - SPECIAL_NCLUSTERID_X];
    case SPECIAL_CLUSTER_CTAID_X: case SPECIAL_CLUSTER_CTAID_Y: case SPECIAL_CLUSTER_CTAID_Z:
        return id[s->special - SPECIAL_CLUSTER_CTAID_X] % c[s->special - SPECIAL_CLUSTER_CTAID_X];
    case SPECIAL_CLUSTER_NCTAID_X: case SPECIAL_CLUSTER_NCTAID_Y: case SPECIAL_CLUSTER_NCTAID_Z:
        return c[s->special - SPECIAL_CLUSTER_NCTAID_X];
    case SPECIAL_CLUSTER_CTARANK: return (uint32_t)cta->rank;
    case SPECIAL_CLUSTER_NCTARANK: return (uint32_t)cta->cluster->size;
    case SPECIAL_IS_EXPLICIT_CLUSTER: return cta->cluster->size > 1 ? ~0u : 0;
    case SPECIAL_LANEMASK_EQ: return 1u << lane;
    case SPECIAL_LANEMASK_LT: return (1u << lane) - 1;
    case SPECIAL_LANEMASK_LE: return (2u << lane) - 1;
    case SPECIAL_LANEMASK_GT: return ~((2u << lane) - 1);
    case SPECIAL_LANEMASK_GE: return ~((1u << lane) - 1);
    case SPECIAL_DYNAMIC_SMEM_SIZE: return m->dynamic_shared;
    case SPECIAL_TOTAL_SMEM_SIZE: return m->shared_bytes;
    case SPECIAL_SHARED_ADDRESS: return ((uint32_t)cta->rank << 24) | s->value;
    default: return 0;
    }
}

static void start_warp(Warp *w, Cta *cta, int index, int threads)
{
    Machine *m = cta->machine;
    uint32_t *regs = w->regs;
    uint8_t *local = w->local;
    int fresh = regs == NULL;
    if (fresh) {
        regs = aligned_alloc(64, (size_t)m->program.slots * LANES * 4 + 64);
        local = m->program.local_bytes ? malloc((size_t)m->program.local_bytes * LANES) : NULL;
    }
    memset(w, 0, sizeof *w);
    w->regs = regs;
    w->local = local;
    w->cta = cta;
    w->machine = m;
    w->index = index;
    w->executed = m->executed + (size_t)index * (size_t)m->program.length;
    w->skipped = m->skipped + (size_t)index * (size_t)m->program.length;
    w->cluster_arrived = -1;
    w->live = threads >= LANES ? FULL_MASK : (1u << threads) - 1;
    w->fragment_count = 1;
    w->fragments[0].mask = w->live;
    if (fresh)
        for (int32_t k = 0; k < m->program.constant_count; k++) {
            const Constant *c = &m->program.constants[k];
            if (c->wide)
                for (int i = 0; i < LANES; i++)
                    lanes64(w, c->slot)[i] = c->value;
            else
                fill32(w, c->slot, (uint32_t)c->value);
        }
    for (int32_t k = 0; k < m->program.special_count; k++) {
        const SpecialSlot *s = &m->program.specials[k];
        for (int i = 0; i < LANES; i++) {
            uint32_t value = special_value(w, s, i);
            if (s->wide)
                lanes64(w, s->slot)[i] = value;
            else
                lanes32(w, s->slot)[i] = value;
        }
    }
}

static void start_cta(Cluster *cluster, int rank)
{
    Cta *cta = &cluster->ctas[rank];
    Machine *m = cta->machine;
    int threads = (int)(m->block[0] * m->block[1] * m->block[2]);
    cta->cluster = cluster;
    cta->rank = rank;
    cta->shared_bytes = m->shared_bytes;
    cta->warp_count = cta->live_warps = (threads + LANES - 1) / LANES;
    const uint32_t *c = m->cluster_shape;
    uint32_t in_cluster[3] = {(uint32_t)rank % c[0], (uint32_t)rank / c[0] % c[1], (uint32_t)rank / c[0] / c[1]};
    for (int k = 0; k < 3; k++)
        cta->id[k] = cluster->id[k] * c[k] + in_cluster[k];
    memset(cta->barriers, 0, sizeof cta->barriers);
    /* Poison: NaN in every floating-point format, and no likely index. */
    memset(cta->shared, 0xff, m->shared_bytes);
    memset(cta->shadow, 0, m->shared_bytes);
    if (cta->tmem) {
        memset(cta->tmem, 0xff, sizeof(uint32_t) * TMEM_LANES * TMEM_COLUMNS);
        memset(cta->tmem_written, 0, TMEM_LANES * TMEM_COLUMNS);
        memset(cta->tmem_owner, 0, sizeof cta->tmem_owner);
        cta->tmem_permit_given_up = 0;
    }
    for (int index = 0; index < cta->warp_count; index++)
        start_warp(&cta->warps[index], cta, index, threads - index * LANES);
    m->totals.ctas++;
}

/* Starts the next cluster in a free place; 0 where none is left. */
int launch_next(Machine *m, int slot)
{
    Cluster *cluster = &m->clusters[slot];
    if (m->next_cluster >= m->cluster_count) {
        cluster->running = 0;
        return 0;
    }
    int64_t index = m->next_cluster++;
    uint32_t nx = m->grid[0] / m->cluster_shape[0], ny = m->grid[1] / m->cluster_shape[1];
    cluster->index = index;
    cluster->id[0] = (uint32_t)(index % nx);
    cluster->id[1] = (uint32_t)(index / nx % ny);
    cluster->id[2] = (uint32_t)(index / nx / ny);
    cluster->slot = slot;
    cluster->cluster_phase = 0;
    cluster->cluster_arrived = 0;
    cluster->running = 0;
    for (int rank = 0; rank < cluster->size; rank++) {
        start_cta(cluster, rank);
        cluster->running += cluster->ctas[rank].warp_count;
    }
    if (m->races)
        race_start_cluster(cluster);
    cluster->live_threads = cluster->running * LANES;
    m->progress++;
    return 1;
}

static void finish_cluster(Machine *m, Cluster *cluster)
{
    if (m->checks & CHECK_LEAKS)
        check_leaks(cluster);
    async_drain(m, cluster);
    if (m->races)
        race_end_cluster(cluster);
    launch_next(m, cluster->slot);
}

/* One turn for each warp of a cluster; true where one could have gone on. */
static int turn_in_order(Machine *m, Cluster *cluster)
{
    int busy = 0;
    for (int rank = 0; rank < cluster->size; rank++)
        for (int index = 0; index < cluster->ctas[rank].warp_count; index++) {
            Warp *w = &cluster->ctas[rank].warps[index];
            if (w->live)
                busy |= warp_run(w, TURN);
        }
    m->totals.slices++;
    return busy;
}

static int turn_random(Machine *m, Cluster *cluster)
{
    int busy = 0, turns = cluster->running;
    uint32_t early = m->schedule == SCHEDULE_RANDOM ? 4 : 48;
    for (int k = 0; k < turns && cluster->running; k++) {
        Cta *cta = &cluster->ctas[machine_random(m, (uint32_t)cluster->size)];
        Warp *w = &cta->warps[machine_random(m, (uint32_t)cta->warp_count)];
        if (w->live)
            busy |= warp_run(w, 1 + (int)machine_random(m, machine_random(m, 4) ? 24 : 400));
        if (m->pending && machine_random(m, early) == 0)
            async_run_one(m);
    }
    m->totals.slices++;
    return busy;
}

static void run_all(Machine *m)
{
    int64_t stuck = 0, spinning = 0;
    int alive = 1;
    while (alive) {
        int64_t before = m->progress;
        int busy = 0;
        alive = 0;
        for (int slot = 0; slot < m->resident; slot++) {
            Cluster *cluster = &m->clusters[slot];
            if (!cluster->running)
                continue;
            alive = 1;
            if (m->schedule == SCHEDULE_IN_ORDER) {
                /* Stay while it gets on: another cluster's registers are not in the cache. */
                int64_t then;
                int turns = STAY;
                do {
                    then = m->progress;
                    busy |= turn_in_order(m, cluster);
                } while (cluster->running && m->progress != then && --turns);
            } else
                busy |= turn_random(m, cluster);
            if (!cluster->running)
                finish_cluster(m, cluster);
        }
        if (m->progress != before) {
            stuck = spinning = 0;
            continue;
        }
        spinning++;
        stuck = busy ? 0 : stuck + 1;
        if ((stuck > 2 || spinning > 64) && async_run_one(m))
            continue;
        if (stuck > STUCK_PASSES)
            report_deadlock(m, "deadlock: every warp waits for something that nothing is left to do");
        if (spinning > SPIN_PASSES)
            report_deadlock(m, "livelock: warps run, but none of them changes anything that another one waits for");
    }
    async_drain(m, NULL);
}

static void allocate(Machine *m)
{
    int size = (int)(m->cluster_shape[0] * m->cluster_shape[1] * m->cluster_shape[2]);
    int warps = ((int)(m->block[0] * m->block[1] * m->block[2]) + LANES - 1) / LANES;
    m->clusters = calloc((size_t)m->resident, sizeof *m->clusters);
    for (int slot = 0; slot < m->resident; slot++) {
        Cluster *cluster = &m->clusters[slot];
        cluster->size = size;
        cluster->ctas = calloc((size_t)size, sizeof *cluster->ctas);
        for (int rank = 0; rank < size; rank++) {
            Cta *cta = &cluster->ctas[rank];
            cta->machine = m;
            cta->shared = aligned_alloc(1024, (m->shared_bytes + 2047u) & ~1023u);
            cta->shadow = malloc(m->shared_bytes + 64);
            cta->warps = calloc((size_t)warps, sizeof *cta->warps);
            if (m->arch >= 100 && m->arch < 120) {
                cta->tmem = aligned_alloc(64, sizeof(uint32_t) * TMEM_LANES * TMEM_COLUMNS);
                cta->tmem_written = malloc(TMEM_LANES * TMEM_COLUMNS);
            }
        }
    }
}

static void release(Machine *m)
{
    int warps = ((int)(m->block[0] * m->block[1] * m->block[2]) + LANES - 1) / LANES;
    if (m->races)
        race_destroy(m);
    for (int slot = 0; slot < m->resident; slot++) {
        Cluster *cluster = &m->clusters[slot];
        for (int rank = 0; rank < cluster->size; rank++) {
            Cta *cta = &cluster->ctas[rank];
            for (int index = 0; index < warps; index++) {
                free(cta->warps[index].regs);
                free(cta->warps[index].local);
            }
            free(cta->warps);
            free(cta->shared);
            free(cta->shadow);
            free(cta->tmem);
            free(cta->tmem_written);
        }
        free(cluster->ctas);
    }
    free(m->clusters);
    while (m->pending) {
        AsyncOp *op = m->pending;
        m->pending = op->next;
        free(op);
    }
}

/* Runs the whole launch; returns the kind of fault, 0 where there was none. */
int engine_run(Machine *m)
{
    m->pending = NULL;
    m->pending_tail = &m->pending;
    m->fault = FAULT_NONE;
    m->random = m->random * 0x9e3779b97f4a7c15ull + 0x1234567; /* never zero for small seeds */
    allocate(m);
    if (setjmp(m->escape) == 0) {
        for (int slot = 0; slot < m->resident; slot++)
            launch_next(m, slot);
        run_all(m);
    }
    release(m);
    return (int)m->fault;
}

