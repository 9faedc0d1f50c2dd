"""The Blackwell matrix runs where there is a Blackwell GPU, and says so where there is none.

Run it with `pytest tests/sm100 -n 8`: workers share compiled kernels through the disk cache.
"""

from pathlib import Path

from tests.gpu_matrix import skip_without


def pytest_collection_modifyitems(items):
    skip_without("Blackwell", 10, items, Path(__file__).parent)
