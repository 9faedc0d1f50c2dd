"""benchmarks/triton_attention.py without a GPU: its verdicts and tables."""

import pytest

pytest.importorskip("triton")  # comes with torch on Linux alone

from benchmarks import triton_attention as bench


def row(name: str, **seconds: float) -> dict:
    results = {who.replace("_", "-"): {"seconds": t, "tflops": 1e-3 / t} for who, t in seconds.items()}
    return {"name": name, "floor_microseconds": 1.0, "results": results}


def test_a_goal_is_a_part_of_the_speed_of_flash_attn_4():
    rows = [
        row("d128 causal 4x4096 forward", triton=1.5e-3, flash_attn_4=1e-3, cute=0.9e-3),
        row("d128 causal 4x4096 backward", triton=2.5e-3, flash_attn_4=1e-3),
        row("d64 causal 4x4096 backward", triton=9e-3, flash_attn_4=1e-3),
    ]
    forward, backward = bench.must_show(rows)
    assert forward.figure == pytest.approx(1 / 1.5) and forward.verdict == "pass"
    assert backward.figure == pytest.approx(0.4) and backward.verdict == "FAIL"


def test_what_was_not_measured_is_no_pass():
    assert [target.verdict for target in bench.must_show([])] == ["not measured"] * 2
    alone = [row("d128 causal 4x4096 forward", triton=1e-3)]
    assert [target.verdict for target in bench.must_show(alone)] == ["not measured"] * 2


def test_a_column_is_a_candidate_of_any_row():
    rows = [row("a", triton=1e-3), row("b", cute=2e-3)]
    table = bench.tables({"rows": rows, "targets": []})[0]
    assert table.columns == ["workload", "triton", "cute"]
    assert table.rows == [["a", "1", "-"], ["b", "-", "0"]]
