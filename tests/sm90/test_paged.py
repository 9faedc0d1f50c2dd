"""The Hopper forward kernel over paged keys on a Hopper GPU."""

from tests.paged_matrix import *  # noqa: F403
