"""The kernel that packs key masks, against active_tiles.py's plain form; test_pack_key_mask_sm90.py runs this."""

import pytest
import torch

from flash_attn_cute.active_tiles import KeyTensors, ListShape, PreparedPacking, active_tiles_of
from flash_attn_cute.launch_combine import architecture_of
from tests.attention_cases import cu_seqlens

CUDA = "cuda"
TILE_N = 32
LENGTHS = [0, 5 * TILE_N, 3, 40 * TILE_N + 1, TILE_N, 700, 0, 1]


def sparse_mask(*shape, seed=0, kept=0.01):
    """Few keys are kept, so that most KV tiles are hidden."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator) < kept


def vector(values):
    return torch.tensor(values, dtype=torch.int32)


def batched(lengths):
    return sparse_mask(len(lengths), max(lengths) + 3, 2), KeyTensors(seqused_k=vector(lengths)), max(lengths) + 3


def paged(lengths, page_size=24):
    counts = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(2)).tolist()
    width = max(counts) + 1
    # Entries of pages without keys are not read.
    table = vector([[order.pop() for _ in range(count)] + [-9] * (width - count) for count in counts])
    keys = KeyTensors(seqused_k=vector(lengths), page_table=table)
    return sparse_mask(sum(counts) + 2, page_size, 2), keys, width * page_size


def cases():
    total = sum(LENGTHS)
    of_packed = KeyTensors(cu_seqlens(LENGTHS))
    yield "packed", sparse_mask(total, 2), of_packed, total
    used = KeyTensors(of_packed.cu_seqlens_k, vector([max(length - 7, 0) for length in LENGTHS]))
    yield "packed, less of it used", sparse_mask(total, 2), used, total
    yield "nothing is kept", torch.zeros(total, 2, dtype=torch.bool), of_packed, total
    yield "all is kept", torch.ones(total, 2, dtype=torch.bool), of_packed, total
    yield "heads first", sparse_mask(2, total).T, of_packed, total
    yield "batched", *batched(LENGTHS)
    yield "all of batched", sparse_mask(3, 300, 2), KeyTensors(), 300
    mask, keys, extent = batched(LENGTHS)
    leftpad = vector([min(9, length) for length in LENGTHS])
    yield "left padding", mask, keys._replace(leftpad_k=leftpad), extent
    rows = vector([7, 0, 3, 3, 1, 2, 5, 4])
    yield "rows of a cache", mask, keys._replace(cache_batch_idx=rows), extent
    yield "paged", *paged(LENGTHS)
    mask, keys, extent = paged(LENGTHS)
    yield "paged, left padding", mask, keys._replace(leftpad_k=leftpad), extent


CASES = {name: case for name, *case in cases()}
# A warp and a cluster differ from a CTA in what they exchange, and not in where keys are.
TEAMS = {"warp": (1, 1, ["packed"]), "CTA": (1, 4, list(CASES)), "cluster": (2, 4, ["packed", "paged"])}


def pack(mask, keys, shape, monkeypatch, team):
    monkeypatch.setattr(ListShape, "team", property(lambda self: team))
    page_size = mask.shape[1] if keys.page_table is not None else None
    keys = KeyTensors(*(None if x is None else x.to(CUDA) for x in keys))
    architecture = architecture_of(torch.device(CUDA))
    return PreparedPacking.of(architecture, shape, keys, page_size).run(mask.to(CUDA).view(torch.uint8), keys)


def assert_packs(mask, keys, shape, monkeypatch, team):
    """The lists are those of the specification."""
    active, expected = pack(mask, keys, shape, monkeypatch, team), active_tiles_of(mask, keys, shape)
    assert active.counts.tolist() == [[len(of_group) for of_group in lists] for lists in expected]
    starts = None if keys.cu_seqlens_k is None else keys.cu_seqlens_k.tolist()
    for b, lists in enumerate(expected):
        for group, wanted in enumerate(lists):
            if starts is None:
                found = active.tiles[group, b]
            else:
                found = active.tiles[group, starts[b] // shape.tile_n + b :]
            assert found[: len(wanted)].tolist() == wanted, (b, group)


def assert_case_packs(name, monkeypatch, team):
    """A list for each of two heads, and one for both."""
    mask, keys, extent = CASES[name]
    batch_size = next((len(x) - (i == 0) for i, x in enumerate(keys) if x is not None), mask.shape[0])
    for groups in (2, 1):
        shape = ListShape(TILE_N, batch_size, groups, 2 // groups, keys.cu_seqlens_k is not None, extent)
        assert_packs(mask, keys, shape, monkeypatch, team)


@pytest.mark.parametrize("team", TEAMS)
def test_lists_equal_the_specification(emulation, monkeypatch, team):
    emulation.reschedule("random", 1)
    *size, names = TEAMS[team]
    for name in names:
        assert_case_packs(name, monkeypatch, tuple(size))
    emulation.reschedule("in-order")


@pytest.mark.parametrize("tile_n", [80, 128])
def test_tiles_of_more_keys_than_lanes(emulation, monkeypatch, tile_n):
    """Few keys are kept, so that a sample of a tile leaves most of them open."""
    for name in ("packed", "paged", "paged, left padding"):
        mask, keys, extent = CASES[name]
        for groups in (2, 1):
            shape = ListShape(tile_n, len(LENGTHS), groups, 2 // groups, name == "packed", extent)
            assert_packs(mask, keys, shape, monkeypatch, (1, 4))


def test_each_key_and_head_alone(emulation, monkeypatch):
    """Of two tiles of a sequence each, the key that none but one head sees: a sample finds few of them."""
    tile_n, heads = 128, 3
    key = torch.arange(2 * tile_n)
    mask = torch.zeros(len(key), 2 * tile_n, heads, dtype=torch.bool)
    mask[key, key, key % heads] = True
    shape = ListShape(tile_n, len(key), 1, heads, False, 2 * tile_n)
    assert_packs(mask, KeyTensors(), shape, monkeypatch, (1, 1))


def test_sequences_of_several_rounds(emulation, monkeypatch):
    """More KV tiles than a team has bits."""
    lengths = [70 * TILE_N, 1, 33 * TILE_N, 200 * TILE_N]
    keys, total = KeyTensors(cu_seqlens(lengths)), sum(lengths)
    mask = sparse_mask(total, 1, kept=0.02)
    for team in ((1, 1), (1, 4)):
        assert_packs(mask, keys, ListShape(TILE_N, len(lengths), 1, 1, True, total), monkeypatch, team)


def test_a_length_beyond_its_room_stays_within_its_list(emulation, monkeypatch):
    keys = KeyTensors(seqused_k=vector([5000, 10]), page_table=torch.zeros(2, 4, dtype=torch.int32))
    shape = ListShape(TILE_N, 2, 1, 1, False, 4 * 24)
    active = pack(torch.ones(1, 24, 1, dtype=torch.bool), keys, shape, monkeypatch, (1, 1))
    assert active.counts.tolist() == [[3], [1]] and active.tiles[0, 0].tolist() == [0, 1, 2]
