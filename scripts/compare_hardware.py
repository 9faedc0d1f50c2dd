#!/usr/bin/env python
"""The emulator against a GPU: the same kernels on the same bits.

    python scripts/compare_hardware.py record --output h200.npz       # on a Hopper GPU
    python scripts/compare_hardware.py compare h200.npz               # anywhere, in the emulator

`record` runs every kernel of tests/emulated/kernels that Hopper has, and a small matrix of the library's forward, and
writes what came out. `compare` runs the same in the emulator and compares. The kernels are integer-valued and have to
agree in every bit; the forward may round differently where the GPU's exponential and its order of summation do. A
summary goes to benchmarks/results/. Exits with 1 if anything differs by more than it may.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
# Started by path: import from the repository, not from this folder.
sys.path[0] = str(REPOSITORY)

import numpy as np
import torch
from torch import Tensor

from benchmarks.provenance import commit, package_version, provenance
from tests.emulated.kernels.case import Case, as_bits, difference
from tests.emulated.kernels.forward_cases import ForwardCase
from tests.emulated.kernels.forward_cases import cases as forward_cases

ARCHITECTURE = "sm_90a"
LIMIT_BYTES = 8 << 20
ABOUT = "about"

# The largest unit in the last place, relative to the number: outputs may round to neighbours, and no further.
UNIT = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-23}
# Before that rounding: P rounds to 16 bits, and a score on the edge goes either way. Relative to the largest output.
FORWARD_SLACK = 5e-4
LSE_SLACK = 1e-5


class Comparison(NamedTuple):
    """One case."""

    name: str
    family: str
    elements: int
    identical: int
    largest: float  # difference
    failure: str | None


def main() -> int:
    args = parse_args()
    if args.command == "record":
        return record(args.output, args.references, args.commit)
    return compare(args.file, args.markdown, args.schedule, args.seed, args.references)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run on this machine's GPU and write what comes out")
    recording.add_argument("--output", type=Path, default=Path("hardware.npz"))
    recording.add_argument("--commit", help="the revision, where there is no git history to ask")
    comparing = commands.add_parser("compare", help="run in the emulator and compare with a recording")
    comparing.add_argument("file", type=Path)
    comparing.add_argument("--markdown", type=Path, help="default: benchmarks/results/<date>-emulator-<gpu>.md")
    comparing.add_argument("--schedule", default="random", choices=("in-order", "random", "delayed"))
    comparing.add_argument("--seed", type=int, default=0)
    for command in (recording, comparing):
        command.add_argument(
            "--references",
            action="store_true",
            help="run no kernel but take what the references say, to try this script out; a kernel's forward, which "
            "rounds P, differs from such a recording by more than it may from a GPU's",
        )
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------------------
# What is run
# ---------------------------------------------------------------------------------------------------------------------


def all_cases() -> list[tuple[str, Case | ForwardCase]]:
    """(family, case). Imports the DSL, so whatever decides what it compiles for has to be set before."""
    from tests.emulated.kernels.catalogue import cases_by_module

    kernels = [(family, case) for family, cases in cases_by_module(ARCHITECTURE).items() for case in cases]
    return kernels + [("forward", case) for case in forward_cases()]


def outputs_of(case: Case | ForwardCase, references: bool) -> tuple[Tensor, ...]:
    if not references:
        return case.run()
    return case.run("cpu", "reference") if isinstance(case, ForwardCase) else case.expected()


def inputs_digest(case: Case | ForwardCase) -> int:
    """Of every argument's bits: a recording is of use only to those who make the same."""
    arguments = case.arguments("cpu").values() if isinstance(case, ForwardCase) else case.arguments()
    digest = 0
    for argument in arguments:
        if isinstance(argument, Tensor):
            digest = zlib.crc32(as_bits(argument).numpy().tobytes(), digest)
    return digest


# ---------------------------------------------------------------------------------------------------------------------
# Recording
# ---------------------------------------------------------------------------------------------------------------------


def record(path: Path, references: bool, revision: str | None) -> int:
    if references:
        about = {"gpu": "none: references", "commit": revision or commit()}
        results = (record_one(case, True) for _, case in all_cases())
    elif not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.exit("record needs a Hopper GPU")
    else:
        about = provenance(revision)
        results = record_in_processes([case.name for _, case in all_cases()])
    arrays, dtypes, digests, failures = {}, {}, {}, {}
    for result in results:
        digests[result.name] = result.digest
        dtypes[result.name] = result.dtypes
        arrays |= {f"{result.name}/{index}": bits for index, bits in enumerate(result.outputs)}
        if result.failure:
            failures[result.name] = result.failure
            print(f"{result.name}: {result.failure}", file=sys.stderr, flush=True)
    text = json.dumps({"provenance": about, "dtypes": dtypes, "inputs": digests, "failures": failures})
    arrays[ABOUT] = np.frombuffer(text.encode(), np.uint8)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)
    size = path.stat().st_size
    print(f"{len(dtypes)} cases, {len(failures)} of them failed, {size / 2**20:.2f} MiB: {path}")
    if size > LIMIT_BYTES:
        sys.exit(f"the recording is larger than {LIMIT_BYTES >> 20} MiB")
    return 0


class Recorded(NamedTuple):
    """What a case left, as bits in numpy arrays, or why it left nothing."""

    name: str
    digest: int
    dtypes: list[str]
    outputs: list[np.ndarray]
    failure: str | None = None


def record_one(case: Case | ForwardCase, references: bool = False) -> Recorded:
    digest = inputs_digest(case)
    try:
        outputs = outputs_of(case, references)
    except Exception as error:  # every case is worth a line, whatever became of it
        return Recorded(case.name, digest, [], [], f"{type(error).__name__}: {error}".splitlines()[0])
    dtypes = [str(output.dtype).removeprefix("torch.") for output in outputs]
    return Recorded(case.name, digest, dtypes, [as_bits(output).numpy() for output in outputs])


def record_in_processes(names: list[str]) -> Iterator[Recorded]:
    """In several processes, for compiling takes most of the time. One in which a kernel failed is used no further: the
    error of a CUDA context stays with it."""
    spawning = multiprocessing.get_context("spawn")

    def take_share(share: list[str]) -> list[Recorded]:
        results = []
        while len(results) < len(share):
            here, there = spawning.Pipe()
            process = spawning.Process(target=record_share, args=(share[len(results) :], there))
            process.start()
            there.close()
            try:
                while True:
                    results.append(here.recv())
            except EOFError:
                process.join()
            if process.exitcode:  # it died without a word about the case at hand
                results.append(Recorded(share[len(results)], 0, [], [], f"exit status {process.exitcode}"))
        return results

    workers = max(1, (os.cpu_count() or 1) - 2)
    with ThreadPoolExecutor(workers) as threads:
        for results in threads.map(take_share, [names[start::workers] for start in range(workers)]):
            yield from results


def record_share(names: list[str], results: Connection) -> None:
    cases = {case.name: case for _, case in all_cases()}
    for name in names:
        result = record_one(cases[name])
        results.send(result)
        if result.failure:
            return


class Recording:
    """What `record` wrote."""

    def __init__(self, path: Path):
        self._arrays = np.load(path)
        about = json.loads(self._arrays[ABOUT].tobytes())
        self.provenance: dict[str, str] = about["provenance"]
        self.inputs: dict[str, int] = about["inputs"]
        self.failures: dict[str, str] = about["failures"]
        self._dtypes: dict[str, list[str]] = about["dtypes"]

    def outputs(self, name: str) -> tuple[Tensor, ...]:
        return tuple(
            torch.from_numpy(self._arrays[f"{name}/{index}"]).view(getattr(torch, dtype))
            for index, dtype in enumerate(self._dtypes[name])
        )


# ---------------------------------------------------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------------------------------------------------


def compare(path: Path, markdown: Path | None, schedule: str, seed: int, references: bool) -> int:
    recording = Recording(path)
    started = datetime.now(timezone.utc)
    with contextlib.nullcontext() if references else emulation(schedule, seed):
        comparisons = list(compare_all(recording, references))
    seconds = (datetime.now(timezone.utc) - started).total_seconds()
    about = {
        "recorded on": recording.provenance.get("gpu", "unknown"),
        "recorded at": f"{recording.provenance.get('date', 'unknown')}, commit {recording.provenance['commit']}",
        "emulated on": f"{platform.machine()}, torch {torch.__version__}, dsl {package_version('nvidia-cutlass-dsl')}",
        "schedule": f"{schedule}, seed {seed}",
        "commit": commit(),
        "date": f"{started:%Y-%m-%d %H:%M} UTC, {seconds:.0f} s",
    }
    text = summary(comparisons, about)
    print(text)
    if not references or markdown:
        gpu = recording.provenance.get("gpu", "gpu").split(" (")[0].split()[-1].lower()
        target = markdown or REPOSITORY / "benchmarks" / "results" / f"{started:%Y-%m-%d}-emulator-{gpu}.md"
        target.write_text(text + "\n")
        print(f"written to {target}")
    return 1 if any(comparison.failure for comparison in comparisons) else 0


def emulation(schedule: str, seed: int):
    from flash_attn_cute.emulator import emulate

    return emulate(ARCHITECTURE, schedule=schedule, seed=seed)


def compare_all(recording: Recording, references: bool) -> Iterator[Comparison]:
    for family, case in all_cases():
        comparison = compare_one(family, case, recording, references)
        if comparison.failure:
            print(f"{case.name}: {comparison.failure}", file=sys.stderr, flush=True)
        yield comparison


def compare_one(family: str, case: Case | ForwardCase, recording: Recording, references: bool) -> Comparison:
    if case.name not in recording.inputs:
        return Comparison(case.name, family, 0, 0, 0.0, "not in the recording")
    if recording.inputs[case.name] != inputs_digest(case):
        return Comparison(case.name, family, 0, 0, 0.0, "the recording has other inputs")
    if case.name in recording.failures:
        return Comparison(case.name, family, 0, 0, 0.0, f"on the GPU: {recording.failures[case.name]}")
    hardware = recording.outputs(case.name)
    try:
        emulated = outputs_of(case, references)
    except Exception as error:  # every case is worth a line of the table, whatever became of it
        return Comparison(case.name, family, 0, 0, 0.0, f"{type(error).__name__}: {error}".splitlines()[0])
    same = [as_bits(ours) == as_bits(theirs) for ours, theirs in zip(emulated, hardware, strict=True)]
    largest = max(map(largest_difference, emulated, hardware))
    failure = forward_failure(emulated, hardware) if family == "forward" else exact_failure(case, emulated, hardware)
    elements = sum(bits.numel() for bits in same)
    return Comparison(case.name, family, elements, sum(int(bits.sum()) for bits in same), largest, failure)


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Among the elements whose bits differ."""
    apart = (ours.double() - theirs.double())[as_bits(ours) != as_bits(theirs)].abs()
    return float(apart.max()) if apart.numel() else 0.0


def exact_failure(case: Case, emulated: tuple[Tensor, ...], hardware: tuple[Tensor, ...]) -> str | None:
    """Differences from the GPU, and the GPU's own from the reference: then it is the kernel that is wrong."""
    for ours, theirs in zip(emulated, hardware, strict=True):
        message = difference(ours, theirs, case.tolerance)
        if message:
            return message
    for theirs, expected in zip(hardware, case.expected(), strict=True):
        message = difference(theirs, expected, case.tolerance)
        if message:
            return f"the GPU against the reference: {message}"
    return None


def forward_failure(emulated: tuple[Tensor, ...], hardware: tuple[Tensor, ...]) -> str | None:
    """Each number may be the next in its type, and differ by a slack; infinities have to be where the GPU has them."""
    for name, ours, theirs, slack in zip(("out", "lse"), emulated, hardware, (FORWARD_SLACK, LSE_SLACK), strict=True):
        finite = theirs.isfinite()
        if not torch.equal(as_bits(ours[~finite]), as_bits(theirs[~finite])):
            return f"{name}: infinities or NaN differ"
        ours, theirs, unit = ours[finite].double(), theirs[finite].double(), UNIT[theirs.dtype]
        excess = (ours - theirs).abs() - unit * theirs.abs() - slack * theirs.abs().max().clamp(min=1e-30)
        if not bool((excess <= 0).all()):
            return f"{name}: {float((ours - theirs).abs().max()):.3e} apart, {float(excess.max()):.1e} more than it may"
    return None


def summary(comparisons: list[Comparison], about: dict[str, str]) -> str:
    """Kernels by family, since all that they can be is identical; each forward by itself; every failure."""
    lines = ["# The emulator against a GPU", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    lines += ["**Kernels of tests/emulated/kernels, integer-valued: every bit has to agree**", ""]
    lines += ["| kernels | cases | as on the GPU | elements |", "| --- | ---: | ---: | ---: |"]
    kernels = [comparison for comparison in comparisons if comparison.family != "forward"]
    for family in dict.fromkeys(comparison.family for comparison in kernels):
        of = [comparison for comparison in kernels if comparison.family == family]
        good = sum(comparison.failure is None for comparison in of)
        lines.append(f"| {family} | {len(of)} | {good} | {sum(comparison.elements for comparison in of)} |")
    lines += ["", "**Forward: out and lse**", ""]
    lines += ["| case | elements | identical bits | largest difference | |", "| --- | ---: | ---: | ---: | --- |"]
    for comparison in comparisons:
        if comparison.family == "forward":
            share = 100 * comparison.identical / max(comparison.elements, 1)
            verdict = "differs" if comparison.failure else "ok"
            name = comparison.name.removeprefix("forward-")
            lines.append(f"| {name} | {comparison.elements} | {share:.2f}% | {comparison.largest:.1e} | {verdict} |")
    failures = [comparison for comparison in comparisons if comparison.failure]
    lines += ["", f"{len(comparisons) - len(failures)} of {len(comparisons)} cases agree."]
    lines += [f"- {comparison.name}: {comparison.failure}" for comparison in failures]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
