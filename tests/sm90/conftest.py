"""The Hopper matrix runs where there is a Hopper GPU, and says so where there is none.

Run it with `pytest tests/sm90 -n 8`: workers share compiled kernels through the disk cache.
"""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def _why_not() -> str | None:
    if not torch.cuda.is_available():
        return "needs a Hopper GPU: there is no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        return f"needs a Hopper GPU: {torch.cuda.get_device_name()} has compute capability {major}.{minor}"
    return None


def pytest_collection_modifyitems(items):
    reason = _why_not()
    if reason is None:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
