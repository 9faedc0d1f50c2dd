"""The program by which mutation judges the Hopper forward: long and short sequences, and more tiles than CTAs.

python -m flash_attn_cute.emulator.mutate --arch sm_90a --sms 2 --check all --schedule random \
    tests/emulated/mutation_forward_sm90.py

Rings wrap and run both full and empty, and two CTAs share a tile counter. It compiles once, keeps it, and asserts.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.attention_cases import assert_close_to_reference, attention, build_tensors, problem_of  # noqa: E402

LENGTHS = (([150, 3, 260], [430, 200, 640]), ([1, 64, 3, 130, 2, 5], [70, 64, 130, 130, 20, 300]))

for lengths_q, lengths_k in LENGTHS:
    tensors = build_tensors(lengths_q, lengths_k, head_dim=64, heads=1, kv_heads=1, device="cuda")
    # Not the memory that an earlier run left the right numbers in.
    out = torch.full_like(tensors.q, float("nan"))
    out, lse = attention(tensors, causal=True, out=out)
    assert_close_to_reference(out, lse, tensors, problem_of(tensors, causal=True))
