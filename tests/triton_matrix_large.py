"""The Triton attention kernels on a GPU, on shapes with many tiles: what the interpreter is too slow for."""

import pytest
import torch

from tests.attention_cases import attention, cu_seqlens, in_pages, sequence_alone
from tests.triton_matrix import BF16, DEVICE, FP16, TRITON, check, check_gradients, gradients, same, tensors_of

DIMS = [(32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128), (40, 40)]
HEADS = [(4, 4), (8, 4), (7, 1), (8, 1)]
LENGTHS_Q = [200, 1, 0, 3, 1, 129, 4, 1, 600]
LENGTHS_K = [1030, 129, 70, 0, 2500, 129, 127, 1, 500]


def large(lengths_q=LENGTHS_Q, lengths_k=LENGTHS_K, **build):
    return tensors_of(lengths_q, lengths_k, **({"heads": 8, "kv_heads": 2, "head_dim": 128, "dtype": BF16} | build))


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (300, 100)}, {"causal": True, "softcap": 10.0}], ids=str
)
def test_large_batches(dims, dtype, options):
    check(large(head_dim=dims[0], head_dim_v=dims[1], dtype=dtype), **options)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_large_gradients(dims, heads):
    tensors = large(heads=heads[0], kv_heads=heads[1], head_dim=dims[0], head_dim_v=dims[1])
    check_gradients(tensors, causal=True)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128)], ids=str)
@pytest.mark.parametrize("splits", [{}, {"seqlen_k_per_split": 256}], ids=str)
def test_gradients_of_a_cute_forward(dims, splits):
    """Hopper: the forward is the CuTe kernel's, and its LSE is what the backward reads."""
    tensors = large(head_dim=dims[0], head_dim_v=dims[1])
    check_gradients(tensors, run={"backend": "cute+triton"} | splits, causal=True)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window_size": (200, None)}], ids=str)
def test_large_decode_is_prefill(dims, heads, options):
    """A row of a prefill meets a block masked where a decode meets it whole, and the other way round."""
    length, before = 300, 45
    tensors = large(
        [length], [before + length], heads=heads[0], kv_heads=heads[1], head_dim=dims[0], head_dim_v=dims[1]
    )
    prefill, prefill_lse = attention(tensors, **options, **TRITON)
    for row in range(0, length, 13):
        keys = before + row + 1
        decode = tensors._replace(
            q=tensors.q[row : row + 1],
            k=tensors.k[:keys],
            v=tensors.v[:keys],
            cu_seqlens_q=cu_seqlens([1], DEVICE),
            cu_seqlens_k=cu_seqlens([keys], DEVICE),
        )
        for call in (decode, in_pages(decode, 16), in_pages(decode, 64)):
            out, lse = attention(call, **options, **TRITON)
            same((out[0], lse[:, 0]), (prefill[row], prefill_lse[:, row]))


@pytest.mark.parametrize("page_size", [1, 16, 64, 128, 256])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
def test_pages_of_large_batches(page_size, dims):
    tensors = large(head_dim=dims[0], head_dim_v=dims[1])
    expected = attention(tensors, causal=True, **TRITON)
    same(attention(in_pages(tensors, page_size), causal=True, **TRITON), expected)


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize(
    "options",
    [{"backend": "triton"}, {"backend": "cute"}, {"backend": "cute", "seqlen_k_per_split": 128}],
    ids=str,
)
def test_a_neighbour_of_any_length(queries, options):
    victim = large([queries], [333])
    expected = attention(victim, causal=True, **options)
    for length in range(1, 301):
        neighbour = large([length], [length], seed=length)
        for first in (True, False):
            order = (victim, neighbour) if first else (neighbour, victim)
            both = victim._replace(
                **{name: torch.cat([getattr(t, name) for t in order]) for name in ("q", "k", "v")},
                cu_seqlens_q=cu_seqlens([len(t.q) for t in order], DEVICE),
                cu_seqlens_k=cu_seqlens([len(t.k) for t in order], DEVICE),
            )
            out, lse = attention(both, causal=True, **options)
            rows = slice(0, queries) if first else slice(length, None)
            same((out[rows], lse[:, rows]), expected)


def test_gradients_of_each_sequence_alone():
    whole = large()
    weight = torch.ones(sum(LENGTHS_Q), 8, 128, device=DEVICE)

    def run(tensors, **options):
        return attention(tensors, **TRITON, **options)

    both = gradients(whole, {"causal": True}, run, weight, None)
    for index in range(len(LENGTHS_Q)):
        one = gradients(sequence_alone(whole, index), {"causal": True}, run, weight[: LENGTHS_Q[index]], None)
        bounds = (whole.cu_seqlens_q, whole.cu_seqlens_k, whole.cu_seqlens_k)
        rows = [slice(*b[index : index + 2].tolist()) for b in bounds]
        same([gradient[r] for gradient, r in zip(both, rows, strict=True)], one)


def test_in_a_graph():
    """Captured, and replayed with other lengths in place."""
    tensors = in_pages(large([4, 4, 4], [500, 300, 77]), 16)
    attention(tensors, causal=True, **TRITON)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(tensors, causal=True, **TRITON)
    for lengths in ([500, 300, 77], [12, 0, 60]):
        tensors.seqused_k.copy_(torch.tensor(lengths, device=DEVICE))
        graph.replay()
        same(captured, attention(tensors, causal=True, **TRITON))
