"""What the host side hands to the device side: one kernel launch, as data."""

from __future__ import annotations

from dataclasses import dataclass, field

SCHEDULES = ("in-order", "random", "delayed")
# Bits of Machine.checks, in order. Two are not among the default ones. "races" takes its time. "tcgen05" adds what
# PTX asks of tensor memory and many programs and the compiler leave out: tcgen05.wait::ld before registers that
# tcgen05.ld loads are used, and tcgen05.fence on both sides of synchronisation, also in kernels that have none.
CHECKS = ("bounds", "uninitialised", "alignment", "barriers", "leaks", "races", "tcgen05")
DEFAULT_CHECKS = frozenset(CHECKS) - {"races", "tcgen05"}


class EmulatorError(Exception):
    """A program, or a kernel that it launched, did something that a check forbids or that is not emulated."""


@dataclass(frozen=True)
class Allocation:
    """Memory that a launch may touch: one tensor's storage. The address is the host's, kernels run on it directly."""

    address: int
    size: int
    name: str
    writable: bool = True

    @property
    def end(self) -> int:
        return self.address + self.size


@dataclass
class LaunchRecord:
    """One kernel launch with everything that decides what it does, other than the contents of memory.

    `ptx` is the text of the whole module that the launched kernel's cubin was made from. `params` is the buffer that
    the `.entry` signature describes, every parameter at its own alignment; TMA descriptors are in it, 128 bytes each.
    """

    ptx: str
    entry: str
    arch: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    dynamic_smem: int
    params: bytes
    allocations: list[Allocation] = field(default_factory=list)


@dataclass(frozen=True)
class EngineOptions:
    """How launches are executed: in which order warps run, on how many SMs at once, and what is checked meanwhile.

    `sms` 0 means as many as the architecture's GPU has. `checks` holds names of CHECKS, or "default", or "all", or is
    empty; "-name" leaves one out. Raises ValueError for what is none of these.
    """

    schedule: str = "in-order"
    seed: int = 0
    sms: int = 0
    checks: frozenset[str] = frozenset({"default"})

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: got {self.schedule!r}; takes one of {', '.join(SCHEDULES)}")
        if self.sms < 0:
            raise ValueError(f"sms: got {self.sms}; takes a number of SMs, or 0 for the architecture's own")
        self.check_names()

    def check_names(self) -> frozenset[str]:
        """The checks that are on, by their own names."""
        left_out = {name[1:] for name in self.checks if name.startswith("-")}
        given = {name for name in self.checks if not name.startswith("-")} or ({"default"} if left_out else set())
        unknown = (given - {*CHECKS, "default", "all"}) | (left_out - {*CHECKS})
        if unknown:
            known = ", ".join(("default", "all", *CHECKS))
            raise ValueError(f"checks: got {', '.join(sorted(unknown))}; takes names of {known}")
        names = given & {*CHECKS}
        if "all" in given:
            names |= {*CHECKS}
        if "default" in given:
            names |= DEFAULT_CHECKS
        names -= left_out
        return frozenset(names | {"races"} if "tcgen05" in names else names)
