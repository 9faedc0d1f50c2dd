/* Vector clocks: what is known of each actor, and how knowledge is passed on. */
#include "races.h"

#include <stdlib.h>
#include <string.h>

/* Lanes that released at different times are taken to know the later one: rather miss a race than invent one. */
void known_join(Known *to, Known from)
{
    if (from.all > to->all)
        to->all = from.all;
    if (from.some > to->all) {
        if (to->some <= to->all)
            to->some = from.some, to->lanes = from.lanes;
        else {
            to->lanes |= from.lanes;
            to->some = from.some > to->some ? from.some : to->some;
        }
        if (to->lanes == FULL_MASK)
            to->all = to->some;
    }
}

static void clock_grow(Clock *clock, uint32_t length)
{
    if (length > clock->capacity) {
        clock->capacity = length + 16;
        clock->at = realloc(clock->at, clock->capacity * sizeof *clock->at);
    }
    if (length > clock->length) {
        memset(clock->at + clock->length, 0, (length - clock->length) * sizeof *clock->at);
        clock->length = length;
    }
}

Known *clock_at(Clock *clock, uint32_t actor)
{
    clock_grow(clock, actor + 1);
    return &clock->at[actor];
}

int clock_knows(const Clock *clock, uint32_t actor, uint32_t time, uint32_t lanes)
{
    if (actor >= clock->length)
        return 0;
    Known k = clock->at[actor];
    return time <= k.all || (time <= k.some && !(lanes & ~k.lanes));
}

void clock_join(Clock *to, const Clock *from)
{
    clock_grow(to, from->length);
    for (uint32_t k = 0; k < from->length; k++)
        known_join(&to->at[k], from->at[k]);
}

void clock_copy(Clock *to, const Clock *from)
{
    to->length = 0;
    clock_grow(to, from->length);
    if (from->length)
        memcpy(to->at, from->at, from->length * sizeof *to->at);
}

static Remote *remote_make(const Clock *generic, const Clock *async)
{
    Remote *out = calloc(1, sizeof *out);
    out->refs = 1;
    clock_copy(&out->generic, generic);
    clock_copy(&out->async, async);
    return out;
}

static void remote_drop(Remote *remote)
{
    if (--remote->refs)
        return;
    free(remote->generic.at);
    free(remote->async.at);
    free(remote);
}

static Foreign *foreign_of(const View *view, uint32_t cluster)
{
    for (uint32_t k = 0; k < view->foreign_count; k++)
        if (view->foreign[k].cluster == cluster)
            return &view->foreign[k];
    return NULL;
}

/* Joins knowledge of another cluster; keeps what both have in common shared. */
static void foreign_join(View *view, uint32_t cluster, Remote *remote)
{
    Foreign *have = foreign_of(view, cluster);
    if (!have) {
        if (view->foreign_count == view->foreign_capacity) {
            view->foreign_capacity = view->foreign_capacity * 2 + 4;
            view->foreign = realloc(view->foreign, view->foreign_capacity * sizeof *view->foreign);
        }
        view->foreign[view->foreign_count++] = (Foreign){cluster, remote};
        remote->refs++;
        return;
    }
    if (have->known == remote)
        return;
    Remote *both = remote_make(&have->known->generic, &have->known->async);
    clock_join(&both->generic, &remote->generic);
    clock_join(&both->async, &remote->async);
    remote_drop(have->known);
    have->known = both;
}

void view_join(View *to, const View *from)
{
    view_join_memory(to, from);
    clock_join(&to->tensor, &from->tensor);
}

/* All but tensor memory, which has fences of its own. */
void view_join_memory(View *to, const View *from)
{
    clock_join(&to->generic, &from->generic);
    clock_join(&to->async, &from->async);
    for (uint32_t k = 0; k < from->foreign_count; k++)
        foreign_join(to, from->foreign[k].cluster, from->foreign[k].known);
}

void view_clear(View *view)
{
    view->generic.length = view->async.length = view->tensor.length = 0;
    for (uint32_t k = 0; k < view->foreign_count; k++)
        remote_drop(view->foreign[k].known);
    view->foreign_count = 0;
}

void view_copy(View *to, const View *from)
{
    view_clear(to);
    view_join(to, from);
}

void view_free(View *view)
{
    view_clear(view);
    free(view->generic.at);
    free(view->async.at);
    free(view->tensor.at);
    free(view->foreign);
    memset(view, 0, sizeof *view);
}

/* Is the record ordered before an access that knows this much? `async`: for the async proxy. */
int view_knows(const View *view, uint32_t own_cluster, const Record *r, int async)
{
    const Clock *generic = &view->generic, *fenced = &view->async;
    if (r->cluster != own_cluster) {
        const Foreign *there = foreign_of(view, r->cluster);
        if (!there)
            return 0;
        generic = &there->known->generic, fenced = &there->known->async;
    }
    return clock_knows(async ? fenced : generic, r->actor, r->clock, r->lanes);
}

/* fence.proxy.async, for what is known of another cluster. */
void view_fence_foreign(View *view, uint32_t number)
{
    Foreign *f = &view->foreign[number];
    Remote *fenced = remote_make(&f->known->generic, &f->known->generic);
    remote_drop(f->known);
    f->known = fenced;
}

/* Knowledge leaves a cluster: its own part becomes one of many. */
void view_publish(View *to, const View *from, uint32_t cluster, int replace)
{
    if (replace)
        view_clear(to);
    for (uint32_t k = 0; k < from->foreign_count; k++)
        foreign_join(to, from->foreign[k].cluster, from->foreign[k].known);
    Remote *own = remote_make(&from->generic, &from->async);
    foreign_join(to, cluster, own);
    remote_drop(own);
}

/* And enters another, or its own again. */
void view_receive(View *to, const View *from, uint32_t cluster)
{
    for (uint32_t k = 0; k < from->foreign_count; k++) {
        if (from->foreign[k].cluster == cluster) {
            clock_join(&to->generic, &from->foreign[k].known->generic);
            clock_join(&to->async, &from->foreign[k].known->async);
        } else
            foreign_join(to, from->foreign[k].cluster, from->foreign[k].known);
    }
}
