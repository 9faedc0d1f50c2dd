"""Planning and compilation of the forward kernels, neither of which needs a GPU."""

import dataclasses
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flash_attn_cute import launch, tuning
from flash_attn_cute.problem import AttentionTensors, Problem
from flash_attn_cute.scheduler_metadata import batch_shape

BF16, F32 = torch.bfloat16, torch.float32
HOPPER = launch.Target("sm_90a", 132)


def packed_problem(lengths=(100, 28), heads=8, kv_heads=2, head_dim=128, head_dim_v=None, **options) -> Problem:
    total = sum(lengths)
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    q = torch.empty(total, heads, head_dim, dtype=BF16)
    k = torch.empty(total, kv_heads, head_dim, dtype=BF16)
    v = torch.empty(total, kv_heads, head_dim_v or head_dim, dtype=BF16)
    return Problem.from_arguments(AttentionTensors(q, k, v, ends, ends), **options)


def batched_problem(batch=2, seqlen=300, heads=4, **options) -> Problem:
    q, k, v = (torch.empty(batch, seqlen, heads, 128, dtype=BF16) for _ in range(3))
    return Problem.from_arguments(AttentionTensors(q, k, v), **options)


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------


def test_key_has_no_values():
    """One kernel serves every length, batch size, scale, window size and number of KV heads."""
    options = {"softmax_scale": 0.3, "window_size": (5, 6), "softcap": 3.0, "pack_gqa": True}
    key = launch.plan(packed_problem(**options), HOPPER).key
    for name, value in {"softmax_scale": 2.0, "window_size": (50, 7), "softcap": 9.5}.items():
        assert launch.plan(packed_problem(**{**options, name: value}), HOPPER).key == key, name
    larger = packed_problem(lengths=(1000,) * 9, heads=16, kv_heads=4, **options)
    assert launch.plan(larger, HOPPER).key == key


def test_key_tells_generated_code_apart():
    plain = packed_problem(pack_gqa=False)
    changed = [
        {"dtype": torch.float16},
        {"head_dim": 64, "head_dim_v": 64},
        {"head_dim": 192},
        {"num_heads": 16},
        {"pack_gqa": True},
        {"causal": True, "window_right": 0},
        {"window_left": 3},
        {"window_right": 3},
        {"softcap": 2.0},
        {"q_packed": False, "seqlen_q": 100},
        {"k_packed": False},
        {"has_seqused_q": True},
        {"has_seqused_k": True},
        {"sink_dtype": torch.float32},
        {"sink_dtype": BF16},
        {"return_lse": True},
        {"scheduler": "static"},
        {"max_seqlen_q": 1},
        {"has_leftpad_k": True},
        {"has_cache_batch_idx": True},
        *({f"{side}_mask_heads": heads} for side in ("key", "query") for heads in (1, 2, 8)),
        *({f"{side}_bias_heads": 1, f"{side}_bias_dtype": kind} for side in ("key", "query") for kind in (BF16, F32)),
        *({"page_size": size, "max_pages": 4} for size in (128, 64, 4)),
    ]
    problems = [plain, *(dataclasses.replace(plain, **fields) for fields in changed)]
    keys = {launch.plan(p, HOPPER).key for p in problems}
    assert len(keys) == len(problems)


@pytest.mark.parametrize(
    ("page_size", "span"), [(1, 0), (4, 0), (8, 8), (48, 16), (100, 0), (128, 128), (256, 128), (1000, 8)]
)
def test_pages_are_loaded_in_the_longest_spans(page_size, span):
    paged = dataclasses.replace(packed_problem([64]), k_packed=False, page_size=page_size, max_pages=4)
    assert launch.plan(paged, HOPPER).key.page_span == span
    decode = dataclasses.replace(paged, max_seqlen_q=1)
    assert launch.plan(decode, HOPPER).key.page_span == (span if span >= 32 else 0)
    assert launch.plan(paged, HOPPER, tma_reaches_keys=False).key.page_span == 0


def test_a_plan_decides_the_tile_of_its_calls():
    problem = packed_problem([1] * 8, heads=8, kv_heads=2)
    few = launch.query_tiling("sm_90a", 128, 128, 4, None, 1, 1)
    assert few.few_rows and few.tokens_per_tile == 16
    assert not launch.plan(dataclasses.replace(problem, total_q=100), HOPPER).key.few_rows
    assert launch.query_tiling("sm_90a", 128, 128, 4, None, 1, 100, few.tokens_per_tile) == few


@pytest.mark.parametrize("rows", [1, 4])
def test_numbers_leave_room_for_every_tile_of_a_packed_batch(rows):
    """The monotone numbering of tile_scheduler.TileOrder gives every sequence its tiles, whatever the lengths."""
    tile_m = tuning.forward_tile("sm_90a", 128, 128).tile_m
    generator = torch.Generator().manual_seed(rows)
    for _ in range(200):
        lengths = torch.randint(0, 400, (int(torch.randint(1, 40, (), generator=generator)),), generator=generator)
        starts = [0, 0, *lengths.cumsum(0).tolist()]  # of the padding before, of each sequence, of the padding behind
        numbers = [start * rows // tile_m + index for index, start in enumerate(starts)]
        problem = packed_problem(lengths.tolist(), heads=rows, kv_heads=1, pack_gqa=rows > 1)
        end = launch.plan(problem, HOPPER).num_tiles
        for first, following, length in zip(numbers[1:], [*numbers[2:], end], [*lengths.tolist(), 0], strict=True):
            assert following - first >= -(-length * rows // tile_m)


def test_scheduler_follows_the_work():
    assert not launch.plan(batched_problem(batch=64), HOPPER).key.dynamic
    assert launch.plan(batched_problem(batch=64, causal=True), HOPPER).key.dynamic
    # The size of the batch decides nothing: another kernel would be compiled in the middle of serving.
    assert launch.plan(batched_problem(batch=1, causal=True), HOPPER).key.dynamic
    assert not launch.plan(batched_problem(batch=64, causal=True, scheduler="static"), HOPPER).key.dynamic
    single = launch.plan(batched_problem(batch=64, scheduler="single_tile"), HOPPER)
    assert single.grid == single.num_tiles == 64 * 4 * 3
    assert launch.plan(batched_problem(batch=64), HOPPER).grid == HOPPER.num_sms


@pytest.mark.parametrize(
    "group, rows", [(1, 1), (2, 2), (3, 4), (5, 8), (7, 8), (8, 8), (64, 64), (128, 128), (129, 0)]
)
def test_packed_rows_divide_the_tile(group, rows):
    assert tuning.packed_rows(group, 128) == rows


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"scheduler": "clc"}, "clc"),
        ({"softmax_scale": -1.0}, "softmax_scale=-1.0"),
        ({"head_dim": 128, "head_dim_v": 64}, r"\(128, 64\)"),
        ({"heads": 256, "kv_heads": 1, "pack_gqa": True}, "256 query heads"),
    ],
)
def test_unsupported_names_the_combination(options, reason):
    import re

    assert re.search(reason, launch.unsupported(packed_problem(**options), "sm_90a"))


def test_supported():
    assert launch.unsupported(packed_problem(causal=True, softcap=3.0, window_size=(4, 4)), "sm_90a") is None
    assert launch.unsupported(packed_problem(head_dim=192, head_dim_v=128), "sm_90a") is None
    assert launch.unsupported(packed_problem(head_dim=40), "sm_90a") is None


@pytest.mark.parametrize("dims", tuning.SM90_TILES, ids=str)
def test_hopper_tiles_fit(dims):
    barriers_and_mailbox = 1024
    assert tuning.SM90_TILES[dims].smem_bytes + barriers_and_mailbox <= tuning.SMEM_BYTES


@pytest.mark.parametrize("dims", tuning.SM100_TILES, ids=str)
def test_blackwell_tiles_fit(dims):
    tile = tuning.SM100_TILES[dims]
    assert tile.smem_bytes + tuning.SM100_SMALL_BYTES <= tuning.SMEM_BYTES
    assert tile.tensor_memory_columns <= 512
    # What is in use at one time: the values of one KV tile and the keys of the next.
    assert tile.kv_stages > tile.k_pieces + tile.v_pieces
    for softmax, *others in (tile.registers, tile.registers_beside_bias, tile.registers_beside_bias_of_queries):
        assert 128 * (tile.query_tiles * softmax + sum(others)) <= 64 * 1024


@pytest.mark.parametrize("dims", tuning.SM100_TILES, ids=str)
def test_blackwell_tiles_leave_room_for_a_bias(dims):
    plain = tuning.SM100_TILES[dims]
    for vectors in range(1, 16):
        tile = plain.beside_bias(vectors)
        small = tuning.SM100_SMALL_BYTES + tuning.SM100_BIAS_BARRIERS
        assert tile.smem_bytes + small + tuning.bias_bytes(tile, vectors) <= tuning.SMEM_BYTES
        assert tile.kv_stages > tile.k_pieces + tile.v_pieces
        # Plans are made for either, and rows have the same bits.
        assert (tile.tile_m, tile.tile_n, tile.polynomial_pairs) == (plain.tile_m, plain.tile_n, plain.polynomial_pairs)
    assert plain.beside_bias(128) is None


@pytest.mark.parametrize(
    "view, fits",
    [
        (lambda: torch.zeros(4, 2, 64, dtype=BF16), True),
        (lambda: torch.zeros(2, 4, 64, dtype=BF16).transpose(0, 1), True),
        (lambda: torch.zeros(4, 2, 67, dtype=BF16)[..., :64], False),
        (lambda: torch.zeros(1, 1, 67, dtype=BF16)[..., :64], False),  # contiguous, whatever its strides
        (lambda: torch.zeros(4, 1, 64, dtype=BF16).expand(4, 2, 64), False),
        (lambda: torch.zeros(4, 2, 72, dtype=BF16).flatten()[1 : 1 + 512].view(4, 2, 64), False),
    ],
)
def test_what_tma_cannot_address_is_copied(view, fits):
    x = view()
    copy = launch._for_tma(x, launch._strides_suit_tma(x))
    assert (copy is x) == fits
    assert launch._for_tma(copy, launch._strides_suit_tma(copy)) is copy and torch.equal(copy, x)


# ---------------------------------------------------------------------------------------------------------------------
# Compilation
# ---------------------------------------------------------------------------------------------------------------------

PLAIN = launch.KernelKey(
    "sm_90a",
    "forward",
    "bf16",
    128,
    128,
    1,
    False,
    False,
    False,
    False,
    False,
    True,
    True,
    False,
    False,
    None,
    True,
    True,
)
BATCHED = {"varlen_q": False, "varlen_k": False, "dynamic": False}
GATHERED = {"varlen_k": False, "seqused_k": True, "page_span": 0}
CONFIGURATIONS = {
    "d128-packed-full": {},
    "d128-packed-causal-gqa4": {"causal": True, "qheads_per_kvhead": 4, "packed": True},
    "d128-batched-full": BATCHED,
    "d128-batched-seqused-window-sink-softcap": {
        **BATCHED,
        "seqused_q": True,
        "seqused_k": True,
        "window_left": True,
        "window_right": True,
        "sink": "bf16",
        "softcap": True,
    },
    "d128-causal-left-fp16-no-lse": {"causal": True, "window_left": True, "dtype": "fp16", "lse": False},
    "d64-causal": {"head_dim": 64, "head_dim_v": 64, "causal": True},
    "d40-causal": {"head_dim": 40, "head_dim_v": 40, "causal": True},
    "d96-causal": {"head_dim": 96, "head_dim_v": 96, "causal": True},
    "d192-128-causal": {"head_dim": 192, "causal": True},
    "d192-full": {"head_dim": 192, "head_dim_v": 192},
    "d256-causal-gqa7": {"head_dim": 256, "head_dim_v": 256, "causal": True, "qheads_per_kvhead": 7, "packed": True},
    "d256-window": {"head_dim": 256, "head_dim_v": 256, "window_left": True, "window_right": True},
    "d128-gathered-causal-gqa4": {**GATHERED, "causal": True, "qheads_per_kvhead": 4, "packed": True},
    "d128-masked-causal-gqa4": {
        "causal": True,
        "qheads_per_kvhead": 4,
        "packed": True,
        "key_mask": "kv",
        "planned": True,
    },
    "d64-gathered-causal": {**GATHERED, "head_dim": 64, "head_dim_v": 64, "causal": True},
}

KEY_SIDE = {"key_mask": "query", "key_bias": "query", "key_bias_dtype": "bf16", "qheads_per_kvhead": 8, "packed": True}
# Masks and biases of keys: those that came closest to spilling. Only the first is compiled without
# FLASH_ATTN_CUTE_COMPILE_ALL=1.
BLACKWELL_CONFIGURATIONS = {
    "d128-of-keys-gathered-causal-gqa8": {**KEY_SIDE, **GATHERED, "causal": True},
    "d128-of-keys-causal-gqa8": {**KEY_SIDE, "causal": True},
    "d128-of-keys-window-sink-softcap-gqa8": {
        **KEY_SIDE,
        "window_left": True,
        "window_right": True,
        "sink": "bf16",
        "softcap": True,
    },
    "d64-of-keys": {
        "key_bias": "all",
        "key_bias_dtype": "fp32",
        "head_dim": 64,
        "head_dim_v": 64,
        "causal": True,
    },
    "d96-of-keys": {"key_mask": "all", "head_dim": 96, "head_dim_v": 96},
    "d64-of-keys-splits": {
        "key_mask": "all",
        "key_bias": "all",
        "key_bias_dtype": "bf16",
        "head_dim": 64,
        "head_dim_v": 64,
        "varlen_q": False,
        "varlen_k": False,
        "planned": True,
        "splits": True,
        "combine_warps": 4,
        "sink": "bf16",
    },
    "d192-128-of-keys-causal-gqa8": {**KEY_SIDE, "head_dim": 192, "causal": True},
    "d256-of-keys-gathered-gqa8": {**KEY_SIDE, **GATHERED, "head_dim": 256, "head_dim_v": 256},
}
# Masks and biases of each query.
OF_QUERIES = {
    "d128-of-queries-causal-gqa4": {
        "causal": True,
        "qheads_per_kvhead": 4,
        "packed": True,
        "query_mask": "all",
        "query_bias": "query",
        "query_bias_dtype": "bf16",
    },
    "d128-of-queries-and-keys": {"key_bias": "kv", "key_bias_dtype": "bf16", "query_mask": "query", "causal": True},
}
BLACKWELL_CONFIGURATIONS |= {
    name.replace("d128", "d64"): configuration | {"head_dim": 64, "head_dim_v": 64}
    for name, configuration in OF_QUERIES.items()
}

_COMPILE = """
import sys
from flash_attn_cute import launch
launch.compile_kernel(launch.KernelKey(*eval(sys.argv[1])))
"""


def stack_bytes(cubin: bytes) -> list[int]:
    """Frame sizes that an ELF cubin declares for its functions (EIATTR_FRAME_SIZE of its .nv.info section)."""
    section_offset, entry_size, entries, names_index = struct.unpack_from("<Q10xHHH", cubin, 40)
    headers = [struct.unpack_from("<IIQQQQ", cubin, section_offset + i * entry_size) for i in range(entries)]
    names = headers[names_index][4]
    sizes = []
    for name, _, _, _, offset, length in headers:
        if cubin[names + name :].startswith(b".nv.info\0"):
            position = offset
            while position < offset + length:
                kind, attribute, size = struct.unpack_from("<BBH", cubin, position)
                if (kind, attribute) == (4, 0x11):
                    sizes.append(struct.unpack_from("<I", cubin, position + 8)[0])
                position += 4 + (size if kind == 4 else 0)
    return sizes


# Without FLASH_ATTN_CUTE_COMPILE_ALL=1: on Hopper those that others stand for are left out,
STOOD_FOR = ("d128-packed-full", "d128-batched-full", "d40-causal", "d96-causal", "d192-full")
HOPPER_NAMES = [name for name in CONFIGURATIONS | OF_QUERIES if name not in STOOD_FOR]
# and on Blackwell only a few that differ most are taken. With it, all, on both of its architectures.
BLACKWELL = [
    ("sm_100a", "d128-packed-causal-gqa4"),
    ("sm_100a", "d128-batched-seqused-window-sink-softcap"),
    ("sm_100a", "d192-128-causal"),
    ("sm_100a", "d256-window"),
    ("sm_100a", "d128-gathered-causal-gqa4"),
    ("sm_103a", "d64-causal"),
    ("sm_100a", "d128-of-keys-gathered-causal-gqa8"),
    ("sm_100a", "d128-of-queries-causal-gqa4"),
]
if os.environ.get("FLASH_ATTN_CUTE_COMPILE_ALL") == "1":
    named = CONFIGURATIONS | OF_QUERIES | BLACKWELL_CONFIGURATIONS
    BLACKWELL = [(architecture, name) for architecture in ("sm_100a", "sm_103a") for name in named]
    HOPPER_NAMES = [*CONFIGURATIONS, *OF_QUERIES]


@pytest.mark.parametrize("architecture, name", [*(("sm_90a", name) for name in HOPPER_NAMES), *BLACKWELL])
def test_compiles_without_spills(architecture, name, tmp_path):
    """In a process of its own: the architecture and the dump are read from the environment once."""
    configurations = CONFIGURATIONS | OF_QUERIES | BLACKWELL_CONFIGURATIONS
    key = PLAIN._replace(architecture=architecture, **configurations[name])
    environment = os.environ | {
        "CUTE_DSL_ARCH": architecture,
        "CUTE_DSL_KEEP": "cubin",
        "CUTE_DSL_DUMP_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    subprocess.run([sys.executable, "-c", _COMPILE, repr(tuple(key))], env=environment, check=True, timeout=300)
    (cubin,) = tmp_path.glob("*.cubin")
    frames = stack_bytes(cubin.read_bytes())
    assert frames and not any(frames)


def test_a_batch_that_cannot_be_split_takes_no_kernel_that_splits():
    def key(lengths, max_seqlen_k):
        problem = packed_problem(lengths, heads=32, kv_heads=8, num_splits=0, max_seqlen_k=max_seqlen_k)
        planning = batch_shape(problem, HOPPER, None)
        return launch.plan(problem, HOPPER, planning.parameters).key

    prefill = key([2048] * 32, 2048)
    assert prefill.planned and not prefill.splits
    assert key([2048] * 32, 1 << 20).splits
    assert key([1] * 64, 8192).splits


@pytest.mark.parametrize("bias_vectors", [0, 1, 8])
@pytest.mark.parametrize("tile", tuning.SM90_FEW_ROWS_TILES.values(), ids=str)
def test_ctas_of_the_merge_find_shared_memory_beside_a_few_row_tile(tile, bias_vectors):
    used = tile.smem_bytes + tuning.SM90_SMALL_BYTES + tuning.bias_bytes(tile, bias_vectors)
    launched = tile.smem_beside_merge(bias_vectors) or used
    assert used <= launched <= tuning.SMEM_BYTES
    taken = launched + 1024
    carve_out = next(size for size in tuning.SM90_CARVE_OUTS if taken <= size)
    # 4 KiB of weights, 1 KiB to exchange chains, and the KiB that every CTA takes.
    assert carve_out - taken >= 6 * 1024
