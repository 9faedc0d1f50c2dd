"""Variable-length attention kernels for NVIDIA GPUs, written in CuTe DSL."""

from flash_attn_cute.interface import Support, flash_attn_func, flash_attn_varlen_func, supports

__version__ = "0.1.0"
__all__ = ["Support", "flash_attn_func", "flash_attn_varlen_func", "supports"]
