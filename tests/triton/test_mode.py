"""Batch-invariant mode, over the CPU's operators."""

from tests.mode_matrix import *  # noqa: F403
