"""A step of a model as an engine replays it: one graph, a call a layer, each layer with keys and values of its own.

A call that is timed alone pays for its launch, for the events around it, and for a memory that runs empty at both ends:
a kernel that only reads half a GiB takes 4 us longer than its bytes. In a step that is so once, and a launch may begin
while the one before it ends. L2 is as cold: of a layer's keys nothing is left when its turn comes again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.paged import PagedInputs
from benchmarks.peers import Attention, AttentionInputs, Peer
from benchmarks.variants import Variant, captured
from benchmarks.workloads import Workload

# As many layers as 16 GiB of keys and values make. With 8 of 3 GiB, as many more for a kernel that only reads, and all
# of it given back before the next case, that one was slow: its reads, too, by an eighth.
MOST_LAYERS, LAYER_BYTES = 16, 16 * 2**30
IN_LAYERS = "in layers"
# Of the largest output: others merge splits in the order in which they end. Ours have to be equal to the bit.
TOLERANCE_OF_PEERS = 2**-6


def layers_of(workload: Workload) -> int:
    """As many as LAYER_BYTES hold, but two at least, so that each finds L2 full of another's keys."""
    return max(2, min(MOST_LAYERS, LAYER_BYTES // max(workload.min_bytes, 1)))


def in_layers(
    make: Callable[[AttentionInputs | PagedInputs], Attention],
    workload: Workload,
    inputs: AttentionInputs | PagedInputs,
    tolerance: float = 0.0,
) -> Attention:
    """One graph of the calls of all layers, as `make` makes them. `calls` says how many; the output is the first
    layer's, and a ValueError where another layer's differs by more than `tolerance` times its largest number."""
    layers = [replace(inputs, k=inputs.k.clone(), v=inputs.v.clone()) for _ in range(layers_of(workload))]
    calls = [make(layer) for layer in layers]
    first, *others = [call().float() for call in calls]
    difference = max(float((other - first).abs().max()) for other in others)
    if not difference <= tolerance * float(first.abs().max()):
        raise ValueError(f"layers of equal keys and values differ by {difference:.3g}")
    return graph_of(calls)


def graph_of(calls: list[Attention]) -> Attention:
    """Replays the calls one after another, and says how many there are in `calls`. The output is the first one's."""
    step = captured(lambda: [call() for call in calls])

    def replay() -> torch.Tensor:
        return step()[0]

    replay.calls = len(calls)
    return replay


class VariantInLayers(Variant):
    """Our calls in one graph, which share a plan where it is made once."""

    def make(self, workload: Workload, inputs: AttentionInputs | PagedInputs) -> Attention:
        plan = self.plan(workload, inputs) if self.planning == "cached" else None
        return in_layers(lambda layer: self.call(workload, layer, plan), workload, inputs)


class PeerInLayers(Peer):
    """Another implementation's calls in one graph."""

    def __init__(self, peer: Peer):
        self._peer = peer
        self.name, self.module = f"{peer.name} {IN_LAYERS}", peer.module
        self.takes_pages = peer.takes_pages

    def supports(self, workload: Workload) -> bool:
        return self._peer.supports(workload)

    def make(self, workload: Workload, inputs: AttentionInputs | PagedInputs) -> Attention:
        return in_layers(lambda layer: self._peer.make(workload, layer), workload, inputs, TOLERANCE_OF_PEERS)
