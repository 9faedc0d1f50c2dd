"""Small CuTe DSL kernels with known results, each in a module of its own: what the emulator is judged by.

They are ordinary programs: the same calls run on a GPU, and on a machine without one under the emulator. `catalogue.py`
lists the cases of an architecture, `python -m tests.emulated.kernels` compiles them all.
"""
