"""Hidden KV tiles are skipped in the Hopper forward, in the emulator."""

from tests.emulated.key_skip_forward import *  # noqa: F403
