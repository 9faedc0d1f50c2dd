"""Dependent launches of the Blackwell forward: pytest --emulate sm_100a tests/emulated/test_dependent_launch_sm100.py"""

from tests.emulated.dependent_launch_checks import test_a_forward_waits_before_it_touches_memory  # noqa: F401
