"""scripts/throughput.py on the reference."""

import json

import pytest

pytest.importorskip("transformers", reason="an optional dependency: pip install -e '.[transformers]'")

from scripts import throughput  # noqa: E402


def test_steps_and_table(capsys, tmp_path):
    steps = tmp_path / "steps.jsonl"
    workload = ["--requests", "3", "--prompt", "3", "9", "--answer", "1", "3", "--slots", "2", "--budget", "6"]
    arguments = ["--device", "cpu", "--size", "tiny", "--attention", "fa-invariant", "fa-variant", "--page-size", "4"]
    assert throughput.main([*arguments, *workload, "--steps", str(steps), "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "fa-invariant" in out and "cost of invariance" in out
    rows = [json.loads(line) for line in steps.read_text().splitlines()]
    fields = {
        "attention",
        "step",
        "num_seqs",
        "prefill_seqs",
        "decode_seqs",
        "prefill_tokens",
        "decode_tokens",
        "queue",
    }
    assert all(fields <= row.keys() for row in rows)
    for name in ("fa-invariant", "fa-variant"):
        mine = [row for row in rows if row["attention"] == name]
        assert [row["step"] for row in mine] == list(range(len(mine)))
        assert max(row["num_seqs"] for row in mine) == 2 and mine[0]["queue"] == 1
        assert all(row["prefill_tokens"] + row["decode_tokens"] <= 6 for row in mine)
        # Of every request: its prompt, and a decode for each token of the answer but the first, which the prompt gives.
        requests = throughput.requests_of(throughput.parse([*arguments, *workload]), 64)
        assert sum(row["prefill_tokens"] for row in mine) == sum(len(r.prompt) for r in requests)
        assert sum(row["decode_tokens"] for row in mine) == sum(r.answer - 1 for r in requests)
