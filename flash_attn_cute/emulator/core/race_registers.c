/* Registers that tensor instructions use after they were issued.
 *
 * wgmma: a register that an ordinary instruction used may be an accumulator or a fragment of A only behind a wgmma.fence, except for
 * accumulators from one product to the next of the same shape, and nobody may use it before wgmma.wait_group (PTX ISA,
 * "wgmma.fence" and "wgmma.mma_async"). tcgen05.ld: its registers hold nothing before tcgen05.wait::ld (PTX ISA, "tcgen05.wait").
 * Compilers leave that wait out, and the hardware does without: only the check of that name asks for it; otherwise using a register
 * is as good as waiting. race_tables.py says which of these registers each instruction names. */
#include "races.h"

static uint32_t completed(const Clock *clock, uint32_t actor) { return actor < clock->length ? clock->at[actor].all : 0; }

static _Noreturn void report(Warp *w, const Instr *in, int32_t line, uint32_t unit, const char *where, const char *why)
{
    Record now = {.cluster = w->cta->cluster->race->number, .line = in->line, .unit = UNIT_WARP, .rank = (uint8_t)w->cta->rank,
                  .warp = (uint8_t)w->index};
    Record then = now;
    then.line = line;
    then.unit = (uint8_t)unit;
    race_report(w->machine, &now, &then, where, why);
}

/* An ordinary instruction. */
void race_registers(Warp *w, const Instr *in)
{
    const RaceTables *t = &w->machine->races->tables;
    RaceWarp *rw = w->race;
    int32_t row = (int32_t)(in - w->machine->program.code), first = t->ordinary[row], end = t->ordinary[row + 1];
    if (in->op == t->copy_operation && end - first == 2) { /* PTX is no machine code: a copy there gives a register another name */
        rw->registers[t->list[first]] = rw->registers[t->list[first + 1]];
        return;
    }
    for (int32_t k = first; k < end; k++) {
        RegisterUse *r = &rw->registers[t->list[k]];
        if (r->product > completed(&rw->all.generic, rw->units[UNIT_WGMMA]))
            report(w, in, r->product_line, UNIT_WGMMA, "a register of a wgmma", "; no wgmma.wait_group stands between");
        if (r->loading > completed(&rw->all.tensor, rw->units[UNIT_TENSOR_LOAD])) {
            if (w->machine->checks & CHECK_TCGEN05)
                report(w, in, r->loading_line, UNIT_TENSOR_LOAD, "a register of a tcgen05.ld", "; no tcgen05.wait::ld stands between");
            race_wait_tensor(w, UNIT_TENSOR_LOAD, r->loading);
        }
        r->touched = rw->fences + 1;
        r->touched_line = in->line;
    }
}

/* wgmma, before it is issued; `sums` of its registers accumulate. */
void race_product_registers(Warp *w, const Instr *in, int sums)
{
    const RaceTables *t = &w->machine->races->tables;
    RaceWarp *rw = w->race;
    int32_t row = (int32_t)(in - w->machine->program.code), first = t->asynchronous[row];
    uint32_t number = rw->issued[UNIT_WGMMA] + 1, done = completed(&rw->all.generic, rw->units[UNIT_WGMMA]);
    if (!rw->fences)
        report(w, in, in->line, UNIT_WGMMA, "registers of the warp's first wgmma", "; no wgmma.fence stands before it");
    for (int32_t k = first; k < t->asynchronous[row + 1]; k++) {
        RegisterUse *r = &rw->registers[t->list[k]];
        int32_t accumulates = k - first < sums;
        if (r->touched == rw->fences + 1)
            report(w, in, r->touched_line, UNIT_WARP, "a register of a wgmma", "; no wgmma.fence stands between");
        if (r->product > done && (accumulates != r->accumulates || (accumulates && r->shape != (in->sub & 0xff00))))
            report(w, in, r->product_line, UNIT_WGMMA, "a register of two wgmma", "; only sums of one shape follow each other without a wait");
        r->product = number;
        r->product_line = in->line;
        r->accumulates = accumulates;
        r->shape = in->sub & 0xff00;
    }
}

/* tcgen05.ld, when it is issued. */
void race_loaded_registers(Warp *w, const Instr *in)
{
    const RaceTables *t = &w->machine->races->tables;
    RaceWarp *rw = w->race;
    int32_t row = (int32_t)(in - w->machine->program.code);
    for (int32_t k = t->asynchronous[row]; k < t->asynchronous[row + 1]; k++) {
        RegisterUse *r = &rw->registers[t->list[k]];
        r->loading = rw->issued[UNIT_TENSOR_LOAD];
        r->loading_line = in->line;
    }
}
