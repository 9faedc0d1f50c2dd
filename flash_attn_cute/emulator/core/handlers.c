/* The table of operations, in the order of opcodes.def. */
#include "machine.h"

#define OP(name, class) void op_##name(Warp *w, const Instr *in, uint32_t mask);
#include "opcodes.def"
#undef OP

const Handler handlers[] = {
#define OP(name, class) op_##name,
#include "opcodes.def"
#undef OP
};
