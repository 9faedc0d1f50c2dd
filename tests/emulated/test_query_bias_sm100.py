"""A mask and a bias of each query in the Blackwell forward, in the emulator.

Here is what differs most from the Hopper forward, and with FLASH_ATTN_CUTE_ALL_CASES=1 also all that that one is tested
with.
"""

import pytest

from tests.emulated import query_bias_forward as shared
from tests.emulated.opt_in import ALL_CASES

if ALL_CASES:
    # pytest collects what a module has, by whatever name it came.
    from tests.emulated.query_bias_forward import *  # noqa: F403


@pytest.mark.parametrize(
    "name",
    [
        "a bias a query head of 3, packed",  # rows of a token that are no heads
        "under a soft cap and beside a sink",
        "d256",  # one query tile, two score buffers
        "pages of 3, both sides",  # a staged bias of keys before it
    ],
)
def test_a_mask_and_a_bias_of_each_query_equal_the_reference(emulation, name):
    shared.check_case(emulation, name)


def test_saying_nothing_of_each_query_changes_no_bit(emulation):
    shared.check_neutral()


def test_rows_without_a_key_left_and_hidden_nan(emulation):
    shared.check_hidden()


def test_splits_of_what_each_query_has(emulation):
    shared.check_splits()
