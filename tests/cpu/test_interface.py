"""The public functions on a machine without a GPU: which backend runs, what is refused, torch.compile."""

import pytest
import torch

from flash_attn_cute import flash_attn_func, flash_attn_varlen_func, supports
from tests.attention_cases import assert_close_to_reference, build_tensors, problem_of

TENSORS = build_tensors([5, 0, 33], [9, 4, 33], head_dim=16)
CALL = (TENSORS.q, TENSORS.k, TENSORS.v, TENSORS.cu_seqlens_q, TENSORS.cu_seqlens_k)


def test_cpu_tensors_take_the_reference():
    out, lse = flash_attn_varlen_func(*CALL, causal=True, return_lse=True)
    assert_close_to_reference(out, lse, TENSORS, problem_of(TENSORS, causal=True, return_lse=True))


def test_given_output_is_written_and_returned():
    out = torch.full_like(TENSORS.q, float("nan"))
    assert flash_attn_varlen_func(*CALL, causal=True, out=out) is out
    assert torch.equal(out, flash_attn_varlen_func(*CALL, causal=True))


def test_batched_function_equals_each_sequence():
    q, k, v = (torch.randn(2, 7, 2, 16, dtype=torch.bfloat16) for _ in range(3))
    out = flash_attn_func(q, k, v, causal=True)
    assert torch.equal(out[1:], flash_attn_func(q[1:], k[1:], v[1:], causal=True))
    with pytest.raises(TypeError, match="flash_attn_func takes no seqused_k"):
        flash_attn_func(q, k, v, seqused_k=torch.zeros(2, dtype=torch.int32))


def test_reference_backend_has_gradients():
    q, k, v = (t.float().requires_grad_() for t in CALL[:3])
    flash_attn_varlen_func(q, k, v, *CALL[3:], causal=True).sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            {"backend": "fast"},
            ValueError,
            "backend: got 'fast'; takes one of auto, cute, triton, cute.triton, emulator, reference",
        ),
        ({"backend": "triton"}, NotImplementedError, "Triton kernel"),
        ({"backend": "cute+triton"}, NotImplementedError, "device type cpu"),
        ({"backend": "cute"}, NotImplementedError, "device type cpu"),
        ({"scheduler_metadata": object()}, TypeError, "scheduler_metadata: got object; takes a SchedulerMetadata"),
        ({"scheduler_metadata": 0}, TypeError, "scheduler_metadata: got int; takes a SchedulerMetadata"),
        (
            {"scheduler_metadata": torch.zeros(2)},
            TypeError,
            "scheduler_metadata: got Tensor; takes",
        ),
        (
            {"scheduler_metadata": False, "seqlen_k_per_split": 64},
            ValueError,
            "scheduler_metadata: got False with seqlen_k_per_split",
        ),
    ],
)
def test_what_is_not_there_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(*CALL, **options)
    if "scheduler_metadata" in options:
        with pytest.raises(error, match=message):
            supports(*CALL, **options)


@pytest.mark.parametrize(
    "device, options, reason",
    [
        ((9, 0), {}, ""),
        ("cpu", {}, ""),
        ((10, 0), {}, ""),
        ((10, 3), {"scheduler": "clc"}, ""),
        ((12, 0), {"backend": "cute"}, "compute capability 12.0"),
        ((8, 0), {"backend": "cute+triton"}, "compute capability 8.0"),
        ((7, 5), {}, "compute capability 8.0 or newer, not 7.5"),
        ((9, 0), {"backend": "cute+triton"}, ""),
        ((9, 0), {"scheduler": "clc"}, "scheduler='clc'"),
        ((9, 0), {"page_table": torch.zeros(3, 2, dtype=torch.int32)}, ""),
        ((10, 0), {"page_table": torch.zeros(3, 2, dtype=torch.int32)}, ""),
        ((12, 0), {}, ""),
        ((8, 0), {}, ""),
        ((9, 0), {"backend": "triton", "page_table": torch.zeros(3, 2, dtype=torch.int32)}, ""),
        ((8, 0), {"seqlen_k_per_split": 64}, "seqlen_k_per_split"),
        ("cpu", {"backend": "emulator"}, ""),
        ((9, 0), {"backend": "emulator"}, "takes CPU tensors"),
        ("cpu", {"backend": "emulator", "scheduler": "clc"}, "scheduler='clc'"),
    ],
)
def test_supports_says_why_not(device, options, reason):
    call = CALL
    if "page_table" in options:
        call = (CALL[0], *(torch.empty(8, 16, 2, 16, dtype=torch.bfloat16) for _ in range(2)), CALL[3])
    support = supports(*call, device=device, **options)
    assert bool(support) == (reason == "") and reason in support.reason


def test_supports_takes_meta_tensors():
    meta = [None if t is None else t.to("meta") for t in CALL]
    assert supports(*meta, device=(9, 0), causal=True)


@pytest.mark.parametrize("given_out", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
def test_torch_compile_full_graph(given_out, return_lse):
    def model(q, k, v, cu_seqlens_q, cu_seqlens_k, out):
        result = flash_attn_varlen_func(
            q * 2, k, v, cu_seqlens_q, cu_seqlens_k, causal=True, return_lse=return_lse, out=out
        )
        return tuple(t + 1 for t in result) if return_lse else result + 1

    def out():
        return torch.empty_like(TENSORS.q) if given_out else None

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*CALL, out()), model(*CALL, out()), rtol=0, atol=0)


def test_torch_compile_refuses_gradients():
    """Autograd's fallback would return a result whose gradients never arrive."""
    call = [t.clone().requires_grad_() if t.is_floating_point() else t for t in CALL]
    compiled = torch.compile(flash_attn_varlen_func, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="has no backward"):
        compiled(*call, causal=True).sum().backward()
    with torch.no_grad():
        assert torch.equal(compiled(*call, causal=True), flash_attn_varlen_func(*CALL, causal=True))


def test_supports_knows_that_kernels_have_no_backward():
    q = TENSORS.q.clone().requires_grad_()
    assert "no backward" in supports(q, *CALL[1:], device=(9, 0)).reason
    assert supports(q, *CALL[1:], device=(9, 0), backend="cute+triton")
    assert supports(q, *CALL[1:], device=(8, 0))
    pages = (*(torch.empty(8, 16, 2, 16, dtype=torch.bfloat16) for _ in range(2)), CALL[3])
    table = torch.zeros(3, 2, dtype=torch.int32)
    assert "over paged keys" in supports(q, *pages, page_table=table, device=(8, 0)).reason
    with torch.no_grad():
        assert supports(q, *CALL[1:], device=(9, 0))
    with pytest.raises(TypeError, match="supports: got an argument twice"):
        supports(*CALL, cu_seqlens_k=CALL[4])
