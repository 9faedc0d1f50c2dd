"""The Hopper forward under a plan, in the emulator."""

import torch

from tests.attention_cases import attention, build_tensors, cu_seqlens
from tests.emulated.planned_forward import *  # noqa: F403  the tests themselves
from tests.emulated.planned_forward import CUDA


def test_prefill_equals_decode_at_absolute_boundaries(emulation):
    """With a sink, which the forward kernel adds to rows of one split and the combine kernel to the others."""
    options = dict(causal=True, seqlen_k_per_split=256)
    prefill = build_tensors([300], [300], head_dim=64, heads=4, kv_heads=2, sink_dtype=torch.float32, device=CUDA)
    out, lse = attention(prefill, **options)
    for row in (5, 100, 255, 256, 280):
        decode = prefill._replace(
            q=prefill.q[row : row + 1],
            k=prefill.k[: row + 1],
            v=prefill.v[: row + 1],
            cu_seqlens_q=cu_seqlens([1], CUDA),
            cu_seqlens_k=cu_seqlens([row + 1], CUDA),
        )
        one, lse_of_one = attention(decode, **options)
        assert torch.equal(one[0], out[row]) and torch.equal(lse_of_one[:, 0], lse[:, row]), row
