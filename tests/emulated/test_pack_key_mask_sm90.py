"""The packing of key masks on the emulated Hopper."""

from tests.emulated.pack_key_mask_checks import *  # noqa: F403
