"""What fences become, and the waits and `.sync` instructions that nothing but the race check has a use for.

One warp runs at a time and every write is seen at once, so without that check none of them does anything.
"""

from __future__ import annotations

import re

from .assembler import CORE, Assembler, lowers
from .lower_memory import SCOPES
from .ptx import Instruction

WHOLE_WARP = 1 << 8


def _read_kinds() -> dict[str, int]:
    body = re.search(r"typedef enum \{\s*(FENCE_WARP.*?)\} FenceKind;", (CORE / "machine.h").read_text(), re.DOTALL)[1]
    return {name.strip(): number for number, name in enumerate(body.split(","))}


FENCES = _read_kinds()
_NAMED = {
    "wgmma.fence": "FENCE_WGMMA",
    "tcgen05.fence::before_thread_sync": "FENCE_TENSOR_BEFORE",
    "tcgen05.fence::after_thread_sync": "FENCE_TENSOR_AFTER",
    "tcgen05.wait::ld": "FENCE_TENSOR_LOADS",
    "tcgen05.wait::st": "FENCE_TENSOR_STORES",
    "setmaxnreg": "FENCE_WARP",
}


@lowers("fence", "membar", *_NAMED)
def fence(a: Assembler, i: Instruction) -> None:
    a.emit("fence", sub=_kind(i) | _scope(i) << 4 | ("aligned" in i.opcode) * WHOLE_WARP, cls=_class(i))


def _kind(i: Instruction) -> int:
    named = _NAMED.get(".".join(i.opcode[:2])) or _NAMED.get(i.opcode[0])
    if named:
        return FENCES[named]
    if "mbarrier_init" in i.opcode:
        return FENCES["FENCE_MBARRIER_INIT"]
    if "proxy" in i.opcode:  # others than async are about aliases and tensor maps
        is_async = any(part.startswith("async") for part in i.opcode)
        return FENCES["FENCE_PROXY_ASYNC" if is_async else "FENCE_WARP"]
    return FENCES["FENCE_MEMORY"]


def _scope(i: Instruction) -> int:
    return next((SCOPES[part] for part in i.opcode if part in SCOPES), SCOPES["gpu"])


def _class(i: Instruction) -> str:
    return "control" if i.opcode[0] == "setmaxnreg" else "barrier"
