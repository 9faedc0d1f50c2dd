"""What calls become: of the module's own device functions, and of two that the driver provides (printf and assert).

A function's code stands once, behind the kernel's, and each function has a register for the address to return to: CUDA
code for GPUs that calls itself is not known. Arguments and results are local memory, by name.
"""

from __future__ import annotations

from .assembler import Assembler, Unsupported, lowers
from .ptx import Instruction, Variable, Vector

LOCAL = 3  # as in lower_memory.SPACES


@lowers("call")
def call(a: Assembler, i: Instruction) -> None:
    lists = [operand for operand in i.operands if isinstance(operand, Vector)]
    name = next(operand for operand in i.operands if not isinstance(operand, Vector))
    first_is_result = isinstance(i.operands[0], Vector)
    results = lists[0].items if first_is_result else ()
    arguments = lists[-1].items if len(lists) > first_is_result else ()
    if name == "vprintf":
        a.emit("vprintf", [_local(a, arguments[0]), _local(a, arguments[1])])
        return
    if name == "__assertfail":
        a.emit("assert_fail", [_local(a, x) for x in arguments[:4]])
        return
    function = a.module.functions.get(name)
    if function is None:
        raise Unsupported(f"of {name}, which is not in the module")
    for argument, parameter in zip(arguments, function.parameters, strict=True):
        _copy(a, argument, parameter.name, parameter)
    if name not in a.called:
        a.called[name] = a.new_slot()
    a.calls.append((a.emit("call", [a.called[name]]), name))
    for result, declared in zip(results, function.results, strict=True):
        _copy(a, declared.name, result, declared)


@lowers("ret")
def leave(a: Assembler, i: Instruction) -> None:
    if a.body is a.entry:
        a.emit("exit")
    else:
        a.emit("return", [a.called[a.body.name]])


def _local(a: Assembler, name: str) -> int:
    if name not in a.local_offset:
        raise Unsupported(f"with {name!r} passed in a register")
    return a.constant(a.local_offset[name])


def _copy(a: Assembler, source: str, to: str, what: Variable) -> None:
    """A parameter's bytes from one name to another, in pieces as large as its size allows."""
    start, end = _local(a, source), _local(a, to)
    log2 = next(n for n in (3, 2, 1, 0) if what.size % (1 << n) == 0)
    slot = a.new_slot(2)
    for offset in range(0, what.size, 1 << log2):
        sub = log2 | 1 << 4 | LOCAL << 9
        a.emit("ld", [start], sub=sub | (log2 == 3) << 12, imm=offset, pool=[slot])
        a.emit("st", [end], sub=sub, imm=offset, pool=[slot])
