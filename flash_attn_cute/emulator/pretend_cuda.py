"""`torch.cuda` for a program that runs in the emulator: one device, one order of execution, nothing asynchronous."""

from __future__ import annotations

import contextlib
import itertools
import time
import types
from collections.abc import Callable
from typing import Any

import torch

from flash_attn_cute.emulator import devices
from flash_attn_cute.emulator.graphs import Graphs
from flash_attn_cute.emulator.launch import EmulatorError
from flash_attn_cute.emulator.patching import Patches

_handles = itertools.count(0x1000, 16)


class Stream:
    """A stream's identity. Work is done when it is submitted, so all streams are always idle."""

    def __init__(self, device: Any = None, priority: int = 0, handle: int | None = None, **kwargs):
        self.cuda_stream = next(_handles) if handle is None else handle
        self.device, self.device_index, self.priority = torch.device("cuda", 0), 0, priority

    def __cuda_stream__(self):
        return (0, self.cuda_stream)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def wait_stream(self, stream) -> None:
        pass

    def record_event(self, event=None):
        event = Event() if event is None else event
        event.record(self)
        return event

    def __enter__(self):
        self._context = use_stream(self)
        return self._context.__enter__()

    def __exit__(self, *error):
        return self._context.__exit__(*error)

    def __eq__(self, other):
        return isinstance(other, Stream) and self.cuda_stream == other.cuda_stream

    def __hash__(self):
        return hash(self.cuda_stream)


class Event:
    """A moment of host time: kernels run on the host."""

    def __init__(self, *args, **kwargs):
        self.cuda_event = next(_handles)
        self._moment: float | None = None

    def record(self, stream=None) -> None:
        self._moment = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        if self._moment is None or end._moment is None:
            raise RuntimeError("elapsed_time: both events have to be recorded")
        return 1e3 * (end._moment - self._moment)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait(self, stream=None) -> None:
        pass


class ExternalStream(Stream):
    def __init__(self, stream_ptr: int, device: Any = None, **kwargs):
        super().__init__(handle=stream_ptr)


class Device:
    """`torch.cuda.device`: there is one, so choosing it changes nothing."""

    def __init__(self, device: Any = None):
        self.idx = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


class _Streams:
    default = Stream(handle=0)
    current = default


@contextlib.contextmanager
def use_stream(stream):
    before, _Streams.current = _Streams.current, stream if stream is not None else _Streams.current
    try:
        yield stream
    finally:
        _Streams.current = before


def _set_stream(stream) -> None:
    _Streams.current = stream


def _graph_classes(graphs: Graphs) -> dict[str, Any]:
    class CUDAGraph:
        """Kernel launches and torch's own operations, to be repeated: graphs.py and captured_operations.py."""

        _handle = 0

        def capture_begin(self, *args, **kwargs) -> None:
            graphs.begin()

        def capture_end(self) -> None:
            self._handle = graphs.end()

        def replay(self) -> None:
            graphs.replay(self._handle)

        def reset(self) -> None:
            self._handle = 0

    @contextlib.contextmanager
    def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
        with use_stream(Stream() if stream is None else stream):
            cuda_graph.capture_begin()
            try:
                yield
            finally:
                cuda_graph.capture_end()

    def make_graphed_callables(*args, **kwargs):
        raise EmulatorError("torch.cuda.make_graphed_callables is not emulated: call the functions themselves")

    return {
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "make_graphed_callables": make_graphed_callables,
        "is_current_stream_capturing": lambda: graphs.capturing,
    }


def _seed(seed: int) -> None:
    """Random tensors "on CUDA" come from the CPU's generator."""
    torch.default_generator.manual_seed(seed)


def _properties(gpu: devices.Device) -> types.SimpleNamespace:
    major, minor = gpu.capability
    return types.SimpleNamespace(
        name=gpu.name,
        major=major,
        minor=minor,
        multi_processor_count=gpu.sms,
        total_memory=gpu.memory,
        L2_cache_size=gpu.l2_cache,
        warp_size=32,
        max_threads_per_block=1024,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=64 * devices.KIB,
        shared_memory_per_block=48 * devices.KIB,
        shared_memory_per_block_optin=gpu.shared_memory_per_block_optin,
        shared_memory_per_multiprocessor=gpu.shared_memory_per_sm,
        clock_rate=gpu.clock_khz,
        is_integrated=False,
        is_multi_gpu_board=False,
        gcnArchName="",
    )


def _constant(value: Any) -> Callable:
    return lambda *args, **kwargs: value


def _answers(gpu: devices.Device, graphs: Graphs) -> dict[str, Any]:
    # A function of its own for every name: torch.compile's tables hold one rule for an object.
    return {
        "is_available": _constant(True),
        "is_initialized": _constant(True),
        "is_bf16_supported": _constant(True),
        "init": _constant(None),
        "_lazy_init": _constant(None),
        "device_count": _constant(1),
        "current_device": _constant(0),
        "set_device": _constant(None),
        "device": Device,
        "device_of": type("device_of", (Device,), {}),
        "_DeviceGuard": type("_DeviceGuard", (Device,), {}),
        "get_device_capability": _constant(gpu.capability),
        "get_device_properties": _constant(_properties(gpu)),
        "get_device_name": _constant(gpu.name),
        "get_arch_list": _constant([gpu.arch]),
        "can_device_access_peer": _constant(False),
        "synchronize": _constant(None),
        "Stream": Stream,
        "ExternalStream": ExternalStream,
        "Event": Event,
        "stream": use_stream,
        "set_stream": _set_stream,
        "current_stream": lambda device=None: _Streams.current,
        "default_stream": lambda device=None: _Streams.default,
        **_graph_classes(graphs),
        "empty_cache": _constant(None),
        "ipc_collect": _constant(None),
        # torch.manual_seed calls the second, so this is not torch.manual_seed.
        "manual_seed": lambda seed: _seed(seed),
        "manual_seed_all": lambda seed: _seed(seed),
        "seed": lambda: _seed(torch.default_generator.seed()),
        "seed_all": lambda: _seed(torch.default_generator.seed()),
        "initial_seed": lambda: torch.default_generator.initial_seed(),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "mem_get_info": _constant((gpu.memory, gpu.memory)),
        "memory_allocated": _constant(0),
        "max_memory_allocated": _constant(0),
        "memory_reserved": _constant(0),
        "max_memory_reserved": _constant(0),
        "reset_peak_memory_stats": _constant(None),
        "reset_max_memory_allocated": _constant(None),
        "_sleep": _constant(None),
    }


def install(patches: Patches, gpu: devices.Device, graphs: Graphs) -> None:
    for name, answer in _answers(gpu, graphs).items():
        patches.set(torch.cuda, name, answer)
    for name in ("range_push", "range_pop", "mark"):
        patches.set(torch.cuda.nvtx, name, _constant(0))
    patches.set(torch.cuda.nvtx, "range", lambda *args, **kwargs: contextlib.nullcontext())
    patches.set(torch.version, "cuda", f"{devices.DRIVER_VERSION // 1000}.{devices.DRIVER_VERSION % 1000 // 10}")
    profile = torch.profiler.profile
    # The host's activity is recorded, whatever was asked for: no device tells of its own.
    on_host = [torch.profiler.ProfilerActivity.CPU]
    patches.set(torch.profiler, "profile", lambda activities=None, **options: profile(activities=on_host, **options))
    # How tvm-ffi and Triton ask for the current stream.
    patches.set(torch._C, "_cuda_getCurrentRawStream", lambda device=0: _Streams.current.cuda_stream)
    _install_operators(patches)


def _install_operators(patches: Patches) -> None:
    """Operators that were registered for CUDA get their tensors from the CPU here."""
    import torch.library

    def on_cpu(define: Callable) -> Callable:
        def with_device_types(*args, device_types=None, **kwargs):
            if device_types is not None:
                asked = [device_types] if isinstance(device_types, str) else device_types
                device_types = sorted({"cpu" if name == "cuda" else name for name in asked})
            return define(*args, device_types=device_types, **kwargs)

        return with_device_types

    patches.set(torch.library, "custom_op", on_cpu(torch.library.custom_op))
