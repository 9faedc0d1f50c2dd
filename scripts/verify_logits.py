#!/usr/bin/env python
"""Shows whether a model's logits are a function of the text alone: of its whole prefill, of its decode, of any batch.

    python scripts/verify_logits.py                                    # on a GPU: every attention function, in bf16
    python scripts/verify_logits.py --attention triton-invariant --split-size 512
    TRITON_INTERPRET=1 python scripts/verify_logits.py --size tiny --longest 20 --attention triton-invariant

A small Qwen3 with random weights computes logits and log-probabilities of some texts, each

  a  as one prefill, alone, without a cache: the expectation;
  b  as a prefill of its first part and then token by token, over a paged cache;
  c  as b, in batches with all the others, which begin at other times and end at others;
  d  packed with all the others, with gradients: the training path. Its gradient norms must not be 0.

An invariant attention function runs in batch-invariant mode, and any difference from a is a failure. A variant one runs
outside of it, and its differences are what invariance is for. Exits with 1 where there is a failure, and 0 otherwise.
"""

from __future__ import annotations

import argparse
import random
import sys
from contextlib import nullcontext
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPOSITORY)

import torch
from torch import Tensor

from flash_attn_cute import launch
from flash_attn_cute.batch_invariant import set_batch_invariant_mode
from flash_attn_cute.integrations import transformers as integration
from scripts.paged_qwen import SIZES, PagedModel, Sequence, build_model, packed_logits


def functions_of(device: str) -> list[str]:
    """The attention functions that a GPU has."""
    has_cute = torch.cuda.get_device_capability(device) in launch.ARCHITECTURES
    return [name for name, kind in integration.KINDS.items() if has_cute or kind.backend != "cute"]


def texts_of(longest: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Lengths around what tiles and pages end at, and a random one."""
    rng = random.Random(seed)
    lengths = sorted({longest, longest // 2 + 1, min(129, longest), min(64, longest), rng.randint(2, longest), 2})
    return [[rng.randrange(vocabulary) for _ in range(length)] for length in reversed(lengths)]


def prefilled(length: int) -> int:
    """How much of a text is prefilled before it is decoded."""
    return max(length // 3, 1)


def decode_alone(cache: PagedModel, text: list[int]) -> Tensor:
    sequence = Sequence(text)
    first = prefilled(len(text))
    logits = [cache.step([(sequence, first)])]
    logits += [cache.step([(sequence, 1)]) for _ in range(len(text) - first)]
    cache.release(sequence)
    return torch.cat(logits)


def decode_together(cache: PagedModel, texts: list[list[int]]) -> list[Tensor]:
    """One text begins every third step, so that prefills meet decodes; each leaves when it is done."""
    waiting = [(index, Sequence(text)) for index, text in enumerate(texts)]
    running: list[tuple[int, Sequence]] = []
    logits: list[list[Tensor]] = [[] for _ in texts]
    step = 0
    while waiting or running:
        if waiting and step % 3 == 0:
            running.append(waiting.pop(0))
        # Another order every step: a place in the batch must not matter either.
        running = running[1:] + running[:1]
        work = [(s, 1 if s.cached else prefilled(len(s.tokens))) for _, s in running]
        parts = cache.step(work).split([count for _, count in work])
        for (index, _), part in zip(running, parts, strict=True):
            logits[index].append(part)
        for _, sequence in running:
            if sequence.cached == len(sequence.tokens):
                cache.release(sequence)
        running = [(index, s) for index, s in running if s.cached]
        step += 1
    return [torch.cat(parts) for parts in logits]


def train(model, texts: list[list[int]]) -> tuple[list[Tensor], dict[str, float]]:
    """(logits, gradient norm of each parameter) of predicting the next token of all texts."""
    model.zero_grad()
    logits = packed_logits(model, texts)
    loss = torch.zeros((), device=model.device)
    for text, of_text in zip(texts, logits, strict=True):
        after = torch.tensor(text[1:], device=model.device)
        loss = loss - of_text[:-1].float().log_softmax(-1).gather(1, after[:, None]).sum()
    loss.backward()
    norms = {name: float(p.grad.float().norm()) for name, p in model.named_parameters()}
    model.zero_grad()
    return [x.detach() for x in logits], norms


def largest_difference(got: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """(of logits, of log-probabilities); infinite where something is NaN."""

    def worst(pairs) -> float:
        largest = max(float((a.float() - b.float()).abs().max()) for a, b in pairs)
        return largest if largest == largest else float("inf")

    pairs = list(zip(got, expected, strict=True))
    return worst(pairs), worst([(a.float().log_softmax(-1), b.float().log_softmax(-1)) for a, b in pairs])


def verify(name: str, model, texts: list[list[int]], options: argparse.Namespace) -> list[str]:
    """Prints a line a way of computing; returns what is wrong."""
    invariant = "invariant" in name
    model.set_attn_implementation(name)
    cache = PagedModel(model, 2 * sum(-(-len(text) // options.page_size) for text in texts), options.page_size)
    mode = set_batch_invariant_mode(True, options.split_size) if invariant else nullcontext()
    wrong = []
    with mode:
        with torch.no_grad():
            expected = [packed_logits(model, [text])[0] for text in texts]
        ways = {
            "b, decoded alone": [decode_alone(cache, text) for text in texts],
            "c, decoded in batches": decode_together(cache, texts),
        }
        ways["d, trained on"], norms = train(model, texts)
        for way, got in ways.items():
            logits, log_probs = largest_difference(got, expected)
            print(f"{name}: {way}: largest difference of logits {logits:g}, of log-probabilities {log_probs:g}")
            if invariant and (logits or log_probs):
                wrong.append(f"{name}: {way} differs from the prefill")
    least = min(norms, key=norms.__getitem__)
    print(f"{name}: gradient norms from {norms[least]:.3g} ({least}) to {max(norms.values()):.3g}")
    if not 0.0 < norms[least] < float("inf"):
        wrong.append(f"{name}: the gradient norm of {least} is {norms[least]}")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", nargs="+", choices=sorted(integration.KINDS), help="default: all on this device")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="small", choices=sorted(SIZES))
    parser.add_argument("--longest", type=int, default=300, metavar="N", help="tokens of the longest text")
    parser.add_argument("--page-size", type=int, default=16, metavar="N")
    parser.add_argument("--split-size", type=int, metavar="N", help="keys of a split, in the mode; default: one split")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    options = parser.parse_args(arguments)
    if options.longest < 2:
        parser.error("--longest: takes at least 2")
    integration.register()
    # On the CPU, functions are what the reference or Triton's interpreter computes, in fp32.
    on_cpu = options.device == "cpu"
    names = options.attention or (["triton-invariant"] if on_cpu else functions_of(options.device))
    size = SIZES[options.size]
    model = build_model(size, options.device, torch.float32 if on_cpu else torch.bfloat16, options.seed)
    texts = texts_of(options.longest, size.vocabulary, options.seed)
    print(f"{len(texts)} texts of {', '.join(str(len(text)) for text in texts)} tokens")
    wrong = [line for name in names for line in verify(name, model, texts, options)]
    for line in wrong:
        print(f"WRONG {line}")
    print("FAILED" if wrong else "every invariant function gave the same bits in every way")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
