"""What the engine raises. Every message names the kernel and the PTX line."""

from __future__ import annotations

from .launch import EmulatorError


class EngineError(EmulatorError):
    """Something that would be an error, or undefined, on the hardware."""

    def __init__(self, message: str, kernel: str = "", line: int = 0):
        super().__init__(message)
        self.kernel, self.line = kernel, line


class UnknownInstruction(EngineError):
    """An instruction that the emulator does not know was reached."""


class UnsupportedForm(EngineError):
    """A known instruction in a form, or with a descriptor, that the emulator does not know."""


class OutOfBounds(EngineError):
    """An address outside the launch's tensors, the CTA's shared memory, or the allocated tensor memory."""


class Misaligned(EngineError):
    """An address that the access's size does not divide."""


class Uninitialised(EngineError):
    """Shared or tensor memory was read that nobody wrote."""


class BarrierMisuse(EngineError):
    """A barrier was used before it was initialised, or beyond its count."""


class Deadlock(EngineError):
    """No warp can make progress; the message lists what each waits for."""


class Leak(EngineError):
    """A CTA ended with tensor memory allocated or bytes outstanding."""


class Trap(EngineError):
    """The kernel stopped itself."""


class ConvergenceError(EngineError):
    """Lanes that have to be together were not."""


class Race(EngineError):
    """Two accesses conflict and nothing orders them. `other_line` is the PTX line of the one that came first."""

    other_line = 0


# In the order of FaultKind in core/machine.h.
FAULTS = (
    None,
    UnknownInstruction,
    OutOfBounds,
    Misaligned,
    Uninitialised,
    BarrierMisuse,
    Deadlock,
    Leak,
    Trap,
    ConvergenceError,
    UnsupportedForm,
    EngineError,
    Race,
)
