"""scripts/sweep.py over benchmarks that only pretend: what is run, what is skipped, what is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import decode, forward, mixed, report
from scripts import sweep

# Counts its runs in a file, writes what a benchmark writes, and ends as it is told to.
FAKE = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
for option in ("name", "count", "status", "commit", "json", "markdown", "csv"):
    parser.add_argument(f"--{option}")
options = parser.parse_args()
count = pathlib.Path(options.count)
runs = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(runs))
status = int(pathlib.Path(options.status).read_text())
print(f"{options.name}: run {runs}")
if status == 3:
    sys.exit(3)
target = {"what": f"{options.name} is fast", "figure": 0.5, "unit": "x", "goal": ">= 1", "verdict": "FAIL"}
result = {
    "provenance": {"gpu": "G", "date": "2026-01-02 03:04 UTC", "commit": options.commit},
    "ceilings": {"matmul_flops_per_s": 8e14, "read_bytes_per_s": 4e12},
    "rows": [{"name": "w", "results": {"ours": {"tflops": 1.0, "floor_ratio": 2.0}}}],
    "targets": [target],
}
pathlib.Path(options.json).write_text(json.dumps(result))
pathlib.Path(options.markdown).write_text(f"# Title of {options.name}\\n\\ntables of run {runs}\\n")
pathlib.Path(options.csv).write_text("")
sys.exit(status)
"""
HERE = sweep.Measured("abc", "NVIDIA H200")


class Fakes:
    """Two steps, what they are told, and how often they ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "fake.py").write_text(FAKE)
        self.steps = tuple(
            sweep.Step(name, (str(folder / "fake.py"), "--name", name, *self.files(name)), report.OVER_FLOOR)
            for name in ("one", "two")
        )
        for name in ("one", "two"):
            self.tell(name, 0)

    def files(self, name: str) -> tuple[str, ...]:
        return "--count", str(self.folder / f"{name}.count"), "--status", str(self.folder / f"{name}.status")

    def tell(self, name: str, status: int) -> None:
        (self.folder / f"{name}.status").write_text(str(status))

    @property
    def runs(self) -> tuple[int, ...]:
        counts = [self.folder / f"{step.name}.count" for step in self.steps]
        return tuple(int(count.read_text()) if count.exists() else 0 for count in counts)

    def sweep(self, measured: sweep.Measured = HERE, **options) -> int:
        made = sweep.Sweep(self.steps, measured, self.folder / "state")
        return sweep.run_all(made, list(self.steps), self.folder / "results", **options)

    @property
    def page(self) -> str:
        return (self.folder / "results" / "2026-01-02-h200.md").read_text()


@pytest.fixture
def fakes(tmp_path) -> Fakes:
    return Fakes(tmp_path)


def test_what_is_done_is_not_run_again(fakes, capfd):
    assert fakes.sweep() == 0 and fakes.runs == (1, 1)
    assert "one: run 1" in capfd.readouterr().out
    assert fakes.sweep() == 0 and fakes.runs == (1, 1)
    assert "one: done before" in capfd.readouterr().out
    assert (fakes.folder / "state" / "one" / "log.txt").read_text() == "one: run 1\n"


def test_another_commit_gpu_or_command_is_measured_anew(fakes):
    fakes.sweep()
    fakes.sweep(sweep.Measured("abd", HERE.gpu))
    assert fakes.runs == (2, 2)
    fakes.sweep(sweep.Measured("abd", "NVIDIA B200"))
    assert fakes.runs == (3, 3)
    first, second = fakes.steps
    fakes.steps = (sweep.Step("one", (*first.command, "--name", "renamed"), first.bars), second)
    fakes.sweep(sweep.Measured("abd", "NVIDIA B200"))
    assert fakes.runs == (4, 3)


@pytest.mark.parametrize("commit", ["unknown", "abc+changes"])
def test_without_a_commit_to_trust_nothing_is_done(fakes, commit):
    measured = sweep.Measured(commit, HERE.gpu)
    assert fakes.sweep(measured) == fakes.sweep(measured) == 0
    assert fakes.runs == (2, 2)
    assert "tables of run 2" in fakes.page
    made = sweep.Sweep(fakes.steps, measured, fakes.folder / "state")
    assert sweep.run_all(made, [fakes.steps[1]], fakes.folder / "results") == 0
    assert "Not measured: one." in fakes.page


def test_restart_forgets(fakes):
    fakes.sweep()
    fakes.sweep(restart=True)
    assert fakes.runs == (2, 2)


def test_a_step_that_breaks_is_run_again_and_hides_nobody(fakes, capfd):
    fakes.tell("one", 3)
    assert fakes.sweep() == 1 and fakes.runs == (1, 1)
    assert "one (exit status 3)" in capfd.readouterr().err
    assert "Not measured: one." in fakes.page and "Title of two" in fakes.page
    fakes.tell("one", 0)
    assert fakes.sweep() == 0 and fakes.runs == (2, 1)
    assert "Not measured" not in fakes.page and "Title of one" in fakes.page


def test_a_step_with_wrong_results_is_shown_and_run_again(fakes):
    fakes.tell("two", 1)
    assert fakes.sweep() == 1
    assert "Title of two" in fakes.page
    assert fakes.sweep() == 1 and fakes.runs == (1, 2)


def test_a_step_that_is_stopped_keeps_what_was_done(fakes, monkeypatch, capfd):
    real = sweep.Sweep.run

    def stopped(self, step):
        if step.name == "two":
            (self.folder(step)).mkdir(parents=True)
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(sweep.Sweep, "run", stopped)
    assert fakes.sweep() == 1 and "run again to go on" in capfd.readouterr().err
    monkeypatch.setattr(sweep.Sweep, "run", real)
    assert fakes.sweep() == 0 and fakes.runs == (1, 1)


def test_old_results_of_a_step_are_gone_once_it_runs_anew(fakes):
    fakes.sweep()
    fakes.tell("one", 3)
    fakes.sweep(restart=True)
    assert "Title of one" not in fakes.page


def test_the_page_has_lists_tables_and_plots(fakes, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        sweep.show, "write_bars", lambda path, result, names, bars: drawn.append((path.name, names, bars.label))
    )
    fakes.sweep()
    page = fakes.page
    assert page.startswith("# All benchmarks, NVIDIA H200, 2026-01-02") and "commit abc" in page
    assert "| one is fast | 0.500 x | >= 1 | FAIL |" in page
    assert page.index("## Must show") < page.index("## Title of one") < page.index("## Title of two")
    assert drawn[0] == ("2026-01-02-h200-one.png", ["ours"], "time over the floor")
    assert "![time over the floor by workload](2026-01-02-h200-one.png)" in page

    def no_matplotlib(*arguments):
        raise ImportError("matplotlib")

    monkeypatch.setattr(sweep.show, "write_bars", no_matplotlib)
    fakes.sweep()
    assert "![" not in fakes.page


def test_nothing_measured_writes_no_page(fakes):
    fakes.tell("one", 3)
    fakes.tell("two", 3)
    assert fakes.sweep() == 1 and not (fakes.folder / "results").exists()


def test_command_line(fakes, monkeypatch, capsys):
    def main(*arguments: str) -> int:
        folders = ("--state", str(fakes.folder / "state"), "--output", str(fakes.folder / "results"))
        return sweep.main([*arguments, *folders, "--commit", "abc"], fakes.steps)

    monkeypatch.setattr(sweep.torch.cuda, "is_available", lambda: False)
    assert main("--list") == 2 and "no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(sweep.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sweep.torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert main("--only", "three") == 2 and "no step three; there are one, two" in capsys.readouterr().err
    assert main("--only", "two") == 0 and fakes.runs == (0, 1)
    capsys.readouterr()
    assert main("--list") == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].startswith("one: to do: python") and listed[1].startswith("two: done: python")
    assert main("--only", "two", "--restart") == 0 and fakes.runs == (0, 2)
    assert main() == 0 and fakes.runs == (1, 2)


def test_gpus_have_short_names():
    assert sweep.slug("NVIDIA H200") == "h200" and sweep.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"


def test_the_real_steps_take_the_arguments_that_the_sweep_gives(monkeypatch, tmp_path):
    files = ["--commit", "abc", "--json", "j", "--markdown", "m", "--csv", "c"]
    parsers = {"forward": forward.parse_arguments, "decode": decode.BENCHMARK.parse, "mixed": mixed.BENCHMARK.parse}
    for step in sweep.STEPS:
        assert (sweep.REPOSITORY / step.command[0]).exists()
        if step.name in parsers:
            options = parsers[step.name]([*step.command[1:], *files])
            assert options.commit == "abc" and str(options.csv) == "c"
    assert json.dumps([step.name for step in sweep.STEPS]) and sys.executable
