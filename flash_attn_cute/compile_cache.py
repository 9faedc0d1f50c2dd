"""Compile a CuTe DSL function once per key, and keep it in the process and on disk.

    function = cache.get(("sm_90a", "forward", "bf16", 128, True), build)
    function(q, k, v, out, scale)

``build`` runs ``cute.compile(..., options="--enable-tvm-ffi")``. What ``get`` returns is never the object that it made
but that object's exported machine code, linked into this process: a function is then the same thing whether this
process compiled it or another one did last week, and a call skips the Python wrapper that ``cute.compile`` puts around
it. It takes the runtime arguments by position, all of them: no keywords and no defaults. Compile-time constants and a
stream taken from the environment are not passed.

An entry on disk is a relocatable ELF object (host code with the cubin inside) followed by its SHA-256. The DSL's own
JIT linker loads it, so nothing beside the Python packages is needed: no compiler, no system linker.

Two environment variables, read when a cache is made: ``FLASH_ATTN_CUTE_CACHE_DIR`` moves the directory (default
``$XDG_CACHE_HOME/flash_attn_cute``); ``FLASH_ATTN_CUTE_CACHE=0`` keeps everything in the process, which is also how to
have the DSL's dump and line-info options take effect on a function that is on disk already. Loading an entry runs its
code: point the directory only at a place where nobody else can write.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger("flash_attn_cute")

Key = tuple[Any, ...]

# How long a process waits for another one to compile the same key before it compiles for itself.
LOCK_TIMEOUT_SECONDS = 300.0

# The packages that decide what machine code comes out and which runtime symbols it calls. Tensors cross as DLPack and
# other arguments as tvm-ffi values, so the versions of torch and Python do not matter to an entry.
_VERSIONED_PACKAGES = (
    "nvidia-cutlass-dsl",
    "nvidia-cutlass-dsl-libs-base",
    "nvidia-cutlass-dsl-libs-core",
    "nvidia-cutlass-dsl-libs-cu12",
    "nvidia-cutlass-dsl-libs-cu13",
    "apache-tvm-ffi",
)

_SYMBOL = "kernel"
_DIGEST_SIZE = hashlib.sha256().digest_size

# The DSL traces through process-wide state, so two threads must not compile at once, whatever their keys. Reentrant: a
# build may itself ask for another function.
_compile_lock = threading.RLock()


class CompileCache:
    """Compiled functions by key: a dict in the process, over files on disk.

    ``directory`` defaults to what the environment says. The attribute is None where the disk is not used.
    """

    def __init__(self, directory: str | os.PathLike | None = None):
        self.directory: Path | None = _disk_directory(directory)
        self._functions: dict[Key, Callable] = {}
        self._writable = True
        # Taken now and not at the first miss: when a source file is edited in between, its old code, already imported,
        # must not be filed under its new contents.
        self._fingerprint = fingerprint()

    def get(self, key: Key, build: Callable[[], Any]) -> Callable:
        """Return the function of ``key``, from the process, from disk, or by calling ``build``.

        ``key`` is a tuple of str, int, float, bool, None and such tuples; its first item is the target architecture
        ("sm_90a"). Whatever ``build`` depends on beside the package's source must be in it, and a position keeps one
        type: in a dict 1, 1.0 and True are one key.
        """
        try:
            return self._functions[key]
        except KeyError:
            return self._miss(key, build)

    def _miss(self, key: Key, build: Callable[[], Any]) -> Callable:
        _check_key(key)
        with _compile_lock:
            function = self._functions.get(key)  # another thread may have been first
            if function is None:
                function = self._from_disk_or_build(key, build)
                self._functions[key] = function
        return function

    def _from_disk_or_build(self, key: Key, build: Callable[[], Any]) -> Callable:
        if self.directory is None:
            return self._build(key, build, None)
        path = self.directory / self._fingerprint / _entry_name(key)
        function = self._load(key, path)  # without the lock first: a finished cache can be on a read-only disk
        if function is not None:
            return function
        with self._lock(path):
            function = self._load(key, path)  # another process may have compiled it while this one waited
            return function if function is not None else self._build(key, build, path)

    def _build(self, key: Key, build: Callable[[], Any], path: Path | None) -> Callable:
        start = time.perf_counter()
        code = _export(build())
        function = _link(code)
        logger.info("compiled %s in %.2f s", key, time.perf_counter() - start)
        if path is not None:
            self._store(path, code)
        return function

    def _load(self, key: Key, path: Path) -> Callable | None:
        """Return the function in ``path``; None if there is none, or it was damaged and is now deleted."""
        start = time.perf_counter()
        try:
            function = _link(_verified(path.read_bytes()))
        except FileNotFoundError:
            return None
        except OSError as error:
            self._stop_writing(error)
            return None
        except Exception as error:  # damaged, or the linker refuses it: in both cases another copy is needed
            logger.warning("deleting damaged cache entry %s and compiling it again: %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        logger.debug("loaded %s from %s in %.1f ms", key, path, 1e3 * (time.perf_counter() - start))
        return function

    def _store(self, path: Path, code: bytes) -> None:
        """Write an entry so that a reader sees all of it or nothing."""
        if not self._writable:
            return
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_bytes(code + hashlib.sha256(code).digest())
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._stop_writing(error)

    @contextlib.contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        """Hold the lock of one entry between processes, or go on without it where that cannot be had.

        The lock only saves work: entries are replaced atomically, so nothing breaks without it.
        """
        with contextlib.ExitStack() as stack:
            if self._writable:
                try:
                    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    # The file stays behind on purpose: deleting it would let two processes lock two files of one name.
                    stack.enter_context(_file_lock(path.with_suffix(".lock"), LOCK_TIMEOUT_SECONDS))
                except OSError as error:
                    self._stop_writing(error)
            yield

    def _stop_writing(self, error: OSError) -> None:
        if self._writable:
            self._writable = False
            logger.warning("compiled kernels are not kept on disk in %s: %s", self.directory, error)


@functools.cache
def fingerprint() -> str:
    """Hash everything that decides what an entry contains, other than its key.

    That includes the processor's instruction set: the DSL generates host code for the very CPU it runs on, AVX-512
    included, and in a home directory shared between machines such an entry would kill a process on an older one.
    """
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent
    for source in sorted(package.rglob("*.py")):
        content = source.read_bytes()
        digest.update(f"{source.relative_to(package).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    for name in _VERSIONED_PACKAGES:
        digest.update(f"{name} {_version(name)}\n".encode())
    digest.update(f"{platform.system()} {platform.machine()} {_cpu_features()}".encode())
    return digest.hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _cpu_features() -> str:
    """Return the CPU's instruction-set flags as the kernel lists them, sorted; empty where they cannot be read."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):  # x86, Arm
                return " ".join(sorted(value.split()))
    return ""


def _disk_directory(directory: str | os.PathLike | None) -> Path | None:
    """Return where entries are kept, or None where they are not."""
    if os.environ.get("FLASH_ATTN_CUTE_CACHE", "1") == "0":
        return None
    directory = directory or os.environ.get("FLASH_ATTN_CUTE_CACHE_DIR")
    if directory:
        return Path(directory).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # An account without a home leaves "~" as it is; that is no place to write.
    return Path(base, "flash_attn_cute") if os.path.isabs(base) else None


def _check_key(key: Key) -> None:
    """Refuse a key that would not be the same in another process, or does not say its architecture."""
    if not (isinstance(key, tuple) and key and isinstance(key[0], str) and re.fullmatch(r"sm_\d+[af]?", key[0])):
        raise ValueError(f"key must be a tuple that begins with the target architecture, such as 'sm_90a'; got {key!r}")
    _check_primitive(key)


def _check_primitive(item: Any) -> None:
    if isinstance(item, tuple):  # a named one as well: its repr is as stable, and says more in the log
        for part in item:
            _check_primitive(part)
    elif type(item) not in (str, int, float, bool, type(None)):
        raise TypeError(f"a key holds str, int, float, bool, None and tuples; got {type(item).__name__} {item!r}")


def _entry_name(key: Key) -> str:
    import cutlass  # here, so that importing this module does not take the second that the DSL takes

    # Which of the installed CUDA toolkits the DSL compiles with can depend on the driver, so versions do not tell.
    toolkit = f"cuda{cutlass.CUDA_VERSION.major}.{cutlass.CUDA_VERSION.minor}"
    # repr and not pickle: the bytes of a pickle depend on which of its strings happen to be the same object.
    return f"{key[0]}-{toolkit}-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.o"


def _verified(entry: bytes) -> bytes:
    """Return the object code of an entry, or raise ValueError."""
    code, checksum = entry[:-_DIGEST_SIZE], entry[-_DIGEST_SIZE:]
    if not code or hashlib.sha256(code).digest() != checksum:
        raise ValueError(f"checksum of {len(entry)} bytes does not match")
    return code


def _export(compiled: Any) -> bytes:
    """Return the relocatable object code of what ``cute.compile`` made with ``--enable-tvm-ffi``."""
    with _memory_file() as path:
        compiled.export_to_c(path, function_name=_SYMBOL)
        return Path(path).read_bytes()


def _link(code: bytes) -> Callable:
    """Link object code into this process and return its entry point, a ``tvm_ffi.Function`` that keeps it alive."""
    import cutlass.cute as cute

    with _memory_file(code) as path:
        return getattr(cute.runtime.load_module(path, enable_tvm_ffi=True), _SYMBOL)


@contextlib.contextmanager
def _memory_file(content: bytes = b"") -> Iterator[str]:
    """Yield the path of a file in memory: the DSL exports to a path and loads from one, and a disk may be missing."""
    descriptor = os.memfd_create(_SYMBOL)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _file_lock(path: Path, timeout: float) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; after ``timeout`` seconds go on without it.

    The kernel drops the lock of a process that dies, so a lock is never stale.
    """
    with open(path, "ab") as file:
        locked = _try_lock(file, timeout)
        if not locked:
            logger.warning("waited %.0f s for another process to compile %s; compiling it here", timeout, path.stem)
        try:
            yield
        finally:
            if locked:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing does not unlock while a forked child has the file open


def _try_lock(file: Any, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)


cache = CompileCache()
