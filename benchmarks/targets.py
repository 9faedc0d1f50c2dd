"""What the forward must show, computed from measured rows: every figure here comes from the rows' own numbers.

What a row is stands in benchmarks/rows.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.rows import Row, ratio
from benchmarks.workloads import D128_SHAPES, SHORT_SEQUENCES

FLASH_ATTN_4 = "flash-attn-4"
D128_PEERS = (FLASH_ATTN_4, "cudnn")
D128_NAMES = tuple(f"d128 {batch}x{length} {mask}" for batch, length in D128_SHAPES for mask in ("full", "causal"))


@dataclass(frozen=True)
class Target:
    """One line of the list: what, the figure (None where it was not measured), and what it has to be."""

    what: str
    figure: float | None
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        if self.figure is None:
            return None
        return (self.at_least is None or self.figure >= self.at_least) and (
            self.at_most is None or self.figure <= self.at_most
        )

    @property
    def verdict(self) -> str:
        return {True: "pass", False: "FAIL", None: "not measured"}[self.met]

    @property
    def goal(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    def as_json(self) -> dict[str, Any]:
        return {"what": self.what, "figure": self.figure, "unit": self.unit, "goal": self.goal, "verdict": self.verdict}


def geometric_mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def ratios(rows: Iterable[Row], peers: Iterable[str]) -> list[float]:
    peers = tuple(peers)
    return [value for value in (ratio(row, peers) for row in rows) if value is not None]


def complete(values: list[float], expected: int) -> list[float]:
    """The values if none is missing, else nothing: a mean over the rows that happened to work proves nothing."""
    return values if len(values) == expected else []


def forward_targets(rows: list[Row], host_microseconds: dict[str, float]) -> list[Target]:
    """The forward's list. Rows that this run did not measure leave their line as "not measured"."""
    d128 = complete(ratios((row for row in rows if row["name"] in D128_NAMES), D128_PEERS), len(D128_NAMES))
    targets = [
        Target("d128 dense, six rows: geomean against the best of flash-attn-4 and cuDNN", geometric_mean(d128), 1.0),
        Target("d128 dense: worst of the six rows", min(d128, default=None), 0.95),
    ]
    for group in ("d64", "d256", "d192-128"):
        pair = [row for row in rows if row["group"] == group and not row["packed"]]
        worst = min(complete(ratios(pair, (FLASH_ATTN_4,)), 2), default=None)
        targets.append(Target(f"{group} 2x8192, worse of full and causal, against flash-attn-4", worst, 0.95))
    packed_rows = [row for row in rows if row["group"] == "d128" and row["packed"] and row["heads"] == row["heads_kv"]]
    packed = complete(ratios(packed_rows, ("ours-batched",)), len(D128_NAMES))
    targets += [
        Target("packed equal lengths against our own dense: geomean of six rows", geometric_mean(packed), 0.97),
        Target("packed equal lengths against our own dense: worst row", min(packed, default=None), 0.97),
    ]
    short = ratios((row for row in rows if row["name"] == SHORT_SEQUENCES.name), (FLASH_ATTN_4,))
    targets += [
        Target("512 sequences of 128 tokens, 32/8 causal, against flash-attn-4", min(short, default=None), 1.5),
        Target("host time of an eager call", host_microseconds.get("ours"), at_most=40.0, unit="us"),
    ]
    return targets


def summarise(rows: list[Row], peers: Iterable[str]) -> list[dict[str, Any]]:
    """Geometric mean of the ratio to each peer, by shape family and layout, over the rows where both ran."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row['group']} {'packed' if row['packed'] else 'dense'}", []).append(row)
    return [
        {"group": group, "peer": peer, "rows": len(values), "geomean": geometric_mean(values)}
        for group, members in groups.items()
        for peer in peers
        if (values := ratios(members, (peer,)))
    ]
