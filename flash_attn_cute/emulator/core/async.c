/* Operations that run beside the warps: bulk and tensor copies, cp.async, wgmma, tcgen05 and their commits.
 *
 * The in-order schedule runs each where it is issued. The others queue them: random runs them after a while, delayed
 * holds them back until nothing else can go on, with an early one now and then. Operations of one stream keep their order,
 * as those of one tensor core or one thread's cp.async do. */
#include "machine.h"

#include <stdlib.h>
#include <string.h>

static void run(Machine *m, AsyncOp *op)
{
    if (m->races)
        race_run(m, op);
    op->run(m, op);
    if (m->races)
        race_ran(op);
    m->progress++;
}

void async_issue(Machine *m, const AsyncOp *op)
{
    int at_once = m->schedule == SCHEDULE_IN_ORDER || (m->schedule == SCHEDULE_RANDOM && !op->stream && machine_random(m, 2));
    AsyncOp now = *op;
    if (m->races)
        race_issue(&now, !at_once);
    if (at_once) {
        run(m, &now);
        return;
    }
    AsyncOp *later = malloc(sizeof *later);
    *later = now;
    later->next = NULL;
    later->group = -1;
    *m->pending_tail = later;
    m->pending_tail = &later->next;
    m->pending_count++;
    m->totals.deferred_operations++;
}

static void run_at(Machine *m, AsyncOp **link)
{
    AsyncOp *op = *link;
    *link = op->next;
    if (m->pending_tail == &op->next)
        m->pending_tail = link;
    m->pending_count--;
    AsyncOp now = *op;
    free(op); /* before it runs: an error leaves by longjmp */
    run(m, &now);
}

/* Runs one queued operation that has no earlier one in its stream; 0 where none is queued. */
int async_run_one(Machine *m)
{
    if (!m->pending)
        return 0;
    const void *blocked[64];
    AsyncOp **candidates[64];
    int streams = 0, count = 0;
    for (AsyncOp **link = &m->pending; *link && count < 64 && streams < 64; link = &(*link)->next) {
        int earlier = 0;
        for (int k = 0; k < streams; k++)
            earlier |= blocked[k] == (*link)->stream;
        if (earlier && (*link)->stream)
            continue;
        if ((*link)->stream)
            blocked[streams++] = (*link)->stream;
        candidates[count++] = link;
    }
    run_at(m, candidates[machine_random(m, (uint32_t)count)]);
    return 1;
}

/* Everything a cluster has started, in order: what its end implies. NULL: every cluster. */
void async_drain(Machine *m, const Cluster *cluster)
{
    for (AsyncOp **link = &m->pending; *link;) {
        if (!cluster || (*link)->cluster == cluster)
            run_at(m, link);
        else
            link = &(*link)->next;
    }
}

void async_commit_group(Warp *w, AsyncKind kind, uint32_t lanes)
{
    for (AsyncOp *op = w->machine->pending; op; op = op->next)
        if (op->warp == w && op->kind == kind && op->group < 0 && (lanes >> op->lane & 1))
            op->group = w->commits[kind][op->lane];
    for (uint32_t left = lanes; left; left &= left - 1)
        w->commits[kind][__builtin_ctz(left)]++;
    if (w->machine->races)
        race_commit_group(w, kind, lanes);
}

/* How many groups are not complete, counted from the oldest that is not: the most of any lane. */
int async_pending_groups(Warp *w, AsyncKind kind, uint32_t lanes)
{
    int most = 0;
    for (const AsyncOp *op = w->machine->pending; op; op = op->next)
        if (op->warp == w && op->kind == kind && op->group >= 0 && (lanes >> op->lane & 1)) {
            int open = w->commits[kind][op->lane] - op->group;
            most = open > most ? open : most;
        }
    return most;
}

/* Waits and commits. sub: kind | it only waits until sources are read << 8. imm: groups that may stay pending. */
void op_async_commit(Warp *w, const Instr *in, uint32_t mask)
{
    if (in->sub == ASYNC_WGMMA && !require_lanes(w, FULL_MASK))
        return;
    async_commit_group(w, (AsyncKind)in->sub, in->sub == ASYNC_WGMMA ? 1 : mask);
}

void op_async_wait(Warp *w, const Instr *in, uint32_t mask)
{
    static const WaitKind waits[] = {[ASYNC_TMA_STORE] = WAIT_BULK, [ASYNC_WGMMA] = WAIT_WGMMA, [ASYNC_CP] = WAIT_CP_ASYNC};
    AsyncKind kind = (AsyncKind)(in->sub & 255);
    if (kind == ASYNC_WGMMA && !require_lanes(w, FULL_MASK))
        return;
    if (w->machine->pending && async_pending_groups(w, kind, kind == ASYNC_WGMMA ? 1 : w->mask) > in->imm)
        warp_block(w, waits[kind], (uint32_t)in->imm, 0);
    if (w->machine->races) /* the lanes do nothing else before the wait is over */
        race_wait_group(w, kind, mask, (int)in->imm, (int)(in->sub >> 8));
}
