"""Which PTX a loaded binary was made from. Judged by the binary's bytes: kernel names are not unique."""

from __future__ import annotations

import ctypes
import struct

from flash_attn_cute.emulator.launch import EmulatorError

_FATBIN_MAGIC = 0xBA55ED50
_ELF_MAGIC = b"\x7fELF"
_ELF_HEADER = 64
_FATBIN_HEADER = 16


class Modules:
    """PTX by cubin. Every module that the DSL compiles in this process is added when its compilation finishes."""

    def __init__(self):
        # Cubins that begin with one ELF header: its section table's offset and count all but tell modules apart.
        self._by_header: dict[bytes, dict[bytes, str]] = {}

    def add(self, cubin: bytes, ptx: str) -> None:
        self._by_header.setdefault(cubin[:_ELF_HEADER], {})[cubin] = ptx

    def find(self, image: bytes) -> str:
        """The PTX of the cubin that `image`, a cubin or a fatbin, holds."""
        start = image.find(_ELF_MAGIC)
        while start >= 0:
            for cubin, ptx in self._by_header.get(image[start : start + _ELF_HEADER], {}).items():
                if image.startswith(cubin, start):
                    return ptx
            start = image.find(_ELF_MAGIC, start + 1)
        raise EmulatorError(
            f"a binary of {len(image)} bytes was loaded whose PTX is not known: the emulator runs kernels that the DSL "
            "compiles in this process, not ones from a file or from another tool"
        )


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
