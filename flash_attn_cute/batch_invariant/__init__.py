"""Batch invariance end to end: a mode for whole models, and attention in Triton where there is no CuTe kernel."""

from flash_attn_cute.batch_invariant.mode import (
    disable_batch_invariant_mode,
    enable_batch_invariant_mode,
    enable_batch_variant_mode,
    is_batch_invariant_mode_enabled,
    set_batch_invariant_mode,
)

__all__ = [
    "disable_batch_invariant_mode",
    "enable_batch_invariant_mode",
    "enable_batch_variant_mode",
    "is_batch_invariant_mode_enabled",
    "set_batch_invariant_mode",
]
