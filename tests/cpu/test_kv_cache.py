"""flash_attn_with_kvcache and store_kv_cache on CPU tensors: arguments, aliases, and what they mean."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attn_cute import flash_attn_varlen_func, flash_attn_with_kvcache, kv_cache_reference, store_kv_cache
from tests.kv_cache_cases import CacheCase, build, on_device

F64 = torch.float64
# Seven sequences: long and short caches, an empty one, chunks, decodes, and one without new tokens.
RAGGED = CacheCase([3, 0, 40, 7, 63], [5, 1, 20, 0, 1], [5, 1, 20, 0, 1], head_dim=32, dtype=F64)
BATCHED = RAGGED._replace(new_k=[2] * 5, new_q=[2] * 5, packed_q=False, packed_k=False)


def call(tensors, **options):
    """(out, lse) of the public function on these tensors."""
    given = {name: tensor for name, tensor in tensors._asdict().items() if tensor is not None}
    return flash_attn_with_kvcache(**{**given, **options}, return_softmax_lse=True)


def keys_before(tensors, name, batch):
    """The cached keys or values of a sequence, (cached, Hk, D), read one by one."""
    cache, cached = getattr(tensors, name), int(tensors.cache_seqlens[batch])
    rows = []
    for position in range(cached):
        if tensors.page_table is not None:
            size = cache.shape[1]
            rows.append(cache[tensors.page_table[batch, position // size], position % size])
        else:
            row = batch if tensors.cache_batch_idx is None else int(tensors.cache_batch_idx[batch])
            rows.append(cache[row, position])
    return torch.stack(rows) if rows else cache.new_empty(0, *cache.shape[2:])


def tokens_of(x, cu_seqlens, batch):
    return x[batch] if cu_seqlens is None else x[cu_seqlens[batch] : cu_seqlens[batch + 1]]


def rotated(x, first, step, cos, sin, interleaved):
    """Rotary embedding as complex multiplication: token i at position first + step * i. x: (tokens, heads, D)."""
    dim = 2 * cos.shape[1]
    positions = first + step * torch.arange(x.shape[0])
    turn = torch.complex(cos[positions].double(), sin[positions].double())[:, None]
    head = x[..., :dim].double()
    if interleaved:
        pairs = torch.view_as_complex(head.unflatten(-1, (-1, 2)).contiguous()) * turn
        head = torch.view_as_real(pairs).flatten(-2)
    else:
        pairs = torch.complex(*head.chunk(2, dim=-1)) * turn
        head = torch.cat([pairs.real, pairs.imag], dim=-1)
    return torch.cat([head, x[..., dim:].double()], dim=-1)


@settings(max_examples=40, deadline=None)
@given(
    batched=st.booleans(),
    page_size=st.sampled_from([None, 1, 3, 16]),
    rotary_dim=st.sampled_from([0, 16, 32]),
    interleaved=st.booleans(),
    elsewhere=st.booleans(),
    options=st.sampled_from(
        [{}, {"causal": True}, {"window_size": (4, 1)}, {"causal": True, "window_size": (9, None)}]
    ),
    interleaved_kv=st.booleans(),
)
def test_each_sequence_is_as_if_its_keys_were_joined(
    batched, page_size, rotary_dim, interleaved, elsewhere, options, interleaved_kv
):
    """Against the attention function on the cached keys, read one by one, with rotated new ones behind them."""
    case = (BATCHED if batched else RAGGED)._replace(
        page_size=page_size, rotary_dim=rotary_dim, interleaved_kv=interleaved_kv, head_dim_v=24
    )
    tensors = build(case)
    starts = tensors.cache_seqlens
    if rotary_dim and elsewhere:
        starts = torch.tensor([2, 0, 5, 1, 30], dtype=torch.int32)
        tensors = tensors._replace(rotary_seqlens=starts)
    before = on_device(tensors, "cpu")
    out, lse = call(tensors, rotary_interleaved=interleaved, **options)
    assert not out.isnan().any() and not lse.isnan().any()

    for batch, cached in enumerate(case.cached):
        q = tokens_of(before.q, before.cu_seqlens_q, batch)
        k, v = (tokens_of(x, before.cu_seqlens_k_new, batch) for x in (before.k, before.v))
        if rotary_dim:
            tables, first = (before.rotary_cos, before.rotary_sin, interleaved), int(starts[batch])
            k, q = rotated(k, first, 1, *tables), rotated(q, first, 1 if options else 0, *tables)
        keys, values = (
            torch.cat([keys_before(before, name, batch), new])[None] for name, new in (("k_cache", k), ("v_cache", v))
        )
        expected, expected_lse = flash_attn_varlen_func(q[None], keys, values, return_lse=True, **options)
        own = tokens_of(out, before.cu_seqlens_q, batch)
        own_lse = lse[batch] if batched else tokens_of(lse.mT, before.cu_seqlens_q, batch).mT
        torch.testing.assert_close(own, expected[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(own_lse, expected_lse[0], rtol=0, atol=1e-5)
        # The cache holds exactly that now.
        after = tensors._replace(cache_seqlens=starts.new_tensor([n + len(k) for n in case.cached[:batch]] + [0] * 5))
        after.cache_seqlens[batch] = cached + len(k)
        torch.testing.assert_close(keys_before(after, "k_cache", batch), keys[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(keys_before(after, "v_cache", batch), values[0], rtol=0, atol=0)
    changed = tensors.k_cache.isnan() ^ before.k_cache.isnan()
    assert int(changed[..., 0, 0].sum()) == sum(case.new_k), "a place was written that belongs to no new key"


def test_without_new_keys_the_cache_is_read_as_it_is():
    tensors = build(RAGGED)._replace(k=None, v=None, cu_seqlens_k_new=None)
    before = tensors.k_cache.clone()
    out, lse = call(tensors, causal=True)
    expected = flash_attn_varlen_func(
        *tensors[:3],
        tensors.cu_seqlens_q,
        seqused_k=tensors.cache_seqlens,
        page_table=tensors.page_table,
        causal=True,
        return_lse=True,
    )
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    torch.testing.assert_close(tensors.k_cache, before, rtol=0, atol=0, equal_nan=True)


def test_one_length_for_all_and_no_length():
    case = BATCHED._replace(cached=[9] * 5, page_size=None)
    by_tensor, _ = call(build(case), causal=True)
    by_int, _ = call(build(case)._replace(cache_seqlens=9), causal=True)
    assert torch.equal(by_tensor, by_int)
    packed = RAGGED._replace(cached=[9] * 5)
    assert torch.equal(call(build(packed))[0], call(build(packed)._replace(cache_seqlens=9))[0])
    # All of the cache.
    q, k, v = torch.randn(2, 1, 4, 32), torch.randn(2, 7, 2, 32), torch.randn(2, 7, 2, 32)
    assert torch.equal(flash_attn_with_kvcache(q, k, v), flash_attn_varlen_func(q, k, v))
    assert torch.equal(flash_attn_with_kvcache(q, k, v, cache_seqlens=5), flash_attn_varlen_func(q, k[:, :5], v[:, :5]))


@pytest.mark.parametrize("page_size", [None, 4])
def test_left_padding_leaves_out_the_first_keys(page_size):
    """New keys go where they go without it, and positions count from the start of the cache."""
    case = RAGGED._replace(cached=[6, 9, 3, 5, 20], page_size=page_size, rotary_dim=16)
    leftpad = torch.tensor([6, 0, 2, 5, 11], dtype=torch.int32)
    tensors = build(case)
    out, lse = call(tensors._replace(cache_leftpad=leftpad), causal=True)
    again = build(case)
    joined = again._replace(cache_leftpad=None)
    call(joined, causal=True)
    q = torch.cat(
        [
            rotated(tokens_of(again.q, again.cu_seqlens_q, b), n, 1, again.rotary_cos, again.rotary_sin, True)
            for b, n in enumerate(case.cached)
        ]
    )
    torch.testing.assert_close(tensors.k_cache, joined.k_cache, rtol=0, atol=0, equal_nan=True)
    after = joined._replace(cache_seqlens=torch.tensor([a + b for a, b in zip(case.cached, case.new_k, strict=True)]))
    for batch in range(5):
        keys, values = (keys_before(after, name, batch)[None, leftpad[batch] :] for name in ("k_cache", "v_cache"))
        own = tokens_of(q, again.cu_seqlens_q, batch)[None]
        expected, expected_lse = flash_attn_varlen_func(own, keys, values, causal=True, return_lse=True)
        torch.testing.assert_close(tokens_of(out, again.cu_seqlens_q, batch), expected[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(tokens_of(lse.mT, again.cu_seqlens_q, batch).mT, expected_lse[0], rtol=0, atol=1e-5)


def test_aliases():
    tensors = build(RAGGED)
    expected, _ = call(build(RAGGED), causal=True)
    renamed = {"page_table": None, "cache_seqlens": None}
    aliases = {"block_table": tensors.page_table, "seqused_k": tensors.cache_seqlens}
    assert torch.equal(call(tensors, causal=True, **renamed, **aliases)[0], expected)
    with pytest.raises(TypeError, match="^block_table: got a value beside page_table; takes one of the two"):
        call(tensors, block_table=tensors.page_table)
    with pytest.raises(TypeError, match="^seqused_k: got a value beside cache_seqlens; takes one of the two"):
        call(tensors, seqused_k=tensors.cache_seqlens)


def test_arguments_by_position_are_those_of_flash_attention_3():
    tensors = build(RAGGED._replace(rotary_dim=16))
    t = build(RAGGED._replace(rotary_dim=16))
    by_name, _ = call(tensors, causal=True, rotary_interleaved=False, softmax_scale=0.2)
    by_place = flash_attn_with_kvcache(
        t.q, t.k_cache, t.v_cache, t.k, t.v, None, t.rotary_cos, t.rotary_sin, t.cache_seqlens, None, None,
        t.page_table, t.cu_seqlens_q, t.cu_seqlens_k_new, 20, None, None, None, None, 0.2, True, (-1, -1), 0, 0.0,
        False, None, 0, None, 0, False,
    )  # fmt: skip
    assert torch.equal(by_name, by_place)


def test_key_side_mask_bias_sink_and_out_reach_attention():
    tensors = build(RAGGED)
    slots = tensors.k_cache.shape[:2]
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(*slots, 1, generator=generator) < 0.7
    extras = dict(
        key_mask=mask,
        key_bias=torch.randn(*slots, 2, generator=generator),
        learnable_sink=torch.randn(4, generator=generator),
        out=torch.empty_like(tensors.q),
        softcap=3.0,
    )
    out, lse = call(tensors, causal=True, **extras)
    assert out is extras["out"]
    lengths = tensors.cache_seqlens + torch.tensor(RAGGED.new_k, dtype=torch.int32)
    expected, expected_lse = flash_attn_varlen_func(
        *tensors[:3],
        tensors.cu_seqlens_q,
        seqused_k=lengths,
        page_table=tensors.page_table,
        causal=True,
        return_lse=True,
        **{**extras, "out": None},
    )
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_empty_slots_of_a_batch():
    """No pages, no used length: nothing is appended, and the rows see no key."""
    tensors = build(BATCHED._replace(cached=[16, 5, 0, 0, 0]))
    tensors.page_table[2:] = -1
    out, lse = call(tensors, causal=True)
    assert not out[2:].any() and bool((lse[2:] == -float("inf")).all())
    assert bool(out[:2].all())


def small(**changes):
    """A batch of two, one page table, everything that may be given."""
    tensors = build(CacheCase([3, 9], [2, 2], [2, 2], packed_q=False, packed_k=False, rotary_dim=16, head_dim=32))
    return tensors._replace(**changes)


def ints(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    "changes, options, kind, message",
    [
        ({"q": 3}, {}, TypeError, "q: got int; takes a torch.Tensor"),
        ({"k_cache": None}, {}, TypeError, "k_cache: got NoneType; takes a torch.Tensor"),
        ({"k": [1]}, {}, TypeError, "k: got list; takes a torch.Tensor or None"),
        ({"k": None}, {}, ValueError, "k: got None; takes the new keys beside those of the other"),
        ({"v": None}, {}, ValueError, "v: got None; takes the new values beside those of the other"),
        (
            {"cache_seqlens": None},
            {},
            ValueError,
            "cache_seqlens: got None with new keys; takes the lengths before them, an int or (B,) int32",
        ),
        ({"cache_seqlens": -1}, {}, TypeError, "cache_seqlens: got -1; takes an int >= 0 or a (B,) int32 tensor"),
        ({"cache_seqlens": 1.0}, {}, TypeError, "cache_seqlens: got 1.0; takes an int >= 0 or a (B,) int32 tensor"),
        ({"cache_seqlens": ints(3)}, {}, ValueError, "cache_seqlens: got batch size 3; takes the batch size of q, 2"),
        ({"cache_leftpad": ints(3)}, {}, ValueError, "cache_leftpad: got batch size 3; takes the batch size of q, 2"),
        (
            {"k": torch.zeros(2, 2, 3, 32, dtype=BF16)},
            {},
            ValueError,
            "k: got shape (2, 2, 3, 32); takes (2, 2, 2, 32)",
        ),
        (
            {"v": torch.zeros(2, 1, 2, 32, dtype=BF16)},
            {},
            ValueError,
            "v: got shape (2, 1, 2, 32); takes (2, 2, 2, 32)",
        ),
        (
            {"k": torch.zeros(4, 2, 32, dtype=BF16)},
            {},
            ValueError,
            "k: got shape (4, 2, 32); takes (2, new, 2, 32)",
        ),
        (
            {"k": torch.zeros(2, 2, 2, 32)},
            {},
            ValueError,
            "k: got dtype torch.float32; takes the dtype of q, " + str(BF16),
        ),
        ({"rotary_sin": None}, {}, ValueError, "rotary_sin: got None; takes the table beside rotary_cos"),
        (
            {"rotary_cos": torch.zeros(20, 4, dtype=BF16), "rotary_sin": torch.zeros(20, 4, dtype=BF16)},
            {},
            ValueError,
            "rotary_cos: got a rotary dimension of 8; takes a multiple of 16 up to the head dimension, 32",
        ),
        (
            {"rotary_cos": torch.zeros(20, 24, dtype=BF16), "rotary_sin": torch.zeros(20, 24, dtype=BF16)},
            {},
            ValueError,
            "rotary_cos: got a rotary dimension of 48; takes a multiple of 16 up to the head dimension, 32",
        ),
        (
            {"rotary_cos": torch.zeros(20, 8, dtype=torch.float16)},
            {},
            ValueError,
            "rotary_cos: got dtype torch.float16; takes the dtype of q, torch.bfloat16, or torch.float32",
        ),
        ({}, {"rotary_interleaved": 1}, TypeError, "rotary_interleaved: got 1; takes True or False"),
        (
            {"rotary_seqlens": ints(3)},
            {},
            ValueError,
            "rotary_seqlens: got torch.int32 of shape (3,); takes torch.int32 of shape (2,)",
        ),
        (
            {"cu_seqlens_k_new": ints(2)},
            {},
            ValueError,
            "cu_seqlens_k_new: got torch.int32 of shape (2,); takes torch.int32 of shape (3,)",
        ),
        (
            {"k": None, "v": None},
            {},
            ValueError,
            "rotary_cos: got a tensor without k and v; takes None, or new keys and values beside it",
        ),
        (
            {"rotary_cos": None, "rotary_sin": None, "rotary_seqlens": ints(2)},
            {},
            ValueError,
            "rotary_seqlens: got a tensor without rotary_cos and rotary_sin; takes None, or tables beside it",
        ),
        (
            {"cache_batch_idx": ints(2)},
            {},
            ValueError,
            "cache_batch_idx: got a tensor together with page_table; takes batched keys, (B_cache, Sk, Hk, D)",
        ),
        ({}, {"causal": 1}, TypeError, "causal: got 1; takes True or False"),
        ({}, {"return_softmax_lse": 1}, TypeError, "return_softmax_lse: got 1; takes True or False"),
        ({}, {"qv": torch.zeros(1)}, NotImplementedError, "qv: flash_attn_with_kvcache does not take it"),
        ({}, {"attention_chunk": 64}, NotImplementedError, "attention_chunk: flash_attn_with_kvcache does not take it"),
        ({}, {"sm_margin": 2}, NotImplementedError, "sm_margin: flash_attn_with_kvcache does not take it"),
        ({}, {"k_descale": ints(1)}, NotImplementedError, "k_descale: flash_attn_with_kvcache does not take it"),
        (
            {},
            {"backend": "fastest"},
            ValueError,
            "backend: got 'fastest'; takes one of auto, cute, triton, cute+triton, emulator, reference",
        ),
        (
            {},
            {"scheduler_metadata": 3},
            TypeError,
            "scheduler_metadata: got int; takes a SchedulerMetadata, None or False",
        ),
    ],
)
def test_wrong_input_is_refused_in_these_words(changes, options, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        flash_attn_with_kvcache(**{**small(**changes)._asdict(), **options})


def test_what_cannot_be_is_an_error_of_the_reference():
    with pytest.raises(ValueError, match="^cache_seqlens: got 47 and 2 new keys; takes a sum of at most"):
        call(small(cache_seqlens=47), causal=True)
    tensors = small()
    tensors.page_table[1, 0] = 99
    with pytest.raises(ValueError, match="^page_table: got .99, 99. for new keys; takes rows from 0 to"):
        call(tensors, causal=True)
    tensors = small()
    tables = {name: getattr(tensors, name)[:6] for name in ("rotary_cos", "rotary_sin")}
    with pytest.raises(ValueError, match="^rotary_cos: got 6 positions; takes at least 11 here"):
        call(tensors._replace(**tables), causal=True)


@pytest.mark.parametrize("interleaved_kv", [False, True])
@pytest.mark.parametrize("given_out", [False, True])
def test_torch_compile_full_graph(interleaved_kv, given_out):
    """What reads the cache behind the call sees what it wrote."""
    case = RAGGED._replace(rotary_dim=16, interleaved_kv=interleaved_kv, dtype=torch.float32)

    def model(t, out):
        result, lse = call(t._replace(q=t.q * 2), causal=True, out=out)
        again = call(t._replace(k=None, v=None, cu_seqlens_k_new=None, rotary_cos=None, rotary_sin=None))[0]
        store_kv_cache(t.k[:3], t.v[:3], t.k_cache, t.v_cache, torch.tensor([1, -1, 0]))
        return result + 1, lse, again, t.k_cache.nan_to_num() + t.v_cache.nan_to_num()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, second = build(case), build(case)
    outs = [torch.empty_like(t.q) if given_out else None for t in (first, second)]
    with torch.no_grad():
        for got, expected in zip(compiled(first, outs[0]), model(second, outs[1]), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=0, equal_nan=True)


def test_gradients_are_refused():
    tensors = small()
    with pytest.raises(NotImplementedError, match="no backward"):
        call(tensors._replace(q=tensors.q.clone().requires_grad_()))
    with torch.no_grad():
        call(tensors._replace(q=tensors.q.clone().requires_grad_()))
    compiled = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="no backward"):
        compiled(tensors.q.clone().requires_grad_(), tensors.k_cache, tensors.v_cache, page_table=tensors.page_table)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
@pytest.mark.parametrize("interleaved_kv", [False, True])
def test_store_equals_a_loop(integers, interleaved_kv):
    case = CacheCase([0], [13], [0], 3, head_dim=16, head_dim_v=8, dtype=F64, interleaved_kv=interleaved_kv)
    tensors = build(case)
    expected_k, expected_v = tensors.k_cache.clone(), tensors.v_cache.clone()
    slots = [4, -1, 0, 20, 7, -5, 11, 2, 3]
    store_kv_cache(*tensors[3:5], *tensors[1:3], torch.tensor(slots, dtype=integers))
    for token, slot in enumerate(slots):
        if slot >= 0:
            expected_k[slot // 3, slot % 3] = tensors.k[token]
            expected_v[slot // 3, slot % 3] = tensors.v[token]
    torch.testing.assert_close(tensors.k_cache, expected_k, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(tensors.v_cache, expected_v, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        ({"k": None}, TypeError, "k: got NoneType; takes a torch.Tensor"),
        (
            {"slot_mapping": torch.zeros(3)},
            ValueError,
            "slot_mapping: got torch.float32 of shape (3,); takes (T,) int32",
        ),
        ({"slot_mapping": ints(5)}, ValueError, "k: got shape (4, 2, 32); takes (tokens, Hk, D), at least the 5"),
        ({"k": torch.zeros(4, 2, 40, dtype=BF16)}, ValueError, "k_cache: got shape (3, 16, 2, 32); takes (pages"),
        (
            {"v": torch.zeros(4, 2, 12, dtype=BF16)},
            ValueError,
            "v: got head dimension 12; takes a multiple of 8 from 8",
        ),
        ({"v": torch.zeros(4, 2, 32)}, ValueError, "v: got dtype torch.float32; takes the dtype of k, torch.bfloat16"),
        (
            {"backend": "fastest"},
            ValueError,
            "backend: got 'fastest'; takes one of auto, cute, triton, cute+triton, emulator, reference",
        ),
        ({"slot_mapping": ints(1) + 48}, ValueError, "slot_mapping: got 48; takes slots below 48"),
        (
            {"v_cache": torch.zeros(2, 16, 2, 32, dtype=BF16)},
            ValueError,
            "v_cache: got shape (2, 16, 2, 32); takes that",
        ),
        ({"backend": "cute"}, NotImplementedError, "backend='cute' on device type cpu: the kernel needs a CUDA device"),
    ],
)
def test_store_refuses_wrong_input_in_these_words(changes, kind, message):
    tensors = build(CacheCase([0], [4], [0], head_dim=32))
    arguments = dict(tensors._asdict(), slot_mapping=ints(4))
    names = ("k", "v", "k_cache", "v_cache", "slot_mapping")
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        store_kv_cache(**{**{name: arguments[name] for name in names}, **changes})


def test_rotation_keeps_the_dtype_and_what_is_not_rotated():
    x = torch.randn(3, 2, 64, dtype=torch.float16)
    angles = torch.randn(9, 8)
    result = kv_cache_reference.rotate(x, torch.tensor([0, 8, 3]), angles.cos(), angles.sin(), interleaved=True)
    assert result.dtype == torch.float16 and torch.equal(result[..., 16:], x[..., 16:])
    torch.testing.assert_close(result.float().norm(dim=-1), x.float().norm(dim=-1), rtol=1e-3, atol=0)
