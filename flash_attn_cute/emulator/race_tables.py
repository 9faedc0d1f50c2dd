"""What the race check has to know of a program before it runs: which registers of tensor instructions each row names.

Registers matter that a wgmma accumulates in or reads, or that a tcgen05.ld loads, and those that they are copied from:
all others are a thread's own affair.
"""

from __future__ import annotations

import ctypes

import numpy as np

from .assembler import OPCODES, Program
from .lower_fences import FENCES

_ASYNCHRONOUS = ("wgmma", "tcgen05_ld")
_COPY = "mov_b32"
# Lists of operands that are not all registers.
_OTHER_LISTS = ("tma_bulk", "brx", "unknown")


class RaceTables(ctypes.Structure):
    """As RaceTables in core/machine.h; keeps the arrays it points to alive."""

    _fields_ = [
        ("ordinary", ctypes.c_void_p),
        ("asynchronous", ctypes.c_void_p),
        ("list", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("copy_operation", ctypes.c_int32),
        ("before_fences", ctypes.c_int32),
        ("after_fences", ctypes.c_int32),
    ]


def race_tables(program: Program) -> RaceTables:
    """Made once a program."""
    if "race_tables" not in vars(program):
        vars(program)["race_tables"] = _make(program)
    return vars(program)["race_tables"]


def _make(program: Program) -> RaceTables:
    code, copy = program.code, OPCODES[_COPY][0]
    asynchronous = [op in _numbers(_ASYNCHRONOUS) for op in code["op"].tolist()]
    pools = _pools(program)
    matter = {slot: None for row, pool in enumerate(pools) if asynchronous[row] for slot in pool}
    copies = code["r"][code["op"] == copy][:, :2].tolist()
    fixed = {*program.constants["slot"].tolist(), *program.specials["slot"].tolist()}
    while sources := [source for to, source in copies if to in matter and source not in matter and source not in fixed]:
        matter |= dict.fromkeys(sources)
    numbers = {slot: number for number, slot in enumerate(matter)}
    named = [
        [numbers[slot] for slot in (pool if later else (*operands, *pool)) if slot in numbers]
        for operands, pool, later in zip(code["r"].tolist(), pools, asynchronous, strict=True)
    ]
    # A constant that a register is set to is a name of that, too, and stands wherever the compiler likes.
    constant = ((code["op"] == copy) & np.isin(code["r"][:, 1], list(fixed))).tolist()
    ordinary = [[] if later or fix else slots for slots, later, fix in zip(named, asynchronous, constant, strict=True)]
    products = [slots if later else [] for slots, later in zip(named, asynchronous, strict=True)]
    starts = np.cumsum([0, *map(len, ordinary)]), np.cumsum([sum(map(len, ordinary)), *map(len, products)])
    arrays = [array.astype(np.int32) for array in (*starts, np.array([*sum(ordinary + products, []), -1]))]
    fences = set((code["sub"][code["op"] == OPCODES["fence"][0]] & 15).tolist())
    tables = RaceTables(
        *(array.ctypes.data for array in arrays),
        len(numbers),
        copy,
        FENCES["FENCE_TENSOR_BEFORE"] in fences,
        FENCES["FENCE_TENSOR_AFTER"] in fences,
    )
    tables.arrays = arrays
    return tables


def _numbers(names: tuple[str, ...]) -> set[int]:
    return {OPCODES[name][0] for name in names}


def _pools(program: Program) -> list[list[int]]:
    """The registers among the longer operand lists, by row."""
    without, everything = _numbers(_OTHER_LISTS), program.pool.tolist()
    rows = zip(program.code["op"].tolist(), program.code["pool"].tolist(), program.pool_counts, strict=True)
    return [[] if op in without else everything[first : first + count] for op, first, count in rows]
