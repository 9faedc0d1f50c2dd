"""Attention in Triton, forward and backward, against the CuTe forward and flash-attn-4 in the same run.

    python benchmarks/triton_attention.py --markdown triton.md
    python benchmarks/triton_attention.py --dims 128 --forward 128,64,8,3 128,128,8,3 --dkv 64,64,8,2

--forward, --dq and --dkv time other tiles (rows, keys, warps, stages) beside the chosen ones. TFLOP/s count what has to
be computed: a backward is 2.5 forwards, though ours computes the scores twice. Medians, in turn, with a cold L2. The
goals are those of d128 causal 4x4096: forward at least 0.60 of flash-attn-4's, backward at least 0.50.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor

from benchmarks import report as show
from benchmarks.peers import FlashAttention4, installed
from benchmarks.provenance import provenance
from benchmarks.rows import Row, ratio
from benchmarks.targets import FLASH_ATTN_4, Target
from benchmarks.timing import Ceilings, CudaStopwatch, measure_ceilings, time_interleaved
from flash_attn_cute import flash_attn_varlen_func
from flash_attn_cute.batch_invariant import triton_attention
from flash_attn_cute.batch_invariant.triton_tuning import KernelTiles, Tiles, tiles_for

SHAPES = ((4, 4096), (16, 1024), (1, 16384))  # (batch, length)
HEADS = 16
GOALS = {"forward": 0.60, "backward": 0.50}
GOAL_SHAPE = "d128 causal 4x4096"
TRITON = "triton"  # with the chosen tiles


def with_tiles(call: Callable[[], Any], tiles: KernelTiles | None) -> Callable[[], Any]:
    """The call with other tiles than the chosen ones."""
    if tiles is None:
        return call

    def changed() -> Any:
        chosen = triton_attention.tiles_for
        triton_attention.tiles_for = lambda *_: tiles
        try:
            return call()
        finally:
            triton_attention.tiles_for = chosen

    return changed


def gradients(out: Tensor, inputs: tuple[Tensor, ...], dout: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def _differs(tiles: KernelTiles | None, chosen: KernelTiles) -> str:
    """Tiles by the kernel whose they are, where they are not the chosen ones."""
    pairs = zip(KernelTiles._fields, tiles or chosen, chosen, strict=True)
    return "".join(f" {kernel} {','.join(map(str, mine))}" for kernel, mine, theirs in pairs if mine != theirs)


def candidates(
    batch: int, length: int, dim: int, causal: bool, chosen: KernelTiles, others: list[KernelTiles]
) -> dict[str, dict]:
    """{"forward": {name: call}, "backward": {name: call}}: those that run."""
    q, k, v, dout = (torch.randn(batch * length, HEADS, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * length
    arguments = (starts, starts, length, length)
    calls: dict[str, dict] = {"forward": {}, "backward": {}}

    def ours(backend: str) -> Callable[[], Tensor]:
        return lambda: flash_attn_varlen_func(q, k, v, *arguments, causal=causal, backend=backend)

    calls["forward"]["cute"] = ours("cute")
    leaves = tuple(x.detach().clone().requires_grad_() for x in (q, k, v))
    out = flash_attn_varlen_func(*leaves, *arguments, causal=causal, backend="triton")
    for tiles in (None, *others):
        if tiles is None or tiles.forward != chosen.forward:
            calls["forward"][TRITON + _differs(tiles, chosen)] = with_tiles(ours("triton"), tiles)
        if tiles is None or tiles.forward == chosen.forward:
            calls["backward"][TRITON + _differs(tiles, chosen)] = with_tiles(gradients(out, leaves, dout), tiles)
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError as error:
        print(f"flash-attn-4 is absent: {error}")
    else:
        theirs = tuple(x.detach().view(batch, length, HEADS, dim).clone().requires_grad_() for x in (q, k, v))

        def fa4(*tensors: Tensor) -> Tensor:
            result = flash_attn_func(*tensors, causal=causal)
            return result[0] if isinstance(result, tuple) else result

        calls["forward"][FLASH_ATTN_4] = lambda: fa4(*(x.detach() for x in theirs))
        calls["backward"][FLASH_ATTN_4] = gradients(fa4(*theirs), theirs, dout.view(batch, length, HEADS, dim))
    return {direction: {n: c for n, c in named.items() if _runs(n, c)} for direction, named in calls.items()}


def _runs(name: str, call: Callable[[], Any]) -> bool:
    try:
        call()
        torch.cuda.synchronize()
    except Exception as error:  # whatever it is, of tiles that do not fit or of a peer, it is said and the rest goes on
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return False
    return True


def tiles_of(text: str) -> Tiles:
    return Tiles(*map(int, text.split(",")))


def rows_of(options: argparse.Namespace, ceilings: Ceilings, stopwatch: CudaStopwatch) -> Iterator[Row]:
    """A row a shape and direction."""
    for dim in options.dims:
        chosen = tiles_for(torch.cuda.get_device_capability(), torch.bfloat16, max(16, 1 << (dim - 1).bit_length()))
        others = [chosen._replace(**{kernel: t}) for kernel in KernelTiles._fields for t in getattr(options, kernel)]
        for (batch, length), causal in product(SHAPES, (True, False)):
            what = f"d{dim} {'causal' if causal else 'full'} {batch}x{length}"
            if options.only not in what:
                continue
            forward_flops = 4 * batch * length * length * dim * HEADS * (0.5 if causal else 1.0)
            for direction, calls in candidates(batch, length, dim, causal, chosen, others).items():
                flops = forward_flops * (2.5 if direction == "backward" else 1.0)
                yield {
                    "name": f"{what} {direction}",
                    "floor_microseconds": flops / ceilings.matmul_flops_per_s * 1e6,
                    "results": {
                        name: {
                            "microseconds": timing.seconds * 1e6,
                            "seconds": timing.seconds,
                            "spread": timing.spread,
                            "rounds": timing.rounds,
                            "tflops": flops / timing.seconds / 1e12,
                        }
                        for name, timing in time_interleaved(calls, stopwatch).items()
                    },
                }


def must_show(rows: list[Row]) -> list[Target]:
    by_name = {row["name"]: row for row in rows}

    def speed(direction: str) -> float | None:
        row = by_name.get(f"{GOAL_SHAPE} {direction}")
        return None if row is None else ratio(row, (FLASH_ATTN_4,), (TRITON,))

    return [
        Target(f"{GOAL_SHAPE} {direction}: speed, of flash-attn-4's", speed(direction), goal)
        for direction, goal in GOALS.items()
    ]


def tables(report: dict[str, Any]) -> list[show.Table]:
    names = list(dict.fromkeys(name for row in report["rows"] for name in row["results"]))
    lines = [
        [row["name"], *(show.figure(row["results"].get(name, {}).get("tflops"), "{:.0f}") for name in names)]
        for row in report["rows"]
    ]
    title = f"TFLOP/s ({HEADS} heads, bf16); a backward is 2.5 forwards"
    return [show.Table(title, ["workload", *names], lines), show.target_table(report["targets"])]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--only", metavar="TEXT", default="", help="only shapes with this in their name")
    for kernel in KernelTiles._fields:
        parser.add_argument(f"--{kernel}", type=tiles_of, nargs="+", default=[], metavar="M,N,WARPS,STAGES")
    show.add_file_arguments(parser)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("this benchmark times GPU kernels, and torch sees no CUDA device here", file=sys.stderr)
        return 2

    stopwatch = CudaStopwatch()
    ceilings = measure_ceilings(stopwatch)
    _, peers = installed([FlashAttention4()])
    report = {"provenance": provenance(options.commit), "peers": peers, "ceilings": asdict(ceilings), "rows": []}
    for row in rows_of(options, ceilings, stopwatch):
        report["rows"].append(row)
        rates = ", ".join(f"{name} {result['tflops']:.0f}" for name, result in row["results"].items())
        print(f"{row['name']}: {rates}", flush=True)
    targets = must_show(report["rows"])
    report["targets"] = [target.as_json() for target in targets]
    found = tables(report)
    for table in found:
        table.print()
    show.write_files(options, "Attention in Triton, forward and backward", report, found)
    return 1 if any(target.met is False for target in targets) else 0


if __name__ == "__main__":
    sys.exit(main())
