"""What a launch cost, counted while it ran: see csrc_notes/emulator.md, Report, for how to read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from .costs import CLASSES, SCHEDULERS, WARP, rates

SHARED_ACCESSES = ("ld", "st", "ldmatrix", "stmatrix")
TILE = 128  # rows and columns of the score tile that costs are given for


@dataclass(frozen=True)
class SharedTraffic:
    """Accesses to shared memory by one kind of instruction.

    A wavefront serves one 4-byte word of each of the 32 banks. `conflicts` are the wavefronts beyond one for each pass
    (128 bytes: a whole warp at 4 bytes a lane, a quarter of it at 16) that has an active lane.
    """

    accesses: int = 0  # warp-instructions
    wavefronts: int = 0
    conflicts: int = 0


@dataclass
class LaunchReport:
    """Counters of one launch, summed over its CTAs.

    What is counted by warp is a list by the warp's index in its CTA. Cycles are of one SM that runs every CTA, each
    unit by itself, at its full rate (costs.rates); divide by the SMs used, or look at them per tile.
    """

    kernel: str
    arch: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    ctas: int = 0
    instructions: list[dict[str, int]] = field(default_factory=list)  # by warp: executed, by class
    skipped: list[int] = field(default_factory=list)  # by warp: the guard held in no lane
    retried: list[int] = field(default_factory=list)  # by warp: asking again whether a barrier's phase is over
    names: dict[str, list[int]] = field(default_factory=dict)  # by instruction, then by warp: executed
    roles: dict[str, list[int]] = field(default_factory=dict)  # warps by role; every warp has one
    special_operations: int = 0  # of warps: one is a special function of each lane
    exponentials: int = 0  # the ex2 among them
    fma_operations: int = 0  # of warps; an f32x2 instruction is two
    mma_multiply_adds: int = 0
    mma_cycles: float = 0.0
    tma_load_bytes: int = 0  # of boxes, once for a multicast, also what lies outside the tensor
    tma_store_bytes: int = 0
    tma_reduce_bytes: int = 0
    global_load_bytes: int = 0  # by loads, cp.async, atomics that return, and by TMA inside the tensor
    global_store_bytes: int = 0  # by stores, atomics, and by TMA inside the tensor
    shared: dict[str, SharedTraffic] = field(default_factory=dict)
    deferred_operations: int = 0
    seconds: float = 0.0

    @property
    def warp_instructions(self) -> int:
        return sum(sum(warp.values()) for warp in self.instructions)

    @property
    def instructions_a_second(self) -> float:
        return self.warp_instructions / self.seconds if self.seconds else 0.0

    @property
    def bank_conflicts(self) -> int:
        """Wavefronts of shared memory beyond what the accesses would have taken without conflicts."""
        return sum(traffic.conflicts for traffic in self.shared.values())

    @property
    def special_cycles(self) -> float:
        rate = rates(self.arch)
        others = self.special_operations - self.exponentials
        return WARP * (others / rate.special + self.exponentials / rate.exponential)

    @property
    def fma_cycles(self) -> float:
        return WARP * self.fma_operations / rates(self.arch).fma

    @property
    def issued_by_scheduler(self) -> list[int]:
        """Warp-instructions of each of the four schedulers; warp w is the ward of scheduler w % 4."""
        return [
            sum(sum(warp.values()) for warp in self.instructions[scheduler::SCHEDULERS])
            for scheduler in range(SCHEDULERS)
        ]

    @property
    def issue_cycles(self) -> float:
        """Cycles that the scheduler with the most instructions needs to issue them, one a clock."""
        return float(max(self.issued_by_scheduler))

    @property
    def issue_cycles_mean(self) -> float:
        return self.warp_instructions / SCHEDULERS

    @property
    def issue_cycles_without_moves(self) -> float:
        """As issue_cycles, without mov, packing and cvta, of which ptxas leaves few."""
        moves = [sum(warp["move"] for warp in self.instructions[s::SCHEDULERS]) for s in range(SCHEDULERS)]
        return float(max(total - move for total, move in zip(self.issued_by_scheduler, moves, strict=True)))

    @property
    def cycles(self) -> dict[str, float]:
        """By unit: mma, special, fma, and issue without moves: PTX has more of them than the hardware executes."""
        issue = self.issue_cycles_without_moves
        return {"mma": self.mma_cycles, "special": self.special_cycles, "fma": self.fma_cycles, "issue": issue}

    @property
    def bound(self) -> tuple[str, float]:
        """The unit that is busy longest, and its cycles: how long one SM takes if that unit is never idle."""
        return max(self.cycles.items(), key=lambda item: item[1])

    def by_class(self) -> dict[str, int]:
        return {name: sum(warp[name] for warp in self.instructions) for name in CLASSES}

    def by_role(self) -> dict[str, dict[str, int]]:
        """Executed warp-instructions by role, then by class."""
        return {
            role: {name: sum(self.instructions[warp][name] for warp in warps) for name in CLASSES}
            for role, warps in self.roles.items()
        }

    def mma_tiles(self, head_dim: int, head_dim_v: int) -> float:
        """128 x 128 tiles of scores that an attention's products amount to: what was computed, masked or not.

        A tile is 128 * 128 * (D + Dv) multiply-adds, S = Q K^T and O = P V.
        """
        return self.mma_multiply_adds / (TILE * TILE * (head_dim + head_dim_v))

    def name_roles(self, names: Mapping[str, Iterable[int]]) -> None:
        """Names the warps of a CTA by what they do; those left out keep the groups that they were found in."""
        named = {name: [warp for warp in warps if warp < len(self.instructions)] for name, warps in names.items()}
        taken = {warp for warps in named.values() for warp in warps}
        rest = [[warp for warp in warps if warp not in taken] for warps in self.roles.values()]
        self.roles = {name: warps for name, warps in named.items() if warps}
        self.roles |= {warps_label(warps): warps for warps in rest if warps}

    def as_dict(self, tiles: float | None = None) -> dict:
        """For JSON. `tiles` adds `per_tile`: every figure in it divided by that many."""
        out = {item.name: getattr(self, item.name) for item in fields(self)}
        out |= {name: getattr(self, name) for name in _DERIVED}
        out["shared"] = {kind: vars(traffic) for kind, traffic in self.shared.items()}
        out["by_class"], out["by_role"] = self.by_class(), self.by_role()
        out["bound"], out["bound_cycles"] = self.bound
        if tiles:
            out["per_tile"] = self.per_tile(tiles)
        return out

    def per_tile(self, tiles: float) -> dict[str, float | str]:
        """Costs divided by a number of tiles, and `bound`, the unit that needs the most cycles of them."""
        unit, cycles = self.bound
        total = {name: getattr(self, name) for name in _PER_TILE} | self.by_class()
        total |= {"skipped": sum(self.skipped), "bound_cycles": cycles}
        return {"tiles": tiles, "bound": unit, **{name: value / tiles for name, value in total.items()}}


_DERIVED = (
    "warp_instructions",
    "bank_conflicts",
    "issued_by_scheduler",
    "special_cycles",
    "fma_cycles",
    "issue_cycles",
    "issue_cycles_mean",
    "issue_cycles_without_moves",
)
_PER_TILE = (
    "warp_instructions",
    "special_operations",
    "fma_operations",
    "mma_cycles",
    "special_cycles",
    "fma_cycles",
    "issue_cycles",
    "issue_cycles_mean",
    "issue_cycles_without_moves",
    "tma_load_bytes",
    "tma_store_bytes",
    "tma_reduce_bytes",
    "global_load_bytes",
    "global_store_bytes",
    "bank_conflicts",
)


def warps_label(warps: Iterable[int]) -> str:
    """(0, 1, 2, 5) -> "warps 0-2, 5"."""
    runs: list[list[int]] = []
    for warp in sorted(warps):
        if runs and warp == runs[-1][-1] + 1:
            runs[-1].append(warp)
        else:
            runs.append([warp])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return ("warp " if sum(map(len, runs)) == 1 else "warps ") + text
