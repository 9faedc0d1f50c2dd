#!/usr/bin/env python
"""What batch invariance costs an engine: continuous batching with invariant attention and mode, against variant ones.

    python scripts/throughput.py --size 0.6b --steps steps.jsonl          # on a GPU
    python scripts/throughput.py --device cpu --size tiny --requests 4 --prompt 3 9 --answer 2 4

All requests are there from the start. A step is one batch: a token of every request that decodes, and chunks of prompts
up to a budget. Each attention function serves the same requests, after one run that is not timed; an invariant one in
batch-invariant mode. Prints requests and tokens a second and the percentiles of a request's latency, and of the fastest
invariant function its time against that of the fastest variant one. With --steps, each step of the last run of each
function is a JSON line: what was in its batch and what waited.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPOSITORY)

import torch

from flash_attn_cute.batch_invariant import set_batch_invariant_mode
from flash_attn_cute.integrations import transformers as integration
from scripts.paged_qwen import SIZES, PagedModel, Sequence, build_model


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    answer: int  # tokens to generate


@dataclass(frozen=True)
class Step:
    """What a batch held; seconds: of the step, its tokens read back."""

    attention: str
    step: int
    num_seqs: int
    prefill_seqs: int
    decode_seqs: int
    prefill_tokens: int
    decode_tokens: int
    queue: int  # requests that have not begun
    seconds: float


@dataclass
class Run:
    """Of all requests through one attention function."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)  # seconds from the start, a request each
    tokens: int = 0  # generated
    steps: list[Step] = field(default_factory=list)


def requests_of(options: argparse.Namespace, vocabulary: int) -> list[Request]:
    rng = random.Random(options.seed)
    return [
        Request([rng.randrange(vocabulary) for _ in range(rng.randint(*options.prompt))], rng.randint(*options.answer))
        for _ in range(options.requests)
    ]


def serve(name: str, cache: PagedModel, requests: list[Request], slots: int, budget: int) -> Run:
    run = Run()
    queue = [(Sequence(list(request.prompt)), request) for request in requests]
    running: list[tuple[Sequence, Request]] = []
    start = time.perf_counter()
    while queue or running:
        began = time.perf_counter()
        running += [queue.pop(0) for _ in range(min(slots - len(running), len(queue)))]
        work = _batch(running, budget)
        is_decode = [s.cached >= len(r.prompt) for s, r, _ in work]
        chosen = cache.step([(s, count) for s, _, count in work], last_only=True).argmax(dim=-1).tolist()
        now = time.perf_counter()
        for (sequence, request, _), token in zip(work, chosen, strict=True):
            if sequence.cached < len(sequence.tokens):
                continue  # more of the prompt is to come
            run.tokens += 1
            sequence.tokens.append(token)
            if len(sequence.tokens) == len(request.prompt) + request.answer:
                cache.release(sequence)
                run.latencies.append(now - start)
        counts = [count for _, _, count in work]
        decodes = sum(is_decode)
        run.steps.append(
            Step(
                name,
                len(run.steps),
                len(work),
                len(work) - decodes,
                decodes,
                sum(counts) - decodes,
                decodes,
                len(queue),
                now - began,
            )
        )
        running = [(s, r) for s, r in running if len(s.tokens) < len(r.prompt) + r.answer]
    run.seconds = time.perf_counter() - start
    return run


def _batch(running: list[tuple[Sequence, Request]], budget: int) -> list[tuple[Sequence, Request, int]]:
    """(sequence, its request, tokens): decodes first, and prompts in what they leave of the budget."""
    work = []
    for sequence, request in sorted(running, key=lambda pair: pair[0].cached < len(pair[1].prompt)):
        count = min(len(sequence.tokens) - sequence.cached, budget)
        if count:
            budget -= count
            work.append((sequence, request, count))
    return work


def measure(name: str, model, requests: list[Request], options: argparse.Namespace) -> Run:
    """The fastest of the repeats, after one run that compiles."""
    model.set_attn_implementation(name)
    longest = sorted((len(r.prompt) + r.answer for r in requests), reverse=True)[: options.slots]
    pages = sum(-(-length // options.page_size) for length in longest)
    mode = set_batch_invariant_mode(True, options.split_size) if "invariant" in name else nullcontext()
    with mode:
        runs = [
            serve(name, PagedModel(model, pages, options.page_size), requests, options.slots, options.budget)
            for _ in range(options.repeats + 1)
        ]
    return min(runs[1:], key=lambda run: run.seconds)


def percentile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)]


def table(runs: dict[str, Run]) -> str:
    lines = [
        "| attention | s | requests/s | tokens/s | latency p50 s | p90 | p99 | steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        latencies = " | ".join(f"{percentile(run.latencies, part):.3f}" for part in (0.5, 0.9, 0.99))
        rates = f"{len(run.latencies) / run.seconds:.2f} | {run.tokens / run.seconds:.1f}"
        lines.append(f"| {name} | {run.seconds:.3f} | {rates} | {latencies} | {len(run.steps)} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--attention", nargs="+", choices=sorted(integration.KINDS), default=["fa-invariant", "fa-variant"]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="small", choices=sorted(SIZES))
    parser.add_argument("--requests", type=int, default=128, metavar="N")
    parser.add_argument("--prompt", type=int, nargs=2, default=[16, 1024], metavar=("LEAST", "MOST"), help="in tokens")
    parser.add_argument("--answer", type=int, nargs=2, default=[16, 256], metavar=("LEAST", "MOST"), help="in tokens")
    parser.add_argument("--slots", type=int, default=32, metavar="N", help="requests in flight")
    parser.add_argument("--budget", type=int, default=2048, metavar="N", help="tokens a step")
    parser.add_argument("--page-size", type=int, default=16, metavar="N")
    parser.add_argument("--split-size", type=int, metavar="N", help="keys of a split, in the mode; default: one split")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs; the fastest counts")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--steps", type=Path, metavar="FILE", help="where JSON lines of steps go")
    options = parser.parse_args(arguments)
    for name in ("prompt", "answer"):
        least, most = getattr(options, name)
        if not 1 <= least <= most:
            parser.error(f"--{name}: takes 1 <= LEAST <= MOST")
    if options.budget < options.slots:
        parser.error("--budget: takes at least a token of each of --slots")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    integration.register()
    size = SIZES[options.size]
    model = build_model(size, options.device, torch.float32 if options.device == "cpu" else torch.bfloat16)
    requests = requests_of(options, size.vocabulary)
    runs = {name: measure(name, model, requests, options) for name in options.attention}
    print(table(runs))
    invariant = [run.seconds for name, run in runs.items() if "invariant" in name]
    variant = [run.seconds for name, run in runs.items() if "invariant" not in name]
    if invariant and variant:
        print(
            f"cost of invariance: {min(invariant) / min(variant):.3f} times the time of variant attention and operators"
        )
    if options.steps:
        steps = [asdict(step) for run in runs.values() for step in run.steps]
        options.steps.write_text("".join(json.dumps(step) + "\n" for step in steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
