"""Key-side mask and bias in the Blackwell forward, in the emulator.

A kernel takes some four seconds to compile: here is what differs most, and with FLASH_ATTN_CUTE_ALL_CASES=1 also all
that the Hopper forward is tested with.
"""

import pytest
import torch

from tests.attention_cases import attention, build_tensors
from tests.emulated import key_bias_forward as shared
from tests.emulated.opt_in import ALL_CASES

if ALL_CASES:
    from tests.emulated.key_bias_forward import *  # noqa: F403


@pytest.mark.parametrize(
    "name",
    [
        "under a soft cap and beside a sink",
        "a window on both sides, a query tile of two",  # pieces of V; each query tile passes by tiles of the other
        "d256",  # one query tile, two score buffers
        "pages of 3",
    ],
)
def test_a_mask_and_a_bias_equal_the_reference(emulation, name):
    shared.check_case(emulation, name)


def test_saying_nothing_changes_no_bit(emulation):
    """With a head dimension whose keys and values come in pieces, where without a bias they do not."""
    tensors = build_tensors([300, 1, 7], [400, 129, 5], **(shared.PLAIN | {"head_dim": 128}))
    rows = tensors.k.shape[0]
    keeps = torch.ones(rows, 4, dtype=torch.bool, device=shared.CUDA)
    zeros = torch.zeros(rows, 2, device=shared.CUDA)
    expected = attention(tensors, causal=True)
    shared.assert_same(attention(tensors._replace(key_mask=keeps, key_bias=zeros), causal=True), expected)


def test_hidden_nan_does_not_spread(emulation):
    shared.check_hidden_nan()


def test_splits_of_a_bias_equal_the_reference(emulation):
    shared.check_splits()
