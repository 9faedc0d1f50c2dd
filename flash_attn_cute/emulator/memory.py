"""Which memory a launch may touch: tensors that it was given, and addresses that the program handed out itself."""

from __future__ import annotations

import ctypes
import struct
import weakref
from collections.abc import Iterable
from typing import Any

from flash_attn_cute.emulator.launch import Allocation

_MAX_DIMENSIONS = 8
_DLPACK_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
# Tensors of addresses (grouped products) are small; larger ones of 64-bit integers are data.
_MOST_ADDRESSES = 1 << 16


class _View(ctypes.Structure):
    """One tensor that the program holds converted, as host/dlpack.c writes it."""

    _fields_ = [
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("shape", ctypes.c_int64 * _MAX_DIMENSIONS),
        ("dimensions", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    ]

    def describe(self) -> str:
        shape = tuple(self.shape[: min(self.dimensions, _MAX_DIMENSIONS)])
        return f"{_DLPACK_KINDS.get(self.code, 'type ' + str(self.code))}{self.bits} {list(shape)}"

    def may_hold_addresses(self) -> bool:
        return self.code in (0, 1) and self.bits == 64 and self.size <= 8 * _MOST_ADDRESSES


class Memory:
    """The memory that the program may let a kernel touch, and which of it one launch gets.

    A tensor that crosses DLPack is bounded by its own extent. An address that left torch as an integer (`data_ptr()`)
    stands for the whole storage, for it does not say how much of it is meant.
    """

    def __init__(self, host: ctypes.CDLL):
        self._views = host.emulator_views
        self._views.argtypes, self._views.restype = (ctypes.c_void_p, ctypes.c_uint64), ctypes.c_uint64
        self._storages: dict[int, weakref.ref] = {}
        self._raw: dict[int, int] = {}

    def escaped(self, storage: Any) -> None:
        """A torch storage whose address the program has read."""
        if storage.nbytes():
            self._storages[storage.data_ptr()] = weakref.ref(storage)

    def allocated(self, address: int, size: int) -> None:
        """Memory from the CUDA runtime or driver and not from torch."""
        self._raw[address] = size

    def freed(self, address: int) -> int | None:
        return self._raw.pop(address, None)

    def of_launch(self, params: bytes) -> list[Allocation]:
        """What a launch with these parameters may touch."""
        views = self._held_views()
        found = [Allocation(view.address, view.size, view.describe()) for view in views]
        words = list(_words(params))
        for view in views:
            if view.may_hold_addresses():
                words.extend(_words(ctypes.string_at(view.address, view.size)))
        return _disjoint(found + self._containing(words))

    def _held_views(self) -> list[_View]:
        capacity = 64
        while True:
            buffer = (_View * capacity)()
            count = self._views(buffer, capacity)
            if count <= capacity:
                return [view for view in buffer[:count] if view.size]
            capacity = 2 * count

    def _containing(self, words: Iterable[int]) -> list[Allocation]:
        """Escaped storages and raw memory that one of the words points into."""
        known = []
        for address, reference in list(self._storages.items()):
            storage = reference()
            if storage is None or storage.data_ptr() != address:
                del self._storages[address]
            else:
                known.append(Allocation(address, storage.nbytes(), "storage behind data_ptr()"))
        known.extend(Allocation(address, size, "cudaMalloc") for address, size in self._raw.items())
        if not known:
            return []
        pointed = sorted(set(words))
        return [a for a in known if any(a.address <= word < a.end for word in pointed)]


def _disjoint(allocations: list[Allocation]) -> list[Allocation]:
    """Sorted, and those that share memory (views of one tensor) as one."""
    merged: list[Allocation] = []
    for allocation in sorted(allocations, key=lambda a: (a.address, -a.size)):
        last = merged[-1] if merged else None
        if last is None or allocation.address >= last.end:
            merged.append(allocation)
            continue
        names = last.name if allocation.name in last.name.split(" + ") else f"{last.name} + {allocation.name}"
        merged[-1] = Allocation(last.address, max(last.end, allocation.end) - last.address, names)
    return merged


def _words(content: bytes) -> Iterable[int]:
    """Every aligned 64-bit word. A TMA descriptor's base address is its first, so this finds it too."""
    return (word for (word,) in struct.iter_unpack("<Q", content[: len(content) // 8 * 8]))
