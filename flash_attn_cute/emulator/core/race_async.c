/* Asynchronous operations: what they know when they access memory, and what waiting for them makes known. Fences. */
#include "races.h"

#include <stdlib.h>
#include <string.h>

/* -- operations ------------------------------------------------------------------------------------------------------------------ */

static Unit unit_of(const AsyncOp *op)
{
    switch (op->kind) {
    case ASYNC_WGMMA: return UNIT_WGMMA;
    case ASYNC_TCGEN05: return UNIT_TENSOR;
    case ASYNC_CP: return UNIT_CP_ASYNC;
    default: return UNIT_BULK_READ; /* loads complete on a barrier instead: race_on_barrier */
    }
}

/* Numbers an operation where it is issued. One that runs later gets a copy of what its lane knows. */
void race_issue(AsyncOp *op, int later)
{
    Warp *w = op->warp;
    RaceWarp *rw = w->race;
    uint32_t lanes = op->kind == ASYNC_WGMMA ? FULL_MASK : 1u << op->lane;
    op->race_clock = ++rw->issued[unit_of(op)];
    op->race_self = race_self(w, lanes);
    op->race_view = NULL;
    rw->now++; /* what the warp does from here on does not come with it */
    if (!later)
        return;
    op->race_view = calloc(1, sizeof *op->race_view);
    view_copy(op->race_view, race_view(w, lanes));
}

void race_run(Machine *m, const AsyncOp *op)
{
    Warp *w = op->warp;
    Unit unit = unit_of(op);
    uint32_t lanes = unit == UNIT_WGMMA ? FULL_MASK : 1u << op->lane;
    race_begin(m->races);
    m->races->who = (Accessor){.view = op->race_view ? op->race_view : race_view(w, lanes), .warp = w, .self = op->race_self};
    m->races->who.record = (Record){.cluster = op->cluster->race->number, .actor = race_unit(w, unit), .clock = op->race_clock,
                                    .lanes = lanes, .line = op->in->line, .unit = (uint8_t)unit, .rank = (uint8_t)w->cta->rank,
                                    .warp = (uint8_t)w->index};
    if (unit == UNIT_WGMMA || unit == UNIT_TENSOR)
        m->races->who.record.lanes = FULL_MASK;
}

void race_ran(const AsyncOp *op)
{
    if (op->race_view) {
        view_free(op->race_view);
        free(op->race_view);
    }
}

/* A bulk store as a writer of global memory, of which another wait tells than of its reads. */
void race_store_global(Machine *m, uint64_t address, uint64_t size, int atomic)
{
    Accessor *who = &m->races->who, reader = *who;
    who->record.unit = UNIT_BULK_WRITE;
    who->record.actor = race_unit(who->warp, UNIT_BULK_WRITE);
    race_begin(m->races); /* states must not be remembered for the other unit */
    race_touch_global(m, address, size, LANE_NONE,
                      TOUCH_WRITE | TOUCH_ASYNC | (atomic ? TOUCH_STRONG | SCOPE_GPU << TOUCH_SCOPE_SHIFT : 0));
    *who = reader;
    race_begin(m->races);
}

/* What an arrival brings that stands for the operations that its lane issued before. */
void race_bring(Machine *m, const AsyncOp *op, Cta *cta, uint32_t offset)
{
    Races *races = m->races;
    const Accessor *who = &races->who;
    View *brings = &races->scratch;
    view_clear(brings);
    if (op->kind == ASYNC_CP)
        *clock_at(&brings->generic, who->record.actor) = (Known){0, op->race_clock, 1u << op->lane};
    else {
        /* What was ordered before the products is ordered before whoever waits for them. tcgen05.commit implies
         * fence::before_thread_sync (PTX ISA, tcgen05.commit). */
        view_join(brings, who->view);
        known_join(clock_at(&brings->generic, op->warp->race->self), op->race_self);
        Known done = {op->race_clock, 0, 0};
        known_join(clock_at(&brings->generic, who->record.actor), done);
        known_join(clock_at(&brings->async, who->record.actor), done);
        known_join(clock_at(&brings->tensor, who->record.actor), done);
    }
    race_mbarrier_bring(m, cta, offset, brings);
}

/* -- groups ------------------------------------------------------------------------------------------------------------------------ */

static Unit unit_of_kind(AsyncKind kind)
{
    return kind == ASYNC_WGMMA ? UNIT_WGMMA : kind == ASYNC_CP ? UNIT_CP_ASYNC : UNIT_BULK_READ;
}

void race_commit_group(Warp *w, AsyncKind kind, uint32_t lanes)
{
    Commits *c = &w->race->commits[kind];
    uint32_t at = c->count++ % COMMITS;
    c->ring[at].clock = w->race->issued[unit_of_kind(kind)];
    c->ring[at].lanes = lanes;
}

/* All but the last `pending` groups are complete; with `read_only` (wait_group.read) they have read their sources. */
void race_wait_group(Warp *w, AsyncKind kind, uint32_t lanes, int pending, int read_only)
{
    const Commits *c = &w->race->commits[kind];
    uint32_t lane = lanes & -lanes;
    for (uint32_t back = 1; back <= c->count && back <= COMMITS; back++) {
        uint32_t at = (c->count - back) % COMMITS;
        if (!(c->ring[at].lanes & lane) || pending-- > 0)
            continue;
        uint32_t mask = kind == ASYNC_WGMMA ? FULL_MASK : lanes;
        race_know_unit(w, mask, unit_of_kind(kind), c->ring[at].clock);
        if (kind == ASYNC_TMA_STORE && !read_only)
            race_know_unit(w, mask, UNIT_BULK_WRITE, c->ring[at].clock);
        return;
    }
}

/* -- fences ------------------------------------------------------------------------------------------------------------------------ */

static void fence_proxy(Warp *w, uint32_t mask)
{
    RaceWarp *rw = w->race;
    View *to = race_lanes_view(w, mask);
    Known self = race_self(w, mask);
    clock_join(&to->async, &to->generic);
    known_join(clock_at(&to->async, rw->self), self);
    race_tell_copies(w, mask, &to->async);
    for (uint32_t k = 0; k < to->foreign_count; k++)
        view_fence_foreign(to, k);
    if (to == &rw->all && rw->some_lanes)
        view_join_memory(&rw->some, to);
    rw->now++;
}

static void fence_memory(Warp *w, uint32_t mask, int scope)
{
    RaceWarp *rw = w->race;
    race_acquire(w, mask, &rw->observed);
    view_clear(&rw->observed);
    view_clear(&rw->fenced);
    race_release(w, mask, &rw->fenced);
    rw->fence_scope = scope;
}

/* sub: FENCE_* | scope << 4 | executed by the whole warp << 8 */
void race_fence(Warp *w, const Instr *in, uint32_t mask)
{
    RaceWarp *rw = w->race;
    if (in->sub >> 8 & 1)
        race_warp_sync(w, FULL_MASK);
    switch ((FenceKind)(in->sub & 15)) {
    case FENCE_PROXY_ASYNC: fence_proxy(w, mask); break;
    case FENCE_MEMORY: fence_memory(w, mask, (int)(in->sub >> 4 & 3)); break;
    case FENCE_MBARRIER_INIT:
        race_fence_inits(w);
        fence_memory(w, mask, SCOPE_CLUSTER);
        break;
    case FENCE_WGMMA: rw->fences++; break;
    case FENCE_TENSOR_BEFORE: clock_join(&rw->tensor_said, &rw->all.tensor); break;
    case FENCE_TENSOR_AFTER: race_know_tensor(w, &rw->tensor_seen); break;
    case FENCE_TENSOR_LOADS: race_wait_tensor(w, UNIT_TENSOR_LOAD, rw->issued[UNIT_TENSOR_LOAD]); break;
    case FENCE_TENSOR_STORES: race_wait_tensor(w, UNIT_TENSOR_STORE, rw->issued[UNIT_TENSOR_STORE]); break;
    case FENCE_WARP: break;
    }
}

/* tcgen05.wait: what the warp loaded or stored is complete, up to that one. */
void race_wait_tensor(Warp *w, Unit unit, uint32_t number)
{
    RaceWarp *rw = w->race;
    uint32_t actor = race_unit(w, unit);
    View *views[2] = {&rw->all, rw->some_lanes ? &rw->some : NULL};
    for (int k = 0; k < 2 && views[k]; k++) {
        clock_at(&views[k]->tensor, actor)->all = number;
        clock_at(&views[k]->generic, actor)->all = number;
    }
}

/* tcgen05.ld and st: the warp's own unit, in the warp's order. */
void race_begin_tensor(Warp *w, const Instr *in, int loading)
{
    Unit unit = loading ? UNIT_TENSOR_LOAD : UNIT_TENSOR_STORE;
    race_warp_sync(w, FULL_MASK);
    race_begin_warp(w, in, FULL_MASK);
    Accessor *who = &w->machine->races->who;
    who->own = 0;
    who->record.unit = (uint8_t)unit;
    who->record.actor = race_unit(w, unit);
    who->record.clock = ++w->race->issued[unit];
}

/* tcgen05.dealloc: whoever used the columns has to be done, as if they were written once more. */
void race_free_columns(Warp *w, const Instr *in, uint32_t column, uint32_t count)
{
    race_begin_warp(w, in, FULL_MASK);
    for (uint32_t lane = 0; lane < TMEM_LANES; lane += 16)
        race_touch_tensor(w->machine, w->cta, lane, column, count, TOUCH_WRITE);
}

/* tcgen05.alloc: what was done with them before they were freed does not matter any more. */
void race_take_columns(Cta *cta, uint32_t column, uint32_t count)
{
    for (uint32_t lane = 0; lane < TMEM_LANES; lane += 16)
        race_forget(cta->machine->races, cta->race->tensor_cells + lane / 16 * TMEM_COLUMNS + column, count);
}
