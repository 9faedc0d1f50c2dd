"""The Triton kernels, in Triton's interpreter where there is no GPU: TRITON_INTERPRET=1 pytest tests/triton

The variable is read when a kernel is defined, so these tests have a process of their own (scripts/test.sh).
"""

import os
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return
    folder = Path(__file__).parent
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="there is no GPU, and TRITON_INTERPRET=1 is not set"))
