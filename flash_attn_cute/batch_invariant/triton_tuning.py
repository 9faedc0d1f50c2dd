"""Tile shapes of the Triton attention kernels, by what a tile needs: one choice per (architecture, dtype, D, Dv).

A choice never depends on lengths or on the batch: a row's bits depend on BLOCK_N and on the instructions that BLOCK_M,
BLOCK_N and the warps lead to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """Rows of a query tile (tokens times packed heads), keys of a block, and how Triton runs it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class KernelTiles(NamedTuple):
    forward: Tiles
    dq: Tiles  # a query tile stays, blocks of keys pass
    dkv: Tiles  # block_n keys stay, tiles of block_m queries pass


# Small enough that short test sequences have several blocks. numpy computes them, so warps mean nothing.
INTERPRETER = KernelTiles(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1))

# fp32 products run on the FP32 units from registers: small tiles, or everything spills.
_FP32 = KernelTiles(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1))

# By head dimension, padded to a power of two. Hopper and data-centre Blackwell have 227 KiB of shared memory a CTA:
# at D = 128 q takes 32 KiB and a stage of 128 keys and values 64 KiB. The fastest of those timed on an H200
# (csrc_notes/batch_invariance.md).
_LARGE_SHARED_MEMORY = {
    64: KernelTiles(Tiles(128, 64, 4, 3), Tiles(128, 32, 8, 3), Tiles(64, 64, 4, 1)),
    128: KernelTiles(Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 1)),
    256: KernelTiles(Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 3), Tiles(64, 64, 8, 1)),
}
# Ampere data-centre GPUs have 163 KiB, all others 99 KiB; what fits the smaller serves both.
_SMALL_SHARED_MEMORY = {
    64: KernelTiles(Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    128: KernelTiles(Tiles(128, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(32, 64, 4, 2)),
    256: KernelTiles(Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
}
LARGE_SHARED_MEMORY = ((9, 0), (10, 0), (10, 3))


def tiles_for(capability: tuple[int, int] | None, dtype: torch.dtype, padded_dim: int) -> KernelTiles:
    """capability: None for Triton's interpreter. padded_dim: the larger of D and Dv, as the kernels pad it."""
    if capability is None:
        return INTERPRETER
    if dtype == torch.float32:
        return _FP32
    table = _LARGE_SHARED_MEMORY if capability in LARGE_SHARED_MEMORY else _SMALL_SHARED_MEMORY
    return table[max(padded_dim, 64)]
