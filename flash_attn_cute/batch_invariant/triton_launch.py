"""What launches of Triton kernels on plain tensors share."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from flash_attn_cute.batch_invariant.triton_device import locate

# Triton reads TRITON_INTERPRET when it defines a kernel.
INTERPRETED = not isinstance(locate, triton.runtime.JITFunction)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def on_device(x: Tensor):
    """Launches inside go to the GPU of x."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def check_dtype(name: str, x: Tensor) -> None:
    """Raises NotImplementedError for a dtype that has no batch-invariant kernel: another would break the promise."""
    if x.dtype not in _DTYPES:
        raise NotImplementedError(f"{name}: {x.dtype} in batch-invariant mode; takes {', '.join(map(str, _DTYPES))}")
