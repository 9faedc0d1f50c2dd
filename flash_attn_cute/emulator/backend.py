"""`backend="emulator"`: a call on CPU tensors runs the compiled kernel of a GPU that is not there."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from flash_attn_cute import launch
from flash_attn_cute.emulator.session import current_session, emulate
from flash_attn_cute.problem import AttentionTensors, Problem
from flash_attn_cute.scheduler_metadata import SchedulerMetadata

DEFAULT_ARCHITECTURE = "sm_90a"


def architecture() -> str:
    """What a call would be emulated on: the GPU of the session in progress, or Hopper."""
    session = current_session()
    return DEFAULT_ARCHITECTURE if session is None else session.arch


def run(
    tensors: AttentionTensors, problem: Problem, metadata: SchedulerMetadata | bool | None = None
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) on the CPU. The caller has asked `launch.unsupported`.

    Raises EmulatorError if the DSL was imported before by something that meant to use a real GPU, or if a check fires.
    """
    if current_session() is not None:
        return _run_in_session(tensors, problem, metadata)
    with emulate(DEFAULT_ARCHITECTURE):
        return _run_in_session(tensors, problem, metadata)


def _run_in_session(
    tensors: AttentionTensors, problem: Problem, metadata: SchedulerMetadata | bool | None
) -> tuple[Tensor, Tensor | None]:
    on_device = AttentionTensors(*(None if tensor is None else tensor.cuda() for tensor in tensors))
    if metadata:
        moved = {name: x.cuda() for name, x in vars(metadata).items() if isinstance(x, Tensor)}
        metadata = dataclasses.replace(metadata, **moved)
    out, lse = launch.PreparedLaunch.of(on_device, problem, metadata).run(on_device, metadata)
    out = out.cpu() if tensors.out is None else tensors.out.copy_(out.cpu())
    return out, None if lse is None else lse.cpu()
