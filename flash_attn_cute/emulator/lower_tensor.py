"""What the tensor core instructions become: mma.sync, wgmma, and tcgen05 on tensor memory."""

from __future__ import annotations

import re

from .assembler import Assembler, Unsupported, lowers
from .ptx import Instruction, Vector, parse_immediate

# As in machine.h: FORMAT_*.
FORMATS = {"f16": 0, "bf16": 1, "tf32": 2, "e4m3": 3, "e5m2": 4, "s8": 5, "u8": 6, "e2m3": 7, "e3m2": 8, "e2m1": 9}
FORMAT_BYTES = (2, 2, 4, 1, 1, 1, 1, 1, 1, 1)
A_REGISTERS, A_MN, B_MN, A_NEGATED, B_NEGATED, HALF_SUMS = (1 << bit for bit in range(16, 22))


@lowers("wgmma.mma_async")
def wgmma(a: Assembler, i: Instruction) -> None:
    shape = next(part for part in i.opcode if re.fullmatch(r"m64n\d+k\d+", part))
    n = int(re.search(r"n(\d+)", shape)[1])
    d_type, a_type, b_type = i.opcode[-3:]
    if d_type not in ("f32", "f16") or a_type not in FORMATS or b_type not in FORMATS or "sp" in i.opcode:
        raise Unsupported(f"{d_type} sums")
    d, x, y, scale, *rest = i.operands
    sub = FORMATS[a_type] | FORMATS[b_type] << 4 | n // 8 << 8 | (d_type == "f16") * HALF_SUMS
    pool = a.vector(d)
    in_registers = isinstance(x, Vector)
    if in_registers:
        pool += a.vector(x)
        sub |= A_REGISTERS
    numbers = [parse_immediate(item) for item in rest]
    if any(number is None for number in numbers):
        raise Unsupported("an operand that is no literal")
    if numbers[:1] == [-1]:
        sub |= A_NEGATED
    if numbers[1:2] == [-1]:
        sub |= B_NEGATED
    majors = numbers[2:]  # one for b where a is in registers, two otherwise; none for types that are K-major only
    if majors:
        sub |= majors[-1] * B_MN
        if not in_registers:
            sub |= majors[0] * A_MN
    a.emit("wgmma", [-1 if in_registers else a.reg(x, 2), a.reg(y, 2), a.pred(scale)], sub=sub, pool=pool)


@lowers("mma.sync")
def mma(a: Assembler, i: Instruction) -> None:
    shape = next((part for part in i.opcode if re.fullmatch(r"m16n8k\d+", part)), None)
    types = [part for part in i.opcode if part in FORMATS or part == "f32"]
    if shape is None or len(types) != 4 or types[0] != types[3] or types[0] not in ("f32", "f16"):
        raise Unsupported("")
    _, a_type, b_type, _ = types
    if a_type not in FORMATS or "row" not in i.opcode:
        raise Unsupported("")
    row_bytes = int(re.search(r"k(\d+)", shape)[1]) * FORMAT_BYTES[FORMATS[a_type]]
    pool = [slot for operand in i.operands for slot in a.vector(operand)]
    sub = FORMATS[a_type] | FORMATS[b_type] << 4 | row_bytes << 8 | (types[0] == "f16") << 16
    a.emit("mma", sub=sub, pool=pool)
