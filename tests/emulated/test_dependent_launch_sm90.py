"""Dependent launches of the Hopper forward: pytest --emulate sm_90a tests/emulated/test_dependent_launch_sm90.py"""

from tests.emulated.dependent_launch_checks import test_a_forward_waits_before_it_touches_memory  # noqa: F401
