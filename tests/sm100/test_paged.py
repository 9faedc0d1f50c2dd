"""The Blackwell forward kernel over paged keys on a Blackwell GPU."""

from tests.paged_matrix import *  # noqa: F403
