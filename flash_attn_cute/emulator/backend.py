"""`backend="emulator"`: a call on CPU tensors runs the compiled kernel of a GPU that is not there."""

from __future__ import annotations

from torch import Tensor

from flash_attn_cute import launch_sm90
from flash_attn_cute.emulator.session import current_session, emulate
from flash_attn_cute.problem import AttentionTensors, Problem

ARCHITECTURE = "sm_90a"


def run(tensors: AttentionTensors, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """(out, lse) on the CPU. The caller has asked `launch_sm90.unsupported`.

    Raises EmulatorError if the DSL was imported before by something that meant to use a real GPU, or if a check fires.
    """
    if current_session() is not None:
        return _run_in_session(tensors, problem)
    with emulate(ARCHITECTURE):
        return _run_in_session(tensors, problem)


def _run_in_session(tensors: AttentionTensors, problem: Problem) -> tuple[Tensor, Tensor | None]:
    on_device = AttentionTensors(*(None if tensor is None else tensor.cuda() for tensor in tensors))
    out, lse = launch_sm90.run(on_device, problem)
    out = out.cpu() if tensors.out is None else tensors.out.copy_(out.cpu())
    return out, None if lse is None else lse.cpu()
