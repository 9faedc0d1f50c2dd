"""The Hopper forward under a plan, in the emulator."""

from tests.emulated.planned_forward import *  # noqa: F403  the tests themselves
