"""CUDA graphs of kernel launches: what is captured is kept, and runs when the graph is launched."""

from __future__ import annotations

from collections.abc import Callable

from flash_attn_cute.emulator.launch import EmulatorError, LaunchRecord


class Graphs:
    def __init__(self, execute: Callable[[LaunchRecord], None]):
        self._execute = execute
        self._recording: list[LaunchRecord] | None = None
        self._graphs: list[list[LaunchRecord]] = []

    @property
    def capturing(self) -> bool:
        return self._recording is not None

    def launch(self, record: LaunchRecord) -> None:
        """A kernel launch of the program: now, or into the graph that is being captured."""
        if self._recording is None:
            self._execute(record)
        else:
            self._recording.append(record)

    def begin(self) -> None:
        if self._recording is not None:
            raise EmulatorError("a CUDA graph is being captured already")
        self._recording = []

    def end(self) -> int:
        """The captured graph's handle, a position from 1 on."""
        if self._recording is None:
            raise EmulatorError("no CUDA graph is being captured")
        self._graphs.append(self._recording)
        self._recording = None
        return len(self._graphs)

    def size(self, graph: int) -> int:
        return len(self._graphs[graph - 1])

    def replay(self, graph: int) -> None:
        for record in self._graphs[graph - 1]:
            self._execute(record)
