"""The attention functions in a small random-weights model, on the reference."""

import threading

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="an optional dependency: pip install -e '.[transformers]'")

from flash_attn_cute.batch_invariant import (  # noqa: E402
    disable_batch_invariant_mode,
    enable_batch_variant_mode,
)
from flash_attn_cute.batch_invariant.kv_context import (  # noqa: E402
    KVCacheContext,
    clear_kv_cache_context,
    get_kv_cache_context,
    kv_cache_context,
    set_kv_cache_context,
)
from flash_attn_cute.integrations import transformers as integration  # noqa: E402

NAMES = integration.register()
PAGE_SIZE, PAGES = 4, 32


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        attn_implementation="eager",
    )
    return transformers.Qwen3ForCausalLM(config).eval()


@pytest.fixture
def attention_of(model):
    """Selects an attention function by name, for the length of a test."""
    yield model.set_attn_implementation
    model.set_attn_implementation("eager")


def tokens(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(64, (length,), generator=generator) for length in lengths]


def eager_logits(model, texts):
    """Each text alone, by transformers' own attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return [model(text[None], use_cache=False).logits[0] for text in texts]


def positions(*ranges):
    return torch.cat([torch.arange(start, stop) for start, stop in ranges])[None]


def starts(lengths, dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype)


def test_all_functions_are_registered():
    assert set(NAMES) == {"fa-invariant", "fa-variant", "fa-invariant-cute", "fa-variant-cute", "triton-invariant"}
    for name in NAMES:
        assert name in transformers.AttentionInterface().valid_keys()
        assert name in transformers.AttentionMaskInterface().valid_keys()


@pytest.mark.parametrize("name", ["fa-invariant", "fa-variant"])
def test_batched(model, attention_of, name):
    texts = tokens(11, 11)
    expected = torch.stack(eager_logits(model, texts))
    attention_of(name)
    ones = torch.ones(2, 11, dtype=torch.long)
    with torch.no_grad():
        for mask in (None, ones):
            got = model(torch.stack(texts), attention_mask=mask, use_cache=False).logits
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_dynamic_cache(model, attention_of):
    (text,) = tokens(9)
    (expected,) = eager_logits(model, [text])
    attention_of("fa-invariant")
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        got = [model(text[None, :4], past_key_values=cache).logits[0]]
        got += [model(text[None, i : i + 1], past_key_values=cache).logits[0] for i in range(4, 9)]
    torch.testing.assert_close(torch.cat(got), expected, atol=1e-5, rtol=1e-4)


SPELLINGS = [
    ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packed(model, attention_of, spelling, dtype):
    lengths = (7, 1, 12)
    texts = tokens(*lengths)
    expected = torch.cat(eager_logits(model, texts))
    attention_of("fa-invariant")
    cu = starts(lengths, dtype)
    values = dict(zip(spelling, (cu, cu, 12, torch.tensor(12)), strict=True))
    with torch.no_grad():
        got = model(
            torch.cat(texts)[None], position_ids=positions(*((0, n) for n in lengths)), use_cache=False, **values
        ).logits[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_packed_gradients(model, attention_of):
    lengths = (7, 5)
    texts = tokens(*lengths)
    attention_of("eager")
    sum(model(text[None], use_cache=False).logits.logsumexp(-1).sum() for text in texts).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    attention_of("fa-invariant")
    cu = starts(lengths)
    logits = model(
        torch.cat(texts)[None],
        position_ids=positions((0, 7), (0, 5)),
        use_cache=False,
        cu_seq_lens_q=cu,
        cu_seq_lens_k=cu,
    ).logits
    logits.logsumexp(-1).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    assert all(g.abs().max() > 0 for g in expected)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


def test_packed_sequences_without_lengths_are_refused(model, attention_of):
    """Only position_ids say that there are two; attending across them would be wrong, and silent."""
    attention_of("fa-invariant")
    with pytest.raises(ValueError, match="position_ids: got several sequences"):
        model(torch.cat(tokens(7, 5))[None], position_ids=positions((0, 7), (0, 5)), use_cache=False)


def caches(model):
    shape = (model.config.num_hidden_layers, 2, PAGES, PAGE_SIZE, 2, 16)
    return torch.full(shape, float("nan"))


def step(model, cache, table, texts, cached, counts):
    """The next tokens of each text, in one packed call: its logits. Slots of the first token stay unwritten where
    `cached` is -1: nothing is there."""
    slots, ids, ranges, context = [], [], [], []
    for row, text, before, count in zip(table, texts, cached, counts, strict=True):
        places = torch.arange(before, before + count)
        slots.append(row[places // PAGE_SIZE].long() * PAGE_SIZE + places % PAGE_SIZE)
        ids.append(text[before : before + count])
        ranges.append((before, before + count))
        context.append(before + count)
    here = KVCacheContext(
        list(cache[:, 0]),
        list(cache[:, 1]),
        table,
        torch.cat([*slots, torch.tensor([-1])]),  # one token of padding, whose keys nobody keeps
        torch.tensor(context, dtype=torch.int32),
        starts(counts),
    )
    with kv_cache_context(here), torch.no_grad():
        ids, place = (
            torch.cat([*ids, torch.tensor([0])])[None],
            torch.cat([positions(*ranges), torch.zeros(1, 1).long()], 1),
        )
        return model(ids, position_ids=place, use_cache=False).logits[0, :-1]


@pytest.mark.parametrize("name", ["fa-invariant", "fa-variant"])
def test_paged(model, attention_of, name):
    texts = tokens(9, 6)
    expected = eager_logits(model, texts)
    attention_of(name)
    cache = caches(model)
    table = torch.full((2, 6), -1, dtype=torch.int32)
    table[0, :3], table[1, :2] = torch.tensor([17, 3, 30]), torch.tensor([5, 8])
    first = step(model, cache, table, texts, (0, 0), (4, 6))
    torch.testing.assert_close(first, torch.cat([expected[0][:4], expected[1]]), atol=1e-5, rtol=1e-4)
    for place in range(4, 9):
        got = step(model, cache, table[:1], texts[:1], (place,), (1,))
        torch.testing.assert_close(got, expected[0][place : place + 1], atol=1e-5, rtol=1e-4)
    used = torch.tensor([17, 3, 30, 5, 8])
    untouched = torch.ones(PAGES, dtype=torch.bool).index_fill(0, used, False)
    assert cache[:, :, untouched].isnan().all()


def test_the_context_is_of_its_thread():
    context = KVCacheContext([], [], *[torch.zeros(0)] * 4)
    seen = []
    set_kv_cache_context(context)
    thread = threading.Thread(target=lambda: seen.append(get_kv_cache_context()))
    thread.start()
    thread.join()
    assert seen == [None] and get_kv_cache_context() is context
    other = KVCacheContext([], [], *[torch.zeros(0)] * 4)
    with pytest.raises(KeyError), kv_cache_context(other):
        assert get_kv_cache_context() is other
        raise KeyError
    assert get_kv_cache_context() is context
    clear_kv_cache_context()
    assert get_kv_cache_context() is None
    with pytest.raises(TypeError, match="context: got int"):
        set_kv_cache_context(3)
    with pytest.raises(ValueError, match="v_caches: got 1 layers"):
        KVCacheContext([], [torch.zeros(0)], *[torch.zeros(0)] * 4)


def direct(**options):
    """A call of the function itself."""
    module = torch.nn.Module()
    module.layer_idx, module.is_causal = 0, True
    function = transformers.AttentionInterface()["fa-invariant"]
    q, k, v = (torch.randn(2, heads, 5, 16) for heads in (4, 2, 2))
    mask = options.pop("attention_mask", None)
    return function(module, q, k, v, mask, **options)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"attention_mask": torch.ones(2, 5)}, NotImplementedError, "attention_mask of shape"),
        ({"dropout": 0.1}, NotImplementedError, "dropout=0.1"),
        ({"output_attentions": True}, NotImplementedError, "output_attentions"),
        ({"position_bias": torch.ones(1)}, NotImplementedError, "position_bias"),
        ({"cu_seq_lens_q": starts([5])}, TypeError, "cu_seqlens_k: got None"),
        ({"max_length_q": 5}, TypeError, "cu_seqlens_q: got None"),
        ({"cu_seq_lens_q": starts([5]), "cu_seqlens_q": starts([5])}, TypeError, "which are one argument"),
        ({"cu_seq_lens_q": starts([5]), "cu_seq_lens_k": starts([5])}, ValueError, "batch size 2 with packed"),
        ({"sliding_window": 3, "is_causal": False}, NotImplementedError, "sliding_window"),
    ],
)
def test_what_is_not_taken_raises(options, error, message):
    with pytest.raises(error, match=message):
        direct(**options)


def test_options_arrive():
    torch.manual_seed(0)
    plain = direct()[0]
    assert plain.shape == (2, 5, 4, 16)
    for options in (
        {"scaling": 0.5},
        {"sliding_window": 2},
        {"softcap": 0.5},
        {"s_aux": torch.ones(4)},
        {"is_causal": False},
    ):
        torch.manual_seed(0)
        assert not torch.equal(direct(**options)[0], plain), options
    torch.manual_seed(0)
    assert torch.equal(direct(sliding_window=5, use_cache=True, dropout=0.0)[0], plain)


def test_padding_and_static_caches_are_refused(model, attention_of):
    attention_of("fa-invariant")
    ids = torch.stack(tokens(6, 6))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    with pytest.raises(NotImplementedError, match="attention_mask of shape"):
        model(ids, attention_mask=mask, use_cache=False)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(NotImplementedError, match="a cache with unused room"):
        model(ids[:1], past_key_values=cache)


def test_a_function_does_not_run_in_the_opposite_mode(model, attention_of):
    attention_of("fa-invariant")
    enable_batch_variant_mode()
    try:
        with pytest.raises(RuntimeError, match="fa-invariant: batch-variant mode is on"):
            model(tokens(4)[0][None], use_cache=False)
    finally:
        disable_batch_invariant_mode()
