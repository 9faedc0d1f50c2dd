"""Batch-invariant mode: whole models whose bits do not depend on what else is in the batch.

While it is on, in the whole process:

- aten's mm, addmm, bmm, _log_softmax, mean.dim and, where torch has it, _fused_rms_norm (which rms_norm becomes) are
  Triton kernels with one order of summation, on CUDA; dtypes that those lack raise NotImplementedError;
- reduced-precision reductions of 16-bit matrix products are off and deterministic algorithms are on;
- attention takes one split, or absolute boundaries of a fixed split size, whatever num_splits a call gives (a cap).

Variant mode is the opposite: attention splits as the batch asks for (num_splits=0), and nothing of the above holds.

Threads: operators and flags belong to the process, and so does the mode. Of all contexts that any thread has entered
and not left, the one entered last decides; leaving contexts in any order brings back what then is last, and in the end
what was before the first. Code that torch.compile has made calls no aten operators, and is not covered.

Idea: Thinking Machines, "Defeating Nondeterminism in LLM Inference" (He et al. 2025).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_attn_cute import split_policy
from flash_attn_cute.split_policy import SplitPolicy


@dataclass
class _Choice:
    """What somebody asked for: invariant (True), variant (False), or neither (None)."""

    invariant: bool | None
    seqlen_k_per_split: int | None = None

    @property
    def policy(self) -> SplitPolicy | None:
        if self.invariant is None:
            return None
        return SplitPolicy(1, self.seqlen_k_per_split) if self.invariant else SplitPolicy(0)


_lock = threading.RLock()
_base = _Choice(None)
_entered: list[_Choice] = []
_applied: _Applied | None = None


def enable_batch_invariant_mode(seqlen_k_per_split: int | None = None) -> None:
    """Turns the mode on, until it is turned off or the surrounding `set_batch_invariant_mode` is left.

    seqlen_k_per_split: None locks attention to one split; a number to splits of so many keys, rounded up to KV tiles,
    which decodes of long sequences need to be fast. Raises ValueError for less than 1, and ImportError without Triton.
    """
    if seqlen_k_per_split is not None and seqlen_k_per_split < 1:
        raise ValueError(f"seqlen_k_per_split: got {seqlen_k_per_split}; takes None or an int from 1")
    _choose(_Choice(True, seqlen_k_per_split))


def disable_batch_invariant_mode() -> None:
    """Turns the mode off, and variant mode too: every flag is what it was before."""
    _choose(_Choice(None))


def enable_batch_variant_mode() -> None:
    """The explicit opposite: turns the invariant mode off, and lets every batch choose its splits."""
    _choose(_Choice(False))


def is_batch_invariant_mode_enabled() -> bool:
    return _applied is not None


@contextmanager
def set_batch_invariant_mode(enabled: bool = True, seqlen_k_per_split: int | None = None) -> Iterator[None]:
    """The mode on, or off, inside a with statement; what was before comes back however it is left. It nests."""
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: got {type(enabled).__name__}; takes True or False")
    with _lock:
        choice = _Choice(None)
        _entered.append(choice)
    try:
        if enabled:
            enable_batch_invariant_mode(seqlen_k_per_split)
        else:
            disable_batch_invariant_mode()
        yield
    finally:
        with _lock:
            # By identity: another thread may have entered later, and equal choices are not the same.
            _entered[:] = [other for other in _entered if other is not choice]
            _apply()


def _choose(choice: _Choice) -> None:
    """For the innermost context, or the process where there is none."""
    with _lock:
        target = _entered[-1] if _entered else _base
        before = (target.invariant, target.seqlen_k_per_split)
        target.invariant, target.seqlen_k_per_split = choice.invariant, choice.seqlen_k_per_split
        try:
            _apply()
        except BaseException:
            target.invariant, target.seqlen_k_per_split = before
            raise


def _apply() -> None:
    """Makes the process what the innermost choice says."""
    global _applied
    choice = _entered[-1] if _entered else _base
    if choice.invariant and _applied is None:
        _applied = _Applied()
    elif not choice.invariant and _applied is not None:
        _applied.undo()
        _applied = None
    split_policy.use(choice.policy)


class _Applied:
    """Operators replaced and flags set; `undo` puts back what was there."""

    def __init__(self):
        replacements, key = _replacements()
        self._library = torch.library.Library("aten", "IMPL")
        try:
            with warnings.catch_warnings():
                # That a kernel is overridden is the point.
                warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
                for name, function in replacements.items():
                    self._library.impl(name, function, key, allow_override=True)
        except BaseException:
            self._library._destroy()
            raise
        self._before = _Flags.current()
        _INVARIANT_FLAGS.set()

    def undo(self) -> None:
        self._before.set()
        self._library._destroy()


@dataclass(frozen=True)
class _Flags:
    bf16_reduction: Any  # torch takes and gives a bool, or a pair with what split-K may do
    fp16_reduction: Any
    deterministic: bool
    warn_only: bool
    fill_uninitialized: bool

    @classmethod
    def current(cls) -> _Flags:
        matmul = torch.backends.cuda.matmul
        return cls(
            matmul.allow_bf16_reduced_precision_reduction,
            matmul.allow_fp16_reduced_precision_reduction,
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    def set(self) -> None:
        matmul = torch.backends.cuda.matmul
        matmul.allow_bf16_reduced_precision_reduction = self.bf16_reduction
        matmul.allow_fp16_reduced_precision_reduction = self.fp16_reduction
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = self.fill_uninitialized


# Filling fresh memory finds bugs and costs a write of every result; no result depends on it.
_INVARIANT_FLAGS = _Flags(False, False, deterministic=True, warn_only=False, fill_uninitialized=False)


def _replacements() -> tuple[dict[str, Callable], str]:
    """What replaces operators, by name, and for which dispatch key: that of CUDA, or of the CPU where Triton's
    interpreter runs."""
    from flash_attn_cute.batch_invariant import matmul, reductions
    from flash_attn_cute.batch_invariant.triton_launch import INTERPRETED

    functions = {
        "mm": matmul.mm,
        "addmm": matmul.addmm,
        "bmm": matmul.bmm,
        "_log_softmax": reductions.log_softmax,
        "mean.dim": reductions.mean,
    }
    into = {f"{name}.out": _into(functions[name]) for name in ("mm", "addmm", "bmm", "_log_softmax")}
    into["mean.out"] = _into(reductions.mean)
    if hasattr(torch.ops.aten, "_fused_rms_norm"):
        functions["_fused_rms_norm"] = reductions.rms_norm
    return functions | into, "CPU" if INTERPRETED else "CUDA"


def _into(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator's form with out=."""

    def write(*arguments: Any, out: Tensor, **options: Any) -> Tensor:
        result = function(*arguments, **options)
        if out.shape != result.shape:
            out.resize_(result.shape)
        return out.copy_(result)

    return write
