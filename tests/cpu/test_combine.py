"""`flash_attn_combine` without a GPU: the reference, what is refused, torch.compile, compilation of the kernel."""

import math

import pytest
import torch

from flash_attn_cute import flash_attn_combine
from flash_attn_cute.reference import combine_reference

EMPTY, NAN = -float("inf"), float("nan")


def attention_of(scores, values):
    """(out, lse) of a softmax over scores (rows, keys) of values (keys, Dv), for rows that see at least one key."""
    return torch.softmax(scores, dim=-1) @ values, torch.logsumexp(scores, dim=-1)


def test_merging_parts_gives_the_whole():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 30, dtype=torch.float64, generator=generator) * 5
    values = torch.randn(30, 16, dtype=torch.float64, generator=generator)
    bounds = [(0, 1), (1, 20), (20, 30)]
    parts = [attention_of(scores[:, a:b], values[a:b]) for a, b in bounds]
    out = torch.stack([part[0] for part in parts])[:, :, None]
    lse = torch.stack([part[1] for part in parts])[:, :, None]
    merged, merged_lse = combine_reference(out, lse)
    expected, expected_lse = attention_of(scores, values)
    torch.testing.assert_close(merged[:, 0], expected)
    torch.testing.assert_close(merged_lse[0], expected_lse)


def test_empty_splits_are_neutral_and_all_empty_is_zero():
    out, lse = torch.full((3, 2, 1, 8), NAN), torch.full((3, 2, 1), EMPTY)
    out[1, 0], lse[1, 0] = 2.5, -700.0
    merged, merged_lse = flash_attn_combine(out, lse)
    assert torch.equal(merged[0], torch.full((1, 8), 2.5)) and not merged[1].any()
    assert merged_lse.tolist() == [[-700.0, EMPTY]]
    merged, merged_lse = flash_attn_combine(out, lse, learnable_sink=torch.tensor([-700.0]))
    torch.testing.assert_close(merged[0], torch.full((1, 8), 1.25))
    torch.testing.assert_close(merged_lse, torch.tensor([[-700.0 + math.log(2.0), -700.0]]))


def test_reference_is_differentiable():
    lse = torch.tensor([[[1.0], [EMPTY]], [[2.0], [EMPTY]]], dtype=torch.float64).requires_grad_()
    out = torch.randn(2, 2, 1, 8, dtype=torch.float64).requires_grad_()
    merged, merged_lse = combine_reference(out, lse)
    (merged.sum() + merged_lse[0, 0]).backward()
    assert lse.grad.isfinite().all() and out.grad.isfinite().all()
    torch.testing.assert_close(lse.grad[:, 0, 0].sum(), torch.tensor(1.0, dtype=torch.float64))


def arguments(**changes):
    given = {"out_partial": torch.zeros(3, 4, 2, 16), "lse_partial": torch.zeros(3, 4, 2)}
    return given | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"out_partial": torch.zeros(3, 4, 2, 16, dtype=torch.bfloat16)}, "out_partial: got dtype torch.bfloat16"),
        ({"out_partial": torch.zeros(4, 2, 16)}, "out_partial: got shape"),
        ({"out_partial": torch.zeros(3, 4, 2, 12)}, "out_partial: got head dimension 12"),
        ({"out_partial": torch.zeros(257, 4, 2, 16)}, "out_partial: got 257 splits"),
        ({"lse_partial": torch.zeros(3, 2, 4)}, "lse_partial: got shape"),
        ({"out": torch.zeros(4, 2, 8)}, "out: got shape"),
        ({"out": torch.zeros(1, 2, 16).expand(4, 2, 16)}, "out: got strides"),
        ({"out": torch.zeros(4, 2, 16), "out_dtype": torch.float16}, "out: got dtype"),
        ({"out_dtype": torch.float64}, "out_dtype: got torch.float64"),
        ({"seqused": torch.zeros(2, dtype=torch.int32)}, "seqused: got a tensor without cu_seqlens"),
        ({"cu_seqlens": torch.zeros(2)}, "cu_seqlens: got torch.float32"),
        ({"learnable_sink": torch.zeros(3)}, "learnable_sink: got"),
        ({"backend": "fast"}, "backend: got 'fast'"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        flash_attn_combine(**arguments(**changes))


def test_kernels_refuse_what_they_cannot():
    with pytest.raises(TypeError, match="lse_partial: got NoneType"):
        flash_attn_combine(torch.zeros(3, 4, 2, 16), None)
    with pytest.raises(NotImplementedError, match="CUDA device"):
        flash_attn_combine(**arguments(backend="cute"))
    with pytest.raises(NotImplementedError, match="no backward"):
        flash_attn_combine(**arguments(out_partial=torch.zeros(3, 4, 2, 16, requires_grad=True), backend="emulator"))


@pytest.mark.parametrize("given_out", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
def test_torch_compile_full_graph(given_out, return_lse):
    partial, lse = torch.randn(3, 4, 2, 16), torch.randn(3, 4, 2)

    def model(partial, lse):
        out = torch.zeros(4, 2, 16, dtype=torch.bfloat16) if given_out else None
        return flash_attn_combine(partial, lse, out, torch.bfloat16, return_lse=return_lse)

    got = torch.compile(model, fullgraph=True, backend="aot_eager")(partial, lse)
    expected = model(partial, lse)
    assert torch.equal(got[0], expected[0])
    assert (got[1] is None) if not return_lse else torch.equal(got[1], expected[1])
