"""The program by which mutation judges the Blackwell forward: long and short sequences, and more tiles than CTAs.

python -m flash_attn_cute.emulator.mutate --arch sm_100a --sms 2 --check all --schedule random --seeds 2 \
    tests/emulated/mutation_forward_sm100.py CASE

Rings wrap and run both full and empty, and two CTAs share what hands out tiles. It compiles once, keeps it, and
asserts. Each case is a kernel of its own: `two-query-tiles` and `one-query-tile` are the pipelines, `sink` and
`splits` what those add to the first, `wide-keys` shares the place of queries and outputs, `clc` is the other scheduler.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.attention_cases import assert_close_to_reference, attention, build_tensors, problem_of  # noqa: E402

# What is built, what is asked for, and what the kernel alone is told.
CASES = {
    "two-query-tiles": (dict(head_dim=64), dict(causal=True), {}),
    "d128": (dict(head_dim=128), dict(causal=True), {}),
    "one-query-tile": (dict(head_dim=256), dict(causal=True), {}),
    "wide-keys": (dict(head_dim=192, head_dim_v=128), dict(causal=True), {}),
    "sink": (dict(head_dim=64, sink_dtype=torch.float32), dict(causal=True), {}),
    "sink-one-query-tile": (dict(head_dim=192, sink_dtype=torch.float32), dict(causal=True), {}),
    "splits": (dict(head_dim=64), dict(causal=True), dict(num_splits=0, seqlen_k_per_split=512)),
    "clc": (dict(head_dim=64), dict(causal=True), dict(scheduler="clc")),
    "packed-heads": (dict(head_dim=64, heads=3), dict(causal=True), dict(pack_gqa=True)),
}
LENGTHS = (
    ([150, 3, 260, 700, 200, 300], [430, 200, 640, 700, 500, 450]),
    ([1, 64, 3, 130, 2, 5], [70, 64, 130, 130, 20, 300]),
)

build, options, told = CASES[sys.argv[1]]
for lengths_q, lengths_k in LENGTHS:
    tensors = build_tensors(lengths_q, lengths_k, device="cuda", **{"heads": 1, "kv_heads": 1, **build})
    problem = problem_of(tensors, **options)
    # Not the memory that an earlier run left the right numbers in. Scores so large that maxima move.
    tensors = tensors._replace(q=tensors.q * 8)
    out = tensors.q.new_full((*tensors.q.shape[:-1], tensors.v.shape[-1]), float("nan"))
    out, lse = attention(tensors, out=out, **options, **told)
    assert_close_to_reference(out, lse, tensors, problem)
