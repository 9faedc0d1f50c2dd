"""One row of a result: each candidate is made and checked, then timed, and its figures are set beside the floor.

A row is a dictionary, as it is written to JSON: what the workload says of itself, the floor and what it is made of, and
under `results` an entry a candidate: its error, or whether it was right, and its time and rates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.peers import Attention
from benchmarks.timing import Ceilings, Timing
from benchmarks.workloads import Workload

Row = dict[str, Any]


def describe_error(error: Exception) -> str:
    """One line: a CUDA or compiler error can be pages long, and only its beginning is about the cause."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def run_once(
    makers: Mapping[str, Callable[[], Attention]], check: Callable[[torch.Tensor], dict[str, Any]]
) -> tuple[dict[str, Attention], dict[str, Any]]:
    """Makes each candidate and runs it once, compilation included: those that run, and what is known of all."""
    candidates: dict[str, Attention] = {}
    results: dict[str, Any] = {}
    for name, make in makers.items():
        try:
            attention = make()
            output = attention()
            if output.is_cuda:
                torch.cuda.synchronize()
            results[name] = check(output)
            candidates[name] = attention
        except Exception as error:  # whatever a candidate raises is its own result, and hides nobody else's
            results[name] = {"error": describe_error(error)}
    return candidates, results


def timed_row(
    described: dict[str, Any],
    workload: Workload,
    ceilings: Ceilings,
    results: dict[str, Any],
    timings: Mapping[str, Timing],
) -> Row:
    """The row of a workload: `results` as run_once gave them, with the figures of those that were timed."""
    compute = workload.flops / ceilings.matmul_flops_per_s
    memory = workload.min_bytes / ceilings.read_bytes_per_s
    floor = max(compute, memory)
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
    return {
        **described,
        "floor_microseconds": floor * 1e6,
        "compute_microseconds": compute * 1e6,
        "memory_microseconds": memory * 1e6,
        "bound": "compute" if compute >= memory else "memory",
        "results": results,
    }


def best_seconds(row: Row, names: tuple[str, ...]) -> float | None:
    """The shortest time among these candidates, or None where none of them ran and was right."""
    times = [row["results"][name]["seconds"] for name in names if row["results"].get(name, {}).get("seconds")]
    return min(times, default=None)


def ratio(row: Row, peers: tuple[str, ...], ours: tuple[str, ...] = ("ours",)) -> float | None:
    """Time of the fastest of these peers over ours: above 1 we are faster. None where either side is missing."""
    theirs, mine = best_seconds(row, peers), best_seconds(row, ours)
    return theirs / mine if theirs and mine else None


def one_line(row: Row) -> str:
    """What a row found, for the log of a run in progress."""
    return "  ".join(
        f"{name} {result['microseconds']:.1f}us" if "microseconds" in result else f"{name}: {result['error'][:80]}"
        for name, result in row["results"].items()
    )
