"""The Hopper forward kernel on a Hopper GPU."""

from tests.forward_matrix import *  # noqa: F403
