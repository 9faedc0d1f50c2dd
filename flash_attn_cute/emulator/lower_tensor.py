"""What the tensor core instructions become: mma.sync, wgmma, and tcgen05 on tensor memory."""

from __future__ import annotations

import re

from .assembler import Assembler, Unsupported, lowers
from .lower_memory import address_slots
from .ptx import Address, Instruction, Vector, parse_immediate

# As in machine.h: FORMAT_*.
FORMATS = {"f16": 0, "bf16": 1, "tf32": 2, "e4m3": 3, "e5m2": 4, "s8": 5, "u8": 6, "e2m3": 7, "e3m2": 8, "e2m1": 9}
FORMAT_BYTES = (2, 2, 4, 1, 1, 1, 1, 1, 1, 1)
A_REGISTERS, A_MN, B_MN, A_NEGATED, B_NEGATED, HALF_SUMS, INTEGER_SUMS, SATURATE = (1 << bit for bit in range(16, 24))


@lowers("wgmma.mma_async")
def wgmma(a: Assembler, i: Instruction) -> None:
    shape = next(part for part in i.opcode if re.fullmatch(r"m64n\d+k\d+", part))
    n = int(re.search(r"n(\d+)", shape)[1])
    d_type, a_type, b_type = i.opcode[-3:]
    if d_type not in ("f32", "f16", "s32") or a_type not in FORMATS or b_type not in FORMATS or "sp" in i.opcode:
        raise Unsupported(f"{d_type} sums")
    d, x, y, scale, *rest = i.operands
    sub = FORMATS[a_type] | FORMATS[b_type] << 4 | n // 8 << 8 | (d_type == "f16") * HALF_SUMS
    sub |= (d_type == "s32") * INTEGER_SUMS | ("satfinite" in i.opcode) * SATURATE
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


# -- tcgen05 -----------------------------------------------------------------------------------------------------------


def _pair(i: Instruction) -> bool:
    return "cta_group::2" in i.opcode


def _tensor_address(a: Assembler, operand: Address) -> tuple[int, int]:
    slot, offset, _ = a.address(operand)
    return slot, offset


def _address_sum(a: Assembler, operand: Address) -> int:
    """The slot of an address with its offset added."""
    slot, offset = _tensor_address(a, operand)
    if not offset:
        return slot
    total = a.new_slot()
    a.emit("add_b32", [total, slot, a.constant(offset)])
    return total


@lowers("tcgen05.alloc")
def tcgen05_alloc(a: Assembler, i: Instruction) -> None:
    where, columns = i.operands
    slot, offset, flag = address_slots(a, where)
    a.emit("tcgen05_alloc", [slot, a.reg(columns)], sub=flag, imm=offset)


@lowers("tcgen05.dealloc")
def tcgen05_dealloc(a: Assembler, i: Instruction) -> None:
    a.emit("tcgen05_dealloc", [a.reg(x) for x in i.operands])


@lowers("tcgen05.relinquish_alloc_permit")
def tcgen05_relinquish(a: Assembler, i: Instruction) -> None:
    a.emit("tcgen05_relinquish")


SHAPES = ("32x32b", "16x64b", "16x128b", "16x256b", "16x32bx2")


@lowers("tcgen05.ld", "tcgen05.st")
def tcgen05_move(a: Assembler, i: Instruction) -> None:
    shape = SHAPES.index(next(part for part in i.opcode if part in SHAPES))
    if "red" in i.opcode:
        raise Unsupported("a reduction")
    loading = i.opcode[1] == "ld"
    registers, where, *split = i.operands if loading else (i.operands[-1], *i.operands[:-1])
    slots = a.vector(registers)
    packed = "pack::16b" in i.opcode or "unpack::16b" in i.opcode
    slot, offset = _tensor_address(a, where)
    sub = shape | packed << 4 | len(slots) << 8
    distance = parse_immediate(split[0]) if split else 0
    a.emit(f"tcgen05_{i.opcode[1]}", [slot], sub=sub, imm=distance, target=offset, pool=slots)


@lowers("tcgen05.commit")
def tcgen05_commit(a: Assembler, i: Instruction) -> None:
    where, *mask = i.operands
    slot, offset, flag = address_slots(a, where)
    a.emit("tcgen05_commit", [slot, a.reg(mask[0]) if mask else -1], sub=flag, imm=offset)


KINDS = {"kind::f16": 0, "kind::tf32": 1, "kind::f8f6f4": 2, "kind::i8": 3}
SCALED_KINDS = {"kind::mxf8f6f4": 4, "kind::mxf4": 5, "kind::mxf4nvf4": 6}
# Scales of a row that one instruction takes, by what the opcode says; without a word, one for each 32 elements.
SCALES = {"block16": 4, "scale_vec::4X": 4, "scale_vec::2X": 2, "scale_vec::1X": 1}


@lowers("tcgen05.mma")
def tcgen05_mma(a: Assembler, i: Instruction) -> None:
    kinds = SCALED_KINDS if "block_scale" in i.opcode else KINDS
    kind = next((kinds[part] for part in i.opcode if part in kinds), None)
    known = {"tcgen05", "mma", "cta_group::1", "cta_group::2", "block_scale", "block32", *kinds, *SCALES}
    if kind is None or any(part not in known and "collector" not in part for part in i.opcode):
        raise Unsupported("")
    d, x, y, idesc, *rest = i.operands
    scales, count = [], 0
    if kinds is SCALED_KINDS:
        scales = [_address_sum(a, rest.pop(0)) for _ in range(2)]
        count = next((SCALES[part] for part in i.opcode if part in SCALES), 1 if kind == 4 else 2)
    held_back = []  # masks of lanes that are not written
    if rest and isinstance(rest[0], Vector):
        held_back = a.vector(rest.pop(0))
    if len(rest) != 1:
        raise Unsupported("a scale of the accumulator")
    d_slot, d_offset = _tensor_address(a, d)
    in_tensor_memory = isinstance(x, Address)
    x_slot, x_offset = _tensor_address(a, x) if in_tensor_memory else (a.reg(x, 2), 0)
    sub = kind | in_tensor_memory << 4 | _pair(i) << 5
    slots = [d_slot, x_slot, a.reg(y, 2), a.reg(idesc), a.pred(rest[0])]
    sub |= len(held_back) << 8 | count << 16
    a.emit("tcgen05_mma", slots + scales, sub=sub, imm=d_offset, target=x_offset, pool=held_back)


COPIES = {"warpx4": 4, "warpx2::02_13": 2, "warpx2::01_23": 3}


@lowers("tcgen05.cp")
def tcgen05_cp(a: Assembler, i: Instruction) -> None:
    shape = next(part for part in i.opcode if re.fullmatch(r"\d+x\d+b", part))
    spread = next((bits for part, bits in (("b4x16_p64", 4), ("b6x16_p32", 6)) if part in i.opcode), 0)
    rows, bits = (int(number) for number in shape.removesuffix("b").split("x"))
    copies = next((COPIES[part] for part in i.opcode if part in COPIES), 0)
    where, descriptor = i.operands
    slot, offset = _tensor_address(a, where)
    sub = rows | bits // 128 << 8 | _pair(i) << 12 | copies << 16 | spread << 20
    a.emit("tcgen05_cp", [slot, a.reg(descriptor, 2)], sub=sub, imm=offset)


# -- cluster launch control --------------------------------------------------------------------------------------------


@lowers("clusterlaunchcontrol.try_cancel")
def try_cancel(a: Assembler, i: Instruction) -> None:
    answer, barrier = i.operands
    slot, offset, flag = address_slots(a, answer)
    other, other_offset, other_flag = address_slots(a, barrier)
    sub = any("multicast" in part for part in i.opcode) | bool(other_flag) << 13 | flag
    a.emit("clc_try_cancel", [slot, other], sub=sub, imm=offset, target=other_offset)


@lowers("clusterlaunchcontrol.query_cancel")
def query_cancel(a: Assembler, i: Instruction) -> None:
    d, answer = i.operands
    source = a.reg(answer, 4)
    if "is_canceled" in i.opcode:
        a.emit("clc_query", [a.reg(d), source], sub=3)
    elif isinstance(d, Vector):
        for axis, item in enumerate(d.items[:3]):
            if item != "_":
                a.emit("clc_query", [a.reg(item), source], sub=axis)
    else:
        axis = next(part[-1] for part in i.opcode if part.startswith("get_first_ctaid"))
        a.emit("clc_query", [a.reg(d), source], sub="xyz".index(axis))
