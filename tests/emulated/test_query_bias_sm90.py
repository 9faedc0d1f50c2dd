"""A mask and a bias of each query in the Hopper forward, in the emulator."""

from tests.emulated.query_bias_forward import *  # noqa: F403
