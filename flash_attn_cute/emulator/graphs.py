"""CUDA graphs: what a program launches and computes during a capture is kept, and runs when the graph is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flash_attn_cute.emulator.launch import EmulatorError, LaunchRecord


class Graph:
    """A capture's nodes in order, and the memory that they use: a CUDA graph's private pool."""

    def __init__(self):
        self.nodes: list[Callable[[], None]] = []
        self.memory: list[Any] = []


class Graphs:
    """`operations` is entered while a capture lasts: it records what torch computes meanwhile."""

    def __init__(self, execute: Callable[[LaunchRecord], None]):
        self._execute = execute
        self._recording: Graph | None = None
        self._graphs: list[Graph] = []
        self.operations: Any = None

    @property
    def capturing(self) -> bool:
        return self._recording is not None

    def launch(self, record: LaunchRecord) -> None:
        """A kernel launch of the program: now, or into the graph that is being captured."""
        if self._recording is None:
            self._execute(record)
        else:
            self.record(lambda: self._execute(record))

    def record(self, node: Callable[[], None]) -> None:
        self._recording.nodes.append(node)

    def keep(self, memory: Any) -> None:
        self._recording.memory.append(memory)

    def begin(self) -> None:
        if self._recording is not None:
            raise EmulatorError("a CUDA graph is being captured already")
        self._recording = Graph()
        if self.operations is not None:
            self.operations.__enter__()

    def end(self) -> int:
        """The captured graph's handle, a position from 1 on."""
        if self._recording is None:
            raise EmulatorError("no CUDA graph is being captured")
        if self.operations is not None:
            self.operations.__exit__(None, None, None)
        self._graphs.append(self._recording)
        self._recording = None
        return len(self._graphs)

    def size(self, graph: int) -> int:
        return len(self._graphs[graph - 1].nodes)

    def replay(self, graph: int) -> None:
        for node in self._graphs[graph - 1].nodes:
            node()
