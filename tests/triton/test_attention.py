"""The Triton attention kernels on small shapes."""

from tests.triton_matrix import *  # noqa: F403
