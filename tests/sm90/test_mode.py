"""Batch-invariant mode on a Hopper GPU."""

from tests.mode_matrix import *  # noqa: F403
