"""Key-side mask and bias in the Hopper forward, in the emulator."""

from tests.emulated.key_bias_forward import *  # noqa: F403
