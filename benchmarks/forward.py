"""The forward sweep: every workload of a preset, every implementation that is installed, one run on one GPU.

    python benchmarks/forward.py --preset dense
    python benchmarks/forward.py --preset all --host-time --json out.json --markdown out.md --plot out.png

Measures the two ceilings first, then each workload: outputs are checked before anything is timed, candidates run in
turn with a cold L2, medians count. The last table is the list the forward must show, computed from these rows.
Exits with 1 if one of our own calls failed or computed something wrong; a peer's failure is reported, and hides nobody.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Started by path: import from the repository, and do not let this folder's file names stand at the top level.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks import report as show
from benchmarks.peers import OURS, PEERS, Attention, AttentionInputs, Peer, installed, peers_named
from benchmarks.provenance import provenance
from benchmarks.rows import Row, one_line, run_once, timed_row
from benchmarks.targets import FLASH_ATTN_4, forward_targets, summarise
from benchmarks.timing import Ceilings, CudaStopwatch, host_seconds_per_call, measure_ceilings, time_interleaved
from benchmarks.verify import Check
from benchmarks.workloads import HOST_TIME_WORKLOAD, PRESETS, Workload


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="dense")
    parser.add_argument("--only", metavar="REGEX", help="only workloads whose name matches")
    parser.add_argument(
        "--peers", metavar="A,B", help=f"of {', '.join(peer.name for peer in PEERS)}; default: all installed"
    )
    parser.add_argument("--iters", type=int, default=20, metavar="N", help="timed rounds, at most (default 20)")
    parser.add_argument("--budget", type=float, default=2.0, metavar="SECONDS", help="GPU seconds a workload, about")
    parser.add_argument("--host-time", action="store_true", help="also measure the host time of an eager call")
    show.add_file_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a bar chart (needs matplotlib)")
    return parser.parse_args(arguments)


def run_peers(
    workload: Workload, inputs: AttentionInputs, peers: list[Peer]
) -> tuple[dict[str, Attention], dict[str, Any]]:
    """Runs whoever takes the workload, and ours, once: see rows.run_once."""
    # Peers come first, so that our output is compared in full with one that the samples found right.
    makers = {p.name: partial(p.make, workload, inputs) for p in (*peers, OURS) if p.supports(workload)}
    return run_once(makers, Check(workload, inputs))


def measure(workload: Workload, peers: list[Peer], ceilings: Ceilings, stopwatch: CudaStopwatch, options) -> Row:
    """One row: the workload's counts, its floor, and the result of every candidate."""
    inputs = AttentionInputs.random(workload)
    candidates, results = run_peers(workload, inputs, peers)
    timings = time_interleaved(candidates, stopwatch, iterations=options.iters, budget_seconds=options.budget)
    return timed_row(workload.described(), workload, ceilings, results, timings)


def measure_host_time(peers: list[Peer]) -> dict[str, float]:
    """Microseconds the host spends in one eager call, ours and flash-attn-4's, on a problem that keeps no GPU busy."""
    inputs = AttentionInputs.random(HOST_TIME_WORKLOAD)
    timed = [OURS, *(peer for peer in peers if peer.name == FLASH_ATTN_4)]
    candidates, _ = run_peers(HOST_TIME_WORKLOAD, inputs, timed[1:])
    ordered = {peer.name: candidates[peer.name] for peer in timed if peer.name in candidates}
    seconds = host_seconds_per_call(ordered, torch.cuda.synchronize)
    return {name: value * 1e6 for name, value in seconds.items()}


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        wanted = peers_named(options.peers)
    except ValueError as error:
        print(f"forward.py: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("forward.py: this benchmark times GPU kernels, and torch sees no CUDA device here", file=sys.stderr)
        return 2
    broken = OURS.missing_because()
    if broken is not None:
        print(f"forward.py: flash_attn_cute does not import: {broken}", file=sys.stderr)
        return 2
    workloads = [w for w in PRESETS[options.preset]() if options.only is None or re.search(options.only, w.name)]
    if not workloads:
        print(f"forward.py: no workload of preset {options.preset} matches {options.only!r}", file=sys.stderr)
        return 2

    peers, about_peers = installed(wanted)
    stopwatch = CudaStopwatch()
    ceilings = measure_ceilings(stopwatch)
    report: dict[str, Any] = {
        "provenance": provenance(options.commit),
        "peers": about_peers,
        "ceilings": asdict(ceilings),
        "rows": [],
    }
    print("\n".join(show.header_lines(report)), flush=True)

    for index, workload in enumerate(workloads, 1):
        # A line a row as it is done: a sweep that dies, or is cut short, has still said what it found.
        row = measure(workload, peers, ceilings, stopwatch, options)
        report["rows"].append(row)
        print(f"[{index}/{len(workloads)}] {workload.name}: {one_line(row)}", flush=True)
        torch.cuda.empty_cache()

    report["host_microseconds"] = measure_host_time(peers) if options.host_time else {}
    return finish(report, [peer.name for peer in peers], options)


def finish(report: dict[str, Any], peers: list[str], options: argparse.Namespace) -> int:
    """Prints the tables, writes the files asked for, and says whether our own rows all stand."""
    rows = report["rows"]
    candidates = [OURS.name, *peers]
    report["summary"] = summarise(rows, peers)
    report["targets"] = [target.as_json() for target in forward_targets(rows, report["host_microseconds"])]
    tables = [
        show.row_table("Forward", rows, peers),
        show.rate_table(rows, candidates),
        show.summary_table(report["summary"]),
    ]
    if report["host_microseconds"]:
        tables.append(show.host_table(report["host_microseconds"]))
    tables.append(show.target_table(report["targets"]))
    for table in tables:
        print()
        table.print()
    failures = show.problems(rows)
    if failures:
        print("\nNot counted:", *failures, sep="\n  ")
    show.write_files(options, "Forward benchmark", report, tables)
    if options.plot:
        try:
            show.write_bars(options.plot, report, candidates, show.TFLOPS)
        except ImportError as error:
            print(f"forward.py: no plot: {error}", file=sys.stderr)
    ours_stand = all(row["results"].get(OURS.name, {}).get("correct", False) for row in rows)
    return 0 if ours_stand else 1


if __name__ == "__main__":
    sys.exit(main())
