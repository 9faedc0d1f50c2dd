"""scripts/serve.py: what it serves is right, and it says so when it is not."""

import pytest
import torch

from scripts import serve
from scripts.tiny_llama import Config, TinyLlama

FEW = ["--requests", "4", "--new-tokens", "4", "--longest-prompt", "60", "--backend", "reference"]


def test_tokens_are_those_of_plain_pytorch(capsys):
    assert serve.main(FEW) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "16 of 16 tokens compared: equal to those of plain PyTorch, one request at a time"
    assert sum(": request " in line for line in said) == 4


@pytest.mark.parametrize("sabotage", ["rotary", "pages", "lengths"])
def test_wrong_attention_is_noticed(monkeypatch, capsys, sabotage):
    right = serve.flash_attn_with_kvcache

    def wrong(*arguments, **options):
        if sabotage == "rotary":
            options["rotary_interleaved"] = True
        elif sabotage == "pages":
            options["page_table"] = options["page_table"].clamp(max=1)
        else:
            options["cache_seqlens"] = torch.zeros_like(options["cache_seqlens"])
        return right(*arguments, **options)

    monkeypatch.setattr(serve, "flash_attn_with_kvcache", wrong)
    assert serve.main(FEW) == 1
    assert "DIFFERENT" in capsys.readouterr().out.splitlines()[-1]


def test_pages_are_given_back_and_prompts_meet_decodes():
    model = TinyLlama(Config(layers=1))
    limits = serve.Limits(slots=3, budget=8, pages=7)
    engine = serve.Engine(model, limits, "reference")
    requests = [serve.Request(number, number, [number + 1] * (5 + 9 * number), 3) for number in range(5)]
    with torch.inference_mode():
        serve.serve(engine, requests)
    assert all(len(request.generated) == 3 for request in requests)
    assert sorted(engine.free) == list(range(7)) and engine.steps["mixed"] > 0
    assert serve.compare(model, requests) == (15, [])


def test_what_does_not_fit_is_refused(capsys):
    with pytest.raises(SystemExit):
        serve.main(["--longest-prompt", "250", "--new-tokens", "12"])
    assert "a request has room for 256" in capsys.readouterr().err
