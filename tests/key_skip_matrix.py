"""KV tiles that a key mask hides whole, on a GPU: packed, skipped without changing a bit, and planned for.

`tests/sm90` imports these tests.
"""

import pytest
import torch

from flash_attn_cute import get_scheduler_metadata
from flash_attn_cute.active_tiles import TEAMS, KeyTensors, ListShape
from tests.attention_cases import (
    assert_close_to_reference,
    attention,
    build_tensors,
    cu_seqlens,
    hide_spans,
    problem_of,
)
from tests.emulated import pack_key_mask_checks as packing
from tests.emulated.key_skip_forward import CASES, SPAN, assert_neutral

CUDA = "cuda"
LENGTHS_Q = [700, 1, 0, 3, 129, 1, 64]
LENGTHS_K = [1500, 129, 7, 0, 129, 9000, 2500]
DIMS = [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]


@pytest.mark.parametrize("team", TEAMS, ids=str)
def test_lists_equal_the_specification(monkeypatch, team):
    for name in packing.CASES:
        packing.assert_case_packs(name, monkeypatch, team)
    # More than a team looks at in one round, and 131072 keys.
    lengths = [70 * 128, 1, 131072, 5000]
    total = sum(lengths)
    for heads in (1, 8):
        mask = packing.sparse_mask(total, heads, kept=0.002)
        shape = ListShape(128, len(lengths), heads, 1, True, total)
        packing.assert_packs(mask, KeyTensors(cu_seqlens(lengths)), shape, monkeypatch, team)


@pytest.mark.parametrize("name", CASES)
def test_skipping_changes_no_bit(monkeypatch, name):
    build, options = CASES[name]
    plain = {"heads": 4, "kv_heads": 2, "head_dim": 64, "device": CUDA}
    assert_neutral(monkeypatch, hide_spans(build_tensors(LENGTHS_Q, LENGTHS_K, **(plain | build)), SPAN), **options)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("mask_heads", [1, 2, 8])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (900, 100)}], ids=str)
def test_every_tile_skips_without_changing_a_bit(monkeypatch, dims, mask_heads, options):
    shape = {"heads": 8, "kv_heads": 2, "head_dim": dims[0], "head_dim_v": dims[1], "device": CUDA}
    tensors = hide_spans(build_tensors(LENGTHS_Q, LENGTHS_K, key_mask_heads=mask_heads, **shape), SPAN)
    packs = {"pack_gqa": False} if mask_heads == 8 and dims == (256, 256) else {}
    assert_neutral(monkeypatch, tensors, **packs, **options)
    assert_neutral(monkeypatch, tensors, seqlen_k_per_split=1024, **packs, **options)


def decode_tensors(batch, keys, **build):
    shape = {"heads": 8, "kv_heads": 2, "head_dim": 128, "key_mask_heads": 1, "device": CUDA}
    return build_tensors([1] * batch, [keys] * batch, **(shape | build))


@pytest.mark.parametrize("mask_heads", [1, 2, 8])
def test_a_plan_follows_its_mask(mask_heads):
    tensors = hide_spans(decode_tensors(3, 20000, key_mask_heads=mask_heads), SPAN, kept=0.1)

    def plan(mask, backend="auto"):
        lengths = {"cu_seqlens_q": tensors.cu_seqlens_q, "cu_seqlens_k": tensors.cu_seqlens_k}
        return get_scheduler_metadata(
            3, 1, 20000, 8, 2, 128, total_q=3, causal=True, key_mask=mask, num_sms=132, backend=backend, **lengths
        )

    followed, expected, blind = plan(tensors.key_mask), plan(tensors.key_mask, "reference"), plan(None)
    assert torch.equal(followed.num_splits_dynamic.cpu(), expected.num_splits_dynamic.cpu())
    assert followed.num_splits_dynamic.max() < blind.num_splits_dynamic.max()
    for given in (followed, blind, None):
        options = {"causal": True, "max_seqlen_q": 1, "max_seqlen_k": 20000}
        got = attention(tensors, num_splits=0, scheduler_metadata=given, **options)
        assert_close_to_reference(*got, tensors, problem_of(tensors, **options))


def test_a_graph_replays_on_another_mask():
    """Lists, and the plan, are made anew in every replay."""
    tensors = decode_tensors(4, 5000)
    options = {"causal": True, "max_seqlen_q": 1, "num_splits": 0}
    attention(tensors, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(tensors, **options)
    for seed in range(3):
        tensors.key_mask.copy_(hide_spans(decode_tensors(4, 5000, seed=seed), SPAN, kept=0.2, seed=seed).key_mask)
        graph.replay()
        expected = attention(tensors, **options)
        assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))
        assert_close_to_reference(*captured, tensors, problem_of(tensors, **options))
