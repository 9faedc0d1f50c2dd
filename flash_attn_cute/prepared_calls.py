"""What was decided for a call, kept under everything that decided it, so that the next one like it only launches.

Checks, the choice of a kernel and the size of its launch read shapes, strides, dtypes, devices and options, never the
contents of a tensor: two calls with one signature have one `PreparedLaunch`. Layers of a model, and steps of a decode
loop, are such calls.
"""

from __future__ import annotations

from flash_attn_cute.launch import PreparedLaunch
from flash_attn_cute.problem import AttentionTensors

# Bounds the memory that calls of ever new sizes take (a signature and its launch are about 2 KiB).
CAPACITY = 4096

_prepared: dict[tuple, PreparedLaunch] = {}


def signature(tensors: AttentionTensors, options: tuple) -> tuple | None:
    """A key for the call; None if an argument is of a type that has none, which validation then says better."""
    q, k, v = tensors[:3]
    try:
        key = (
            (q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device),
            (v.shape, v.stride(), v.dtype, v.device),
            tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors[3:]]),
            options,
            tuple(map(type, options)),  # True equals 1 and 1.0, and is not welcome in the same places
        )
        hash(key)
    except (AttributeError, TypeError):
        return None
    return key


def find(key: tuple | None) -> PreparedLaunch | None:
    return _prepared.get(key)


def keep(key: tuple | None, prepared: PreparedLaunch) -> None:
    if key is None:
        return
    if len(_prepared) >= CAPACITY:
        _prepared.clear()
    _prepared[key] = prepared
