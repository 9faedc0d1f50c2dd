"""Variable-length attention kernels for NVIDIA GPUs, written in CuTe DSL."""

from flash_attn_cute.interface import Support, flash_attn_func, flash_attn_varlen_func, supports
from flash_attn_cute.kv_cache import flash_attn_with_kvcache, store_kv_cache
from flash_attn_cute.launch_combine import flash_attn_combine
from flash_attn_cute.scheduler_metadata import SchedulerMetadata, get_scheduler_metadata

__version__ = "0.1.0"
__all__ = [
    "SchedulerMetadata",
    "Support",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "store_kv_cache",
    "supports",
]
