/* Synchronisation through memory: releases, acquires, fences and what relaxed accesses between them pass on, each as far as its scope
 * goes (PTX ISA, "Release and Acquire Patterns"). */
#include "races.h"

#include <stdlib.h>
#include <string.h>

static SyncPlace *find_place(Races *races, uint64_t key, int make)
{
    if (races->place_count * 2 >= races->place_capacity) {
        if (!make && !races->place_count)
            return NULL;
        uint64_t capacity = races->place_capacity ? races->place_capacity * 2 : 64;
        SyncPlace **bigger = calloc(capacity, sizeof *bigger);
        for (uint64_t k = 0; k < races->place_capacity; k++)
            if (races->places[k]) {
                uint64_t at = races->places[k]->key * 0x9e3779b97f4a7c15ull >> 20 & (capacity - 1);
                while (bigger[at])
                    at = (at + 1) & (capacity - 1);
                bigger[at] = races->places[k];
            }
        free(races->places);
        races->places = bigger;
        races->place_capacity = capacity;
    }
    uint64_t at = key * 0x9e3779b97f4a7c15ull >> 20 & (races->place_capacity - 1);
    while (races->places[at] && races->places[at]->key != key)
        at = (at + 1) & (races->place_capacity - 1);
    if (!races->places[at] && make) {
        races->places[at] = calloc(1, sizeof(SyncPlace));
        races->places[at]->key = key;
        races->place_count++;
    }
    return races->places[at];
}

static int same_owner(const SyncPlace *place, const Warp *w, int scope)
{
    return scope >= SCOPE_GPU || (place->cluster[scope] == w->cta->cluster->race->number &&
                                  (scope == SCOPE_CLUSTER || place->rank == (uint32_t)w->cta->rank));
}

/* Each narrower view holds what the wider scopes released, too. */
static void publish(SyncPlace *place, Warp *w, const View *from, int scope, int replace)
{
    for (int k = 0; k <= scope; k++) {
        view_publish(&place->views[k], from, w->cta->cluster->race->number, replace || !same_owner(place, w, k));
        place->cluster[k] = w->cta->cluster->race->number;
        if (k == SCOPE_CTA)
            place->rank = (uint32_t)w->cta->rank;
    }
}

static void receive(const SyncPlace *place, Warp *w, View *to, int scope)
{
    for (int k = 0; k <= scope; k++)
        if (same_owner(place, w, k))
            view_receive(to, &place->views[k], w->cta->cluster->race->number);
}

/* One lane's strong access. order: 1 acquires, 2 releases, scope << 2. A reading write continues what was released before. */
void race_order(Warp *w, int lane, uint64_t address, uint32_t order, int write, int read)
{
    Races *races = w->machine->races;
    RaceWarp *rw = w->race;
    int scope = (int)(order >> 2 & 3) > SCOPE_GPU ? SCOPE_GPU : (int)(order >> 2 & 3);
    uint64_t key = address;
    if (address >> 60 == SHARED_WINDOW >> 60) /* one cluster's shared memory is not another's */
        key ^= (uint64_t)w->cta->cluster->race->number << 32;
    if (read) {
        const SyncPlace *place = find_place(races, key, 0);
        if (place && (order & 1)) {
            View *to = race_lanes_view(w, 1u << lane);
            receive(place, w, to, scope);
            if (to == &rw->all && rw->some_lanes)
                receive(place, w, &rw->some, scope);
        } else if (place)
            receive(place, w, &rw->observed, scope);
    }
    if (!write)
        return;
    if (order & 2) {
        view_clear(&races->scratch);
        race_release(w, 1u << lane, &races->scratch);
        publish(find_place(races, key, 1), w, &races->scratch, scope, !read);
    } else if (rw->fenced.generic.length)
        publish(find_place(races, key, 1), w, &rw->fenced, scope < rw->fence_scope ? scope : rw->fence_scope, !read);
    else if (!read) {
        SyncPlace *place = find_place(races, key, 0);
        for (int k = 0; place && k < 3; k++)
            view_clear(&place->views[k]);
    }
}
