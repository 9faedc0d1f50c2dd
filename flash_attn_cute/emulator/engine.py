"""Runs launches: assembles a kernel once, hands it to the C core, and turns what returns into a report or an error."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import sys
import time
from dataclasses import dataclass

import numpy as np

from . import build
from .assembler import CORE, INSTRUCTION, Program, assemble
from .costs import CLASSES, cost, rates
from .counts import Counts
from .errors import FAULTS, EngineError, Race
from .launch import CHECKS, SCHEDULES, Allocation, EngineOptions, LaunchRecord
from .ptx import parse
from .race_tables import RaceTables, race_tables
from .report import SHARED_ACCESSES, LaunchReport, SharedTraffic, warps_label

MAX_WARPS = 32
# -O3 for vector loops; no contraction, so that a product and a sum round as PTX says wherever it is compiled.
FLAGS = (
    "-O3",
    "-Wall",
    "-Wextra",
    "-fno-math-errno",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-lm",
)
BASE_RATE = 2048  # multiply-adds a clock by which core/ counts MMA cycles


class _Allocation(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("writable", ctypes.c_int32),
        ("pad", ctypes.c_int32),
        ("name", ctypes.c_char_p),
    ]


class _Totals(ctypes.Structure):
    """As Totals in core/machine.h."""

    _fields_ = [
        ("mma_flops", ctypes.c_int64),
        ("mma_cycles_x16", ctypes.c_int64),
        ("tma_load_bytes", ctypes.c_int64),
        ("tma_store_bytes", ctypes.c_int64),
        ("tma_reduce_bytes", ctypes.c_int64),
        ("global_load_bytes", ctypes.c_int64),
        ("global_store_bytes", ctypes.c_int64),
        ("shared", ctypes.c_int64 * 3 * len(SHARED_ACCESSES)),
        ("ctas", ctypes.c_int64),
        ("slices", ctypes.c_int64),
        ("deferred_operations", ctypes.c_int64),
    ]


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def _print_text(text: bytes) -> None:
    """What device code prints."""
    sys.stdout.write(text.decode(errors="replace"))


@functools.cache
def core_library() -> ctypes.CDLL:
    """The compiled core; built at first use."""
    path = build.shared_library("core", sorted(CORE.glob("*.c")), FLAGS)
    library = ctypes.CDLL(str(path))
    library.engine_launch.restype = ctypes.c_int
    library.engine_instruction_size.restype = ctypes.c_int64
    if library.engine_instruction_size() != INSTRUCTION.itemsize:
        raise RuntimeError("the emulator's core and its assembler disagree about the size of an instruction")
    library.engine_on_print(_print_text)
    return library


@dataclass
class _Loaded:
    """A program with the memory of its module's variables, which live as long as the module does."""

    program: Program
    variables: list[tuple[np.ndarray, Allocation]]
    constants: np.ndarray


_loaded: dict[tuple[str, str], _Loaded] = {}


def _aligned(size: int, alignment: int = 128) -> np.ndarray:
    raw = np.zeros(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size]


def load(ptx: str, entry: str) -> _Loaded:
    """The assembled entry of a module, from the cache where the same text was seen before."""
    key = (hashlib.sha256(ptx.encode()).hexdigest(), entry)
    if key in _loaded:
        return _loaded[key]
    module = parse(ptx)
    if entry not in module.entries:
        raise ValueError(f"the module has no entry {entry!r}; it has {', '.join(module.entries) or 'none'}")
    program = assemble(module, module.entries[entry])
    constants = program.constants.copy()
    variables = []
    for name, (variable, rows) in program.globals.items():
        memory = _aligned(max(variable.size, 1))
        if variable.initial:
            memory[: variable.size] = np.frombuffer(variable.initial, np.uint8)
        address = memory.ctypes.data
        variables.append((memory, Allocation(address, variable.size, name, variable.space == "global")))
        for row in rows:
            constants[row]["value"] += np.uint64(address)
    loaded = _Loaded(program, variables, constants)
    _loaded[key] = loaded
    return loaded


def sm_count(arch: int) -> int:
    """SMs of the architecture's full-size GPU."""
    return 148 if 100 <= arch < 120 else 132


class Engine:
    """Runs launch records under one set of options."""

    def __init__(self, options: EngineOptions | None = None):
        self.options = options or EngineOptions()

    def run(self, record: LaunchRecord) -> LaunchReport:
        """Runs a launch to its end. Raises an EmulatorError where the kernel does what it may not."""
        loaded = load(record.ptx, record.entry)
        program = loaded.program
        if len(record.params) < program.parameter_bytes:
            raise ValueError(
                f"{record.entry}: {len(record.params)} bytes of parameters, {program.parameter_bytes} expected"
            )
        for axis, (cells, step) in enumerate(zip(record.grid, record.cluster, strict=True)):
            if step < 1 or cells % step:
                raise ValueError(
                    f"{record.entry}: grid {record.grid} is no multiple of cluster {record.cluster} in axis {axis}"
                )
        if int(np.prod(record.grid)) == 0:
            return _report(record, Counts.of(program, *_counters(record, program)), _Totals(), 0.0)
        if int(np.prod(record.block)) > 32 * MAX_WARPS:
            raise ValueError(f"{record.entry}: block {record.block} has more than {32 * MAX_WARPS} threads")
        params = _aligned(max(len(record.params), 1))
        params[: len(record.params)] = np.frombuffer(record.params, np.uint8)
        constants = loaded.constants.copy()
        for row in program.param_constants:
            constants[row]["value"] += np.uint64(params.ctypes.data)
        specials = program.specials.copy()
        dynamic_start = -(-program.shared_bytes // program.shared_align) * program.shared_align
        for row in program.dynamic_offset_specials:
            specials[row]["value"] += np.uint32(dynamic_start)
        shared_bytes = dynamic_start + record.dynamic_smem if record.dynamic_smem else program.shared_bytes
        allocations = [Allocation(params.ctypes.data, len(record.params), "kernel parameters", False)]
        allocations += [allocation for _, allocation in loaded.variables]
        allocations += record.allocations
        return self._launch(record, program, constants, specials, allocations, shared_bytes)

    def _launch(self, record, program, constants, specials, allocations, shared_bytes) -> LaunchReport:
        library = core_library()
        ordered = sorted(allocations, key=lambda allocation: allocation.address)
        table = (_Allocation * len(ordered))(
            *[_Allocation(x.address, x.size, int(x.writable), 0, x.name.encode()) for x in ordered]
        )
        names = (ctypes.c_char_p * (len(program.unknown) + 1))(*[name.encode() for name in program.unknown], None)
        arch = int("".join(c for c in record.arch.removeprefix("sm_") if c.isdigit()))
        checks = self.options.check_names()
        geometry = (ctypes.c_uint32 * 9)(*record.grid, *record.block, *record.cluster)
        numbers = (ctypes.c_int64 * 12)(
            len(program.code),
            len(constants),
            len(specials),
            program.slots,
            program.local_bytes,
            len(ordered),
            shared_bytes,
            record.dynamic_smem,
            self.options.sms or sm_count(arch),
            arch,
            SCHEDULES.index(self.options.schedule),
            sum(1 << CHECKS.index(name) for name in checks),
        )
        totals, lines = _Totals(), (ctypes.c_int32 * 2)()
        tables = race_tables(program) if "races" in checks else RaceTables()
        executed, skipped = _counters(record, program)
        message = ctypes.create_string_buffer(16384)
        started = time.perf_counter()
        kind = library.engine_launch(
            *(ctypes.c_void_p(array.ctypes.data) for array in (program.code, program.pool, constants, specials)),
            names,
            table,
            geometry,
            numbers,
            ctypes.c_uint64(self.options.seed),
            ctypes.byref(totals),
            ctypes.c_void_p(executed.ctypes.data),
            ctypes.c_void_p(skipped.ctypes.data),
            ctypes.byref(tables),
            message,
            ctypes.c_int64(len(message)),
            lines,
        )
        elapsed = time.perf_counter() - started
        if kind:
            raise _error(record, FAULTS[kind], message.value.decode(errors="replace"), *lines)
        return _report(record, Counts.of(program, executed, skipped), totals, elapsed)


def _error(record: LaunchRecord, kind: type[EngineError], message: str, line: int, other_line: int) -> EngineError:
    """With the kernel's name, and the lines of PTX that it is about."""
    where = f"kernel {record.entry}" + (f", PTX line {line}" if line else "")
    texts = record.ptx.splitlines()
    told = [f"\n  PTX line {n}: {texts[n - 1].strip()[:160]}" for n in (line, other_line) if other_line and n]
    error = kind(f"{where}: {message}{''.join(told)}", record.entry, line)
    if isinstance(error, Race):
        error.other_line = other_line
    return error


def _counters(record: LaunchRecord, program: Program) -> np.ndarray:
    """(2, warps of a CTA, rows of the program): how often each was executed, and skipped."""
    warps = -(-int(np.prod(record.block)) // 32)
    return np.zeros((2, warps, len(program.code)), np.int64)


def _report(record: LaunchRecord, counts: Counts, totals: _Totals, elapsed: float) -> LaunchReport:
    executions = counts.executed.sum(axis=0).tolist()
    costs = [cost(instruction.opcode) for _, instruction in counts.program.source]
    exponentials = sum(n * c.exponential for n, c in zip(executions, costs, strict=True))
    return LaunchReport(
        kernel=record.entry,
        arch=record.arch,
        grid=record.grid,
        block=record.block,
        cluster=record.cluster,
        ctas=totals.ctas,
        instructions=[dict(zip(CLASSES, warp, strict=True)) for warp in counts.by_class().tolist()],
        skipped=counts.skipped.sum(axis=1).tolist(),
        retried=counts.retried.sum(axis=1).tolist(),
        names=counts.by_name(),
        roles={warps_label(warps): list(warps) for warps in counts.alike()},
        special_operations=exponentials + sum(n * c.special for n, c in zip(executions, costs, strict=True)),
        exponentials=exponentials,
        fma_operations=sum(n * c.fma for n, c in zip(executions, costs, strict=True)),
        mma_multiply_adds=totals.mma_flops,
        mma_cycles=totals.mma_cycles_x16 / 16 * BASE_RATE / rates(record.arch).multiply_adds,
        tma_load_bytes=totals.tma_load_bytes,
        tma_store_bytes=totals.tma_store_bytes,
        tma_reduce_bytes=totals.tma_reduce_bytes,
        global_load_bytes=totals.global_load_bytes,
        global_store_bytes=totals.global_store_bytes,
        shared={kind: SharedTraffic(*totals.shared[k]) for k, kind in enumerate(SHARED_ACCESSES)},
        deferred_operations=totals.deferred_operations,
        seconds=elapsed,
    )
