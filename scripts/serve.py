#!/usr/bin/env python
"""Serves a tiny random-weights model with continuous batching over flash_attn_with_kvcache.

    python scripts/serve.py                                              # the GPU if there is one, else the reference
    python scripts/serve.py --backend emulator --requests 3 --new-tokens 3    # the compiled kernels, interpreted

Requests arrive over time. Each step is one batch: a token of every request that decodes, and chunks of prompts up to a
budget, packed. Keys and values lie in pages of one pool, in any order, and a finished request gives its own back. The
batch has a fixed number of slots, of which unused ones have no token, no length and no page. Attention is planned once
a step, and the plan serves all layers.

Prints the tokens of each request, and whether they are those of the same model in plain PyTorch, without a cache, one
request at a time. Exits with 1 if they are not.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPOSITORY)

import torch
from torch import Tensor

from flash_attn_cute import flash_attn_with_kvcache, get_scheduler_metadata
from scripts.tiny_llama import Config, TinyLlama

# Where plain PyTorch's best two logits (of standard deviation 1) are closer than this, rounding decides between them:
# kernel and reference may differ in the last bit of a 16-bit result, which moves a logit by some 1e-3.
TIE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
PAGE_SIZE = 16


@dataclass
class Request:
    number: int
    arrival: int  # step
    prompt: list[int]
    new_tokens: int
    generated: list[int] = field(default_factory=list)
    cached: int = 0  # tokens whose keys and values are in the cache
    pages: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.generated

    @property
    def is_finished(self) -> bool:
        return len(self.generated) == self.new_tokens


class Batch(NamedTuple):
    """What a step computes: some tokens of some requests. Tensors have an entry a slot, used or not."""

    requests: list[Request]
    counts: list[int]  # tokens of each
    tokens: Tensor  # (T,)
    offsets: Tensor  # (slots + 1,) int32
    cached: Tensor  # (slots,) int32
    lengths: Tensor  # (slots,) int32, with the tokens of this step
    pages: Tensor  # (slots, most pages of a request) int32


@dataclass(frozen=True)
class Limits:
    slots: int = 6  # requests in flight
    budget: int = 48  # tokens a step
    pages: int = 96
    pages_a_request: int = 16


class Engine:
    """Continuous batching over a pool of pages."""

    def __init__(self, model: TinyLlama, limits: Limits, backend: str, seed: int = 0):
        c, device = model.config, model.head.device
        self.model, self.limits, self.backend = model, limits, backend
        # A page of a layer holds its keys and then its values.
        shape = (c.layers, limits.pages, 2, PAGE_SIZE, c.kv_heads, c.head_dim)
        self.cache = torch.full(shape, float("nan"), dtype=c.cache_dtype, device=device)
        self.free = list(range(limits.pages))
        random.Random(seed).shuffle(self.free)
        self.running: list[Request] = []
        self.steps: Counter[str] = Counter()

    def admit(self, waiting: list[Request]) -> None:
        """Starts waiting requests, in order, while there are slots and all the pages that they will need."""
        promised = sum(self._pages_needed(r) - len(r.pages) for r in self.running)
        while waiting and len(self.running) < self.limits.slots:
            promised += self._pages_needed(waiting[0])
            if promised > len(self.free):
                return
            self.running.append(waiting.pop(0))

    def step(self) -> list[Request]:
        """One batch through all layers. Returns the requests that are finished by it."""
        batch = self._batch()
        plan = self._plan(batch)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash_attn_with_kvcache(
                q,
                self.cache[layer, :, 0],
                self.cache[layer, :, 1],
                k,
                v,
                rotary_cos=self.model.cos,
                rotary_sin=self.model.sin,
                rotary_interleaved=False,
                cache_seqlens=batch.cached,
                page_table=batch.pages,
                cu_seqlens_q=batch.offsets,
                cu_seqlens_k_new=batch.offsets,
                max_seqlen_q=max(batch.counts),
                causal=True,
                scheduler_metadata=plan,
                backend=self.backend,
            )

        last = torch.tensor(batch.counts, device=self.cache.device).cumsum(0) - 1
        hidden = self.model.step(batch.tokens, attend)
        chosen = self.model.logits(hidden[last]).argmax(dim=-1).tolist()
        for request, count, token in zip(batch.requests, batch.counts, chosen, strict=True):
            request.cached += count
            if request.cached == len(request.tokens):  # otherwise a part of the prompt is still to come
                request.generated.append(token)
        finished = [request for request in self.running if request.is_finished]
        for request in finished:
            self.running.remove(request)
            self.free.extend(request.pages)
        return finished

    def _batch(self) -> Batch:
        """Decodes first: they take a token each, and prompts the rest of the budget."""
        decodes = [r for r in self.running if len(r.tokens) - r.cached == 1]
        prompts = [r for r in self.running if len(r.tokens) - r.cached > 1]
        left, requests, counts = self.limits.budget, [], []
        for request in decodes + prompts:
            count = min(len(request.tokens) - request.cached, left)
            if count:
                left -= count
                requests.append(request)
                counts.append(count)
                missing = -(-(request.cached + count) // PAGE_SIZE) - len(request.pages)
                request.pages += [self.free.pop() for _ in range(missing)]
        self.steps["mixed" if set(map(id, requests)) & set(map(id, prompts)) and decodes else "pure"] += 1
        unused = self.limits.slots - len(requests)
        cached = [r.cached for r in requests]
        tokens = [t for r, n in zip(requests, counts, strict=True) for t in r.tokens[r.cached : r.cached + n]]
        width = self.limits.pages_a_request
        table = [r.pages + [-1] * (width - len(r.pages)) for r in requests] + [[-1] * width] * unused

        def integers(values: list) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.cache.device)

        return Batch(
            requests,
            counts,
            torch.tensor(tokens, device=self.cache.device),
            integers([*accumulate(counts, initial=0)] + [sum(counts)] * unused),
            integers(cached + [0] * unused),
            integers([before + n for before, n in zip(cached, counts, strict=True)] + [0] * unused),
            integers(table),
        )

    def _plan(self, batch: Batch):
        c = self.model.config
        return get_scheduler_metadata(
            self.limits.slots,
            max(batch.counts),
            self.limits.pages_a_request * PAGE_SIZE,
            c.heads,
            c.kv_heads,
            c.head_dim,
            cu_seqlens_q=batch.offsets,
            seqused_k=batch.lengths,
            total_q=len(batch.tokens),
            causal=True,
            backend=self.backend,
        )

    def _pages_needed(self, request: Request) -> int:
        # The last token is never cached.
        return -(-(len(request.prompt) + request.new_tokens - 1) // PAGE_SIZE)


def requests_of(options: argparse.Namespace, vocabulary: int) -> list[Request]:
    """Prompts of 1 to 100 tokens, a new one every step or two."""
    rng = random.Random(options.seed)
    requests, arrival = [], 0
    for number in range(options.requests):
        prompt = [rng.randrange(vocabulary) for _ in range(rng.randint(1, options.longest_prompt))]
        requests.append(Request(number, arrival, prompt, options.new_tokens))
        arrival += rng.randint(0, 2)
    return requests


def serve(engine: Engine, requests: list[Request]) -> int:
    """Runs until every request is finished. Returns the number of steps."""
    arriving, waiting, step = list(requests), [], 0
    while arriving or waiting or engine.running:
        while arriving and arriving[0].arrival <= step:
            waiting.append(arriving.pop(0))
        engine.admit(waiting)
        if engine.running:
            for request in engine.step():
                print(f"step {step:3}: request {request.number}: {' '.join(map(str, request.generated))}")
        step += 1
    return step


def compare(model: TinyLlama, requests: list[Request]) -> tuple[int, list[str]]:
    """(tokens compared, what is wrong). A request is compared up to where plain PyTorch is undecided itself."""
    compared, wrong = 0, []
    for request in requests:
        expected, leads = model.greedy(request.prompt, request.new_tokens)
        for place, (token, right, lead) in enumerate(zip(request.generated, expected, leads, strict=True)):
            if token != right:
                if lead >= TIE[model.config.cache_dtype]:
                    what = f"token {place} is {token}, and {right} in plain PyTorch, by {lead:.4f}"
                    wrong.append(f"request {request.number}: {what}")
                break
            compared += 1
    return compared, wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto", choices=["auto", "cute", "emulator", "reference"])
    parser.add_argument("--requests", type=int, default=10, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=12, metavar="N", help="of each request")
    parser.add_argument("--longest-prompt", type=int, default=100, metavar="N", help="in tokens")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    options = parser.parse_args(arguments)
    limits, longest = Limits(), options.longest_prompt + options.new_tokens - 1
    if not 1 <= options.longest_prompt <= longest <= limits.pages_a_request * PAGE_SIZE:
        parser.error(f"--longest-prompt and --new-tokens: a request has room for {limits.pages_a_request * PAGE_SIZE}")

    device = "cuda" if torch.cuda.is_available() and options.backend in ("auto", "cute") else "cpu"
    is_kernel = device == "cuda" or options.backend == "emulator"
    config = Config(cache_dtype=torch.float16 if is_kernel else torch.float32)
    with torch.inference_mode():
        model = TinyLlama(config, device)
        engine = Engine(model, limits, options.backend)
        requests = requests_of(options, config.vocabulary)
        steps = serve(engine, requests)
        compared, wrong = compare(model, requests)
    total = sum(len(request.generated) for request in requests)
    print(f"{len(requests)} requests in {steps} steps, {engine.steps['mixed']} of them of prompts among decodes")
    for line in wrong:
        print(line)
    verdict = "DIFFERENT from" if wrong else "equal to"
    print(f"{compared} of {total} tokens compared: {verdict} those of plain PyTorch, one request at a time")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
