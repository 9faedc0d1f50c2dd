"""Key-value caches on a Hopper GPU."""

from tests.kv_cache_matrix import *  # noqa: F403
