"""KV tiles that a key mask hides whole are skipped, and that changes no bit; `test_key_skip_sm90.py` imports this.

What is not skipped is a call whose lists of KV tiles were made from another mask, one that keeps all.
"""

import pytest
import torch

from flash_attn_cute.active_tiles import PreparedPacking
from flash_attn_cute.launch_combine import SPLITS_FOR_ONE_WARP
from tests.attention_cases import assert_close_to_reference, attention, build_tensors, hide_spans, problem_of
from tests.emulated.planned_forward import plan_of

CUDA = "cuda"
LENGTHS_Q, LENGTHS_K = [130, 1, 0, 3, 2], [600, 129, 7, 0, 1100]
PLAIN = {"heads": 4, "kv_heads": 2, "head_dim": 64, "device": CUDA}
# No KV tile has more keys.
SPAN = 256
CASES = {
    "a mask a query head, packed, a window": (
        {"key_mask_heads": 4, "sink_dtype": torch.float32},
        {"window_size": (500, 20), "pack_gqa": True},
    ),
    "a mask a query head, not packed": ({"key_mask_heads": 4, "slack_k": 5}, {"causal": True, "pack_gqa": False}),
    "few rows, a mask a KV head, pages of 64": (
        {"key_mask_heads": 2, "head_dim": 128, "layout_k": "paged", "page_size": 64},
        {"causal": True, "max_seqlen_q": 1},
    ),
    "batched, not packed": (
        {"key_mask_heads": 2, "layout_q": "batched", "layout_k": "batched"},
        {"pack_gqa": False},
    ),
}


def masked_tensors(lengths_q, lengths_k, **build):
    return hide_spans(build_tensors(lengths_q, lengths_k, **(PLAIN | build)), SPAN)


def attention_over(change, monkeypatch, tensors, **options):
    """The call, with lists of the KV tiles that `change` of its mask leaves."""
    pack = PreparedPacking.run
    with monkeypatch.context() as patch:
        patch.setattr(PreparedPacking, "run", lambda self, mask, keys: pack(self, change(mask), keys))
        return attention(tensors, **options)


def assert_neutral(monkeypatch, tensors, **options):
    """Skipping hidden KV tiles changes no bit, and what the lists leave out is not visited."""
    got = attention(tensors, **options)
    assert_close_to_reference(*got, tensors, problem_of(tensors, **options))
    unskipped = attention_over(torch.ones_like, monkeypatch, tensors, **options)
    assert all(torch.equal(one, other) for one, other in zip(got, unskipped, strict=True))
    out, _ = attention_over(torch.zeros_like, monkeypatch, tensors, **options)
    assert not out.any()


@pytest.mark.parametrize("name", CASES)
def test_skipping_changes_no_bit(emulation, monkeypatch, name):
    build, options = CASES[name]
    emulation.reschedule("random", 1)
    assert_neutral(monkeypatch, masked_tensors(LENGTHS_Q, LENGTHS_K, **build), **options)
    emulation.reschedule("in-order")


def test_left_padding_in_pages(emulation, monkeypatch):
    """KV tiles are counted from a sequence's first key."""
    build = {"key_mask_heads": 2, "layout_q": "batched", "layout_k": "paged", "page_size": 3}
    tensors = build_tensors([1, 2, 1], [900, 300, 700], **PLAIN, **build)
    tensors = tensors._replace(leftpad_k=torch.tensor([70, 0, 300], dtype=torch.int32, device=CUDA))
    assert_neutral(monkeypatch, hide_spans(tensors, SPAN), causal=True)


def test_splits(emulation, monkeypatch):
    tensors = masked_tensors([1, 5, 3], [1800, 600, 800], key_mask_heads=2, sink_dtype=torch.float32)
    # Splits that are hidden whole, of both heads or of one, and a sequence of which no key is left.
    tensors.key_mask[:700] = False
    tensors.key_mask[700:1500, 0] = False
    tensors.key_mask[2400:] = False
    options = {"causal": True, "max_seqlen_q": 5}
    # Absolute boundaries stay where they are.
    assert_neutral(monkeypatch, tensors, seqlen_k_per_split=SPAN, **options)
    # Lists so long that most boundaries are far from their ends.
    long = build_tensors([1], [9000], **PLAIN, key_mask_heads=2, sink_dtype=torch.float32)
    long.key_mask[3000:3300] = False
    assert_neutral(monkeypatch, long, seqlen_k_per_split=1024, **options)
    # Splits by the batch share what is left. A plan of any mask is right, and follows its own.
    masks = (None, torch.ones_like(tensors.key_mask), tensors.key_mask)
    # At most as many splits as one warp merges, as above.
    plans = [plan_of(tensors, num_splits=SPLITS_FOR_ONE_WARP, key_mask=mask, **options) for mask in masks]
    splits = [plan.num_splits_dynamic.max().item() for plan in plans]
    assert splits[0] == splits[1] > splits[2]
    for plan in (plans[0], plans[2]):
        got = attention(tensors, num_splits=SPLITS_FOR_ONE_WARP, scheduler_metadata=plan, **options)
        assert_close_to_reference(*got, tensors, problem_of(tensors, **options))
