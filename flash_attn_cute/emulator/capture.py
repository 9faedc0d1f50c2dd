"""Between the DSL and the emulator: what was compiled, what was loaded, and each launch as a LaunchRecord.

The DSL's host code runs for real against host/runtime.c, which calls the methods here. An exception cannot pass through
C, so one is kept and raised when control is back in Python: after a plain call by the DSL's executor, and in place of
the error that tvm-ffi raises after a tvm-ffi call.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flash_attn_cute.emulator import build, parameters
from flash_attn_cute.emulator.devices import Device
from flash_attn_cute.emulator.graphs import Graphs
from flash_attn_cute.emulator.launch import EmulatorError, LaunchRecord
from flash_attn_cute.emulator.memory import Memory
from flash_attn_cute.emulator.modules import Modules, read_image

_HOST = Path(__file__).parent / "host"
_SUCCESS, _INVALID_VALUE, _LAUNCH_FAILURE, _COOPERATIVE_LAUNCH_TOO_LARGE = 0, 1, 719, 720
_CLUSTER_LIMIT = 16  # CTAs; beyond 8 a kernel has to ask, and what it asks is not looked at

_pointer, _handle_out = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
_triple = ctypes.POINTER(ctypes.c_uint32)


def _callback(*arguments: Any, result: Any = ctypes.c_int) -> Any:
    return ctypes.CFUNCTYPE(result, *arguments)


class _Callbacks(ctypes.Structure):
    """As in host/runtime.c."""

    _fields_ = [
        ("load_library", _callback(_pointer, _handle_out)),
        ("unload_library", _callback(_pointer)),
        ("get_kernel", _callback(_pointer, ctypes.c_char_p, _handle_out)),
        (
            "launch",
            _callback(_pointer, *[_triple] * 3, ctypes.c_uint64, ctypes.c_int, ctypes.POINTER(_pointer)),
        ),
        ("kernel_attribute", _callback(_pointer, ctypes.c_int, ctypes.POINTER(ctypes.c_int))),
        ("device_attribute", _callback(ctypes.c_int, ctypes.POINTER(ctypes.c_int))),
        ("allocated", _callback(_pointer, ctypes.c_uint64, result=None)),
        ("freed", _callback(_pointer, result=None)),
        ("unsupported", _callback(ctypes.c_char_p, result=None)),
    ]


@functools.cache
def host_library() -> Path:
    return build.shared_library(
        "emulator_host", [_HOST / name for name in ("runtime.c", "dlpack.c", "tensor_map.c")], ("-O2", "-lpthread")
    )


class Capture:
    """One a process: the DSL binds to the runtime library once, when it is imported.

    `device` and `execute` say what the launches of the session in progress run on; without one a launch is an error.
    """

    def __init__(self, library: Path):
        self.host = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.modules = Modules(build.cache_directory("ptx"))
        self.memory = Memory(self.host)
        self.device: Device | None = None
        self.execute: Callable[[LaunchRecord], None] | None = None
        self.graphs = Graphs(lambda record: self.execute(record))
        self.failure: BaseException | None = None
        # Handles are positions, from 1 on: 0 is a null pointer.
        self._images: list[bytes] = []
        self._kernels: list[tuple[int, str]] = []
        self._connect()

    def raise_failure(self) -> None:
        """Raises what a callback had to keep, once."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def take_failure(self, message: str) -> BaseException:
        """What was kept, or else an error with this message."""
        failure, self.failure = self.failure, None
        return failure if failure is not None else EmulatorError(message)

    def _connect(self) -> None:
        names = [name for name, _ in _Callbacks._fields_]
        types = dict(_Callbacks._fields_)
        self._callbacks = _Callbacks(*(types[name](self._keeping_failure(getattr(self, f"_{name}"))) for name in names))
        self.host.emulator_connect(ctypes.byref(self._callbacks))

    def _keeping_failure(self, method: Callable) -> Callable:
        def call(*arguments):
            try:
                return method(*arguments)
            except BaseException as error:  # noqa: BLE001 - an interrupt has to get through C as well
                # The first one: what follows it, in host code that ignores a status, follows from it.
                self.failure = self.failure or error
                return _LAUNCH_FAILURE

        return call

    # --- called from C ---

    def _load_library(self, image: int, library: Any) -> int:
        self._images.append(read_image(image))
        library[0] = len(self._images)
        return _SUCCESS

    def _unload_library(self, library: int) -> int:
        return _SUCCESS

    def _get_kernel(self, library: int, name: bytes, kernel: Any) -> int:
        self._kernels.append((library, name.decode()))
        kernel[0] = len(self._kernels)
        return _SUCCESS

    def _launch(
        self, kernel: int, grid: Any, block: Any, cluster: Any, dynamic_smem: int, cooperative: int, arguments: Any
    ) -> int:
        if self.execute is None or self.device is None:
            raise EmulatorError("a kernel was launched outside `emulate(...)`; it can only run inside")
        ptx, entry = self._source(kernel)
        room = self.device.shared_memory_per_block_optin
        if parameters.static_shared_bytes(ptx) + dynamic_smem > room:
            raise EmulatorError(f"{entry}: asks for {dynamic_smem} dynamic bytes of shared memory, of {room} in all")
        params = _gather(parameters.layout(ptx, entry), arguments)
        record = LaunchRecord(
            ptx=ptx,
            entry=entry,
            arch=self.device.arch,
            grid=_checked(entry, "grid", grid),
            block=_checked(entry, "block", block),
            cluster=_checked(entry, "cluster", cluster),
            dynamic_smem=dynamic_smem,
            params=params,
            allocations=self.memory.of_launch(params),
        )
        if cooperative and math.prod(record.grid) > self.device.sms:
            return _COOPERATIVE_LAUNCH_TOO_LARGE  # an answer that programs ask for, so no failure of ours
        self.graphs.launch(record)
        return _SUCCESS

    def _source(self, kernel: int) -> tuple[str, str]:
        """The module's PTX and the entry's name."""
        library, entry = self._kernels[kernel - 1]
        return self.modules.find(self._images[library - 1]), entry

    def _kernel_attribute(self, kernel: int, number: int, value: Any) -> int:
        ptx, _ = self._source(kernel)
        answers = {0: 1024, 1: parameters.static_shared_bytes(ptx), 2: 0, 3: 0, 5: 90, 6: 90}
        if number not in answers:
            return _INVALID_VALUE
        value[0] = answers[number]
        return _SUCCESS

    def _device_attribute(self, number: int, value: Any) -> int:
        answer = self.device.attribute(number) if self.device else None
        if answer is None:
            return _INVALID_VALUE
        value[0] = answer
        return _SUCCESS

    def _allocated(self, address: int, size: int) -> None:
        self.memory.allocated(address, size)

    def _freed(self, address: int) -> None:
        self.memory.freed(address)

    def _unsupported(self, function: bytes) -> None:
        raise EmulatorError(f"{function.decode()} is not emulated")


def _gather(layout: parameters.Layout, arguments: Any) -> bytes:
    params = bytearray(layout.size)
    for parameter, source in zip(layout.parameters, arguments, strict=False):
        params[parameter.offset : parameter.offset + parameter.size] = ctypes.string_at(source, parameter.size)
    return bytes(params)


def _checked(entry: str, what: str, triple: Any) -> tuple[int, int, int]:
    found = (triple[0], triple[1], triple[2])
    limit = {"block": 1024, "cluster": _CLUSTER_LIMIT}.get(what)
    count = found[0] * found[1] * found[2]
    if count == 0 or (limit and count > limit):
        raise EmulatorError(
            f"{entry}: launched with {what} {found}; takes at least 1 and at most {limit or 'any number'}"
        )
    return found


def hook_dsl(capture: Capture, directory: Path) -> None:
    """Has the DSL hand over what it compiles, by way of files in `directory`, and raise what a launch kept.

    Imports the DSL. Its environment variables for keeping PTX would do as well, but turn its cache in the process off.
    """
    import tvm_ffi
    from cutlass.base_dsl import compiler, jit_executor

    apply_settings = compiler.CompileOptions.apply_envar_settings

    def keep_artifacts(self, *args, **kwargs):
        self.options[compiler.KeepPTX].value = self.options[compiler.KeepCUBIN].value = True
        if not self.options[compiler.DumpDir].value:
            self.options[compiler.DumpDir].value = str(directory)
        apply_settings(self, *args, **kwargs)

    compiler.CompileOptions.apply_envar_settings = keep_artifacts

    artifacts = jit_executor.JitFunctionArtifacts
    read_artifacts = artifacts.__post_init__

    def post_init(self):
        read_artifacts(self)
        if isinstance(self.CUBIN, bytes) and self.PTX:
            capture.modules.add(self.CUBIN, self.PTX)

    artifacts.__post_init__ = post_init
    for executor in (jit_executor.JitExecutor, jit_executor.JitCompiledFunction):
        executor.run_compiled_program = _raising_after(executor.run_compiled_program, capture)

    class Kept(EmulatorError):
        """tvm-ffi makes one from a message; it gets the exception that was kept instead."""

        def __new__(cls, message):
            return capture.take_failure(message)

    tvm_ffi.register_error("EmulatorError", Kept)


def _raising_after(method: Callable, capture: Capture) -> Callable:
    @functools.wraps(method)
    def run(*args, **kwargs):
        try:
            return method(*args, **kwargs)
        finally:
            capture.raise_failure()

    return run
