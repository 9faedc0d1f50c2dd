"""Tensors that are said to be on a CUDA device and lie in host memory.

Every tensor is a CPU tensor. One that the program put "on cuda" carries a mark, and so does what is computed from it;
`device`, `is_cuda`, `to`, `cpu`, `cuda` and the factories answer and act by the mark. Crossing between the two copies,
as it does on a GPU: otherwise a kernel would change a tensor that the program kept on the host to compare with.

The mark is on the Python object, which torch keeps as long as the tensor lives. A function mode passes it on; code that
torch calls below the mode (the body of a custom operator) sees every tensor as a CUDA tensor.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flash_attn_cute.emulator.capture import Capture
from flash_attn_cute.emulator.captured_operations import Recorder
from flash_attn_cute.emulator.memory import Memory
from flash_attn_cute.emulator.patching import Patches

CUDA = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_MARK = "_emulated_on_cuda"
_DLPACK_CUDA = 2
_CUDA_ALIGNMENT = 256

_below_mode = threading.local()


def on_cuda(tensor: Tensor) -> bool:
    return _MARK in tensor.__dict__ or getattr(_below_mode, "depth", 0) > 0


def mark(value: Any, cuda: bool = True) -> Any:
    """Puts a tensor, or each of a sequence, on CUDA or takes it off; returns the value."""
    if isinstance(value, Tensor):
        if cuda:
            value.__dict__[_MARK] = True
        else:
            value.__dict__.pop(_MARK, None)
    elif isinstance(value, (tuple, list)):
        for item in value:
            mark(item, cuda)
    elif isinstance(value, dict):
        mark(list(value.values()), cuda)
    return value


def _created(value: Any) -> Any:
    """Marks what was made on CUDA, and moves it to memory that is aligned as CUDA's: kernels count on it."""
    for tensor in _tensors(value):
        if _MARK not in tensor.__dict__:
            mark(tensor)
            if _has_memory(tensor):
                _align(tensor)
    return value


def _align(tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if size == 0 or storage.data_ptr() % _CUDA_ALIGNMENT == 0:
        return
    with torch._C.DisableTorchFunction(), torch.no_grad():
        buffer = bytearray(size + _CUDA_ALIGNMENT)
        skip = -torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage().data_ptr() % _CUDA_ALIGNMENT
        # The new storage keeps the buffer.
        aligned = torch.frombuffer(memoryview(buffer)[skip : skip + size], dtype=torch.uint8).untyped_storage()
        aligned.copy_(storage)
        _Moves.follow(lambda: aligned.copy_(storage))
        view = torch.empty(0, dtype=tensor.dtype)
        view.set_(aligned, tensor.storage_offset(), tensor.size(), tensor.stride())
        tensor.data = view


class _Moves:
    """In the capture of a graph, what fills the memory that a tensor had first has to reach what it has now."""

    @staticmethod
    def follow(move: Callable[[], None]) -> None:
        pass


def names_cuda(device: Any) -> bool:
    """Whether a device argument means a CUDA device; an index does, as in torch."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.partition(":")[0] == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


class _PassOnMark(TorchFunctionMode):
    """What is computed from a marked tensor is marked."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == _set_data:  # module.cuda() replaces the data of its parameters
            mark(args[0], _MARK in args[1].__dict__)
            return func(*args)
        _below_mode.depth = getattr(_below_mode, "depth", 0) + 1
        try:
            result = func(*args, **kwargs)
        finally:
            _below_mode.depth -= 1
        if result is not None and not isinstance(result, (bool, int, float, str)):
            given = list(_tensors((args, kwargs)))
            if any(_MARK in tensor.__dict__ for tensor in given):
                known = {id(tensor) for tensor in given}
                memory = {_memory(tensor) for tensor in given}
                for tensor in _tensors(result):
                    if id(tensor) not in known:
                        # A view stays where it is.
                        mark(tensor) if _memory(tensor) in memory else _created(tensor)
        return result


_set_data = Tensor.data.__set__


def _has_memory(tensor: Tensor) -> bool:
    """Not for fake tensors and other subclasses, whose storage may be nothing."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta


def _memory(tensor: Tensor) -> int | None:
    return tensor.untyped_storage().data_ptr() if _has_memory(tensor) else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _beneath(method: Callable) -> Callable:
    """A method of Tensor, called without the mode: the mode would be given the attribute of that name, our own."""

    @functools.wraps(method)
    def call(*args, **kwargs):
        with torch._C.DisableTorchFunction():
            return method(*args, **kwargs)

    return call


def install(patches: Patches, capture: Capture) -> None:
    """Makes torch's tensors answer as described, until the patches are restored."""
    _install_attributes(patches, capture.memory)
    _install_moves(patches)
    _install_factories(patches)
    _install_dlpack(patches, capture.host)
    _install_mode(patches)
    patches.set(_Moves, "follow", lambda move: capture.graphs.record(move) if capture.graphs.capturing else None)
    # A tensor made in the body of a custom operator has no mark yet.
    capture.graphs.operations = Recorder(capture.graphs, lambda tensor: _MARK in tensor.__dict__)


def _install_attributes(patches: Patches, memory: Memory) -> None:
    read_address = _beneath(Tensor.data_ptr)

    def data_ptr(self):
        memory.escaped(self.untyped_storage())
        return read_address(self)

    real_device = _beneath(Tensor.device.__get__)

    def device(self):
        real = real_device(self)
        return CUDA if real.type == "cpu" and on_cuda(self) else real  # a meta tensor stays one

    patches.set(Tensor, "device", property(device))
    patches.set(Tensor, "is_cuda", property(lambda self: device(self).type == "cuda"))
    patches.set(Tensor, "is_cpu", property(lambda self: device(self).type == "cpu"))
    patches.set(Tensor, "get_device", lambda self: 0 if device(self).type == "cuda" else -1)
    patches.set(Tensor, "data_ptr", data_ptr)
    patches.set(Tensor, "pin_memory", lambda self, *args, **kwargs: self)
    patches.set(Tensor, "is_pinned", lambda self, *args, **kwargs: False)
    patches.set(Tensor, "record_stream", lambda self, stream: None)


def _install_moves(patches: Patches) -> None:
    convert = _beneath(Tensor.to)

    def move(tensor: Tensor, cuda: bool, args: tuple, kwargs: dict) -> Tensor:
        crossing = on_cuda(tensor) != cuda
        if crossing:
            kwargs = {**kwargs, "copy": True}
        result = convert(tensor, *args, **kwargs)
        return _created(result) if cuda else mark(result, False)

    def to(self, *args, **kwargs):
        cuda = on_cuda(self)
        if args and isinstance(args[0], Tensor):
            return move(self, on_cuda(args[0]), (args[0].dtype, *args[1:]), kwargs)
        if isinstance(kwargs.get("other"), Tensor):
            other = kwargs["other"]
            return move(self, on_cuda(other), (other.dtype,), {k: v for k, v in kwargs.items() if k != "other"})
        if args and (args[0] is None or isinstance(args[0], (str, int, torch.device))):
            device, args = args[0], (_CPU, *args[1:])
        else:
            device = kwargs.get("device")
            if device is not None:
                kwargs = {**kwargs, "device": _CPU}
        return move(self, cuda if device is None else names_cuda(device), args, kwargs)

    def to_cuda(self, device=None, non_blocking=False, memory_format=torch.preserve_format):
        return move(self, True, (_CPU,), {"memory_format": memory_format})

    def to_cpu(self, memory_format=torch.preserve_format):
        return move(self, False, (_CPU,), {"memory_format": memory_format})

    patches.set(Tensor, "to", to)
    patches.set(Tensor, "cuda", to_cuda)
    patches.set(Tensor, "cpu", to_cpu)


# Beside those that torch itself counts as factories for its default device.
_OTHER_FACTORIES = (
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "randint_like",
    "asarray",
    "as_tensor",
    "tensor",
)
_NEW_METHODS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")


def _install_factories(patches: Patches) -> None:
    from torch.utils import _device

    constructors = _device._device_constructors()
    names = {f.__name__ for f in constructors if getattr(torch, getattr(f, "__name__", ""), None) is f}
    for name in sorted(names | set(_OTHER_FACTORIES)):
        patches.set(torch, name, _factory(getattr(torch, name)))
    for name in _NEW_METHODS:
        patches.set(Tensor, name, _factory(_beneath(getattr(Tensor, name))))

    def default_device(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in constructors or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        if names_cuda(self.device):
            return _created(func(*args, **kwargs))
        return func(*args, **{**kwargs, "device": self.device})

    patches.set(_device.DeviceContext, "__torch_function__", default_device)

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls, _CPU)

    patches.set(torch, "Generator", Generator)


def _factory(create: Callable) -> Callable:
    @functools.wraps(create)
    def factory(*args, **kwargs):
        device = kwargs.get("device")
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if device is None:
            like = args[0] if args and isinstance(args[0], Tensor) else None
            result = create(*args, **kwargs)
            return _created(result) if like is not None and on_cuda(like) else result
        cuda = names_cuda(device)
        result = create(*args, **{**kwargs, "device": _CPU if cuda else device})
        if args and result is args[0] and on_cuda(result) != cuda:  # as_tensor of a tensor elsewhere
            result = result.clone()
        return _created(result) if cuda else mark(result, False)

    return factory


def _install_dlpack(patches: Patches, host: ctypes.CDLL) -> None:
    """Tensors cross as CUDA tensors, marked or not; into torch, and to numpy, they cross as what they are."""
    api = ctypes.pythonapi
    get_pointer, is_valid = api.PyCapsule_GetPointer, api.PyCapsule_IsValid
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)
    present = {b"dltensor": host.emulator_present_managed, b"dltensor_versioned": host.emulator_present_versioned}
    export, import_ = _beneath(Tensor.__dlpack__), torch.from_dlpack

    def dlpack(self, *, stream=None, **kwargs):
        capsule = export(self.detach(), **kwargs)
        if "copy" not in kwargs and "dl_device" not in kwargs:  # numpy and torch give these, the DSL and tvm-ffi do not
            for name, function in present.items():
                if is_valid(capsule, name):
                    function(ctypes.c_void_p(get_pointer(capsule, name)))
        return capsule

    def from_dlpack(source, **kwargs):
        return mark(source.detach()) if isinstance(source, Tensor) else import_(source, **kwargs)

    patches.set(Tensor, "__dlpack__", dlpack)
    patches.set(Tensor, "__dlpack_device__", lambda self: (_DLPACK_CUDA if on_cuda(self) else 1, 0))
    patches.set(torch, "from_dlpack", from_dlpack)

    # What tvm-ffi calls: a table of C functions, in a capsule.
    name = b"dlpack_exchange_api"
    original = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if original is not None:
        api.PyCapsule_New.restype = ctypes.py_object
        api.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        host.emulator_present_exchange_api.restype = ctypes.c_void_p
        table = host.emulator_present_exchange_api(ctypes.c_void_p(get_pointer(original, name)))
        patches.set(Tensor, "__dlpack_c_exchange_api__", api.PyCapsule_New(table, name, None))


def _compile_beneath(compile_: Callable) -> Callable:
    """torch.compile, with the mode set aside: its tracer would follow the mode's own code. Results count as on CUDA."""

    def wrapped(model: Callable) -> Callable:
        @functools.wraps(model)
        def call(*args, **kwargs):
            _below_mode.depth = getattr(_below_mode, "depth", 0) + 1
            try:
                with torch._C.DisableTorchFunction():
                    return mark(model(*args, **kwargs))
            finally:
                _below_mode.depth -= 1

        return call

    def compile_model(model=None, **options):
        if model is None:
            return lambda model: compile_model(model, **options)
        compiled = compile_(model, **options)
        if not isinstance(compiled, torch.nn.Module):
            return wrapped(compiled)
        compiled.forward = wrapped(compiled.forward)
        return compiled

    return compile_model


def _install_mode(patches: Patches) -> None:
    """Modes belong to a thread, so each thread that starts gets one of its own."""
    run = threading.Thread.run

    def run_in_mode(self):
        with _PassOnMark():
            run(self)

    patches.set(threading.Thread, "run", run_in_mode)
    patches.set(torch, "compile", _compile_beneath(torch.compile))
    mode = _PassOnMark()
    mode.__enter__()
    patches.on_restore(lambda: mode.__exit__(None, None, None))
