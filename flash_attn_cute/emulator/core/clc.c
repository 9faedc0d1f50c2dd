/* Cluster launch control: a running cluster takes the place of one that has not been launched. */
#include "machine.h"

#include <string.h>

#define ADDRESS_WIDE 0x80000000u

/* The answer's sixteen bytes, ours to define: the first CTA's coordinates, and whether there was one. args: address, barrier, all */
static void run_cancel(Machine *m, AsyncOp *op)
{
    uint32_t answer[4] = {0, 0, 0, 0}, address = (uint32_t)op->args[0], barrier = (uint32_t)op->args[1];
    if (m->next_cluster < m->cluster_count) {
        uint64_t index = (uint64_t)m->next_cluster++;
        uint32_t nx = m->grid[0] / m->cluster_shape[0], ny = m->grid[1] / m->cluster_shape[1];
        answer[0] = (uint32_t)(index % nx) * m->cluster_shape[0];
        answer[1] = (uint32_t)(index / nx % ny) * m->cluster_shape[1];
        answer[2] = (uint32_t)(index / nx / ny) * m->cluster_shape[2];
        answer[3] = 1;
    }
    for (uint32_t rank = 0; rank < (uint32_t)op->cluster->size; rank++) {
        if (!op->args[2] && rank != address >> 24)
            continue;
        Cta *cta = &op->cluster->ctas[rank];
        uint32_t offset = address & SHARED_OFFSET_MASK;
        if (offset < SHARED_FIRST || offset + 16 > cta->shared_bytes || (offset & 15))
            machine_fault(m, FAULT_OUT_OF_BOUNDS, op->in->line, "the answer's shared address 0x%x", address);
        if (m->races) {
            race_on_barrier(m, cta, barrier & SHARED_OFFSET_MASK);
            race_touch_shared(m, cta, offset, 16, LANE_NONE, TOUCH_WRITE | TOUCH_ASYNC | TOUCH_READS_FENCED);
        }
        memcpy(cta->shared + offset, answer, 16);
        shared_mark(cta, offset, 16);
        mbarrier_complete_tx(m, op->in->line, cta, barrier & SHARED_OFFSET_MASK, 16);
    }
}

/* r: answer's address, barrier. sub bit 0: to every CTA of the cluster; bit 13: the barrier's address is 64-bit */
void op_clc_try_cancel(Warp *w, const Instr *in, uint32_t mask)
{
    for (uint32_t left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        AsyncOp op = {.kind = ASYNC_TMA_LOAD, .cluster = w->cta->cluster, .warp = w, .in = in, .lane = (uint32_t)i, .run = run_cancel};
        op.args[0] = (uint32_t)((in->sub & ADDRESS_WIDE ? R64(0)[i] : R32(0)[i]) + (uint64_t)in->imm);
        op.args[1] = (uint32_t)((in->sub >> 13 & 1 ? R64(1)[i] : R32(1)[i]) + (uint64_t)(int64_t)in->target);
        op.args[2] = in->sub & 1;
        async_issue(w->machine, &op);
    }
}

/* r: d, answer (128 bits). sub: 0 to 2 a coordinate, 3 whether there was one */
void op_clc_query(Warp *w, const Instr *in, uint32_t mask)
{
    uint64_t *low = lanes64(w, in->r[1]), *high = lanes64(w, in->r[1] + 2);
    FOR_LANES(uint32_t words[4] = {(uint32_t)low[i], (uint32_t)(low[i] >> 32), (uint32_t)high[i], (uint32_t)(high[i] >> 32)};
              R32(0)[i] = in->sub == 3 ? 0u - (words[3] & 1) : words[in->sub]);
}
