"""Prefill chunks among decodes in one call, as an inference engine batches them: arithmetic and memory at once.

    python benchmarks/mixed.py --markdown out.md --csv out.csv

One run on one GPU: ceilings first, then for each case our call with a plan made before, splitting as the batch asks for
("ours") and splitting nothing ("ours unsplit"), without a plan ("ours unplanned"), and peers, in turn with a cold L2,
medians. In the same rounds our planned call over the prefill chunks alone and over the decodes alone: the batch in one
call is worth what it stays below their sum. Beside them stand two floors: the larger of arithmetic and traffic, which
only a perfect overlap reaches, and their sum, which is what doing one after the other would cost at best.
Exits with 1 if a variant of ours failed or computed something wrong.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import report as show
from benchmarks.rows import Row
from benchmarks.serving import Bench, Benchmark, Case
from benchmarks.targets import Target
from benchmarks.variants import Variant
from benchmarks.workloads import Workload, ragged

VARIANTS = (
    Variant("ours", "cached", num_splits=0),
    Variant("ours unsplit", "cached", num_splits=1),
    Variant("ours unplanned", "off"),
)
ALONE = ("prefill", "decode")


def mixed(name: str, chunks: int, tokens: int, context: int, decodes: int, keys: tuple[int, int]) -> Workload:
    """`decodes` of between `keys` keys, then `chunks` of `tokens` queries that see `context` keys before their own."""
    rng = random.Random(name)
    lens_q = [1] * decodes + [tokens] * chunks
    lens_k = [rng.randint(*keys) for _ in range(decodes)] + [context + tokens] * chunks
    return replace(ragged(name, lens_q, lens_k), group="mixed")


# First chunks of a prompt, which are short work among so many decodes; and chunks that see 4096 keys before their own:
# bound by arithmetic, and by both alike, where there is most to overlap.
FIRST_CHUNKS = (
    mixed("2x1024 + 60x4096..8192", 2, 1024, 0, 60, (4096, 8192)),
    mixed("1x2048 + 120x2048..8192", 1, 2048, 0, 120, (2048, 8192)),
    mixed("4x2048 + 96x2048..8192", 4, 2048, 0, 96, (2048, 8192)),
)
LATER_CHUNKS = (
    mixed("4x2048 after 4096 + 96x2048..8192", 4, 2048, 4096, 96, (2048, 8192)),
    mixed("2x2048 after 4096 + 96x2048..8192", 2, 2048, 4096, 96, (2048, 8192)),
)
WORKLOADS = FIRST_CHUNKS + LATER_CHUNKS

PRESETS = {
    "contiguous": lambda: [Case(workload) for workload in WORKLOADS],
    "paged": lambda: [Case(workload, 64) for workload in WORKLOADS],
}


def all_presets() -> list[Case]:
    return [Case(workload, page_size) for workload in WORKLOADS for page_size in (64, None)]


def alone(workload: Workload, part: str) -> Workload:
    """The sequences of one kind: decodes are those of a single query."""
    lengths = zip(workload.lens_q, workload.lens_k, strict=True)
    lens_q, lens_k = zip(*((q, k) for q, k in lengths if (q == 1) == (part == "decode")), strict=True)
    return replace(workload, name=f"{workload.name}, {part} alone", lens_q=lens_q, lens_k=lens_k)


def measure(case: Case, bench: Bench) -> Row:
    """The row of a case, with a row of each part under `alone`; all of it timed in the same rounds."""
    whole = bench.prepare(case, VARIANTS)
    cases = {part: Case(alone(case.workload, part), case.page_size) for part in ALONE}
    parts = {part: bench.prepare(of_part, VARIANTS[:1], peers=False) for part, of_part in cases.items()}
    together = {("whole", name): call for name, call in whole.candidates.items()}
    together |= {(part, name): call for part, found in parts.items() for name, call in found.candidates.items()}
    timings = bench.time(together)

    def row(key: str, prepared) -> Row:
        return prepared.row(bench.ceilings, {name: timing for (of, name), timing in timings.items() if of == key})

    return row("whole", whole) | {"alone": {part: row(part, found) for part, found in parts.items()}}


def seconds_alone(row: Row) -> dict[str, float | None]:
    return {part: found["results"]["ours"].get("seconds") for part, found in row["alone"].items()}


def must_show(report: dict[str, Any]) -> list[Target]:
    """Rows that this run did not measure leave their line as "not measured"."""
    rows = {row["name"]: row for row in report["rows"]}

    def worst(cases: list[Case]) -> float | None:
        found = [rows.get(case.name, {"results": {}})["results"].get("ours", {}) for case in cases]
        times = [result["floor_ratio"] if result.get("correct") else None for result in found]
        return None if None in times else max(times)

    return [
        Target(
            f"{chunks} chunks of prefill among decodes, {layout}, worst case: time over the larger floor",
            worst([case for case in preset() if case.workload in workloads]),
            at_most=1.3,
        )
        for chunks, workloads in (("first", FIRST_CHUNKS), ("later", LATER_CHUNKS))
        for layout, preset in PRESETS.items()
    ]


def tables(report: dict[str, Any], peers: list[str]) -> list[show.Table]:
    rows = report["rows"]
    names = [*(variant.name for variant in VARIANTS), *peers]
    overlap, over_floor = [], []
    for row in rows:
        parts = seconds_alone(row)
        apart = None if None in parts.values() else sum(parts.values()) * 1e6
        ours = row["results"].get("ours", {}).get("microseconds")
        compute, memory = row["compute_microseconds"], row["memory_microseconds"]
        times = [compute, memory, compute + memory, ours, *(t and t * 1e6 for t in parts.values()), apart]
        gain = apart / ours if apart and ours else None
        overlap.append([row["name"], *(show.figure(t, "{:.1f}") for t in times), show.figure(gain)])
        ratios = [row["results"].get(name, {}).get("floor_ratio") for name in names]
        over_floor.append([row["name"], *map(show.figure, ratios)])
    columns = ["workload", "arithmetic", "traffic", "sum of floors", "ours", *(f"{part} alone" for part in ALONE)]
    return [
        show.row_table("Prefill among decodes (32/8 heads, d128, causal, bf16)", rows, peers),
        show.time_table("Microseconds", rows, names),
        show.Table("Time over the larger floor", ["workload", *names], over_floor),
        show.Table("Overlap, microseconds", [*columns, "alone, sum", "sum / ours"], overlap),
    ]


BENCHMARK = Benchmark(
    name="mixed.py",
    title="Prefill among decodes",
    presets=PRESETS | {"all": all_presets},
    variants=VARIANTS,
    measure=measure,
    tables=tables,
    must_show=must_show,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
