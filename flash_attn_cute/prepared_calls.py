"""What was decided for a call, kept under everything that decided it, so that the next one like it only launches.

Checks, the choice of a kernel and the size of its launch read shapes, strides, dtypes, devices and options, never the
contents of a tensor: two calls with one signature have one `PreparedLaunch`. Layers of a model, and steps of a decode
loop, are such calls.
"""

from __future__ import annotations

import contextlib

from flash_attn_cute.launch import PreparedLaunch
from flash_attn_cute.problem import AttentionTensors

# Bounds the memory that calls of ever new sizes take (a signature and its launch are about 2 KiB).
CAPACITY = 4096

_prepared: dict[tuple, PreparedLaunch] = {}


def signature(tensors: AttentionTensors, options: tuple) -> tuple | None:
    """A key for the call; None if what should be a tensor is none, which validation then says better.

    It may hold what has no hash, and then nothing is kept under it: hashing it here as well would take a microsecond.
    """
    q, k, v = tensors[:3]
    try:
        # What is kept is of calls whose tensors are all on q's CUDA device. Of the others its number will do: it is
        # -1 off CUDA, and takes a third of the time.
        return (
            (q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.get_device()),
            (v.shape, v.stride(), v.dtype, v.get_device()),
            tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.get_device()) for x in tensors[3:]]),
            options,
            tuple(map(type, options)),  # True equals 1 and 1.0, and is not welcome in the same places
        )
    except (AttributeError, TypeError):
        return None


def find(key: tuple | None) -> PreparedLaunch | None:
    try:
        return _prepared.get(key)
    except TypeError:
        return None


def keep(key: tuple | None, prepared: PreparedLaunch) -> None:
    if key is None:
        return
    if len(_prepared) >= CAPACITY:
        _prepared.clear()
    with contextlib.suppress(TypeError):
        _prepared[key] = prepared
