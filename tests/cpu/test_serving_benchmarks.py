"""The serving benchmarks without a GPU: their cases, their pages, their verdicts. The calls run on the reference."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import decode, layers, mixed, peers, serving_peers, varlen_scheduler
from benchmarks.paged import PagedInputs
from benchmarks.rows import best_seconds, ratio
from benchmarks.serving import Bench, Case
from benchmarks.timing import Ceilings
from benchmarks.variants import Variant
from benchmarks.workloads import Workload, ragged
from tests.cpu.fake_stopwatch import FakeStopwatch

CEILINGS = Ceilings(matmul_flops_per_s=8e14, read_bytes_per_s=4e12, read_method="torch sum")
SMALL = ragged("small", [1, 2, 1, 3], [5, 9, 0, 16], heads=4, heads_kv=2)


class TickingStopwatch(FakeStopwatch):
    """Every look at the clock is a microsecond later."""

    def mark(self) -> float:
        self.now += 1e-6
        return self.now


def small_bench(*others: peers.Peer) -> Bench:
    return Bench(TickingStopwatch(), CEILINGS, list(others), iterations=5, device="cpu")


def inputs_of(workload: Workload, page_size: int) -> tuple[peers.AttentionInputs, PagedInputs]:
    contiguous = peers.AttentionInputs.random(workload, device="cpu")
    return contiguous, PagedInputs.scatter(workload, contiguous, page_size)


class TestPagedInputs:
    @pytest.mark.parametrize("page_size", [1, 3, 4, 16, 64])
    def test_the_table_leads_to_every_key_and_to_nothing_else(self, page_size):
        contiguous, paged = inputs_of(SMALL, page_size)
        assert paged.page_size == page_size and paged.k.shape[2:] == contiguous.k.shape[1:]
        seen = []
        for sequence, length in enumerate(SMALL.lens_k):
            pages = -(-length // page_size)
            used, rest = paged.page_table[sequence, :pages].tolist(), paged.page_table[sequence, pages:]
            assert len(rest) >= 1 and (rest == -1).all()
            seen += used
            keys = slice(SMALL.cu_k[sequence], SMALL.cu_k[sequence + 1])
            for packed, cache in ((contiguous.k, paged.k), (contiguous.v, paged.v)):
                rows = cache[used].flatten(0, 1)
                assert torch.equal(rows[:length], packed[keys])
                assert (rows[length:] == 0).all()
        assert len(set(seen)) == len(seen) < len(paged.k)
        unused = sorted(set(range(len(paged.k))) - set(seen))
        assert paged.k[unused].isnan().all() and paged.v[unused].isnan().all()
        assert paged.seqused_k.tolist() == list(SMALL.lens_k) and paged.seqused_k.dtype == torch.int32

    def test_pages_lie_in_random_order_and_the_same_each_time(self):
        workload = ragged("r", [1, 1], [300, 200], heads=2, heads_kv=1)
        first, again = inputs_of(workload, 4)[1], inputs_of(workload, 4)[1]
        assert torch.equal(first.page_table, again.page_table)
        row = first.page_table[0, :75].tolist()
        assert row != sorted(row)

    def test_others_get_a_table_of_valid_entries(self):
        _, paged = inputs_of(SMALL, 4)
        tame = paged.with_valid_entries()
        assert tame.page_table.dtype == torch.int32 and tame.k is paged.k
        assert not tame.k[tame.page_table.long()].isnan().any()
        valid = paged.page_table >= 0
        assert torch.equal(tame.page_table[valid], paged.page_table[valid])


class TestVariants:
    @pytest.mark.parametrize("planning", ["off", "auto", "on", "cached"])
    def test_pages_give_what_packed_keys_give(self, planning):
        contiguous, paged = inputs_of(SMALL, 4)
        variant = Variant("v", planning, num_splits=1 if planning == "off" else 0)
        expected = Variant("v").make(SMALL, contiguous)()
        assert not expected.isnan().any()
        assert torch.equal(variant.make(SMALL, contiguous)(), expected)
        assert torch.equal(variant.make(SMALL, paged)(), expected)

    def test_a_cached_plan_is_made_once_and_the_other_each_time(self, monkeypatch):
        import flash_attn_cute

        made = []
        real = flash_attn_cute.get_scheduler_metadata
        monkeypatch.setattr(flash_attn_cute, "get_scheduler_metadata", lambda *a, **k: made.append(k) or real(*a, **k))
        _, paged = inputs_of(SMALL, 4)
        for planning, expected in (("cached", 1), ("on", 3), ("auto", 0)):
            made.clear()
            call = Variant("v", planning, num_splits=0).make(SMALL, paged)
            for _ in range(3):
                call()
            assert len(made) == expected


class TestLayers:
    @pytest.mark.parametrize("page_size", [None, 4])
    def test_each_layer_reads_keys_of_its_own(self, monkeypatch, page_size):
        monkeypatch.setattr(layers, "captured", lambda call: call)
        contiguous, paged = inputs_of(SMALL, 4)
        inputs = contiguous if page_size is None else paged
        seen = []

        def make(layer):
            seen.append(layer)
            return Variant("v", "cached", num_splits=0).make(SMALL, layer)

        step = layers.in_layers(make, SMALL, inputs)
        assert step.calls == len(seen) == layers.MOST_LAYERS
        assert len({layer.k.data_ptr() for layer in (*seen, inputs)}) == len(seen) + 1
        assert len({layer.v.data_ptr() for layer in (*seen, inputs)}) == len(seen) + 1
        assert torch.equal(step(), Variant("v").make(SMALL, contiguous)())

    @pytest.mark.parametrize(("tolerance", "passes"), [(0.0, False), (2**-6, True)])
    def test_a_layer_that_computes_something_else_is_found(self, monkeypatch, tolerance, passes):
        monkeypatch.setattr(layers, "captured", lambda call: call)
        outputs = iter([torch.ones(2), *[torch.full((2,), 1.01)] * 100])

        def make(layer):
            output = next(outputs)
            return lambda: output

        contiguous, _ = inputs_of(SMALL, 4)
        if passes:
            layers.in_layers(make, SMALL, contiguous, tolerance)
        else:
            with pytest.raises(ValueError, match="differ by 0.01"):
                layers.in_layers(make, SMALL, contiguous, tolerance)

    def test_as_many_layers_as_memory_holds_and_two_at_least(self):
        assert layers.layers_of(decode.MQA) == layers.MOST_LAYERS
        assert layers.layers_of(decode.RAGGED) * decode.RAGGED.min_bytes <= layers.LAYER_BYTES
        assert layers.layers_of(decode.decode("large", [2**20] * 8)) == 2

    def test_the_time_is_that_of_one_call(self):
        def step():
            return None

        step.calls = 4
        assert small_bench().time({"step": step})["step"].seconds == pytest.approx(1e-6 / 4)


class TestBench:
    @pytest.mark.parametrize("page_size", [None, 4])
    def test_a_row_holds_every_candidate_checked_and_timed(self, page_size):
        family = peers.Ours()
        family.name, family.takes_pages = "stranger", True
        variants = (Variant("ours", "cached", num_splits=0), Variant("ours graph", "cached", graph=True))
        row = small_bench(family).measure(Case(SMALL, page_size), variants)
        assert list(row["results"]) == ["stranger", "ours", "ours graph"]
        for name in ("stranger", "ours"):
            result = row["results"][name]
            assert result["correct"] and result["seconds"] == pytest.approx(1e-6) and result["rounds"] == 5
            assert result["terabytes_per_s"] == pytest.approx(SMALL.min_bytes / 1e-6 / 1e12)
        assert "error" in row["results"]["ours graph"]  # there is no GPU to capture on
        assert row["page_size"] == page_size and row["min_bytes"] == SMALL.min_bytes
        floors = SMALL.flops / 8e14 * 1e6, SMALL.min_bytes / 4e12 * 1e6
        assert (row["compute_microseconds"], row["memory_microseconds"]) == pytest.approx(floors)
        assert row["floor_microseconds"] == pytest.approx(max(floors)) and row["bound"] == "memory"
        json.dumps(row)

    def test_who_knows_no_pages_takes_no_part_in_them(self):
        stranger = peers.Ours()
        stranger.name, stranger.takes_pages = "stranger", False
        variants = (Variant("ours"),)
        assert list(small_bench(stranger).prepare(Case(SMALL, 4), variants).results) == ["ours"]
        assert list(small_bench(stranger).prepare(Case(SMALL), variants).results) == ["stranger", "ours"]

    def test_a_wrong_output_is_found_and_its_time_does_not_count(self):
        class Wrong(Variant):
            def make(self, workload, inputs):
                call = super().make(workload, inputs)
                return lambda: call() + 1.0

        row = small_bench().measure(Case(SMALL, 4), (Wrong("wrong"), Variant("ours")))
        assert not row["results"]["wrong"]["correct"] and "microseconds" in row["results"]["wrong"]
        assert best_seconds(row, ("wrong",)) is None and ratio(row, ("wrong",)) is None
        assert best_seconds(row, ("wrong", "ours")) == pytest.approx(1e-6)


def answered(case: Case, seconds: float, **others: float) -> dict:
    """A row in which our planned call took `seconds`."""
    times = {"ours": seconds, **others}
    results = {name: {"seconds": t, "correct": True, "microseconds": t * 1e6} for name, t in times.items()}
    for result in results.values():
        result["floor_ratio"] = result["seconds"] / case.workload.floor_seconds(8e14, 4e12)
    return case.described() | {"floor_microseconds": 1.0, "bound": "memory", "results": results}


def report_of(rows: list[dict], **more) -> dict:
    return {
        "provenance": {"gpu": "G", "date": "2026-01-01", "commit": "abc"},
        "peers": {},
        "ceilings": {"matmul_flops_per_s": 8e14, "read_bytes_per_s": 4e12, "read_method": "torch sum"},
        "rows": rows,
        "failures": [],
        **more,
    }


class TestDecode:
    def at_bandwidth(self, part: float, **more) -> dict:
        rows = [answered(case, case.workload.min_bytes / (part * 4e12)) for case in decode.all_presets()]
        for row in rows:  # reading alone at 0.99 of the bandwidth, the rest is its launch
            row["read_alone_seconds"] = row["read_in_layers_seconds"] = row["min_bytes"] / (0.99 * 4e12)
            row["layers"] = layers.layers_of(decode.MANY)
            in_layers = row["results"]["ours"]["seconds"] / 1.01
            row["results"][decode.OURS_IN_LAYERS] = {"seconds": in_layers, "correct": True, "microseconds": 1.0}
        return report_of(rows, **more)

    def test_cases_are_the_same_each_time_and_named_apart(self):
        cases = decode.all_presets()
        assert cases == decode.all_presets()
        assert len({case.name for case in cases}) == len(cases)
        assert {case for preset in decode.PRESETS.values() for case in preset()} == set(cases)

    def test_cases_are_those_of_the_goals(self):
        for workload in decode.FEW_LONG:
            keys_and_values = workload.total_k * workload.heads_kv * 2 * 128 * 2
            assert 2**29 <= keys_and_values <= 2**30
        assert (decode.RAGGED.batch, min(decode.RAGGED.lens_k) >= 256, decode.RAGGED.max_k <= 16384) == (96, True, True)
        assert sorted(decode.ONE_LONG.lens_k) == [512] * 63 + [131072]
        assert (decode.MQA.heads, decode.MQA.heads_kv) == (64, 1)
        assert {workload.max_q for workload in decode.SPECULATIVE} == {4, 8}
        assert {case.page_size for case in decode.PRESETS["pages"]()} == {1, 16, 64, 256}

    def test_bytes_are_those_in_use_whatever_the_page(self):
        assert Case(decode.RAGGED, 256).described()["min_bytes"] == decode.RAGGED.min_bytes
        query_side = 96 * 32 * 256 * 2
        assert decode.RAGGED.min_bytes == sum(decode.RAGGED.lens_k) * 8 * 256 * 2 + query_side

    def test_verdicts(self):
        host = dict.fromkeys((decode.OURS_VARLEN_PAGED, decode.OURS_KVCACHE), 29.0)
        met = decode.must_show(self.at_bandwidth(0.975, host_microseconds=host))
        assert len(met) == 20
        assert [target.verdict for target in met] == [*["pass"] * 7, "not measured", *["pass"] * 12]
        assert met[0].figure == pytest.approx(0.975) and met[5].figure == pytest.approx(1.0)
        assert met[10].figure == pytest.approx(0.975 / 0.99) and met[15].figure == pytest.approx(0.975 * 1.01)
        verdicts = [target.verdict for target in decode.must_show(self.at_bandwidth(0.89))]
        long_enough = ["FAIL", "FAIL", "FAIL", "pass", "pass"]
        assert verdicts == [*long_enough, "pass", "pass", *["not measured"] * 3, *long_enough, *long_enough]

    def test_a_row_holds_a_read_of_as_many_bytes(self, monkeypatch):
        monkeypatch.setattr(decode, "VARIANTS", (Variant("ours"),))
        row = decode.measure(Case(SMALL, 4), small_bench())
        assert row["read_alone_seconds"] == pytest.approx(1e-6) and list(row["results"]) == ["ours"]
        assert row["read_in_layers_seconds"] is None  # there is no GPU to capture on

    def test_the_worst_case_and_small_pages_decide(self):
        report = self.at_bandwidth(0.98)
        rows = {row["name"]: row for row in report["rows"]}
        rows[Case(decode.FEW_LONG[1], 64).name]["results"]["ours"]["seconds"] *= 1.1
        rows[Case(decode.MANY, 16).name]["results"]["ours"]["seconds"] *= 1.2
        found = decode.must_show(report)
        assert found[0].figure == pytest.approx(0.98 / 1.1) and found[0].verdict == "FAIL"
        assert [target.verdict for target in found[5:7]] == ["pass", "FAIL"]

    def test_the_cost_of_invariance_is_that_of_the_worst_large_batch(self):
        report = self.at_bandwidth(0.98)
        for row in report["rows"]:
            row["results"]["ours invariant"] = {"seconds": row["results"]["ours"]["seconds"] * 1.1, "correct": True}
            row["results"]["ours invariant graph"] = {"seconds": row["results"]["ours"]["seconds"] * 1.05}
        assert decode.must_show(report)[7].figure == pytest.approx(1.05)
        rows = {row["name"]: row for row in report["rows"]}
        del rows[Case(decode.ONE_LONG, 64).name]["results"]["ours invariant graph"]
        rows[Case(decode.FEW_LONG[0], 64).name]["results"]["ours invariant"]["seconds"] *= 9
        target = decode.must_show(report)[7]
        assert target.figure == pytest.approx(1.1) and target.verdict == "pass"

    def test_the_replayed_call_counts_where_it_is_the_shorter(self):
        report = self.at_bandwidth(0.5)
        for row in report["rows"]:
            row["results"]["ours graph"] = {"seconds": row["results"]["ours"]["seconds"] / 1.96, "correct": True}
        assert decode.must_show(report)[0].figure == pytest.approx(0.98)

    def test_what_is_missing_is_not_measured(self):
        report = self.at_bandwidth(0.98)
        report["rows"] = [row for row in report["rows"] if row["name"] != Case(decode.MANY, 64).name]
        verdicts = [target.verdict for target in decode.must_show(report)]
        assert verdicts[1] == verdicts[5] == verdicts[6] == "not measured" and verdicts[0] == "pass"
        assert {target.verdict for target in decode.must_show(report_of([]))} == {"not measured"}

    def test_host_time_leaves_out_who_fails_or_is_wrong(self, monkeypatch):
        monkeypatch.setattr(decode.torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(decode, "host_seconds_per_call", lambda calls, _: dict.fromkeys(calls, 2e-5))
        monkeypatch.setattr(decode, "HOST_TIME", ragged("tiny", [1, 1], [70, 3], heads=2, heads_kv=1))
        found = decode.measure_host_time(small_bench())
        assert {decode.OURS_VARLEN, decode.OURS_VARLEN_PAGED, decode.OURS_KVCACHE} < set(found["host_microseconds"])
        assert not found["notes"]

        def unable(*arguments):
            raise ImportError("no such function")

        monkeypatch.setattr(decode, "with_kvcache", unable)
        found = decode.measure_host_time(small_bench())
        assert set(found["host_microseconds"]) == {decode.OURS_VARLEN, decode.OURS_VARLEN_PAGED}
        assert len(found["notes"]) == 2 and "no such function" in found["notes"][0]

    @pytest.mark.parametrize("tokens", [1, 2])
    def test_the_cache_function_gives_what_the_varlen_function_gives(self, tokens):
        workload = ragged("w", [tokens, tokens], [7, 9], heads=2, heads_kv=1)
        contiguous, paged = inputs_of(workload, 4)
        expected = Variant("v").make(workload, contiguous)().view(2, tokens, 2, 128)
        before = paged.k.clone()
        assert torch.equal(decode.with_kvcache(workload, paged)(), expected)
        appending = decode.with_kvcache(workload, paged, contiguous)
        # Whether it writes: rubbish where the last keys were is gone after the call.
        paged.k[paged.page_table[0, 1].long(), 2] = 7.0
        assert torch.equal(appending(), expected)
        assert torch.equal(paged.k.nan_to_num(), before.nan_to_num())

    def test_files_and_exit_status(self, tmp_path, capsys):
        options = decode.BENCHMARK.parse(
            ["--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md"), "--csv", str(tmp_path / "r.csv")]
        )
        report = self.at_bandwidth(0.98, host_microseconds={decode.OURS_VARLEN_PAGED: 29.0})
        case = Case(decode.MQA, 64)
        row = next(row for row in report["rows"] if row["name"] == case.name)
        row["results"]["flashinfer"] = {"error": "ImportError: x"}
        assert decode.BENCHMARK.finish(report, ["flashinfer"], options) == 0
        written = json.loads((tmp_path / "r.json").read_text())
        assert [target["verdict"] for target in written["targets"]].count("pass") == 18
        text = (tmp_path / "r.md").read_text()
        assert text.startswith("# Decode over a KV cache") and f"{case.name}: flashinfer: ImportError: x" in text
        assert "98.0%" in text
        lines = list(csv.DictReader((tmp_path / "r.csv").open()))
        assert len(lines) == 2 * len(decode.all_presets()) + 1
        assert lines[0]["candidate"] == "ours" and float(lines[0]["microseconds"]) > 0
        row["results"]["ours"]["correct"] = False
        row["results"]["ours"]["max_error"] = 1.0
        assert decode.BENCHMARK.finish(report, ["flashinfer"], options) == 1
        assert "off by 1" in capsys.readouterr().out
        row["results"]["ours"]["correct"] = True
        assert decode.BENCHMARK.finish(report | {"failures": ["a row died"]}, [], options) == 1


class TestMixed:
    def test_cases_are_those_of_the_goals(self):
        for workload in mixed.WORKLOADS:
            chunks = [q for q in workload.lens_q if q > 1]
            assert 1 <= len(chunks) <= 4 and set(chunks) <= {1024, 2048}
            assert 60 <= workload.lens_q.count(1) <= 120
            assert all(k >= 2048 for q, k in zip(workload.lens_q, workload.lens_k, strict=True) if q == 1)
        bounds = {w.flops / 8e14 > w.min_bytes / 4.4e12 for w in mixed.WORKLOADS}
        assert bounds == {True, False}  # some are bound by arithmetic, some by memory
        assert mixed.all_presets() == mixed.all_presets() and len(mixed.all_presets()) == 10

    def test_parts_make_the_whole(self):
        for workload in mixed.WORKLOADS:
            parts = [mixed.alone(workload, part) for part in mixed.ALONE]
            assert sum(part.flops for part in parts) == workload.flops
            assert sum(part.min_bytes for part in parts) == workload.min_bytes
            assert parts[0].max_q == workload.max_q and parts[1].max_q == 1

    @pytest.mark.parametrize("page_size", [None, 4])
    def test_a_row_holds_its_parts(self, page_size):
        row = mixed.measure(Case(SMALL, page_size), small_bench())
        assert [row["results"][variant.name]["correct"] for variant in mixed.VARIANTS] == [True] * 3
        assert row["alone"]["prefill"]["total_q"] == 5 and row["alone"]["decode"]["total_q"] == 2
        assert mixed.seconds_alone(row) == {"prefill": pytest.approx(1e-6), "decode": pytest.approx(1e-6)}
        tables = mixed.tables(report_of([row]), [])
        overlap = dict(zip(tables[-1].columns, tables[-1].rows[0], strict=True))
        assert overlap["alone, sum"] == "2.0" and overlap["sum / ours"] == "2.00"
        json.dumps(row)

    def test_the_worst_case_decides(self):
        def rows(over_floor):
            return [
                answered(case, over_floor * case.workload.floor_seconds(8e14, 4e12)) for case in mixed.all_presets()
            ]

        assert [target.verdict for target in mixed.must_show(report_of(rows(1.29)))] == ["pass"] * 4
        slow = rows(1.0)
        slow[0] = rows(1.31)[0]  # the first case is paged, and of first chunks
        assert [target.verdict for target in mixed.must_show(report_of(slow))] == ["pass", "FAIL", "pass", "pass"]
        assert {target.verdict for target in mixed.must_show(report_of(slow[1:]))} == {"pass", "not measured"}
        slow[0]["results"]["ours"]["correct"] = False
        assert mixed.must_show(report_of(slow))[1].verdict == "not measured"


class TestServingPeers:
    def test_flash_attention_3_reads_pages_through_its_cache_function(self, monkeypatch):
        seen = []
        module = SimpleNamespace(
            flash_attn_varlen_func=lambda q, k, v, **rest: seen.append(rest) or q,
            flash_attn_with_kvcache=lambda q, k, v, **rest: seen.append(rest) or q,
        )
        monkeypatch.setattr(serving_peers.importlib, "import_module", lambda name: module)
        contiguous, paged = inputs_of(SMALL, 4)
        peer = serving_peers.ServingFlashAttention3()
        peer.make(SMALL, contiguous)()
        peer.make(SMALL, paged)()
        assert seen[0]["num_splits"] == seen[1]["num_splits"] == 0
        assert seen[0]["cu_seqlens_k"] is contiguous.cu_seqlens_k and "page_table" not in seen[0]
        assert seen[1]["cache_seqlens"] is paged.seqused_k and seen[1]["page_table"] is paged.page_table

    def test_flash_attention_4_takes_the_table_and_splits_where_it_can(self, monkeypatch):
        seen = []
        module = SimpleNamespace(flash_attn_varlen_func=lambda q, k, v, **rest: seen.append(rest) or (q, None))
        monkeypatch.setattr(peers.importlib, "import_module", lambda name: module)
        _, paged = inputs_of(SMALL, 4)
        for capability in ((9, 0), (10, 3)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
            serving_peers.ServingFlashAttention4().make(SMALL, paged)()
        assert [call["num_splits"] for call in seen] == [1, 0]
        assert seen[0]["seqused_k"] is paged.seqused_k and "cu_seqlens_k" not in seen[0]

    def test_flashinfer_gets_the_pages_one_after_another(self):
        _, paged = inputs_of(SMALL, 4)
        begins, listed, in_last = serving_peers.compressed_table(paged)
        assert begins.tolist() == [0, 2, 5, 5, 9] and begins.dtype == listed.dtype == in_last.dtype == torch.int32
        assert in_last.tolist() == [1, 1, 0, 4]
        for sequence, pages in enumerate([2, 3, 0, 4]):
            mine = listed[begins[sequence] : begins[sequence + 1]]
            assert torch.equal(mine, paged.page_table[sequence, :pages])

    def test_flashinfer_wrappers_by_workload(self, monkeypatch):
        made = []

        def wrapper(name):
            def make(*args, **kwargs):
                return SimpleNamespace(
                    plan=lambda *a, **k: made.append((name, kwargs, k)), run=lambda q, *rest: (q, len(rest))
                )

            return make

        names = ("BatchPrefillWithRaggedKVCache", "BatchPrefillWithPagedKVCache", "BatchDecodeWithPagedKVCache")
        module = SimpleNamespace(**{f"{name}Wrapper": wrapper(name) for name in names})
        monkeypatch.setattr(serving_peers.importlib, "import_module", lambda name: module)
        monkeypatch.setattr(serving_peers, "FLASHINFER_WORKSPACE_BYTES", 16)
        single = replace(SMALL, lens_q=(1, 1, 1, 1), heads=8)
        for workload, paged in ((SMALL, False), (SMALL, True), (single, True)):
            both = inputs_of(workload, 4)
            assert isinstance(serving_peers.FlashInfer().make(workload, both[paged])(), torch.Tensor)
        assert [name for name, *_ in made] == list(names)
        assert made[0][2]["causal"] and made[1][2]["causal"] and "causal" not in made[2][2]
        assert made[2][1] == {"use_tensor_cores": True}

    def test_cudnn_decodes_equal_lengths(self):
        cudnn = peers.CudnnSdpa()
        assert cudnn.supports(decode.MANY) and not cudnn.supports(decode.RAGGED)
        assert not cudnn.supports(decode.SPECULATIVE[0]) and not cudnn.takes_pages


class TestMain:
    def test_no_gpu_and_wrong_arguments_end_with_two(self, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for benchmark in (decode.BENCHMARK, mixed.BENCHMARK):
            assert benchmark.main([]) == 2
            assert "no CUDA device" in capsys.readouterr().err
            assert benchmark.main(["--only", "nothing like it"]) == 2
            assert "no case of preset all has 'nothing like it'" in capsys.readouterr().err
            assert benchmark.main(["--peers", "nobody"]) == 2
            assert "unknown peers nobody" in capsys.readouterr().err

    def test_a_case_that_dies_leaves_the_others(self, monkeypatch, tmp_path):
        """The whole program on the reference: one case of two raises, the other is reported."""
        from benchmarks import serving

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(decode, "VARIANTS", (Variant("ours"),))
        monkeypatch.setattr(serving, "CudaStopwatch", TickingStopwatch)
        monkeypatch.setattr(serving, "measure_ceilings", lambda stopwatch: CEILINGS)
        monkeypatch.setattr(serving, "provenance", lambda commit: {"gpu": "G", "date": "D", "commit": commit})

        def measure(case, bench):
            if case.page_size:
                raise RuntimeError("illegal memory access")
            return decode.measure(case, replace(bench, device="cpu"))

        benchmark = replace(
            decode.BENCHMARK,
            presets={"all": lambda: [Case(SMALL, 4), Case(SMALL)]},
            variants=(Variant("ours"),),
            measure=measure,
            extra=lambda bench: {},
        )
        target = tmp_path / "r.json"
        assert benchmark.main(["--peers", "", "--json", str(target), "--commit", "abc"]) == 1
        written = json.loads(target.read_text())
        assert [row["name"] for row in written["rows"]] == ["small, contiguous"]
        assert written["failures"] == ["small, page 4: RuntimeError: illegal memory access"]
        assert written["provenance"]["commit"] == "abc"


class TestScheduler:
    """varlen_scheduler.py rests on the same rows."""

    def test_verdicts_and_files(self, tmp_path):
        names = [varlen_scheduler.FLASH_ATTN_4, *(variant.name for variant in varlen_scheduler.VARIANTS)]
        times = dict.fromkeys(names, 1e-3) | {varlen_scheduler.FLASH_ATTN_4: 4e-3, "single-tile": 2e-3}
        rows = []
        for workload in varlen_scheduler.patterns():
            row = answered(Case(workload), 1e-3, **times) | {"name": workload.name}
            del row["results"]["ours"]
            rows.append(row)
        long_decode = next(row for row in rows if row["name"] == varlen_scheduler.LONG_DECODE)
        long_decode["results"]["split"]["seconds"] = long_decode["min_bytes"] / 4e12 / 0.9
        planner = {1024: 4.0, 20000: 25.0}
        found = varlen_scheduler.must_show(rows, planner, CEILINGS)
        assert [target.verdict for target in found] == ["pass", "FAIL", "pass", "pass", "pass", "pass"]
        figures = [target.figure for target in found]
        assert figures == pytest.approx([4.0, 25.0, 2.0, 4.0, 0.9, 1.0])
        assert {t.verdict for t in varlen_scheduler.must_show([], {}, CEILINGS)} == {"not measured"}

        options = SimpleNamespace(json=tmp_path / "r.json", markdown=tmp_path / "r.md", csv=tmp_path / "r.csv")
        report = report_of(rows, planner_microseconds=planner)
        assert varlen_scheduler.finish(report, CEILINGS, options) == 0
        assert json.loads(options.json.read_text())["targets"][1]["verdict"] == "FAIL"
        rows[0]["results"]["static"] = {"error": "RuntimeError: x"}
        assert varlen_scheduler.finish(report, CEILINGS, options) == 1
