"""Replaces attributes for a while and puts them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ABSENT = object()


class Patches:
    def __init__(self):
        self._undo: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        # What the owner itself holds, not what it inherits: an inherited attribute comes back by deleting ours.
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        if before is _ABSENT:
            self.on_restore(lambda: delattr(owner, name))
        else:
            self.on_restore(lambda: setattr(owner, name, before))

    def on_restore(self, action: Callable[[], None]) -> None:
        self._undo.append(action)

    def restore(self) -> None:
        """Undoes everything, the last first."""
        while self._undo:
            self._undo.pop()()
