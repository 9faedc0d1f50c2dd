"""What the combine kernel has to do on any architecture; test_combine_sm*.py run it on theirs."""

import pytest
import torch

from flash_attn_cute import flash_attn_combine
from flash_attn_cute.reference import combine_reference

NAN, EMPTY = float("nan"), -float("inf")


def partials(splits: int, lead: tuple[int, ...], heads: int, dim: int, seed: int = 0):
    """Random partial results in which some splits are empty, and all of row 1; what empty ones hold is NaN."""
    generator = torch.Generator().manual_seed(seed)
    lse = 4 * torch.randn(splits, *lead, heads, generator=generator)
    lse[torch.rand(lse.shape, generator=generator) < 0.2] = EMPTY
    lse[..., 1, :] = EMPTY
    out = torch.randn(*lse.shape, dim, generator=generator)
    out[lse == EMPTY] = NAN
    return out.cuda(), lse.cuda()


def assert_close(got, expected, dtype):
    """fp32 sums of up to 256 terms: 2e-6 relative to the largest output, plus the rounding of the output type."""
    (out, lse), (expected_out, expected_lse) = got, expected
    assert out.dtype == dtype and not out.isnan().any()
    scale = expected_out.abs().max().item() if out.numel() else 0.0
    rounding = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    assert ((out.double() - expected_out).abs() <= (2e-6 + rounding) * scale).all()
    assert not out[expected_out == 0.0].any()
    nothing = expected_lse == EMPTY
    assert torch.equal(lse == EMPTY, nothing)
    # log2 and exp2 are the hardware's approximations, of about 1e-7 absolute each.
    assert (lse.double() - expected_lse)[~nothing].abs().max().item() < 4e-6


# 16 splits are merged by a warp, more by a CTA, in waves of 128: 33 are in the first half of one, 100 reach into the
# second, 150 take two waves, and 256 fill them.
CASES = {
    "2-packed-bf16": (2, (9,), 3, 128, torch.bfloat16),
    "16-batched-fp16": (16, (2, 5), 2, 64, torch.float16),
    "17-packed-fp32": (17, (5,), 2, 8, torch.float32),
    "33-batched-fp32": (33, (2, 3), 1, 200, torch.float32),
    "100-packed-bf16": (100, (3,), 1, 96, torch.bfloat16),
    "150-packed-fp16": (150, (3,), 1, 128, torch.float16),
    "256-packed-bf16": (256, (3,), 1, 256, torch.bfloat16),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("schedule", ["in-order", "random", "delayed"])
def test_combine_equals_the_reference(emulation, name, schedule):
    splits, lead, heads, dim, dtype = CASES[name]
    out, lse = partials(splits, lead, heads, dim)
    sink = torch.randn(heads, device="cuda")
    emulation.reschedule(schedule, seed=7)
    for chosen in (None, sink):
        got = flash_attn_combine(out, lse, out_dtype=dtype, learnable_sink=chosen, backend="cute")
        assert_close(got, combine_reference(out, lse, learnable_sink=chosen), dtype)
    emulation.reschedule("in-order")


def test_padding_rows_are_zero(emulation):
    out, lse = partials(4, (12,), 2, 64)
    cu = torch.tensor([2, 2, 7, 9], dtype=torch.int32, device="cuda")
    used = torch.tensor([0, 3, 2], dtype=torch.int32, device="cuda")
    sink = torch.zeros(2, device="cuda")
    for lengths in ((None, None), (cu, None), (cu, used)):
        got = flash_attn_combine(out, lse, None, None, *lengths, learnable_sink=sink, backend="cute")
        assert_close(got, combine_reference(out, lse, *lengths, sink), torch.float32)
    batched = out.view(4, 3, 4, 2, 64), lse.view(4, 3, 4, 2)
    got = flash_attn_combine(*batched, seqused=used, backend="cute")
    assert_close(got, combine_reference(*batched, seqused=used), torch.float32)


def test_bits_are_a_function_of_the_row_alone(emulation):
    """Neither the rows beside it, nor splits that are not there, nor how many warps share a row, change any bit."""
    out, lse = partials(16, (6,), 2, 128)
    expected, expected_lse = flash_attn_combine(out, lse, backend="cute")
    for splits in (17, 40, 256):
        more = torch.full((splits, 6, 2, 128), NAN, device="cuda"), torch.full((splits, 6, 2), EMPTY, device="cuda")
        more[0][:16], more[1][:16] = out, lse
        got, got_lse = flash_attn_combine(*more, backend="cute")
        assert torch.equal(got, expected) and torch.equal(got_lse, expected_lse)
    alone, alone_lse = flash_attn_combine(out[:, 3:4], lse[:, 3:4], backend="cute")
    assert torch.equal(alone, expected[3:4]) and torch.equal(alone_lse, expected_lse[:, 3:4])


def test_nan_is_not_hidden(emulation):
    out, lse = partials(3, (4,), 1, 64)
    lse[:, 0], lse[:, 2] = 1.0, 1.0
    out[:, 0], out[:, 2] = 1.0, 1.0
    lse[1, 0] = NAN
    out[2, 2, 0, 5] = NAN
    result, merged = flash_attn_combine(out, lse, backend="cute")
    assert result[0].isnan().all() and merged[0, 0].isnan()
    assert result[2].isnan().sum() == 1 and not result[1].any()


def test_any_strides_and_views(emulation):
    out, lse = partials(5, (6,), 4, 64)
    strided = torch.full((6, 5, 4, 72), NAN, device="cuda")[..., 3:67].transpose(0, 1)
    strided.copy_(out)
    expected = flash_attn_combine(out, lse, out_dtype=torch.bfloat16, backend="cute")
    buffer = torch.full((4, 6, 66), -7.0, dtype=torch.bfloat16, device="cuda")
    target = buffer.transpose(0, 1)[..., 1:65]
    got, got_lse = flash_attn_combine(strided, lse.transpose(0, 2).clone().transpose(0, 2), target, backend="cute")
    assert got is target and torch.equal(got, expected[0]) and torch.equal(got_lse, expected[1])
    assert (buffer[..., :1] == -7.0).all() and (buffer[..., 65:] == -7.0).all()
    assert flash_attn_combine(out, lse, return_lse=False, backend="cute")[1] is None
    for shape in ((3, 0, 2, 64), (3, 2, 0, 2, 64)):
        empty = flash_attn_combine(torch.empty(shape).cuda(), torch.empty(shape[:-1]).cuda(), backend="cute")
        assert empty[0].shape == shape[1:] and empty[1].numel() == 0
