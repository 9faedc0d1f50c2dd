#!/usr/bin/env python
"""Compile a list of configurations into the on-disk cache, in parallel, so that no later process waits for a compile.

    python scripts/precompile.py                           # what most models use, for the GPU of this machine
    python scripts/precompile.py --arch sm_90a --jobs 8    # for Hopper; no GPU needed
    python scripts/precompile.py --preset serving          # over pages, planned, split: what an engine calls
    python scripts/precompile.py --preset configs.json     # a list of objects with keys of DEFAULTS

The cache holds host code for the CPU that compiled it, so run this on the kind of machine that will load it.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPOSITORY)

from flash_attn_cute.precompile import DEFAULTS

DENSE: dict = {}
VARLEN = {"varlen_q": True, "varlen_k": True}
KV_CACHE = {"varlen_q": True, "seqused_k": True}
FULL: dict = {}
CAUSAL = {"causal": True}
SLIDING = {"causal": True, "window": [True, False]}
BAND = {"window": [True, True]}


def main() -> int:
    args = parse_args()
    try:
        configs = load_configs(args.preset)
    except (OSError, ValueError) as error:
        sys.exit(f"{args.preset}: {error}")
    if os.environ.get("FLASH_ATTN_CUTE_CACHE") == "0":
        sys.exit("FLASH_ATTN_CUTE_CACHE=0 disables the cache on disk: there is nowhere to keep the result")
    if args.arch:
        os.environ["CUTE_DSL_ARCH"] = args.arch  # the workers inherit it, and the DSL reads it when it is imported
    start = time.perf_counter()
    failures = compile_all(configs, args.jobs)
    for config, error in failures:
        print(f"failed: {describe(config)}\n    {error}", file=sys.stderr)
    done = len(configs) - len(failures)
    print(f"{done} of {len(configs)} configurations ready in {time.perf_counter() - start:.0f} s")
    return 1 if failures else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", help="target architecture, such as sm_90a; default: that of this machine's GPU")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="worker processes")
    parser.add_argument("--preset", default="common", metavar="common|serving|all|FILE.json")
    return parser.parse_args()


def load_configs(preset: str) -> list[dict]:
    """Return the configurations of a preset or a JSON file, each with every key of DEFAULTS, without repeats."""
    if preset in PRESETS:
        partial = PRESETS[preset]()
    else:
        partial = json.loads(Path(preset).read_text())
        if not isinstance(partial, list) or not all(isinstance(config, dict) for config in partial):
            raise ValueError("expected a list of objects")
    unique = {json.dumps(config, sort_keys=True): config for config in map(complete, partial)}
    return list(unique.values())


def complete(partial: dict) -> dict:
    """Fill in what a configuration leaves out."""
    unknown = partial.keys() - DEFAULTS.keys()
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)}; takes {list(DEFAULTS)}")
    head_dim = partial.get("head_dim", DEFAULTS["head_dim"])
    return DEFAULTS | {"head_dim_v": head_dim} | partial


def common() -> list[dict]:
    """bf16 inference: the usual head dimensions, dense and packed, full and causal, MHA and grouped heads."""
    return product(
        dtypes=["bf16"],
        head_dims=[(64, 64), (128, 128), (192, 128), (256, 256)],
        layouts=[DENSE, VARLEN],
        masks=[FULL, CAUSAL],
        features=[{}],
    )


def serving() -> list[dict]:
    """Chunks of prefill and decodes over pages of 16 and 64 keys: without a plan, with one, with one that may split."""
    paged = KV_CACHE | CAUSAL | {"pack_gqa": True}
    plans = ({}, {"planned": True}, {"planned": True, "splits": True})
    return [
        paged | plan | {"head_dim": head_dim, "qheads_per_kvhead": group, "page_size": page_size, "few_rows": few_rows}
        for head_dim, group, page_size, plan, few_rows in itertools.product(
            (64, 128), (4, 8), (16, 64), plans, (False, True)
        )
    ]


def everything() -> list[dict]:
    """Both types, every head dimension, layout and mask, with one further feature at a time."""
    return product(
        dtypes=["bf16", "fp16"],
        head_dims=[(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)],
        layouts=[DENSE, VARLEN, KV_CACHE],
        masks=[FULL, CAUSAL, SLIDING, BAND],
        features=[{}, {"lse": True}, {"softcap": True}, {"sink": "fp32"}, {"sink": "bf16"}],
    )


def product(dtypes: list, head_dims: list, layouts: list, masks: list, features: list) -> list[dict]:
    groups = [(1, False), *itertools.product((4, 8), (False, True))]  # packing one query head a KV head is no packing
    return [
        {"dtype": dtype, "head_dim": head_dim, "head_dim_v": head_dim_v, "qheads_per_kvhead": heads, "pack_gqa": pack}
        | layout
        | mask
        | feature
        for dtype, (head_dim, head_dim_v), layout, mask, feature, (heads, pack) in itertools.product(
            dtypes, head_dims, layouts, masks, features, groups
        )
    ]


PRESETS = {"common": common, "serving": serving, "all": everything}


def compile_all(configs: list[dict], jobs: int) -> list[tuple[dict, str]]:
    """Compile in worker processes; return the configurations that failed, each with its error."""
    failures = []
    # Spawned, not forked: a fork would share the state of CUDA and of the compiler with its parent.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(jobs, len(configs))), mp_context=context) as pool:
        futures = {pool.submit(compile_one, config): config for config in configs}
        for future in track(futures):
            error = future.exception()
            if error is not None:
                failures.append((futures[future], f"{type(error).__name__}: {error}"))
    return failures


def compile_one(config: dict) -> None:
    """Run in a worker, which keeps the imported package from one configuration to the next."""
    from flash_attn_cute.precompile import precompile

    precompile(config)


def track(futures: dict[Future, dict]) -> Iterator[Future]:
    """Yield futures as they finish, showing how far along they are."""
    with contextlib.suppress(ImportError):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        if sys.stdout.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            with Progress(*columns) as progress:
                task = progress.add_task("", total=len(futures))
                for future in as_completed(futures):
                    progress.update(task, advance=1, description=describe(futures[future]))
                    yield future
            return
    for number, future in enumerate(as_completed(futures), 1):
        print(f"[{number}/{len(futures)}] {describe(futures[future])}", flush=True)
        yield future


def describe(config: dict) -> str:
    """Name a configuration by what it does not leave at the default."""
    always = f"{config['dtype']} d{config['head_dim']}/{config['head_dim_v']} gqa{config['qheads_per_kvhead']}"
    named = ("dtype", "head_dim", "head_dim_v", "qheads_per_kvhead")
    return " ".join(
        [always]
        + [
            key if value is True else f"{key}={value}"
            for key, value in config.items()
            if key not in named and value != DEFAULTS[key]
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
