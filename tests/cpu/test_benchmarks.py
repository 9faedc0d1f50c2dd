"""The benchmarks' own arithmetic: counts, clock, verdicts. No GPU is needed, and no timing is asserted."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

from benchmarks import forward, peers, report, rows, targets, timing, verify
from benchmarks.workloads import (
    D128_SHAPES,
    PRESETS,
    SHORT_SEQUENCES,
    Workload,
    equal,
    prefill_among_decodes,
    ragged,
    visible_pairs,
)
from tests.cpu.fake_stopwatch import FakeStopwatch


def small(lens_q, lens_k, *, causal=True, heads=4, heads_kv=2, head_dim=16, head_dim_v=8, dtype="float32") -> Workload:
    return Workload("small", "ragged", lens_q, lens_k, heads, heads_kv, head_dim, head_dim_v, causal, True, dtype)


class TestWorkloads:
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("len_q", [0, 1, 2, 5, 9])
    @pytest.mark.parametrize("len_k", [0, 1, 4, 5, 13])
    def test_visible_pairs_count_the_mask(self, len_q, len_k, causal):
        mask = [[not causal or j <= i + len_k - len_q for j in range(len_k)] for i in range(len_q)]
        assert visible_pairs(len_q, len_k, causal) == sum(map(sum, mask))

    def test_flops_and_bytes_of_a_small_batch(self):
        workload = small((2, 0, 3), (3, 5, 3))
        # 2x3 sees 2 + 3 keys; no queries, no pairs; 3x3 sees 1 + 2 + 3.
        assert workload.pairs == 11
        assert workload.flops == 2 * 11 * 4 * (16 + 8)
        # The middle sequence has no query: its keys need not be read.
        assert workload.min_bytes == 4 * (5 * 4 * (16 + 8) + 6 * 2 * (16 + 8))
        assert workload.cu_q == [0, 2, 2, 5] and workload.cu_k == [0, 3, 8, 11]

    def test_floor_is_the_larger_of_arithmetic_and_traffic(self):
        workload = equal(4, 4096, causal=False)
        assert workload.flops == 4 * 4 * 4096 * 4096 * 16 * 128
        assert workload.floor_seconds(1e12, 1e30) == workload.flops / 1e12
        assert workload.floor_seconds(1e30, 1e12) == workload.min_bytes / 1e12

    @pytest.mark.parametrize("preset", sorted(PRESETS))
    def test_presets_are_the_same_each_time_and_named_apart(self, preset):
        rows, again = PRESETS[preset](), PRESETS[preset]()
        assert rows == again
        assert len({row.name for row in rows}) == len(rows)
        assert all(row.flops > 0 and row.min_bytes > 0 for row in rows)
        json.dumps([row.described() for row in rows])

    def test_presets_hold_the_rows_that_the_targets_ask_for(self):
        names = {row.name for row in PRESETS["all"]()}
        assert set(targets.D128_NAMES) <= names
        assert {f"{name} packed" for name in targets.D128_NAMES} <= names
        assert SHORT_SEQUENCES.name in names
        assert [row.group for row in PRESETS["dense"]()].count("d192-128") == 2

    def test_mixed_has_prefills_and_decodes(self):
        mixed = prefill_among_decodes()
        assert mixed.lens_q.count(1) == 96 and mixed.max_q == 2048
        assert not mixed.square and not mixed.equal_lengths

    def test_wrong_workloads_are_refused(self):
        with pytest.raises(ValueError, match="2 query lengths but 1 key lengths"):
            small((1, 2), (3,))
        with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
            small((1,), (1,), heads=3)
        with pytest.raises(ValueError, match="needs equal lengths"):
            Workload("w", "g", (1, 2), (1, 2), 1, 1, 8, 8, True, False)


class TestTiming:
    def test_median_without_the_flush(self):
        watch = FakeStopwatch()
        result = timing.time_interleaved(
            {"a": watch.candidate("a", 1.0, 1.0, 9.0), "b": watch.candidate("b", 2.0)},
            watch,
            iterations=9,
            warmup=0,
            budget_seconds=1e9,
        )
        assert result["a"].seconds == 1.0 and result["b"].seconds == 2.0
        assert result["a"].rounds == 9

    def test_every_round_flushes_before_each_candidate_and_rotates_the_first_place(self):
        watch = FakeStopwatch()
        timing.time_interleaved(
            {name: watch.candidate(name, 1.0) for name in "abc"}, watch, iterations=3, warmup=0, budget_seconds=1e9
        )
        assert "".join(event[0] for event in watch.events if event != "sync") == "fafbfc" + "fbfcfa" + "fcfafb"

    def test_budget_caps_slow_workloads_at_no_fewer_than_five_rounds(self):
        watch = FakeStopwatch()
        slow = {"slow": watch.candidate("slow", 10.0)}
        assert timing.time_interleaved(slow, watch, iterations=50, budget_seconds=80.0)["slow"].rounds == 8
        assert timing.time_interleaved(slow, watch, iterations=50, budget_seconds=1.0)["slow"].rounds == 5

    def test_no_candidates(self):
        assert timing.time_interleaved({}, FakeStopwatch()) == {}

    def test_spread_is_half_the_middle_half(self):
        result = timing.Timing.from_samples([8.0, 9.0, 10.0, 11.0, 12.0, 50.0, 1.0, 10.0])
        assert result.seconds == 10.0
        assert result.spread == pytest.approx((11.0 - 9.0) / 2 / 10.0, rel=0.6)

    def test_host_time_is_per_call_and_leaves_the_first_round_out(self):
        now = [0.0]
        cost = {"calls": 0}

        def call() -> None:
            cost["calls"] += 1
            now[0] += 7.0 if cost["calls"] <= 10 else 2.0

        def synchronize() -> None:
            now[0] += 1000.0

        result = timing.host_seconds_per_call({"x": call}, synchronize, calls=10, rounds=3, clock=lambda: now[0])
        assert result == {"x": 2.0} and cost["calls"] == 40


def row(name, results, *, group="d128", packed=False, heads=16, heads_kv=16):
    return {
        "name": name,
        "group": group,
        "packed": packed,
        "heads": heads,
        "heads_kv": heads_kv,
        "bound": "compute",
        "results": {key: {"seconds": value, "correct": True} for key, value in results.items()},
    }


class TestTargets:
    def everything(self, ours=1.0):
        rows = [row(name, {"ours": ours, "flash-attn-4": 1.2, "cudnn": 1.1}) for name in targets.D128_NAMES]
        rows += [row(f"{name} packed", {"ours": 1.0, "ours-batched": 0.99}, packed=True) for name in targets.D128_NAMES]
        for group in ("d64", "d256", "d192-128"):
            rows += [row(f"{group} {mask}", {"ours": 1.0, "flash-attn-4": 0.96}, group=group) for mask in "fc"]
        short = {"ours": 1.0, "flash-attn-4": 1.6}
        rows.append(row(SHORT_SEQUENCES.name, short, packed=True, heads=32, heads_kv=8))
        return rows

    def test_all_met(self):
        found = targets.forward_targets(self.everything(), {"ours": 39.0})
        assert [target.verdict for target in found] == ["pass"] * len(found)
        assert found[0].figure == pytest.approx(1.1)
        assert json.dumps([target.as_json() for target in found])

    def test_the_best_peer_is_the_measure(self):
        found = targets.forward_targets(self.everything(ours=1.15), {"ours": 41.0})
        assert found[0].figure == pytest.approx(1.1 / 1.15) and found[0].verdict == "FAIL"
        assert found[-1].verdict == "FAIL"

    def test_what_was_not_measured_is_not_a_pass(self):
        rows = [r for r in self.everything() if r["name"] != targets.D128_NAMES[0]]
        found = targets.forward_targets(rows, {})
        assert found[0].verdict == found[1].verdict == found[-1].verdict == "not measured"
        assert all(target.verdict == "not measured" for target in targets.forward_targets([], {}))

    def test_a_wrong_or_failed_result_has_no_ratio(self):
        broken = row("r", {"ours": 1.0})
        broken["results"]["flash-attn-4"] = {"error": "RuntimeError: no"}
        assert rows.ratio(broken, ("flash-attn-4",)) is None
        assert targets.summarise([broken], ["flash-attn-4"]) == []

    def test_summary_is_by_group_layout_and_peer(self):
        rows = [row("a", {"ours": 1.0, "x": 2.0}), row("b", {"ours": 1.0, "x": 8.0}), row("c", {"ours": 1.0})]
        assert targets.summarise(rows, ["x", "y"]) == [
            {"group": "d128 dense", "peer": "x", "rows": 2, "geomean": pytest.approx(4.0)}
        ]

    def test_names_follow_the_workloads(self):
        built = [equal(b, n, causal=c).name for b, n in D128_SHAPES for c in (False, True)]
        assert tuple(built) == targets.D128_NAMES


def naive(workload: Workload, inputs: peers.AttentionInputs) -> torch.Tensor:
    """A row at a time, in fp64."""
    out = torch.zeros(workload.total_q, workload.heads, workload.head_dim_v, dtype=torch.float64)
    group = workload.heads // workload.heads_kv
    for s in range(workload.batch):
        len_q, len_k = workload.lens_q[s], workload.lens_k[s]
        for i in range(len_q):
            seen = min(len_k, i + len_k - len_q + 1) if workload.causal else len_k
            for h in range(workload.heads if seen > 0 else 0):
                keys = slice(workload.cu_k[s], workload.cu_k[s] + seen)
                scores = inputs.k[keys, h // group].double() @ inputs.q[workload.cu_q[s] + i, h].double()
                weights = (scores / math.sqrt(workload.head_dim)).softmax(0)
                out[workload.cu_q[s] + i, h] = weights @ inputs.v[keys, h // group].double()
    return out


class TestVerification:
    @pytest.mark.parametrize("causal", [False, True])
    def test_sampled_reference_is_attention(self, causal):
        workload = small((3, 0, 7, 4), (5, 2, 4, 0), causal=causal)
        inputs = peers.AttentionInputs.random(workload, device="cpu")
        rows, expected = verify.sampled_reference(workload, inputs.q, inputs.k, inputs.v)
        assert rows.tolist() == list(range(workload.total_q))
        torch.testing.assert_close(expected, naive(workload, inputs).float(), atol=1e-5, rtol=1e-5)

    def test_samples_hold_the_ends(self):
        rng = random.Random(0)
        rows = verify.sample_rows(5000, rng)
        assert len(rows) == verify.SAMPLED_ROWS and {0, 31, 4968, 4999} <= set(rows)
        lengths = [1] * 40
        lengths[17] = 300
        assert {0, 17, 39} <= set(verify.sample_sequences(ragged("r", lengths), rng))

    def test_nan_and_large_errors_are_found(self):
        ones = torch.ones(4)
        assert verify.excess(ones, ones) == (0.0, True)
        assert not verify.excess(torch.tensor([1.0, math.nan]), torch.ones(2))[1]
        assert not verify.excess(ones + 0.05, ones)[1]
        assert verify.excess(torch.empty(0), torch.empty(0)) == (0.0, True)

    def test_outputs_are_compared_in_full_with_one_that_was_right(self):
        workload = ragged("long", [1000], heads=2, heads_kv=1)
        inputs = peers.AttentionInputs.random(workload, device="cpu")
        sampled, _ = verify.sampled_reference(workload, inputs.q, inputs.k, inputs.v)
        right = verify.attend_rows(inputs.q, inputs.k, inputs.v, torch.arange(1000), 1000, True)
        unsampled = next(i for i in range(1000) if i not in set(sampled.tolist()))
        wrong = right.clone()
        wrong[unsampled] += 1.0
        check = verify.Check(workload, inputs)
        assert check(right)["correct"]
        assert not check(wrong)["correct"]


class TestPeers:
    def test_batched_views_share_memory(self):
        workload = equal(3, 5, causal=False, heads=2, head_dim=8)
        inputs = peers.AttentionInputs.random(workload, device="cpu")
        q, k, v = inputs.batched(workload)
        assert q.shape == (3, 5, 2, 8) and q.data_ptr() == inputs.q.data_ptr()

    def test_who_takes_what(self):
        cudnn, varlen, batched = peers.CudnnSdpa(), peers.TorchVarlen(), peers.OursBatched()
        assert cudnn.supports(equal(2, 64, causal=True, packed=True))
        assert not cudnn.supports(ragged("r", [1, 2]))
        assert not cudnn.supports(ragged("r", [2, 2], [4, 4]))  # torch's causal is aligned to the other corner
        assert varlen.supports(ragged("r", [1, 2]))
        assert not varlen.supports(equal(2, 64, causal=True, head_dim=192, head_dim_v=128))
        assert batched.supports(equal(2, 64, causal=True, packed=True))
        assert not batched.supports(equal(2, 64, causal=True)) and not batched.supports(ragged("r", [1, 2]))

    def test_family_calls_use_the_familys_names(self, monkeypatch):
        seen = []
        module = SimpleNamespace(
            flash_attn_varlen_func=lambda q, k, v, **rest: seen.append(rest) or (q, None),
            flash_attn_func=lambda q, k, v, **rest: seen.append(rest) or q,
        )
        monkeypatch.setattr(peers.importlib, "import_module", lambda name: module)
        packed, dense = ragged("r", [1, 2]), equal(2, 4, causal=True, heads=1, head_dim=8)
        for workload in (packed, dense):
            inputs = peers.AttentionInputs.random(workload, device="cpu")
            out = peers.FlashAttention4().make(workload, inputs)()
            assert isinstance(out, torch.Tensor)
        assert set(seen[0]) == {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "causal"}
        assert seen[0]["cu_seqlens_q"].tolist() == [0, 1, 3] and seen[0]["max_seqlen_q"] == 2
        assert seen[1] == {"causal": True}

    def test_absent_peers_say_why(self):
        absent = peers.FlashAttention3()
        absent.module = "no_such_module_anywhere"
        assert not absent.available() and "no_such_module_anywhere" in absent.missing_because()

    def test_names(self):
        assert [peer.name for peer in peers.peers_named("cudnn,flash-attn-4")] == ["cudnn", "flash-attn-4"]
        assert len(peers.peers_named(None)) == len(peers.PEERS)
        with pytest.raises(ValueError, match="unknown peers nobody; there are flash-attn-4"):
            peers.peers_named("nobody")

    def test_a_peer_that_raises_is_its_own_result(self, monkeypatch):
        class Fails(peers.Peer):
            name = "fails"

            def supports(self, workload):
                return True

            def make(self, workload, inputs):
                raise RuntimeError("not\n  on this machine")

        class Works(Fails):
            name = "ours"

            def make(self, workload, inputs):
                return lambda: naive(workload, inputs)

        monkeypatch.setattr(forward, "OURS", Works())
        workload = small((3, 4), (3, 4))
        inputs = peers.AttentionInputs.random(workload, device="cpu")
        candidates, results = forward.run_peers(workload, inputs, [Fails()])
        assert list(candidates) == ["ours"] and results["ours"]["correct"]
        assert results["fails"] == {"error": "RuntimeError: not on this machine"}


class TestReport:
    def made(self):
        timed = {"microseconds": 10.0, "tflops": 500.0, "terabytes_per_s": 1.0, "floor_ratio": 1.5, "seconds": 1e-5}
        one = row("d128 4x4096 full", {})
        one["results"] = {
            "ours": timed | {"correct": True, "max_error": 0.0},
            "cudnn": timed | {"correct": True},
            "flash-attn-4": {"error": "ImportError: x"},
        }
        ceilings = {"matmul_flops_per_s": 8e14, "read_bytes_per_s": 4e12, "read_method": "torch sum"}
        return {
            "provenance": {"gpu": "G", "date": "2026-01-01", "commit": "abc"},
            "peers": {"cudnn": "9"},
            "ceilings": ceilings,
            "rows": [one],
            "host_microseconds": {"ours": 30.0},
        }

    def test_text_and_markdown_tables(self):
        table = report.row_table("Forward", self.made()["rows"], ["flash-attn-4", "cudnn"])
        text, markdown = table.as_text(), table.as_markdown()
        assert text.splitlines()[-1].split() == [
            *"d128 4x4096 full".split(), "10.0", "500", "1.00", "1.50", "compute", "-", "1.00"
        ]  # fmt: skip
        assert markdown.splitlines()[-1] == "| d128 4x4096 full | 10.0 | 500 | 1.00 | 1.50 | compute | - | 1.00 |"

    def test_finish_writes_every_file_and_judges_ours(self, tmp_path, capsys):
        options = forward.parse_arguments(["--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")])
        assert forward.finish(self.made(), ["flash-attn-4", "cudnn"], options) == 0
        written = json.loads((tmp_path / "r.json").read_text())
        assert written["targets"][-1]["verdict"] == "pass" and written["summary"][0]["peer"] == "cudnn"
        assert "d128 4x4096 full: flash-attn-4: ImportError: x" in (tmp_path / "r.md").read_text()
        assert "not measured" in capsys.readouterr().out
        wrong = self.made()
        wrong["rows"][0]["results"]["ours"]["correct"] = False
        assert forward.finish(wrong, ["cudnn"], options) == 1

    def test_plot(self, tmp_path):
        pytest.importorskip("matplotlib")
        report.write_bars(tmp_path / "r.png", self.made(), ["ours", "cudnn"], report.TFLOPS)
        assert (tmp_path / "r.png").stat().st_size > 0

    def test_no_gpu_and_wrong_arguments_end_with_two(self, monkeypatch, capsys):
        monkeypatch.setattr(forward.torch.cuda, "is_available", lambda: False)
        assert forward.main(["--preset", "quick"]) == 2
        assert "no CUDA device" in capsys.readouterr().err
        assert forward.main(["--peers", "nobody"]) == 2
        assert "unknown peers nobody" in capsys.readouterr().err
