"""Which PTX a loaded binary was made from. Judged by the binary's bytes: kernel names are not unique.

Programs keep compiled kernels on disk, and load them without the DSL's knowledge. So the PTX of every binary is kept on
disk too, by the binary's digest.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import tempfile
import zlib
from pathlib import Path

from flash_attn_cute.emulator.launch import EmulatorError

_FATBIN_MAGIC = 0xBA55ED50
_ELF_MAGIC = b"\x7fELF"
_ELF_HEADER = 64
_FATBIN_HEADER = 16
_MOST_FILES = 5000  # some 20 kB each; the newest are kept


class Modules:
    """PTX by cubin. Every module that the DSL compiles in this process is added when its compilation finishes."""

    def __init__(self, directory: Path):
        self._directory = directory
        files = sorted(directory.glob("*.ptx.z"), key=lambda path: path.stat().st_mtime)
        for path in files[:-_MOST_FILES]:
            path.unlink(missing_ok=True)
        # Cubins that begin with one ELF header: its section table's offset and count all but tell modules apart.
        self._by_header: dict[bytes, dict[bytes, str]] = {}

    def add(self, cubin: bytes, ptx: str) -> None:
        self._by_header.setdefault(cubin[:_ELF_HEADER], {})[cubin] = ptx
        path = self._path(cubin)
        if not path.exists():
            handle, temporary = tempfile.mkstemp(dir=self._directory)
            with os.fdopen(handle, "wb") as file:
                file.write(zlib.compress(ptx.encode(), 1))
            os.replace(temporary, path)  # another process sees all of it or nothing

    def find(self, image: bytes) -> str:
        """The PTX of the cubin that `image`, a cubin or a fatbin, holds."""
        start = image.find(_ELF_MAGIC)
        while start >= 0:
            for cubin, ptx in self._by_header.get(image[start : start + _ELF_HEADER], {}).items():
                if image.startswith(cubin, start):
                    return ptx
            kept = self._from_disk(image, start)
            if kept is not None:
                return kept
            start = image.find(_ELF_MAGIC, start + 1)
        raise EmulatorError(
            f"a binary of {len(image)} bytes was loaded whose PTX is not known: the emulator runs kernels that the DSL "
            "compiled in the emulator, now or earlier, not ones from elsewhere. If the program keeps compiled kernels "
            "on disk, remove those"
        )

    def _from_disk(self, image: bytes, start: int) -> str | None:
        head = image[start : start + _ELF_HEADER]
        if len(head) < _ELF_HEADER:
            return None
        path = self._path(image[start : start + _elf_size(head)])
        return zlib.decompress(path.read_bytes()).decode() if path.exists() else None

    def _path(self, cubin: bytes) -> Path:
        return self._directory / f"{hashlib.sha256(cubin).hexdigest()[:32]}.ptx.z"


def read_image(address: int) -> bytes:
    """The bytes of a fatbin or of a cubin in memory; both say how long they are."""
    head = ctypes.string_at(address, _ELF_HEADER)
    magic, _, header, payload = struct.unpack_from("<IHHQ", head)
    if magic == _FATBIN_MAGIC:
        return ctypes.string_at(address, max(header, _FATBIN_HEADER) + payload)
    if head.startswith(_ELF_MAGIC):
        return ctypes.string_at(address, _elf_size(head))
    raise EmulatorError(f"a binary was loaded that is neither a fatbin nor a cubin (it begins with {head[:8].hex()})")


def _elf_size(head: bytes) -> int:
    """The end of whichever of the two header tables comes last; cubins have nothing behind them."""
    programs, sections = struct.unpack_from("<QQ", head, 32)
    program_size, program_count, section_size, section_count = struct.unpack_from("<HHHH", head, 54)
    return max(programs + program_size * program_count, sections + section_size * section_count)
