"""How it is measured: one clock for every candidate, a cold L2, and candidates taken in turn.

The order matters as much as the clock. A GPU changes its frequency while it is measured, so candidates timed one after
the other are timed on different machines. Here every round runs each candidate once, and the first place rotates.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

# Larger than any L2 so far (H200 60 MB, B200 126 MB); reading it evicts whatever the last candidate left there. Writing
# it would as well, but leaves dirty lines, and what is measured next would pay for their way to memory.
FLUSH_BYTES = 256 * 2**20
# Keeps the GPU busy while the host issues the candidate, so that no launch is waited for between the two events.
HEAD_START_CYCLES = 400_000
CEILING_MATMUL_SIZE = 8192
CEILING_READ_BYTES = 4 * 2**30
READ_BLOCK_BYTES = 2**15  # what a program of triton_read sums


@dataclass(frozen=True)
class Timing:
    """One candidate on one workload. `spread` is the half-width of the middle half, as a share of the median."""

    seconds: float
    spread: float
    rounds: int

    @classmethod
    def from_samples(cls, samples: list[float]) -> Timing:
        ordered = sorted(samples)
        median = statistics.median(ordered)
        quarter = len(ordered) // 4
        spread = (ordered[-1 - quarter] - ordered[quarter]) / 2 / median if median else 0.0
        return cls(median, spread, len(ordered))

    def of_one(self, calls: int) -> Timing:
        """Of one of so many equal calls."""
        return replace(self, seconds=self.seconds / calls)


class Stopwatch(Protocol):
    """What a device must offer to be timed. Marks are read only after `synchronize`."""

    def prepare(self) -> None:
        """Bring caches to the same state before every candidate."""

    def mark(self) -> Any: ...

    def synchronize(self) -> None: ...

    def seconds_between(self, start: Any, end: Any) -> float: ...


class CudaStopwatch:
    """CUDA events on the current stream, with the L2 flushed before each measurement."""

    def __init__(self) -> None:
        self._flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")

    def prepare(self) -> None:
        torch.cuda._sleep(HEAD_START_CYCLES)
        self._flush.sum()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds_between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) * 1e-3


def time_interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    stopwatch: Stopwatch,
    *,
    iterations: int = 20,
    warmup: int = 3,
    budget_seconds: float = 2.0,
) -> dict[str, Timing]:
    """Median GPU time of each candidate, measured in turn. Every candidate must already be known to run.

    `budget_seconds` caps the GPU time of slow workloads; at least five rounds are always taken.
    """
    names = list(candidates)
    if not names:
        return {}

    def one_round(first: int) -> dict[str, float]:
        marks = {}
        for name in names[first:] + names[:first]:
            stopwatch.prepare()
            start = stopwatch.mark()
            candidates[name]()
            marks[name] = (start, stopwatch.mark())
        stopwatch.synchronize()
        return {name: stopwatch.seconds_between(*pair) for name, pair in marks.items()}

    warm = [one_round(0) for _ in range(warmup)]
    round_seconds = sum(warm[-1].values()) if warm else 0.0
    rounds = iterations if round_seconds <= 0 else max(5, min(iterations, int(budget_seconds / round_seconds)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        for name, seconds in one_round(index % len(names)).items():
            samples[name].append(seconds)
    return {name: Timing.from_samples(values) for name, values in samples.items()}


def host_seconds_per_call(
    candidates: Mapping[str, Callable[[], Any]],
    synchronize: Callable[[], None],
    *,
    calls: int = 200,
    rounds: int = 9,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds the host spends in one eager call, without waiting for the GPU: median over rounds, taken in turn.

    `calls` stays well under the depth of the launch queue (1024): past it, the host would wait for the GPU after all.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, call in candidates.items():
            synchronize()
            start = clock()
            for _ in range(calls):
                call()
            samples[name].append((clock() - start) / calls)
            synchronize()
    # The first round pays for whatever the calls cache.
    return {name: statistics.median(values[1:]) for name, values in samples.items()}


@dataclass(frozen=True)
class Ceilings:
    """What this GPU, in this run, reaches on the two things attention is made of."""

    matmul_flops_per_s: float
    read_bytes_per_s: float
    read_method: str


def measure_ceilings(stopwatch: Stopwatch | None = None) -> Ceilings:
    """The bf16 matmul rate and the best read bandwidth; measure them before anything else, in the same process."""
    stopwatch = stopwatch or CudaStopwatch()
    read_rate, method = measure_read_bandwidth(stopwatch)
    return Ceilings(measure_matmul_rate(stopwatch), read_rate, method)


def measure_matmul_rate(stopwatch: Stopwatch) -> float:
    """FLOP/s of a large bf16 product of random data; zeros would draw less power and clock higher."""
    size = CEILING_MATMUL_SIZE
    left = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    product = torch.empty_like(left)
    candidates = {"matmul": lambda: torch.mm(left, right, out=product)}
    return 2 * size**3 / time_interleaved(candidates, stopwatch, warmup=10)["matmul"].seconds


def measure_read_bandwidth(stopwatch: Stopwatch) -> tuple[float, str]:
    """Bytes/s of the fastest of several reductions, and its name: a ceiling is the best that anything reaches."""
    buffer = torch.zeros(CEILING_READ_BYTES // 4, dtype=torch.float32, device="cuda")
    readers: dict[str, Callable[[], Any]] = {
        "torch sum": buffer.sum,
        "torch amax": buffer.amax,
        "torch row sums": lambda: buffer.view(-1, 2**16).sum(dim=1),
    }
    triton_reader = _triton_reader(buffer)
    if triton_reader is not None:
        readers["triton"] = triton_reader
    timings = time_interleaved(readers, stopwatch)
    method = min(timings, key=lambda name: timings[name].seconds)
    return CEILING_READ_BYTES / timings[method].seconds, method


def reader_of(num_bytes: int, device: torch.device | str = "cuda") -> Callable[[], Any]:
    """A call that reads so many bytes (a little more, to a whole block) and does nothing else.

    A ceiling is measured on a buffer beside which a launch is nothing. Beside a short kernel it is not, whatever the
    kernel does; a read of the same size pays for the same.
    """
    blocks = -(-num_bytes // READ_BLOCK_BYTES)
    buffer = torch.zeros(blocks * READ_BLOCK_BYTES // 4, dtype=torch.float32, device=device)
    return _triton_reader(buffer) or buffer.sum


def _triton_reader(buffer: torch.Tensor) -> Callable[[], Any] | None:
    """A kernel that only reads: each program sums one block and writes four bytes. None where Triton does not run."""
    try:
        from benchmarks.triton_read import read_all

        read_all(buffer)
        torch.cuda.synchronize()
    except Exception:  # no Triton, or no compiler for it: the torch reductions stand
        return None
    return lambda: read_all(buffer)
