"""The library's Hopper forward in the emulator."""

from tests.emulated.forward_matrix import *  # noqa: F403
