"""What a process-wide mode makes of the number of splits that a call asks for; without one, nothing.

Calls and plans both ask here, so a plan fits the calls it is made for. `batch_invariant.mode` sets it.
"""

from __future__ import annotations

from typing import NamedTuple


class SplitPolicy(NamedTuple):
    """num_splits and seqlen_k_per_split of every call that does not give seqlen_k_per_split itself: that is invariant
    already, and stays."""

    num_splits: int
    seqlen_k_per_split: int | None = None


_current: SplitPolicy | None = None


def use(policy: SplitPolicy | None) -> None:
    """For all calls from now on, in all threads; None leaves calls as they are."""
    global _current
    _current = policy


def current() -> SplitPolicy | None:
    return _current


def splits_of(num_splits: int, seqlen_k_per_split: int | None, backend: str) -> tuple[int, int | None]:
    """(num_splits, seqlen_k_per_split) of a call. Triton never splits, so there is nothing to decide for it."""
    if _current is None or seqlen_k_per_split is not None or backend == "triton":
        return num_splits, seqlen_k_per_split
    if type(num_splits) is not int or num_splits < 0:  # validation says so better
        return num_splits, seqlen_k_per_split
    return _current
