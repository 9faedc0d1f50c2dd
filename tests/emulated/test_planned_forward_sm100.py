"""The Blackwell forward under a plan, in the emulator."""

import pytest
import torch

from tests.attention_cases import attention, build_tensors
from tests.emulated.planned_forward import *  # noqa: F403  the tests themselves
from tests.emulated.planned_forward import CUDA, plan_of


@pytest.mark.parametrize("is_planned", [False, True])
def test_cluster_launch_control_changes_no_bit(emulation, is_planned):
    """Tiles of CTAs that never start, taken in any order of events; padding and empty sequences among them."""
    tensors = build_tensors([5, 0, 300, 20, 3], [5, 7, 300, 20, 40], head_dim=64, heads=4, kv_heads=2, device=CUDA)
    plan = plan_of(tensors, num_splits=1, causal=True) if is_planned else False
    expected = attention(tensors, causal=True, scheduler="static", scheduler_metadata=False)
    for schedule in ("in-order", "random", "delayed"):
        emulation.reschedule(schedule, seed=1)
        got = attention(tensors, causal=True, scheduler="clc", scheduler_metadata=plan)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True)), schedule
    emulation.reschedule("in-order")
