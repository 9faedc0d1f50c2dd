/* What each warp knows, and what an arrival of some of its lanes lets others know.
 *
 * Lanes of a warp are ordered among themselves by instructions that all of them execute together: bar.warp.sync, and every .sync
 * instruction with more than one member. (Of those only bar.warp.sync promises an order of memory accesses; programs rely on the
 * others too, and what they order has been issued.) What an elected lane waited for is known to the other lanes from there on, and
 * what the other lanes did before is covered by its arrival only up to there. */
#include "races.h"

#include <stdlib.h>
#include <string.h>

static int whole(const Warp *w, uint32_t mask) { return (mask | ~w->live) == FULL_MASK; }

const View *race_view(const Warp *w, uint32_t mask)
{
    const RaceWarp *rw = w->race;
    return rw->some_lanes && !(mask & ~rw->some_lanes) ? &rw->some : &rw->all;
}

/* Where knowledge goes that these lanes get. */
View *race_lanes_view(Warp *w, uint32_t mask)
{
    RaceWarp *rw = w->race;
    if (whole(w, mask))
        return &rw->all;
    if (!rw->some_lanes)
        view_copy(&rw->some, &rw->all);
    rw->some_lanes |= mask;
    return &rw->some;
}

/* What these lanes know of their own warp's other lanes. */
static Known among_lanes(const Warp *w, uint32_t mask)
{
    const Clock *clock = &race_view(w, mask)->generic;
    return w->race->self < clock->length ? clock->at[w->race->self] : (Known){0, 0, 0};
}

/* And of their warp as a whole: what they did themselves is part of it. */
Known race_self(const Warp *w, uint32_t mask)
{
    const RaceWarp *rw = w->race;
    if (whole(w, mask))
        return (Known){rw->now, 0, 0};
    Known known = among_lanes(w, mask);
    known_join(&known, (Known){0, rw->now, mask});
    return known;
}

void race_warp_sync(Warp *w, uint32_t members)
{
    RaceWarp *rw = w->race;
    if (!(members & (members - 1)))
        return;
    if (rw->some_lanes) {
        view_join(&rw->all, &rw->some);
        rw->some_lanes = 0;
    }
    race_tell_copies(w, FULL_MASK, &rw->all.generic);
    clock_at(&rw->all.generic, rw->self)->all = rw->now++;
}

/* Passes on what these lanes know and did. */
void race_release(Warp *w, uint32_t mask, View *into)
{
    RaceWarp *rw = w->race;
    const View *from = race_view(w, mask);
    view_join_memory(into, from);
    clock_join(&into->tensor, w->machine->races->tables.before_fences ? &rw->tensor_said : &from->tensor);
    known_join(clock_at(&into->generic, rw->self), race_self(w, mask));
    race_tell_copies(w, mask, &into->generic);
    rw->now++;
}

/* What these lanes copied with cp.async and waited for. */
void race_tell_copies(Warp *w, uint32_t mask, Clock *to)
{
    Known known = w->race->copied;
    if (!known.some)
        return;
    known.lanes &= mask;
    known_join(clock_at(to, race_unit(w, UNIT_CP_ASYNC)), known);
}

/* Has the executing lane's own wait made this copy known, if it was this lane's? */
int race_own_copy(const Accessor *who, const Record *then)
{
    const RaceWarp *rw = who->warp->race;
    return then->unit == UNIT_CP_ASYNC && then->actor == rw->units[UNIT_CP_ASYNC] && then->cluster == who->record.cluster &&
           then->clock <= rw->copied.some && !(then->lanes & ~rw->copied.lanes) &&
           !clock_knows(&who->view->generic, then->actor, then->clock, then->lanes);
}

void race_acquire(Warp *w, uint32_t mask, const View *from)
{
    RaceWarp *rw = w->race;
    View *to = race_lanes_view(w, mask);
    view_join_memory(to, from);
    if (to == &rw->all && rw->some_lanes)
        view_join_memory(&rw->some, from);
    if (w->machine->races->tables.after_fences)
        clock_join(&rw->tensor_seen, &from->tensor);
    else
        race_know_tensor(w, &from->tensor);
}

/* Tensor memory is known to a warp as a whole. */
void race_know_tensor(Warp *w, const Clock *from)
{
    clock_join(&w->race->all.tensor, from);
    if (w->race->some_lanes)
        clock_join(&w->race->some.tensor, from);
}

/* The local actor of one of the warp's units. */
uint32_t race_unit(Warp *w, Unit unit)
{
    uint32_t *actor = &w->race->units[unit];
    if (!*actor) {
        /* A wgmma is one operation of four warps: who has waited for it knows that it is complete in all of them. */
        Warp *first = unit == UNIT_WGMMA ? w - w->index % 4 : w;
        if (first != w)
            *actor = race_unit(first, unit);
        else
            *actor = race_new_actor(w->cta->cluster);
    }
    return *actor;
}

uint32_t race_new_actor(Cluster *cluster) { return ++cluster->race->actor_count; }

/* The lanes have waited for everything that they gave to the unit up to `clock`. */
void race_know_unit(Warp *w, uint32_t mask, Unit unit, uint32_t clock)
{
    RaceWarp *rw = w->race;
    uint32_t actor = race_unit(w, unit);
    int all = whole(w, mask);
    if (unit == UNIT_CP_ASYNC) {
        /* One time for all lanes: what lanes on other paths waited for is taken to reach as far. */
        int again = clock > rw->copied.some && (rw->copied.lanes & mask);
        rw->copied.lanes = again ? mask : rw->copied.lanes | mask;
        rw->copied.some = clock > rw->copied.some ? clock : rw->copied.some;
        return;
    }
    Known known = all ? (Known){clock, 0, 0} : (Known){0, clock, mask};
    View *views[2] = {race_lanes_view(w, mask), all && rw->some_lanes ? &rw->some : NULL};
    for (int k = 0; k < 2 && views[k]; k++) {
        known_join(clock_at(&views[k]->generic, actor), known);
        known_join(clock_at(&views[k]->async, actor), known);
    }
}

void race_begin_warp(Warp *w, const Instr *in, uint32_t mask)
{
    Races *races = w->machine->races;
    const RaceWarp *rw = w->race;
    race_begin(races);
    races->who = (Accessor){.view = race_view(w, mask), .warp = w, .own = 1, .self = among_lanes(w, mask)};
    races->who.record = (Record){.cluster = w->cta->cluster->race->number, .actor = rw->self, .clock = rw->now, .lanes = mask,
                                 .line = in->line, .unit = UNIT_WARP, .rank = (uint8_t)w->cta->rank, .warp = (uint8_t)w->index};
}

/* Is `then` ordered before an access of who's? */
int race_ordered(const Accessor *who, const Record *then, uint32_t flags)
{
    uint32_t cluster = who->record.cluster;
    if (flags & TOUCH_TENSOR) {
        /* Products and copies of one issuing thread form a pipeline (PTX ISA, "Pipelined tcgen05 Instructions"). */
        if (then->cluster == cluster && then->actor == who->record.actor && then->unit == UNIT_TENSOR)
            return 1;
        /* Freeing columns is no operation that fences of tcgen05 order; completion has to be known all the same. */
        return clock_knows(who->own ? &who->view->generic : &who->view->tensor, then->actor, then->clock, then->lanes);
    }
    /* What read through the generic proxy is over when it is known; what was written has to be fenced for the async proxy, and
     * so have reads of an answer before clusterlaunchcontrol.try_cancel writes the next one. */
    int fence = (flags & TOUCH_ASYNC) && !(then->flags & TOUCH_ASYNC) && ((then->flags & TOUCH_WRITE) || (flags & TOUCH_READS_FENCED));
    if (fence && !view_knows(who->view, cluster, then, 1))
        return 0;
    if (then->cluster == cluster && then->actor == who->warp->race->self)
        return then->clock <= who->self.all || (then->clock <= who->self.some && !(then->lanes & ~who->self.lanes));
    return view_knows(who->view, cluster, then, 0);
}
