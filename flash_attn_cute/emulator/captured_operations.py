"""torch's own operations in the capture of a CUDA graph: recorded beside the kernel launches, and repeated with them.

On a GPU an operation in a capture computes nothing until the graph runs. Here one that writes into a CUDA tensor is
only recorded; one that makes a new tensor is computed, for its shape, and again into the same memory whenever the graph
runs. What the program does to tensors of the host happens at once, and once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flash_attn_cute.emulator.graphs import Graphs
from flash_attn_cute.emulator.launch import EmulatorError

_CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Recorder(TorchDispatchMode):
    """Dispatch and not function mode: it sees what the bodies of custom operators compute as well."""

    def __init__(self, graphs: Graphs, is_marked: Callable[[Tensor], bool]):
        super().__init__()
        self._graphs, self._is_marked = graphs, is_marked

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prim", "prims"):
            with self:  # a custom operator: its parts are recorded, not itself
                return func.redispatch(_CPU_KERNEL, *args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and self._is_marked(args[0]):
            raise EmulatorError("a value on CUDA is read in the capture of a CUDA graph, before it is computed")
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs)
        result = func(*args, **kwargs)
        if func.is_view:
            return result
        # The memory that they have now: one that is moved, to be aligned, has its new memory filled from there.
        made = [tensor.detach() for tensor in _tensors(result)]
        for tensor in made:
            self._graphs.keep(tensor)
        if made and "empty" not in func._schema.name:
            self._graphs.record(lambda: _compute_into(made, func, args, kwargs))
        return result

    def _in_place(self, func, args, kwargs):
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        written = [given[a.name] for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        marked = [self._is_marked(tensor) for tensor in _tensors(written)]
        if any(marked):
            self._graphs.record(lambda: _run(func, args, kwargs))
        if all(marked):
            return None if not func._schema.returns else written[0] if len(written) == 1 else tuple(written)
        return func(*args, **kwargs)


def _run(func: Callable, args: tuple, kwargs: dict) -> Any:
    with torch._C.DisableTorchFunction(), torch.no_grad():
        return func(*args, **kwargs)


def _compute_into(made: list[Tensor], func: Callable, args: tuple, kwargs: dict) -> None:
    with torch._C.DisableTorchFunction(), torch.no_grad():
        for target, value in zip(made, _tensors(func(*args, **kwargs)), strict=True):
            target.copy_(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
