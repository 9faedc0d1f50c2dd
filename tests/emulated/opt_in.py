"""What CI leaves out of the emulated tests: a kernel takes seconds to compile, and some take the paths of others.

FLASH_ATTN_CUTE_ALL_CASES=1 runs everything.
"""

import os
from collections.abc import Iterable

ALL_CASES = os.environ.get("FLASH_ATTN_CUTE_ALL_CASES") == "1"


def of_ci(cases: Iterable, left_out: Iterable) -> list:
    """The cases without those left out, or all of them where all are asked for."""
    left_out = [] if ALL_CASES else list(left_out)
    return [case for case in cases if case not in left_out]
