"""The library's forward over paged keys in the emulator."""

from tests.emulated.paged_forward import *  # noqa: F403
