"""scripts/verify_logits.py in Triton's interpreter: what it says is so, and it notices when it is not."""

import pytest

pytest.importorskip("transformers", reason="an optional dependency: pip install -e '.[transformers]'")

from flash_attn_cute.batch_invariant import is_batch_invariant_mode_enabled  # noqa: E402
from flash_attn_cute.integrations import transformers as integration  # noqa: E402
from scripts import verify_logits  # noqa: E402

TINY = ["--device", "cpu", "--size", "tiny", "--attention", "triton-invariant"]


def test_all_ways_give_the_same_bits(capsys):
    assert verify_logits.main([*TINY, "--longest", "5", "--page-size", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("largest difference of logits 0, of log-probabilities 0" in line for line in lines) == 3
    assert not is_batch_invariant_mode_enabled()


def test_attention_that_differs_over_pages_is_noticed(capsys, monkeypatch):
    right = integration.flash_attn_varlen_func

    def wrong(*arguments, **options):
        if options.get("page_table") is not None:
            options["window_size"] = (2, None)
        return right(*arguments, **options)

    monkeypatch.setattr(integration, "flash_attn_varlen_func", wrong)
    assert verify_logits.main([*TINY, "--longest", "5", "--page-size", "4"]) == 1
    assert "WRONG triton-invariant: b, decoded alone differs from the prefill" in capsys.readouterr().out
