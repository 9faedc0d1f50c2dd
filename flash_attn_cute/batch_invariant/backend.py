"""How the public functions come to the Triton kernels, and what their backends say before they are imported."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from flash_attn_cute.problem import AttentionTensors, Problem
from flash_attn_cute.scheduler_metadata import SchedulerMetadata

NAMES = ("triton", "cute+triton")
_MISSING = "the package triton is not installed"


def why_not(problem: Problem, capability: tuple[int, int] | str) -> str | None:
    """Why the Triton forward does not take the problem on a device, or None."""
    if find_spec("triton") is None:
        return _MISSING
    from flash_attn_cute.batch_invariant import triton_attention

    return _named(triton_attention.unsupported_on(capability) or triton_attention.unsupported(problem))


def why_no_gradients(problem: Problem) -> str | None:
    """Why the Triton backward does not take a problem whose forward runs, or None."""
    if find_spec("triton") is None:
        return _MISSING
    from flash_attn_cute.batch_invariant import triton_attention

    reason = triton_attention.unsupported_backward(problem)
    return None if reason is None else f"Triton backward: {reason}"


def _named(reason: str | None) -> str | None:
    return None if reason is None else f"Triton kernel: {reason}"


def run(
    tensors: AttentionTensors, problem: Problem, metadata: SchedulerMetadata | bool | None, wants_gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """backend="triton"."""
    from flash_attn_cute.batch_invariant import triton_attention

    return triton_attention.run(tensors, problem, metadata, wants_gradients)


def run_with_cute_forward(
    tensors: AttentionTensors, problem: Problem, metadata: SchedulerMetadata | bool | None
) -> tuple[Tensor, Tensor]:
    """backend="cute+triton" where gradients are wanted: the CuTe forward, whose LSE is what the Triton backward reads.

    Raises NotImplementedError for a plan of batched tensors: they go through packed.
    """
    from flash_attn_cute import launch
    from flash_attn_cute.batch_invariant import triton_attention

    if isinstance(metadata, SchedulerMetadata) and not (problem.q_packed and problem.k_packed):
        raise NotImplementedError("scheduler_metadata: batched tensors with gradients take no plan; use packed ones")

    def forward(tensors: AttentionTensors, problem: Problem) -> tuple[Tensor, Tensor]:
        return launch.PreparedLaunch.of(tensors, problem, metadata).run(tensors, metadata)

    return triton_attention.attend_with_gradients(tensors, problem, forward)


def stores(backend: str, capability: tuple[int, int] | str) -> bool:
    """Whether Triton writes to a cache: asked for, or on a GPU without CuTe kernels.

    Raises NotImplementedError where it is asked for and does not run.
    """
    from flash_attn_cute import launch

    on_other_gpu = not isinstance(capability, str) and capability not in launch.ARCHITECTURES
    if backend != "triton" and not (backend == "auto" and on_other_gpu):
        return False
    reason = _MISSING
    if find_spec("triton") is not None:
        from flash_attn_cute.batch_invariant import triton_attention

        reason = _named(triton_attention.unsupported_on(capability))
    if reason is not None:
        raise NotImplementedError(reason)
    return True


def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """`store_kv_cache` in Triton."""
    from flash_attn_cute.batch_invariant import triton_store

    triton_store.store(k, v, k_cache, v_cache, slot_mapping)
