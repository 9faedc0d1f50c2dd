"""What loads, stores, atomics and address arithmetic between memory spaces become."""

from __future__ import annotations

from .assembler import ADDRESS_WIDE, Assembler, Unsupported, lowers
from .ptx import Address, Instruction, Vector

SPACES = {"generic": 0, "global": 1, "shared": 2, "local": 3, "param": 1, "const": 1}
TYPE_LOG2 = {"8": 0, "16": 1, "32": 2, "64": 3, "128": 4}
REGISTER_WIDTH = {"b8": 1, "b16": 1, "b32": 1, "b64": 2, "b128": 4}


def space_of(opcode: tuple[str, ...]) -> int:
    """The state space that a memory instruction names; shared::cta and shared::cluster are one address range."""
    for part in opcode[1:]:
        root = part.split("::")[0]
        if root in SPACES:
            return SPACES[root]
    return SPACES["generic"]


def space_at(a: Assembler, i: Instruction, where: Address) -> int:
    """The space of a load or store: what a call passes is local memory, what the launch passes is global."""
    return SPACES["local"] if where.base in a.local_offset else space_of(i.opcode)


def element(opcode: tuple[str, ...]) -> tuple[str, int, int]:
    """(letters, log2 of bytes, count) of what a load or store moves."""
    kind = opcode[-1]
    letters = kind.rstrip("0123456789x")
    bits = kind[len(letters) :]
    if bits.endswith("x2"):
        bits = {"16x2": "32", "32x2": "64"}[bits]
    count = next((int(part[1:]) for part in opcode if part in ("v2", "v4", "v8")), 1)
    return letters, TYPE_LOG2[bits], count


SCOPES = {"cta": 0, "cluster": 1, "gpu": 2, "sys": 2}


def memory_order(opcode: tuple[str, ...]) -> int:
    """What the race check wants to know of a strong access: 1 where it acquires, 2 where it releases, scope << 2."""
    acquires = "acquire" in opcode or "acq_rel" in opcode
    releases = "release" in opcode or "acq_rel" in opcode
    scope = next((SCOPES[part] for part in opcode if part in SCOPES), SCOPES["gpu"])
    return acquires | releases << 1 | scope << 2


def strong(opcode: tuple[str, ...]) -> int:
    """The bits of `sub` for a load or store that orders others, or that others may meet without a race."""
    return 1 | memory_order(opcode) << 1 if {"relaxed", "acquire", "release", "volatile", "mmio"} & {*opcode} else 0


def address_slots(a: Assembler, operand: Address) -> tuple[int, int, int]:
    """(slot, offset, flag): the flag goes into `sub`."""
    slot, offset, wide = a.address(operand)
    return slot, offset, ADDRESS_WIDE if wide else 0


@lowers("ld", "ldu")
def load(a: Assembler, i: Instruction) -> None:
    letters, log2, count = element(i.opcode)
    d, source = i.operands[0], i.operands[1]
    space = SPACES["global"] if i.opcode[0] == "ldu" else space_at(a, i, source)
    items = d.items if isinstance(d, Vector) else (d,)
    kinds = {a.kind(x) for x in items if x != "_"}
    kind = kinds.pop() if kinds else "b32"
    width = 4 if log2 == 4 else 2 if kind == "b64" else 1
    slots = [-1 if x == "_" else a.reg(x, width) for x in items]
    slot, offset, flag = address_slots(a, source)
    sub = log2 | count << 4 | (letters == "s") << 8 | space << 9 | (width == 2) << 12 | (kind == "b16") << 13 | flag
    sub |= any(part.split("::")[0] in ("param", "const") for part in i.opcode) << 15 | strong(i.opcode) << 16
    a.emit("ld", [slot], sub=sub, imm=offset, pool=slots)


@lowers("ldmatrix", "stmatrix")
def matrix(a: Assembler, i: Instruction) -> None:
    loading = i.opcode[0] == "ldmatrix"
    if i.opcode[-1] not in ("b16", "b8") or "b8x16" in i.name:
        raise Unsupported("")
    shape = next(part for part in i.opcode if part.startswith("m"))
    count = next(int(part[1:]) for part in i.opcode if part in ("x1", "x2", "x4"))
    registers, where = (i.operands[0], i.operands[1]) if loading else (i.operands[1], i.operands[0])
    slot, offset, flag = address_slots(a, where)
    trans = "trans" in i.opcode
    bytewise = "m16n16" if loading else "m16n8"  # always transposed
    if shape not in ("m8n8", bytewise):
        raise Unsupported(shape)
    sub = count | trans << 4 | (shape == bytewise) << 5 | flag
    a.emit(i.opcode[0], [slot], sub=sub, imm=offset, pool=a.vector(registers))


@lowers("st")
def store(a: Assembler, i: Instruction) -> None:
    _, log2, count = element(i.opcode)
    where, value = i.operands[0], i.operands[1]
    width = {3: 2, 4: 4}.get(log2, 1)
    slot, offset, flag = address_slots(a, where)
    sub = log2 | count << 4 | space_at(a, i, where) << 9 | strong(i.opcode) << 16 | flag
    registers = a.vector(value, width)
    if log2 < 3:
        items = value.items if isinstance(value, Vector) else (value,)
        registers = [a.low_word(item, slot) for item, slot in zip(items, registers, strict=True)]
    a.emit("st", [slot], sub=sub, imm=offset, pool=registers)


@lowers("st.async", "red.async")
def store_async(a: Assembler, i: Instruction) -> None:
    _, log2, count = element(i.opcode)
    where, value, barrier = i.operands
    slot, offset, flag = address_slots(a, where)
    other, other_offset, _ = address_slots(a, barrier)
    if other_offset or (i.opcode[0] == "red" and ("add" not in i.opcode or log2 != 2)):
        raise Unsupported("")
    sub = log2 | count << 4 | 2 << 9 | (i.opcode[0] == "red") << 14 | flag
    a.emit("st_async", [slot, other], sub=sub, imm=offset, pool=a.vector(value, 2 if log2 == 3 else 1))


OPERATIONS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


@lowers("atom", "red")
def atomic(a: Assembler, i: Instruction) -> None:
    letters, log2, count = element(i.opcode)
    bare = i.opcode[-1]
    operation = next((part for part in i.opcode if part in OPERATIONS), None)
    if operation is None or log2 == 4:
        raise Unsupported("")
    kind = {"s": 1, "f": 2, "bf": 4}.get(letters, 0)
    if bare.startswith(("f16", "bf16")):
        kind = 3 if letters == "f" else 4
    width = 2 if log2 == 3 else 1
    operands = list(i.operands)
    if i.opcode[0] == "red":
        results = [-1] * count
    else:
        d = operands.pop(0)
        items = d.items if isinstance(d, Vector) else (d,)
        results = [-1 if x == "_" else a.reg(x, width) for x in items]
    where, value, *rest = operands
    slot, offset, flag = address_slots(a, where)
    sub = OPERATIONS.index(operation) | kind << 4 | log2 << 8 | space_of(i.opcode) << 12 | count << 16 | flag
    sub |= memory_order(i.opcode) << 20
    other = a.reg(rest[0], width) if operation == "cas" else -1
    a.emit("atom", [-1, slot, -1, other], sub=sub, imm=offset, pool=[*a.vector(value, width), *results])


@lowers("cvta")
def cvta(a: Assembler, i: Instruction) -> None:
    d, s = i.operands
    out = "to" in i.opcode
    if i.opcode[-1] != "u64":
        raise Unsupported("32-bit addresses")
    a.emit("cvta", [a.reg(d, 2), a.reg(s, 2)], sub=space_of(i.opcode) | out << 8)


@lowers("isspacep")
def isspacep(a: Assembler, i: Instruction) -> None:
    d, s = i.operands
    a.emit("isspacep", [a.reg(d), a.reg(s, 2)], sub=4 if i.opcode[1] == "shared::cta" else space_of(i.opcode))


@lowers("mapa")
def mapa(a: Assembler, i: Instruction) -> None:
    d, s, rank = i.operands
    wide = i.opcode[-1] == "u64"
    a.emit("mapa", [a.reg(d, 1 + wide), a.reg(s, 1 + wide), a.reg(rank)], sub=int(wide))


@lowers("getctarank")
def getctarank(a: Assembler, i: Instruction) -> None:
    d, s = i.operands
    wide = i.opcode[-1] == "u64"
    a.emit("getctarank", [a.reg(d), a.reg(s, 1 + wide)], sub=int(wide))
