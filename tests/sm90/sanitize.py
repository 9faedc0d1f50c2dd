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

import torch

from tests.attention_cases import (
    GuardedOutput,
    assert_close_to_reference,
    attention,
    build_tensors,
    on_cpu,
    problem_of,
)

PAIRS = [(1, 70), (130, 200), (0, 5), (64, 0), (129, 129)]
# Name, how the tensors are built, options of the call. Each takes another path: warps that load, wait, mask and store.
CALLS = [
    ("d64 causal", {"head_dim": 64}, {"causal": True}),
    ("d128 full", {"head_dim": 128}, {}),
    ("d128 causal, heads packed", {"head_dim": 128, "heads": 8}, {"causal": True, "pack_gqa": True}),
    ("d128 dynamic", {"head_dim": 128}, {"causal": True, "pack_gqa": False, "scheduler": "dynamic"}),
    ("d128 single tile", {"head_dim": 128}, {"causal": True, "pack_gqa": False, "scheduler": "single_tile"}),
    ("d256 window", {"head_dim": 256}, {"window_size": (40, 10)}),
    ("d192-128 causal", {"head_dim": 192, "head_dim_v": 128}, {"causal": True}),
    ("d72 causal", {"head_dim": 72}, {"causal": True}),
    ("batched, seqused", {"head_dim": 128, "layout_q": "batched", "layout_k": "batched"}, {"causal": True}),
    ("splits of 128 keys, planned", {"head_dim": 128, "heads": 8}, {"causal": True, "seqlen_k_per_split": 128}),
    (
        "sink, softcap, unused rows",
        {"head_dim": 128, "sink_dtype": torch.bfloat16, "slack_q": 3, "slack_k": 5},
        {"softcap": 20.0},
    ),
]


def run_calls() -> None:
    for name, shape, options in CALLS:
        tensors = build_tensors([q for q, _ in PAIRS], [k for _, k in PAIRS], device="cuda", **shape)
        problem = problem_of(tensors, **options)
        guarded = GuardedOutput(problem, "cuda", around_heads=True)
        out, lse = attention(tensors._replace(out=guarded.out), **options)
        torch.cuda.synchronize()
        guarded.check()
        # On the CPU: the reference's own kernels are not under test, and would be slow there.
        assert_close_to_reference(out.cpu(), lse.cpu(), on_cpu(tensors), problem)
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
