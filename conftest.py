"""Gives pytest its --emulate option: pytest --emulate sm_90a tests/emulated

Triton's interpreter (TRITON_INTERPRET=1 pytest tests/triton) multiplies blocks with NumPy, and there a row has to have
the same bits wherever it stands in its block. OpenBLAS's kernels for CPUs with FMA (Haswell, Zen) round rows at the end
of a block otherwise than those within; its kernels without do not. It reads the variable when NumPy is imported.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    os.environ["OPENBLAS_CORETYPE"] = "Sandybridge"

pytest_plugins = ["flash_attn_cute.emulator.pytest_plugin"]
