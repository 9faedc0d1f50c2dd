/* The one function that Python calls: a launch from its parts. */
#include "machine.h"

#include <stdlib.h>
#include <string.h>

/* geometry: grid, block, cluster; numbers: code length, constants, specials, slots, local bytes, allocations, shared bytes, dynamic
 * shared bytes, resident CTAs, architecture, schedule, checks */
int engine_launch(const Instr *code, const int32_t *pool, const Constant *constants, const SpecialSlot *specials,
                  const char *const *names, const Allocation *allocations, const uint32_t geometry[9], const int64_t numbers[12],
                  uint64_t seed, Totals *totals, int64_t *executed, int64_t *skipped, const RaceTables *tables, char *message,
                  int64_t message_size, int32_t lines[2])
{
    Machine *m = calloc(1, sizeof *m);
    m->program = (Program){.code = code, .length = (int32_t)numbers[0], .pool = pool, .constants = constants,
                           .constant_count = (int32_t)numbers[1], .specials = specials, .special_count = (int32_t)numbers[2],
                           .slots = (int32_t)numbers[3], .local_bytes = (int32_t)numbers[4], .names = names};
    m->allocations = allocations;
    m->allocation_count = (int32_t)numbers[5];
    memcpy(m->grid, geometry, sizeof m->grid);
    memcpy(m->block, geometry + 3, sizeof m->block);
    memcpy(m->cluster_shape, geometry + 6, sizeof m->cluster_shape);
    m->shared_bytes = (uint32_t)numbers[6];
    m->dynamic_shared = (uint32_t)numbers[7];
    m->sms = (int32_t)numbers[8];
    m->arch = (int32_t)numbers[9];
    m->schedule = (Schedule)numbers[10];
    m->checks = (uint32_t)numbers[11];
    m->random = seed + 1;
    m->executed = executed;
    m->skipped = skipped;
    int64_t size = (int64_t)m->cluster_shape[0] * m->cluster_shape[1] * m->cluster_shape[2];
    m->cluster_count = (int64_t)m->grid[0] * m->grid[1] * m->grid[2] / size;
    int64_t resident = (m->sms + size - 1) / size;
    m->resident = (int32_t)(resident < m->cluster_count ? resident : m->cluster_count);
    if (m->checks & CHECK_RACES)
        race_create(m, tables);
    int fault = engine_run(m);
    *totals = m->totals;
    lines[0] = m->fault_line;
    lines[1] = m->other_line;
    strncpy(message, m->message, (size_t)message_size - 1);
    message[message_size - 1] = 0;
    free(m);
    return fault;
}

int64_t engine_instruction_size(void) { return sizeof(Instr); }
