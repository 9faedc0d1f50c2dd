"""Plans, splits and schedulers on a Hopper GPU."""

from tests.planned_matrix import *  # noqa: F403
