#!/usr/bin/env python
"""What the forward kernels cost, counted in the emulator: instructions, cycles of each unit, and the bound they imply.

    python scripts/report.py                                    # both architectures, head dimensions 128 and 64
    python scripts/report.py --arch sm_100a --kernel ours flash-attn-4 --causal --json costs.json

One sequence, one head, bf16, through flash_attn_varlen_func; needs no GPU. Figures are per 128 x 128 tile of the score
matrix that holds a visible score (--seqlen 2048: 256 tiles, causal 136), so that work on masked tiles counts as cost;
"MMA tiles" is what the products amount to, which is more where a kernel computes what it need not. Instructions are
PTX warp-instructions over all warps, prologue and epilogue included, without instructions whose guard holds in no lane
and without waits that are tried again. What the columns mean, and what they do not, is in
csrc_notes/emulator.md, Report.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
# Started by path: import from the repository, not from this folder, where this file would hide benchmarks/report.py.
sys.path[0] = str(REPOSITORY)

from benchmarks.report import Table

ARCHITECTURES = {"sm_90a": (9, 0), "sm_100a": (10, 0)}
MODULES = {"ours": "flash_attn_cute", "flash-attn-4": "flash_attn.cute"}
TILE = 128
# By a part of the kernel's name; warps of other kernels are grouped by what they execute.
ROLES = {
    "flash_attn_cuteforward_sm90": {"load": [0], "schedule": [1], "idle": [2, 3], "softmax": range(4, 16)},
    # With two query tiles in flight: head dimensions up to (192, 128).
    "flash_attn_cuteforward_sm100": {
        "softmax": range(8),
        "correct": range(8, 12),
        "multiply": [12],
        "load": [13],
        "store": [14],
        "schedule": [15],
    },
}


class Case(NamedTuple):
    """One call: (seqlen, 1, head_dim) for each of q, k and v."""

    arch: str
    kernel: str
    head_dim: int
    seqlen: int
    causal: bool

    @property
    def tiles(self) -> int:
        """Tiles of the score matrix in which at least one score is visible."""
        count = -(-self.seqlen // TILE)
        return count * (count + 1) // 2 if self.causal else count * count


def main() -> None:
    args = parse_args()
    if args.worker:
        measured = [measure(Case(*fields)) for fields in json.loads(args.worker)]
        Path(args.json).write_text(json.dumps(measured))
        return
    masks = (True,) if args.causal else (False, True)
    architectures = list(ARCHITECTURES) if args.arch == "both" else [args.arch]
    results = []
    for arch in architectures:
        cases = [Case(arch, k, d, args.seqlen, m) for k in args.kernel for d in args.headdim for m in masks]
        results += run_worker(cases)
    title = f"Per 128x128 tile: one sequence of {args.seqlen}, one head, bf16"
    Table(title, list(COLUMNS), [as_row(result) for result in results]).print()
    for result in results:
        if "missing" in result:
            print(f"{result['arch']} {result['kernel']} d{result['head_dim']}: {result['missing']}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=(*ARCHITECTURES, "both"), default="both")
    parser.add_argument("--headdim", type=int, nargs="+", default=[128, 64], metavar="D")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--causal", action="store_true", help="causal only; without it, full and causal")
    parser.add_argument("--kernel", choices=tuple(MODULES), nargs="+", default=["ours"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole reports, warps by role and all")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # cases, in the process of one architecture
    return parser.parse_args()


def run_worker(cases: list[Case]) -> list[dict[str, Any]]:
    """Measures in a process of its own: the DSL takes one architecture a process."""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory, "measured.json")
        command = [sys.executable, __file__, "--worker", json.dumps(cases), "--json", str(target)]
        subprocess.run(command, check=True, cwd=REPOSITORY)
        return json.loads(target.read_text())


def measure(case: Case) -> dict[str, Any]:
    """The report of a case's launch, or why there is none."""
    import torch

    from flash_attn_cute.emulator import emulate

    found = case._asdict() | {"tiles": case.tiles}
    with emulate(case.arch) as session:
        session.roles.update(ROLES)
        torch.manual_seed(0)
        q, k, v = (torch.randn(case.seqlen, 1, case.head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        cu_seqlens = torch.tensor([0, case.seqlen], dtype=torch.int32, device="cuda")
        function, missing = implementation(case, (q, k, v, cu_seqlens, cu_seqlens, case.seqlen, case.seqlen))
        if missing:
            return found | {"missing": missing}
        function(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=case.seqlen,
            max_seqlen_k=case.seqlen,
            causal=case.causal,
        )
        # Launches beside the attention itself, of planning say, have no products.
        report = max(session.launches, key=lambda launch: launch.mma_multiply_adds)
        found |= {"mma_tiles": report.mma_tiles(case.head_dim, case.head_dim)}
        return found | {"report": report.as_dict(case.tiles)}


def implementation(case: Case, arguments: tuple) -> tuple[Callable | None, str | None]:
    """The function to call, or why there is none."""
    try:
        module = importlib.import_module(MODULES[case.kernel])
    except ImportError as error:
        return None, f"not importable: {error}"
    if case.kernel == "ours":
        support = module.supports(*arguments, device=ARCHITECTURES[case.arch], causal=case.causal)
        if not support:
            return None, f"not built: {support.reason}"
    return module.flash_attn_varlen_func, None


# Column: the field of `per_tile` and its number of decimals.
COLUMNS: dict[str, tuple[str, int] | None] = {
    "arch": None,
    "kernel": None,
    "D": None,
    "mask": None,
    "MMA tiles": None,
    "instructions": ("warp_instructions", 0),
    "moves": ("move", 0),
    "special ops": ("special_operations", 0),
    "FMA ops": ("fma_operations", 0),
    "MMA cycles": ("mma_cycles", 0),
    "special cycles": ("special_cycles", 0),
    "FMA cycles": ("fma_cycles", 0),
    "issue cycles": ("issue_cycles", 0),
    "without moves": ("issue_cycles_without_moves", 0),
    "bound": None,
}


def as_row(result: dict[str, Any]) -> list[str]:
    mask = "causal" if result["causal"] else "full"
    row = [result["arch"], result["kernel"], str(result["head_dim"]), mask]
    if "missing" in result:
        return row + [result["missing"].split(":")[0]] + ["-"] * (len(COLUMNS) - 5)
    costs = result["report"]["per_tile"]
    row.append(f"{result['mma_tiles']:.0f} of {result['tiles']}")
    row += [f"{costs[name]:.{decimals}f}" for name, decimals in filter(None, COLUMNS.values())]
    return [*row, f"{costs['bound']} {costs['bound_cycles']:.0f}"]


if __name__ == "__main__":
    main()
