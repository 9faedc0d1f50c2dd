"""Schedulers and planning on ragged batches: every scheduler x length pattern x planning off, on and cached.

    python benchmarks/varlen_scheduler.py --markdown out.md --csv out.csv

One run on one GPU: ceilings first, then for each pattern our own variants and flash-attn-4, in turn with a cold L2,
medians. The planner's own time is that of a captured graph of planning launches, divided by their number, so a share of
the gaps between launches is in it. The last table is the list that scheduling must show, computed from these rows.
Exits with 1 if a variant of ours computed something wrong.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks import report as show
from benchmarks.peers import AttentionInputs, FlashAttention4, installed
from benchmarks.provenance import provenance
from benchmarks.rows import Row, best_seconds, one_line, ratio, run_once, timed_row
from benchmarks.targets import FLASH_ATTN_4, Target
from benchmarks.timing import Ceilings, CudaStopwatch, measure_ceilings, time_interleaved
from benchmarks.variants import Variant, plan
from benchmarks.verify import Check
from benchmarks.workloads import Workload, long_tail, prefill_among_decodes, ragged, tiny_sequences

VARIANTS = (
    Variant("single-tile", "off", scheduler="single_tile"),
    Variant("static", "off", scheduler="static"),
    Variant("dynamic", "off", scheduler="dynamic"),
    Variant("planned", "on", scheduler="dynamic"),
    Variant("cached", "cached", scheduler="dynamic"),
    Variant("split", "cached", num_splits=0, scheduler="dynamic"),
    Variant("auto"),
)
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


def measure(workload: Workload, ceilings: Ceilings, stopwatch: CudaStopwatch, iterations: int) -> Row:
    """One row: what every variant took, and flash-attn-4."""
    inputs = AttentionInputs.random(workload)
    peers, _ = installed([FlashAttention4()])
    makers = {each.name: partial(each.make, workload, inputs) for each in (*peers, *VARIANTS)}
    candidates, results = run_once(makers, Check(workload, inputs))
    timings = time_interleaved(candidates, stopwatch, iterations=iterations, budget_seconds=1.0)
    return timed_row(workload.described(), workload, ceilings, results, timings)


def planner_microseconds(batch: int, stopwatch: CudaStopwatch, launches: int = 20) -> float:
    """Of one planning launch, for `batch` decodes of 1 to 4096 keys."""
    rng = random.Random(batch)
    workload = ragged(f"planner {batch}", [1] * batch, [rng.randint(1, 4096) for _ in range(batch)])
    lengths = AttentionInputs(
        *(torch.empty(0, device="cuda") for _ in range(3)),
        torch.tensor(workload.cu_q, dtype=torch.int32, device="cuda"),
        torch.tensor(workload.cu_k, dtype=torch.int32, device="cuda"),
    )
    plan(workload, lengths, 0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            plan(workload, lengths, 0)
    return time_interleaved({"plan": graph.replay}, stopwatch)["plan"].seconds / launches * 1e6


def must_show(rows: list[Row], planner: dict[int, float], ceilings: Ceilings) -> list[Target]:
    by_name = {row["name"]: row for row in rows}

    def over(pattern: str, names: tuple[str, ...], ours: tuple[str, ...] = ("auto", "cached", "split")) -> float | None:
        return ratio(by_name[pattern], names, ours) if pattern in by_name else None

    tail, tiny = long_tail().name, tiny_sequences().name
    best_unplanned = over(tail, (FLASH_ATTN_4, "single-tile"))
    decode = best_seconds(by_name[LONG_DECODE], ("split",)) if LONG_DECODE in by_name else None
    bandwidth = by_name[LONG_DECODE]["min_bytes"] / decode / ceilings.read_bytes_per_s if decode else None
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
    show.add_file_arguments(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "varlen_scheduler.py: this benchmark times GPU kernels, and torch sees no CUDA device here", file=sys.stderr
        )
        return 2
    stopwatch = CudaStopwatch()
    ceilings = measure_ceilings(stopwatch)
    _, peers = installed([FlashAttention4()])
    report = {"provenance": provenance(options.commit), "peers": peers, "ceilings": asdict(ceilings), "rows": []}
    for workload in patterns():
        if options.only is None or re.search(options.only, workload.name):
            report["rows"].append(measure(workload, ceilings, stopwatch, options.iters))
            print(f"{workload.name}: {one_line(report['rows'][-1])}", flush=True)
            torch.cuda.empty_cache()
    report["planner_microseconds"] = {batch: planner_microseconds(batch, stopwatch) for batch in PLANNER_BATCHES}
    return finish(report, ceilings, options)


def finish(report: dict[str, Any], ceilings: Ceilings, options: argparse.Namespace) -> int:
    """Prints the tables, writes the files asked for, and says whether our own variants all stand."""
    rows, planner = report["rows"], report["planner_microseconds"]
    names = [FLASH_ATTN_4, *(variant.name for variant in VARIANTS)]
    report["targets"] = [target.as_json() for target in must_show(rows, planner, ceilings)]
    tables = [
        show.time_table("Microseconds by pattern (32/8 heads, d128, causal, bf16)", rows, names),
        show.Table("The planner's own time", ["sequences", "us"], [[str(b), f"{t:.2f}"] for b, t in planner.items()]),
        show.target_table(report["targets"]),
    ]
    for table in tables:
        print()
        table.print()
    show.write_files(options, "Schedulers and planning on ragged batches", report, tables)
    wrong = show.problems(rows, names[1:])
    if wrong:
        print("\nNot right:", *wrong, sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
