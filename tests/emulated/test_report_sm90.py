"""The forward's cost in the report: the same however warps and copies are ordered."""

import torch

from flash_attn_cute import flash_attn_varlen_func

LENGTH, HEAD_DIM = 512, 64


def test_costs_do_not_depend_on_the_order_of_events(emulation):
    q, k, v = (torch.zeros(LENGTH, 1, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    cu_seqlens = torch.tensor([0, LENGTH], dtype=torch.int32, device="cuda")
    costs = []
    for schedule, seed in (("in-order", 0), ("random", 0), ("random", 1), ("delayed", 0)):
        emulation.reschedule(schedule, seed)
        flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, LENGTH, LENGTH, causal=True)
        report = emulation.launches[-1].as_dict(tiles=10)
        costs.append({name: report[name] for name in ("per_tile", "instructions", "roles", "shared")})
        del costs[-1]["per_tile"]["skipped"]  # the exits of waits, each time they are tried
    emulation.reschedule("in-order")
    assert all(cost == costs[0] for cost in costs)
    tile = costs[0]["per_tile"]
    assert tile["mma_cycles"] * 2048 >= 128 * 128 * 2 * HEAD_DIM and tile["special_operations"] >= 512
