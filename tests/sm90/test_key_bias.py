"""Masks and biases of keys and of each query in the Hopper forward kernel on a Hopper GPU."""

from tests.key_bias_matrix import *  # noqa: F403
