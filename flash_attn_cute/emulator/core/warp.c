/* A warp: which of its lanes run, where, and what they wait for.
 *
 * Lanes that took different ways are fragments, each a mask and a program counter. The lowest counter that can go on
 * runs; fragments that meet at one counter merge. An instruction that needs lanes which are elsewhere parks its
 * fragment until they arrive. A fragment that gave its turn away (a failed try_wait) lets the others run first, as
 * the hardware's progress guarantee demands. */
#include "machine.h"

#include <string.h>

/* Puts the running fragment back into the list. */
void warp_save(Warp *w)
{
    Fragment *f = &w->fragments[w->current];
    f->pc = w->pc;
    f->mask = w->mask;
}

static void remove_fragment(Warp *w, int index)
{
    w->fragments[index] = w->fragments[--w->fragment_count];
}

/* Joins fragments that stand at the same place, if none of them waits for anything but company. */
static void merge(Warp *w)
{
    for (int i = 0; i < w->fragment_count; i++) {
        Fragment *f = &w->fragments[i];
        for (int j = w->fragment_count - 1; j > i; j--) {
            Fragment *g = &w->fragments[j];
            if (g->pc == f->pc && (g->wait == WAIT_NONE || g->wait == WAIT_CONVERGE) &&
                (f->wait == WAIT_NONE || f->wait == WAIT_CONVERGE)) {
                f->mask |= g->mask;
                f->wait = WAIT_NONE;
                f->yielded &= g->yielded;
                remove_fragment(w, j);
            }
        }
    }
}

/* Chooses what runs next; 0 where every fragment waits. */
int warp_pick(Warp *w)
{
    if (w->fragment_count > 1)
        merge(w);
    for (int attempt = 0; attempt < 2; attempt++) {
        int best = -1;
        for (int i = 0; i < w->fragment_count; i++) {
            Fragment *f = &w->fragments[i];
            if (f->wait != WAIT_NONE) {
                if (!fragment_ready(w, f))
                    continue;
                f->wait = WAIT_NONE;
            }
            if (!f->yielded && (best < 0 || f->pc < w->fragments[best].pc))
                best = i;
        }
        if (best >= 0) {
            w->current = best;
            w->pc = w->fragments[best].pc;
            w->mask = w->fragments[best].mask;
            return 1;
        }
        for (int i = 0; i < w->fragment_count; i++)
            w->fragments[i].yielded = 0;
    }
    return 0;
}

/* The counter at which the running fragment has to look around again: where another one stands. */
static int32_t lookout(Warp *w)
{
    int32_t limit = INT32_MAX;
    for (int i = 0; i < w->fragment_count; i++) {
        const Fragment *f = &w->fragments[i];
        int meets = f->wait == WAIT_NONE ? !f->yielded : f->wait == WAIT_CONVERGE && f->pc > w->pc;
        if (i != w->current && meets && f->pc < limit)
            limit = f->pc;
    }
    return limit;
}

void warp_block(Warp *w, WaitKind kind, uint32_t value, uint32_t phase)
{
    Fragment *f = &w->fragments[w->current];
    f->wait = kind;
    f->value = value;
    f->phase = phase;
    w->event = EVENT_SWITCH;
}

/* The instruction has not run, and will be tried again. */
void warp_retry(Warp *w)
{
    w->next = w->pc;
    w->executed[w->pc]--;
}

/* True where the lanes in `needed` that still live are all here; parks the fragment before the instruction otherwise. */
int gather_lanes(Warp *w, uint32_t needed)
{
    if (((needed & w->live) & ~w->mask) == 0)
        return 1;
    warp_retry(w);
    warp_block(w, WAIT_CONVERGE, needed, 0);
    return 0;
}

/* The same for an instruction at which they synchronise. */
int require_lanes(Warp *w, uint32_t needed)
{
    if (!gather_lanes(w, needed))
        return 0;
    if (w->machine->races)
        race_warp_sync(w, needed & w->live);
    return 1;
}

static inline __attribute__((always_inline)) int run(Warp *w, int budget, int races)
{
    Machine *m = w->machine;
    const Instr *code = m->program.code;
    if (!warp_pick(w))
        return 0;
    int32_t limit = lookout(w);
    while (budget-- > 0) {
        const Instr *in = &code[w->pc];
        uint32_t mask = w->mask;
        if (in->guarded) {
            uint32_t holds = mask_of(lanes32(w, in->guard));
            mask &= in->guarded == 1 ? holds : ~holds;
        }
        w->next = w->pc + 1;
        if (mask) {
            w->executed[w->pc]++;
            if (races)
                race_registers(w, in);
            handlers[in->op](w, in, mask);
        } else
            w->skipped[w->pc]++;
        w->pc = w->next;
        if (w->event) {
            Event event = (Event)w->event;
            w->event = EVENT_NONE;
            if (event != EVENT_EXIT)
                warp_save(w);
            if (event == EVENT_YIELD) {
                w->fragments[w->current].yielded = 1;
                if (w->fragment_count == 1) {
                    w->fragments[0].yielded = 0;
                    return 0;
                }
            }
            if (w->fragment_count == 0 || !warp_pick(w))
                return 0;
            if (event == EVENT_YIELD && w->fragments[w->current].pc == w->pc && budget > 8)
                budget = 8; /* all of them spin: let the other warps go on soon */
            limit = lookout(w);
        } else if (w->pc >= limit) {
            warp_save(w);
            if (!warp_pick(w))
                return 0;
            limit = lookout(w);
        }
    }
    warp_save(w);
    for (int i = 0; i < w->fragment_count; i++)
        w->fragments[i].yielded = 0;
    return 1;
}

/* Runs up to `budget` instructions; true where the warp could have gone on. The loop is compiled twice, so that looking for races
 * costs nothing where nobody does. */
int warp_run(Warp *w, int budget) { return w->machine->races ? run(w, budget, 1) : run(w, budget, 0); }

/* Branch: the guard has already chosen the lanes that jump. */
void op_bra(Warp *w, const Instr *in, uint32_t mask)
{
    if (mask == w->mask) {
        w->next = in->target;
        return;
    }
    if (w->fragment_count == MAX_FRAGMENTS)
        fault(w, in, FAULT_INTERNAL, "more than %d ways at once", MAX_FRAGMENTS);
    Fragment *other = &w->fragments[w->fragment_count++];
    memset(other, 0, sizeof *other);
    other->mask = mask;
    other->pc = in->target;
    w->mask &= ~mask;
    w->event = EVENT_SWITCH;
}

/* brx.idx: r[0] holds the index, pool the targets, sub their number. */
void op_brx(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t index = R32(0)[__builtin_ctz(mask)], same = 0;
    for (uint32_t left = mask; left; left &= left - 1)
        if (R32(0)[__builtin_ctz(left)] == index)
            same |= left & -left;
    if (index >= in->sub)
        fault(w, in, FAULT_TRAP, "branch index %u of %u", index, in->sub);
    if (same == w->mask) {
        w->next = POOL(index);
        return;
    }
    Fragment *other = &w->fragments[w->fragment_count++];
    memset(other, 0, sizeof *other);
    other->mask = same;
    other->pc = POOL(index);
    w->mask &= ~same;
    if (mask & ~same)
        w->next = w->pc; /* the rest takes its own turn at this instruction */
    w->event = EVENT_SWITCH;
}

/* call: r[0] keeps, for each lane, where it goes on. */
void op_call(Warp *w, const Instr *in, uint32_t mask)
{
    FOR_LANES(R32(0)[i] = (uint32_t)w->pc + 1);
    op_bra(w, in, mask);
}

/* Lanes that came from one place return to it together; the others take their own turn at this instruction. */
void op_return(Warp *w, const Instr *in, uint32_t mask)
{
    Instr jump = *in;
    uint32_t same = 0, target = R32(0)[__builtin_ctz(mask)];
    for (uint32_t left = mask; left; left &= left - 1)
        if (R32(0)[__builtin_ctz(left)] == target)
            same |= left & -left;
    jump.target = (int32_t)target;
    op_bra(w, &jump, same);
    if (mask & ~same)
        w->next = w->pc;
}

void op_exit(Warp *w, const Instr *in, uint32_t mask)
{
    UNUSED(in);
    w->live &= ~mask;
    w->mask &= ~mask;
    w->machine->progress++;
    if (w->mask == 0)
        remove_fragment(w, w->current);
    else
        warp_save(w), w->fragments[w->current].pc = w->next;
    w->event = EVENT_EXIT;
    barrier_lanes_exited(w, mask);
    if (w->live == 0) {
        w->cta->live_warps--;
        w->cta->cluster->running--;
    }
}

void op_trap(Warp *w, const Instr *in, uint32_t mask)
{
    UNUSED(mask);
    fault(w, in, FAULT_TRAP, "the kernel trapped");
}

/* An instruction this emulator does not know is an error only where it is reached. */
void op_unknown(Warp *w, const Instr *in, uint32_t mask)
{
    UNUSED(mask);
    fault(w, in, FAULT_UNKNOWN_INSTRUCTION, "instruction not known to the emulator: %s", w->machine->program.names[in->pool]);
}

void op_nop(Warp *w, const Instr *in, uint32_t mask)
{
    UNUSED(w), UNUSED(in), UNUSED(mask);
}

/* Fences, and what else has no effect but for the race check. sub: as race_fence takes it */
void op_fence(Warp *w, const Instr *in, uint32_t mask)
{
    if (w->machine->races)
        race_fence(w, in, mask);
}

void op_nanosleep(Warp *w, const Instr *in, uint32_t mask)
{
    UNUSED(in), UNUSED(mask);
    w->event = EVENT_YIELD;
}

/* bar.warp.sync: lanes may stand at different instructions, so what counts is that all members wait at one. */
void op_bar_warp_sync(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t members = R32(0)[__builtin_ctz(mask)] & w->live;
    if ((members & ~w->mask) == 0) {
        if (w->machine->races)
            race_warp_sync(w, members);
        return;
    }
    warp_block(w, WAIT_WARP, members, 0);
    uint32_t here = 0;
    w->fragments[w->current].mask = w->mask;
    for (int i = 0; i < w->fragment_count; i++)
        if (w->fragments[i].wait == WAIT_WARP)
            here |= w->fragments[i].mask;
    if (members & ~here)
        return;
    for (int i = 0; i < w->fragment_count; i++)
        if (w->fragments[i].wait == WAIT_WARP && (w->fragments[i].mask & members))
            w->fragments[i].wait = WAIT_NONE;
    if (w->machine->races)
        race_warp_sync(w, members);
}
