/* The race check's beginning, its end, and what it says. */
#include "races.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void race_create(Machine *m, const RaceTables *tables)
{
    m->races = calloc(1, sizeof *m->races);
    m->races->tables = *tables;
    if (m->checks & CHECK_TCGEN05)
        m->races->tables.before_fences = m->races->tables.after_fences = 1;
    race_begin(m->races);
}

static void free_barrier(RaceBarrier *b)
{
    view_free(&b->gathered);
    view_free(&b->passed);
}

static void free_warp(RaceWarp *rw)
{
    view_free(&rw->all);
    view_free(&rw->some);
    view_free(&rw->fenced);
    view_free(&rw->observed);
    free(rw->tensor_seen.at);
    free(rw->tensor_said.at);
    free(rw->registers);
}

static void start_cta(Cta *cta)
{
    Machine *m = cta->machine;
    RaceCta *rc = cta->race;
    if (!rc) {
        rc = cta->race = calloc(1, sizeof *rc);
        rc->cells = calloc(m->shared_bytes / 4 + 1, sizeof *rc->cells);
        rc->writers = malloc(m->shared_bytes + 4);
        rc->readers = malloc(m->shared_bytes + 4);
        rc->barrier_at = malloc((m->shared_bytes / 8 + 1) * sizeof *rc->barrier_at);
        rc->tensor_cells = cta->tmem ? calloc(TMEM_LANES / 16 * TMEM_COLUMNS, sizeof *rc->tensor_cells) : NULL;
        rc->warps = calloc((size_t)cta->warp_count, sizeof *rc->warps);
    }
    rc->touched_from = m->shared_bytes / 4 + 1;
    rc->touched_to = 0;
    memset(rc->barrier_at, 0, (m->shared_bytes / 8 + 1) * sizeof *rc->barrier_at);
    for (int index = 0; index < cta->warp_count; index++) {
        RaceWarp *rw = cta->warps[index].race = &rc->warps[index];
        rw->now = 1;
        rw->self = race_new_actor(cta->cluster);
        rw->registers = calloc((size_t)m->races->tables.count + 1, sizeof *rw->registers);
    }
}

void race_start_cluster(Cluster *cluster)
{
    if (!cluster->race)
        cluster->race = calloc(1, sizeof *cluster->race);
    cluster->race->number = (uint32_t)cluster->index;
    cluster->race->actor_count = 0;
    for (int rank = 0; rank < cluster->size; rank++)
        start_cta(&cluster->ctas[rank]);
}

static void end_cta(Races *races, Cta *cta)
{
    RaceCta *rc = cta->race;
    if (rc->touched_to > rc->touched_from)
        race_forget(races, rc->cells + rc->touched_from, rc->touched_to - rc->touched_from);
    if (rc->tensor_cells)
        race_forget(races, rc->tensor_cells, TMEM_LANES / 16 * TMEM_COLUMNS);
    for (uint32_t k = 0; k < rc->barrier_count; k++)
        free_barrier(&rc->barriers[k]);
    rc->barrier_count = 0;
    for (int k = 0; k < NAMED_BARRIERS; k++)
        free_barrier(&rc->named[k]);
    for (int index = 0; index < cta->warp_count; index++) {
        free_warp(&rc->warps[index]);
        memset(&rc->warps[index], 0, sizeof rc->warps[index]);
    }
}

void race_end_cluster(Cluster *cluster)
{
    for (int rank = 0; rank < cluster->size; rank++)
        end_cta(cluster->ctas[rank].machine->races, &cluster->ctas[rank]);
    free_barrier(&cluster->race->barrier);
}

void race_destroy(Machine *m)
{
    Races *races = m->races;
    for (int slot = 0; slot < m->resident; slot++) {
        Cluster *cluster = &m->clusters[slot];
        if (!cluster->race)
            continue;
        race_end_cluster(cluster);
        for (int rank = 0; rank < cluster->size; rank++) {
            RaceCta *rc = cluster->ctas[rank].race;
            free(rc->cells);
            free(rc->writers);
            free(rc->readers);
            free(rc->barrier_at);
            free(rc->barriers);
            free(rc->tensor_cells);
            free(rc->warps);
            free(rc);
        }
        free(cluster->race);
    }
    for (AsyncOp *op = m->pending; op; op = op->next)
        race_ran(op);
    for (uint32_t k = 0; k < races->state_count; k++)
        free(races->states[k]);
    for (uint64_t k = 0; k < races->page_capacity; k++)
        free(races->pages[k]);
    for (uint64_t k = 0; k < races->place_capacity; k++)
        if (races->places[k]) {
            for (int scope = 0; scope < 3; scope++)
                view_free(&races->places[k]->views[scope]);
            free(races->places[k]);
        }
    view_free(&races->scratch);
    free(races->states);
    free(races->free_states);
    free(races->dying);
    free(races->pages);
    free(races->places);
    free(races);
    m->races = NULL;
}

/* "write by the bulk load that warp 1 of CTA (0,0,0) issued" */
static void describe(const Machine *m, const Record *r, char *out, size_t size)
{
    static const char *const units[UNIT_COUNT] = {
        [UNIT_WARP] = "", [UNIT_WGMMA] = "wgmma of ", [UNIT_BULK_READ] = "bulk copy of ", [UNIT_BULK_WRITE] = "bulk store of ",
        [UNIT_CP_ASYNC] = "cp.async of ", [UNIT_TENSOR] = "tcgen05 operation of ", [UNIT_TENSOR_LOAD] = "tcgen05.ld of ",
        [UNIT_TENSOR_STORE] = "tcgen05.st of ", [UNIT_BARRIER] = "asynchronous load of "};
    const uint32_t *c = m->cluster_shape;
    uint32_t nx = m->grid[0] / c[0], ny = m->grid[1] / c[1];
    uint32_t id[3] = {r->cluster % nx * c[0] + r->rank % c[0], r->cluster / nx % ny * c[1] + r->rank / c[0] % c[1],
                      r->cluster / nx / ny * c[2] + r->rank / c[0] / c[1]};
    const char *what = !r->flags && !r->bytes ? "use" : !(r->flags & TOUCH_WRITE) ? "read" : r->flags & TOUCH_STRONG ? "atomic" : "write";
    int used = snprintf(out, size, "%s at PTX line %d by %swarp %u of CTA (%u,%u,%u)", what, r->line, units[r->unit], r->warp, id[0], id[1],
                        id[2]);
    if (r->lanes && r->lanes != FULL_MASK)
        snprintf(out + used, size - (size_t)used, ", lanes 0x%08x", r->lanes);
}

void race_report(Machine *m, const Record *now, const Record *then, const char *where, const char *why)
{
    char one[200], other[200];
    describe(m, now, one, sizeof one);
    describe(m, then, other, sizeof other);
    m->other_line = then->line;
    machine_fault(m, FAULT_RACE, now->line, "race at %s: nothing orders the %s behind the %s%s", where, one, other, why);
}
