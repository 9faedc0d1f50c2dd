"""Compiles the emulator's C sources with the system's compiler at first use, once per content of the sources.

Libraries are kept beside the compiled kernels, in ``FLASH_ATTN_CUTE_CACHE_DIR`` or ``$XDG_CACHE_HOME/flash_attn_cute``,
or, where that cannot be written, in a directory of this process alone. They are built for the architecture's baseline,
never for the machine at hand, so that a home directory shared between machines works.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from flash_attn_cute.emulator.launch import EmulatorError

DEFAULT_FLAGS = ("-O2",)
_ALWAYS = ("-std=gnu11", "-fPIC", "-shared")
_COMPILERS = ("cc", "gcc", "clang")


class CompilerError(EmulatorError):
    """There is no C compiler, or it refused a source."""


def shared_library(name: str, sources: Sequence[Path], flags: Iterable[str] = DEFAULT_FLAGS) -> Path:
    """Return the path of lib<name>-<digest>.so, compiled from `sources` unless that was done before.

    The digest covers the flags, the compiler's name and, for each source, every .c, .h, .def and .inc file in its
    directory, so that a changed header rebuilds too. Libraries (-lm) may be among the flags.
    """
    compiler = find_compiler()
    command = [*compiler, *_ALWAYS, *flags]
    library = f"lib{name}-{_digest(command, sources)}.so"
    target = cache_directory() / library
    if not target.exists():
        # Compiled under another name and then renamed: another process sees all of the library or none of it.
        handle, temporary = tempfile.mkstemp(prefix=f".{library}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
        try:
            _compile(command, sources, temporary)
            os.chmod(temporary, 0o755)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return target


@functools.cache
def find_compiler() -> list[str]:
    """The compiler's command: what CC says, else the first that is installed."""
    asked = shlex.split(os.environ.get("CC", ""))
    for command in [asked] if asked else [[name] for name in _COMPILERS]:
        if shutil.which(command[0]):
            return command
    missing = f"CC={asked[0]!r} is not there" if asked else f"none of {', '.join(_COMPILERS)} is there"
    raise CompilerError(
        f"the emulator compiles its core with a C compiler, and {missing}: install gcc or clang (Debian and Ubuntu: "
        "apt-get install gcc libc6-dev; Fedora: dnf install gcc), or set CC to one"
    )


def _compile(command: list[str], sources: Sequence[Path], target: str) -> None:
    libraries = [flag for flag in command if flag.startswith("-l")]
    options = [flag for flag in command if not flag.startswith("-l")]
    run = [*options, "-o", target, *map(str, sources), *libraries]
    result = subprocess.run(run, capture_output=True, text=True)
    if result.returncode != 0:
        raise CompilerError(f"compiling the emulator failed: {shlex.join(run)}\n{result.stderr.strip()}")


def _digest(command: list[str], sources: Sequence[Path]) -> str:
    digest = hashlib.sha256(f"{platform.machine()} {shlex.join(command)}\n".encode())
    directories = sorted({Path(source).resolve().parent for source in sources})
    files = [path for directory in directories for path in sorted(directory.iterdir())]
    for path in files:
        if path.suffix in (".c", ".h", ".def", ".inc"):
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)}\n".encode())
            digest.update(content)
    digest.update(" ".join(Path(source).name for source in sources).encode())
    return digest.hexdigest()[:24]


def cache_directory(part: str = "") -> Path:
    """Where the emulator keeps what lasts: libraries, and in parts other things. It exists and can be written."""
    asked = os.environ.get("FLASH_ATTN_CUTE_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(asked).expanduser().absolute() if asked else Path(base, "flash_attn_cute")
    directory = directory / "emulator" / part
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
        return directory
    except OSError:
        return _private_directory(part)


@functools.cache
def _private_directory(part: str) -> Path:
    """A directory of this process alone; kept alive by the cache and removed at exit."""
    holder = tempfile.TemporaryDirectory(prefix="flash_attn_cute_emulator_")
    _holders.append(holder)
    return Path(holder.name)


_holders: list[tempfile.TemporaryDirectory] = []
