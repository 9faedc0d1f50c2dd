"""Running kernels in the emulator from Python: `with emulate("sm_90a") as session: ...; session.launches`."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flash_attn_cute.emulator import devices
from flash_attn_cute.emulator.launch import EmulatorError, EngineOptions, LaunchRecord
from flash_attn_cute.emulator.patching import Patches

DEFAULT_CHECKS = frozenset({"default"})


class Session:
    """One stretch of emulation under one set of options. `launches` holds a LaunchReport for each launch so far.

    A program may name the warps of its kernels for the reports: `session.roles["part of the kernel's name"] =
    {"load": [0], "softmax": range(4, 12)}`. Without that, warps that do the same work are found, and called by number.
    """

    def __init__(self, gpu: devices.Device, options: EngineOptions):
        self.device = gpu
        self.options = options
        self.launches: list[Any] = []
        self.roles: dict[str, Mapping[str, Iterable[int]]] = {}
        self._engine: Any = None

    @property
    def arch(self) -> str:
        return self.device.arch

    def reschedule(self, schedule: str, seed: int = 0) -> None:
        """Run the launches that follow under another schedule or seed."""
        self.options = dataclasses.replace(self.options, schedule=schedule, seed=seed)
        self._engine = None

    @contextlib.contextmanager
    def without(self, *checks: str) -> Iterator[None]:
        """Leave out checks in the launches inside the block."""
        before = self.options
        self.options = dataclasses.replace(before, checks=before.check_names() - {*checks})
        self._engine = None
        try:
            yield
        finally:
            self.options = dataclasses.replace(self.options, checks=before.checks)
            self._engine = None

    def execute(self, record: LaunchRecord) -> None:
        """Runs one launch to its end. Called for every launch of the program; replace it to look at records instead."""
        if self._engine is None:
            from flash_attn_cute.emulator.engine import Engine

            self._engine = Engine(self.options)
        report = self._engine.run(record)
        for part, names in self.roles.items():
            if part in record.entry:
                report.name_roles(names)
        self.launches.append(report)


class _Process:
    """What can be done only once in a process: the DSL reads its settings and binds its runtime when it is imported."""

    capture: Any = None
    arch: str | None = None
    directory: Path
    session: Session | None = None
    hooked = False


@contextlib.contextmanager
def emulate(
    arch: str, *, schedule: str = "in-order", seed: int = 0, sms: int = 0, checks: Iterable[str] = DEFAULT_CHECKS
) -> Iterator[Session]:
    """Run the kernels that the program launches inside the block on the CPU, as a GPU of architecture `arch` would.

    arch: "sm_90a" or "sm_100a"; one a process, and set before the DSL is imported.
    schedule: "in-order", "random" or "delayed": which warp goes next, and how late asynchronous work completes.
    seed: of the random choices.
    sms: how many CTAs are resident at once, and what the device says it has; 0 is the architecture's own number.
    checks: names of checks, or "default", or "all"; empty for none.

    Inside, device="cuda" means host memory, and torch.cuda and cuda-bindings answer for the emulated device.
    """
    gpu = devices.device(arch, sms)
    options = EngineOptions(schedule, seed, gpu.sms, frozenset(checks))
    if _Process.session is not None:
        raise EmulatorError("emulate: a session is in progress; end it before another begins")
    _prepare_process(gpu.arch)
    from flash_attn_cute.emulator import pretend

    capture, patches, session = _Process.capture, Patches(), Session(gpu, options)
    with contextlib.ExitStack() as stack:
        stack.callback(patches.restore)
        pretend.install(patches, capture, gpu)
        _hook_dsl()
        pretend.install_for_dsl(patches, gpu)
        stack.callback(_end)
        # The method is looked up at each launch, so that a caller can replace it on the session.
        capture.device, capture.execute = gpu, lambda record: session.execute(record)
        _Process.session = session
        yield session


def current_session() -> Session | None:
    """The session in progress, if there is one."""
    return _Process.session


def _end() -> None:
    _Process.session = None
    _Process.capture.device = _Process.capture.execute = None


def _prepare_process(arch: str) -> None:
    if _Process.arch is not None:
        if arch != _Process.arch:
            raise EmulatorError(
                f"emulate: this process emulates {_Process.arch}, and {arch} was asked for; the DSL takes one "
                "architecture a process, so use another process"
            )
        return
    if "cutlass" in sys.modules:
        raise EmulatorError(
            "emulate: cutlass is imported already, and takes its architecture and runtime library when it is imported; "
            "begin the session first"
        )
    from flash_attn_cute import compile_cache
    from flash_attn_cute.emulator.capture import Capture, host_library

    directory = Path(tempfile.mkdtemp(prefix="flash_attn_cute_emulator_"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    # By this name: the DSL looks for it when it loads exported code.
    library = directory / "libcute_dsl_runtime.so"
    library.symlink_to(host_library())
    os.environ.update(
        CUTE_DSL_ARCH=arch,
        CUTE_DSL_LIBS=str(library),
        # Code from a disk cache comes without its PTX.
        CUTE_DSL_DISABLE_FILE_CACHING="1",
        FLASH_ATTN_CUTE_CACHE="0",
    )
    compile_cache.cache.directory = None
    _Process.capture, _Process.arch, _Process.directory = Capture(library), arch, directory


def _hook_dsl() -> None:
    if not _Process.hooked:
        from flash_attn_cute.emulator.capture import hook_dsl

        hook_dsl(_Process.capture, _Process.directory)
        _Process.hooked = True
