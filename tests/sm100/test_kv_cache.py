"""Key-value caches on a Blackwell GPU."""

from tests.kv_cache_matrix import *  # noqa: F403
