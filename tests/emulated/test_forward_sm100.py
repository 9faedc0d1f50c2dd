"""The library's Blackwell forward in the emulator."""

from tests.emulated.forward_matrix import *  # noqa: F403
