"""The Blackwell forward kernel on a Blackwell GPU."""

from tests.forward_matrix import *  # noqa: F403
