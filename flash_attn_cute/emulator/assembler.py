"""PTX syntax tree -> a flat array of instructions that the core executes.

Registers, constants and special registers all become slots of one register file: an instruction is an operation and a
few slot numbers. What an instruction of PTX becomes is decided in the `lower_*` modules, one function a mnemonic;
this one holds what they share. An instruction that nobody lowers becomes `unknown`, an error when it would execute.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .costs import CLASSES
from .ptx import Address, Entry, Instruction, Module, Pair, Scope, Variable, Vector, parse_immediate

INSTRUCTION = np.dtype(
    [
        ("op", np.uint16),
        ("guarded", np.uint8),
        ("cls", np.uint8),
        ("guard", np.int32),
        ("r", np.int32, 8),
        ("pool", np.int32),
        ("line", np.int32),
        ("sub", np.uint32),
        ("target", np.int32),
        ("imm", np.int64),
    ],
    align=True,
)
CONSTANT = np.dtype([("slot", np.int32), ("wide", np.int32), ("value", np.uint64)])
SPECIAL_SLOT = np.dtype([("slot", np.int32), ("wide", np.int32), ("special", np.int32), ("value", np.uint32)])

CORE = Path(__file__).parent / "core"
SHARED_FIRST = 1024  # as in machine.h
ADDRESS_WIDE = 0x80000000  # `sub` flag of the core: the address operand is a 64-bit register
WIDTHS = {"pred": 1, "b8": 1, "b16": 1, "b32": 1, "b64": 2, "b128": 4}


def _read_opcodes() -> dict[str, tuple[int, int]]:
    text = (CORE / "opcodes.def").read_text()
    found = re.findall(r"^OP\((\w+), (\w+)\)$", text, re.MULTILINE)
    return {name: (number, CLASSES.index(kind.lower())) for number, (name, kind) in enumerate(found)}


def _read_specials() -> dict[str, int]:
    header = (CORE / "machine.h").read_text()
    body = re.search(r"typedef enum \{\s*(SPECIAL_TID_X.*?)\} Special;", header, re.DOTALL)[1]
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL)
    names = [name.strip() for name in body.split(",") if name.strip()]
    return {name.removeprefix("SPECIAL_").lower(): number for number, name in enumerate(names)}


OPCODES = _read_opcodes()
SPECIALS = _read_specials()


@dataclass
class Program:
    """A kernel ready to run; `globals` are module variables that need memory, and the constants for their addresses."""

    kernel: str
    code: np.ndarray
    pool: np.ndarray
    pool_counts: list[int]  # entries of `pool` that each row of `code` has
    constants: np.ndarray
    specials: np.ndarray
    slots: int
    local_bytes: int
    shared_bytes: int  # static, from SHARED_FIRST on
    shared_align: int
    dynamic_offset_specials: list[
        int
    ]  # rows of `specials` whose value is where dynamic shared memory starts, plus theirs
    param_constants: list[int]  # rows of `constants` that are parameter addresses: the buffer's address is added
    globals: dict[str, tuple[Variable, list[int]]]
    parameter_bytes: int
    unknown: list[str]
    source: list[
        tuple[int, Instruction]
    ]  # what was written, each with its row of `code`: the last where it has several
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)


class Unsupported(Exception):
    """Raised by a lowering for a form it does not know; the instruction becomes `unknown`."""


Lowering = Callable[["Assembler", Instruction], None]
LOWERINGS: dict[str, Lowering] = {}


def lowers(*mnemonics: str) -> Callable[[Lowering], Lowering]:
    """Registers a function for mnemonics: a root (`add`) or a dotted prefix (`cp.async.bulk`); the longest wins."""

    def register(function: Lowering) -> Lowering:
        for mnemonic in mnemonics:
            LOWERINGS[mnemonic] = function
        return function

    return register


class Assembler:
    """Turns one entry into a Program. Lowerings call `reg`, `address`, `emit` and friends."""

    def __init__(self, module: Module, entry: Entry):
        self.module, self.entry = module, entry
        self.rows: list[tuple] = []
        self.pool: list[int] = []
        self.pool_counts: dict[int, int] = {}
        self.slots = 0
        self.slot_of: dict[tuple[int, str], int] = {}
        self.constants: list[tuple[int, int, int]] = []
        self.constant_of: dict[tuple[int, int], int] = {}
        self.specials: list[tuple[int, int, int, int]] = []
        self.special_of: dict[tuple, int] = {}
        self.param_constants: list[int] = []
        self.param_slots: dict[int, int] = {}
        self.globals: dict[str, tuple[Variable, list[int]]] = {}
        self.global_slots: dict[tuple[str, int], int] = {}
        self.dynamic: list[int] = []
        self.unknown: list[str] = []
        self.branches: list[tuple[int, str, Scope, str]] = []
        self.pool_branches: list[tuple[int, str, Scope, str]] = []
        self.first_row: dict[str, list[int]] = {}  # of each PTX instruction, by kernel or function
        self.body = entry  # being assembled: the kernel, then the functions that it calls
        self.called: dict[str, int] = {}  # the slot of a function's return address
        self.calls: list[tuple[int, str]] = []
        self.scratch: dict[int, int] = {}
        self.current: Instruction | None = None
        self._place_variables()

    def _place_variables(self) -> None:
        self.variables = {v.name: v for v in [*self.module.variables, *self.entry.variables]}
        offsets, self.parameter_bytes = self.entry.parameter_layout()
        self.parameters = {p.name: offset for p, offset in zip(self.entry.parameters, offsets, strict=True)}
        end, align, local = SHARED_FIRST, 16, 0
        self.shared_offset: dict[str, int] = {}
        self.local_offset: dict[str, int] = {}
        for variable in self.variables.values():
            if variable.space == "shared":
                align = max(align, variable.align)
                if not variable.extern:
                    end = -(-end // variable.align) * variable.align
                    self.shared_offset[variable.name] = end
                    end += variable.size
            elif variable.space == "local":
                local = self._place_local(variable, local)
        # What calls take and return is local memory. Calls declare it under the same few names; the largest counts.
        passed: dict[str, Variable] = {}
        for body in (self.entry, *self.module.functions.values()):
            for variable in (*body.variables, *(body.results + body.parameters if body is not self.entry else ())):
                if variable.space == "param" and variable.size > getattr(passed.get(variable.name), "size", 0):
                    passed[variable.name] = self.variables[variable.name] = variable
        for variable in passed.values():
            local = self._place_local(variable, local)
        self.shared_end, self.shared_align, self.local_bytes = end, align, local

    def _place_local(self, variable: Variable, end: int) -> int:
        start = -(-end // 16) * 16
        self.local_offset[variable.name] = start
        return start + variable.size

    # -- slots ---------------------------------------------------------------------------------------------------------

    def new_slot(self, width: int = 1) -> int:
        slot = self.slots
        self.slots += width
        return slot

    def sink(self, width: int = 1) -> int:
        """Where a result goes that nobody wants (`_`)."""
        if width not in self.scratch:
            self.scratch[width] = self.new_slot(width)
        return self.scratch[width]

    def kind(self, name: str) -> str | None:
        """The declared type of a register, reduced to its width (`b32`), or None where `name` is not a register."""
        found = self.current.scope.find_register(name)
        if not found:
            return None
        kind = found[1]
        return "pred" if kind == "pred" else "b" + kind.lstrip("bsuf")

    def register(self, name: str) -> int:
        found = self.current.scope.find_register(name)
        if not found:
            raise Unsupported(f"register {name} is not declared")
        scope, _ = found
        key = (scope.number, name)
        if key not in self.slot_of:
            self.slot_of[key] = self.new_slot(WIDTHS[self.kind(name)])
        return self.slot_of[key]

    def constant(self, value: int, width: int = 1) -> int:
        value &= (1 << (32 * min(width, 2))) - 1
        key = (value, width)
        if key not in self.constant_of:
            slot = self.new_slot(width)
            self.constants.append((slot, int(width >= 2), value))
            if width == 4:
                self.constants.append((slot + 2, 1, 0))
            self.constant_of[key] = slot
        return self.constant_of[key]

    def special(self, name: str, width: int = 1, value: int = 0) -> int:
        key = (name, width, value)
        if key not in self.special_of:
            slot = self.new_slot(width)
            self.special_of[key] = slot
            self.specials.append((slot, int(width == 2), SPECIALS[name], value))
        return self.special_of[key]

    def parameter(self, offset: int) -> int:
        """The address of a parameter byte: the launch's copy of the parameters is memory like any other."""
        if offset not in self.param_slots:
            slot = self.new_slot(2)
            self.param_constants.append(len(self.constants))
            self.constants.append((slot, 1, offset))
            self.param_slots[offset] = slot
        return self.param_slots[offset]

    def symbol(self, name: str, offset: int = 0, width: int = 2) -> int | None:
        """The slot of a variable's address, or None where there is no such variable."""
        if name in self.parameters:
            return self.parameter(self.parameters[name] + offset)
        variable = self.variables.get(name)
        if variable is None:
            return None
        if variable.space == "shared":
            if variable.extern:
                key = ("dynamic", width, offset)
                if key not in self.special_of:
                    slot = self.new_slot(width)
                    self.special_of[key] = slot
                    self.dynamic.append(len(self.specials))
                    self.specials.append((slot, int(width == 2), SPECIALS["shared_address"], offset))
                return self.special_of[key]
            return self.special("shared_address", width, self.shared_offset[name] + offset)
        if variable.name in self.local_offset:
            return self.constant(self.local_offset[name] + offset, width)
        key = (name, offset)
        if key not in self.global_slots:
            slot = self.new_slot(2)
            self.globals.setdefault(name, (variable, []))[1].append(len(self.constants))
            self.constants.append((slot, 1, offset & (2**64 - 1)))
            self.global_slots[key] = slot
        return self.global_slots[key]

    # -- operands ------------------------------------------------------------------------------------------------------

    def reg(self, operand, width: int = 1, half: str | None = None) -> int:
        """The slot that holds an operand: a register, an immediate, a special register or an address."""
        if not isinstance(operand, str):
            raise Unsupported("a vector or an address where a single operand was expected")
        if operand == "_":
            return self.sink(max(width, 2))
        if operand.startswith("!"):
            return self.negated(operand[1:].strip())
        if self.kind(operand) is not None:
            return self.register(operand)
        if operand.startswith("%"):
            return self.special_register(operand, width)
        value = parse_immediate(operand, wide=width == 2)
        if value is not None:
            if half and "." in operand:
                raise Unsupported("a decimal fraction as a 16-bit float")
            return self.constant(value, width)
        name, _, offset = operand.partition("+")
        slot = self.symbol(name.strip(), parse_immediate(offset) or 0 if offset else 0, width)
        if slot is None:
            raise Unsupported(f"operand {operand!r}")
        return slot

    def low_word(self, operand, slot: int) -> int:
        """The slot of a register's low 32 bits, for instructions that may take less of it than it has (st, cvt)."""
        if self.kind(operand) != "b64":
            return slot
        low = self.new_slot()
        self.emit("cvt_u32_u64", [low, slot])
        return low

    def pred(self, operand: str) -> int:
        value = parse_immediate(operand) if isinstance(operand, str) else None
        if value is not None:
            return self.constant(0xFFFFFFFF if value else 0)
        return self.reg(operand)

    def negated(self, name: str) -> int:
        slot = self.new_slot()
        self.emit("not_b32", [slot, self.register(name)], guarded=False)
        return slot

    def special_register(self, name: str, width: int) -> int:
        name = name.lstrip("%").replace(".", "_")
        if name in ("clock", "clock64", "globaltimer", "clock_hi", "globaltimer_lo", "globaltimer_hi"):
            slot = self.new_slot(2)
            self.emit("clock", [slot], sub=int(width == 2))
            return slot
        name = {"nwarpid": "nwarpid", "ctarank": "cluster_ctarank"}.get(name, name)
        if name not in SPECIALS:
            raise Unsupported(f"special register %{name}")
        return self.special(name, width)

    def vector(self, operand, width: int = 1) -> list[int]:
        """Slots of a vector's items, or of the single operand."""
        items = operand.items if isinstance(operand, Vector) else (operand,)
        return [self.reg(item, width) for item in items]

    def address(self, operand: Address) -> tuple[int, int, bool]:
        """(slot, offset, wide) of an address operand."""
        kind = self.kind(operand.base)
        if kind is not None:
            return self.register(operand.base), operand.offset, kind == "b64"
        value = parse_immediate(operand.base)
        if value is not None:
            return self.constant(value, 2), operand.offset, True
        variable = self.variables.get(operand.base)
        narrow = variable is not None and (variable.space == "shared" or variable.name in self.local_offset)
        slot = self.symbol(operand.base, operand.offset, 1 if narrow else 2)
        if slot is None:
            raise Unsupported(f"address {operand.base!r}")
        return slot, 0, not narrow

    # -- output --------------------------------------------------------------------------------------------------------

    def emit(self, op: str, r=(), *, sub=0, imm=0, pool=None, target=0, guarded=True, cls=None) -> int:
        """Appends an instruction; returns its row."""
        number, own = OPCODES[op]
        slots = list(r) + [-1] * (8 - len(r))
        current = self.current
        guard, how = 0, 0
        if guarded and current.guard is not None:
            guard, how = self.register(current.guard), 2 if current.negated else 1
        first = len(self.pool)
        if pool is not None:
            self.pool.extend(pool)
        self.pool_counts[len(self.rows)] = len(self.pool) - first
        cls = own if cls is None else CLASSES.index(cls)
        self.rows.append((number, how, cls, guard, tuple(slots), first, current.line, sub, target, imm))
        return len(self.rows) - 1

    def emit_unknown(self, instruction: Instruction, why: str) -> None:
        text = instruction.name + (f" ({why})" if why else "")
        row = self.emit("unknown")
        values = list(self.rows[row])
        values[5] = len(self.unknown)
        self.rows[row] = tuple(values)
        self.unknown.append(text)

    def branch(self, row: int, label: str) -> None:
        self.branches.append((row, self.body.name, self.current.scope, label))

    def assemble(self) -> Program:
        self._assemble_body(self.entry)
        done = 0
        while done < len(self.called):  # a function may call others
            self._assemble_body(self.module.functions[list(self.called)[done]])
            done += 1
        code = np.zeros(len(self.rows), INSTRUCTION)
        for row, values in enumerate(self.rows):
            code[row] = values
        for row, body, scope, label in self.branches:
            code[row]["target"] = self._target(body, scope, label)
        for position, body, scope, label in self.pool_branches:
            self.pool[position] = self._target(body, scope, label)
        for row, name in self.calls:
            code[row]["target"] = self.first_row[name][0]
        return Program(
            kernel=self.entry.name,
            code=code,
            pool=np.array([*self.pool, -1], np.int32),
            pool_counts=[self.pool_counts[row] for row in range(len(self.rows))],
            constants=np.array([(s, w, v & (2**64 - 1)) for s, w, v in self.constants], CONSTANT),
            specials=np.array(self.specials, SPECIAL_SLOT),
            slots=self.slots + 1,
            local_bytes=self.local_bytes,
            shared_bytes=self.shared_end,
            shared_align=self.shared_align,
            dynamic_offset_specials=self.dynamic,
            param_constants=self.param_constants,
            globals=self.globals,
            parameter_bytes=self.parameter_bytes,
            unknown=self.unknown,
            source=self._source(),
            directives=self.entry.directives,
        )

    def _assemble_body(self, body: Entry) -> None:
        self.body = body
        first_row = self.first_row[body.name] = []
        for instruction in body.instructions:
            self.current = instruction
            first_row.append(len(self.rows))
            lowering = _find(instruction.opcode)
            mark = len(self.rows)
            try:
                if lowering is None:
                    raise Unsupported("")
                lowering(self, instruction)
            except Unsupported as error:
                del self.rows[mark:]
                self.emit_unknown(instruction, str(error))
        first_row.append(len(self.rows))
        # Running off the end is a return.
        self.current = Instruction(0, ("ret",), (), None, False, Scope(None, 0))
        _find(("ret",))(self, self.current)

    def _source(self) -> list[tuple[int, Instruction]]:
        found = []
        for body in (self.entry, *(self.module.functions[name] for name in self.called)):
            rows = self.first_row[body.name]
            ends = zip(body.instructions, rows[:-1], rows[1:], strict=True)
            found += [(end - 1, instruction) for instruction, first, end in ends if end > first]
        return found

    def _target(self, body: str, scope: Scope, label: str) -> int:
        index = scope.find_label(label)
        if index is None:
            raise ValueError(f"kernel {self.entry.name}: label {label} is not defined")
        return self.first_row[body][index]


def _find(opcode: tuple[str, ...]) -> Lowering | None:
    for length in range(min(len(opcode), 6), 0, -1):
        found = LOWERINGS.get(".".join(opcode[:length]))
        if found:
            return found
    return None


def assemble(module: Module, entry: Entry) -> Program:
    """The program of one entry."""
    from . import lower_alu, lower_async, lower_call, lower_fences, lower_memory, lower_tensor  # noqa: F401  (they register themselves)

    return Assembler(module, entry).assemble()


__all__ = ["Assembler", "Pair", "Program", "Unsupported", "assemble", "lowers"]
