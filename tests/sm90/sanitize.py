"""A small set of calls to run under compute-sanitizer; it slows a kernel down a hundredfold, so sizes are tiny.

python -m tests.sm90.sanitize                     the calls alone
python -m tests.sm90.sanitize --tool memcheck     the same under compute-sanitizer; exits 1 on any finding
python -m tests.sm90.sanitize --tool racecheck
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.attention_cases import (
    GuardedOutput,
    assert_close_to_reference,
    attention,
    build_tensors,
    on_cpu,
    problem_of,
)
from tests.emulated.query_bias_forward import with_query_side
from tests.kv_cache_cases import CacheCase, build
from tests.kv_cache_matrix import assert_right

PREFILL = [(1, 70), (130, 200), (0, 5), (64, 0), (129, 129)]
DECODE = [(1, 300), (1, 1), (0, 5), (1, 0), (1, 129)]
D128 = {"head_dim": 128}


class Call(NamedTuple):
    """One call of `flash_attn_varlen_func`. Each takes another path: warps that load, wait, mask and store."""

    name: str
    build: dict[str, Any]  # how its tensors are built
    options: dict[str, Any]
    pairs: list[tuple[int, int]] = PREFILL  # query and key length of each sequence
    of_queries: dict[str, Any] | None = None  # masks and biases of each query


def _paged(page_size: int, **build: Any) -> dict[str, Any]:
    return D128 | {"layout_k": "paged", "page_size": page_size} | build


FEW_ROWS = {"causal": True, "max_seqlen_q": 1, "pack_gqa": True}
CALLS = [
    Call("d64 causal", {"head_dim": 64}, {"causal": True}),
    Call("d128 full", D128, {}),
    Call("d128 causal, heads packed", D128 | {"heads": 8}, {"causal": True, "pack_gqa": True}),
    Call("d128 dynamic", D128, {"causal": True, "pack_gqa": False, "scheduler": "dynamic"}),
    Call("d128 single tile", D128, {"causal": True, "pack_gqa": False, "scheduler": "single_tile"}),
    Call("d256 window", {"head_dim": 256}, {"window_size": (40, 10)}),
    Call("d192-128 causal", {"head_dim": 192, "head_dim_v": 128}, {"causal": True}),
    Call("d72 causal", {"head_dim": 72}, {"causal": True}),
    Call("batched, seqused", D128 | {"layout_q": "batched", "layout_k": "batched"}, {"causal": True}),
    Call("splits of 128 keys, planned", D128 | {"heads": 8}, {"causal": True, "seqlen_k_per_split": 128}),
    Call(
        "sink, softcap, unused rows",
        D128 | {"sink_dtype": torch.bfloat16, "slack_q": 3, "slack_k": 5},
        {"softcap": 20.0},
    ),
    Call("pages of 64", _paged(64), {"causal": True}),
    Call("pages of 16", _paged(16), {"causal": True}),
    Call("pages of 1, gathered", _paged(1), {"causal": True}),
    Call("decode, pages of 64", _paged(64, heads=8), FEW_ROWS, DECODE),
    Call("decode, pages of 16", _paged(16, heads=8), FEW_ROWS, DECODE),
    Call("decode, pages of 1", _paged(1, heads=8), FEW_ROWS, DECODE),
    Call("decode, pages of 16, splits of 128 keys", _paged(16), FEW_ROWS | {"seqlen_k_per_split": 128}, DECODE),
    Call("decode, pages of 16, splits decided on the device", _paged(16), FEW_ROWS | {"num_splits": 0}, DECODE),
    Call("bias a KV head, mask for all", D128 | {"key_bias_heads": 2, "key_mask_heads": 1}, {"causal": True}),
    Call("bias a query head, heads packed", D128 | {"key_bias_heads": 4}, {"causal": True, "pack_gqa": True}),
    Call("bias, pages of 16", _paged(16, key_bias_heads=4, key_mask_heads=2), {"causal": True}),
    Call("bias, decode, pages of 64", _paged(64, heads=8, key_bias_heads=8, key_mask_heads=1), FEW_ROWS, DECODE),
    Call("bias, decode, pages of 1", _paged(1, heads=8, key_bias_heads=1, key_mask_heads=8), FEW_ROWS, DECODE),
    Call("of queries", D128, {"causal": True, "pack_gqa": True}, of_queries={"mask_heads": 1, "bias_heads": 4}),
    Call("of queries, decode, pages of 16", _paged(16), FEW_ROWS, DECODE, of_queries={"bias_heads": 2}),
]
# Calls of `flash_attn_with_kvcache`: new keys, rotated, and queries over all of them.
APPENDS = {
    "append, pages of 16": CacheCase([70, 0, 129], [1, 130, 3], [1, 130, 3], 16, head_dim=128, rotary_dim=64),
    "append, pages of 1, decode": CacheCase([70, 0, 129], [1] * 3, [1] * 3, 1, heads=8, head_dim=128, rotary_dim=128),
    "append, rows of a cache": CacheCase([70, 0, 129], [2, 5, 0], [2, 5, 1], None, head_dim=128, rotary_dim=32),
}


def run_calls() -> None:
    for call in CALLS:
        tensors = build_tensors([q for q, _ in call.pairs], [k for _, k in call.pairs], device="cuda", **call.build)
        options = call.options
        if call.of_queries is not None:
            width = max(k for _, k in call.pairs)
            tensors = with_query_side(tensors, width, **call.of_queries)
            options = options | {"max_seqlen_k": width}
        problem = problem_of(tensors, **options)
        guarded = GuardedOutput(problem, "cuda", around_heads=True)
        out, lse = attention(tensors._replace(out=guarded.out), **options)
        torch.cuda.synchronize()
        guarded.check()
        # On the CPU: the reference's own kernels are not under test, and would be slow there.
        assert_close_to_reference(out.cpu(), lse.cpu(), on_cpu(tensors), problem)
        print(f"{call.name}: right", flush=True)
    for name, case in APPENDS.items():
        assert_right(build(case, "cuda"), causal=True)
        print(f"{name}: right", flush=True)


def run_under(tool: str) -> int:
    sanitizer = shutil.which("compute-sanitizer") or str(
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    )
    # Each tensor its own allocation, or memcheck sees one pool in which every neighbour is valid memory.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # API errors: the DSL asks the driver for entry points that it may not have, and handles the answer.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [sanitizer, "--tool", tool, *options, "--error-exitcode", "1"]
    return subprocess.run([*command, sys.executable, "-m", __spec__.name], env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Run attention calls, on their own or under compute-sanitizer.")
    parser.add_argument("--tool", choices=["memcheck", "racecheck", "synccheck", "initcheck"])
    tool = parser.parse_args().tool
    if tool is not None:
        return run_under(tool)
    run_calls()
    return 0


if __name__ == "__main__":
    sys.exit(main())
