"""Runs compiled CuTe DSL kernels on a CPU. Importing this package imports neither torch nor cutlass."""

from flash_attn_cute.emulator.launch import Allocation, EmulatorError, EngineOptions, LaunchRecord

__all__ = ["Allocation", "EmulatorError", "EngineOptions", "LaunchRecord"]
