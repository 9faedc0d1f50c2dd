"""examples/: each runs, is right, says so honestly, and notices when attention is wrong."""

import importlib
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("key_side", "per_query", "mixed")


@pytest.fixture(params=NAMES)
def example(request, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(request.param)


def test_every_example_is_here():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted([*NAMES, "ragged_decode"])


def test_example_checks_itself_and_tells_what_memory_it_saves(example, capsys):
    example.main()
    said = capsys.readouterr().out
    assert "largest error against the fp64 reference" in said
    figures = re.findall(r"total_k = (\d+) .* = (\d+) x (\d+) = \d+: ([\d.]+)% less", said)
    assert len(figures) >= 2
    for total_k, total_q, longest, percent in figures:
        assert float(percent) == pytest.approx(100 * (1 - int(total_k) / (int(total_q) * int(longest))), abs=0.06)
    assert re.search(r"one query a sequence, equal lengths: .*: 0\.0% less", said)


@pytest.mark.parametrize("sabotage", ["result", "masks"])
def test_wrong_attention_is_noticed(example, monkeypatch, sabotage):
    right = example.attend

    def wrong(batch, **masks):
        if sabotage == "masks":
            masks = {name: x for name, x in masks.items() if "bias" not in name}
        out, computed_by = right(batch, **masks)
        return (out * 1.1 if sabotage == "result" else out), computed_by

    monkeypatch.setattr(example, "attend", wrong)
    with pytest.raises(AssertionError, match="off by"):
        example.main()
