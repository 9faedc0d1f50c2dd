"""The simulated GPU: every tile is played once, nothing is faster than possible, and plans do what they are for."""

import numpy as np
import pytest

from benchmarks import workloads
from benchmarks.schedule_simulation import SCHEDULERS, Gpu, Simulation, _speeds


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_tile_is_played_once_and_no_sm_does_two_things(scheduler):
    workload = workloads.ragged("mixed", [300, 1, 1, 700], [300, 9000, 40, 700], heads=4, heads_kv=2)
    simulation = Simulation(workload, Gpu(num_sms=5))
    timeline = simulation.run(scheduler)
    assert sorted(i.tile for i in timeline.intervals) == sorted(simulation.tiles(scheduler))
    for sm in range(5):
        own = sorted(i for i in timeline.intervals if i.sm == sm)
        assert all(a.end <= b.start + 1e-12 for a, b in zip(own, own[1:], strict=False))
    assert 0.0 < timeline.efficiency <= 1.0 + 1e-9 and 0.0 <= timeline.idle < 1.0


def test_bandwidth_is_shared_fairly_and_used_up():
    demand = np.array([1.0, 10.0, 3.0, 0.0])
    speeds = _speeds(demand, 8.0)
    assert speeds[[0, 2, 3]].tolist() == [1.0, 1.0, 1.0] and speeds[1] == pytest.approx(0.4)
    assert (demand * speeds).sum() == pytest.approx(8.0)
    assert _speeds(demand, 20.0).tolist() == [1.0] * 4
    assert (_speeds(np.full(4, 10.0), 8.0) * 10.0).tolist() == [2.0] * 4


def test_plans_overlap_prefill_with_decode_and_split_what_is_alone():
    mixed = Simulation(workloads.prefill_among_decodes(), Gpu())
    assert mixed.run("planned").makespan < 0.9 * mixed.run("dynamic").makespan
    alone = Simulation(workloads.ragged("one", [1], [131072]), Gpu())
    # A single query is computed at six times an SM's part of the bandwidth: 8 of 132 SMs are that much slower than all.
    assert alone.run("planned").makespan < 0.17 * alone.run("planned-whole").makespan
