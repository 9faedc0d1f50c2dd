"""What the emulated GPUs say about themselves: the numbers that programs ask for before they launch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

DRIVER_VERSION = 13000
KIB, GIB = 1 << 10, 1 << 30


@dataclass(frozen=True)
class Device:
    """One GPU. Sizes in bytes; `clock_khz` is there for programs that turn cycles into time."""

    arch: str
    name: str
    capability: tuple[int, int]
    sms: int
    shared_memory_per_block_optin: int
    shared_memory_per_sm: int
    l2_cache: int
    memory: int
    clock_khz: int

    def attribute(self, number: int) -> int | None:
        """A cudaDeviceAttr or CUdevice_attribute (the numbers are the same); None where the emulator has no answer."""
        if number in _ATTRIBUTES:
            value = _ATTRIBUTES[number]
            return getattr(self, value) if isinstance(value, str) else value
        return {75: self.capability[0], 76: self.capability[1]}.get(number)


# A number, or the field that holds it.
_ATTRIBUTES: dict[int, int | str] = {
    1: 1024,  # threads per block
    2: 1024,  # block dimensions
    3: 1024,
    4: 64,
    5: 2**31 - 1,  # grid dimensions
    6: 65535,
    7: 65535,
    8: 48 * KIB,  # shared memory per block without asking
    9: 64 * KIB,  # constant memory
    10: 32,  # warp size
    12: 64 * KIB,  # registers per block
    13: "clock_khz",
    16: "sms",
    18: 0,  # integrated
    19: 1,  # can map host memory
    31: 1,  # concurrent kernels
    36: 2_619_000,  # memory clock
    37: 5120,  # memory bus width
    38: "l2_cache",
    39: 2048,  # threads per SM
    40: 3,  # asynchronous copy engines
    41: 1,  # unified addressing
    81: "shared_memory_per_sm",
    82: 64 * KIB,  # registers per SM
    83: 1,  # managed memory
    95: 1,  # cooperative launch
    97: "shared_memory_per_block_optin",
    106: 32,  # blocks per SM
    111: KIB,  # shared memory reserved per block
    115: 1,  # stream-ordered allocator
    120: 1,  # cluster launch
    127: 1,  # TMA descriptors
}

_HOPPER = Device("sm_90a", "Emulated H200", (9, 0), 132, 227 * KIB, 228 * KIB, 50 << 20, 141 * GIB, 1_980_000)
_BLACKWELL = Device("sm_100a", "Emulated B200", (10, 0), 148, 227 * KIB, 228 * KIB, 126 << 20, 180 * GIB, 1_965_000)
_BLACKWELL_ULTRA = replace(_BLACKWELL, arch="sm_103a", name="Emulated B300", capability=(10, 3))

_DEVICES = {device.arch: device for device in (_HOPPER, _BLACKWELL, _BLACKWELL_ULTRA)}
ARCHITECTURES = tuple(_DEVICES)


def device(arch: str, sms: int = 0) -> Device:
    """The GPU of an architecture ("sm_90" and "sm_90a" are one); `sms` other than 0 replaces its number of SMs."""
    match = re.fullmatch(r"(sm_\d+)[af]?", arch)
    found = _DEVICES.get(f"{match[1]}a") if match else None
    if found is None:
        raise ValueError(f"arch: got {arch!r}; takes one of {', '.join(ARCHITECTURES)}")
    return replace(found, sms=sms) if sms else found
