"""The forward sweep: every workload of a preset, every implementation that is installed, one run on one GPU.

    python benchmarks/forward.py --preset dense
    python benchmarks/forward.py --preset all --host-time --json out.json --markdown out.md --plot out.png

Measures the two ceilings first, then each workload: outputs are checked before anything is timed, candidates run in
turn with a cold L2, medians count. The last table is the list the forward must show, computed from these rows.
Exits with 1 if one of our own calls failed or computed something wrong; a peer's failure is reported, and hides nobody.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Started by path: import from the repository, and do not let this folder's file names stand at the top level.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks import report as show
from benchmarks.peers import OURS, PEERS, Attention, AttentionInputs, Peer, peers_named
from benchmarks.provenance import provenance
from benchmarks.targets import FLASH_ATTN_4, forward_targets, ratio, summarise
from benchmarks.timing import Ceilings, CudaStopwatch, host_seconds_per_call, measure_ceilings, time_interleaved
from benchmarks.verify import excess, sampled_reference
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
    parser.add_argument("--commit", metavar="ID", help="the commit to report, where there is no git history to ask")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a bar chart (needs matplotlib)")
    return parser.parse_args(arguments)


def describe_error(error: Exception) -> str:
    """One line: a CUDA or compiler error can be pages long, and only its beginning is about the cause."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Check:
    """Compares outputs of one workload: sampled rows with fp32, and all rows with the first output that was right."""

    def __init__(self, workload: Workload, inputs: AttentionInputs) -> None:
        self._rows, self._expected = sampled_reference(workload, inputs.q, inputs.k, inputs.v)
        self._trusted: torch.Tensor | None = None

    def __call__(self, output: torch.Tensor) -> dict[str, Any]:
        packed = output.reshape(-1, *output.shape[-2:])
        error, correct = excess(packed[self._rows], self._expected)
        if correct and self._trusted is not None:
            error_all, correct = excess(packed, self._trusted)
            error = max(error, error_all)
        elif correct:
            self._trusted = packed.clone()
        return {"max_error": error, "correct": correct}


def run_once(
    workload: Workload, inputs: AttentionInputs, peers: list[Peer]
) -> tuple[dict[str, Attention], dict[str, Any]]:
    """Makes each candidate and runs it once, compilation included: those that run, and what is known of all."""
    check = Check(workload, inputs)
    candidates: dict[str, Attention] = {}
    results: dict[str, Any] = {}
    # Peers come first, so that our output is compared in full with one that the samples found right.
    for peer in [*peers, OURS]:
        if not peer.supports(workload):
            continue
        try:
            attention = peer.make(workload, inputs)
            output = attention()
            torch.cuda.synchronize()
            results[peer.name] = check(output)
            candidates[peer.name] = attention
        except Exception as error:  # whatever a peer raises is its own result, and hides nobody else's
            results[peer.name] = {"error": describe_error(error)}
    return candidates, results


def measure(
    workload: Workload, peers: list[Peer], ceilings: Ceilings, stopwatch: CudaStopwatch, options
) -> dict[str, Any]:
    """One row: the workload's counts, its floor, and the result of every candidate."""
    inputs = AttentionInputs.random(workload)
    candidates, results = run_once(workload, inputs, peers)
    timings = time_interleaved(candidates, stopwatch, iterations=options.iters, budget_seconds=options.budget)
    floor = workload.floor_seconds(ceilings.matmul_flops_per_s, ceilings.read_bytes_per_s)
    for name, timing in timings.items():
        timed = {
            "microseconds": timing.seconds * 1e6,
            "spread": timing.spread,
            "rounds": timing.rounds,
            "tflops": workload.flops / timing.seconds / 1e12,
            "terabytes_per_s": workload.min_bytes / timing.seconds / 1e12,
            "floor_ratio": timing.seconds / floor,
        }
        if results[name]["correct"]:
            # Ratios and targets read `seconds`: the time of a wrong result is kept, but takes part in neither.
            timed["seconds"] = timing.seconds
        results[name] |= timed
    compute_bound = workload.flops / ceilings.matmul_flops_per_s >= workload.min_bytes / ceilings.read_bytes_per_s
    row = {
        **workload.described(),
        "floor_microseconds": floor * 1e6,
        "bound": "compute" if compute_bound else "memory",
        "results": results,
    }
    for name, result in results.items():
        if name != OURS.name:
            result["over_ours"] = ratio(row, (name,))
    return row


def measure_host_time(peers: list[Peer]) -> dict[str, float]:
    """Microseconds the host spends in one eager call, ours and flash-attn-4's, on a problem that keeps no GPU busy."""
    inputs = AttentionInputs.random(HOST_TIME_WORKLOAD)
    timed = [OURS, *(peer for peer in peers if peer.name == FLASH_ATTN_4)]
    candidates, _ = run_once(HOST_TIME_WORKLOAD, inputs, timed[1:])
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

    absent = {peer.name: reason for peer in wanted if (reason := peer.missing_because()) is not None}
    peers = [peer for peer in wanted if peer.name not in absent]
    stopwatch = CudaStopwatch()
    ceilings = measure_ceilings(stopwatch)
    report: dict[str, Any] = {
        "provenance": provenance(options.commit),
        "peers": {p.name: p.version() for p in peers if not isinstance(p, type(OURS))}
        | {name: f"absent ({reason})" for name, reason in absent.items()},
        "ceilings": asdict(ceilings),
        "rows": [],
    }
    print("\n".join(show.header_lines(report)), flush=True)

    for index, workload in enumerate(workloads, 1):
        # A line a row as it is done: a sweep that dies, or is cut short, has still said what it found.
        row = measure(workload, peers, ceilings, stopwatch, options)
        report["rows"].append(row)
        done = "  ".join(
            f"{name} {r['microseconds']:.1f}us" if "microseconds" in r else f"{name} {r['error'][:60]}"
            for name, r in row["results"].items()
        )
        print(f"[{index}/{len(workloads)}] {workload.name}: {done}", flush=True)
        torch.cuda.empty_cache()

    report["host_microseconds"] = measure_host_time(peers) if options.host_time else {}
    return finish(report, [peer.name for peer in peers], options)


def finish(report: dict[str, Any], peers: list[str], options: argparse.Namespace) -> int:
    """Prints the tables, writes the files asked for, and says whether our own rows all stand."""
    rows = report["rows"]
    candidates = [OURS.name, *peers]
    targets = forward_targets(rows, report["host_microseconds"])
    report["summary"] = summarise(rows, peers)
    report["targets"] = [target.as_json() for target in targets]
    tables = [show.row_table(rows, peers), show.rate_table(rows, candidates), show.summary_table(report["summary"])]
    if report["host_microseconds"]:
        tables.append(show.host_table(report["host_microseconds"]))
    tables.append(show.target_table(targets))
    for table in tables:
        print()
        table.print()
    failures = show.problems(rows)
    if failures:
        print("\nNot counted:", *failures, sep="\n  ")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.markdown:
        show.write_markdown(options.markdown, report, tables)
    if options.plot:
        try:
            show.write_plot(options.plot, report, candidates)
        except ImportError as error:
            print(f"forward.py: no plot: {error}", file=sys.stderr)
    ours_stand = all(row["results"].get(OURS.name, {}).get("correct", False) for row in rows)
    return 0 if ours_stand else 1


if __name__ == "__main__":
    sys.exit(main())
