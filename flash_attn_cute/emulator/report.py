"""What a launch cost, counted while it ran."""

from __future__ import annotations

from dataclasses import dataclass, field

INSTRUCTION_CLASSES = ("tensor", "special", "fma", "integer", "memory", "control")


@dataclass
class LaunchReport:
    """Counters of one launch. Warp-instructions are by the warp's index in its CTA, summed over CTAs."""

    kernel: str
    arch: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    instructions: list[dict[str, int]] = field(default_factory=list)
    mma_multiply_adds: int = 0
    mma_cycles: float = 0.0  # at the dense rate of one SM: see mma_rate
    tma_load_bytes: int = 0
    tma_store_bytes: int = 0
    global_load_bytes: int = 0
    global_store_bytes: int = 0
    shared_accesses: int = 0
    bank_conflicts: int = 0
    ctas: int = 0
    deferred_operations: int = 0
    seconds: float = 0.0

    @property
    def warp_instructions(self) -> int:
        return sum(sum(warp.values()) for warp in self.instructions)

    @property
    def instructions_a_second(self) -> float:
        return self.warp_instructions / self.seconds if self.seconds else 0.0

    @property
    def issue_cycles(self) -> float:
        """Cycles that four schedulers need to issue everything, one instruction a clock each, if work is even."""
        return self.warp_instructions / 4

    def by_class(self) -> dict[str, int]:
        return {name: sum(warp[name] for warp in self.instructions) for name in INSTRUCTION_CLASSES}

    def as_dict(self) -> dict:
        out = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**out, "by_class": self.by_class(), "issue_cycles": self.issue_cycles}


def mma_rate(arch: str) -> int:
    """Dense 16-bit multiply-adds a clock and SM, from the published dense rates.

    H100 SXM: 989 TFLOP/s on 132 SMs at 1.83 GHz is 2048. B200: 2.25 PFLOP/s on 148 SMs at 1.86 GHz is 4096. A100: 312
    TFLOP/s on 108 SMs at 1.41 GHz is 1024. Eight-bit operands double the rate, tf32 halves it.
    """
    number = int("".join(c for c in arch.removeprefix("sm_") if c.isdigit()))
    return 4096 if 100 <= number < 120 else 2048 if number == 90 else 1024
