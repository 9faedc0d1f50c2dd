"""From a @cute.jit host function to one that takes torch tensors, through tvm-ffi."""

from collections.abc import Callable, Iterable
from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from torch import Tensor

ELEMENTS = {
    torch.float32: cutlass.Float32,
    torch.float16: cutlass.Float16,
    torch.bfloat16: cutlass.BFloat16,
    torch.float8_e4m3fn: cutlass.Float8E4M3FN,
    torch.float8_e5m2: cutlass.Float8E5M2,
    torch.int64: cutlass.Int64,
    torch.int32: cutlass.Int32,
    torch.int16: cutlass.Int16,
    torch.uint8: cutlass.Uint8,
    torch.int8: cutlass.Int8,
}


def compile_host(host: Callable, tensors: Iterable[Tensor], *constants: Any) -> Callable[..., None]:
    """Compiles host(*tensors, stream, *constants) for tensors of exactly these shapes and strides.

    The result takes the tensors alone and launches on torch's current stream. `constants` are Constexpr parameters.
    """
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(host, *(fake(tensor) for tensor in tensors), stream, *constants, options="--enable-tvm-ffi")


def fake(tensor: Tensor):
    """A stand-in for a tensor at compile time. 16 bytes of alignment: what torch gives, and TMA needs."""
    return cute.runtime.make_fake_tensor(
        ELEMENTS[tensor.dtype], tuple(tensor.shape), stride=tuple(tensor.stride()), assumed_align=16
    )
