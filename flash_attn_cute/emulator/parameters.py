"""Reads from PTX what a launch needs: each parameter's place in the parameter buffer, and static shared memory."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from flash_attn_cute.emulator.launch import EmulatorError

_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>[a-z]+\d+(?:x2)?|pred)"
    r"(?:\s+\.ptr\b(?:\s+\.(?:global|shared|const|local|generic))?(?:\s+\.align\s+\d+)?)?"
    r"\s+[\w$%]+(?:\[(?P<count>\d+)\])?"
)


class Parameter(NamedTuple):
    offset: int
    size: int


class Layout(NamedTuple):
    parameters: tuple[Parameter, ...]
    size: int


@functools.lru_cache(maxsize=256)
def layout(ptx: str, entry: str) -> Layout:
    """Where each parameter of `entry` lies in the buffer; every one starts at a multiple of its alignment."""
    match = re.search(rf"\.entry\s+{re.escape(entry)}\s*(\(.*?\))?\s*(?=[.{{])", ptx, re.DOTALL)
    if match is None:
        raise EmulatorError(f"the module's PTX has no .entry {entry}")
    parameters, end = [], 0
    for declaration in re.findall(r"\.param[^,)]*", match[1] or ""):
        found = _PARAMETER.match(declaration)
        if found is None:
            raise EmulatorError(f"cannot read the parameter {declaration.strip()!r} of .entry {entry}")
        unit = int(re.sub(r"x2$", "", found["type"]).lstrip("abcdefghijklmnopqrstuvwxyz")) // 8
        size = unit * int(found["count"] or 1)
        alignment = int(found["align"] or unit)
        offset = -(-end // alignment) * alignment
        parameters.append(Parameter(offset, size))
        end = offset + size
    return Layout(tuple(parameters), end)


@functools.lru_cache(maxsize=256)
def static_shared_bytes(ptx: str) -> int:
    """Shared memory that the module declares with a size; what has none is `extern`, and dynamic."""
    declared = re.findall(
        r"^\s*(?:\.visible\s+)?\.shared\s+.*?\.[a-z](\d+)\s+[\w$%]+(?:\[(\d+)\])?;", ptx, re.MULTILINE
    )
    return sum(int(bits) // 8 * int(count or 1) for bits, count in declared)
