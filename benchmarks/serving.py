"""What decode.py, mixed.py and key_bias.py share: a case, a run over cases, the files it writes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks import report as show
from benchmarks.paged import PagedInputs
from benchmarks.peers import OURS, Attention, AttentionInputs, Peer, installed, peers_named
from benchmarks.provenance import provenance
from benchmarks.rows import Row, describe_error, one_line, run_once, timed_row
from benchmarks.serving_peers import SERVING_PEERS
from benchmarks.targets import Target
from benchmarks.timing import Ceilings, CudaStopwatch, Stopwatch, Timing, measure_ceilings, time_interleaved
from benchmarks.variants import Variant
from benchmarks.verify import Check
from benchmarks.workloads import Workload

# GPU seconds a case, about: these calls take a millisecond, and the budget is only there for candidates that take ten.
BUDGET_SECONDS = 0.5


@dataclass(frozen=True)
class Case:
    """A packed workload, and how its keys and values lie: in pages of `page_size`, or contiguous.

    Its bytes are the workload's: keys and values in use, q and out; the table's entries are not counted.
    """

    workload: Workload
    page_size: int | None = None

    @property
    def name(self) -> str:
        return f"{self.workload.name}, {f'page {self.page_size}' if self.page_size else 'contiguous'}"

    def described(self) -> dict[str, Any]:
        return self.workload.described() | {"name": self.name, "page_size": self.page_size}


@dataclass(frozen=True)
class Bench:
    """What one run measures with."""

    stopwatch: Stopwatch
    ceilings: Ceilings
    peers: list[Peer] = field(default_factory=list)
    iterations: int = 15
    device: str = "cuda"

    def inputs(self, case: Case) -> tuple[AttentionInputs, AttentionInputs | PagedInputs]:
        """The tensors of a case, contiguous and as the case has them."""
        contiguous = AttentionInputs.random(case.workload, self.device)
        if case.page_size is None:
            return contiguous, contiguous
        return contiguous, PagedInputs.scatter(case.workload, contiguous, case.page_size)

    def prepare(self, case: Case, variants: Iterable[Variant], peers: bool = True) -> Prepared:
        """Makes the tensors of a case and runs once whoever can; everybody reads the same numbers."""
        workload = case.workload
        contiguous, inputs = self.inputs(case)
        theirs = inputs if case.page_size is None else inputs.with_valid_entries()
        able = [p for p in self.peers if p.supports(workload) and (p.takes_pages or case.page_size is None)]
        # Peers come first, so that our output is compared in full with one that the samples found right.
        makers = {peer.name: partial(peer.make, workload, theirs) for peer in able if peers}
        makers |= {variant.name: partial(variant.make, workload, inputs) for variant in variants}
        return Prepared(case, inputs, *run_once(makers, Check(workload, contiguous)))

    def time(self, candidates: Mapping[str, Attention]) -> dict[str, Timing]:
        """Of one call: a candidate that makes several says how many in `calls`."""
        timings = time_interleaved(
            candidates, self.stopwatch, iterations=self.iterations, budget_seconds=BUDGET_SECONDS
        )
        return {name: timing.of_one(getattr(candidates[name], "calls", 1)) for name, timing in timings.items()}

    def measure(self, case: Case, variants: Iterable[Variant]) -> Row:
        prepared = self.prepare(case, variants)
        return prepared.row(self.ceilings, self.time(prepared.candidates))


@dataclass(frozen=True)
class Prepared:
    """A case whose candidates have run: those that can be timed, and what is known of all."""

    case: Case
    inputs: AttentionInputs | PagedInputs
    candidates: dict[str, Attention]
    results: dict[str, Any]

    def row(self, ceilings: Ceilings, timings: Mapping[str, Timing]) -> Row:
        return timed_row(self.case.described(), self.case.workload, ceilings, self.results, timings)


@dataclass(frozen=True)
class Benchmark:
    """One program: its cases by preset, how a case is measured, and what is made of the rows."""

    name: str
    title: str
    presets: Mapping[str, Callable[[], list[Case]]]
    variants: tuple[Variant, ...]
    measure: Callable[[Case, Bench], Row]
    tables: Callable[[dict[str, Any], list[str]], list[show.Table]]
    must_show: Callable[[dict[str, Any]], list[Target]]
    extra: Callable[[Bench], dict[str, Any]] = lambda bench: {}  # what is measured beside the rows
    peers: tuple[Peer, ...] = SERVING_PEERS

    def parse(self, arguments: list[str] | None = None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=self.title)
        parser.add_argument("--preset", choices=sorted(self.presets), default="all")
        parser.add_argument("--only", metavar="TEXT", help="only cases with this in their name")
        parser.add_argument(
            "--peers",
            metavar="A,B",
            help=f"of {', '.join(peer.name for peer in self.peers)}; default: all installed",
        )
        parser.add_argument("--iters", type=int, default=15, metavar="N", help="timed rounds, at most (default 15)")
        show.add_file_arguments(parser)
        return parser.parse_args(arguments)

    def main(self, arguments: list[str] | None = None) -> int:
        options = self.parse(arguments)
        cases = [c for c in self.presets[options.preset]() if options.only is None or options.only in c.name]
        try:
            wanted = peers_named(options.peers, self.peers)
            if not cases:
                raise ValueError(f"no case of preset {options.preset} has {options.only!r} in its name")
            if not torch.cuda.is_available():
                raise ValueError("this benchmark times GPU kernels, and torch sees no CUDA device here")
            if (broken := OURS.missing_because()) is not None:
                raise ValueError(f"flash_attn_cute does not import: {broken}")
        except ValueError as error:
            print(f"{self.name}: {error}", file=sys.stderr)
            return 2

        peers, about_peers = installed(wanted)
        stopwatch = CudaStopwatch()
        bench = Bench(stopwatch, measure_ceilings(stopwatch), peers, options.iters)
        report = {
            "provenance": provenance(options.commit),
            "peers": about_peers,
            "ceilings": asdict(bench.ceilings),
            "rows": [],
            "failures": [],
        }
        print("\n".join(show.header_lines(report)), flush=True)
        for index, case in enumerate(cases, 1):
            place = f"[{index}/{len(cases)}] {case.name}"
            try:
                row = self.measure(case, bench)
                report["rows"].append(row)
                print(f"{place}: {one_line(row)}", flush=True)
                torch.cuda.empty_cache()
            except Exception as error:  # a GPU that gave up must not take along what was found before
                report["failures"].append(f"{case.name}: {describe_error(error)}")
                print(f"{place}: {report['failures'][-1]}", flush=True)
        try:
            report |= self.extra(bench)
        except Exception as error:
            report["failures"].append(describe_error(error))
        return self.finish(report, [peer.name for peer in peers], options)

    def finish(self, report: dict[str, Any], peers: list[str], options: argparse.Namespace) -> int:
        """Prints the tables, writes the files asked for, and says whether our own rows all stand."""
        report["targets"] = [target.as_json() for target in self.must_show(report)]
        tables = [*self.tables(report, peers), show.target_table(report["targets"])]
        for table in tables:
            print()
            table.print()
        if not_counted := show.not_counted(report):
            print("\nNot counted:", *not_counted, sep="\n  ")
        show.write_files(options, self.title, report, tables)
        ours = show.problems(report["rows"], [variant.name for variant in self.variants])
        return 1 if ours or report["failures"] else 0
