"""Our own call in its variants: which scheduler, planned where, split how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.peers import Attention, AttentionInputs
from benchmarks.workloads import Workload

if TYPE_CHECKING:
    from benchmarks.paged import PagedInputs


@dataclass(frozen=True)
class Variant:
    """`flash_attn_varlen_func` with one set of options.

    planning: "off" goes without a plan, "auto" lets the call decide and plan, "on" plans before each call, "cached"
    once for all calls, as the layers of a model share a plan. `graph` replays one captured call. seqlen_k_per_split:
    absolute boundaries of splits, the batch-invariant way to split.
    """

    name: str
    planning: str = "auto"
    num_splits: int = 1
    scheduler: str = "auto"
    graph: bool = False
    seqlen_k_per_split: int | None = None

    def make(self, workload: Workload, inputs: AttentionInputs | PagedInputs) -> Attention:
        metadata = {"off": False, "auto": None}.get(self.planning)
        if self.planning == "cached":
            metadata = self.plan(workload, inputs)
        call = self.call(workload, inputs, metadata)
        return captured(call) if self.graph else call

    def call(self, workload: Workload, inputs: AttentionInputs | PagedInputs, metadata: Any) -> Attention:
        """The eager call with this plan, or with one of its own each time where planning is "on"."""
        from flash_attn_cute import flash_attn_varlen_func

        arguments = inputs.varlen_arguments(workload) | dict(
            scheduler=self.scheduler, num_splits=self.num_splits, seqlen_k_per_split=self.seqlen_k_per_split
        )

        def call() -> torch.Tensor:
            current = self.plan(workload, inputs) if self.planning == "on" else metadata
            return flash_attn_varlen_func(inputs.q, inputs.k, inputs.v, scheduler_metadata=current, **arguments)

        return call

    def plan(self, workload: Workload, inputs: AttentionInputs | PagedInputs) -> Any:
        return plan(workload, inputs, self.num_splits, seqlen_k_per_split=self.seqlen_k_per_split)


def plan(
    workload: Workload,
    inputs: AttentionInputs | PagedInputs,
    num_splits: int,
    *,
    packed_q: bool = True,
    seqlen_k_per_split: int | None = None,
) -> Any:
    """The plan of a call over these inputs; `packed_q=False` for q as (batch, length, heads, dim)."""
    from flash_attn_cute import get_scheduler_metadata

    lengths = {name: tensor for name, tensor in inputs.lengths.items() if packed_q or name != "cu_seqlens_q"}
    return get_scheduler_metadata(
        workload.batch,
        workload.max_q,
        workload.max_k,
        workload.heads,
        workload.heads_kv,
        workload.head_dim,
        workload.head_dim_v,
        **lengths,
        total_q=workload.total_q if packed_q else None,
        causal=workload.causal,
        num_splits=num_splits,
        seqlen_k_per_split=seqlen_k_per_split,
    )


def captured(call: Attention) -> Attention:
    """Replays of one captured call. What the call compiles and allocates, it does before."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    # The graph reads what the call holds, its plan for one, and does not keep it alive.
    replay.captured = call
    return replay
