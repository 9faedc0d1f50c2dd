"""A kernel, its arguments and what it must leave in them."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.emulated.kernels.random_integers import RandomIntegers

# What outputs hold before a launch: exact in every type of 16 bits or more, and no result of any kernel here.
UNWRITTEN = -77.0


@dataclass(frozen=True)
class Case:
    """One launch. Equal bits are asked for, unless `tolerance` allows an error relative to the largest output."""

    name: str
    build: Callable[[], Callable[..., None]]  # the compiled kernel, which takes the tensors in order
    tensors: Callable[[RandomIntegers], tuple[Tensor, ...]]  # on the CPU; outputs last, as they are before the launch
    reference: Callable[..., tuple[Tensor, ...]]  # of the same tensors: what the outputs hold afterwards
    tolerance: float = 0.0

    def arguments(self) -> tuple[Tensor, ...]:
        """The same bits wherever and whenever this is called."""
        return self.tensors(RandomIntegers(zlib.crc32(self.name.encode())))

    def expected(self) -> tuple[Tensor, ...]:
        return self.reference(*self.arguments())

    def run(self, device: str = "cuda") -> tuple[Tensor, ...]:
        """Launches on `device` and returns the outputs on the CPU."""
        arguments = [tensor.to(device, copy=True) for tensor in self.arguments()]
        self.build()(*arguments)
        if device == "cuda":
            torch.cuda.synchronize()
        outputs = arguments[len(arguments) - len(self.expected()) :]
        return tuple(output.cpu() for output in outputs)

    def check(self, outputs: tuple[Tensor, ...]) -> None:
        """Raises AssertionError where outputs are not what the reference says, with the first difference."""
        for index, (output, expected) in enumerate(zip(outputs, self.expected(), strict=True)):
            message = difference(output, expected, self.tolerance)
            assert message is None, f"{self.name}, output {index}: {message}"


def difference(output: Tensor, expected: Tensor, tolerance: float = 0.0) -> str | None:
    """What is wrong with `output`, or None. With no tolerance the bits have to agree, but for which NaN it is."""
    if output.shape != expected.shape or output.dtype != expected.dtype:
        return f"{tuple(output.shape)} of {output.dtype}, not {tuple(expected.shape)} of {expected.dtype}"
    if tolerance == 0.0:
        wrong = (as_bits(output) != as_bits(expected)) & ~(is_nan(output) & is_nan(expected))
    else:
        scale = expected.double().abs().nan_to_num(0.0, 0.0, 0.0).max()
        wrong = ~((output.double() - expected.double()).abs() <= tolerance * scale)
        wrong &= as_bits(output) != as_bits(expected)
    if not wrong.any():
        return None
    first = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements differ, first {first}: "
        f"{output[first].item()} is not {expected[first].item()}"
    )


def as_bits(tensor: Tensor) -> Tensor:
    """The same bits as integers."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(integer)


def is_nan(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=torch.bool)
    return tensor.float().isnan()


def integers(generator: RandomIntegers, shape, dtype: torch.dtype, low: int = -8, high: int = 8) -> Tensor:
    """Random integers of [low, high] in `dtype`: sums of their products are exact in fp32, whatever the order."""
    return generator.draw(shape, low, high).to(dtype)


def unwritten(shape, dtype: torch.dtype) -> Tensor:
    """An output as it is before a launch."""
    return torch.full(tuple(shape), UNWRITTEN if dtype.is_signed else 77, dtype=dtype)
