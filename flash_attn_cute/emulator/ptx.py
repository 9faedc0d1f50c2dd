"""Reads PTX text into a plain syntax tree: what is written, with line numbers, and no opinion about what it means.

The grammar covered is what compilers emit and what people write in inline assembly: module variables, entries with
parameters, scoped register and label declarations, predicates, vector operands, address expressions. Meaning (types,
widths, which instruction exists) belongs to the assembler.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class PtxSyntaxError(ValueError):
    """The text is not PTX as this parser knows it; the message carries the line."""


@dataclass(frozen=True)
class Vector:
    """`{a, b, c}`: registers or immediates that are read or written together."""

    items: tuple


@dataclass(frozen=True)
class Address:
    """`[base+offset]` or, for tensor instructions, `[base, {coordinates}]`; base is a name or an integer."""

    base: str
    offset: int = 0
    coordinates: Vector | None = None


@dataclass(frozen=True)
class Pair:
    """`%r1|%p1`: an instruction's second result written beside its first."""

    first: str
    second: str


@dataclass(frozen=True)
class Instruction:
    """One statement: `@!%p1 add.s32 %r1, %r2, 3;` with its scope, so that names resolve where they were written."""

    line: int
    opcode: tuple[str, ...]
    operands: tuple
    guard: str | None
    negated: bool
    scope: Scope

    @property
    def name(self) -> str:
        return ".".join(self.opcode)


@dataclass
class Scope:
    """A pair of braces: its registers and labels, then those of the scope around it."""

    parent: Scope | None
    number: int
    registers: dict[str, str] = field(default_factory=dict)  # name -> type, e.g. "b32"
    families: list[tuple[str, int, str]] = field(default_factory=list)  # `%r<10>`: prefix, count, type
    vectors: dict[str, Vector] = field(default_factory=dict)  # `.v4` registers: name -> the registers of its parts
    labels: dict[str, int] = field(default_factory=dict)  # name -> index of the next instruction

    def find_register(self, name: str) -> tuple[Scope, str] | None:
        """The scope that declares `name`, and its type; None where no enclosing scope does."""
        scope = self
        while scope is not None:
            if name in scope.registers:
                return scope, scope.registers[name]
            for prefix, count, kind in scope.families:
                suffix = name[len(prefix) :]
                if name.startswith(prefix) and suffix.isdigit() and int(suffix) < count:
                    return scope, kind
            scope = scope.parent
        return None

    def find_vector(self, name: str) -> Vector | None:
        scope = self
        while scope is not None:
            if name in scope.vectors:
                return scope.vectors[name]
            scope = scope.parent
        return None

    def find_label(self, name: str) -> int | None:
        scope = self
        while scope is not None:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.parent
        return None


@dataclass(frozen=True)
class Variable:
    """A variable in a state space; `size` 0 with `extern` is the launch's dynamic shared memory."""

    space: str
    name: str
    align: int
    size: int
    kind: str
    initial: bytes | None = None
    extern: bool = False


@dataclass
class Entry:
    """One kernel, or a device function: `results` are what a function returns."""

    name: str
    parameters: list[Variable]
    results: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)

    def parameter_layout(self) -> tuple[list[int], int]:
        """Each parameter's byte offset and the total size, by the alignment rules of the ABI."""
        offsets, end = [], 0
        for parameter in self.parameters:
            end = -(-end // parameter.align) * parameter.align
            offsets.append(end)
            end += parameter.size
        return offsets, end


@dataclass
class Module:
    version: str = ""
    target: str = ""
    variables: list[Variable] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    functions: dict[str, Entry] = field(default_factory=dict)


TYPE_BYTES = {
    **{kind: 1 for kind in ("b8", "u8", "s8")},
    **{kind: 2 for kind in ("b16", "u16", "s16", "f16", "bf16")},
    **{kind: 4 for kind in ("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "pred")},
    **{kind: 8 for kind in ("b64", "u64", "s64", "f64", "f32x2")},
    "b128": 16,
}

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_LABEL = re.compile(r"\s*([A-Za-z_$%][\w$]*)\s*:(?!:)")
_VARIABLE = re.compile(
    r"(?P<prefix>(?:\.(?:visible|extern|weak|common)\s+)*)\.(?P<space>shared|global|const|local|param)\s*"
    r"(?P<attributes>(?:\.(?:align\s+\d+|attribute\([^)]*\)|ptr|global|shared|const|local)\s*)*)"
    r"\.(?P<kind>\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?(?P<name>[\w$%]+)\s*(?P<dims>(?:\[[^\]]*\])*)\s*"
    r"(?:=\s*(?P<initial>.*))?$",
    re.DOTALL,
)
_ENTRY = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.(?P<what>entry|func)\b\s*(?P<rest>.*)$", re.DOTALL)


def parse(text: str) -> Module:
    """The module that `text` describes."""
    return _Parser(text).module()


class _Parser:
    """Walks the text once. A statement ends at `;`; a brace opens a scope only where a statement could begin."""

    def __init__(self, text: str):
        # Comments become blanks of the same shape, so that lines keep their numbers.
        self.text = _COMMENT.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), text)
        self.position = 0
        self.line = 1
        self.result = Module()
        self.scopes = 0

    def module(self) -> Module:
        while True:
            statement, terminator, line = self._next()
            if terminator == "":
                if statement:
                    raise PtxSyntaxError(f"line {line}: statement without an end: {statement[:60]!r}")
                return self.result
            if terminator == "{":
                self._block(statement, line)
            elif statement:
                self._module_statement(statement, line)

    def _next(self) -> tuple[str, str, int]:
        """The text up to the next `;`, scope brace or end; at module level a header's brace ends its statement."""
        start = self.position
        text = self.text
        depth = 0
        while self.position < len(text):
            found = _STOP.search(text, self.position)
            if found is None:
                break
            mark = found.group()
            self.position = found.end()
            begun = text[start : found.start()].strip()
            if mark in "([":
                depth += 1
            elif mark in ")]":
                depth -= 1
            elif mark == ";" and depth == 0:
                return self._cut(start, found.start(), ";")
            elif mark == "{" and depth == 0:
                if "=" in begun:  # an initialiser, not a body
                    self.position = text.index("}", self.position) + 1
                else:
                    return self._cut(start, found.start(), "{")
            elif mark == "}" and depth == 0:
                return self._cut(start, found.start(), "}")
        self.position = len(text)
        return self._cut(start, len(text), "")

    def _cut(self, start: int, end: int, terminator: str) -> tuple[str, str, int]:
        raw = self.text[start:end]
        lead = len(raw) - len(raw.lstrip())
        line = self.line + raw.count("\n", 0, lead)
        self.line += raw.count("\n") + self.text.count("\n", end, self.position)
        statement = raw.strip()
        # Module directives (.version, .target, .file) end with their line, not with a semicolon.
        while statement.startswith((".version", ".target", ".address_size", ".file")):
            directive, _, rest = statement.partition("\n")
            self._directive(directive)
            line += 1 + len(rest[: len(rest) - len(rest.lstrip())].split("\n")) - 1
            statement = rest.strip()
        return statement, terminator, line

    def _directive(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name == ".version":
            self.result.version = value.strip()
        elif name == ".target":
            self.result.target = value.strip()

    def _module_statement(self, statement: str, line: int) -> None:
        if _ENTRY.match(statement) or statement.startswith((".alias", ".pragma", ".loc ")):
            return  # a declaration without a body
        self.result.variables.append(_variable(statement, line))

    def _block(self, header: str, line: int) -> None:
        found = _ENTRY.match(header)
        if not found:
            self._skip_block()  # debug sections
        elif found["what"] == "entry":
            entry = _entry_header(found["rest"], line)
            self.result.entries[entry.name] = entry
            self._body(entry, Scope(None, 0))
        else:
            function = _function_header(found["rest"], line)
            self.result.functions[function.name] = function
            self.scopes += 1
            self._body(function, Scope(None, self.scopes))

    def _skip_block(self) -> None:
        depth = 1
        while depth:
            found = re.compile(r"[{}]").search(self.text, self.position)
            if found is None:
                raise PtxSyntaxError("a block without an end")
            depth += 1 if found.group() == "{" else -1
            self.line += self.text.count("\n", self.position, found.end())
            self.position = found.end()

    def _body(self, entry: Entry, scope: Scope) -> None:
        text, position = self.text, self.position
        line = self.line
        while True:
            found = _BLANK.match(text, position)
            line += text.count("\n", position, found.end())
            position = found.end()
            if position >= len(text):
                raise PtxSyntaxError(f"kernel {entry.name} has no end")
            mark = text[position]
            if mark == "{":
                self.scopes += 1
                scope = Scope(scope, self.scopes)
                position += 1
                continue
            if mark == "}":
                position += 1
                scope = scope.parent
                if scope is None:
                    break
                continue
            label = _LABEL.match(text, position)
            if label:
                scope.labels[label[1]] = len(entry.instructions)
                line += text.count("\n", position, label.end())
                position = label.end()
                continue
            if text.startswith((".loc ", ".loc\t", ".file"), position):
                position = text.find("\n", position)
                continue
            end = text.find(";", position)
            if end < 0:
                raise PtxSyntaxError(f"line {line}: statement without an end")
            self._statement(entry, scope, text[position:end].strip(), line)
            line += text.count("\n", position, end)
            position = end + 1
        self.position, self.line = position, line

    def _statement(self, entry: Entry, scope: Scope, statement: str, line: int) -> None:
        if not statement or statement.startswith(".pragma"):
            return
        if statement.startswith(".reg"):
            _declare_registers(scope, statement, line)
        elif statement.startswith(".branchtargets") or ".branchtargets" in statement[:80]:
            names = statement.split(".branchtargets", 1)[1]
            label = max(scope.labels, key=lambda name: scope.labels[name])
            entry.branch_targets[label] = [name.strip() for name in names.split(",")]
        elif statement.startswith("."):
            entry.variables.append(_variable(statement, line))
        else:
            entry.instructions.append(_instruction(statement, line, scope))


_STOP = re.compile(r"[;{}()\[\]]")
_BLANK = re.compile(r"[\s;]*")
_DIRECTIVE = re.compile(r"\.(\w+)\s+([\d,\s]+)")


def _function_header(text: str, line: int) -> Entry:
    results = []
    if text.startswith("("):
        results = [_variable(item.strip(), line) for item in text[1 : text.index(")")].split(",") if item.strip()]
        text = text[text.index(")") + 1 :].strip()
    function = _entry_header(text, line)
    function.results = results
    return function


def _entry_header(text: str, line: int) -> Entry:
    name = re.match(r"[\w$%]+", text)
    if not name:
        raise PtxSyntaxError(f"line {line}: an entry without a name")
    opened, closed = text.find("("), text.rfind(")")
    parameters = []
    if opened >= 0:
        for item in text[opened + 1 : closed].split(","):
            if item.strip():
                parameters.append(_variable(item.strip(), line))
    entry = Entry(name.group(), parameters)
    for found in _DIRECTIVE.finditer(text[closed + 1 :]):
        entry.directives[found[1]] = tuple(int(value) for value in found[2].split(",") if value.strip())
    return entry


def _variable(statement: str, line: int) -> Variable:
    found = _VARIABLE.match(statement)
    if not found:
        raise PtxSyntaxError(f"line {line}: not a variable that is understood: {statement[:80]!r}")
    kind = found["kind"]
    if kind not in TYPE_BYTES:
        raise PtxSyntaxError(f"line {line}: variable of unknown type .{kind}")
    unit = TYPE_BYTES[kind]
    align = re.search(r"\.align\s+(\d+)", found["attributes"] or "")
    count, extern = 1, "extern" in (found["prefix"] or "")
    for dimension in re.findall(r"\[([^\]]*)\]", found["dims"]):
        if dimension.strip():
            count *= int(dimension, 0)
        else:
            count = 0
    initial = _initial_bytes(found["initial"], unit, kind) if found["initial"] else None
    if initial is not None:
        initial = initial.ljust(unit * count, b"\0")
    return Variable(
        found["space"], found["name"], int(align[1]) if align else unit, unit * count, kind, initial, extern
    )


def _initial_bytes(text: str, unit: int, kind: str) -> bytes:
    values = [item.strip() for item in text.strip().strip("{}").split(",") if item.strip()]
    out = b""
    for value in values:
        number = parse_immediate(value)
        if number is None:
            raise PtxSyntaxError(f"initialiser {value!r} is not a number")
        out += (number & ((1 << (8 * unit)) - 1)).to_bytes(unit, "little")
    return out


def _declare_registers(scope: Scope, statement: str, line: int) -> None:
    found = re.match(r"\.reg\s*(?:\.v(\d)\s*)?\.(\w+)\s+(.*)$", statement, re.DOTALL)
    if not found:
        raise PtxSyntaxError(f"line {line}: {statement!r}")
    length, kind = int(found[1] or 0), found[2]
    for name in found[3].split(","):
        name = name.strip()
        if length:
            scope.vectors[name] = Vector(tuple(f"{name}.{part}" for part in "xyzw"[:length]))
            scope.registers.update(dict.fromkeys(scope.vectors[name].items, kind))
            continue
        family = re.match(r"(.*)<(\d+)>$", name)
        if family:
            scope.families.append((family[1], int(family[2]), kind))
        else:
            scope.registers[name] = kind


_GUARD = re.compile(r"@\s*(!?)\s*([\w$%]+)\s+")


def _instruction(statement: str, line: int, scope: Scope) -> Instruction:
    guard, negated = None, False
    found = _GUARD.match(statement)
    if found:
        guard, negated = found[2], found[1] == "!"
        statement = statement[found.end() :]
    parts = statement.split(None, 1)
    operands = tuple(_operand(text) for text in _split(parts[1])) if len(parts) > 1 else ()
    operands = tuple(scope.find_vector(x) or x if isinstance(x, str) else x for x in operands)
    return Instruction(line, tuple(parts[0].split(".")), operands, guard, negated, scope)


def _split(text: str) -> list[str]:
    """Operands at the top level: commas inside brackets and braces belong to one operand."""
    items, depth, start = [], 0, 0
    for position, mark in enumerate(text):
        if mark in "{[(":
            depth += 1
        elif mark in "}])":
            depth -= 1
        elif mark == "," and depth == 0:
            items.append(text[start:position].strip())
            start = position + 1
    items.append(text[start:].strip())
    return items


def _operand(text: str):
    if text.startswith("("):  # of a call: what it takes or returns
        return Vector(tuple(item for item in _split(text[1:-1]) if item))
    if text.startswith("{"):
        return Vector(tuple(_operand(item) for item in _split(text[1:-1])))
    if text.startswith("["):
        return _address(text[1:-1])
    if "|" in text:
        first, second = text.split("|")
        return Pair(first.strip(), second.strip())
    return text


_OFFSET = re.compile(r"^(.*?)\s*([+-])\s*(-?\w+)$")


def _address(text: str) -> Address:
    parts = _split(text)
    coordinates = _operand(parts[1]) if len(parts) > 1 else None
    base, offset = parts[0].strip(), 0
    found = _OFFSET.match(base)
    if found and found[1]:
        value = parse_immediate(found[3])
        if value is not None:
            base, offset = found[1].strip(), value if found[2] == "+" else -value
    return Address(base, offset, coordinates)


def parse_immediate(text: str, wide: bool = False) -> int | None:
    """The bits of a literal: integers as themselves, 0f/0d literals as their encoding; None for what is no literal.

    A decimal fraction is a double in PTX; `wide` says whether the 64-bit encoding is wanted or that of a float.
    """
    import struct

    text = text.strip()
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text) or re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"[+-]?\s*(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
        body = text.rstrip("U").replace(" ", "")
        if re.fullmatch(r"[+-]?0[0-7]+", body):
            return int(body, 8)
        return int(body, 0)
    if re.fullmatch(r"[+-]?\d+\.\d*([eE][+-]?\d+)?", text):
        return int.from_bytes(struct.pack("<d" if wide else "<f", float(text)), "little")
    return None
