"""Synchronisation instructions in PTX text: where they are, whether they ran, and the text without one of them.

Every rewrite keeps each line where it was, so that an error's PTX line means the same in a mutant as in the kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Deleted: arrivals, waits, barriers, fences, commits. A predicate that a deleted wait would write is set instead.
_DELETED = (
    r"mbarrier\.(?:arrive|arrive_drop|expect_tx|complete_tx|try_wait|test_wait)",
    r"(?:bar|barrier)\.(?:warp\.|cta\.|cluster\.)?(?:sync|arrive|wait)",
    r"fence",
    r"membar",
    r"wgmma\.(?:fence|commit_group|wait_group)",
    r"cp\.async\.(?:bulk\.)?(?:commit_group|wait_group|wait_all|mbarrier\.arrive)",
    r"cp\.reduce\.async\.bulk\.(?:commit_group|wait_group)",
    r"tcgen05\.(?:wait|commit|fence)",
)
# Weakened: accesses that order others. They still happen, relaxed.
_ORDERED = r"(?:ld|st|atom|red|multimem)\.[\w.:]*?\b(?:acquire|release|acq_rel)"
_SITE = re.compile(
    rf"(?<![\w.%$])(?P<guard>@\s*!?\s*[\w$%]+\s+)?(?P<opcode>(?:{'|'.join(_DELETED)}|{_ORDERED})\b[\w.:]*)"
    r"(?P<operands>[^;{}]*(?:\{[^;{}]*\}[^;{}]*)*);"
)
_WEAK_ORDER = re.compile(r"\.(?:acquire|release|acq_rel)\b")
_HEADER = re.compile(r"\.(?:entry|func)\b[^{;]*")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_MODULE_END = re.compile(r"\.address_size[^\n]*\n")
MARKS = "emulator_executed_sites"


@dataclass(frozen=True)
class Site:
    """One synchronisation instruction of one kernel: `text[start:end]` is its statement, without the semicolon."""

    start: int
    end: int
    line: int
    guard: str  # "@%p1 ", or empty
    opcode: str
    operands: str

    @property
    def statement(self) -> str:
        return " ".join(f"{self.guard}{self.opcode} {self.operands}".split())

    @property
    def replacement(self) -> str:
        """What stands in the mutant instead."""
        if re.match(r"mbarrier\.(?:try|test)_wait", self.opcode):
            predicate = self.operands.split(",")[0].split("|")[0].strip()
            return f"{self.guard}setp.eq.u32 {predicate}, 0, 0"
        if re.match(_ORDERED, self.opcode):
            return f"{self.guard}{_WEAK_ORDER.sub('.relaxed', self.opcode)} {self.operands}"
        return ""

    @property
    def change(self) -> str:
        """What was done to it, in a word."""
        if re.match(_ORDERED, self.opcode):
            return "relaxed"
        return "passed" if self.replacement else "deleted"


def find_sites(text: str, entry: str) -> list[Site]:
    """The synchronisation instructions of a module's kernel, in the order of the text."""
    plain = _COMMENT.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), text)
    start, end = _body(plain, entry)
    return [
        Site(
            found.start(),
            found.end() - 1,
            plain.count("\n", 0, found.start()) + 1,
            found["guard"] or "",
            found["opcode"],
            found["operands"].strip(),
        )
        for found in _SITE.finditer(plain, start, end)
    ]


def _body(text: str, entry: str) -> tuple[int, int]:
    """Where the kernel's text begins and where the next function's does."""
    headers = list(_HEADER.finditer(text))
    for position, header in enumerate(headers):
        if re.match(rf"\.entry\s+{re.escape(entry)}(?![\w$%])", header.group()):
            last = position + 1 == len(headers)
            return header.end(), len(text) if last else headers[position + 1].start()
    raise ValueError(f"the module has no entry {entry!r}")


def without(text: str, site: Site) -> str:
    """The module with that one instruction deleted or weakened."""
    lines = "\n" * (text.count("\n", site.start, site.end) - site.replacement.count("\n"))
    return text[: site.start] + site.replacement + lines + text[site.end :]


def marked(text: str, sites: list[Site]) -> str:
    """The module with a byte of the variable MARKS for each site, which becomes 1 when a thread executes it."""
    pieces, position = [], 0
    for number, site in enumerate(sites):
        mark = f"{site.guard}st.global.b8 [{MARKS}+{number}], 1; "
        pieces += [text[position : site.start], mark]
        position = site.start
    body = "".join([*pieces, text[position:]])
    variable = f".global .align 4 .b8 {MARKS}[{max(len(sites), 1)}];"
    # At the start of the line that follows the last directive, so that no line moves.
    place = _MODULE_END.search(body)
    if place is None:
        raise ValueError("the module has no .address_size")
    return body[: place.end()] + variable + body[place.end() :]
