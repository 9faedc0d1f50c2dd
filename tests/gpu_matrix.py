"""GPU matrices run where there is a GPU of their generation, and say so where there is none."""

import os
from pathlib import Path

import pytest
import torch


def skip_without(generation: str, major: int, items: list, folder: Path) -> None:
    """Marks the items below `folder` as skipped unless the GPU has compute capability `major`.x."""
    reason = _why_not(generation, major)
    if reason is None:
        if "PYTEST_XDIST_WORKER" in os.environ:
            # The reference runs on the CPU: threads of all workers together were slower than one each, by far.
            torch.set_num_threads(1)
        return
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_not(generation: str, major: int) -> str | None:
    if not torch.cuda.is_available():
        return f"needs a {generation} GPU: there is no CUDA device"
    found = torch.cuda.get_device_capability()
    if found[0] != major:
        name = torch.cuda.get_device_name()
        return f"needs a {generation} GPU: {name} has compute capability {found[0]}.{found[1]}"
    return None
