"""Key-side mask and bias in the Hopper forward kernel on a Hopper GPU."""

from tests.key_bias_matrix import *  # noqa: F403
