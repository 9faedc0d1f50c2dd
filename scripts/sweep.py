#!/usr/bin/env python
"""Run all benchmarks, one after another, and write one page of results with plots.

    python scripts/sweep.py                       # everything; run it again to go on where it was stopped
    python scripts/sweep.py --only decode,mixed   # these, beside what has been measured before
    python scripts/sweep.py --list                # the steps, and which of them are done
    python scripts/sweep.py --restart             # forget what has been measured

Each benchmark runs in a process of its own and leaves its files in a folder of --state. A step is done, and is not
run again, once it has ended well for the same commit, GPU and command; where tracked files differ from the commit,
every sweep begins anew. The page is <date>-<gpu>.md in --output, with a plot a step (needs matplotlib, which the extra
`bench` brings): first every step's list of what it must show, then its tables. Exits with 1 if a step failed, or one of
our own calls in it did.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    # Started by path: import from the repository, not from this folder, where a file would hide benchmarks/report.py.
    sys.path[0] = str(REPOSITORY)

import torch

from benchmarks import report as show
from benchmarks.provenance import commit

STATE = REPOSITORY / "build" / "sweep"
RESULTS = REPOSITORY / "benchmarks" / "results"


@dataclass(frozen=True)
class Step:
    """One benchmark: a program that takes --commit, --json, --markdown and --csv, and what its plot shows."""

    name: str
    command: tuple[str, ...]
    bars: show.Bars


STEPS = (
    Step("forward", ("benchmarks/forward.py", "--preset", "all", "--host-time"), show.TFLOPS),
    Step("varlen_scheduler", ("benchmarks/varlen_scheduler.py",), show.OVER_FLOOR),
    Step("decode", ("benchmarks/decode.py",), show.TERABYTES),
    Step("mixed", ("benchmarks/mixed.py",), show.OVER_FLOOR),
    Step("key_bias", ("benchmarks/key_bias.py",), show.OVER_FLOOR),
)


@dataclass(frozen=True)
class Measured:
    """What a result belongs to: figures of another commit or GPU are not this sweep's."""

    commit: str
    gpu: str

    @property
    def can_be_found_again(self) -> bool:
        """Whether the name of the commit says what ran: not where files differ from it, or there is none."""
        return self.commit != "unknown" and not self.commit.endswith("+changes")


@dataclass(frozen=True)
class Sweep:
    """Steps, what they measure, and the folder where each leaves its files."""

    steps: tuple[Step, ...]
    measured: Measured
    state: Path

    def folder(self, step: Step) -> Path:
        return self.state / step.name

    def record(self, step: Step) -> dict[str, Any] | None:
        """How the step ended, if it ended with results for this commit and GPU."""
        try:
            record = json.loads((self.folder(step) / "record.json").read_text())
        except (OSError, ValueError):
            return None
        return record if record["measured"] == asdict(self.measured) else None

    def is_done(self, step: Step) -> bool:
        record = self.record(step)
        same_command = record is not None and record["command"] == list(step.command)
        return same_command and record["status"] == 0 and self.measured.can_be_found_again

    def run(self, step: Step) -> int:
        """Runs the step anew and keeps its files, if it wrote any. Returns its exit status."""
        folder = self.folder(step)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        files = ["--json", folder / "result.json", "--markdown", folder / "tables.md", "--csv", folder / "rows.csv"]
        command = [sys.executable, "-u", *step.command, "--commit", self.measured.commit, *map(str, files)]
        start = time.monotonic()
        with (folder / "log.txt").open("w") as log:
            process = subprocess.Popen(
                command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    log.write(line)
                status = process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
        record = {
            "measured": asdict(self.measured),
            "command": list(step.command),
            "status": status,
            "seconds": round(time.monotonic() - start, 1),
        }
        # Status 1 means that a call of ours failed or was wrong: its results say which. The record comes last, so that
        # a step that was stopped has none.
        if status in (0, 1) and (folder / "result.json").exists():
            (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        return status

    def results(self) -> dict[str, dict[str, Any]]:
        """By step: the report that it wrote for this commit and GPU."""
        ended = [step for step in self.steps if self.record(step) is not None]
        return {step.name: json.loads((self.folder(step) / "result.json").read_text()) for step in ended}

    def write_page(self, output: Path) -> Path | None:
        """The page of all steps that have results, and its plots beside it; None where there are no results."""
        results = self.results()
        if not results:
            return None
        date = max(result["provenance"]["date"] for result in results.values())[:10]
        output.mkdir(parents=True, exist_ok=True)
        page = output / f"{date}-{slug(self.measured.gpu)}.md"
        absent = [step.name for step in self.steps if step.name not in results]
        parts = [
            f"# All benchmarks, {self.measured.gpu}, {date}",
            f"One run a benchmark at commit {self.measured.commit}, by `python scripts/sweep.py`.",
        ]
        if absent:
            parts.append(f"Not measured: {', '.join(absent)}.")
        parts.append("## Must show")
        parts += [show.target_table(result["targets"], name).as_markdown() for name, result in results.items()]
        for step in self.steps:
            if step.name in results:
                parts.append(demoted((self.folder(step) / "tables.md").read_text().strip()))
                plot = page.with_name(f"{page.stem}-{step.name}.png")
                if draw(plot, results[step.name], step.bars):
                    parts.append(f"![{step.bars.label} by workload]({plot.name})")
        page.write_text("\n\n".join(parts) + "\n")
        return page


def slug(gpu: str) -> str:
    """NVIDIA H100 80GB HBM3 -> h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia")).strip("-")


def demoted(markdown: str) -> str:
    """With every heading a level lower."""
    return re.sub(r"^(#+ )", r"#\1", markdown, flags=re.MULTILINE)


def draw(path: Path, result: dict[str, Any], bars: show.Bars) -> bool:
    """Whether there is a plot now."""
    candidates = list(dict.fromkeys(name for row in result["rows"] for name in row["results"]))
    try:
        show.write_bars(path, result, candidates, bars)
    except ImportError:
        return False
    return True


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the steps, and run none")
    parser.add_argument("--only", metavar="A,B", help=f"of {', '.join(step.name for step in STEPS)}")
    parser.add_argument("--restart", action="store_true", help="forget what has been measured (of --only)")
    parser.add_argument("--commit", metavar="ID", help="the commit to report, where there is no git history to ask")
    parser.add_argument("--state", type=Path, default=STATE, metavar="FOLDER", help="default: build/sweep")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="default: benchmarks/results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, steps: tuple[Step, ...] = STEPS) -> int:
    options = parse_arguments(arguments)
    names = [step.name for step in steps] if options.only is None else options.only.split(",")
    unknown = sorted(set(names) - {step.name for step in steps})
    if unknown:
        print(f"sweep.py: no step {', '.join(unknown)}; there are {', '.join(s.name for s in steps)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("sweep.py: the benchmarks time GPU kernels, and torch sees no CUDA device here", file=sys.stderr)
        return 2
    measured = Measured(options.commit or commit(), torch.cuda.get_device_name())
    sweep = Sweep(steps, measured, options.state)
    wanted = [step for step in steps if step.name in names]
    if options.list:
        for step in wanted:
            print(f"{step.name}: {'done' if sweep.is_done(step) else 'to do'}: python {' '.join(step.command)}")
        return 0
    return run_all(sweep, wanted, options.output, options.restart)


def run_all(sweep: Sweep, wanted: list[Step], output: Path, restart: bool = False) -> int:
    """Runs what is not done, then writes the page: also where a step failed or the sweep was stopped."""
    # Results of files that differ from their commit would be taken for those of other such files.
    for step in sweep.steps if not sweep.measured.can_be_found_again else wanted if restart else ():
        shutil.rmtree(sweep.folder(step), ignore_errors=True)
    failed = []
    try:
        for step in wanted:
            if sweep.is_done(step):
                print(f"== {step.name}: done before", flush=True)
                continue
            print(f"== {step.name}: python {' '.join(step.command)}", flush=True)
            if (status := sweep.run(step)) != 0:
                failed.append(f"{step.name} (exit status {status})")
    except KeyboardInterrupt:
        failed.append("stopped; run again to go on")
    page = sweep.write_page(output)
    for name, result in sweep.results().items():
        print()
        show.target_table(result["targets"], f"Must show: {name}").print()
    if page is not None:
        print(f"\nwrote {page}")
    if failed:
        print(f"sweep.py: not all is well: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
