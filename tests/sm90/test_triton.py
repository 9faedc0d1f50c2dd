"""The Triton attention kernels on a Hopper GPU: the small matrix, and shapes of a real model."""

from tests.triton_matrix import *  # noqa: F403
from tests.triton_matrix_large import *  # noqa: F403
