"""From how often each warp ran each instruction to what is reported: instructions by class, retried waits, roles.

A warp-instruction is one PTX instruction that at least one lane of a warp executed. Two things are kept apart from it:
`skipped`, where the guard held in no lane (an issue slot on the hardware too, a different one after ptxas), and
`retried`, what a warp executed only because it waits for a barrier by asking again. How often it asks depends on the
order of events here and on time there, and a GPU suspends a warp in try_wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .assembler import OPCODES, Program
from .costs import CLASSES

_WAITS = (OPCODES["mbarrier_wait"][0],)
_BRANCH = OPCODES["bra"][0]
_LOOP = 4  # instructions between a wait and the branch back to it, at most
_ALIKE = 0.75  # of the instructions that either of two warps executed, both did: one role


@dataclass(frozen=True)
class Counts:
    """Of one launch: arrays of (warp's index in its CTA, PTX instruction), summed over CTAs."""

    program: Program
    executed: np.ndarray  # retries are taken out
    skipped: np.ndarray
    retried: np.ndarray

    @classmethod
    def of(cls, program: Program, executed: np.ndarray, skipped: np.ndarray) -> Counts:
        """`executed` and `skipped` are the core's, by row of `program.code`."""
        retried = np.zeros_like(executed)
        for first, last in retry_loops(program):
            for row in range(first, last + 1):
                # The branch back runs once a retry, and so does all that it goes back over but the way out.
                if not _leaves(program, row, first, last):
                    retried[:, row] = np.minimum(executed[:, last], executed[:, row])
        rows = [row for row, _ in program.source]
        return cls(program, (executed - retried)[:, rows], skipped[:, rows], retried[:, rows])

    def by_class(self) -> np.ndarray:
        """(warp, class)."""
        kinds = np.array([self.program.code[row]["cls"] for row, _ in self.program.source])
        return np.stack([self.executed[:, kinds == k].sum(axis=1) for k in range(len(CLASSES))], axis=1)

    def by_name(self) -> dict[str, list[int]]:
        """Executions by warp of each instruction name (`fma.rn.ftz.f32x2`), the most frequent first."""
        names: dict[str, np.ndarray] = {}
        for column, (_, instruction) in enumerate(self.program.source):
            counts = self.executed[:, column]
            if counts.any():
                names[instruction.name] = names.get(instruction.name, 0) + counts
        return {name: counts.tolist() for name, counts in sorted(names.items(), key=lambda item: -item[1].sum())}

    def alike(self) -> list[tuple[int, ...]]:
        """Warps in groups that do the same work: the same setmaxnreg, and most instructions that either one runs."""
        ran = self.executed > 0
        registers = [column for column, (_, i) in enumerate(self.program.source) if i.opcode[0] == "setmaxnreg"]
        groups: list[list[int]] = []
        for warp in range(len(ran)):
            for group in groups:
                first = ran[group[0]]
                either = int((first | ran[warp]).sum())
                same = int((first & ran[warp]).sum()) >= _ALIKE * either
                if same and (first[registers] == ran[warp][registers]).all():
                    group.append(warp)
                    break
            else:
                groups.append([warp])
        return [tuple(group) for group in groups]


def retry_loops(program: Program) -> list[tuple[int, int]]:
    """(first, last) rows of each short loop around a wait: `last` branches back to `first`."""
    code, found = program.code, []
    for wait in np.flatnonzero(np.isin(code["op"], _WAITS)):
        for row in range(wait + 1, min(wait + 1 + _LOOP, len(code))):
            if code[row]["op"] == _BRANCH and wait - _LOOP <= code[row]["target"] <= wait:
                found.append((int(code[row]["target"]), row))
                break
    return found


def _leaves(program: Program, row: int, first: int, last: int) -> bool:
    instruction = program.code[row]
    return instruction["op"] == _BRANCH and not first <= instruction["target"] <= last
