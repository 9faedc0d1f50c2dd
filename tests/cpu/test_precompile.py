"""What is compiled ahead of time is what calls ask for."""

import pytest
import torch

from flash_attn_cute import launch
from flash_attn_cute.precompile import DEFAULTS, keys_of, precompile
from flash_attn_cute.problem import AttentionTensors, Problem
from flash_attn_cute.scheduler_metadata import batch_shape
from scripts.precompile import load_configs

HOPPER = launch.Target("sm_90a", 132)


def paged_problem(lens_q: list[int], page_size: int, **options) -> Problem:
    """Queries of 32 heads over pages of 8 KV heads."""
    q = torch.empty(sum(lens_q), 32, 128, dtype=torch.bfloat16)
    pages = [torch.empty(40, page_size, 8, 128, dtype=torch.bfloat16) for _ in range(2)]
    ends = torch.tensor([0, *torch.tensor(lens_q).cumsum(0)], dtype=torch.int32)
    used, table = (torch.zeros(shape, dtype=torch.int32) for shape in ((len(lens_q),), (len(lens_q), 400)))
    tensors = AttentionTensors(q, *pages, ends, seqused_k=used, page_table=table)
    return Problem.from_arguments(tensors, max_seqlen_q=max(lens_q), causal=True, **options)


@pytest.mark.parametrize("lens_q", [[1] * 64, [1] * 60 + [2048]], ids=["decodes", "prefill among decodes"])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("num_splits", [0, 1])
def test_what_an_engine_calls_is_compiled(lens_q, page_size, num_splits):
    problem = paged_problem(lens_q, page_size, num_splits=num_splits)
    planning = batch_shape(problem, HOPPER, None)
    key = launch.plan(problem, HOPPER, planning and planning.parameters).key
    warps = {key._replace(combine_warps=warps) for warps in ((1, 4) if key.splits else (0,))}
    compiled = {key for config in load_configs("serving") for key in keys_of(config, "sm_90a")}
    assert key.page_span is not None and warps <= compiled


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match=r"config: got \['tile'\]"):
        precompile({"dtype": "bf16", "head_dim": 64, "tile": 3})


def test_a_configuration_is_a_key():
    (key,) = keys_of(DEFAULTS | {"causal": True, "window": (True, True), "lse": True}, "sm_100a")
    assert key.window_left and not key.window_right and key.lse and key.dynamic and key.page_span is None
