"""Problem.from_arguments: what it takes, what it refuses and in which words, and what it says."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from flash_attn_cute.problem import AttentionTensors, Problem

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INT32 = torch.int32


def packed(**changes):
    """Two sequences: 5 query rows and 7 key rows, 4 heads over 2, D = 16, Dv = 24."""
    tensors = AttentionTensors(
        q=torch.zeros(5, 4, 16, dtype=BF16),
        k=torch.zeros(7, 2, 16, dtype=BF16),
        v=torch.zeros(7, 2, 24, dtype=BF16),
        cu_seqlens_q=torch.tensor([0, 2, 5], dtype=INT32),
        cu_seqlens_k=torch.tensor([0, 3, 7], dtype=INT32),
    )
    return tensors._replace(**changes)


def batched(**changes):
    """Two sequences of 3 queries and 6 keys."""
    tensors = AttentionTensors(
        q=torch.zeros(2, 3, 4, 16, dtype=BF16),
        k=torch.zeros(2, 6, 2, 16, dtype=BF16),
        v=torch.zeros(2, 6, 2, 24, dtype=BF16),
    )
    return tensors._replace(**changes)


def paged(**changes):
    """Two sequences of 5 query rows in all, 9 pages of 8 keys, 3 pages a sequence."""
    tensors = packed(
        k=torch.zeros(9, 8, 2, 16, dtype=BF16),
        v=torch.zeros(9, 8, 2, 24, dtype=BF16),
        cu_seqlens_k=None,
        seqused_k=torch.tensor([3, 20], dtype=INT32),
        page_table=torch.zeros(2, 3, dtype=INT32),
    )
    return tensors._replace(**changes)


def ints(*shape):
    return torch.zeros(*shape, dtype=INT32)


def meta(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def every_second_column(*shape, dtype=BF16):
    return torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


INPUT_DTYPES = "torch.bfloat16, torch.float16 or torch.float32 (on CPU also torch.float64)"
FLOATS = "torch.bfloat16, torch.float16, torch.float32, torch.float64"


def refused(build, message, kind=ValueError, options=None, **changes):
    """A case: the tensors of `build` with `changes`, and `options`, raise `kind` with exactly this message."""
    return pytest.param(build, changes, options or {}, kind, message, id=message[:60])


REFUSED = [
    # Types of tensors
    refused(packed, "q: got NoneType; takes a torch.Tensor", TypeError, q=None),
    refused(packed, "k: got list; takes a torch.Tensor", TypeError, k=[1.0]),
    refused(packed, "v: got ndarray; takes a torch.Tensor", TypeError, v=np.zeros(3)),
    refused(packed, "cu_seqlens_q: got list; takes a torch.Tensor or None", TypeError, cu_seqlens_q=[0, 5]),
    refused(packed, "out: got int; takes a torch.Tensor or None", TypeError, out=3),
    # q, k and v: dtype, device, strides
    refused(
        packed,
        "q: got dtype torch.int8 on cpu; takes " + INPUT_DTYPES,
        q=torch.zeros(5, 4, 16, dtype=torch.int8),
    ),
    refused(
        packed,
        "q: got dtype torch.float64 on meta; takes " + INPUT_DTYPES,
        q=meta(5, 4, 16, dtype=torch.float64),
    ),
    refused(
        packed, "k: got dtype torch.float16; takes the dtype of q, torch.bfloat16", k=torch.zeros(7, 2, 16, dtype=F16)
    ),
    refused(packed, "v: got dtype torch.float32; takes the dtype of q, torch.bfloat16", v=torch.zeros(7, 2, 24)),
    refused(packed, "k: got device meta; takes the device of q, cpu", k=meta(7, 2, 16)),
    refused(packed, "v: got device meta; takes the device of q, cpu", v=meta(7, 2, 24)),
    refused(
        packed,
        "q: got strides (128, 32, 2); takes a contiguous last dimension (stride 1)",
        q=every_second_column(5, 4, 16),
    ),
    refused(
        packed,
        "k: got strides (64, 32, 2); takes a contiguous last dimension (stride 1)",
        k=every_second_column(7, 2, 16),
    ),
    refused(
        packed,
        "v: got strides (96, 48, 2); takes a contiguous last dimension (stride 1)",
        v=every_second_column(7, 2, 24),
    ),
    # Ranks
    refused(packed, "q: got shape (5, 64); takes (total_q, H, D) with cu_seqlens_q", q=torch.zeros(5, 64, dtype=BF16)),
    refused(packed, "q: got shape (5, 4, 16); takes (B, Sq, H, D) without cu_seqlens_q", cu_seqlens_q=None),
    refused(batched, "q: got shape (2, 3, 4, 16); takes (total_q, H, D) with cu_seqlens_q", cu_seqlens_q=ints(3)),
    refused(batched, "k: got shape (2, 6, 2, 16); takes (total_k, Hk, D) with cu_seqlens_k", cu_seqlens_k=ints(3)),
    refused(
        packed, "k: got shape (7, 2, 16); takes (B, Sk, Hk, D) without cu_seqlens_k and page_table", cu_seqlens_k=None
    ),
    refused(
        paged,
        "k: got shape (72, 2, 16); takes (pages, page_size, Hk, D) with page_table",
        k=torch.zeros(72, 2, 16, dtype=BF16),
    ),
    refused(
        packed, "v: got shape (7, 48); takes (total_k, Hk, Dv) with cu_seqlens_k", v=torch.zeros(7, 48, dtype=BF16)
    ),
    refused(
        paged,
        "page_table: got a tensor together with cu_seqlens_k; "
        "takes no cu_seqlens_k: lengths of paged keys are seqused_k",
        cu_seqlens_k=ints(3),
    ),
    # Heads and head dimensions
    refused(
        packed,
        "q: got 3 heads with 2 heads in k; takes a positive multiple of the heads of k",
        q=torch.zeros(5, 3, 16, dtype=BF16),
    ),
    refused(
        packed,
        "q: got 0 heads with 2 heads in k; takes a positive multiple of the heads of k",
        q=torch.zeros(5, 0, 16, dtype=BF16),
    ),
    refused(
        packed,
        "q: got 4 heads with 0 heads in k; takes a positive multiple of the heads of k",
        k=torch.zeros(7, 0, 16, dtype=BF16),
    ),
    refused(
        packed, "q: got head dimension 20; takes a multiple of 8 from 8 to 256", q=torch.zeros(5, 4, 20, dtype=BF16)
    ),
    refused(
        packed, "q: got head dimension 264; takes a multiple of 8 from 8 to 256", q=torch.zeros(5, 4, 264, dtype=BF16)
    ),
    refused(packed, "q: got head dimension 0; takes a multiple of 8 from 8 to 256", q=torch.zeros(5, 4, 0, dtype=BF16)),
    refused(packed, "k: got head dimension 24; takes the head dimension of q, 16", k=torch.zeros(7, 2, 24, dtype=BF16)),
    refused(
        packed, "v: got head dimension 12; takes a multiple of 8 from 8 to 256", v=torch.zeros(7, 2, 12, dtype=BF16)
    ),
    refused(
        packed, "v: got head dimension 512; takes a multiple of 8 from 8 to 256", v=torch.zeros(7, 2, 512, dtype=BF16)
    ),
    refused(
        packed,
        "v: got shape (6, 2, 24); takes the shape of k but for the last dimension, (7, 2) + (Dv,)",
        v=torch.zeros(6, 2, 24, dtype=BF16),
    ),
    refused(
        packed,
        "v: got shape (7, 4, 24); takes the shape of k but for the last dimension, (7, 2) + (Dv,)",
        v=torch.zeros(7, 4, 24, dtype=BF16),
    ),
    # Lengths
    refused(packed, "cu_seqlens_q: got dtype torch.int64; takes torch.int32", cu_seqlens_q=torch.tensor([0, 5])),
    refused(packed, "cu_seqlens_q: got 2 dimensions; takes 1", cu_seqlens_q=ints(3, 1)),
    refused(packed, "cu_seqlens_q: got 0 entries; takes batch size + 1 entries, at least 1", cu_seqlens_q=ints(0)),
    refused(packed, "cu_seqlens_q: got device meta; takes the device of q, cpu", cu_seqlens_q=meta(3, dtype=INT32)),
    refused(
        packed,
        "cu_seqlens_q: got strides (2,); takes a contiguous last dimension (stride 1)",
        cu_seqlens_q=ints(6)[::2],
    ),
    refused(packed, "cu_seqlens_k: got dtype torch.int64; takes torch.int32", cu_seqlens_k=torch.tensor([0, 3, 7])),
    refused(packed, "cu_seqlens_k: got 2 dimensions; takes 1", cu_seqlens_k=ints(1, 3)),
    refused(
        packed,
        "cu_seqlens_k: got 4 entries; takes batch size + 1 = 3, the batch size being that of q",
        cu_seqlens_k=ints(4),
    ),
    refused(
        packed,
        "cu_seqlens_k: got 0 entries; takes batch size + 1 = 3, the batch size being that of q",
        cu_seqlens_k=ints(0),
    ),
    refused(packed, "seqused_q: got dtype torch.float32; takes torch.int32", seqused_q=torch.zeros(2)),
    refused(packed, "seqused_q: got batch size 3; takes the batch size of q, 2", seqused_q=ints(3)),
    refused(packed, "seqused_q: got 2 dimensions; takes 1", seqused_q=ints(2, 1)),
    refused(packed, "seqused_k: got dtype torch.int64; takes torch.int32", seqused_k=torch.zeros(2).long()),
    refused(packed, "seqused_k: got batch size 1; takes the batch size of q, 2", seqused_k=ints(1)),
    refused(batched, "seqused_k: got device meta; takes the device of q, cpu", seqused_k=meta(2, dtype=INT32)),
    refused(batched, "k: got batch size 2; takes the batch size of q, 3", q=torch.zeros(3, 3, 4, 16, dtype=BF16)),
    # Pages
    refused(paged, "page_table: got dtype torch.int64; takes torch.int32", page_table=torch.zeros(2, 3).long()),
    refused(paged, "page_table: got 1 dimensions; takes 2", page_table=ints(6)),
    refused(paged, "page_table: got batch size 3; takes the batch size of q, 2", page_table=ints(3, 3)),
    refused(
        paged, "page_table: got strides (1, 2); takes a contiguous last dimension (stride 1)", page_table=ints(3, 2).t()
    ),
    refused(
        paged,
        "k: got pages of 0 keys; takes a page size of at least 1",
        k=torch.zeros(9, 0, 2, 16, dtype=BF16),
        v=torch.zeros(9, 0, 2, 24, dtype=BF16),
    ),
    # Sizes
    refused(
        packed,
        "q: got 1073741824 rows x 4 heads = 4294967296; takes at most 2147483647",
        q=meta(2**30, 4, 16),
        k=meta(7, 2, 16),
        v=meta(7, 2, 16),
        cu_seqlens_q=meta(3, dtype=INT32),
        cu_seqlens_k=meta(3, dtype=INT32),
    ),
    refused(
        packed,
        "k: got 2147483648 rows; takes at most 2147483647",
        q=meta(5, 4, 16),
        k=meta(2**31, 2, 16),
        v=meta(2**31, 2, 16),
        cu_seqlens_q=meta(3, dtype=INT32),
        cu_seqlens_k=meta(3, dtype=INT32),
    ),
    refused(
        packed,
        "page_table: got room for 2147483648 keys a sequence; takes at most 2147483647",
        q=meta(5, 4, 16),
        k=meta(9, 2**16, 2, 16),
        v=meta(9, 2**16, 2, 16),
        cu_seqlens_q=meta(3, dtype=INT32),
        cu_seqlens_k=None,
        page_table=meta(2, 2**15, dtype=INT32),
    ),
    # Sink
    refused(
        packed, "learnable_sink: got shape (2,); takes one logit a query head, (4,)", learnable_sink=torch.zeros(2)
    ),
    refused(
        packed, "learnable_sink: got shape (4, 1); takes one logit a query head, (4,)", learnable_sink=torch.zeros(4, 1)
    ),
    refused(packed, "learnable_sink: got dtype torch.int32; takes one of " + FLOATS, learnable_sink=ints(4)),
    refused(packed, "learnable_sink: got device meta; takes the device of q, cpu", learnable_sink=meta(4)),
    refused(
        packed,
        "learnable_sink: got strides (2,); takes a contiguous last dimension (stride 1)",
        learnable_sink=torch.zeros(8)[::2],
    ),
    # Key-side mask and bias
    refused(packed, "key_mask: got dtype torch.float32; takes one of torch.bool", key_mask=torch.zeros(7, 1)),
    refused(packed, "key_mask: got shape (5, 1); takes (7, H*) with H* in [1, 2, 4]", key_mask=torch.ones(5, 1).bool()),
    refused(packed, "key_mask: got shape (7,); takes (7, H*) with H* in [1, 2, 4]", key_mask=torch.ones(7).bool()),
    refused(packed, "key_mask: got shape (7, 3); takes (7, H*) with H* in [1, 2, 4]", key_mask=torch.ones(7, 3).bool()),
    refused(packed, "key_mask: got device meta; takes the device of q, cpu", key_mask=meta(7, 1, dtype=torch.bool)),
    refused(packed, "key_bias: got dtype torch.int32; takes one of " + FLOATS, key_bias=ints(7, 1)),
    refused(packed, "key_bias: got shape (2, 7, 1); takes (7, H*) with H* in [1, 2, 4]", key_bias=torch.zeros(2, 7, 1)),
    refused(packed, "key_bias: got shape (); takes (7, H*) with H* in [1, 2, 4]", key_bias=torch.zeros(())),
    refused(
        batched,
        "key_bias: got shape (3, 6, 1); takes (2, 6, H*) or (1, 6, H*) with H* in [1, 2, 4]",
        key_bias=torch.zeros(3, 6, 1),
    ),
    refused(
        paged, "key_bias: got shape (1, 8, 1); takes (9, 8, H*) with H* in [1, 2, 4]", key_bias=torch.zeros(1, 8, 1)
    ),
    # Mask and bias of each query
    refused(
        packed,
        "attn_mask: got shape (5, 1, 3); takes (total_q, H*, max_seqlen_k) = (5, H*, 4) with H* in [1, 2, 4]",
        options={"max_seqlen_k": 4},
        query_mask=torch.ones(5, 1, 3).bool(),
    ),
    refused(
        packed,
        "attn_bias: got shape (5, 3, 4); takes (total_q, H*, max_seqlen_k) = (5, H*, 4) with H* in [1, 2, 4]",
        options={"max_seqlen_k": 4},
        query_bias=torch.zeros(5, 3, 4),
    ),
    refused(
        packed,
        "attn_bias: got shape (7, 1, 4); takes (total_q, H*, max_seqlen_k) = (5, H*, 4) with H* in [1, 2, 4]",
        options={"max_seqlen_k": 4},
        query_bias=torch.zeros(7, 1, 4),
    ),
    refused(
        packed,
        "attn_mask: got shape (5, 4); takes (total_q, H*, max_seqlen_k) = (5, H*, 4) with H* in [1, 2, 4]",
        options={"max_seqlen_k": 4},
        query_mask=torch.ones(5, 4).bool(),
    ),
    refused(
        packed,
        "attn_mask: got dtype torch.uint8; takes one of torch.bool",
        options={"max_seqlen_k": 4},
        query_mask=torch.ones(5, 1, 4).byte(),
    ),
    refused(
        packed,
        "attn_bias: got dtype torch.int32; takes one of " + FLOATS,
        options={"max_seqlen_k": 4},
        query_bias=ints(5, 1, 4),
    ),
    refused(
        packed,
        "attn_bias: got device meta; takes the device of q, cpu",
        options={"max_seqlen_k": 4},
        query_bias=meta(5, 1, 4),
    ),
    refused(
        packed,
        "max_seqlen_k: got None with an attn_mask or attn_bias of each query; takes the extent of its last dimension, "
        "the length of the longest sequence of keys",
        query_bias=torch.zeros(5, 1, 4),
    ),
    refused(
        batched,
        "q: got batched queries with an attn_mask or attn_bias of each query; takes packed ones, with cu_seqlens_q",
        options={"max_seqlen_k": 6},
        query_bias=torch.zeros(6, 1, 6),
    ),
    # out
    refused(packed, "out: got shape (5, 4, 16); takes (5, 4, 24)", out=torch.zeros(5, 4, 16, dtype=BF16)),
    refused(packed, "out: got dtype torch.float32; takes the dtype of q, torch.bfloat16", out=torch.zeros(5, 4, 24)),
    refused(packed, "out: got device meta; takes the device of q, cpu", out=meta(5, 4, 24)),
    refused(
        packed,
        "out: got strides (192, 48, 2); takes a contiguous last dimension (stride 1)",
        out=every_second_column(5, 4, 24),
    ),
    refused(
        packed,
        "out: got strides (0, 24, 1); takes a tensor whose elements do not share memory",
        out=torch.zeros(1, 4, 24, dtype=BF16).expand(5, 4, 24),
    ),
    # Numbers
    refused(packed, "max_seqlen_q: got -1; takes an int from 0 to 2147483647", options={"max_seqlen_q": -1}),
    refused(packed, "max_seqlen_q: got float; takes an int", TypeError, options={"max_seqlen_q": 3.0}),
    refused(packed, "max_seqlen_k: got bool; takes an int", TypeError, options={"max_seqlen_k": True}),
    refused(packed, "max_seqlen_k: got Tensor; takes an int", TypeError, options={"max_seqlen_k": torch.tensor(3)}),
    refused(packed, "max_seqlen_k: got 2147483648; takes an int from 0 to 2147483647", options={"max_seqlen_k": 2**31}),
    refused(
        batched, "max_seqlen_q: got 2 for sequences of length 3; takes None or at least 3", options={"max_seqlen_q": 2}
    ),
    refused(
        batched, "max_seqlen_k: got 5 for sequences of length 6; takes None or at least 6", options={"max_seqlen_k": 5}
    ),
    refused(
        paged,
        "max_seqlen_k: got 23 for sequences of length 24; takes None or at least 24",
        options={"max_seqlen_k": 23},
        seqused_k=None,
    ),
    refused(packed, "softmax_scale: got nan; takes a finite number", options={"softmax_scale": float("nan")}),
    refused(packed, "softmax_scale: got str; takes a float", TypeError, options={"softmax_scale": "1"}),
    refused(packed, "softmax_scale: got bool; takes a float", TypeError, options={"softmax_scale": True}),
    refused(packed, "softcap: got -1.0; takes a number >= 0, 0 being off", options={"softcap": -1.0}),
    refused(packed, "softcap: got inf; takes a finite number", options={"softcap": float("inf")}),
    refused(packed, "softcap: got nan; takes a finite number", options={"softcap": float("nan")}),
    refused(packed, "softcap: got NoneType; takes a float", TypeError, options={"softcap": None}),
    refused(packed, "num_splits: got -1; takes an int from 0 to 256", options={"num_splits": -1}),
    refused(packed, "num_splits: got 257; takes an int from 0 to 256", options={"num_splits": 257}),
    refused(
        packed,
        "num_splits: got 4 with seqlen_k_per_split; takes 0 or 1: boundaries are absolute",
        options={"num_splits": 4, "seqlen_k_per_split": 64},
    ),
    refused(packed, "num_splits: got bool; takes an int", TypeError, options={"num_splits": True}),
    refused(packed, "num_splits: got NoneType; takes an int", TypeError, options={"num_splits": None}),
    refused(packed, "seqlen_k_per_split: got 0; takes an int from 1 to 2147483647", options={"seqlen_k_per_split": 0}),
    refused(packed, "seqlen_k_per_split: got float; takes an int", TypeError, options={"seqlen_k_per_split": 64.0}),
    # Windows
    refused(
        packed, "window_size: got 3; takes a pair (left, right) of ints or None", TypeError, options={"window_size": 3}
    ),
    refused(
        packed,
        "window_size: got (1, 2, 3); takes a pair (left, right) of ints or None",
        TypeError,
        options={"window_size": (1, 2, 3)},
    ),
    refused(packed, "window_size[0]: got float; takes an int", TypeError, options={"window_size": (1.0, 0)}),
    refused(packed, "window_size[1]: got bool; takes an int", TypeError, options={"window_size": (1, False)}),
    refused(
        packed,
        "window_size[0]: got 2147483648; takes an int from -2147483648 to 2147483647",
        options={"window_size": (2**31, 0)},
    ),
    # What belongs to a key cache
    refused(
        packed, "leftpad_k: got a tensor together with cu_seqlens_k; takes batched or paged keys", leftpad_k=ints(2)
    ),
    refused(batched, "leftpad_k: got batch size 3; takes the batch size of q, 2", leftpad_k=ints(3)),
    refused(batched, "leftpad_k: got dtype torch.int64; takes torch.int32", leftpad_k=ints(2).long()),
    refused(
        packed,
        "cache_batch_idx: got a tensor together with cu_seqlens_k; takes batched keys, (B_cache, Sk, Hk, D)",
        cache_batch_idx=ints(2),
    ),
    refused(
        paged,
        "cache_batch_idx: got a tensor together with page_table; takes batched keys, (B_cache, Sk, Hk, D)",
        cache_batch_idx=ints(2),
    ),
    refused(batched, "cache_batch_idx: got 2 dimensions; takes 1", cache_batch_idx=ints(2, 1)),
    refused(batched, "cache_batch_idx: got batch size 1; takes the batch size of q, 2", cache_batch_idx=ints(1)),
    refused(
        batched,
        "k: got batch size 3; takes the batch size of q, 2",
        k=torch.zeros(3, 6, 2, 16, dtype=BF16),
        v=torch.zeros(3, 6, 2, 24, dtype=BF16),
    ),
    # Choices
    refused(packed, "causal: got 1; takes True or False", TypeError, options={"causal": 1}),
    refused(packed, "causal: got None; takes True or False", TypeError, options={"causal": None}),
    refused(packed, "deterministic: got 'yes'; takes True or False", TypeError, options={"deterministic": "yes"}),
    refused(packed, "return_lse: got 0; takes True or False", TypeError, options={"return_lse": 0}),
    refused(packed, "pack_gqa: got 1; takes True, False or None", TypeError, options={"pack_gqa": 1}),
    refused(
        packed,
        "scheduler: got 'fastest'; takes one of auto, single_tile, static, dynamic, clc",
        options={"scheduler": "fastest"},
    ),
]


@pytest.mark.parametrize("build, changes, options, kind, message", REFUSED)
def test_wrong_input_is_refused_in_these_words(build, changes, options, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        Problem.from_arguments(build(**changes), **options)


def test_a_sink_or_bias_in_fp64_is_for_cpu_tensors():
    on_device = AttentionTensors(*(tensor.to("meta") if tensor is not None else None for tensor in packed()))
    for name, tensor in (("learnable_sink", meta(4, dtype=F64)), ("key_bias", meta(7, 1, dtype=F64))):
        with pytest.raises(ValueError, match=f"^{name}: got dtype torch.float64; takes one of torch.bfloat16, "):
            Problem.from_arguments(on_device._replace(**{name: tensor}))


def test_packed():
    problem = Problem.from_arguments(packed(), max_seqlen_q=3, max_seqlen_k=4, causal=True, return_lse=True)
    assert dataclasses.asdict(problem) == {
        "dtype": BF16,
        "device_type": "cpu",
        "num_heads": 4,
        "num_heads_kv": 2,
        "head_dim": 16,
        "head_dim_v": 24,
        "batch_size": 2,
        "q_packed": True,
        "k_packed": True,
        "total_q": 5,
        "total_k": 7,
        "seqlen_q": 3,
        "seqlen_k": 4,
        "max_seqlen_q": 3,
        "max_seqlen_k": 4,
        "has_seqused_q": False,
        "has_seqused_k": False,
        "has_leftpad_k": False,
        "has_cache_batch_idx": False,
        "page_size": None,
        "max_pages": None,
        "softmax_scale": 0.25,
        "causal": True,
        "window_left": None,
        "window_right": 0,
        "softcap": 0.0,
        "sink_dtype": None,
        "key_mask_heads": None,
        "key_bias_heads": None,
        "key_bias_dtype": None,
        "query_mask_heads": None,
        "query_bias_heads": None,
        "query_bias_dtype": None,
        "num_splits": 1,
        "seqlen_k_per_split": None,
        "pack_gqa": None,
        "deterministic": False,
        "scheduler": "auto",
        "return_lse": True,
    }
    assert problem.qheads_per_kvhead == 2
    assert problem.out_shape == (5, 4, 24)
    assert problem.lse_shape == (4, 5)
    assert (problem.seqlen_q_bound, problem.seqlen_k_bound) == (3, 4)
    assert not problem.is_paged


def test_batched():
    problem = Problem.from_arguments(batched(seqused_k=ints(2)), max_seqlen_k=4)
    assert (problem.q_packed, problem.k_packed, problem.batch_size) == (False, False, 2)
    assert (problem.total_q, problem.total_k, problem.seqlen_q, problem.seqlen_k) == (6, 12, 3, 6)
    assert (problem.has_seqused_q, problem.has_seqused_k) == (False, True)
    assert problem.out_shape == (2, 3, 4, 24)
    assert problem.lse_shape == (2, 4, 3)
    assert (problem.seqlen_q_bound, problem.seqlen_k_bound) == (3, 4)


def test_paged():
    problem = Problem.from_arguments(paged(), max_seqlen_q=3)
    assert problem.is_paged
    assert (problem.page_size, problem.max_pages, problem.total_k, problem.seqlen_k) == (8, 3, 72, 24)
    assert (problem.q_packed, problem.k_packed) == (True, False)


def test_key_caches():
    problem = Problem.from_arguments(batched(leftpad_k=ints(2), q=torch.zeros(2, 3, 4, 16, dtype=BF16)))
    assert problem.has_leftpad_k and not problem.has_cache_batch_idx
    assert Problem.from_arguments(paged(leftpad_k=ints(2))).has_leftpad_k
    for rows in (1, 2, 5):
        k, v = (torch.zeros(rows, 6, 2, d, dtype=BF16) for d in (16, 24))
        problem = Problem.from_arguments(batched(k=k, v=v, cache_batch_idx=ints(2)))
        assert problem.has_cache_batch_idx
        assert (problem.batch_size, problem.seqlen_k, problem.total_k) == (2, 6, 6 * rows)


def test_packed_without_maxima_is_bounded_by_the_rows():
    problem = Problem.from_arguments(packed())
    assert (problem.seqlen_q, problem.seqlen_k) == (None, None)
    assert (problem.seqlen_q_bound, problem.seqlen_k_bound) == (5, 7)


@pytest.mark.parametrize("q_side, k_side", [(packed, batched), (batched, packed), (batched, paged), (packed, paged)])
def test_sides_may_differ(q_side, k_side):
    q, k = q_side(), k_side()
    problem = Problem.from_arguments(
        k._replace(q=q.q, cu_seqlens_q=q.cu_seqlens_q, seqused_k=ints(2), learnable_sink=torch.zeros(4, dtype=F16))
    )
    assert (problem.q_packed, problem.k_packed) == (q_side is packed, k_side is packed)
    assert problem.sink_dtype == F16


@pytest.mark.parametrize(
    "tensors",
    [
        packed(q=torch.zeros(0, 4, 16, dtype=BF16), cu_seqlens_q=ints(1), cu_seqlens_k=ints(1)),
        packed(
            q=torch.zeros(0, 4, 16, dtype=BF16),
            k=torch.zeros(0, 2, 16, dtype=BF16),
            v=torch.zeros(0, 2, 24, dtype=BF16),
        ),
        batched(k=torch.zeros(2, 0, 2, 16, dtype=BF16), v=torch.zeros(2, 0, 2, 24, dtype=BF16)),
        AttentionTensors(*(torch.zeros(0, 3, 2, 16, dtype=BF16) for _ in range(3))),
        paged(page_table=ints(2, 0)),
        paged(k=torch.zeros(0, 8, 2, 16, dtype=BF16), v=torch.zeros(0, 8, 2, 24, dtype=BF16)),
    ],
    ids=["batch 0 packed", "no rows", "no keys", "batch 0", "no pages a sequence", "no pages"],
)
def test_nothing_to_do_is_valid(tensors):
    Problem.from_arguments(tensors, max_seqlen_q=None, causal=True)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_wide_dtypes_are_for_the_reference_on_cpu(dtype):
    tensors = AttentionTensors(*(tensor.to(dtype) for tensor in batched()[:3]))
    assert Problem.from_arguments(tensors).dtype == dtype


@pytest.mark.parametrize(
    "causal, window_size, left, right, is_causal, is_local",
    [
        (False, (None, None), None, None, False, False),
        (False, (-1, -1), None, None, False, False),
        (True, (None, None), None, 0, True, False),
        (True, (-1, -7), None, 0, True, False),
        (False, (None, 0), None, 0, True, False),
        (True, (None, 5), None, 0, True, False),
        (True, (4, 5), 4, 0, True, True),
        (False, (4, 0), 4, 0, True, True),
        (False, (4, None), 4, None, False, True),
        (False, (None, 3), None, 3, False, True),
        (False, [0, 2], 0, 2, False, True),
        (False, (np.int64(3), -1), 3, None, False, True),
    ],
)
def test_windows_are_normalised(causal, window_size, left, right, is_causal, is_local):
    problem = Problem.from_arguments(batched(), causal=causal, window_size=window_size)
    assert (problem.window_left, problem.window_right) == (left, right)
    assert (problem.causal, problem.is_local) == (is_causal, is_local)


def test_numbers_of_other_types_become_plain_ones():
    problem = Problem.from_arguments(
        packed(),
        max_seqlen_q=np.int32(3),
        max_seqlen_k=np.int64(4),
        softmax_scale=np.float32(0.5),
        softcap=2,
        num_splits=np.int64(4),
    )
    values = (
        problem.max_seqlen_q,
        problem.seqlen_q,
        problem.max_seqlen_k,
        problem.softmax_scale,
        problem.softcap,
        problem.num_splits,
    )
    assert values == (3, 3, 4, 0.5, 2.0, 4)
    assert [type(value) for value in values] == [int, int, int, float, float, int]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_key_side_tensors_of_every_head_count_and_layout(heads):
    cases = [(packed, (7,)), (batched, (2, 6)), (batched, (1, 6)), (paged, (9, 8))]
    for build, lead in cases:
        tensors = build(key_mask=torch.ones(*lead, heads).bool(), key_bias=torch.zeros(heads, *lead).movedim(0, -1))
        problem = Problem.from_arguments(tensors)
        assert (problem.key_mask_heads, problem.key_bias_heads, problem.key_bias_dtype) == (heads, heads, F32)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("build", [packed, paged])
def test_query_side_tensors_of_every_head_count(heads, build):
    extent = 24
    tensors = build(
        query_mask=torch.ones(5, heads, extent).bool(),
        query_bias=torch.zeros(heads, 5, extent, dtype=F16).movedim(0, 1),
    )
    problem = Problem.from_arguments(tensors, max_seqlen_k=extent)
    assert (problem.query_mask_heads, problem.query_bias_heads, problem.query_bias_dtype) == (heads, heads, F16)


def test_strided_views_are_taken():
    fused = torch.zeros(7, 8, 16, dtype=BF16)
    tensors = packed(
        q=fused[:5, :4], k=fused[:, 4:6], v=fused[:, 6:], out=torch.zeros(4, 5, 16, dtype=BF16).transpose(0, 1)
    )
    assert Problem.from_arguments(tensors).out_shape == (5, 4, 16)


def test_frozen_hashable_and_equal_by_value():
    one, other = Problem.from_arguments(packed()), Problem.from_arguments(packed())
    assert one == other and hash(one) == hash(other) and one is not other
    assert one != Problem.from_arguments(packed(), softcap=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.causal = True
    assert dataclasses.replace(one, causal=True, window_right=0) == Problem.from_arguments(packed(), causal=True)
