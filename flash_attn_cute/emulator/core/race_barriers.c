/* What barriers pass on: mbarriers, named barriers, the cluster's barrier. */
#include "races.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

RaceBarrier *race_barrier_at(Cta *cta, uint32_t offset)
{
    RaceCta *rc = cta->race;
    uint16_t *number = &rc->barrier_at[offset >> 3];
    if (!*number) {
        if (rc->barrier_count == rc->barrier_capacity) {
            rc->barrier_capacity = rc->barrier_capacity * 2 + 16;
            rc->barriers = realloc(rc->barriers, rc->barrier_capacity * sizeof *rc->barriers);
        }
        RaceBarrier *fresh = &rc->barriers[rc->barrier_count++];
        memset(fresh, 0, sizeof *fresh);
        fresh->actor = race_new_actor(cta->cluster);
        fresh->offset = offset;
        *number = (uint16_t)rc->barrier_count;
    }
    return &rc->barriers[*number - 1];
}

void race_mbarrier_init(Warp *w, const Instr *in, int lane, Cta *cta, uint32_t offset)
{
    RaceBarrier *b = race_barrier_at(cta, offset);
    b->init_actor = w->race->self;
    b->init_clock = w->race->now;
    b->init_lanes = 1u << lane;
    b->init_line = in->line;
    b->init_warp = w->cta->rank << 8 | w->index;
    b->init_fenced = 0;
}

/* fence.mbarrier_init: what the warp initialised is a barrier to the async proxy and to the cluster, too. */
void race_fence_inits(Warp *w)
{
    Cluster *cluster = w->cta->cluster;
    for (int rank = 0; rank < cluster->size; rank++) {
        RaceCta *rc = cluster->ctas[rank].race;
        for (uint32_t k = 0; k < rc->barrier_count; k++)
            if (rc->barriers[k].init_actor == w->race->self)
                rc->barriers[k].init_fenced = 1;
    }
}

/* An operation on a barrier has to follow its initialisation; one of the async proxy, also a fence behind that
 * (PTX ISA, membar/fence: "fence.mbarrier_init"). */
static void check_init(Machine *m, const Accessor *who, Cta *cta, const RaceBarrier *b, uint32_t flags)
{
    if (!b->init_line)
        return;
    Record init = {.cluster = cta->cluster->race->number, .actor = b->init_actor, .clock = b->init_clock, .lanes = b->init_lanes,
                   .line = b->init_line, .bytes = 15, .flags = TOUCH_WRITE, .unit = UNIT_WARP, .rank = (uint8_t)(b->init_warp >> 8),
                   .warp = (uint8_t)b->init_warp};
    Record now = who->record;
    now.flags = TOUCH_WRITE | (uint8_t)flags;
    char where[80];
    snprintf(where, sizeof where, "mbarrier at shared address 0x%x of CTA (%u,%u,%u)", b->offset, cta->id[0], cta->id[1], cta->id[2]);
    if (!race_ordered(who, &init, TOUCH_WRITE))
        race_report(m, &now, &init, where, "; the second initialises it");
    if ((flags & TOUCH_ASYNC) && !b->init_fenced && !race_ordered(who, &init, TOUCH_WRITE | TOUCH_ASYNC))
        race_report(m, &now, &init, where,
                    "; the second initialises it, and neither fence.mbarrier_init nor fence.proxy.async stands between");
}

/* A relaxed arrival passes on what a fence in front of it covers. */
static void relaxed_release(Warp *w, View *into)
{
    view_join_memory(into, &w->race->fenced);
    clock_join(&into->tensor, &w->race->tensor_said);
}

void race_mbarrier_arrive(Warp *w, const Instr *in, uint32_t mask, Cta *cta, uint32_t offset, int release)
{
    RaceBarrier *b = race_barrier_at(cta, offset);
    race_begin_warp(w, in, mask);
    check_init(w->machine, &w->machine->races->who, cta, b, 0);
    if (release)
        race_release(w, mask, &b->gathered);
    else
        relaxed_release(w, &b->gathered);
}

/* An operation is complete as far as this barrier can tell: who accesses memory now does so until the phase ends. */
void race_on_barrier(Machine *m, Cta *cta, uint32_t offset)
{
    if ((offset & 7) || offset < SHARED_FIRST || offset + 8 > cta->shared_bytes)
        return; /* an error that the barrier's own check tells */
    RaceBarrier *b = race_barrier_at(cta, offset);
    Accessor *who = &m->races->who;
    check_init(m, who, cta, b, TOUCH_ASYNC);
    race_begin(m->races);
    who->record.actor = b->actor;
    who->record.clock = b->phase + 1;
    who->record.lanes = FULL_MASK;
    who->record.unit = UNIT_BARRIER;
}

/* tcgen05.commit and cp.async.mbarrier.arrive: what they bring is in `view`. */
void race_mbarrier_bring(Machine *m, Cta *cta, uint32_t offset, const View *view)
{
    RaceBarrier *b = race_barrier_at(cta, offset);
    check_init(m, &m->races->who, cta, b, m->races->who.record.unit == UNIT_TENSOR ? TOUCH_ASYNC : 0);
    view_join(&b->gathered, view);
}

void race_mbarrier_passed(Cta *cta, uint32_t offset)
{
    RaceBarrier *b = race_barrier_at(cta, offset);
    b->phase++;
    clock_at(&b->gathered.generic, b->actor)->all = b->phase;
    clock_at(&b->gathered.async, b->actor)->all = b->phase;
    view_copy(&b->passed, &b->gathered);
}

void race_mbarrier_waited(Warp *w, const Instr *in, uint32_t mask, Cta *cta, uint32_t offset, int acquire)
{
    RaceBarrier *b = race_barrier_at(cta, offset);
    race_begin_warp(w, in, mask);
    check_init(w->machine, &w->machine->races->who, cta, b, 0);
    if (acquire)
        race_acquire(w, mask, &b->passed);
    else {
        view_join_memory(&w->race->observed, &b->passed);
        clock_join(&w->race->tensor_seen, &b->passed.tensor);
    }
}

void race_named_arrive(Warp *w, uint32_t mask, uint32_t number) { race_release(w, mask, &w->cta->race->named[number].gathered); }

/* All have arrived: `last` and every fragment that waits get what they brought. */
void race_named_complete(Warp *last, uint32_t mask, uint32_t number, int waits)
{
    Cta *cta = last->cta;
    RaceBarrier *b = &cta->race->named[number];
    for (int index = 0; index < cta->warp_count; index++) {
        Warp *w = &cta->warps[index];
        for (int k = 0; k < w->fragment_count; k++)
            if (w->fragments[k].wait == WAIT_BARRIER && w->fragments[k].value == number)
                race_acquire(w, w->fragments[k].mask, &b->gathered);
    }
    if (waits)
        race_acquire(last, mask, &b->gathered);
    view_clear(&b->gathered);
}

void race_cluster_arrive(Warp *w, uint32_t mask, int release)
{
    View *into = &w->cta->cluster->race->barrier.gathered;
    if (release)
        race_release(w, mask, into);
    else
        relaxed_release(w, into);
}

void race_cluster_complete(Cluster *cluster)
{
    RaceBarrier *b = &cluster->race->barrier;
    view_copy(&b->passed, &b->gathered);
    view_clear(&b->gathered);
    for (int rank = 0; rank < cluster->size; rank++)
        for (int index = 0; index < cluster->ctas[rank].warp_count; index++) {
            Warp *w = &cluster->ctas[rank].warps[index];
            for (int k = 0; k < w->fragment_count; k++)
                if (w->fragments[k].wait == WAIT_CLUSTER)
                    race_acquire(w, w->fragments[k].mask, &b->passed);
        }
}

void race_cluster_wait(Warp *w, uint32_t mask) { race_acquire(w, mask, &w->cta->cluster->race->barrier.passed); }
