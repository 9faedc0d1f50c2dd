"""Skipping of hidden KV tiles in the Hopper forward kernel on a Hopper GPU."""

from tests.key_skip_matrix import *  # noqa: F403
