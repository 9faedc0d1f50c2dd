"""How results are shown: one table value, printed with rich where installed, else as text, or written as Markdown."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, ratio


@dataclass(frozen=True)
class Table:
    """Strings in rows and columns; the first column is text, the others are figures."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def print(self) -> None:
        try:
            from rich.console import Console
            from rich.table import Table as RichTable
        except ImportError:
            print(self.as_text(), flush=True)
            return
        # Fold rather than crop: on a narrow terminal a cropped table would lose its figures.
        rendered = RichTable(title=self.title, title_justify="left")
        for index, column in enumerate(self.columns):
            rendered.add_column(column, justify="right" if index else "left", overflow="fold")
        for row in self.rows:
            rendered.add_row(*row)
        # Piped output has no width of its own.
        Console(width=None if sys.stdout.isatty() else 240).print(rendered)

    def as_text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]

        def line(cells: list[str]) -> str:
            padded = [cells[0].ljust(widths[0])] + [
                cell.rjust(w) for cell, w in zip(cells[1:], widths[1:], strict=True)
            ]
            return "  ".join(padded).rstrip()

        return "\n".join([self.title, line(self.columns), "  ".join("-" * w for w in widths), *map(line, self.rows)])

    def as_markdown(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return "\n".join([f"**{self.title}**", "", *("| " + " | ".join(cells) + " |" for cells in lines)])


def figure(value: float | None, pattern: str = "{:.2f}") -> str:
    return "-" if value is None else pattern.format(value)


def row_table(title: str, rows: list[Row], peers: list[str]) -> Table:
    """A line a workload: our time, rates and distance to the floor; then the time of each peer over ours."""
    columns = ["workload", "us", "TFLOP/s", "TB/s", "x floor", "bound", *(f"{peer} / ours" for peer in peers)]
    lines = []
    for row in rows:
        ours = row["results"].get("ours", {})
        line = [
            row["name"],
            figure(ours.get("microseconds"), "{:.1f}"),
            figure(ours.get("tflops"), "{:.0f}"),
            figure(ours.get("terabytes_per_s")),
            figure(ours.get("floor_ratio")),
            row["bound"],
        ]
        for peer in peers:
            mark = "" if row["results"].get(peer, {}).get("correct", True) else " (wrong)"
            line.append(figure(ratio(row, (peer,))) + mark)
        lines.append(line)
    return Table(f"{title}: ours, and the time of each peer over ours (above 1: ours is faster)", columns, lines)


def rate_table(rows: list[Row], candidates: list[str]) -> Table:
    """TFLOP/s of everyone, from the same rounds."""
    lines = [
        [row["name"], *(figure(row["results"].get(name, {}).get("tflops"), "{:.0f}") for name in candidates)]
        for row in rows
    ]
    return Table("TFLOP/s", ["workload", *candidates], lines)


def time_table(title: str, rows: list[Row], candidates: list[str]) -> Table:
    """Microseconds of everyone beside the floor, from the same rounds."""
    lines = []
    for row in rows:
        times = [row["results"].get(name, {}).get("microseconds") for name in candidates]
        lines.append([row["name"], *(figure(time, "{:.1f}") for time in (row["floor_microseconds"], *times))])
    return Table(title, ["workload", "floor", *candidates], lines)


def summary_table(summary: list[dict[str, Any]]) -> Table:
    lines = [
        [entry["group"], entry["peer"], str(entry["rows"]), figure(entry["geomean"], "{:.3f}")] for entry in summary
    ]
    return Table("Geometric mean of peer time over ours", ["group", "peer", "rows", "geomean"], lines)


def target_table(targets: list[dict[str, Any]], title: str = "Must show") -> Table:
    """Of targets as result files hold them."""
    lines = [[t["what"], f"{figure(t['figure'], '{:.3f}')} {t['unit']}", t["goal"], t["verdict"]] for t in targets]
    return Table(title, ["what", "figure", "goal", "verdict"], lines)


def host_table(host_microseconds: dict[str, float]) -> Table:
    lines = [[name, figure(value, "{:.1f}")] for name, value in host_microseconds.items()]
    return Table("Host time of an eager call, microseconds", ["candidate", "us"], lines)


def problems(rows: list[Row], candidates: Iterable[str] | None = None) -> list[str]:
    """Every candidate that failed or computed something else, one line each; of all, or of those named."""
    wanted = None if candidates is None else set(candidates)
    found = []
    for row in rows:
        for name, result in row["results"].items():
            if wanted is not None and name not in wanted:
                continue
            if "error" in result:
                found.append(f"{row['name']}: {name}: {result['error']}")
            elif not result.get("correct", True):
                found.append(f"{row['name']}: {name}: off by {result['max_error']:.3g}, its time does not count")
    return found


def not_counted(report: dict[str, Any]) -> list[str]:
    """Everything that went wrong in a run: whole rows, figures beside the rows, and candidates."""
    return [*report.get("failures", ()), *report.get("notes", ()), *problems(report["rows"])]


def header_lines(report: dict[str, Any]) -> list[str]:
    ceilings = report["ceilings"]
    lines = [f"{name}: {value}" for name, value in report["provenance"].items()]
    lines += [f"{name}: {value}" for name, value in report["peers"].items()]
    lines.append(
        f"ceilings: bf16 matmul {ceilings['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s, "
        f"read {ceilings['read_bytes_per_s'] / 1e12:.2f} TB/s ({ceilings['read_method']})"
    )
    return lines


def write_markdown(path: Path, title: str, report: dict[str, Any], tables: list[Table]) -> None:
    parts = [f"# {title}", "\n".join(f"- {line}" for line in header_lines(report))]
    parts += [table.as_markdown() for table in tables]
    failed = not_counted(report)
    if failed:
        parts.append("\n".join(["Not counted:", "", *(f"- {line}" for line in failed)]))
    path.write_text("\n\n".join(parts) + "\n")


CSV_FIGURES = ("microseconds", "spread", "rounds", "tflops", "terabytes_per_s", "floor_ratio", "correct", "error")


def write_csv(path: Path, rows: list[Row]) -> None:
    """A line a workload and candidate."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["workload", "floor_microseconds", "candidate", *CSV_FIGURES])
        for row in rows:
            for name, result in row["results"].items():
                writer.writerow([row["name"], row["floor_microseconds"], name, *map(result.get, CSV_FIGURES)])


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark takes about the files it writes."""
    parser.add_argument("--commit", metavar="ID", help="the commit to report, where there is no git history to ask")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a line a workload and candidate")


def write_files(options: argparse.Namespace, title: str, report: dict[str, Any], tables: list[Table]) -> None:
    """The files that the command line asked for: --json, --markdown, --csv."""
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.markdown:
        write_markdown(options.markdown, title, report, tables)
    if options.csv:
        write_csv(options.csv, report["rows"])


@dataclass(frozen=True)
class Bars:
    """What a bar chart shows of each result, and the line that nobody can pass."""

    figure: str  # a key of a result
    label: str
    limit: Callable[[dict[str, Any]], float]  # of a report
    limit_label: str


TFLOPS = Bars("tflops", "TFLOP/s", lambda report: report["ceilings"]["matmul_flops_per_s"] / 1e12, "matmul ceiling")
TERABYTES = Bars(
    "terabytes_per_s", "TB/s", lambda report: report["ceilings"]["read_bytes_per_s"] / 1e12, "read bandwidth"
)
OVER_FLOOR = Bars("floor_ratio", "time over the floor", lambda report: 1.0, "floor")


def write_bars(path: Path, report: dict[str, Any], candidates: list[str], bars: Bars) -> None:
    """Grouped bars, a group a workload. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["rows"]
    figure_, axes = plt.subplots(figsize=(max(8, 1.1 * len(rows)), 5.5))
    width = 0.8 / max(1, len(candidates))
    for index, name in enumerate(candidates):
        heights = [row["results"].get(name, {}).get(bars.figure) or 0.0 for row in rows]
        axes.bar([place + index * width for place in range(len(rows))], heights, width, label=name)
    axes.axhline(bars.limit(report), color="gray", linestyle="--", label=bars.limit_label)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(rows))])
    axes.set_xticklabels([row["name"] for row in rows], rotation=40, ha="right", fontsize=8)
    axes.set_ylabel(bars.label)
    axes.set_title(f"{report['provenance']['gpu']}, {report['provenance']['date']}", fontsize=10)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure_.tight_layout()
    figure_.savefig(path, dpi=150)
    plt.close(figure_)
