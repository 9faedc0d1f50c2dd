"""What barriers and asynchronous copies become."""

from __future__ import annotations

from .assembler import Assembler, Unsupported, lowers
from .lower_memory import OPERATIONS, address_slots
from .ptx import Address, Instruction, parse_immediate

# As in machine.h: AsyncKind.
TMA_STORE, WGMMA, CP = 1, 2, 4


# -- mbarrier ----------------------------------------------------------------------------------------------------------


@lowers("mbarrier.init")
def mbarrier_init(a: Assembler, i: Instruction) -> None:
    where, count = i.operands
    slot, offset, flag = address_slots(a, where)
    a.emit("mbarrier_init", [slot, a.reg(count)], sub=flag, imm=offset)


@lowers("mbarrier.inval")
def mbarrier_inval(a: Assembler, i: Instruction) -> None:
    slot, offset, flag = address_slots(a, i.operands[0])
    a.emit("mbarrier_inval", [slot], sub=flag, imm=offset)


@lowers("mbarrier.arrive", "mbarrier.arrive_drop")
def mbarrier_arrive(a: Assembler, i: Instruction) -> None:
    operands = list(i.operands)
    state = -1
    if isinstance(operands[0], str):
        state = -1 if operands[0] == "_" else a.reg(operands[0], 2)
        operands.pop(0)
    where, *value = operands
    slot, offset, flag = address_slots(a, where)
    count, expected = -1, -1
    if "expect_tx" in i.opcode:
        expected = a.reg(value[0])
    elif value:
        count = a.reg(value[0])
    sub = (i.opcode[1] == "arrive_drop") | ("relaxed" in i.opcode) << 3 | flag
    a.emit("mbarrier_arrive", [state, slot, count, expected], sub=sub, imm=offset)


@lowers("mbarrier.expect_tx", "mbarrier.complete_tx")
def mbarrier_tx(a: Assembler, i: Instruction) -> None:
    where, value = i.operands
    slot, offset, flag = address_slots(a, where)
    sub = 2 | (i.opcode[1] == "complete_tx") << 2 | flag
    a.emit("mbarrier_arrive", [-1, slot, -1, a.reg(value)], sub=sub, imm=offset)


@lowers("mbarrier.try_wait", "mbarrier.test_wait")
def mbarrier_wait(a: Assembler, i: Instruction) -> None:
    d, where, phase, *_ = i.operands
    slot, offset, flag = address_slots(a, where)
    parity = "parity" in i.opcode
    sub = int(parity) | (i.opcode[1] == "try_wait") << 1 | ("relaxed" in i.opcode) << 2 | flag
    a.emit("mbarrier_wait", [a.reg(d), slot, a.reg(phase, 1 if parity else 2)], sub=sub, imm=offset)


@lowers("mbarrier.pending_count")
def mbarrier_pending_count(a: Assembler, i: Instruction) -> None:
    a.emit("mbarrier_pending_count", [a.reg(i.operands[0]), a.reg(i.operands[1], 2)])


# -- named and cluster barriers ----------------------------------------------------------------------------------------


@lowers("bar", "barrier")
def named_barrier(a: Assembler, i: Instruction) -> None:
    opcode = tuple(part for part in i.opcode if part != "cta")
    aligned = opcode[0] == "bar" or "aligned" in opcode
    sub = (opcode[1] == "arrive") | aligned << 1
    operands = list(i.operands)
    if opcode[1] == "red":
        d = operands.pop(0)
        predicate = a.pred(operands.pop())
        number = a.reg(operands[0])
        count = a.reg(operands[1]) if len(operands) > 1 else -1
        a.emit("bar", [number, count, predicate], sub=sub)
        a.emit("bar_result", [a.reg(d), number], sub=("and", "or", "popc").index(opcode[2]))
        return
    slots = [a.reg(x) for x in operands] or [a.constant(0)]
    a.emit("bar", [*slots, *[-1] * (3 - len(slots))], sub=sub)


@lowers("barrier.cluster")
def cluster_barrier(a: Assembler, i: Instruction) -> None:
    sub = (i.opcode[2] == "wait") | ("aligned" in i.opcode) << 1 | ("relaxed" in i.opcode) << 2
    a.emit("cluster_barrier", sub=sub)


# -- groups ------------------------------------------------------------------------------------------------------------


@lowers("cp.async.commit_group", "cp.async.bulk.commit_group", "wgmma.commit_group")
def commit(a: Assembler, i: Instruction) -> None:
    a.emit("async_commit", sub=_group_kind(i))


@lowers("cp.async.wait_group", "cp.async.wait_all", "cp.async.bulk.wait_group", "wgmma.wait_group")
def wait(a: Assembler, i: Instruction) -> None:
    kind = _group_kind(i)
    if "wait_all" in i.opcode:
        a.emit("async_commit", sub=kind)
    count = parse_immediate(i.operands[0]) if i.operands else 0
    a.emit("async_wait", sub=kind | ("read" in i.opcode) << 8, imm=count)


def _group_kind(i: Instruction) -> int:
    return WGMMA if i.opcode[0] == "wgmma" else TMA_STORE if "bulk" in i.opcode else CP


# -- copies ------------------------------------------------------------------------------------------------------------


@lowers("cp.async.ca", "cp.async.cg")
def cp_async(a: Assembler, i: Instruction) -> None:
    to, source, size, *rest = i.operands
    slot, offset, flag = address_slots(a, to)
    other, other_offset, _ = address_slots(a, source)
    ignore = read = -1
    if "cache_hint" in i.name:
        rest = rest[:-1]
    if rest:
        kind = a.kind(rest[0])
        if kind == "pred":
            ignore = a.pred(rest[0])
        else:
            read = a.reg(rest[0])
    sub = parse_immediate(size) | flag
    a.emit("cp_async", [slot, other, read, ignore], sub=sub, imm=offset, target=other_offset)


@lowers("cp.async.mbarrier")
def cp_async_arrive(a: Assembler, i: Instruction) -> None:
    slot, offset, flag = address_slots(a, i.operands[0])
    a.emit("cp_async_arrive", [slot], sub=("noinc" in i.opcode) | flag, imm=offset)


def _is_load(i: Instruction) -> bool:
    """Into shared memory: the destination is the first space named."""
    spaces = [part for part in i.opcode if part.startswith(("global", "shared"))]
    return spaces[0].startswith("shared")


@lowers("cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor")
def tensor_copy(a: Assembler, i: Instruction) -> None:
    if any(part.startswith(("im2col", "tile::")) for part in i.opcode):
        raise Unsupported("only tile mode is known")
    rank = next(int(part[0]) for part in i.opcode if part in ("1d", "2d", "3d", "4d", "5d"))
    hint = any("cache_hint" in part for part in i.opcode)
    operands = list(i.operands[:-1] if hint else i.operands)
    if _is_load(i):
        to, tensor, barrier, *rest = operands
        slot, offset, flag = address_slots(a, to)
        mbar, mbar_offset, mbar_flag = address_slots(a, barrier)
        mask = a.reg(rest[0]) if any("multicast" in part for part in i.opcode) else -1
        sub = 0 | ("cta_group::2" in i.opcode) << 12 | bool(mbar_flag) << 13 | flag
    else:
        tensor, source = operands
        slot, offset, flag = address_slots(a, source)
        mbar, mbar_offset, mask, sub = -1, 0, -1, 1 | flag
        if i.opcode[1] == "reduce":
            operation = next(part for part in i.opcode if part in OPERATIONS)
            sub = 2 | OPERATIONS.index(operation) << 8 | flag
    where = _generic(a, tensor, False)
    coordinates = [a.reg(x) for x in tensor.coordinates.items]
    slots = [slot, where, mbar, mask]
    a.emit("tma_tensor", slots, sub=sub | rank << 4, imm=offset, target=mbar_offset, pool=coordinates)


TMA_TYPES = {"u32": 2, "s32": 3, "u64": 4, "s64": 5, "f16": 6, "f32": 7, "f64": 9, "bf16": 10, "b32": 2, "b64": 4}


@lowers("cp.async.bulk", "cp.reduce.async.bulk")
def bulk_copy(a: Assembler, i: Instruction) -> None:
    hint = any("cache_hint" in part for part in i.opcode)
    operands = list(i.operands[:-1] if hint else i.operands)
    spaces = [part for part in i.opcode if part.startswith(("global", "shared"))]
    if any("cp_mask" in part for part in i.opcode):
        raise Unsupported("cp_mask")
    way = 1 if spaces[0] == "global" else 0 if spaces[1] == "global" else 2
    to, source, size, *rest = operands
    pool, slots = [], []
    for operand in (to, source):
        slot, offset, wide = a.address(operand)
        slots.append(slot)
        pool += [int(wide), offset]
    slots.append(a.reg(size))
    if way != 1:
        slot, offset, wide = a.address(rest.pop(0))
        slots.append(slot)
        pool += [int(wide), offset]
        slots.append(a.reg(rest[0]) if any("multicast" in part for part in i.opcode) else -1)
    sub = way
    if i.opcode[1] == "reduce":
        kind = i.opcode[-1]
        if kind not in TMA_TYPES:
            raise Unsupported(kind)
        operation = next(part for part in i.opcode if part in OPERATIONS)
        log2 = {"16": 1, "32": 2, "64": 3}[kind[-2:]]
        sub |= 1 << 4 | OPERATIONS.index(operation) << 8 | log2 << 12 | TMA_TYPES[kind] << 16
    a.emit("tma_bulk", slots, sub=sub, pool=pool)


FIELDS = ("global_address", "rank", "box_dim", "global_dim", "global_stride", "element_stride", "elemtype")
FIELDS += ("interleave_layout", "swizzle_mode", "swizzle_atomicity", "fill_mode")  # as in core/tensor_map.c
SHARED = 2  # as in lower_memory.SPACES


def _generic(a: Assembler, where: Address, shared: bool) -> int:
    """The slot of an operand's whole address, as a generic one."""
    slot, offset, wide = a.address(where)
    if offset or not wide:
        full = a.new_slot(2)
        if not wide:
            a.emit("cvt_u64_u32", [full, slot])
            slot = full
        if offset:
            a.emit("add_b64", [full, slot, a.constant(offset, 2)])
            slot = full
    if shared:
        generic = a.new_slot(2)
        a.emit("cvta", [generic, slot], sub=SHARED)
        slot = generic
    return slot


@lowers("tensormap.replace")
def tensormap_replace(a: Assembler, i: Instruction) -> None:
    field = FIELDS.index(next(part for part in i.opcode if part in FIELDS))
    where, *rest = i.operands
    slot = _generic(a, where, any(part.startswith("shared") for part in i.opcode))
    ordinal = parse_immediate(rest[0]) if len(rest) > 1 else 0
    wide = FIELDS[field] in ("global_address", "global_stride")
    a.emit("tensormap_replace", [slot, a.reg(rest[-1], 1 + wide)], sub=field, imm=ordinal)


@lowers("tensormap.cp_fenceproxy")
def tensormap_copy(a: Assembler, i: Instruction) -> None:
    to, source = i.operands[:2]
    a.emit("tensormap_copy", [_generic(a, to, False), _generic(a, source, True)])
