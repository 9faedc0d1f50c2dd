"""What a PTX instruction costs a streaming multiprocessor: its class, and what it asks of units that attention needs.

Classes: tensor (wgmma, mma, tcgen05.mma, tcgen05.cp), special (the special-function unit), fma (floating-point adds,
products and fused ones), integer (integers, comparisons, selections, min, max), convert (cvt), move (mov, packing and
cvta), memory (loads, stores, atomics, ldmatrix, TMA, tensor memory), barrier (mbarriers, named barriers, fences,
commits and waits), control (branches, exchange between lanes, and what is left).
"""

from __future__ import annotations

from dataclasses import dataclass

CLASSES = ("tensor", "special", "fma", "integer", "convert", "move", "memory", "barrier", "control")
SCHEDULERS = 4  # of an SM; each issues one warp-instruction a clock
WARP = 32

_SPECIAL = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div")
_FMA = ("add", "sub", "mul", "fma", "mad")


@dataclass(frozen=True)
class Rates:
    """What one SM does in a clock, in operations of single lanes."""

    multiply_adds: int  # dense, of 16-bit operands, by the tensor cores
    special: int
    exponential: int
    fma: int


def rates(arch: str) -> Rates:
    """The rates of an architecture ("sm_90a", "sm_100a", "sm_103a").

    Tensor cores: from the published dense rates. H100 SXM: 989 TFLOP/s on 132 SMs at 1.83 GHz is 2048 multiply-adds;
    B200: 2.25 PFLOP/s on 148 SMs at 1.86 GHz is 4096; A100: 312 TFLOP/s on 108 SMs at 1.41 GHz is 1024. Eight-bit
    operands double the rate, tf32 halves it.

    Special functions: 16 on Hopper and on B200 (the throughput table of the CUDA programming guide; FlashAttention-4,
    Zadouri et al., 2026, on both). sm_103 doubles MUFU.EX2 (NVIDIA, "Making softmax more efficient with Blackwell
    Ultra", 2026: measured GB300 against GB200); that the other functions stay at 16 there is an assumption.

    FMA: 128 fp32 lanes on all of them (67 TFLOP/s on an H100's 132 SMs at 1.98 GHz). A packed f32x2 instruction is two
    lanes' work for each of its own: it saves issue slots, not lanes.
    """
    number = int("".join(c for c in arch.removeprefix("sm_") if c.isdigit()))
    blackwell = 100 <= number < 120
    multiply_adds = 4096 if blackwell else 2048 if number == 90 else 1024
    return Rates(multiply_adds, special=16, exponential=32 if number == 103 else 16, fma=128)


@dataclass(frozen=True)
class Cost:
    """Operations that each lane of one instruction asks of a unit."""

    special: int = 0  # other than exponentials
    exponential: int = 0
    fma: int = 0


def cost(opcode: tuple[str, ...]) -> Cost:
    """The cost of a PTX instruction, given as ("fma", "rn", "ftz", "f32x2").

    Each special function is one operation a number, also where the compiler surrounds it with others (division,
    precise square roots, exponentials without ftz). Packed 16-bit products are one FMA, for two go through one lane;
    fp64 has a pipe of its own and integer multiply-adds are not counted, though the FMA pipe executes them.
    """
    root, kind = opcode[0], opcode[-1]
    if root in _SPECIAL and kind.lstrip("bf")[:2] in ("16", "32"):
        numbers = 2 if kind.endswith("x2") else 1
        return Cost(exponential=numbers) if root == "ex2" else Cost(special=numbers)
    if root in _FMA and kind.startswith(("f16", "f32", "bf16")):
        return Cost(fma=2 if kind == "f32x2" else 1)
    return Cost()
