"""Batch-invariant mode: what replaces torch's operators, and how the mode comes and goes.

`tests/triton` runs this in Triton's interpreter, where the mode replaces the CPU's operators, `tests/sm90` on a GPU.
"""

import threading

import pytest
import torch
from torch.nn import functional as F

from flash_attn_cute import get_scheduler_metadata
from flash_attn_cute.batch_invariant import (
    disable_batch_invariant_mode,
    enable_batch_invariant_mode,
    enable_batch_variant_mode,
    is_batch_invariant_mode_enabled,
    matmul,
    reductions,
    set_batch_invariant_mode,
)
from flash_attn_cute.split_policy import splits_of
from tests.triton_matrix import BF16, DEVICE, FP16, FP32

DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)


@pytest.fixture(autouse=True)
def leave_no_mode():
    yield
    disable_batch_invariant_mode()
    assert not is_batch_invariant_mode_enabled()


def normal(*shape, dtype=FP32, seed=0):
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def check(got, exact, plain):
    """The error rule of attention: twice a plain computation in the dtype."""
    assert got.shape == exact.shape and got.dtype == plain.dtype
    error, allowed = ((x.double() - exact).abs().max().item() for x in (got, plain))
    assert error <= 2 * allowed + 1e-5


@DTYPES
@pytest.mark.parametrize("shape", [(1, 8, 8), (70, 45, 33), (33, 130, 64), (5, 0, 7)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_products(dtype, shape, transposed):
    rows, inner, columns = shape
    a, b = normal(rows, inner, dtype=dtype), normal(inner, columns, dtype=dtype, seed=1)
    bias = normal(columns, dtype=dtype, seed=2)
    if transposed:
        b = b.t().contiguous().t()
    exact = a.double() @ b.double()
    check(matmul.mm(a, b), exact, a @ b)
    options = {"alpha": 0.5, "beta": -2.0}
    expected = 0.5 * exact - 2.0 * bias.double()
    check(matmul.addmm(bias, a, b, **options), expected, torch.addmm(bias, a, b, **options))
    nan = torch.full_like(bias, float("nan"))
    check(matmul.addmm(nan, a, b, beta=0), exact, a @ b)
    batch = [torch.stack([x, -x, 2 * x]) for x in (a, b)]
    check(matmul.bmm(*batch), torch.bmm(*(x.double() for x in batch)), torch.bmm(*batch))


@DTYPES
def test_a_row_of_a_product_does_not_depend_on_the_others(dtype):
    a, b = normal(100, 70, dtype=dtype), normal(70, 40, dtype=dtype, seed=1)
    whole = matmul.mm(a, b)
    for rows in (1, 2, 31, 33, 64, 99):
        assert torch.equal(matmul.mm(a[:rows], b), whole[:rows])
        assert torch.equal(matmul.mm(a[-rows:], b), whole[-rows:])


@DTYPES
def test_log_softmax(dtype):
    x = normal(3, 70, 5, dtype=dtype) * 3
    for dim in (0, 1, -1):
        check(reductions.log_softmax(x, dim, False), x.double().log_softmax(dim), x.log_softmax(dim))
    whole = reductions.log_softmax(x.transpose(1, 2), -1, False)
    assert torch.equal(reductions.log_softmax(x[1:2].transpose(1, 2), -1, False), whole[1:2])


@DTYPES
@pytest.mark.parametrize("dim", [(-1,), (0,), (0, 2), (), (1, 2)], ids=str)
@pytest.mark.parametrize("keepdim", [False, True])
def test_mean(dtype, dim, keepdim):
    x = normal(3, 70, 5, dtype=dtype)
    check(reductions.mean(x, dim, keepdim), x.double().mean(dim, keepdim), x.mean(dim, keepdim))
    assert reductions.mean(x, dim, dtype=FP32).dtype == FP32


@DTYPES
def test_rms_norm(dtype):
    x, weight = normal(4, 7, 70, dtype=dtype), normal(70, dtype=dtype, seed=1)
    y, rstd = reductions.rms_norm(x, (70,), weight, 1e-6)
    check(y, F.rms_norm(x.double(), (70,), weight.double(), 1e-6), F.rms_norm(x, (70,), weight, 1e-6))
    assert rstd.shape == (4, 7, 1)
    assert torch.equal(reductions.rms_norm(x[2:3, :1], (70,), weight, 1e-6)[0], y[2:3, :1])


@DTYPES
def test_the_mode_replaces_the_operators(dtype):
    """In the mode, torch's functions give the bits of the kernels."""
    a, b, bias = normal(9, 70, dtype=dtype), normal(70, 40, dtype=dtype, seed=1), normal(40, dtype=dtype, seed=2)
    batch = torch.stack([a, -a])
    with set_batch_invariant_mode():
        assert torch.equal(a @ b, matmul.mm(a, b))
        assert torch.equal(torch.mm(a, b, out=torch.empty(9, 40, dtype=dtype, device=DEVICE)), matmul.mm(a, b))
        assert torch.equal(F.linear(a, b.t(), bias), matmul.addmm(bias, a, b))
        assert torch.equal(torch.bmm(batch, torch.stack([b, b])), matmul.bmm(batch, torch.stack([b, b])))
        assert torch.equal(a.log_softmax(-1), reductions.log_softmax(a, -1, False))
        assert torch.equal(a.mean(-1), reductions.mean(a, [-1]))
        if hasattr(torch.ops.aten, "_fused_rms_norm") and DEVICE == "cuda":  # the CPU's rms_norm does not go there
            assert torch.equal(F.rms_norm(a, (70,), None, 1e-6), reductions.rms_norm(a, (70,), None, 1e-6)[0])
        with pytest.raises(NotImplementedError, match="mm: torch.float64 in batch-invariant mode"):
            a.double() @ b.double()
    a.double() @ b.double()


def test_gradients_in_the_mode():
    weight, x = normal(20, 40).requires_grad_(), normal(6, 40, seed=1)
    expected = torch.autograd.grad(F.linear(x, weight).log_softmax(-1).mean(-1).sum(), weight)
    with set_batch_invariant_mode():
        got = torch.autograd.grad(F.linear(x, weight).log_softmax(-1).mean(-1).sum(), weight)
    torch.testing.assert_close(got, expected)


def flags():
    matmul = torch.backends.cuda.matmul
    return (
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


IN_MODE = (False, False, True, False, False)


@pytest.mark.parametrize("warn_only", [False, True])
def test_flags_are_set_and_restored(warn_only):
    torch.use_deterministic_algorithms(warn_only, warn_only=warn_only)
    try:
        before = flags()
        with set_batch_invariant_mode():
            assert flags() == IN_MODE
        assert flags() == before
        enable_batch_invariant_mode()
        enable_batch_invariant_mode()
        assert flags() == IN_MODE
        disable_batch_invariant_mode()
        assert flags() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_nesting():
    with set_batch_invariant_mode():
        with set_batch_invariant_mode(False):
            assert not is_batch_invariant_mode_enabled()
            with set_batch_invariant_mode(True):
                assert is_batch_invariant_mode_enabled()
                disable_batch_invariant_mode()
                assert not is_batch_invariant_mode_enabled()
            assert not is_batch_invariant_mode_enabled()
            enable_batch_invariant_mode()
            assert is_batch_invariant_mode_enabled()
        assert is_batch_invariant_mode_enabled()
    assert not is_batch_invariant_mode_enabled()
    enable_batch_invariant_mode()
    with set_batch_invariant_mode(False):
        assert not is_batch_invariant_mode_enabled()
    assert is_batch_invariant_mode_enabled()


def test_exceptions_restore_everything():
    before, a = flags(), normal(3, 3).double()
    with pytest.raises(KeyError), set_batch_invariant_mode():
        with set_batch_invariant_mode(False):
            raise KeyError
    assert flags() == before and splits_of(0, None, "auto") == (0, None)
    a @ a
    with pytest.raises(ValueError, match="seqlen_k_per_split: got 0"), set_batch_invariant_mode(True, 0):
        pass
    with pytest.raises(TypeError, match="enabled: got int"), set_batch_invariant_mode(1):
        pass
    assert flags() == before and not is_batch_invariant_mode_enabled()


def test_the_mode_is_of_the_process():
    """Another thread sees it; contexts of two threads that overlap, and are left in the order they were entered,
    leave nothing behind."""
    before = flags()
    entered, leave, seen = threading.Event(), threading.Event(), []

    def other():
        seen.append(is_batch_invariant_mode_enabled())
        with set_batch_invariant_mode(False):
            entered.set()
            leave.wait(10)
        seen.append(is_batch_invariant_mode_enabled())

    thread = threading.Thread(target=other)
    with set_batch_invariant_mode():
        thread.start()
        assert entered.wait(10)
        assert not is_batch_invariant_mode_enabled()
    assert not is_batch_invariant_mode_enabled() and flags() == before
    leave.set()
    thread.join()
    assert seen == [True, False] and flags() == before


def test_attention_is_locked_to_its_splits():
    assert splits_of(8, None, "auto") == (8, None)
    with set_batch_invariant_mode():
        assert splits_of(8, None, "auto") == splits_of(0, None, "cute") == (1, None)
        assert splits_of(0, 256, "cute") == (0, 256)
        with set_batch_invariant_mode(True, seqlen_k_per_split=512):
            assert splits_of(8, None, "auto") == (1, 512)
            assert splits_of(1, None, "triton") == (1, None)
        assert splits_of(8, None, "auto") == (1, None)
    assert splits_of(8, None, "auto") == (8, None)


def test_variant_mode_is_the_opposite():
    before = flags()
    enable_batch_invariant_mode()
    enable_batch_variant_mode()
    assert not is_batch_invariant_mode_enabled() and flags() == before
    assert splits_of(1, None, "auto") == (0, None)
    with set_batch_invariant_mode():
        assert splits_of(0, None, "auto") == (1, None)
    assert splits_of(1, None, "auto") == (0, None)
    disable_batch_invariant_mode()
    assert splits_of(1, None, "auto") == (1, None)


def test_plans_are_locked_too():
    """A plan for splits, made in the mode, is the plan for one split."""
    lengths = torch.tensor([9000, 5], dtype=torch.int32, device=DEVICE)

    def plan(**options):
        return get_scheduler_metadata(2, 1, 9000, 8, 2, 64, seqused_k=lengths, causal=True, num_sms=132, **options)

    assert plan(num_splits=0).num_splits_dynamic.max() > 1
    with set_batch_invariant_mode():
        assert plan(num_splits=0).num_splits_dynamic.max() == 1
    with set_batch_invariant_mode(seqlen_k_per_split=1024):
        assert plan(num_splits=0).num_splits_dynamic.max() == 9
