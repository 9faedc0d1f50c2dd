"""Plays a scheduler over a ragged batch on the SMs of a GPU that is not there.

The model: an SM works on one work tile at a time. A tile takes its arithmetic (all rows of the query tile, wanted or
not, at an SM's share of the matmul rate, and plan.TILE_OVERHEAD KV tiles more), or its keys at the rate at which one
SM can read, whichever is longer. Keys come from memory once a sequence and KV head; tiles that share them share the
traffic. Tiles in flight share the memory's bandwidth by max-min fairness: who needs little gets it, the others get
equal parts. Nothing else is in it: no cache that forgets, no clock that falls, no latency, no second launch that merges
splits. It ranks schedulers and shows where SMs idle; it does not predict a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks.workloads import Workload
from flash_attn_cute import tuning
from flash_attn_cute.plan import (
    TILE_OVERHEAD,
    Lengths,
    Plan,
    PlannedTile,
    PlanParameters,
    plan_sequences,
    visits_of_tile,
    work_tiles,
)
from flash_attn_cute.scheduler_metadata import UNBOUNDED

SCHEDULERS = ("static", "dynamic", "planned", "planned-whole", "longest-first")


@dataclass(frozen=True)
class Gpu:
    """What the model knows of a GPU."""

    num_sms: int = 132
    matmul_flops_per_s: float = 787e12  # measured: benchmarks/results/2026-11-21-forward-h200.md
    read_bytes_per_s: float = 4.65e12  # measured, likewise
    # Assumed, not measured: 64 bytes a clock between L2 and an SM, at 1.755 GHz.
    sm_bytes_per_s: float = 112e9
    l2_bytes: int = 60 << 20


class TileCost(NamedTuple):
    seconds: float  # alone on the GPU
    bytes: float  # from memory


class Interval(NamedTuple):
    """A tile on an SM, in seconds."""

    sm: int
    start: float
    end: float
    tile: PlannedTile


@dataclass(frozen=True)
class Timeline:
    scheduler: str
    num_sms: int
    intervals: list[Interval]
    ideal: float  # seconds: all SMs computing all the time, or the memory busy all the time, whichever is longer

    @property
    def makespan(self) -> float:
        return max((interval.end for interval in self.intervals), default=0.0)

    @property
    def efficiency(self) -> float:
        return self.ideal / self.makespan if self.intervals else 1.0

    @property
    def idle(self) -> float:
        """Part of the SMs' time in which they have no tile."""
        busy = sum(interval.end - interval.start for interval in self.intervals)
        return 1.0 - busy / (self.num_sms * self.makespan) if self.intervals else 0.0


class Simulation:
    """One workload on one GPU, in the units of the Hopper forward kernel."""

    def __init__(self, workload: Workload, gpu: Gpu, max_splits: int = 256):
        self.workload, self.gpu = workload, gpu
        w = workload
        group = w.heads // w.heads_kv
        mean = w.total_q / max(w.batch, 1)
        tiling = tuning.query_tiling("sm_90a", w.head_dim, w.head_dim_v, group, None, mean, w.max_q)
        self.tile, packed = tiling.tile, tiling.packed
        section = tuning.section_of_tiles(gpu.num_sms) if w.causal else (1, 0)
        self.parameters = PlanParameters(
            heads=w.heads_kv if packed else w.heads,
            heads_per_kv_load=1 if packed else group,
            tokens_per_tile=tiling.tokens_per_tile,
            tile_n=self.tile.tile_n,
            window_left=UNBOUNDED,
            window_right=0 if w.causal else UNBOUNDED,
            num_sms=gpu.num_sms,
            max_splits=max_splits,
            section_heads=section[0],
            section_tiles=section[1],
            l2_keys=gpu.l2_bytes // 2 // (2 * (w.head_dim + w.head_dim_v)),
        )
        self.sequences = [Lengths(q, q, k) for q, k in zip(w.lens_q, w.lens_k, strict=True)]

    def plan(self, max_splits: int | None = None) -> Plan:
        p = self.parameters
        if max_splits is not None:
            p = PlanParameters(**{**vars(p), "max_splits": max_splits})
        return plan_sequences(self.sequences, [], p)

    def tiles(self, scheduler: str) -> list[PlannedTile]:
        """Work tiles in the order in which they are handed out."""
        heads, causal = self.parameters.heads, self.workload.causal
        if scheduler == "planned":
            return work_tiles(self.plan(), heads, longest_first=causal)
        whole = self.plan(max_splits=1)
        if scheduler == "planned-whole":
            return work_tiles(whole, heads, longest_first=causal)
        # Without a plan: sequence after sequence, which is the same walk through each.
        by_sequence = sorted(work_tiles(whole, heads, longest_first=causal), key=lambda tile: tile.batch)
        if scheduler == "longest-first":
            return sorted(by_sequence, key=lambda tile: -self.cost(tile).seconds)
        return by_sequence

    def cost(self, tile: PlannedTile) -> TileCost:
        w, p = self.workload, self.parameters
        sequence = self.sequences[tile.batch]
        visits = visits_of_tile(sequence, tile.m_block * p.tokens_per_tile, p)
        share = -(-visits // tile.num_splits)
        visits = max(min(share, visits - tile.split * share), 0)
        flops = 2 * self.tile.tile_m * p.tile_n * (w.head_dim + w.head_dim_v) * (visits + TILE_OVERHEAD)
        key_bytes = 2 * visits * p.tile_n * (w.head_dim + w.head_dim_v)
        sharing = -(-sequence.rows_q // p.tokens_per_tile) * p.heads_per_kv_load
        compute = flops * self.gpu.num_sms / self.gpu.matmul_flops_per_s
        return TileCost(max(compute, key_bytes / self.gpu.sm_bytes_per_s), key_bytes / sharing)

    def run(self, scheduler: str) -> Timeline:
        tiles = self.tiles(scheduler)
        costs = [self.cost(tile) for tile in tiles]
        compute = sum(cost.seconds for cost in costs) / self.gpu.num_sms
        ideal = max(compute, sum(cost.bytes for cost in costs) / self.gpu.read_bytes_per_s)
        intervals = self._play(tiles, costs, is_static=scheduler == "static")
        return Timeline(scheduler, self.gpu.num_sms, intervals, ideal)

    def _play(self, tiles: list[PlannedTile], costs: list[TileCost], is_static: bool) -> list[Interval]:
        sms = min(self.gpu.num_sms, len(tiles))
        current = np.arange(sms)  # tile of each SM
        left = np.ones(sms)  # part of it that is still to be done
        seconds = np.array([costs[i].seconds for i in current], dtype=float)
        demand = np.array([costs[i].bytes / costs[i].seconds for i in current], dtype=float)
        started, is_busy = np.zeros(sms), np.ones(sms, dtype=bool)
        now, taken, intervals = 0.0, sms, []
        while is_busy.any():
            speed = _speeds(np.where(is_busy, demand, 0.0), self.gpu.read_bytes_per_s)
            until = np.where(is_busy, left * seconds / speed, np.inf)
            step = until.min()
            now += step
            left -= np.where(is_busy, step * speed / seconds, 0.0)
            for sm in np.flatnonzero(until <= step * (1 + 1e-9)):
                intervals.append(Interval(int(sm), float(started[sm]), now, tiles[current[sm]]))
                following = current[sm] + sms if is_static else taken
                taken += 0 if is_static else 1
                is_busy[sm] = following < len(tiles)
                if is_busy[sm]:
                    current[sm], left[sm], started[sm] = following, 1.0, now
                    seconds[sm] = costs[following].seconds
                    demand[sm] = costs[following].bytes / costs[following].seconds
        return intervals


def _speeds(demand: np.ndarray, bandwidth: float) -> np.ndarray:
    """How fast each SM goes, 1 being alone on the GPU, when demands on a bandwidth are met by max-min fairness."""
    if demand.sum() <= bandwidth:
        return np.ones_like(demand)
    ordered = np.sort(demand)
    # Serving the n smallest in full leaves each of the others this much; the first who wants more sets the level.
    remaining = bandwidth - np.concatenate(([0.0], np.cumsum(ordered)[:-1]))
    levels = remaining / np.arange(len(ordered), 0, -1)
    level = levels[np.argmax(ordered > levels)]
    return np.where(demand > level, level / np.maximum(demand, level), 1.0)
