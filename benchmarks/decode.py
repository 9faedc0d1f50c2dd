"""Decode over a KV cache: a token or a few a sequence, keys and values contiguous or in pages.

    python benchmarks/decode.py --markdown out.md --csv out.csv
    python benchmarks/decode.py --preset few-long --only "page 64"

One run on one GPU: ceilings first, then for each case our call with a plan made before ("ours"), the same call captured
and replayed ("ours graph"), the call that plans itself ("ours in-call"), the batch-invariant call, whose splits have
one size ("ours invariant", and its graph), and peers, in turn with a cold L2, medians.
In the same rounds a kernel that only reads as many bytes ("read alone"): it says what of the distance to the floor is
the launch, which every kernel pays for. And all of these as the layers of a model call them ("in layers", see
benchmarks/layers.py): a graph of up to 16 calls, each over keys and values of its own, time a call.
Pages lie in random order in a pool that is larger than needed; entries of the table past the used length are -1.
Last comes the host time of a call, and the list that decode must show, computed from these rows. The GPU time of a plan
made before is the shorter of the eager and the replayed call: it is one kernel, reached on two ways.
Exits with 1 if a variant of ours failed or computed something wrong.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks import report as show
from benchmarks.layers import IN_LAYERS, LAYER_BYTES, PeerInLayers, VariantInLayers, graph_of, layers_of
from benchmarks.paged import PagedInputs
from benchmarks.peers import Attention, AttentionInputs
from benchmarks.rows import Row, best_seconds, run_once
from benchmarks.serving import Bench, Benchmark, Case
from benchmarks.serving_peers import ServingFlashAttention4
from benchmarks.targets import Target
from benchmarks.timing import host_seconds_per_call, reader_of
from benchmarks.variants import Variant, plan
from benchmarks.verify import Check
from benchmarks.workloads import Workload, ragged

PLANNED = ("ours", "ours graph")
OURS_IN_LAYERS = f"ours {IN_LAYERS}"
READ_ALONE = "read alone"
READ_IN_LAYERS = f"read {IN_LAYERS}"
INVARIANT = ("ours invariant", "ours invariant graph")
# A KV head's split of so many keys is 1 MiB, some 30 us of an SM's share of the bandwidth: coarse enough that merging
# splits costs little, fine enough that the last of 131072 keys are not waited for.
INVARIANT_SPLIT = 2048
VARIANTS = (
    Variant("ours", "cached", num_splits=0),
    Variant("ours graph", "cached", num_splits=0, graph=True),
    Variant("ours in-call", num_splits=0),
    Variant("ours invariant", "cached", seqlen_k_per_split=INVARIANT_SPLIT),
    Variant("ours invariant graph", "cached", graph=True, seqlen_k_per_split=INVARIANT_SPLIT),
    VariantInLayers(OURS_IN_LAYERS, "cached", num_splits=0),
)


def decode(name: str, lens_k: list[int], *, tokens: int = 1, heads: int = 32, heads_kv: int = 8) -> Workload:
    """`tokens` queries of each sequence, at its end; head dimension 128, bf16."""
    workload = ragged(name, [tokens] * len(lens_k), lens_k, heads=heads, heads_kv=heads_kv)
    return replace(workload, group="decode")


def ragged_lengths() -> list[int]:
    rng = random.Random(4)
    return [rng.randint(256, 16384) for _ in range(96)]


FEW_LONG = (decode("1x131072", [131072]), decode("4x65536", [65536] * 4))
MANY = decode("64x8192", [8192] * 64)
RAGGED = decode("ragged 96x256..16384", ragged_lengths())
ONE_LONG = decode("131072 among 63x512", [512] * 32 + [131072] + [512] * 31)
MQA = decode("MQA 64/1 1x131072", [131072], heads=64, heads_kv=1)
SPECULATIVE = (
    decode("64x8192 of 4 tokens", [8192] * 64, tokens=4),
    decode("64x8192 of 8 tokens", [8192] * 64, tokens=8),
    decode("1x131072 of 8 tokens", [131072], tokens=8),
)
LARGE_BATCHES = (MANY, RAGGED, ONE_LONG, *SPECULATIVE[:2])
SMALL_PAGES = (1, 16)
# Preset, what it is, and the part of the measured read bandwidth that each of its cases has to reach.
READ_BANDWIDTH = (
    ("few-long", "few long sequences, contiguous and page 64", 0.93),
    ("many", "64x8192, contiguous and page 64", 0.97),
    ("ragged", "ragged 96 of 256 to 16384, page 64", 0.97),
    ("one-long", "131072 among 63x512, page 64", 0.88),
    ("mqa", "MQA 64/1, one of 131072, contiguous and page 64", 0.60),
)
# Few keys, so that the GPU is done before the host has issued the next call.
HOST_TIME = decode("4x256", [256] * 4)
OURS_VARLEN = "flash_attn_varlen_func"
OURS_VARLEN_PAGED = "flash_attn_varlen_func, page 64"
OURS_KVCACHE = "flash_attn_with_kvcache, page 64"


def cases(workloads, page_sizes) -> list[Case]:
    return [Case(workload, page_size) for workload in workloads for page_size in page_sizes]


PRESETS = {
    "few-long": lambda: cases(FEW_LONG, (None, 64)),
    "many": lambda: cases([MANY], (None, 64)),
    "ragged": lambda: cases([RAGGED], (64,)),
    "one-long": lambda: cases([ONE_LONG], (64,)),
    "mqa": lambda: cases([MQA], (None, 64)),
    "speculative": lambda: cases(SPECULATIVE, (64,)),
    # Last, since few peers take every page size, and one that crashes takes the GPU along.
    "pages": lambda: cases([MANY, RAGGED], (1, 16, 64, 256)),
}


def all_presets() -> list[Case]:
    """Each case of the presets once."""
    return list(dict.fromkeys(case for preset in PRESETS.values() for case in preset()))


def measure(case: Case, bench: Bench) -> Row:
    """The row of a case; beside it how many layers there are, `read_alone_seconds` and `read_in_layers_seconds`."""
    bench = replace(bench, peers=[*bench.peers, *map(PeerInLayers, bench.peers)])
    prepared = bench.prepare(case, VARIANTS)
    readers = [reader_of(case.workload.min_bytes, bench.device) for _ in range(layers_of(case.workload))]
    reading = {READ_ALONE: readers[0]}
    if bench.device == "cuda":
        reading[READ_IN_LAYERS] = graph_of(readers)
    timings = bench.time(prepared.candidates | reading)
    alone, layers = timings.pop(READ_ALONE), timings.pop(READ_IN_LAYERS, None)
    return prepared.row(bench.ceilings, timings) | {
        "layers": layers_of(case.workload),
        "read_alone_seconds": alone.seconds,
        "read_in_layers_seconds": layers and layers.seconds,
    }


def must_show(report: dict[str, Any]) -> list[Target]:
    """Rows that this run did not measure leave their line as "not measured"."""
    rows: dict[str, Row] = {row["name"]: row for row in report["rows"]}
    read = report["ceilings"]["read_bytes_per_s"]

    def time(case: Case, names: tuple[str, ...] = PLANNED) -> float | None:
        return best_seconds(rows[case.name], names) if case.name in rows else None

    def bandwidth(wanted: list[Case], names: tuple[str, ...]) -> float | None:
        """The worst of these cases, as a part of what the GPU reads; None where one of them is missing."""
        times = [time(case, names) for case in wanted]
        if None in times:
            return None
        return min(case.workload.min_bytes / t / read for case, t in zip(wanted, times, strict=True))

    def of_read_alone(wanted: list[Case]) -> float | None:
        """The worst of these cases, as a part of what a kernel that only reads as many bytes reaches."""
        times = [time(case) for case in wanted]
        if None in times:
            return None
        return min(rows[case.name]["read_alone_seconds"] / t for case, t in zip(wanted, times, strict=True))

    def small_pages(page_size: int) -> float | None:
        """Time over that of pages of 64, the worse of two workloads."""
        pairs = [(time(Case(w, page_size)), time(Case(w, 64))) for w in (MANY, RAGGED)]
        return max(small / large for small, large in pairs) if all(None not in pair for pair in pairs) else None

    def cost_of_invariance() -> float | None:
        """Time over that of free splits, the worst of the large batches in pages of 64."""
        pairs = []
        for workload in LARGE_BATCHES:
            row = rows.get(Case(workload, 64).name)
            pairs.append((row and best_seconds(row, INVARIANT), row and best_seconds(row, PLANNED)))
        return max(fixed / free for fixed, free in pairs) if all(all(pair) for pair in pairs) else None

    host = report.get("host_microseconds", {})
    return [
        *(
            Target(f"{what}: worst part of the read bandwidth", bandwidth(PRESETS[preset](), PLANNED), least)
            for preset, what, least in READ_BANDWIDTH
        ),
        *(Target(f"page {n}, time over page 64", small_pages(n), at_most=1.15) for n in SMALL_PAGES),
        Target(
            "cost of invariance: fixed splits over free ones, batches of 32 and more",
            cost_of_invariance(),
            at_most=1.15,
        ),
        *(
            Target(f"host time of {name}", host.get(name), at_most=30.0, unit="us")
            for name in (OURS_VARLEN_PAGED, OURS_KVCACHE)
        ),
        *(
            Target(f"{what}: worst part of what reading alone reaches", of_read_alone(PRESETS[preset]()), least)
            for preset, what, least in READ_BANDWIDTH
        ),
        *(
            Target(
                f"{what}, layers in a graph: part of the read bandwidth",
                bandwidth(PRESETS[preset](), (OURS_IN_LAYERS,)),
                least,
            )
            for preset, what, least in READ_BANDWIDTH
        ),
    ]


def with_kvcache(workload: Workload, inputs: PagedInputs, appended: AttentionInputs | None = None) -> Attention:
    """The engine's own function over the same pages, q as (batch, tokens, heads, dim).

    With `appended`, the same numbers contiguous, it writes the keys and values of the last tokens into the cache first:
    they stand there already, so that the output is the same.
    """
    from flash_attn_cute import flash_attn_with_kvcache

    q = inputs.q.view(workload.batch, -1, *inputs.q.shape[1:])
    arguments = {
        "cache_seqlens": inputs.seqused_k,
        "page_table": inputs.page_table,
        "causal": workload.causal,
        "scheduler_metadata": plan(workload, inputs, 0, packed_q=False),
    }
    if appended is not None:
        tokens = torch.arange(-workload.max_q, 0, device=q.device)
        last = appended.cu_seqlens_k[1:, None] + tokens
        arguments |= {"k": appended.k[last], "v": appended.v[last], "cache_seqlens": inputs.seqused_k - workload.max_q}
    return lambda: flash_attn_with_kvcache(q, inputs.k, inputs.v, **arguments)


def measure_host_time(bench: Bench) -> dict[str, Any]:
    """Microseconds the host spends in one eager call with a plan made before, on a decode that keeps no GPU busy."""
    contiguous = AttentionInputs.random(HOST_TIME, bench.device)
    paged = PagedInputs.scatter(HOST_TIME, contiguous, 64)
    ours = VARIANTS[0]
    makers = {
        OURS_VARLEN: lambda: ours.make(HOST_TIME, contiguous),
        OURS_VARLEN_PAGED: lambda: ours.make(HOST_TIME, paged),
        OURS_KVCACHE: lambda: with_kvcache(HOST_TIME, paged),
        f"{OURS_KVCACHE}, appending": lambda: with_kvcache(HOST_TIME, paged, contiguous),
    }
    for peer in bench.peers:
        if isinstance(peer, ServingFlashAttention4):
            makers[f"{peer.name}, page 64"] = lambda p=peer: p.make(HOST_TIME, paged.with_valid_entries())
    candidates, results = run_once(makers, Check(HOST_TIME, contiguous))
    right = {name: call for name, call in candidates.items() if results[name]["correct"]}
    seconds = host_seconds_per_call(right, torch.cuda.synchronize)
    return {
        "host_microseconds": {name: value * 1e6 for name, value in seconds.items()},
        "notes": [f"host time of {name}: {found}" for name, found in results.items() if name not in right],
    }


def bandwidth_table(
    report: dict[str, Any], title: str, names: list[str], ours: tuple[str, ...], reading: tuple[str, str]
) -> show.Table:
    """TB/s of the candidates, and the best of ours beside the read bandwidth and a kernel that only reads. reading:
    what it is called, and its seconds in a row."""
    read_bytes_per_s = report["ceilings"]["read_bytes_per_s"]
    name, key = reading
    lines = []
    for row in report["rows"]:
        rates = [row["results"].get(candidate, {}).get("terabytes_per_s") for candidate in names]
        best, alone = best_seconds(row, ours), row[key]
        lines.append(
            [
                row["name"],
                *(show.figure(rate) for rate in rates),
                show.figure(best and best * 1e6, "{:.1f}"),
                show.figure(alone and alone * 1e6, "{:.1f}"),
                show.figure(best and row["min_bytes"] / best / read_bytes_per_s, "{:.1%}"),
                show.figure(best and alone and alone / best, "{:.1%}"),
            ]
        )
    columns = ["workload", *names, "ours, us", f"{name}, us", "ours of read", f"ours of {name}"]
    return show.Table(f"{title}: TB/s; microseconds; ours of the read bandwidth and of reading", columns, lines)


def tables(report: dict[str, Any], peers: list[str]) -> list[show.Table]:
    rows = report["rows"]
    names = [*(variant.name for variant in VARIANTS if not isinstance(variant, VariantInLayers)), *peers]
    counts = sorted({row["layers"] for row in rows}, reverse=True)
    layers = f"{' or '.join(map(str, counts))}, as many as {LAYER_BYTES >> 30} GiB hold"
    found = [
        show.row_table("Decode (d128, causal, bf16, 32/8 heads where not said)", rows, peers),
        show.time_table("Microseconds", rows, names),
        bandwidth_table(report, "A call alone", names, PLANNED, (READ_ALONE, "read_alone_seconds")),
        bandwidth_table(
            report,
            f"Layers in a graph, a call ({layers})",
            [OURS_IN_LAYERS, *(f"{peer} {IN_LAYERS}" for peer in peers)],
            (OURS_IN_LAYERS,),
            (READ_IN_LAYERS, "read_in_layers_seconds"),
        ),
    ]
    if report.get("host_microseconds"):
        found.append(show.host_table(report["host_microseconds"]))
    return found


BENCHMARK = Benchmark(
    name="decode.py",
    title="Decode over a KV cache",
    presets=PRESETS | {"all": all_presets},
    variants=VARIANTS,
    measure=measure,
    tables=tables,
    must_show=must_show,
    extra=measure_host_time,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
