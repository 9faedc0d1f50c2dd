"""Variable-length attention kernels for NVIDIA GPUs, written in CuTe DSL."""
