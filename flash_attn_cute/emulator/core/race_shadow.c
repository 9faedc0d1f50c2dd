/* Shadow memory of the race check.
 *
 * Every four bytes of shared and global memory, and every sixteen lanes of a column of tensor memory, have a cell: the number of a
 * state. A state lists the accesses that a later one may conflict with: the writes since the last one that covers them, and the
 * reads since. Cells with one history share their state, so what a tensor instruction or a bulk copy does to thousands of cells is
 * worked out once for each different state that it meets (as dynamic analyses compress arrays: SlimState, ASE 2015).
 *
 * An access in a lane may conflict with one that another lane of its warp made since the lanes last synchronised. Which lane it was
 * is kept a byte, beside the cells. */
#include "races.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_RECORDS 48 /* a state keeps; the oldest read goes first, as in ThreadSanitizer: a race may be missed, none is invented */

/* -- states -------------------------------------------------------------------------------------------------------------------- */

static void push(uint32_t **list, uint32_t *count, uint32_t *capacity, uint32_t value)
{
    if (*count == *capacity) {
        *capacity = *capacity * 2 + 64;
        *list = realloc(*list, *capacity * sizeof **list);
    }
    (*list)[(*count)++] = value;
}

static uint32_t new_state(Races *races, uint32_t count)
{
    uint32_t number;
    if (races->free_count)
        number = races->free_states[--races->free_count];
    else {
        if (races->state_count == races->state_capacity) {
            races->state_capacity = races->state_capacity * 2 + 1024;
            races->states = realloc(races->states, races->state_capacity * sizeof *races->states);
        }
        number = races->state_count++;
    }
    races->states[number] = calloc(1, sizeof(State) + count * sizeof(Record));
    races->states[number]->count = count;
    return number;
}

static void drop_state(Races *races, uint32_t number, uint32_t cells)
{
    State *state = races->states[number];
    state->refs -= cells;
    if (!state->refs && number && !state->dying) {
        state->dying = 1;
        push(&races->dying, &races->dying_count, &races->dying_capacity, number);
    }
}

/* Before an operation looks at memory: forgets the one before, and states that no cell has any more. */
void race_begin(Races *races)
{
    if (!++races->serial) {
        memset(races->memo, 0, sizeof races->memo);
        races->serial = 1;
    }
    for (uint32_t k = 0; k < races->dying_count; k++) {
        uint32_t number = races->dying[k];
        State *state = races->states[number];
        state->dying = 0;
        if (state->refs)
            continue;
        free(state);
        races->states[number] = NULL;
        push(&races->free_states, &races->free_count, &races->free_capacity, number);
    }
    races->dying_count = 0;
    if (!races->state_count)
        new_state(races, 0); /* number 0: nobody was here */
}

void race_forget(Races *races, uint32_t *cells, uint32_t count)
{
    for (uint32_t k = 0; k < count; k++)
        if (cells[k]) {
            drop_state(races, cells[k], 1);
            cells[k] = 0;
        }
}

/* -- conflicts ------------------------------------------------------------------------------------------------------------------ */

/* Two strong accesses do not conflict where the scope of each includes the other (PTX ISA, "Morally Strong Operations"). */
static int morally_strong(const Record *a, const Record *b, uint32_t flags)
{
    if (!(a->flags & flags & TOUCH_STRONG))
        return 0;
    uint32_t scope = a->flags >> TOUCH_SCOPE_SHIFT & 3, other = flags >> TOUCH_SCOPE_SHIFT & 3;
    scope = scope < other ? scope : other;
    return scope >= SCOPE_GPU || (a->cluster == b->cluster && (scope == SCOPE_CLUSTER || a->rank == b->rank));
}

static int same_operation(const Record *a, const Record *b)
{
    return a->actor == b->actor && a->cluster == b->cluster && a->clock == b->clock && a->line == b->line && a->lanes == b->lanes;
}

/* Something that lanes of the warp did, of which those that access memory now need not know. */
static int unknown_lane(const Accessor *who, const Record *r)
{
    if (who->own && race_own_copy(who, r))
        return 1;
    return who->own && r->actor == who->record.actor && r->cluster == who->record.cluster && r->clock > who->self.all &&
           !(r->clock <= who->self.some && !(r->lanes & ~who->self.lanes));
}

/* Lanes of one cp.async, which number their copies one after the other, may copy the same to one place. */
static int same_copy(const Record *a, const Record *b)
{
    return a->unit == UNIT_CP_ASYNC && b->unit == UNIT_CP_ASYNC && a->actor == b->actor && a->cluster == b->cluster &&
           a->line == b->line && b->lanes > a->lanes && b->clock - a->clock <= (uint32_t)(__builtin_ctz(b->lanes) - __builtin_ctz(a->lanes));
}

typedef struct { Machine *m; uint32_t flags; const char *where; uint64_t address; Cta *cta; } Touch;

static _Noreturn void conflict(const Touch *touch, const Record *then)
{
    Machine *m = touch->m;
    Record now = m->races->who.record;
    char where[160], why[200] = "";
    if (touch->cta)
        snprintf(where, sizeof where, "%s 0x%llx of CTA (%u,%u,%u)", touch->where, (unsigned long long)touch->address, touch->cta->id[0],
                 touch->cta->id[1], touch->cta->id[2]);
    else
        snprintf(where, sizeof where, "%s 0x%llx", touch->where, (unsigned long long)touch->address);
    now.flags = (uint8_t)touch->flags;
    int tensor = (touch->flags & TOUCH_TENSOR) != 0;
    if (!tensor && (now.flags & TOUCH_ASYNC) && !(then->flags & TOUCH_ASYNC) &&
        view_knows(m->races->who.view, now.cluster, then, 0))
        snprintf(why, sizeof why, "; they are ordered, but no fence.proxy.async stands between the generic and the async proxy");
    else if (tensor && view_knows(m->races->who.view, now.cluster, then, 0))
        snprintf(why, sizeof why, "; no tcgen05.wait or tcgen05.fence orders them");
    else if (then->cluster == now.cluster && then->actor == now.actor && then->unit == UNIT_WARP)
        snprintf(why, sizeof why, "; lanes of one warp, and nothing synchronises them between");
    race_report(m, &now, then, where, why);
}

/* What a cell becomes that is in state `from`. */
static Transition transition(const Touch *touch, uint32_t from, uint8_t bytes)
{
    Races *races = touch->m->races;
    const Accessor *who = &races->who;
    const State *old = races->states[from];
    uint32_t flags = touch->flags, kept = 0, write = flags & TOUCH_WRITE;
    uint8_t keep[MOST_RECORDS + 1];
    int merged = -1, complete = 0;
    Transition out = {.from = from, .to = from, .serial = races->serial, .bytes = bytes, .flags = (uint8_t)flags};
    for (uint32_t k = 0; k < old->count; k++) {
        const Record *r = &old->records[k];
        int same = same_operation(r, &who->record) && r->flags == flags, ordered = 0;
        if (same) {
            merged = (int)k;
            complete = !(bytes & ~r->bytes);
            out.pending |= write ? 0 : PENDING_READ;
        } else if (r->bytes & bytes) {
            int strong = morally_strong(r, &who->record, flags) || same_copy(r, &who->record);
            if (unknown_lane(who, r) && !strong) /* which lane it was decides: check_lanes */
                out.pending |= r->flags & TOUCH_WRITE ? PENDING_WRITE : PENDING_READ;
            else {
                ordered = race_ordered(who, r, flags);
                if (!ordered && !strong && ((r->flags | flags) & TOUCH_WRITE))
                    conflict(touch, r);
            }
        }
        /* Whoever knows of this access knows of an earlier one by the same lanes, and of one that it is ordered behind; but what reads
         * may not stand for a write, nor an access of one proxy for one of the other. */
        int followed = r->actor == who->record.actor && r->cluster == who->record.cluster && !(r->lanes & ~who->record.lanes);
        int stands = write || !(r->flags & TOUCH_WRITE);
        int superseded = stands && !(r->bytes & ~bytes) &&
                         (followed || (ordered && (write || !((r->flags | flags) & TOUCH_ASYNC))));
        if (!superseded && !same && kept < MOST_RECORDS)
            keep[kept++] = (uint8_t)k;
    }
    if (complete)
        return out;
    if (kept == MOST_RECORDS) { /* lose the oldest read */
        uint32_t lost = 0;
        while (lost + 1 < kept && (old->records[keep[lost]].flags & TOUCH_WRITE))
            lost++;
        memmove(keep + lost, keep + lost + 1, kept - lost - 1);
        kept--;
    }
    Record added = who->record;
    added.flags = (uint8_t)flags;
    added.bytes = (uint8_t)(bytes | (merged >= 0 ? old->records[merged].bytes : 0));
    out.to = new_state(races, kept + 1);
    State *state = races->states[out.to];
    old = races->states[from];
    for (uint32_t k = 0; k < kept; k++)
        state->records[k] = old->records[keep[k]];
    state->records[kept] = added;
    return out;
}

/* The pending access of another lane that a byte's lane does not match. */
static void check_lanes(const Touch *touch, const Transition *t, int lane, uint32_t first, uint32_t end, uint8_t *writers, uint8_t *readers)
{
    for (uint32_t b = first; b < end; b++) {
        uint32_t wrong = 0;
        if ((t->pending & PENDING_WRITE) && writers[b] != lane)
            wrong = TOUCH_WRITE;
        else if ((t->pending & PENDING_READ) && (touch->flags & TOUCH_WRITE) && readers[b] != lane)
            wrong = 2;
        if (wrong) {
            const Accessor *who = &touch->m->races->who;
            const State *old = touch->m->races->states[t->from];
            for (uint32_t k = 0; k < old->count; k++) {
                const Record *r = &old->records[k];
                if (unknown_lane(who, r) && !same_operation(r, &who->record) && (r->flags & TOUCH_WRITE) == (wrong & TOUCH_WRITE))
                    conflict(touch, r);
            }
        }
        if (touch->flags & TOUCH_WRITE)
            writers[b] = (uint8_t)lane;
        else
            readers[b] = (t->pending & PENDING_READ) && readers[b] != lane ? 0xff : (uint8_t)lane;
    }
}

/* Cells from byte `offset`, `size` bytes; the planes of lanes may be absent. */
static void touch_cells(Touch *touch, uint32_t *cells, uint8_t *writers, uint8_t *readers, uint32_t offset, uint32_t size, int lane)
{
    Races *races = touch->m->races;
    uint32_t end = offset + size;
    uint64_t base = touch->address - offset;
    for (uint32_t cell = offset >> 2; cell << 2 < end; cell++) {
        uint32_t first = cell << 2 < offset ? offset : cell << 2, last = (cell << 2) + 4 > end ? end : (cell << 2) + 4;
        uint8_t bytes = (uint8_t)(((1u << (last - first)) - 1) << (first & 3));
        uint32_t from = cells[cell];
        Transition *memo = &races->memo[from % MEMO];
        if (memo->serial != races->serial || memo->from != from || memo->bytes != bytes || memo->flags != (uint8_t)touch->flags) {
            touch->address = base + first;
            *memo = transition(touch, from, bytes);
        }
        if (memo->pending && writers && lane >= 0) {
            touch->address = base + first;
            check_lanes(touch, memo, lane, first, last, writers, readers);
        }
        if (memo->to != from) {
            races->states[memo->to]->refs++;
            cells[cell] = memo->to;
            drop_state(races, from, 1);
        }
        if (writers && lane != -1 && !memo->pending)
            memset((touch->flags & TOUCH_WRITE ? writers : readers) + first, lane < 0 ? 0xfe : lane, last - first);
    }
}

void race_touch_shared(Machine *m, Cta *cta, uint32_t offset, uint32_t size, int lane, uint32_t flags)
{
    RaceCta *rc = cta->race;
    Touch touch = {.m = m, .flags = flags, .where = "shared address", .address = offset, .cta = cta};
    if (offset >> 2 < rc->touched_from)
        rc->touched_from = offset >> 2;
    if ((offset + size + 3) >> 2 > rc->touched_to)
        rc->touched_to = (offset + size + 3) >> 2;
    touch_cells(&touch, rc->cells, rc->writers, rc->readers, offset, size, lane);
}

static Page *find_page(Races *races, uint64_t number)
{
    if (races->last_page && races->last_page->number == number)
        return races->last_page;
    if (races->page_count * 2 >= races->page_capacity) {
        uint64_t capacity = races->page_capacity ? races->page_capacity * 2 : 256;
        Page **bigger = calloc(capacity, sizeof *bigger);
        for (uint64_t k = 0; k < races->page_capacity; k++)
            if (races->pages[k]) {
                uint64_t at = races->pages[k]->number * 0x9e3779b97f4a7c15ull >> 20 & (capacity - 1);
                while (bigger[at])
                    at = (at + 1) & (capacity - 1);
                bigger[at] = races->pages[k];
            }
        free(races->pages);
        races->pages = bigger;
        races->page_capacity = capacity;
    }
    uint64_t at = number * 0x9e3779b97f4a7c15ull >> 20 & (races->page_capacity - 1);
    while (races->pages[at] && races->pages[at]->number != number)
        at = (at + 1) & (races->page_capacity - 1);
    if (!races->pages[at]) {
        races->pages[at] = calloc(1, sizeof(Page));
        races->pages[at]->number = number;
        races->page_count++;
    }
    return races->last_page = races->pages[at];
}

void race_touch_global(Machine *m, uint64_t address, uint64_t size, int lane, uint32_t flags)
{
    while (size) {
        uint32_t offset = address & 4095, part = size < 4096 - offset ? (uint32_t)size : 4096 - offset;
        Page *page = find_page(m->races, address >> 12);
        Touch touch = {.m = m, .flags = flags, .where = "global address", .address = address};
        touch_cells(&touch, page->cells, page->writers, page->readers, offset, part, lane);
        address += part;
        size -= part;
    }
}

/* May anybody write where the warp accessed global memory just now? The bounds check has found that out, where it is on. */
int race_may_write(const Warp *w)
{
    const Machine *m = w->machine;
    return !(m->checks & CHECK_BOUNDS) || m->allocations[w->last_allocation].writable;
}

/* An access of a lane to an address of any kind; its own memory, and memory that nobody may write, cannot be raced for. */
void race_touch(Warp *w, uint64_t address, uint32_t size, int lane, uint32_t flags)
{
    Machine *m = w->machine;
    uint64_t window = address >> 60;
    if (window == SHARED_WINDOW >> 60)
        race_touch_shared(m, &w->cta->cluster->ctas[(uint32_t)address >> 24], (uint32_t)address & SHARED_OFFSET_MASK, size, lane, flags);
    else if (!window && race_may_write(w))
        race_touch_global(m, address, size, lane, flags);
}

/* Tensor memory, whose cells are sixteen lanes of a column: callers come once for each sixteen lanes. */
void race_touch_tensor(Machine *m, Cta *cta, uint32_t lane, uint32_t column, uint32_t count, uint32_t flags)
{
    Touch touch = {.m = m, .flags = flags | TOUCH_TENSOR, .where = "tensor memory", .address = lane << 16 | column, .cta = cta};
    uint32_t *cells = cta->race->tensor_cells + lane / 16 * TMEM_COLUMNS;
    Races *races = m->races;
    for (uint32_t c = column; c < column + count; c++) {
        uint32_t from = cells[c];
        Transition *memo = &races->memo[from % MEMO];
        touch.address = lane << 16 | c;
        if (memo->serial != races->serial || memo->from != from || memo->flags != (uint8_t)touch.flags)
            *memo = transition(&touch, from, 15);
        if (memo->to != from) {
            races->states[memo->to]->refs++;
            cells[c] = memo->to;
            drop_state(races, from, 1);
        }
    }
}
