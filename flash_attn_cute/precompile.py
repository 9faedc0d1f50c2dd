"""Compiling kernels before anything asks for them, so that no request waits for a compiler."""

from __future__ import annotations

import os

import torch

from flash_attn_cute import launch

DEFAULTS = {
    "dtype": "bf16",  # or "fp16"
    "head_dim": 128,
    "head_dim_v": 128,
    "qheads_per_kvhead": 1,
    "pack_gqa": False,
    "causal": False,
    "window": (False, False),  # whether there is a limit on the left, on the right
    "softcap": False,
    "sink": None,  # or its dtype: "fp32", "bf16", "fp16"
    "lse": False,
    "varlen_q": False,
    "varlen_k": False,
    "seqused_q": False,
    "seqused_k": False,
    "page_size": None,  # of paged keys, which go without varlen_k
    "planned": False,  # called with a plan
    "splits": False,  # one that may split
    "few_rows": False,  # the tile of decodes: at most 64 rows (queries times packed heads) a sequence
}


def precompile(config: dict) -> None:
    """Compiles what a configuration needs into the cache on disk, for what CUTE_DSL_ARCH names, the GPU that there is,
    or Hopper. Needs no GPU.

    config: what differs from DEFAULTS. Raises ValueError for other fields.
    """
    unknown = config.keys() - DEFAULTS.keys()
    if unknown:
        raise ValueError(f"config: got {sorted(unknown)}; takes {sorted(DEFAULTS)}")
    for key in keys_of(DEFAULTS | config, _architecture()):
        launch.cache.get(key, lambda key=key: launch.compile_kernel(key))


def keys_of(config: dict, architecture: str) -> list[launch.KernelKey]:
    """Of the forward kernels that a complete configuration may take: with splits, one for each way to merge them."""
    c = config
    key = launch.KernelKey(
        architecture,
        "forward",
        c["dtype"],
        c["head_dim"],
        c["head_dim_v"],
        c["qheads_per_kvhead"],
        c["pack_gqa"] and c["qheads_per_kvhead"] > 1,
        c["causal"],
        bool(c["window"][0]),
        bool(c["window"][1]) and not c["causal"],
        c["softcap"],
        c["varlen_q"],
        c["varlen_k"] and c["page_size"] is None,
        c["seqused_q"],
        c["seqused_k"],
        c["sink"],
        c["lse"],
        dynamic=False,
        planned=c["planned"] or c["splits"],
        splits=c["splits"],
        few_rows=c["few_rows"],
    )
    if c["page_size"] is not None:
        key = key._replace(page_span=launch.span_of_pages(c["page_size"], key.tile, key.few_rows))
    key = key._replace(dynamic=key.is_uneven())
    return [key._replace(combine_warps=warps) for warps in ((1, 4) if key.splits else (0,))]


def _architecture() -> str:
    named = os.environ.get("CUTE_DSL_ARCH")
    if named:
        return named
    if torch.cuda.is_available():
        return launch.ARCHITECTURES[torch.cuda.get_device_capability()]
    return "sm_90a"
