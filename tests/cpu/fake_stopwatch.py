"""A clock for benchmarks that run without a GPU."""

from __future__ import annotations


class FakeStopwatch:
    """A device whose clock moves only when a candidate says so; it notes the order of what happens."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[str] = []

    def prepare(self) -> None:
        self.now += 100.0  # what the flush takes must not be counted
        self.events.append("flush")

    def mark(self) -> float:
        return self.now

    def synchronize(self) -> None:
        self.events.append("sync")

    def seconds_between(self, start: float, end: float) -> float:
        return end - start

    def candidate(self, name: str, *seconds: float):
        calls = iter(range(10**9))

        def call() -> None:
            self.events.append(name)
            self.now += seconds[next(calls) % len(seconds)]

        return call
