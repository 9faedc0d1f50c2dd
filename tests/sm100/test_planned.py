"""Plans, splits and schedulers on a Blackwell GPU."""

from tests.planned_matrix import *  # noqa: F403
