/* cp.async: a thread's own asynchronous copy from global to shared memory, 4 to 16 bytes. */
#include "machine.h"

#include <string.h>

#define ADDRESS_WIDE 0x80000000u

/* args: shared address, global address, bytes, bytes to read */
static void run_copy(Machine *m, AsyncOp *op)
{
    uint32_t size = (uint32_t)op->args[2], read = (uint32_t)op->args[3];
    uint8_t *to = shared_write(op->warp, op->in, (uint32_t)op->args[0], size);
    memset(to, 0, size);
    if (read)
        memcpy(to, global_span(op->warp, op->in, op->args[1], read, 0), read);
    if (m->races) { /* cp.async belongs to the generic proxy */
        race_touch(op->warp, SHARED_WINDOW | (uint32_t)op->args[0], size, (int)op->lane, TOUCH_WRITE);
        if (read)
            race_touch(op->warp, op->args[1], read, LANE_NONE, 0);
    }
}

/* r: shared address, global address, source size (-1: all). sub: bytes | the source is ignored where r[3] holds */
void op_cp_async(Warp *w, const Instr *in, uint32_t mask)
{
    uint32_t size = in->sub & 255;
    EACH_LANE(uint64_t to = (in->sub & ADDRESS_WIDE ? R64(0)[i] : R32(0)[i]) + (uint64_t)in->imm;
              uint64_t from = R64(1)[i] + (uint64_t)(int64_t)in->target;
              uint32_t read = in->r[2] >= 0 ? R32(2)[i] : size;
              if (in->r[3] >= 0 && R32(3)[i]) read = 0;
              w->machine->totals.global_load_bytes += read;
              if (read > size) fault(w, in, FAULT_OUT_OF_BOUNDS, "cp.async reads %u bytes of %u", read, size);
              if ((to | (read ? from : 0)) & (size - 1))
                  fault(w, in, FAULT_MISALIGNED, "cp.async of %u bytes from 0x%llx to 0x%llx", size, (unsigned long long)from,
                        (unsigned long long)to);
              AsyncOp op = {.kind = ASYNC_CP, .stream = w->commits[ASYNC_CP], .cluster = w->cta->cluster, .warp = w, .in = in,
                            .lane = (uint32_t)i, .run = run_copy};
              op.args[0] = to; op.args[1] = from; op.args[2] = size; op.args[3] = read;
              async_issue(w->machine, &op));
}

static void run_arrive(Machine *m, AsyncOp *op)
{
    uint32_t address = (uint32_t)op->args[0];
    Cta *cta = shared_owner(op->warp, op->in, address);
    if (m->races)
        race_bring(m, op, cta, address & SHARED_OFFSET_MASK);
    mbarrier_arrive(m, op->in->line, cta, address & SHARED_OFFSET_MASK, 1);
}

/* cp.async.mbarrier.arrive.noinc: an arrival once the thread's copies so far are complete. Without noinc the pending count
 * is raised first, so that the arrival changes nothing in the end (sub bit 0: noinc). */
void op_cp_async_arrive(Warp *w, const Instr *in, uint32_t mask)
{
    EACH_LANE(uint64_t address = (in->sub & ADDRESS_WIDE ? R64(0)[i] : R32(0)[i]) + (uint64_t)in->imm;
              AsyncOp op = {.kind = ASYNC_CP, .stream = w->commits[ASYNC_CP], .cluster = w->cta->cluster, .warp = w, .in = in,
                            .lane = (uint32_t)i, .run = run_arrive};
              op.args[0] = address;
              if (in->sub & 1) async_issue(w->machine, &op));
}
