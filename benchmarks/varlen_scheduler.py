"""Schedulers and planning on ragged batches: every scheduler x length pattern x planning off, on and cached.

    python benchmarks/varlen_scheduler.py --markdown out.md --csv out.csv

One run on one GPU: ceilings first, then for each pattern our own variants and flash-attn-4, in turn with a cold L2,
medians. The planner's own time is that of a captured graph of planning launches, divided by their number, so a share of
the gaps between launches is in it. The last table is the list that scheduling must show, computed from these rows.
Exits with 1 if a variant of ours computed something wrong.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks import report as show
from benchmarks.forward import Check, describe_error
from benchmarks.peers import PEERS, AttentionInputs
from benchmarks.provenance import provenance
from benchmarks.targets import FLASH_ATTN_4, Target
from benchmarks.timing import Ceilings, CudaStopwatch, measure_ceilings, time_interleaved
from benchmarks.workloads import Workload, long_tail, prefill_among_decodes, ragged, tiny_sequences

# Our variants: scheduler, planning, num_splits. "on" plans in the call, "cached" once for all calls.
VARIANTS = {
    "single-tile": dict(scheduler="single_tile", planning="off"),
    "static": dict(scheduler="static", planning="off"),
    "dynamic": dict(scheduler="dynamic", planning="off"),
    "planned": dict(scheduler="dynamic", planning="on"),
    "cached": dict(scheduler="dynamic", planning="cached"),
    "split": dict(scheduler="dynamic", planning="cached", num_splits=0),
    "auto": dict(scheduler="auto", planning="auto"),
}
PLANNER_BATCHES = (32, 1024, 4096, 20000)
LONG_DECODE = "decode 1x131072 32/8"


def patterns() -> list[Workload]:
    rng = random.Random(3)
    uniform = [rng.randint(64, 4096) for _ in range(64)]
    bimodal = [rng.choice((128, 128, 128, 8192)) for _ in range(48)]
    return [
        ragged("constant 32x2048", [2048] * 32),
        ragged("uniform 64x64..4096", uniform),
        ragged("ascending 64x64..4096", sorted(uniform)),
        ragged("descending 64x64..4096", sorted(uniform, reverse=True)),
        ragged("bimodal 48x128|8192", bimodal),
        ragged("short 512x128", [128] * 512),
        long_tail(),
        tiny_sequences(),
        prefill_among_decodes(),
        ragged(LONG_DECODE, [1], [131072]),
        ragged("decode 63x512 + 1x131072", [1] * 64, [512] * 32 + [131072] + [512] * 31),
        ragged("decode 64x8192", [1] * 64, [8192] * 64),
    ]


def metadata_of(workload: Workload, inputs: AttentionInputs, num_splits: int) -> Any:
    from flash_attn_cute import get_scheduler_metadata

    return get_scheduler_metadata(
        workload.batch,
        workload.max_q,
        workload.max_k,
        workload.heads,
        workload.heads_kv,
        workload.head_dim,
        workload.head_dim_v,
        cu_seqlens_q=inputs.cu_seqlens_q,
        cu_seqlens_k=inputs.cu_seqlens_k,
        total_q=workload.total_q,
        causal=workload.causal,
        num_splits=num_splits,
    )


def variant(workload: Workload, inputs: AttentionInputs, scheduler: str, planning: str, num_splits: int = 1):
    from flash_attn_cute import flash_attn_varlen_func

    arguments = inputs.varlen_arguments(workload) | dict(scheduler=scheduler, num_splits=num_splits)
    metadata = {"off": False, "auto": None}.get(planning)
    if planning == "cached":
        metadata = metadata_of(workload, inputs, num_splits)

    def call() -> torch.Tensor:
        plan = metadata_of(workload, inputs, num_splits) if planning == "on" else metadata
        return flash_attn_varlen_func(inputs.q, inputs.k, inputs.v, scheduler_metadata=plan, **arguments)

    return call


def measure(workload: Workload, ceilings: Ceilings, stopwatch: CudaStopwatch, iterations: int) -> dict[str, Any]:
    """One row: microseconds or an error for each variant, and the floor."""
    inputs = AttentionInputs.random(workload)
    check = Check(workload, inputs)
    candidates: dict[str, Callable[[], torch.Tensor]] = {}
    results: dict[str, dict[str, Any]] = {}
    peer = next(peer for peer in PEERS if peer.name == FLASH_ATTN_4)
    makers = {FLASH_ATTN_4: lambda: peer.make(workload, inputs)} if peer.available() else {}
    makers |= {name: (lambda o=options: variant(workload, inputs, **o)) for name, options in VARIANTS.items()}
    for name, make in makers.items():
        try:
            call = make()
            output = call()
            torch.cuda.synchronize()
            results[name] = check(output)
            candidates[name] = call
        except Exception as error:  # one variant's failure is its own result
            results[name] = {"error": describe_error(error)}
    timings = time_interleaved(candidates, stopwatch, iterations=iterations, budget_seconds=1.0)
    for name, timing in timings.items():
        results[name]["microseconds"] = timing.seconds * 1e6
    floor = workload.floor_seconds(ceilings.matmul_flops_per_s, ceilings.read_bytes_per_s)
    return {"name": workload.name, "floor": floor * 1e6, "bytes": workload.min_bytes, "results": results}


def planner_microseconds(batch: int, stopwatch: CudaStopwatch, launches: int = 20) -> float:
    """Of one planning launch, for `batch` decodes of 1 to 4096 keys."""
    rng = random.Random(batch)
    workload = ragged(f"planner {batch}", [1] * batch, [rng.randint(1, 4096) for _ in range(batch)])
    lengths = AttentionInputs(
        *(torch.empty(0, device="cuda") for _ in range(3)),
        torch.tensor(workload.cu_q, dtype=torch.int32, device="cuda"),
        torch.tensor(workload.cu_k, dtype=torch.int32, device="cuda"),
    )
    metadata_of(workload, lengths, 0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            metadata_of(workload, lengths, 0)
    return time_interleaved({"plan": graph.replay}, stopwatch)["plan"].seconds / launches * 1e6


def must_show(rows: list[dict[str, Any]], planner: dict[int, float], ceilings: Ceilings) -> list[Target]:
    by_name = {row["name"]: row for row in rows}

    def time(pattern: str, *names: str) -> float | None:
        results = by_name.get(pattern, {"results": {}})["results"]
        times = [results[n]["microseconds"] for n in names if results.get(n, {}).get("correct")]
        return min(times) if times else None

    def over(pattern: str, names: tuple[str, ...], ours: tuple[str, ...] = ("auto", "cached", "split")) -> float | None:
        theirs, mine = time(pattern, *names), time(pattern, *ours)
        return theirs / mine if theirs and mine else None

    tail, tiny = long_tail().name, tiny_sequences().name
    best_unplanned = over(tail, (FLASH_ATTN_4, "single-tile"))
    decode = time(LONG_DECODE, "split")
    bandwidth = by_name[LONG_DECODE]["bytes"] / decode * 1e6 / ceilings.read_bytes_per_s if decode else None
    # Batches that the planner leaves whole: what the possibility of splits costs them.
    unsplit = [over(pattern, ("split",), ("dynamic",)) for pattern in ("constant 32x2048", tail)]
    cost = max(unsplit) if all(unsplit) else None
    return [
        Target("planner, up to 1024 sequences", planner.get(1024), at_most=5.0, unit="us"),
        Target("planner, 20000 sequences", planner.get(20000), at_most=20.0, unit="us"),
        Target("long tail, against the better of flash-attn-4 and single-tile", best_unplanned, 1.05),
        Target("sequences under 20 tokens, against flash-attn-4", over(tiny, (FLASH_ATTN_4,)), 3.0),
        Target("one query on 131072 keys, of the read bandwidth", bandwidth, 0.85),
        Target("a split plan that splits nothing, time over no splits", cost, at_most=1.02),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", metavar="REGEX", help="only patterns whose name matches")
    parser.add_argument("--iters", type=int, default=15, metavar="N")
    parser.add_argument("--commit", metavar="ID")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "varlen_scheduler.py: this benchmark times GPU kernels, and torch sees no CUDA device here", file=sys.stderr
        )
        return 2
    stopwatch = CudaStopwatch()
    ceilings = measure_ceilings(stopwatch)
    about = provenance(options.commit)
    rows = []
    for workload in patterns():
        if options.only is None or re.search(options.only, workload.name):
            rows.append(measure(workload, ceilings, stopwatch, options.iters))
            done = "  ".join(
                f"{n} {r['microseconds']:.1f}" if "microseconds" in r else f"{n}: {r['error']}"
                for n, r in rows[-1]["results"].items()
            )
            print(f"{workload.name}: {done}", flush=True)
            torch.cuda.empty_cache()
    planner = {batch: planner_microseconds(batch, stopwatch) for batch in PLANNER_BATCHES}
    return finish(rows, planner, ceilings, about, options)


def finish(rows, planner: dict[int, float], ceilings: Ceilings, about: dict[str, str], options) -> int:
    names = [FLASH_ATTN_4, *VARIANTS]
    lines = []
    for row in rows:
        times = [row["results"].get(name, {}).get("microseconds") for name in names]
        lines.append([row["name"], *(show.figure(time, "{:.1f}") for time in (row["floor"], *times))])
    tables = [
        show.Table("Microseconds by pattern (32/8 heads, d128, causal, bf16)", ["pattern", "floor", *names], lines),
        show.Table("The planner's own time", ["sequences", "us"], [[str(b), f"{t:.2f}"] for b, t in planner.items()]),
        show.target_table(must_show(rows, planner, ceilings)),
    ]
    for table in tables:
        print()
        table.print()
    if options.markdown:
        header = [f"- {key}: {value}" for key, value in about.items()]
        matmul, read = ceilings.matmul_flops_per_s / 1e12, ceilings.read_bytes_per_s / 1e12
        header.append(f"- ceilings: {matmul:.0f} TFLOP/s, {read:.2f} TB/s")
        text = ["# Schedulers and planning on ragged batches", "", *header]
        options.markdown.write_text("\n\n".join(["\n".join(text), *(table.as_markdown() for table in tables)]) + "\n")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["pattern", "candidate", "microseconds", "floor_microseconds", "correct"])
            for row in rows:
                for name, result in row["results"].items():
                    figures = result.get("microseconds"), row["floor"], result.get("correct")
                    writer.writerow([row["name"], name, *figures])
    wrong = [(row, name) for row in rows for name in VARIANTS if not row["results"].get(name, {}).get("correct")]
    for row, name in wrong:
        print(f"not right: {name} on {row['name']}: {row['results'].get(name)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
