"""python -m flash_attn_cute.emulator.mutate --arch sm_90a SCRIPT [ARGS...]: what if a synchronisation were missing?

The program, which has to assert its own results, runs unmutated under each seed first: it has to be right, and says
which synchronisation instructions of its kernels are executed. Then it runs again with one of them deleted or weakened
at a time. A mutant is noticed when a check of the emulator fires, the kernel never ends, or the program fails; the
others survive, and are printed.

Each mutant runs in a fork of the process that has compiled everything, so that it can neither harm the others nor take
longer than a time limit. A program compiles again in each run, if it does not keep what it compiled in a module.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flash_attn_cute.emulator import mutations, options
from flash_attn_cute.emulator.launch import LaunchRecord
from flash_attn_cute.emulator.mutations import Site
from flash_attn_cute.emulator.session import Session, emulate

Rewrite = Callable[[LaunchRecord], str]


@dataclass(frozen=True)
class Mutant:
    """One site of one kernel, found in the module `text`."""

    text: str
    entry: str
    site: Site

    def rewrite(self, record: LaunchRecord) -> str:
        mine = record.entry == self.entry and record.ptx == self.text
        return mutations.without(record.ptx, self.site) if mine else record.ptx


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: `noticed` is what noticed it, or None where nothing did."""

    mutant: Mutant
    noticed: str | None

    def __str__(self) -> str:
        site = self.mutant.site
        return f"PTX line {site.line:5}  {site.change}: {site.statement}"


class Program:
    """A script that can be run again and again under one session."""

    def __init__(self, session: Session, script: str, args: list[str]):
        self.session, self.script, self.args = session, script, args

    def run(self, rewrite: Rewrite | None = None) -> None:
        """Runs it once. Raises what it raises, an exit status as SystemExit, and what a launch raised in any case."""
        failures: list[BaseException] = []
        with self._rewriting(rewrite, failures):
            sys.argv = [self.script, *self.args]
            try:
                runpy.run_path(self.script, run_name="__main__")
            except SystemExit as end:
                if end.code not in (None, 0):
                    raise
        if failures:
            raise failures[0]

    @contextlib.contextmanager
    def _rewriting(self, rewrite: Rewrite | None, failures: list[BaseException]) -> Iterator[None]:
        execute = type(self.session).execute

        def changed(record: LaunchRecord) -> None:
            text = record.ptx if rewrite is None else rewrite(record)
            try:
                execute(self.session, dataclasses.replace(record, ptx=text))
            except BaseException as error:
                failures.append(error)
                raise

        self.session.execute = changed
        try:
            yield
        finally:
            del self.session.execute


class _Executed:
    """A rewrite that changes nothing but notes which sites are executed."""

    def __init__(self):
        self.sites: dict[tuple[str, str], list[Site]] = {}
        self.texts: dict[tuple[str, str], str] = {}

    def __call__(self, record: LaunchRecord) -> str:
        key = (record.ptx, record.entry)
        if key not in self.sites:
            self.sites[key] = mutations.find_sites(*key)
            self.texts[key] = mutations.marked(record.ptx, self.sites[key])
        return self.texts[key]

    def mutants(self) -> list[Mutant]:
        found = []
        for (text, entry), sites in self.sites.items():
            marks = _marks(self.texts[text, entry], entry)
            found += [Mutant(text, entry, site) for number, site in enumerate(sites) if marks[number]]
        return found

    def count(self) -> int:
        return sum(len(sites) for sites in self.sites.values())


def _marks(text: str, entry: str):
    from flash_attn_cute.emulator.engine import load

    return next(memory for memory, place in load(text, entry).variables if place.name == mutations.MARKS)


def find_mutants(program: Program, schedule: str, seeds: list[int]) -> tuple[list[Mutant], int]:
    """Runs the program under each seed. Returns a mutant for each site that was executed, and how many sites exist."""
    program.run()
    executed = _Executed()
    for seed in seeds:
        program.session.reschedule(schedule, seed)
        program.run()
        # The marks are plain stores by whoever comes by, which is a race.
        with program.session.without("races", "tcgen05"):
            program.run(executed)
    return executed.mutants(), executed.count()


def run_mutant(program: Program, mutant: Mutant, schedule: str, seeds: list[int], limit: float) -> Outcome:
    """Runs a mutant in a fork, under one seed after the other until something notices it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(program, mutant, schedule, seeds, limit, writer)
    os.close(writer)
    with open(reader, encoding="utf-8", errors="replace") as stream:
        said = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGALRM:
        return Outcome(mutant, f"NoEnd: it ran for more than {limit:g} s")
    if status:
        return Outcome(mutant, said or f"Crash: the process ended with status {status}")
    return Outcome(mutant, None)


def _child(program: Program, mutant: Mutant, schedule: str, seeds: list[int], limit: float, writer: int) -> None:
    """Ends the process: status 0 for a mutant that survived, 1 with a line in the pipe for one that was noticed."""
    _become_quiet()
    # The default action ends the process even inside the core.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        for seed in seeds:
            signal.setitimer(signal.ITIMER_REAL, limit)
            program.session.reschedule(schedule, seed)
            program.run(mutant.rewrite)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the mutant was noticed
        os.write(writer, f"{type(error).__name__}: {error}"[:4000].encode())
        os._exit(1)
    os._exit(0)


def _become_quiet() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)  # its threads did not come along


def spread(mutants: list[Mutant], limit: int) -> list[Mutant]:
    """At most `limit` of them, evenly spaced; 0 is all."""
    if not limit or limit >= len(mutants):
        return mutants
    return [mutants[index * len(mutants) // limit] for index in range(limit)]


def summary(outcomes: list[Outcome], executed: int, sites: int) -> str:
    """The share that was noticed, by what; and the survivors."""
    survivors = [outcome for outcome in outcomes if outcome.noticed is None]
    noticed = len(outcomes) - len(survivors)
    share = f"{100 * noticed / len(outcomes):.1f}%" if outcomes else "none"
    kinds: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.noticed is not None:
            kind = outcome.noticed.split(":")[0]
            kinds[kind] = kinds.get(kind, 0) + 1
    lines = [f"{executed} of {sites} synchronisation instructions executed, {len(outcomes)} mutants"]
    lines.append(f"noticed: {noticed} of {len(outcomes)} ({share})")
    lines += [f"  {count:4} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1])]
    lines.append(f"survived: {len(survivors)}")
    entry = None
    for outcome in survivors:
        if outcome.mutant.entry != entry:
            entry = outcome.mutant.entry
            lines.append(f"  {entry}")
        lines.append(f"  {outcome}")
    return "\n".join(lines)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn_cute.emulator.mutate",
        description="Delete or weaken one synchronisation instruction at a time, and say which nothing notices.",
    )
    options.add_arguments(parser, prefix="--", required=True)
    parser.set_defaults(emulate_schedule="delayed")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds a mutant, counted from --seed (3)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="mutants at most, evenly spaced; 0 is all")
    parser.add_argument("--seconds", type=float, default=60.0, help="a run may take before it counts as endless (60)")
    parser.add_argument("--verbose", action="store_true", help="print each mutant with what noticed it")
    parser.add_argument("script", metavar="SCRIPT", help="the program; its exit status says whether it was right")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")
    return parser.parse_args(arguments)


def _run_all(program: Program, mutants: list[Mutant], given: argparse.Namespace, seeds: list[int]) -> list[Outcome]:
    outcomes = []
    for mutant in mutants:
        outcomes.append(run_mutant(program, mutant, given.emulate_schedule, seeds, given.seconds))
        if given.verbose:
            first = (outcomes[-1].noticed or "survived").splitlines()[0]
            print(f"{outcomes[-1]}\n    {first[:200]}", flush=True)
    return outcomes


def main(arguments: list[str] | None = None) -> None:
    given = _parse(arguments)
    seeds = list(range(given.emulate_seed, given.emulate_seed + given.seeds))
    settings = options.from_arguments(given)
    sys.path.insert(0, str(Path(given.script).resolve().parent))
    started = time.perf_counter()
    with emulate(given.arch, **{**settings, "schedule": "in-order"}) as session:
        program = Program(session, given.script, given.args)
        mutants, sites = find_mutants(program, given.emulate_schedule, seeds)
        sys.stdout.flush()
        outcomes = _run_all(program, spread(mutants, given.limit), given, seeds)
    print(summary(outcomes, len(mutants), sites))
    print(f"{time.perf_counter() - started:.0f} s, schedule {given.emulate_schedule}, {given.seeds} seeds")


if __name__ == "__main__":
    main()
