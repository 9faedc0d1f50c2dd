"""The Hopper forward as a dependent launch, in the emulator."""

from tests.emulated.dependent_launch_checks import test_a_forward_waits_before_it_touches_memory  # noqa: F401  for pytest
