"""`backend="emulator"`: a call on CPU tensors runs the compiled kernel of a GPU that is not there."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

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


def session() -> contextlib.AbstractContextManager:
    """The session in progress, or one for Hopper that ends with the block.

    Raises EmulatorError if the DSL was imported before by something that meant to use a real GPU.
    """
    return contextlib.nullcontext() if current_session() is not None else emulate(DEFAULT_ARCHITECTURE)


def to_device(value: Any) -> Any:
    """A tensor, or the tensors of a plan, on the emulated GPU; anything else as it is."""
    if isinstance(value, Tensor):
        return value.cuda()
    if isinstance(value, SchedulerMetadata):
        moved = {name: x.cuda() for name, x in vars(value).items() if isinstance(x, Tensor)}
        return dataclasses.replace(value, workspace=None, **moved)
    return value


def run(
    tensors: AttentionTensors, problem: Problem, metadata: SchedulerMetadata | bool | None = None
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) on the CPU. The caller has asked `launch.unsupported`.

    Raises EmulatorError as `session` does, or if a check fires.
    """
    with session():
        on_device = AttentionTensors(*map(to_device, tensors))
        metadata = to_device(metadata)
        out, lse = launch.PreparedLaunch.of(on_device, problem, metadata).run(on_device, metadata)
        out = out.cpu() if tensors.out is None else tensors.out.copy_(out.cpu())
        return out, None if lse is None else lse.cpu()
