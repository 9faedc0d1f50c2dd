"""Benchmarks: the workloads, the clock, the peers, and the sweeps that put them together."""
