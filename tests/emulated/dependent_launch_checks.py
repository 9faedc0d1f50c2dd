"""Programmatic dependent launch in the forwards' PTX: nothing is read before the launches before have ended.

The emulator runs launches one after the other, so a wait that is missing or late would show nowhere else.
"""

import re

import pytest

from tests.attention_cases import attention, build_tensors
from tests.emulated.planned_forward import CUDA, plan_of

# What touches global memory, or may, where no space is named. A prefetch into L2 is a hint, and descriptors of tensors
# are parameters.
ACCESS = re.compile(r"\b(ld|st|atom|red)\.(?!\S*\b(shared|param|local|const)\b)|\bcp\.async\.(bulk|ca|cg)\b")
WAIT, LAUNCH = "griddepcontrol.wait", "griddepcontrol.launch_dependents"


def instructions(record) -> list[str]:
    """Of the kernel that was launched; a module may hold others."""
    begin = record.ptx.index(f".entry {record.entry}")
    end = record.ptx.find(".entry ", begin + 1)
    lines = record.ptx[begin : end if end > 0 else None].splitlines()
    return [line.strip() for line in lines if line.strip().endswith(";")]


def first(lines: list[str], matches) -> int:
    return next(i for i, line in enumerate(lines) if matches(line))


@pytest.mark.parametrize("splits", [False, True])
def test_a_forward_waits_before_it_touches_memory(emulation, monkeypatch, splits):
    from flash_attn_cute.emulator.session import current_session

    session, records = current_session(), []
    execute = session.execute
    monkeypatch.setattr(session, "execute", lambda record: (records.append(record), execute(record))[1])
    tensors = build_tensors([1, 3], [700, 20], head_dim=64, heads=4, kv_heads=2, device=CUDA)
    plan = plan_of(tensors, num_splits=0 if splits else 1, causal=True)
    records.clear()
    attention(tensors, causal=True, num_splits=0 if splits else 1, scheduler_metadata=plan)
    assert len(records) == 1 + splits and "ForwardSm" in records[0].entry
    lines = instructions(records[0])
    wait = first(lines, lambda line: WAIT in line)
    assert not lines[wait].startswith("@")
    assert wait < first(lines, ACCESS.search)
    assert wait < first(lines, lambda line: LAUNCH in line)
