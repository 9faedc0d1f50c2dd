"""benchmarks/key_bias.py without a GPU: its masks and biases, its rows and verdicts. The calls run on the reference."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import key_bias, peers, score_mod
from benchmarks.key_side import KEY_TILE, KeySide, KeySideInputs, one_tile_in
from benchmarks.peers import AttentionInputs
from benchmarks.serving import Case
from benchmarks.workloads import ragged
from flash_attn_cute.tuning import SM100_TILES
from tests.cpu.test_serving_benchmarks import SMALL, inputs_of, report_of, small_bench

DECODE = ragged("small decode", [1, 1, 1, 1], [5, 9, 0, 300], heads=4, heads_kv=2)


@pytest.mark.parametrize("side", key_bias.DECODE_SIDES, ids=lambda side: side.name)
def test_what_is_added_to_each_query_head(side):
    rows = side.random(DECODE, "cpu")
    heads = {None: None, "1": 1, "Hk": 2, "H": 4}
    assert [x if x is None else x.shape[1] for x in (rows.bias, rows.mask)] == [heads[side.bias], heads[side.mask]]
    added = rows.added(DECODE)
    assert (added is None) == (side is key_bias.NONE)
    for head in range(4) if added is not None else ():
        if rows.bias is not None:
            assert torch.equal(added[:, head], rows.bias[:, head * rows.bias.shape[1] // 4].float())
        if rows.mask is not None:
            assert torch.equal(added[:, head] == 0.0, rows.mask[:, head * rows.mask.shape[1] // 4])


def test_a_mask_of_tiles_keeps_whole_tiles_of_each_sequence():
    workload = ragged("w", [1, 1, 1], [KEY_TILE * 20, 5, KEY_TILE * 3 + 1])
    kept = one_tile_in(10, workload, "cpu").split(workload.lens_k)
    tiles = [kept[0][start : start + KEY_TILE] for start in range(0, KEY_TILE * 20, KEY_TILE)]
    assert [bool(tile.all()) for tile in tiles] == [i % 10 == 0 for i in range(20)]
    assert [bool(tile.any()) for tile in tiles] == [i % 10 == 0 for i in range(20)]
    assert not kept[1].any() and kept[2].nonzero()[:, 0].tolist() == list(range(2 * KEY_TILE, 3 * KEY_TILE))
    assert SM100_TILES[(128, 128)].tile_n == KEY_TILE
    assert {(w.head_dim, w.head_dim_v) for w in (case.workload for case in key_bias.all_presets())} == {(128, 128)}


def test_in_pages_rows_lie_where_their_keys_do():
    contiguous, paged = inputs_of(SMALL, 4)
    rows = KeySide("both", bias="Hk", mask="H").random(SMALL, "cpu")
    given = KeySideInputs.of(paged, rows)
    assert given.key_bias.shape == (*paged.k.shape[:2], 2) and given.key_mask.shape == (*paged.k.shape[:2], 4)
    assert given.key_mask.dtype == torch.bool
    for sequence, length in enumerate(SMALL.lens_k):
        keys = slice(SMALL.cu_k[sequence], SMALL.cu_k[sequence + 1])
        pages = paged.page_table[sequence, : -(-length // 4)].long()
        assert torch.equal(given.key_bias[pages].flatten(0, 1)[:length], rows.bias[keys])
        assert torch.equal(given.key_mask[pages].flatten(0, 1)[:length], rows.mask[keys])
    assert KeySideInputs.of(contiguous, rows).key_bias is rows.bias


def test_for_each_query_the_numbers_are_those_of_its_keys():
    workload = ragged("w", [2, 0, 3], [5, 4, 1], heads=4, heads_kv=2)
    contiguous, _ = inputs_of(workload, 4)
    rows = KeySide("both", bias="Hk", mask="H").random(workload, "cpu")
    given = KeySideInputs.spread(workload, contiguous, rows)
    assert given.attn_bias.shape == (5, 2, 5) and given.attn_mask.shape == (5, 4, 5)
    for query, keys in [(0, slice(0, 5)), (1, slice(0, 5)), (4, slice(9, 10))]:
        length = keys.stop - keys.start
        assert torch.equal(given.attn_bias[query, :, :length], rows.bias[keys].T)
        assert torch.equal(given.attn_mask[query, :, :length], rows.mask[keys].T)
    assert sorted(given.varlen_arguments(workload).keys() & {"attn_bias", "attn_mask", "key_bias", "key_mask"}) == [
        "attn_bias",
        "attn_mask",
    ]


class Stranger(peers.Ours):
    """The reference under another name; with_bias=False leaves the bias out."""

    def __init__(self, with_bias: bool = True):
        self.name, self._with_bias = key_bias.PEER.name, with_bias

    def make(self, workload, inputs):
        return super().make(workload, inputs if self._with_bias else inputs.inputs)


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("workload", [SMALL, DECODE], ids=lambda workload: workload.name)
def test_a_row_holds_every_kind_checked_and_timed(workload, page_size):
    row = key_bias.measure(Case(workload, page_size), small_bench(Stranger()))
    sides = key_bias.sides_of(workload)
    assert sides == (key_bias.PREFILL_SIDES if workload is SMALL else key_bias.DECODE_SIDES)
    for side in sides:
        for variant in key_bias.variants_of(side):
            result = row["results"][variant.name]
            assert "error" in result if variant.graph else result["correct"], variant.name  # no GPU to capture on
        theirs = f"{key_bias.PEER.name} {side.name}"
        assert (theirs in row["results"]) == (page_size is None and side.mask is None and not side.each_query)
        assert key_bias.over_none(row, side) == pytest.approx(1.0)
    table = key_bias.tables(report_of([row]), [key_bias.PEER.name])[0]
    assert [line[1] for line in table.rows] == [side.name for side in sides]
    json.dumps(row)


@pytest.mark.parametrize("page_size", [None, 4])
def test_a_plan_is_told_of_the_mask(monkeypatch, page_size):
    import flash_attn_cute

    made = []
    real = flash_attn_cute.get_scheduler_metadata
    monkeypatch.setattr(flash_attn_cute, "get_scheduler_metadata", lambda *a, **k: made.append(k) or real(*a, **k))
    contiguous, paged = inputs_of(DECODE, 4)
    inputs = contiguous if page_size is None else paged
    for side in (key_bias.MASK_QUERY, key_bias.BIAS_ALL):
        given = KeySideInputs.of(inputs, side.random(DECODE, "cpu"))
        key_bias.variants_of(side)[0].make(DECODE, given)
        assert made[-1].get("key_mask") is given.key_mask
        assert made[-1].get("page_table") is (None if given.key_mask is None or page_size is None else paged.page_table)


def test_who_leaves_the_bias_out_is_found():
    row = key_bias.measure(Case(SMALL), small_bench(Stranger(with_bias=False)))
    right = {
        side.name: row["results"][f"{key_bias.PEER.name} {side.name}"]["correct"]
        for side in key_bias.PREFILL_SIDES
        if key_bias.peers_can(side)
    }
    assert right == {"none": True, **{side.name: False for side in key_bias.BIASES}}
    assert key_bias.gain(row, key_bias.BIAS_ALL) is None


def answered(case: Case, times: dict[str, float]) -> dict:
    """A row of seconds by side, for us and (twice that with a bias) for the peer."""
    results = {name: {"seconds": t, "correct": True, "microseconds": t * 1e6} for name, t in times.items()}
    for side in key_bias.PREFILL_SIDES:
        theirs = times.get(side.name, 1.0) * (1.0 if side is key_bias.NONE else 2.0)
        results[f"{key_bias.PEER.name} {side.name}"] = {"seconds": theirs, "correct": True}
    return case.described() | {"floor_microseconds": 1.0, "results": results}


def answers(**changed: float) -> dict:
    times = {side.name: 1.0 for side in key_bias.DECODE_SIDES} | {key_bias.FEW_TILES.name: 0.1} | changed
    return report_of([answered(case, times) for case in key_bias.all_presets()])


def test_verdicts():
    found = key_bias.must_show(answers())
    assert [target.verdict for target in found] == ["pass"] * 8
    assert [target.figure for target in found] == pytest.approx([1.0] * 6 + [10.0, 2.0])
    slow = {"bias H*=Hk": 1.03, "mask H*=H": 1.04, key_bias.FEW_TILES.name: 0.25}
    found = key_bias.must_show(answers(**slow))
    assert [target.verdict for target in found] == ["pass", "FAIL", *["pass"] * 4, "FAIL", "pass"]
    found = key_bias.must_show(answers(**{"bias H*=1": 1.25}))
    assert [target.verdict for target in found] == ["FAIL", *["pass"] * 4, "FAIL", "pass", "pass"]
    assert found[5].figure == pytest.approx(0.8)
    assert {target.verdict for target in key_bias.must_show(report_of([]))} == {"not measured"}


def test_the_worst_row_decides_and_what_is_missing_is_not_measured():
    report = answers()
    report["rows"][1]["results"]["mask H*=1"]["seconds"] = 1.1  # contiguous
    report["rows"][-1]["results"][f"{key_bias.PEER.name} bias H*=H"]["seconds"] = 1.3
    found = key_bias.must_show(report)
    assert found[2].figure == pytest.approx(1.1) and found[7].figure == pytest.approx(1.3)
    report["rows"][0]["results"]["bias H*=1"]["correct"] = False
    del report["rows"][0]["results"]["bias H*=1"]["seconds"]
    del report["rows"][-1]
    found = key_bias.must_show(report)
    assert [target.verdict for target in found[:3]] == ["not measured", "pass", "FAIL"]
    assert found[7].verdict == "not measured"


def test_the_replayed_call_counts_where_it_is_the_shorter():
    report = answers()
    for row in report["rows"]:
        row["results"]["none graph"] = {"seconds": 0.5, "correct": True}
        row["results"]["bias H*=1 in-call"] = {"seconds": 0.5, "correct": True}
    assert [t.verdict for t in key_bias.must_show(report)[:3]] == ["pass", "FAIL", "FAIL"]


def test_flash_attention_4_is_given_the_bias_as_an_aux_tensor(monkeypatch):
    seen = []
    module = SimpleNamespace(flash_attn_varlen_func=lambda q, k, v, **rest: seen.append(rest) or (q, None))
    monkeypatch.setattr(score_mod, "adding_bias_of_keys", lambda heads: heads)
    monkeypatch.setattr(score_mod.importlib, "import_module", lambda name: module)
    inputs = AttentionInputs.random(SMALL, "cpu")
    for side in filter(key_bias.peers_can, key_bias.PREFILL_SIDES):
        rows = side.random(SMALL, "cpu")
        score_mod.ScoreModFlashAttention4().make(SMALL, KeySideInputs.of(inputs, rows))()
        assert "key_bias" not in seen[-1] and seen[-1]["cu_seqlens_k"] is inputs.cu_seqlens_k
        if rows.bias is not None:
            assert seen[-1]["aux_tensors"] == [rows.bias]
    assert [call.get("score_mod") for call in seen] == [None, 4, 2, 1]


def test_files_and_exit_status(tmp_path, capsys):
    options = key_bias.BENCHMARK.parse(["--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")])
    report = answers()
    assert key_bias.BENCHMARK.finish(report, [key_bias.PEER.name], options) == 0
    assert [t["verdict"] for t in json.loads((tmp_path / "r.json").read_text())["targets"]] == ["pass"] * 8
    assert "| one tile in 10 | 100000.0 | 0.100 |" in (tmp_path / "r.md").read_text()
    report["rows"][0]["results"]["bias H*=1 graph"] = {"error": "RuntimeError: x"}
    assert key_bias.BENCHMARK.finish(report, [], options) == 1
    assert "RuntimeError: x" in capsys.readouterr().out
