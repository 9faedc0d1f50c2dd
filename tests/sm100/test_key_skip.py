"""Skipping of hidden KV tiles in the Blackwell forward kernel on a Blackwell GPU."""

from tests.key_skip_matrix import *  # noqa: F403
