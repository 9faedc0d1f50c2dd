/* How errors are told: every message names the instruction's line, and who executed it. */
#include "machine.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

void fault(Warp *w, const Instr *in, FaultKind kind, const char *format, ...)
{
    Machine *m = w->machine;
    va_list arguments;
    va_start(arguments, format);
    int used = vsnprintf(m->message, sizeof m->message, format, arguments);
    va_end(arguments);
    if (used >= 0 && (size_t)used < sizeof m->message)
        snprintf(m->message + used, sizeof m->message - (size_t)used, " [CTA (%u,%u,%u), warp %d, lanes 0x%08x]", w->cta->id[0],
                 w->cta->id[1], w->cta->id[2], w->index, w->mask);
    m->fault = kind;
    m->fault_line = in->line;
    longjmp(m->escape, 1);
}

void machine_fault(Machine *m, FaultKind kind, int32_t line, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(m->message, sizeof m->message, format, arguments);
    va_end(arguments);
    m->fault = kind;
    m->fault_line = line;
    longjmp(m->escape, 1);
}

static const char *wait_name(WaitKind kind)
{
    switch (kind) {
    case WAIT_CONVERGE: return "for lanes that are elsewhere";
    case WAIT_BARRIER: return "at a named barrier";
    case WAIT_CLUSTER: return "at the cluster barrier";
    case WAIT_WGMMA: return "for wgmma groups";
    case WAIT_TCGEN05: return "for tcgen05 operations";
    case WAIT_CP_ASYNC: return "for cp.async groups";
    case WAIT_BULK: return "for bulk groups";
    case WAIT_WARP: return "at a warp barrier";
    default: return "";
    }
}

void report_deadlock(Machine *m, const char *why)
{
    size_t used = (size_t)snprintf(m->message, sizeof m->message, "%s", why);
    for (int slot = 0; slot < m->resident; slot++)
        for (int rank = 0; m->clusters[slot].running && rank < m->clusters[slot].size; rank++) {
            Cta *cta = &m->clusters[slot].ctas[rank];
            for (int index = 0; index < cta->warp_count; index++) {
                Warp *w = &cta->warps[index];
                for (int k = 0; k < w->fragment_count && w->live; k++) {
                    const Fragment *f = &w->fragments[k];
                    if (used + 400 > sizeof m->message)
                        goto full;
                    char detail[200] = "";
                    if (f->wait == WAIT_BARRIER) {
                        const NamedBarrier *b = &cta->barriers[f->value];
                        snprintf(detail, sizeof detail, " %u: %d of %d threads, phase %u", f->value, b->arrived, b->expected, b->phase);
                    } else if (f->wait == WAIT_NONE)
                        mbarrier_describe(w, detail, sizeof detail);
                    used += (size_t)snprintf(m->message + used, sizeof m->message - used,
                                             "\n  CTA (%u,%u,%u) warp %d lanes 0x%08x: PTX line %d %s%s", cta->id[0], cta->id[1],
                                             cta->id[2], index, f->mask, m->program.code[f->pc].line, wait_name(f->wait), detail);
                }
            }
        }
full:
    m->fault = FAULT_DEADLOCK;
    m->fault_line = 0;
    longjmp(m->escape, 1);
}

/* At a cluster's end: tensor memory still allocated, bytes that came and that no phase expected, loads still on their way.
 * Bytes expected for which no copy was started are no leak: pipelines end that way, acquiring their stages once more. */
void check_leaks(Cluster *cluster)
{
    Machine *m = cluster->ctas[0].machine;
    for (const AsyncOp *op = m->pending; op; op = op->next)
        if (op->cluster == cluster && op->kind == ASYNC_TMA_LOAD)
            machine_fault(m, FAULT_LEAK, op->in->line, "CTA (%u,%u,%u) ended while this copy into shared memory was on its way",
                          op->warp->cta->id[0], op->warp->cta->id[1], op->warp->cta->id[2]);
    for (int rank = 0; rank < cluster->size; rank++) {
        Cta *cta = &cluster->ctas[rank];
        for (uint32_t offset = SHARED_FIRST; offset + 8 <= cta->shared_bytes; offset += 8)
            if (cta->shadow[offset] == 2 && mbarrier_outstanding(cta, offset) < 0)
                machine_fault(cta->machine, FAULT_LEAK, 0,
                              "CTA (%u,%u,%u) ended while its mbarrier at shared address 0x%x got %d bytes that nothing expected", cta->id[0],
                              cta->id[1], cta->id[2], offset, -mbarrier_outstanding(cta, offset));
        for (int column = 0; cta->tmem && column < TMEM_COLUMNS; column++)
            if (cta->tmem_owner[column])
                machine_fault(cta->machine, FAULT_LEAK, 0, "CTA (%u,%u,%u) ended with tensor memory column %d still allocated",
                              cta->id[0], cta->id[1], cta->id[2], column);
    }
}
