"""Caches with guards around what may be touched, and new tokens for them. Importing this needs no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_cute import kv_cache_reference
from flash_attn_cute.kv_cache_arguments import KvCacheTensors, check
from flash_attn_cute.launch_append_kv import PreparedAppend
from tests.attention_cases import NAN, RUBBISH_PAGES, cu_seqlens


class CacheCase(NamedTuple):
    """Lengths and layout of a call."""

    cached: Sequence[int]  # keys of each sequence before it
    new_k: Sequence[int]
    new_q: Sequence[int]
    page_size: int | None = 16  # None: a row of the cache a sequence
    indexed: bool = True  # rows through cache_batch_idx, where there are no pages
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None
    dtype: torch.dtype = torch.bfloat16
    packed_q: bool = True
    packed_k: bool = True
    interleaved_kv: bool = False  # keys and values of a page lie in one tensor
    rotary_dim: int = 0
    rotary_dtype: torch.dtype | None = None  # None: dtype
    view: str = "contiguous"  # of new keys, values and queries: "contiguous", "fused" (one projection) or "odd"


def build(case: CacheCase, device: torch.device | str = "cpu", seed: int = 0) -> KvCacheTensors:
    """Random tensors. What the cache holds beyond the cached keys is NaN; pages are shuffled, two of them nobody's, and
    table entries of pages that will hold no key are rubbish."""
    generator = torch.Generator().manual_seed(seed)
    places_generator = torch.Generator().manual_seed(seed + 1)  # one seed, one set of values, wherever they lie
    head_dim_v = case.head_dim if case.head_dim_v is None else case.head_dim_v

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    batch = len(case.cached)
    lengths = [cached + new for cached, new in zip(case.cached, case.new_k, strict=True)]
    page_table = cache_batch_idx = None
    if case.page_size is None:
        rows, size = batch + 2 * case.indexed, max(lengths) + 3
        own = torch.randperm(rows, generator=places_generator)[:batch] if case.indexed else torch.arange(batch)
        cache_batch_idx = own.to(torch.int32) if case.indexed else None
        places = [(own[b].repeat(n), torch.arange(n)) for b, n in enumerate(case.cached)]
    else:
        size = case.page_size
        page_table, rows = _page_table(lengths, size, places_generator)
        positions = [torch.arange(n) for n in case.cached]
        places = [(page_table[b][p // size], p % size) for b, p in enumerate(positions)]
    k_cache = torch.full((rows, size, case.kv_heads, case.head_dim), NAN, dtype=case.dtype)
    v_cache = torch.full((rows, size, case.kv_heads, head_dim_v), NAN, dtype=case.dtype)
    for row, offset in places:
        k_cache[row.long(), offset] = normal(len(offset), case.kv_heads, case.head_dim)
        v_cache[row.long(), offset] = normal(len(offset), case.kv_heads, head_dim_v)
    if case.interleaved_kv:
        both = torch.cat([k_cache, v_cache], dim=-1)
        k_cache, v_cache = both[..., : case.head_dim], both[..., case.head_dim :]

    def tokens(counts: Sequence[int], packed: bool) -> tuple[int, ...]:
        assert packed or len(set(counts)) == 1, "batched tokens are as many in every sequence"
        return (sum(counts),) if packed else (batch, counts[0])

    q = normal(*tokens(case.new_q, case.packed_q), case.heads, case.head_dim)
    lead = tokens(case.new_k, case.packed_k)
    if case.view == "fused":
        fused = normal(*lead, case.kv_heads * (case.head_dim + head_dim_v))
        k, v = fused.split([case.kv_heads * case.head_dim, case.kv_heads * head_dim_v], dim=-1)
        k, v = k.unflatten(-1, (case.kv_heads, case.head_dim)), v.unflatten(-1, (case.kv_heads, head_dim_v))
    else:
        k, v = normal(*lead, case.kv_heads, case.head_dim), normal(*lead, case.kv_heads, head_dim_v)
    if case.view == "odd":
        q, k, v = (torch.nn.functional.pad(x, (1, 2), value=NAN)[..., 1:-2] for x in (q, k, v))
    cos = sin = None
    if case.rotary_dim:
        angles = 7.0 * torch.rand(max(lengths) + max(case.new_q) + 5, case.rotary_dim // 2, generator=generator)
        cos, sin = (f(angles).to(case.rotary_dtype or case.dtype) for f in (torch.cos, torch.sin))
    tensors = KvCacheTensors(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        k=k,
        v=v,
        rotary_cos=cos,
        rotary_sin=sin,
        cache_seqlens=torch.tensor(case.cached, dtype=torch.int32),
        cache_batch_idx=cache_batch_idx,
        page_table=page_table,
        cu_seqlens_q=cu_seqlens(case.new_q) if case.packed_q else None,
        cu_seqlens_k_new=cu_seqlens(case.new_k) if case.packed_k else None,
    )
    return on_device(tensors, device)


def on_device(tensors: KvCacheTensors, device: torch.device | str) -> KvCacheTensors:
    """Copies on a device with the same strides; keys and values that lie in one tensor still do."""
    k_cache, v_cache = tensors.k_cache, tensors.v_cache
    interleaved = k_cache.untyped_storage().data_ptr() == v_cache.untyped_storage().data_ptr()
    copies = [None if x is None else _strided_copy(x, device) for x in tensors]
    copied = KvCacheTensors(*copies)
    if interleaved:
        both = torch.cat([k_cache, v_cache], dim=-1).to(device)
        dim = k_cache.shape[-1]
        copied = copied._replace(k_cache=both[..., :dim], v_cache=both[..., dim:])
    return copied


def _strided_copy(x: Tensor, device: torch.device | str) -> Tensor:
    storage = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage()).clone().to(device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def _page_table(lengths: Sequence[int], page_size: int, generator: torch.Generator) -> tuple[Tensor, int]:
    counts = [-(-length // page_size) for length in lengths]
    pages = sum(counts) + 2
    order = torch.randperm(pages, generator=generator).tolist()
    width = max(counts, default=0) + 2
    table = []
    for count in counts:
        own = [order.pop() for _ in range(count)]
        table.append(own + [RUBBISH_PAGES[column % 3] for column in range(count, width)])
    return torch.tensor(table, dtype=torch.int32).reshape(len(lengths), width), pages


def assert_same_rows(got: Tensor, expected: Tensor, *, rotated: bool) -> None:
    """Equal, NaN where NaN is expected; what was rotated may differ by the last bit of its dtype.

    The reference rounds each product of the rotation to fp32 and a kernel may fuse them, which moves a sum by some 1e-7
    of its terms (at most about 10 here), and now and then the rounding to 16 bits behind it.
    """
    got = got.cpu()
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert torch.equal(got.isnan(), expected.isnan())
    difference = (got.double() - expected.double()).abs().nan_to_num(0.0)
    last_bit = torch.finfo(expected.dtype).eps
    allowed = last_bit * expected.double().abs().nan_to_num(0.0) + 1e-5 if rotated else 0.0
    assert bool((difference <= allowed).all()), f"off by up to {difference.max():.3e}"


class Appended(NamedTuple):
    tensors: KvCacheTensors
    q: Tensor
    lengths: Tensor


def append(tensors: KvCacheTensors, interleaved: bool = True, causal: bool = True) -> tuple[Appended, Appended]:
    """What the kernel does to CUDA tensors, and the specification to copies of them."""
    expected = on_device(tensors, "cpu")
    problem, rotary = check(tensors, interleaved, causal=causal)
    got = Appended(tensors, *PreparedAppend.of(tensors, rotary, problem.batch_size).run(tensors))
    return got, Appended(expected, *kv_cache_reference.append(expected, rotary))


def assert_same_appended(got: Appended, expected: Appended) -> None:
    """What is copied is equal, NaN included, so nothing else of the cache was written."""
    (tensors, q, lengths), (expected_tensors, expected_q, expected_lengths) = got, expected
    rotates = tensors.rotary_cos is not None
    assert torch.equal(lengths.cpu(), expected_lengths)
    assert_same_rows(tensors.v_cache, expected_tensors.v_cache, rotated=False)
    assert_same_rows(tensors.k_cache, expected_tensors.k_cache, rotated=rotates)
    assert_same_rows(q, expected_q, rotated=rotates)
    assert rotates or q is tensors.q
