"""A launch's report as text."""

from __future__ import annotations

from collections.abc import Sequence

from .costs import CLASSES
from .report import LaunchReport

_NAMES_SHOWN = 12
_KERNEL_WIDTH = 80


def render(report: LaunchReport, tiles: float | None = None) -> str:
    """The tables of one launch; with `tiles`, its figures divided by that many beside the totals."""
    shape = f"grid {_triple(report.grid)}, block {_triple(report.block)}, cluster {_triple(report.cluster)}"
    parts = [
        f"{report.kernel[:_KERNEL_WIDTH]}\n{report.arch}, {shape}, {report.ctas} CTAs",
        aligned(_instructions(report, tiles)),
        aligned(_cycles(report, tiles)),
        aligned(_memory(report, tiles)),
        aligned(_names(report, tiles)),
    ]
    return "\n\n".join(parts)


def aligned(rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as they have to be, the first to the left and the others to the right."""
    cells = [[_number(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = (
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in cells
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _instructions(report: LaunchReport, tiles: float | None) -> list[list[object]]:
    rows: list[list[object]] = [["warp-instructions", "all", *CLASSES]]
    for role, counts in [*report.by_role().items(), ("all", report.by_class())]:
        rows.append([role, sum(counts.values()), *counts.values()])
    if tiles:
        rows.append(["all, per tile", *(count / tiles for count in rows[-1][1:])])
    rows.append(["guard held in no lane", sum(report.skipped), *[""] * len(CLASSES)])
    rows.append(["waits tried again", sum(report.retried), *[""] * len(CLASSES)])
    return rows


def _cycles(report: LaunchReport, tiles: float | None) -> list[list[object]]:
    unit, bound = report.bound
    rows = [
        ["tensor cores", report.mma_cycles],
        [f"special functions ({report.special_operations} operations)", report.special_cycles],
        [f"FMA pipe ({report.fma_operations} operations)", report.fma_cycles],
        ["issue: longest scheduler, without moves", report.issue_cycles_without_moves],
        ["issue: longest scheduler", report.issue_cycles],
        ["issue: mean of four schedulers", report.issue_cycles_mean],
        [f"bound: {unit}", bound],
    ]
    return _with_tiles(["cycles of one SM", "launch"], rows, tiles)


def _memory(report: LaunchReport, tiles: float | None) -> list[list[object]]:
    rows: list[list[object]] = [
        ["TMA load", report.tma_load_bytes],
        ["TMA store", report.tma_store_bytes],
        ["TMA reduce", report.tma_reduce_bytes],
        ["global memory, read", report.global_load_bytes],
        ["global memory, written", report.global_store_bytes],
    ]
    for kind, traffic in report.shared.items():
        if traffic.accesses:
            rows.append([f"wavefronts of {kind} ({traffic.accesses} accesses)", traffic.wavefronts])
            rows.append(["  of them bank conflicts", traffic.conflicts])
    return _with_tiles(["bytes, wavefronts", "launch"], rows, tiles)


def _names(report: LaunchReport, tiles: float | None) -> list[list[object]]:
    rows = [[name, sum(counts)] for name, counts in list(report.names.items())[:_NAMES_SHOWN]]
    return _with_tiles(["most frequent", "launch"], rows, tiles)


def _with_tiles(head: list[object], rows: list[list[object]], tiles: float | None) -> list[list[object]]:
    if not tiles:
        return [head, *rows]
    return [[*head, "per tile"], *([*row, row[1] / tiles] for row in rows)]


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1000 or value == int(value) else f"{value:.1f}"
    return str(value)


def _triple(numbers: tuple[int, int, int]) -> str:
    return "x".join(map(str, numbers))
