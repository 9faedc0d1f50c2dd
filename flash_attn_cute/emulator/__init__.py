"""Runs compiled CuTe DSL kernels on a CPU. Importing this does not import the DSL, which reads its settings then."""

from flash_attn_cute.emulator.launch import Allocation, EmulatorError, EngineOptions, LaunchRecord
from flash_attn_cute.emulator.session import Session, current_session, emulate

__all__ = ["Allocation", "EmulatorError", "EngineOptions", "LaunchRecord", "Session", "current_session", "emulate"]
