"""`get_scheduler_metadata`: plans a ragged batch, on the device in one launch, for any number of attention calls."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from flash_attn_cute import tuning
from flash_attn_cute.active_counts import active_counts, check_key_mask, keys_of_mask
from flash_attn_cute.active_tiles import SKIPPING, KeyTensors, ListShape
from flash_attn_cute.compile_cache import cache
from flash_attn_cute.launch_combine import Workspace, architecture_of
from flash_attn_cute.plan import MAX_SPLITS, Lengths, PlanParameters, plan_sequences
from flash_attn_cute.problem import INT32_MAX, Problem
from flash_attn_cute.split_policy import splits_of

UNBOUNDED = 1 << 30
MAX_BATCH = 32766
MAX_WORK_TILES = 1 << 30  # work tiles are numbered in int32, and interleaved in 30-bit fixed point
BACKENDS = ("auto", "cute", "emulator", "reference")
# A batch counts as ragged from this many sequences on, if its longest query is so many times the mean.
RAGGED_BATCH = 8
RAGGED_RATIO = 4
MANY_SEQUENCES, FEW_TOKENS = 1024, 32
# Query rows (tokens x heads) below which a launch is over before an order could matter.
ROWS_AN_SM = 256
# Part of L2 that keys may fill: the rest is queries, outputs and what is on its way.
L2_PART_FOR_KEYS = (1, 2)


class LengthTensors(NamedTuple):
    """The (B + 1,) and (B,) int32 tensors that give lengths; any of them may be absent."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    active_tiles: Tensor | None = None  # (B, groups) int32: KV tiles that a key mask leaves (active_tiles.ActiveTiles)


class Extents(NamedTuple):
    """What the shapes of a call say: rows of q and keys, of all sequences where packed, of each where not."""

    batch_size: int
    rows_q: int
    rows_k: int


@dataclass(frozen=True)
class SchedulerMetadata:
    """A plan, on the device. It may be used by any number of calls of the same lengths, one after another.

    A captured graph reads it, and its workspace, at every replay: keep it for as long.

    Fields by virtual index have an entry a sequence, in the order in which they are worked on, and two more where q is
    packed: the padding before the first sequence and behind the last, which is worked on last.
    """

    parameters: PlanParameters
    extents: Extents
    packed_q: bool
    entries: Tensor  # (N, 4) int32: plan.PlannedSequence
    cu_total_m_blocks: Tensor  # (N + 1,) int32, query tiles of a head before each entry
    cu_total_splits_m_blocks: Tensor  # (N + 1,) int32, work tiles of a head before each entry
    summary: Tensor  # (4,) int32: plan.PlanSummary
    tile_count_semaphore: Tensor  # (2,) int32, zero before and after every launch
    workspace: Workspace | None = None  # for the partial results of calls, where the plan may split

    @property
    def device(self) -> torch.device:
        return self.entries.device

    @property
    def virtual_batch_idx(self) -> Tensor:
        """(B,) int32: virtual index -> real index."""
        return self.entries[: self.extents.batch_size, 0]

    @property
    def num_m_blocks(self) -> Tensor:
        """(B,) int32, by virtual index: query tiles of a head."""
        return self.entries[: self.extents.batch_size, 1]

    @property
    def num_splits_dynamic(self) -> Tensor:
        """(B,) int32, by virtual index, at least 1."""
        return self.entries[: self.extents.batch_size, 2]

    @property
    def num_nheads_in_l2(self) -> Tensor:
        """(B,) int32, by virtual index: heads walked together so that their keys stay in L2."""
        return self.entries[: self.extents.batch_size, 3]

    @property
    def work(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What kernels read of it: tile_scheduler.PlannedWork."""
        return self.entries, self.cu_total_m_blocks, self.cu_total_splits_m_blocks, self.summary

    @property
    def shape(self) -> BatchShape:
        return BatchShape(self.parameters, self.extents, self.packed_q)

    @functools.cached_property
    def kind(self) -> PlanKind:
        """What of a plan decides how a call is launched."""
        return PlanKind(self.shape, self.device)

    @property
    def tiles_bound(self) -> int:
        """The most query tiles, of all heads, that a batch in these shapes can have."""
        return self.shape.tiles_bound

    @property
    def slots_bound(self) -> int:
        """The most partial results that a plan in these shapes can ask for: the size of the workspace."""
        return self.shape.slots_bound


class BatchShape(NamedTuple):
    """Everything that the host knows of a plan: what is asked, in which shapes."""

    parameters: PlanParameters
    extents: Extents
    packed_q: bool

    @property
    def tiles_bound(self) -> int:
        return tiles_bound(self.parameters, self.extents, self.packed_q)

    @property
    def slots_bound(self) -> int:
        return self.parameters.slots_bound(self.tiles_bound)


class PlanKind:
    """Shape and device of a plan, hashed once: a call looks itself up under them, and a decode has no time to spare."""

    __slots__ = ("_hash", "_value")

    def __init__(self, shape: BatchShape, device: torch.device):
        self._value = shape, device
        self._hash = hash(self._value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, PlanKind) and self._value == other._value)


def batch_shape(problem: Problem, target: Any, metadata: SchedulerMetadata | bool | None) -> BatchShape | None:
    """What a call's plan is made from, or None where it goes without one.

    metadata: a plan made before, None to decide, False for none. target: has `architecture` and `num_sms`.
    Raises ValueError where `metadata` was made for another call.
    """
    p = problem
    check_scheduler_metadata(p, metadata)
    asks_for_splits = p.num_splits != 1 or p.seqlen_k_per_split is not None
    if metadata is False or (metadata is None and not asks_for_splits and not _planning_pays(p, target.num_sms)):
        return None
    # Larger batches go in their own order. Absolute boundaries have been refused for them (launch.unsupported).
    if metadata is None and p.batch_size > MAX_BATCH:
        return None
    shape = _Shape(p.num_heads, p.num_heads_kv, p.head_dim, p.head_dim_v)
    given = metadata.parameters if metadata else None
    l2_bytes = 0 if given else _l2_bytes(p.device_type)
    parameters, _ = _parameters(
        shape,
        _Target("cute", target.architecture, given.num_sms if given else target.num_sms, l2_bytes),
        p.total_q / max(p.batch_size, 1),
        p.seqlen_q_bound,
        (_side(p.window_left), _side(p.window_right)),
        p.num_splits,
        p.seqlen_k_per_split,
        p.pack_gqa,
        p.seqlen_k_bound,
        given and given.tokens_per_tile,
    )
    extents = Extents(p.batch_size, p.total_q if p.q_packed else p.seqlen_q, p.seqlen_k or 0)
    if given is None:
        return _countable(BatchShape(parameters, extents, p.q_packed))
    _check_belongs(metadata, parameters, extents, p.q_packed)
    return metadata.shape


def check_scheduler_metadata(problem: Problem, metadata: Any) -> None:
    """Raises where `metadata` is nothing that a call takes for `scheduler_metadata`, or not what this one asks for."""
    if metadata is None or isinstance(metadata, SchedulerMetadata):
        return
    if metadata is not False:
        _fail("scheduler_metadata", type(metadata).__name__, "a SchedulerMetadata, None or False", TypeError)
    if problem.seqlen_k_per_split is not None:
        _fail("scheduler_metadata", "False with seqlen_k_per_split", "None or a plan: without one nothing is split")


def _countable(shape: BatchShape) -> BatchShape:
    """Raises ValueError where there may be more work tiles than can be numbered: only many absolute boundaries can."""
    most = shape.tiles_bound + shape.slots_bound
    if most > MAX_WORK_TILES:
        _fail("seqlen_k_per_split", f"room for {most} work tiles", f"at most {MAX_WORK_TILES}: larger splits")
    return shape


def _planning_pays(p: Problem, num_sms: int) -> bool:
    """Whether the order of a plan is worth its launch, as far as the host can tell.

    It is where a few long query sequences lie among many short ones: what is bound by memory then runs beside what is
    bound by arithmetic. And it is with very many sequences of a few tokens, whose numbers a plan makes dense. On an
    H200, planning included, 4 prefill chunks among 96 decodes take 1.58 ms with a plan and 1.78 without, 4096
    sequences of 1 to 20 tokens 620 us and 667; batches of equal or of random lengths gain nothing
    (benchmarks/results/2026-11-21-scheduler-h200.md).
    """
    if not p.q_packed or p.scheduler not in ("auto", "dynamic"):
        return False
    if p.batch_size >= MANY_SEQUENCES and p.total_q <= FEW_TOKENS * p.batch_size:
        return True
    is_ragged = p.max_seqlen_q is not None and p.max_seqlen_q * p.batch_size >= RAGGED_RATIO * p.total_q
    return is_ragged and p.batch_size >= RAGGED_BATCH and p.total_q * p.num_heads >= ROWS_AN_SM * num_sms


def _check_belongs(metadata: SchedulerMetadata, parameters: PlanParameters, extents: Extents, packed_q: bool) -> None:
    given = metadata.parameters
    for name in ("heads", "heads_per_kv_load", "tokens_per_tile", "tile_n", "window_left", "window_right"):
        if getattr(given, name) != getattr(parameters, name):
            got = f"a plan with {name}={getattr(given, name)}"
            _fail("scheduler_metadata", got, f"{name}={getattr(parameters, name)} here")
    if metadata.extents[:2] != extents[:2] or metadata.packed_q != packed_q:
        got = f"a plan of {metadata.extents.batch_size} sequences, {metadata.extents.rows_q} rows of q"
        _fail("scheduler_metadata", got, f"{extents.batch_size} sequences, {extents.rows_q} rows here")
    # At absolute boundaries the most splits are what the shapes of plan and call had room for, and no cap.
    exceeds = given.tiles_per_split == 0 and given.max_splits > parameters.max_splits
    if exceeds or given.tiles_per_split != parameters.tiles_per_split:
        got = f"a plan of up to {given.max_splits} splits, {given.tiles_per_split} KV tiles apart"
        takes = f"at most {parameters.max_splits}, {parameters.tiles_per_split} apart, as this call's num_splits and "
        _fail("scheduler_metadata", got, takes + "seqlen_k_per_split say")


def tiles_bound(p: PlanParameters, extents: Extents, packed_q: bool) -> int:
    tokens = p.tokens_per_tile
    if packed_q:
        # A sequence, and padding on either side, may begin a tile that it does not fill.
        return (extents.rows_q // tokens + extents.batch_size + 2) * p.heads
    return -(-extents.rows_q // tokens) * extents.batch_size * p.heads


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads: int,
    num_heads_kv: int,
    head_dim: int,
    head_dim_v: int | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    total_q: int | None = None,
    key_mask: Tensor | None = None,
    page_table: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    num_splits: int = 0,
    seqlen_k_per_split: int | None = None,
    pack_gqa: bool | None = None,
    num_sms: int | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> SchedulerMetadata:
    """Plans the attention of a batch: the order of its sequences, their splits, and how work is numbered.

    batch_size, max_seqlen_q, max_seqlen_k: bounds that shape the call. Without cu_seqlens_q every sequence has
        max_seqlen_q rows of q, without cu_seqlens_k max_seqlen_k keys, of which seqused_q and seqused_k say how many
        are used.
    cu_seqlens_q, cu_seqlens_k: (B + 1,) int32; seqused_q, seqused_k: (B,) int32. All on one device.
    total_q: rows of a packed q; needed with cu_seqlens_q.
    key_mask: bool, that of the call: (total_k, H*) with cu_seqlens_k, (pages, page_size, H*) with page_table, else
        (B or 1, Sk, H*), or (rows, Sk, H*) with cache_batch_idx. Where the kernel skips KV tiles that it hides whole,
        they count for nothing here. A plan of another mask, or of none, gives right results and may balance worse.
    page_table, cache_leftpad, cache_batch_idx: those of the call; read where there is a key_mask.
    num_splits: 1 splits nothing, 0 as the batch asks for, n is a cap (at most 256).
    seqlen_k_per_split: keys between absolute boundaries, rounded up to whole KV tiles; then a row's bits do not depend
        on the batch. The last of 256 splits takes what is left.
    pack_gqa: as in the attention call; None decides as it does.
    num_sms: SMs to plan for; those of the device by default.
    device: where there are no length tensors.

    Nothing synchronises with the host. Raises ValueError or TypeError for wrong arguments, each naming the argument,
    NotImplementedError where the backend or the head dimensions have no kernel.
    """
    num_splits, seqlen_k_per_split = splits_of(num_splits, seqlen_k_per_split, backend)
    lengths = LengthTensors(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    for name, value, least in (
        ("batch_size", batch_size, 0),
        ("max_seqlen_q", max_seqlen_q, 0),
        ("max_seqlen_k", max_seqlen_k, 0),
        ("num_heads", num_heads, 1),
        ("num_heads_kv", num_heads_kv, 1),
        ("head_dim", head_dim, 8),
        ("head_dim_v", head_dim if head_dim_v is None else head_dim_v, 8),
        ("num_splits", num_splits, 0),
        ("seqlen_k_per_split", 1 if seqlen_k_per_split is None else seqlen_k_per_split, 1),
        ("total_q", 0 if total_q is None else total_q, 0),
        ("num_sms", 1 if num_sms is None else num_sms, 1),
    ):
        if type(value) is not int or not least <= value <= INT32_MAX:
            _fail(name, repr(value), f"an int from {least} to {INT32_MAX}")
    _check_lengths(lengths, batch_size)
    if num_heads % num_heads_kv:
        _fail("num_heads", num_heads, f"a positive multiple of num_heads_kv, {num_heads_kv}")
    keys = KeyTensors(cu_seqlens_k, seqused_k, cache_leftpad, page_table, cache_batch_idx)
    if key_mask is not None:
        check_key_mask(key_mask, keys, batch_size, num_heads, num_heads_kv)
    if num_splits > MAX_SPLITS:
        _fail("num_splits", num_splits, f"at most {MAX_SPLITS}")
    if seqlen_k_per_split is not None and num_splits > 1:
        _fail("num_splits", f"{num_splits} with seqlen_k_per_split", "0 or 1: boundaries are absolute")
    if batch_size > MAX_BATCH:
        _fail("batch_size", batch_size, f"at most {MAX_BATCH}")
    if (cu_seqlens_q is None) != (total_q is None):
        _fail("total_q", total_q, "the rows of q with cu_seqlens_q, None without")
    if backend not in BACKENDS:
        _fail("backend", repr(backend), f"one of {', '.join(BACKENDS)}")
    given = next((tensor for tensor in (*lengths, key_mask) if tensor is not None), None)
    device = torch.device("cuda" if device is None else device) if given is None else given.device
    target = _target(device, backend, num_sms)
    extents = Extents(batch_size, max_seqlen_q if cu_seqlens_q is None else total_q, max_seqlen_k)
    shape = _Shape(num_heads, num_heads_kv, head_dim, head_dim if head_dim_v is None else head_dim_v)
    window = _window(window_size, causal)
    rows_q = total_q if cu_seqlens_q is not None else batch_size * max_seqlen_q
    parameters, tile = _parameters(
        shape,
        target,
        rows_q / max(batch_size, 1),
        max_seqlen_q,
        window,
        num_splits,
        seqlen_k_per_split,
        pack_gqa,
        max_seqlen_k,
    )
    batch = _countable(BatchShape(parameters, extents, cu_seqlens_q is not None))
    if key_mask is not None and target.architecture in SKIPPING:
        # Heads of tiles are KV heads where query heads are packed, and otherwise query heads.
        packed, num_keys = parameters.heads == num_heads_kv, keys_of_mask(key_mask, keys)
        mask_heads, heads = key_mask.shape[-1], (num_heads, num_heads_kv)
        lists = ListShape.of(tile.tile_n, batch_size, mask_heads, *heads, packed, cu_seqlens_k is not None, num_keys)
        counts = active_counts(key_mask, keys, lists, target.architecture, target.backend)
        lengths = lengths._replace(active_tiles=counts)
    metadata = plan_batch(lengths, extents, parameters, target.backend, device)
    if target.backend == "reference" or batch.slots_bound == 0:
        return metadata
    # Here and not in each call, where it would be much of the time that a decode takes on the host.
    workspace = Workspace.allocate(batch.slots_bound, tile.tile_m, shape.head_dim_v, device)
    return dataclasses.replace(metadata, workspace=workspace)


class _Shape(NamedTuple):
    num_heads: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int


class _Target(NamedTuple):
    backend: str
    architecture: str
    num_sms: int
    l2_bytes: int


def _fail(name: str, got: Any, takes: str, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"{name}: got {got}; takes {takes}")


def _check_lengths(lengths: LengthTensors, batch_size: int) -> None:
    devices = {tensor.device for tensor in lengths if isinstance(tensor, Tensor)}
    for name, tensor in zip(lengths._fields, lengths, strict=True):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            _fail(name, type(tensor).__name__, "a torch.Tensor or None", TypeError)
        size = batch_size + 1 if name.startswith("cu") else batch_size
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != (size,) or not tensor.is_contiguous():
            _fail(name, f"{tensor.dtype} of shape {tuple(tensor.shape)}", f"contiguous int32 of shape ({size},)")
        if len(devices) > 1:
            _fail(name, f"device {tensor.device}", "one device for all lengths")


def _window(window_size: tuple[int | None, int | None], causal: bool) -> tuple[int, int]:
    """(left, right) in numbers."""
    try:
        left, right = window_size
    except (TypeError, ValueError):
        _fail("window_size", f"{window_size!r}", "a pair (left, right) of ints or None", TypeError)
    left, right = (_side(None if side is None or side < 0 else side) for side in (left, right))
    return left, 0 if causal else right


def _side(side: int | None) -> int:
    return UNBOUNDED if side is None else min(side, UNBOUNDED)


def _parameters(
    shape: _Shape,
    target: _Target,
    mean_seqlen_q: float,
    max_seqlen_q: int,
    window: tuple[int, int],
    num_splits: int,
    seqlen_k_per_split: int | None,
    pack_gqa: bool | None,
    max_seqlen_k: int,
    tokens_per_tile: int | None = None,
) -> tuple[PlanParameters, Any]:
    """In the units of the forward kernel of the architecture, which decides packing in the same way; and its tile."""
    group = shape.num_heads // shape.num_heads_kv
    tiling = tuning.query_tiling(
        target.architecture,
        shape.head_dim,
        shape.head_dim_v,
        group,
        pack_gqa,
        mean_seqlen_q,
        max_seqlen_q,
        tokens_per_tile,
    )
    if tiling is None:
        raise NotImplementedError(f"head dimensions ({shape.head_dim}, {shape.head_dim_v}) on {target.architecture}")
    if tiling.rows_per_token == 0:
        most = tiling.tile.query_rows
        raise NotImplementedError(f"pack_gqa=True with {group} query heads a KV head (at most {most})")
    tile, packed = tiling.tile, tiling.packed
    tiles_per_split, max_splits = 0, num_splits or MAX_SPLITS
    if seqlen_k_per_split is not None:
        tiles_per_split = -(-seqlen_k_per_split // tile.tile_n)
        # What the shapes allow decides the workspace; that a sequence is longer cannot be.
        longest = -(-max_seqlen_k // tile.tile_n)
        max_splits = min(max(-(-longest // tiles_per_split), 1), MAX_SPLITS)
    section_heads, section_tiles = tuning.section_of_tiles(target.num_sms) if window[1] < UNBOUNDED else (1, 0)
    key_bytes = 2 * (shape.head_dim + shape.head_dim_v)
    parameters = PlanParameters(
        heads=shape.num_heads_kv if packed else shape.num_heads,
        heads_per_kv_load=1 if packed else group,
        tokens_per_tile=tiling.tokens_per_tile,
        tile_n=tile.tile_n,
        window_left=window[0],
        window_right=window[1],
        num_sms=target.num_sms,
        max_splits=max_splits,
        tiles_per_split=tiles_per_split,
        section_heads=section_heads,
        section_tiles=section_tiles,
        l2_keys=target.l2_bytes * L2_PART_FOR_KEYS[0] // L2_PART_FOR_KEYS[1] // key_bytes,
        granularity=tuning.granularity_of_splits(tile, max_seqlen_q * tiling.rows_per_token),
    )
    return parameters, tile


def _target(device: torch.device, backend: str, num_sms: int | None) -> _Target:
    if device.type == "cuda" and backend != "reference":
        num_sms = num_sms or torch.cuda.get_device_properties(device).multi_processor_count
        return _Target("cute", architecture_of(device), num_sms, _l2_bytes(device))
    if backend == "cute":
        raise NotImplementedError(f"backend='cute' on device type {device.type}: the kernel needs a CUDA device")
    # Where there is no GPU: an H200, unless the emulator says otherwise.
    architecture = "sm_90a"
    if backend == "emulator":
        from flash_attn_cute.emulator import backend as emulator

        architecture = emulator.architecture()
    chosen = "emulator" if backend == "emulator" else "reference"
    return _Target(chosen, architecture, num_sms or 132, 60 << 20)


@functools.cache
def _l2_bytes(device: torch.device | str) -> int:
    if torch.device(device).type != "cuda":
        return 0
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)


def plan_batch(
    lengths: LengthTensors, extents: Extents, parameters: PlanParameters, backend: str, device: torch.device
) -> SchedulerMetadata:
    """The plan of a batch under given parameters. backend: "cute", "emulator" or "reference"."""
    metadata = _allocate(extents, parameters, lengths.cu_seqlens_q is not None, device)
    if metadata.entries.shape[0] == 0:
        for tensor in (*_sums(metadata), metadata.summary, metadata.tile_count_semaphore):
            tensor.zero_()
        return metadata
    if backend == "reference":
        _fill_by_reference(metadata, lengths)
    elif backend == "emulator":
        _fill_emulated(metadata, lengths)
    else:
        _fill(metadata, lengths)
    return metadata


def _allocate(extents: Extents, parameters: PlanParameters, packed_q: bool, device: torch.device) -> SchedulerMetadata:
    """One allocation; the kernel writes all of it."""
    count = extents.batch_size + (2 if packed_q else 0)
    sizes = [4 * count, count + 1, count + 1, 4, 2]
    room = [-(-size // 4) * 4 for size in sizes]  # entries are stored 16 bytes at a time
    parts = torch.empty(sum(room), dtype=torch.int32, device=device).split(room)
    entries, m_blocks, tiles, summary, semaphore = (part[:size] for part, size in zip(parts, sizes, strict=True))
    return SchedulerMetadata(parameters, extents, packed_q, entries.view(count, 4), m_blocks, tiles, summary, semaphore)


def _sums(metadata: SchedulerMetadata) -> tuple[Tensor, Tensor]:
    return metadata.cu_total_m_blocks, metadata.cu_total_splits_m_blocks


def _fill_by_reference(metadata: SchedulerMetadata, lengths: LengthTensors) -> None:
    plan = plan_sequences(*sequences_of(lengths, metadata.extents), metadata.parameters)
    for tensor, values in zip((metadata.entries, *_sums(metadata), metadata.summary), plan, strict=True):
        tensor.copy_(torch.tensor(values, dtype=torch.int32))
    metadata.tile_count_semaphore.zero_()


def sequences_of(lengths: LengthTensors, extents: Extents) -> tuple[list[Lengths], list[int]]:
    """(sequences, padding rows) of `plan.plan_sequences`. Reads the tensors on the host."""
    cu_q, cu_k, used_q, used_k, active = (None if tensor is None else tensor.tolist() for tensor in lengths)
    sequences = []
    for i in range(extents.batch_size):
        rows_q = extents.rows_q if cu_q is None else cu_q[i + 1] - cu_q[i]
        keys = extents.rows_k if cu_k is None else cu_k[i + 1] - cu_k[i]
        len_q, len_k = rows_q if used_q is None else used_q[i], keys if used_k is None else used_k[i]
        sequences.append(Lengths(rows_q, len_q, len_k, None if active is None else max(active[i])))
    return sequences, [] if cu_q is None else [cu_q[0], extents.rows_q - cu_q[-1]]


def _fill_emulated(metadata: SchedulerMetadata, lengths: LengthTensors) -> None:
    from flash_attn_cute.emulator.backend import architecture
    from flash_attn_cute.emulator.session import current_session, emulate

    with contextlib.nullcontext() if current_session() is not None else emulate(architecture()):
        _fill(metadata, LengthTensors(*(None if tensor is None else tensor.cuda() for tensor in lengths)))


class PlanKey(NamedTuple):
    """Everything that changes the generated code."""

    architecture: str
    kernel: str
    cu_seqlens_q: bool
    cu_seqlens_k: bool
    seqused_q: bool
    seqused_k: bool
    active_tiles: bool
    splitting: str
    ctas: int
    warps: int
    items: int


# (CTAs of the cluster, warps a CTA, sequences a thread), by capacity. Instructions are what a plan is made of, and more
# warps repeat those that every warp does for itself; a cluster's barriers cost about as much as planning two thousand
# sequences. A thread takes at most 7 sequences (device/radix_sort.py).
GROUPS = ((1, 8, 1), (1, 16, 2), (1, 16, 4), (8, 16, 1), (8, 16, 2), (8, 16, 3), (8, 16, 5), (8, 32, 4))


def compile_kernel(key: PlanKey) -> Any:
    """Compiles one planning kernel, for batches of any size up to its capacity. Needs no GPU."""
    import cutlass.cute as cute
    from cutlass import Int32

    from flash_attn_cute.device.divisor import Divisor
    from flash_attn_cute.prepare_scheduler_metadata import (
        PlanScalars,
        PlanSpec,
        PlanTensors,
        PrepareSchedulerMetadata,
    )

    def vector(present=True, size=None):
        size = cute.sym_int() if size is None else size
        return cute.runtime.make_fake_tensor(Int32, (size,), stride=(1,), assumed_align=4) if present else None

    active_tiles = None
    if key.active_tiles:
        shape, strides = (cute.sym_int(), cute.sym_int()), (cute.sym_int64(), 1)
        active_tiles = cute.runtime.make_fake_tensor(Int32, shape, stride=strides, assumed_align=4)
    tensors = PlanTensors(
        *(vector(present) for present in key[2:6]),
        active_tiles,
        cute.runtime.make_fake_tensor(Int32, (cute.sym_int(), 4), stride=(4, 1), assumed_align=16),
        vector(),
        vector(),
        vector(size=4),
        vector(size=2),
    )
    scalars = PlanScalars(
        *(Divisor(Int32(1), Int32(1)) if name.startswith("by_") else Int32(1) for name in PlanScalars._fields)
    )
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    kernel = PrepareSchedulerMetadata(PlanSpec(*key[-4:]))
    return cute.compile(kernel, tensors, scalars, stream, options=f"--enable-tvm-ffi --gpu-arch {key.architecture}")


def _fill(metadata: SchedulerMetadata, lengths: LengthTensors) -> None:
    """Launches on the current stream."""
    p, entries, batch_size = metadata.parameters, metadata.entries, metadata.extents.batch_size
    if batch_size == 0:
        lengths = lengths._replace(seqused_q=None, seqused_k=None, active_tiles=None)
    ctas, warps, items = next(group for group in GROUPS if batch_size <= 32 * math.prod(group))
    device = next((tensor.device for tensor in lengths if tensor is not None), entries.device)
    splitting = "whole" if p.max_splits == 1 else "fixed" if p.tiles_per_split else "by_load"
    present = (tensor is not None for tensor in lengths)
    key = PlanKey(architecture_of(device), "plan", *present, splitting, ctas, warps, items)
    function = cache.get(key, functools.partial(compile_kernel, key))
    function(
        (*lengths, entries, *_sums(metadata), metadata.summary, metadata.tile_count_semaphore),
        (
            *metadata.extents,
            p.heads,
            p.heads_per_kv_load,
            p.tokens_per_tile,
            divisor_fields(p.tokens_per_tile),
            p.tile_n,
            divisor_fields(p.tile_n),
            p.window_left,
            p.window_right,
            p.num_sms,
            divisor_fields(p.num_sms),
            p.max_splits,
            p.tiles_per_split,
            divisor_fields(max(p.tiles_per_split, 1)),
            p.section_heads,
            p.section_tiles,
            min(p.l2_keys * p.heads_per_kv_load, INT32_MAX),
            p.granularity.bit_length() - 1,
        ),
    )


def divisor_fields(d: int) -> tuple[int, int]:
    """The fields of a device.divisor.Divisor."""
    shift = (d - 1).bit_length()
    multiplier = (1 << (31 + shift)) // d + 1
    return multiplier - (1 << 32) if multiplier >= 1 << 31 else multiplier, shift
