"""Runs PTX text over numpy arrays, with nothing but the engine in between."""

import numpy as np

from flash_attn_cute.emulator.engine import Engine
from flash_attn_cute.emulator.launch import Allocation, EngineOptions, LaunchRecord


def launch(
    ptx, params, arrays, block=(32, 1, 1), options=None, arch="sm_90a", grid=(1, 1, 1), cluster=(1, 1, 1), smem=0
):
    """Runs entry `k` of `ptx` over numpy arrays; parameters are the arrays' addresses, then words."""
    addresses = np.array([array.ctypes.data for array in arrays], np.uint64).tobytes()
    allocations = [Allocation(array.ctypes.data, array.nbytes, f"array {n}") for n, array in enumerate(arrays)]
    words = np.array(params, np.uint32).tobytes()
    record = LaunchRecord(ptx, "k", arch, grid, block, cluster, smem, addresses + words, allocations)
    return Engine(options or EngineOptions(sms=2)).run(record)
