"""Batch invariance end to end: a mode for whole models, and attention in Triton where there is no CuTe kernel."""
