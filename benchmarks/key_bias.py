"""What a mask and a bias cost, of keys and, in prefill, of each query: without, with, and flash-attn-4 doing the same.

    python benchmarks/key_bias.py --markdown out.md --csv out.csv
    python benchmarks/key_bias.py --preset decode --only "page 64"

One run on one GPU: ceilings first, then for each case our call without either ("none") and with each kind of mask or
bias that its preset asks for, with a plan made before, the same captured and replayed ("graph"), and planning itself
("in-call"); where keys are packed, flash-attn-4 with a score_mod that reads the bias, too. All of a case in turn with a
cold L2, medians; every output is checked against fp32 with the same mask and bias. Last comes the list that they must
show, from the shortest time of a call on the ways it is reached.
Exits with 1 if a call of ours failed or computed something wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import report as show
from benchmarks.decode import decode
from benchmarks.key_side import KEPT_TILES, KeySide
from benchmarks.rows import Row, best_seconds, run_once, timed_row
from benchmarks.score_mod import ScoreModFlashAttention4
from benchmarks.serving import Bench, Benchmark, Case
from benchmarks.targets import Target
from benchmarks.variants import Variant
from benchmarks.verify import Check
from benchmarks.workloads import Workload, equal, ragged

NONE = KeySide("none")
BIAS_ALL, BIAS_KV, BIAS_QUERY = (KeySide(f"bias H*={heads}", bias=heads) for heads in ("1", "Hk", "H"))
MASK_ALL, MASK_QUERY = (KeySide(f"mask H*={heads}", mask=heads) for heads in ("1", "H"))
FEW_TILES = KeySide(f"one tile in {KEPT_TILES}", mask="1", tiles=True)
DECODE_SIDES = (NONE, BIAS_ALL, BIAS_KV, BIAS_QUERY, MASK_ALL, MASK_QUERY, FEW_TILES)
BIASES = (BIAS_ALL, BIAS_KV, BIAS_QUERY)
# The same numbers, once for each query: a plain path, for the compatibility form.
EACH_QUERY = (
    KeySide("bias H*=1 of each query", bias="1", each_query=True),
    KeySide("mask H*=1 of each query", mask="1", each_query=True),
)
PREFILL_SIDES = (NONE, *BIASES, *EACH_QUERY)
ALL_SIDES = (*DECODE_SIDES, *EACH_QUERY)

GROUP_OF_4 = decode("decode 64x8192 32/8", [8192] * 64)
GROUP_OF_8 = decode("decode 64x8192 64/8", [8192] * 64, heads=64)
PREFILL = equal(1, 8192, causal=True, packed=True)
RAGGED_PREFILL = ragged(
    "ragged prefill 12x100..8192 32/8", [8192, 100, 4096, 700, 5000, 300, 2048, 1500, 3000, 129, 800, 6000]
)
PEER = ScoreModFlashAttention4()
PRESETS = {
    "decode": lambda: [Case(workload, page) for workload in (GROUP_OF_4, GROUP_OF_8) for page in (64, None)],
    "prefill": lambda: [Case(PREFILL), Case(RAGGED_PREFILL)],
}


def all_presets() -> list[Case]:
    return [case for preset in PRESETS.values() for case in preset()]


def sides_of(workload: Workload) -> tuple[KeySide, ...]:
    """Each kind once: where every query head has its own KV head, a bias a head is one a KV head."""
    sides = DECODE_SIDES if workload.max_q == 1 else PREFILL_SIDES
    return tuple(side for side in sides if side.bias != "H" or workload.heads != workload.heads_kv)


def variants_of(side: KeySide) -> tuple[Variant, ...]:
    return (
        Variant(side.name, "cached", num_splits=0),
        Variant(f"{side.name} graph", "cached", num_splits=0, graph=True),
        Variant(f"{side.name} in-call", num_splits=0),
    )


def measure(case: Case, bench: Bench) -> Row:
    """The row of a case. Whoever has the same mask and bias computes the same, and is checked together."""
    workload = case.workload
    contiguous, inputs = bench.inputs(case)
    candidates, results = {}, {}
    for side in sides_of(workload):
        rows = side.random(workload, bench.device)
        given = side.inputs(workload, inputs, rows)
        makers = {}
        if peers_can(side) and case.page_size is None:
            makers |= {name_of(peer.name, side): partial(peer.make, workload, given) for peer in bench.peers}
        makers |= {variant.name: partial(variant.make, workload, given) for variant in variants_of(side)}
        able, found = run_once(makers, Check(workload, contiguous, rows.added(workload)))
        candidates |= able
        results |= found
    return timed_row(case.described(), workload, bench.ceilings, results, bench.time(candidates))


def peers_can(side: KeySide) -> bool:
    """Where keys are packed."""
    return side.mask is None and not side.each_query


def name_of(peer: str, side: KeySide) -> str:
    return f"{peer} {side.name}"


def our_seconds(row: Row, side: KeySide) -> float | None:
    return best_seconds(row, tuple(variant.name for variant in variants_of(side)))


def over_none(row: Row, side: KeySide) -> float | None:
    """Time with the mask or bias over time without."""
    without, given = our_seconds(row, NONE), our_seconds(row, side)
    return given / without if given and without else None


def must_show(report: dict[str, Any]) -> list[Target]:
    """Rows that this run did not measure leave their line as "not measured"."""
    rows: dict[str, Row] = {row["name"]: row for row in report["rows"]}

    def costs(cases: Iterable[Case], side: KeySide) -> list[float | None]:
        return [over_none(rows[case.name], side) if case.name in rows else None for case in cases]

    def decodes(workload: Workload) -> list[Case]:
        return [case for case in PRESETS["decode"]() if case.workload is workload]

    def worst(values: list[float | None]) -> float | None:
        return None if None in values else max(values)

    def biases_of(workload: Workload) -> list[KeySide]:
        return [side for side in sides_of(workload) if side in BIASES]

    prefill = worst([cost for side in biases_of(PREFILL) for cost in costs([Case(PREFILL)], side)])
    few = worst(costs(decodes(GROUP_OF_4), FEW_TILES))
    gains = [gain(rows.get(case.name), side) for case in PRESETS["prefill"]() for side in biases_of(case.workload)]
    cost = "{}, contiguous and page 64, {}: worse time over none"
    return [
        *(
            Target(cost.format(GROUP_OF_4.name, side.name), worst(costs(decodes(GROUP_OF_4), side)), at_most=1.02)
            for side in (BIAS_ALL, BIAS_KV, MASK_ALL)
        ),
        *(
            Target(cost.format(GROUP_OF_8.name, side.name), worst(costs(decodes(GROUP_OF_8), side)), at_most=1.05)
            for side in (BIAS_QUERY, MASK_QUERY)
        ),
        Target(f"{PREFILL.name}: least speed with a bias, of that without", prefill and 1 / prefill, 0.85),
        Target(f"{GROUP_OF_4.name}, a mask that keeps {FEW_TILES.name}: speed over none", few and 1 / few, 5.0),
        Target(
            "prefill with a bias, worst row: time of flash-attn-4's score_mod over ours",
            None if None in gains else min(gains),
            1.4,
        ),
    ]


def gain(row: Row | None, side: KeySide) -> float | None:
    """Time of flash-attn-4 with a score_mod over ours, doing the same."""
    theirs = row and best_seconds(row, (name_of(PEER.name, side),))
    ours = row and our_seconds(row, side)
    return theirs / ours if theirs and ours else None


def tables(report: dict[str, Any], peers: list[str]) -> list[show.Table]:
    columns = [
        "workload",
        "with",
        "ours, us",
        "over none",
        *(f"{peer}, us" for peer in peers),
        *(f"{peer} over none" for peer in peers),
        *(f"{peer} / ours" for peer in peers),
    ]
    lines = []
    for row in report["rows"]:
        for side in ALL_SIDES:
            ours = our_seconds(row, side)
            if ours is None:
                continue
            theirs = [best_seconds(row, (name_of(peer, side),)) for peer in peers]
            plain = [best_seconds(row, (name_of(peer, NONE),)) for peer in peers]
            lines.append(
                [
                    row["name"],
                    side.name,
                    show.figure(ours * 1e6, "{:.1f}"),
                    show.figure(over_none(row, side), "{:.3f}"),
                    *(show.figure(t and t * 1e6, "{:.1f}") for t in theirs),
                    *(show.figure(t and p and t / p, "{:.3f}") for t, p in zip(theirs, plain, strict=True)),
                    *(show.figure(t and t / ours) for t in theirs),
                ]
            )
    names = [variant.name for side in ALL_SIDES for variant in variants_of(side)]
    return [
        show.Table(
            "Masks and biases of keys (d128, causal, bf16): the shortest time of each, and the cost", columns, lines
        ),
        show.time_table("Microseconds of our calls", report["rows"], names),
    ]


BENCHMARK = Benchmark(
    name="key_bias.py",
    title="Masks and biases of keys",
    presets=PRESETS | {"all": all_presets},
    variants=tuple(variant for side in ALL_SIDES for variant in variants_of(side)),
    measure=measure,
    tables=tables,
    must_show=must_show,
    peers=(PEER,),
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
