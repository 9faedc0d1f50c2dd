"""cuda-bindings for a program that runs in the emulator: `cuda.bindings.driver` and `cuda.bindings.runtime`.

Both return (status, values...). Names are given here without their cu or cuda prefix, for many functions are the same
in both. Any other function of theirs raises, by its name.
"""

from __future__ import annotations

import ctypes
import itertools
import time
import types
from collections.abc import Callable
from typing import Any

from flash_attn_cute.emulator import devices
from flash_attn_cute.emulator.capture import Capture
from flash_attn_cute.emulator.launch import EmulatorError
from flash_attn_cute.emulator.memory import Memory
from flash_attn_cute.emulator.patching import Patches

_MEMORY_ALIGNMENT = 256
_handles = itertools.count(0x2000, 16)


class _HostMemory:
    """What cuMemAlloc and its like give out: host memory that the program frees itself."""

    def __init__(self, memory: Memory):
        self._memory = memory
        self._buffers: dict[int, Any] = {}

    def allocate(self, size: int) -> int:
        buffer = ctypes.create_string_buffer(size + _MEMORY_ALIGNMENT)
        address = -(-ctypes.addressof(buffer) // _MEMORY_ALIGNMENT) * _MEMORY_ALIGNMENT
        self._buffers[address] = buffer
        self._memory.allocated(address, size)
        return address

    def free(self, address: Any, *stream: Any) -> None:
        self._memory.freed(int(address))
        self._buffers.pop(int(address), None)


def _address(where: Any) -> int:
    """An address from an int, a CUdeviceptr or a buffer."""
    if isinstance(where, (bytes, bytearray, memoryview)) or hasattr(where, "__buffer__"):
        return ctypes.addressof(ctypes.c_char.from_buffer(where))
    return int(where)


def _copy(target: Any, source: Any, size: int, *rest: Any) -> None:
    if isinstance(source, bytes):
        ctypes.memmove(_address(target), source, size)
    else:
        ctypes.memmove(_address(target), _address(source), size)


def _fill(unit: int) -> Callable:
    def fill(target: Any, value: int, count: int, *stream: Any) -> None:
        pattern = (value & ((1 << 8 * unit) - 1)).to_bytes(unit, "little")
        ctypes.memmove(_address(target), pattern * count, unit * count)

    return fill


def _nothing(*args: Any) -> None:
    return None


class _Refused(Exception):
    """The arguments are ones that CUDA would refuse, or ask for what the device table does not have."""


class _Several(tuple):
    """More than one value to return."""

    def __new__(cls, *values: Any):
        return super().__new__(cls, values)


def _attribute(gpu: devices.Device) -> Callable:
    def read(attribute: Any, device: Any = 0) -> int:
        value = gpu.attribute(int(attribute))
        if value is None:
            raise _Refused
        return value

    return read


class _Events:
    def __init__(self):
        self._moments: dict[int, float] = {}

    def record(self, event: Any, *stream: Any) -> None:
        self._moments[int(event)] = time.perf_counter()

    def elapsed(self, start: Any, end: Any) -> float:
        return 1e3 * (self._moments[int(end)] - self._moments[int(start)])


def _shared(gpu: devices.Device) -> dict[str, Callable]:
    """What driver and runtime both have, under the names that they share."""
    events = _Events()
    return {
        "DriverGetVersion": lambda: devices.DRIVER_VERSION,
        "DeviceGetAttribute": _attribute(gpu),
        "StreamSynchronize": _nothing,
        "StreamDestroy": _nothing,
        "StreamQuery": _nothing,
        "StreamWaitEvent": _nothing,
        "EventRecord": events.record,
        "EventSynchronize": _nothing,
        "EventQuery": _nothing,
        "EventElapsedTime": events.elapsed,
        "EventDestroy": _nothing,
        "LibraryUnload": _nothing,
        "ProfilerStart": _nothing,
        "ProfilerStop": _nothing,
    }


def _driver(gpu: devices.Device, memory: _HostMemory, module: types.ModuleType) -> dict[str, Callable]:
    sms = gpu.sms

    def handle(kind: str) -> Callable:
        return lambda *args: getattr(module, kind)(next(_handles))

    def clusters(kernel: Any, config: Any) -> int:
        for attribute in config.attrs or []:
            if attribute.id == module.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION:
                size = attribute.value.clusterDim
                return max(sms // (size.x * size.y * size.z), 1)
        return sms

    return {
        "Init": _nothing,
        "DeviceGet": lambda ordinal: module.CUdevice(ordinal),
        "DeviceGetCount": lambda: 1,
        "DeviceGetName": lambda length, device: gpu.name.encode(),
        "DeviceTotalMem": lambda device: gpu.memory,
        "DevicePrimaryCtxRetain": handle("CUcontext"),
        "DevicePrimaryCtxRelease": _nothing,
        "CtxCreate": handle("CUcontext"),
        "CtxDestroy": _nothing,
        "CtxGetCurrent": handle("CUcontext"),
        "CtxSetCurrent": _nothing,
        "CtxPushCurrent": _nothing,
        "CtxPopCurrent": handle("CUcontext"),
        "CtxGetDevice": lambda: module.CUdevice(0),
        "CtxSynchronize": _nothing,
        "StreamCreate": handle("CUstream"),
        "StreamCreateWithPriority": handle("CUstream"),
        "StreamIsCapturing": lambda stream: module.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE,
        "EventCreate": handle("CUevent"),
        "LibraryLoadData": handle("CUlibrary"),
        "LibraryGetKernel": handle("CUkernel"),
        "LibraryEnumerateKernels": lambda count, library: [handle("CUkernel")() for _ in range(count)],
        "KernelGetFunction": handle("CUfunction"),
        "KernelSetAttribute": _nothing,
        "FuncSetAttribute": _nothing,
        "OccupancyAvailableDynamicSMemPerBlock": lambda *args: gpu.shared_memory_per_block_optin,
        "OccupancyMaxActiveBlocksPerMultiprocessor": lambda *args: 1,
        "OccupancyMaxActiveClusters": clusters,
        "MemAlloc": lambda size: module.CUdeviceptr(memory.allocate(size)),
        "MemAllocAsync": lambda size, stream: module.CUdeviceptr(memory.allocate(size)),
        "MemFree": memory.free,
        "MemFreeAsync": memory.free,
        **{f"Memcpy{way}{mode}": _copy for way in ("", "HtoD", "DtoH", "DtoD") for mode in ("", "Async")},
        **{f"MemsetD{8 * unit}{mode}": _fill(unit) for unit in (1, 2, 4) for mode in ("", "Async")},
    }


def _tensor_map(capture: Capture, module: types.ModuleType) -> Callable:
    def encode(type_, rank, address, dimensions, strides, box, element_strides, interleave, swizzle, promotion, fill):
        tensor_map = module.CUtensorMap()
        words = ctypes.create_string_buffer(128)
        status = capture.host._cuTensorMapEncodeTiled(
            words,
            int(type_),
            int(rank),
            ctypes.c_void_p(int(address)),
            (ctypes.c_uint64 * 5)(*map(int, dimensions)),
            (ctypes.c_uint64 * 5)(*map(int, strides)),
            (ctypes.c_uint32 * 5)(*map(int, box)),
            (ctypes.c_uint32 * 5)(*map(int, element_strides)),
            *map(int, (interleave, swizzle, promotion, fill)),
        )
        if status:
            raise _Refused
        ctypes.memmove(tensor_map.getPtr(), words, 128)
        return tensor_map

    return encode


def _graphs(capture: Capture, module: types.ModuleType) -> dict[str, Callable]:
    """Only in the runtime's form, which is what the DSL's benchmarking uses."""
    graphs, status = capture.graphs, module.cudaStreamCaptureStatus

    def nodes(graph: Any, count: int = 0) -> Any:
        size = graphs.size(int(graph))
        return _Several([module.cudaGraphNode_t(i + 1) for i in range(min(count, size))], size)

    def is_capturing(stream: Any) -> Any:
        return status.cudaStreamCaptureStatusActive if graphs.capturing else status.cudaStreamCaptureStatusNone

    return {
        "StreamBeginCapture": lambda stream, mode: graphs.begin(),
        "StreamEndCapture": lambda stream: module.cudaGraph_t(graphs.end()),
        "StreamIsCapturing": is_capturing,
        "GraphGetNodes": nodes,
        "GraphInstantiate": lambda graph, flags=0: module.cudaGraphExec_t(int(graph)),
        "GraphLaunch": lambda graph, stream: graphs.replay(int(graph)),
        "GraphDestroy": _nothing,
        "GraphExecDestroy": _nothing,
    }


def _runtime(gpu: devices.Device, memory: _HostMemory, module: types.ModuleType) -> dict[str, Callable]:
    def handle(kind: str) -> Callable:
        return lambda *args: getattr(module, kind)(next(_handles))

    return {
        "GetDevice": lambda: 0,
        "SetDevice": _nothing,
        "GetDeviceCount": lambda: 1,
        "DeviceSynchronize": _nothing,
        "GetLastError": _nothing,
        "PeekAtLastError": _nothing,
        "RuntimeGetVersion": lambda: devices.DRIVER_VERSION,
        "StreamCreate": handle("cudaStream_t"),
        "StreamCreateWithFlags": handle("cudaStream_t"),
        "EventCreate": handle("cudaEvent_t"),
        "EventCreateWithFlags": handle("cudaEvent_t"),
        "OccupancyMaxActiveBlocksPerMultiprocessor": lambda *args: 1,
        "Malloc": memory.allocate,
        "MallocAsync": lambda size, stream: memory.allocate(size),
        "Free": memory.free,
        "FreeAsync": memory.free,
        "Memcpy": _copy,
        "MemcpyAsync": _copy,
        "Memset": _fill(1),
        "MemsetAsync": _fill(1),
    }


# Answered by cuda-bindings itself without a driver, or questions about errors that do not occur here.
_LEFT = {"GetErrorName", "GetErrorString"}


def install(patches: Patches, gpu: devices.Device, capture: Capture) -> None:
    from cuda.bindings import driver, runtime

    memory = _HostMemory(capture.memory)
    shared = _shared(gpu)
    answers = shared | _driver(gpu, memory, driver) | {"TensorMapEncodeTiled": _tensor_map(capture, driver)}
    status, failure = driver.CUresult.CUDA_SUCCESS, driver.CUresult.CUDA_ERROR_INVALID_VALUE
    _install(patches, driver, "cu", answers, status, failure)
    answers = shared | _runtime(gpu, memory, runtime) | _graphs(capture, runtime)
    status, failure = runtime.cudaError_t.cudaSuccess, runtime.cudaError_t.cudaErrorInvalidValue
    _install(patches, runtime, "cuda", answers, status, failure)


def _install(
    patches: Patches, module: Any, prefix: str, answers: dict[str, Callable], status: Any, failure: Any
) -> None:
    for name, function in list(vars(module).items()):
        plain = name.removeprefix(prefix)
        if plain == name or not plain[:1].isupper() or isinstance(function, type) or not callable(function):
            continue
        if plain in answers:
            patches.set(module, name, _with_status(answers[plain], status, failure))
        elif plain not in _LEFT:
            patches.set(module, name, _refusal(name))


def _with_status(answer: Callable, status: Any, failure: Any) -> Callable:
    def call(*args, **kwargs):
        try:
            value = answer(*args, **kwargs)
        except _Refused:
            return (failure, None)
        if isinstance(value, _Several):
            return (status, *value)
        return (status,) if value is None else (status, value)

    return call


def _refusal(name: str) -> Callable:
    def refuse(*args, **kwargs):
        raise EmulatorError(f"{name} of cuda-bindings is not emulated")

    return refuse
