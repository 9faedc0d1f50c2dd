"""The signature of a call holds all that decides how it is launched, and nothing that does not."""

import pytest
import torch

from flash_attn_cute import get_scheduler_metadata, prepared_calls
from flash_attn_cute.problem import AttentionTensors

OPTIONS = (16, 16, None, True, (None, None), 0.0, 1, None, None, False, "auto", None, False, "auto")


def tensors(rows=24, heads=4, **replaced):
    q = torch.zeros(rows, heads, 64, dtype=torch.bfloat16)
    k = torch.zeros(rows, 2, 64, dtype=torch.bfloat16)
    offsets = torch.tensor([0, rows], dtype=torch.int32)
    return AttentionTensors(q, k, k.clone(), offsets, offsets)._replace(**replaced)


def test_contents_and_addresses_are_not_in_it():
    other = tensors()
    other.q.fill_(3.0)
    other.cu_seqlens_q[1] = 7
    assert prepared_calls.signature(tensors(), OPTIONS) == prepared_calls.signature(other, OPTIONS)


@pytest.mark.parametrize(
    "other",
    [
        tensors(rows=25),
        tensors(heads=2),
        tensors(q=torch.zeros(24, 4, 64, dtype=torch.float16)),
        tensors(q=torch.zeros(24, 4, 128, dtype=torch.bfloat16)[..., :64]),
        tensors(q=torch.zeros(24, 4, 64, dtype=torch.bfloat16, device="meta")),
        tensors(v=torch.zeros(24, 2, 72, dtype=torch.bfloat16)[..., :64]),
        tensors(cu_seqlens_k=torch.zeros(3, dtype=torch.int32)),
        tensors(cu_seqlens_k=torch.zeros(2, dtype=torch.int64)),
        tensors(seqused_k=torch.zeros(1, dtype=torch.int32)),
        tensors(seqused_q=torch.zeros(1, dtype=torch.int32)),
        tensors(learnable_sink=torch.zeros(4)),
        tensors(leftpad_k=torch.zeros(1, dtype=torch.int32)),
        tensors(cache_batch_idx=torch.zeros(1, dtype=torch.int32)),
        tensors(key_mask=torch.ones(24, 2, dtype=torch.bool)),
        tensors(key_bias=torch.zeros(24, 2)),
        tensors(query_mask=torch.ones(24, 2, 16, dtype=torch.bool)),
        tensors(query_bias=torch.zeros(24, 2, 16)),
        tensors(out=torch.zeros(24, 4, 64, dtype=torch.bfloat16)),
    ],
)
def test_what_tensors_are_is_in_it(other):
    assert prepared_calls.signature(tensors(), OPTIONS) != prepared_calls.signature(other, OPTIONS)


@pytest.mark.parametrize("index", range(len(OPTIONS)))
def test_every_option_is_in_it(index):
    other = (*OPTIONS[:index], "something else", *OPTIONS[index + 1 :])
    assert prepared_calls.signature(tensors(), OPTIONS) != prepared_calls.signature(tensors(), other)


def test_types_are_in_it():
    """causal=1 is an error, also after a call with causal=True."""
    other = tuple(1 if option is True else option for option in OPTIONS)
    assert other == OPTIONS
    assert prepared_calls.signature(tensors(), OPTIONS) != prepared_calls.signature(tensors(), other)


def test_what_has_no_signature_is_left_to_validation():
    assert prepared_calls.signature(tensors(q=None), OPTIONS) is None
    assert prepared_calls.find(None) is None
    without_hash = prepared_calls.signature(tensors(), (*OPTIONS[:4], [None, None], *OPTIONS[5:]))
    prepared_calls.keep(without_hash, object())
    assert prepared_calls.find(without_hash) is None


def test_plans_of_one_shape_are_of_one_kind():
    """Made apart, they are the same to a call; made for other lengths' bounds, or with other options, they are not."""

    def kind(max_seqlen_k=4096, **options):
        used = torch.tensor([5, 4096], dtype=torch.int32)
        return get_scheduler_metadata(2, 1, max_seqlen_k, 8, 2, 64, seqused_k=used, **options).kind

    assert kind() == kind() and hash(kind()) == hash(kind())
    assert kind() != kind(8192) and kind() != kind(num_splits=1) and kind() != kind(causal=True)
    assert kind() != (kind()._value)


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(prepared_calls, "CAPACITY", 8)
    monkeypatch.setattr(prepared_calls, "_prepared", {})
    for rows in range(1, 30):
        prepared_calls.keep(prepared_calls.signature(tensors(rows), OPTIONS), object())
        assert len(prepared_calls._prepared) <= 8
    assert prepared_calls.find(prepared_calls.signature(tensors(29), OPTIONS)) is not None
    assert prepared_calls.find(prepared_calls.signature(tensors(1), OPTIONS)) is None
