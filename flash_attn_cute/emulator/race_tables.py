"""What the race check has to know of a program before it runs: which registers of tensor instructions each row names.

Registers matter that a wgmma accumulates in or reads, or that a tcgen05.ld loads: all others are a thread's own affair.
"""

from __future__ import annotations

import ctypes

import numpy as np

from .assembler import OPCODES, Program
from .lower_fences import FENCES

_ASYNCHRONOUS = ("wgmma", "tcgen05_ld")
# Lists of operands that are not all registers.
_OTHER_LISTS = ("tma_bulk", "brx", "unknown")


class RaceTables(ctypes.Structure):
    """As RaceTables in core/machine.h; keeps the arrays it points to alive."""

    _fields_ = [
        ("ordinary", ctypes.c_void_p),
        ("asynchronous", ctypes.c_void_p),
        ("list", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("before_fences", ctypes.c_int32),
        ("after_fences", ctypes.c_int32),
    ]


def race_tables(program: Program) -> RaceTables:
    numbers = {OPCODES[name][0] for name in _ASYNCHRONOUS}
    rows = [_pool(program, row) for row in range(len(program.code))]
    matter: dict[int, int] = {}
    for row, operation in enumerate(program.code["op"].tolist()):
        if operation in numbers:
            for slot in rows[row]:
                matter.setdefault(slot, len(matter))
    ordinary, asynchronous, found = [0], [0], []
    for row, instruction in enumerate(program.code):
        if instruction["op"] not in numbers:
            found += [matter[slot] for slot in (*instruction["r"].tolist(), *rows[row]) if slot in matter]
        ordinary.append(len(found))
    asynchronous[0] = len(found)
    for row, instruction in enumerate(program.code):
        if instruction["op"] in numbers:
            found += [matter[slot] for slot in rows[row]]
        asynchronous.append(len(found))
    kinds = set((program.code["sub"][program.code["op"] == OPCODES["fence"][0]] & 15).tolist())
    arrays = [np.array(numbers, np.int32) for numbers in (ordinary, asynchronous, [*found, -1])]
    tables = RaceTables(
        *(array.ctypes.data for array in arrays),
        len(matter),
        FENCES["FENCE_TENSOR_BEFORE"] in kinds,
        FENCES["FENCE_TENSOR_AFTER"] in kinds,
    )
    tables.arrays = arrays
    return tables


def _pool(program: Program, row: int) -> list[int]:
    if int(program.code["op"][row]) in {OPCODES[name][0] for name in _OTHER_LISTS}:
        return []
    first = int(program.code["pool"][row])
    return program.pool[first : first + program.pool_counts[row]].tolist()
