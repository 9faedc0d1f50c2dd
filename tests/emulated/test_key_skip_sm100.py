"""Hidden KV tiles are skipped in the Blackwell forward, in the emulator: by one query tile and by two."""

from tests.emulated.key_skip_forward import (  # noqa: F401
    LENGTHS_K,
    LENGTHS_Q,
    assert_neutral,
    masked_tensors,
    test_splits,
)


def test_two_query_tiles(emulation, monkeypatch):
    options = {"causal": True, "pack_gqa": True}
    emulation.reschedule("random", 1)
    assert_neutral(monkeypatch, masked_tensors(LENGTHS_Q, LENGTHS_K, key_mask_heads=4), **options)
    # The first 64 tokens, which are a query tile, see the first KV tile alone.
    tensors = masked_tensors([200], [264], key_mask_heads=4)
    tensors.key_mask[:128], tensors.key_mask[128:] = False, True
    assert_neutral(monkeypatch, tensors, **options)
    emulation.reschedule("in-order")


def test_one_query_tile_and_cluster_launch_control(emulation, monkeypatch):
    options = {"window_size": (500, 20), "scheduler": "clc"}
    build = {"key_mask_heads": 2, "head_dim": 256, "heads": 2}
    emulation.reschedule("random", 1)
    assert_neutral(monkeypatch, masked_tensors(LENGTHS_Q, LENGTHS_K, **build), **options)
    emulation.reschedule("in-order")
