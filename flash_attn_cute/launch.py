"""From a Problem to a launch of a forward kernel: what it takes, how it is planned, compiled and called."""

from __future__ import annotations

import functools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn_cute.active_tiles import SKIPPING, KeyTensors, ListShape, PreparedPacking, lists_to_compile
from flash_attn_cute.compile_cache import cache
from flash_attn_cute.launch_combine import ARCHITECTURES, SplitSizes
from flash_attn_cute.plan import PlanParameters
from flash_attn_cute.problem import INT32_MAX, AttentionTensors, Problem
from flash_attn_cute.scheduler_metadata import (
    MAX_BATCH,
    UNBOUNDED,
    BatchShape,
    LengthTensors,
    SchedulerMetadata,
    batch_shape,
    divisor_fields,
    plan_batch,
)
from flash_attn_cute.tuning import (
    QueryTiling,
    Sm90Tile,
    Sm100Tile,
    forward_tile,
    packed_rows,
    query_tiling,
    section_of_tiles,
    tiles_are_short,
)

TMA_ALIGNMENT = 16
TMA_REACHES_ALL = (True, True, True)  # of q, k and v
# Rows over which a swizzle pattern repeats: spans of fewer would begin within a pattern.
SWIZZLE_ROWS = 8
# Where keys are all that is waited for, many small TMA copies are slower than cp.async: on an H200, 64 decodes of 8192
# keys took 509 us in pages of 16, with TMA, 485 in pages of 1, gathered, and 473 in pages of 64 (2026-11-21).
LEAST_SPAN_OF_DECODES = 32

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# A bias of the least finite number of its type hides a key.
LOWEST = {name: torch.finfo(dtype).min for dtype, name in _DTYPE_NAMES.items()}


def unsupported(problem: Problem, architecture: str) -> str | None:
    """Why the kernel of an architecture does not take this problem, or None."""
    tiling = _query_tiling(problem, architecture)
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {problem.dtype}"
    if tiling is None:
        return f"head dimensions ({problem.head_dim}, {problem.head_dim_v})"
    if problem.query_bias_dtype not in (None, *_DTYPE_NAMES):
        return f"attn_bias of dtype {problem.query_bias_dtype}"
    if problem.scheduler == "clc" and architecture == "sm_90a":
        return "scheduler='clc', which Hopper does not have"
    if problem.seqlen_k_per_split is not None and problem.batch_size > MAX_BATCH:
        return f"seqlen_k_per_split with {problem.batch_size} sequences (at most {MAX_BATCH})"
    if problem.softmax_scale <= 0.0:
        return f"softmax_scale={problem.softmax_scale}, which is not positive"
    if tiling.rows_per_token == 0:
        most = tiling.tile.query_rows
        return f"pack_gqa=True with {problem.qheads_per_kvhead} query heads a KV head (at most {most})"
    return _key_side_unsupported(problem, architecture, tiling)


def _key_side_unsupported(p: Problem, architecture: str, tiling: QueryTiling) -> str | None:
    if p.key_mask_heads is None and p.key_bias_heads is None:
        return None
    if p.key_bias_dtype not in (None, *_DTYPE_NAMES):
        return f"key_bias of dtype {p.key_bias_dtype}"
    heads = _key_side_heads(p, p.key_mask_heads), _key_side_heads(p, p.key_bias_heads)
    if tiling.tile.beside_bias(_bias_vectors(heads, p.qheads_per_kvhead, tiling.packed)) is None:
        return f"a mask or bias a query head with {p.qheads_per_kvhead} of them packed: pass pack_gqa=False"
    if p.key_mask_heads is not None and not _list_shape(p, tiling).is_countable:
        return "key_mask over so many sequences, pages and heads that their KV tiles are not counted in 31 bits"
    return None


def _list_shape(p: Problem, tiling: QueryTiling) -> ListShape:
    """Of the KV tiles that key_mask leaves."""
    return ListShape.of(
        tiling.tile.tile_n,
        p.batch_size,
        p.key_mask_heads,
        p.num_heads,
        p.num_heads_kv,
        tiling.packed,
        p.k_packed,
        p.total_k if p.k_packed else p.seqlen_k,
    )


def _key_side_heads(p: Problem, heads: int | None) -> str | None:
    """How the heads of a mask or a bias belong to query heads: device.key_bias."""
    if heads is None or heads == 1:
        return None if heads is None else "all"
    return "kv" if heads == p.num_heads_kv else "query"


def _bias_vectors(heads: tuple[str | None, str | None], qheads_per_kvhead: int, packed: bool) -> int:
    """Numbers staged a key for the heads of a mask and a bias: device.key_bias."""
    return qheads_per_kvhead if packed and "query" in heads else 1


def _query_tiling(p: Problem, architecture: str, parameters: PlanParameters | None = None) -> QueryTiling | None:
    return query_tiling(
        architecture,
        p.head_dim,
        p.head_dim_v,
        p.qheads_per_kvhead,
        p.pack_gqa,
        p.total_q / max(p.batch_size, 1),
        p.seqlen_q_bound,
        parameters and parameters.tokens_per_tile,
    )


class KernelKey(NamedTuple):
    """Everything that changes the generated code, in types that mean the same in another process."""

    architecture: str
    kernel: str
    dtype: str
    head_dim: int
    head_dim_v: int
    qheads_per_kvhead: int
    packed: bool
    causal: bool
    window_left: bool
    window_right: bool
    softcap: bool
    varlen_q: bool
    varlen_k: bool
    seqused_q: bool
    seqused_k: bool
    sink: str | None
    lse: bool
    dynamic: bool
    planned: bool = False
    splits: bool = False
    combine_warps: int = 0  # of the combine kernel, to a row; 0 without splits
    clc: bool = False
    page_span: int | None = None  # rows of a span of paged keys (device.paged_kv); 0: rows are gathered
    leftpad_k: bool = False
    cache_batch_idx: bool = False
    few_rows: bool = False  # the tile for few query rows
    key_mask: str | None = None  # how its heads belong to query heads
    key_bias: str | None = None
    key_bias_dtype: str | None = None
    query_mask: str | None = None
    query_bias: str | None = None
    query_bias_dtype: str | None = None

    @property
    def tile(self) -> Sm90Tile | Sm100Tile:
        tile = forward_tile(self.architecture, self.head_dim, self.head_dim_v, self.few_rows)
        heads = self.key_mask, self.key_bias
        if heads == (None, None):
            return tile
        return tile.beside_bias(_bias_vectors(heads, self.qheads_per_kvhead, self.packed))

    @property
    def rows_per_token(self) -> int:
        return packed_rows(self.qheads_per_kvhead, self.tile.query_rows) if self.packed else 1

    @property
    def skips(self) -> bool:
        """Whether KV tiles that the mask hides whole are skipped.

        On Blackwell not where rows of pages are gathered: beside that the staging warps have no registers for it.
        """
        gathers_on_blackwell = self.architecture != "sm_90a" and self.page_span == 0
        return self.key_mask is not None and self.architecture in SKIPPING and not gathers_on_blackwell

    def is_uneven(self) -> bool:
        """Whether tiles differ in work, so that handing them out as CTAs get free pays."""
        masked = self.causal or self.window_left or self.window_right or self.skips
        return masked or self.varlen_q or self.varlen_k or self.seqused_q or self.seqused_k or self.splits

    @classmethod
    def of(cls, p: Problem, architecture: str, tiling: QueryTiling, dynamic: bool, page_span: int | None) -> KernelKey:
        """The key for a problem and what the plan decided; no length, window size, scale or head count is in it."""
        return cls(
            architecture,
            "forward",
            _DTYPE_NAMES[p.dtype],
            p.head_dim,
            p.head_dim_v,
            p.qheads_per_kvhead,
            tiling.packed,
            p.causal,
            p.window_left is not None,
            p.window_right is not None and not p.causal,
            p.softcap > 0.0,
            p.q_packed,
            p.k_packed,
            p.has_seqused_q,
            p.has_seqused_k,
            _DTYPE_NAMES.get(p.sink_dtype),
            p.return_lse,
            dynamic,
            page_span=page_span,
            leftpad_k=p.has_leftpad_k,
            cache_batch_idx=p.has_cache_batch_idx,
            few_rows=tiling.few_rows,
            key_mask=_key_side_heads(p, p.key_mask_heads),
            key_bias=_key_side_heads(p, p.key_bias_heads),
            key_bias_dtype=_DTYPE_NAMES.get(p.key_bias_dtype),
            query_mask=_key_side_heads(p, p.query_mask_heads),
            query_bias=_key_side_heads(p, p.query_bias_heads),
            query_bias_dtype=_DTYPE_NAMES.get(p.query_bias_dtype),
        )


class Plan(NamedTuple):
    key: KernelKey
    num_tiles: int
    grid: int
    section_heads: int
    section_tiles: int
    short_from: int


class Target(NamedTuple):
    """What a launch is planned for."""

    architecture: str
    num_sms: int


@functools.cache
def _target(index: int) -> Target:
    device = torch.cuda.get_device_properties(index)
    return Target(ARCHITECTURES[(device.major, device.minor)], device.multi_processor_count)


def plan(
    problem: Problem, target: Target, parameters: PlanParameters | None = None, *, tma_reaches_keys: bool = True
) -> Plan:
    """Decides what is left open (packing, scheduler) from host-side sizes alone, and sizes the launch.

    parameters: those of the batch's plan on the device, where it has one. tma_reaches_keys: whether strides allow it.
    """
    p, num_sms = problem, target.num_sms
    tiling = _query_tiling(p, target.architecture, parameters)
    tokens = tiling.tokens_per_tile
    heads = p.num_heads_kv if tiling.packed else p.num_heads
    if p.q_packed:
        num_tiles = (p.total_q // tokens + p.batch_size + 2) * heads
    else:
        num_tiles = -(-p.seqlen_q // tokens) * heads * p.batch_size
    page_span = None
    if p.is_paged:
        # Behind a left padding tiles do not begin where pages do.
        by_tma = tma_reaches_keys and not p.has_leftpad_k
        page_span = span_of_pages(p.page_size, tiling.tile, tiling.few_rows) if by_tma else 0
    key = KernelKey.of(p, target.architecture, tiling, dynamic=p.scheduler == "dynamic", page_span=page_span)
    if parameters is not None:
        slots = parameters.slots_bound(num_tiles)
        # A batch that large is never split: it needs neither that kernel nor a second launch. (Were a bound on lengths
        # that was given wrong, the parts of a split would each compute and write the same rows.)
        least_tiles = -(-p.total_q // tokens) * heads if p.q_packed else num_tiles
        if parameters.never_splits(least_tiles, p.seqlen_k_bound):
            slots = 0
        key = key._replace(planned=True, splits=slots > 0)
        num_tiles += slots
    if p.scheduler == "auto":
        # By what is asked and not by how much: a size that compiled another kernel would surprise a graph capture.
        key = key._replace(dynamic=key.is_uneven())
    key = key._replace(clc=p.scheduler == "clc")
    section_heads, section_tiles = section_of_tiles(num_sms) if p.window_right is not None else (1, 0)
    single = p.scheduler in ("single_tile", "clc")  # a CTA a tile is launched, though with CLC few start
    short_from = 0 if not single and tiles_are_short(p.max_seqlen_k, num_tiles, num_sms) else INT32_MAX
    grid = num_tiles if single else min(num_tiles, num_sms)
    return Plan(key, num_tiles, grid, section_heads, section_tiles, short_from)


def span_of_pages(page_size: int, tile: Sm90Tile | Sm100Tile, few_rows: bool) -> int:
    """Rows of a span, or 0 where TMA cannot load spans, or should not."""
    span = math.gcd(page_size, tile.tile_n)
    is_too_short = few_rows and span < LEAST_SPAN_OF_DECODES
    return span if span % SWIZZLE_ROWS == 0 and not is_too_short else 0


def compile_kernel(key: KernelKey) -> Any:
    """Compiles one kernel for tensors of any size, for the architecture of the key. Needs no GPU."""
    import cutlass
    import cutlass.cute as cute
    from cutlass import Float32, Int32

    from flash_attn_cute.combine import CombinePlanned, PlannedCombineSpec
    from flash_attn_cute.device.active_tiles import ActiveTiles
    from flash_attn_cute.device.divisor import Divisor
    from flash_attn_cute.device.key_bias import KeySideSpec
    from flash_attn_cute.device.query_bias import QuerySideSpec
    from flash_attn_cute.forward_and_combine import ForwardAndCombine
    from flash_attn_cute.forward_sm90 import ForwardSm90
    from flash_attn_cute.forward_sm100 import ForwardSm100
    from flash_attn_cute.forward_spec import ForwardScalars, ForwardSpec, ForwardTensors
    from flash_attn_cute.tile_scheduler import PlannedWork

    types = {"bf16": cutlass.BFloat16, "fp16": cutlass.Float16, "fp32": Float32}
    dtype, tile = types[key.dtype], key.tile

    def tensor(element, *shape):
        alignment = TMA_ALIGNMENT if element is dtype and len(shape) > 1 else element.width // 8
        strides = [cute.sym_int64(divisibility=alignment * 8 // element.width) for _ in shape[:-1]] + [1]
        shape = tuple(cute.sym_int() if extent is None else extent for extent in shape)
        return cute.runtime.make_fake_tensor(element, shape, stride=tuple(strides), assumed_align=alignment)

    def optional(present, element, *shape):
        return tensor(element, *shape) if present else None

    def compact(element, *shape):
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        if shape[0] is None:
            # An extent that is not known may be large: a stride of 64 bits makes offsets along it have as many.
            strides[0] = cute.sym_int64(divisibility=128 // element.width)
        shape = tuple(cute.sym_int() if extent is None else extent for extent in shape)
        return cute.runtime.make_fake_tensor(element, shape, stride=tuple(strides), assumed_align=16)

    def of_scores(kind, element, rank):
        """A mask or a bias: any strides."""
        if kind is None:
            return None
        shape = tuple(cute.sym_int() for _ in range(rank))
        strides = tuple(cute.sym_int64() for _ in shape)
        return cute.runtime.make_fake_tensor(element, shape, stride=strides, assumed_align=element.width // 8)

    rank_q, rank_k = (None,) * (2 if key.varlen_q else 3), (None,) * (2 if key.varlen_k else 3)
    paged = key.page_span is not None
    tensors = ForwardTensors(
        q=tensor(dtype, *rank_q, key.head_dim),
        k=tensor(dtype, *rank_k, key.head_dim),
        v=tensor(dtype, *rank_k, key.head_dim_v),
        out=tensor(dtype, *rank_q, key.head_dim_v),
        lse=optional(key.lse, Float32, *rank_q),
        cu_seqlens_q=optional(key.varlen_q, Int32, None),
        cu_seqlens_k=optional(key.varlen_k, Int32, None),
        seqused_q=optional(key.seqused_q, Int32, None),
        seqused_k=optional(key.seqused_k, Int32, None),
        sink=optional(key.sink is not None, types.get(key.sink), None),
        semaphore=optional(key.dynamic, Int32, 2),
        partial=compact(Float32, None, tile.tile_m, key.head_dim_v) if key.splits else None,
        lse_partial=compact(Float32, None, tile.tile_m) if key.splits else None,
        work=PlannedWork(compact(Int32, None, 4), *(tensor(Int32, None) for _ in range(2)), compact(Int32, 4))
        if key.planned
        else None,
        page_table=optional(paged, Int32, None, None),
        leftpad_k=optional(key.leftpad_k, Int32, None),
        cache_batch_idx=optional(key.cache_batch_idx, Int32, None),
        key_mask=of_scores(key.key_mask, cutlass.Uint8, len(rank_k)),
        key_bias=of_scores(key.key_bias, types.get(key.key_bias_dtype), len(rank_k)),
        active=ActiveTiles(*lists_to_compile(key.varlen_k)) if key.skips else None,
        query_mask=of_scores(key.query_mask, cutlass.Uint8, 3),
        query_bias=of_scores(key.query_bias, types.get(key.query_bias_dtype), 3),
    )
    spec_key_side = None
    if key.key_mask is not None or key.key_bias is not None:
        spec_key_side = KeySideSpec(key.key_mask, key.key_bias, LOWEST.get(key.key_bias_dtype, 0.0))
    spec_query_side = None
    if key.query_mask is not None or key.query_bias is not None:
        spec_query_side = QuerySideSpec(key.query_mask, key.query_bias, LOWEST.get(key.query_bias_dtype, 0.0))
    spec = ForwardSpec(
        dtype,
        tile,
        key.qheads_per_kvhead,
        key.rows_per_token,
        key.causal,
        key.window_left,
        key.window_right,
        key.softcap,
        key.splits,
        key.clc,
        key.page_span or 0,
        gathers=key.page_span == 0,
        key_side=spec_key_side,
        skips=key.skips,
        query_side=spec_query_side,
    )
    numbers = (Int32(0) for _ in ForwardScalars._fields[2:-2])
    scalars = ForwardScalars(Float32(1.0), Float32(1.0), *numbers, Divisor(Int32(1), Int32(1)), Float32(1.0))
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    kernel = (ForwardSm90 if key.architecture == "sm_90a" else ForwardSm100)(spec)
    if key.splits:
        waits_beside = tile.leaves_room_for_merge
        combine = PlannedCombineSpec(
            key.head_dim_v, key.combine_warps, spec.qheads_per_tile, spec.rows_per_token, waits_beside
        )
        kernel = ForwardAndCombine(kernel, CombinePlanned(combine))
    options = f"--enable-tvm-ffi --gpu-arch {key.architecture}"
    return cute.compile(kernel, tensors, scalars, stream, options=options)


SEMAPHORES_A_BLOCK = 512

_semaphores: dict[tuple[int, int, int], Tensor] = {}
_free_semaphores: dict[int, list[Tensor]] = {}
_semaphore_lock = threading.Lock()


def _semaphore(device: torch.device) -> Tensor:
    """Two zeroed int32 that the launches of one thread on one stream share: each launch leaves them zero.

    A captured graph gets its own (zeroed by the graph at every replay): it may run beside anything, and memory that was
    allocated during a capture belongs to the graph.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    # The thread as well: cudaStreamPerThread is one handle for many streams.
    key = (device.index, _current_stream(device.index), threading.get_ident())
    semaphore = _semaphores.get(key)
    if semaphore is None:
        with _semaphore_lock:
            free = _free_semaphores.setdefault(device.index, [])
            if not free:
                free.extend(_semaphore_block(device))
            semaphore = _semaphores[key] = free.pop()
    return semaphore


def _current_stream(index: int) -> int:
    """torch.cuda.current_stream(index).cuda_stream without the object in between, which costs 3 microseconds."""
    return torch._C._cuda_getCurrentRawStream(index)


def _semaphore_block(device: torch.device) -> list[Tensor]:
    """Semaphores that live as long as the process, out of the allocator's ordinary memory.

    Allocated in a thread of its own: the caller may be inside a private pool (a graph's warm-up, an engine that sleeps
    by discarding a pool), and pools are chosen by thread and stream.
    """

    def allocate() -> list[Tensor]:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.default_stream(device)):
            block = torch.zeros(SEMAPHORES_A_BLOCK, 2, dtype=torch.int32, device=device)
            torch.cuda.current_stream().synchronize()  # once: any stream may be the first to use one
            return list(block)

    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(allocate).result()


def _strides_suit_tma(x: Tensor) -> bool:
    """Whether all strides are multiples of 16 bytes and no dimension is broadcast."""
    unit = TMA_ALIGNMENT // 2
    return not any(s % unit or s == 0 for s in x.stride()[:-1])


class PreparedLaunch(NamedTuple):
    """A call that has been checked, planned and compiled: what is left is to allocate and to launch."""

    function: Any  # None where there is nothing to compute
    scalars: tuple
    is_dynamic: bool
    dtype: torch.dtype
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...] | None
    strides_suit: tuple[bool, bool, bool]  # of q, k and v, for TMA
    planning: BatchShape | None
    split: SplitSizes | None  # where the plan may split
    packing: PreparedPacking | None  # where KV tiles are skipped

    @classmethod
    def of(
        cls, tensors: AttentionTensors, problem: Problem, metadata: SchedulerMetadata | bool | None = None
    ) -> PreparedLaunch:
        """The caller has asked `unsupported`. Compiles kernels if that has not been done.

        Raises ValueError if `metadata` is of another call than this.
        """
        t, p = tensors, problem
        target = _target(t.q.device.index)
        if metadata and metadata.device != t.q.device:
            raise ValueError(f"scheduler_metadata: got a plan on {metadata.device}; takes one on {t.q.device}")
        planning = batch_shape(p, target, metadata)
        strides_suit = tuple(map(_strides_suit_tma, (t.q, t.k, t.v)))
        if planning is not None:
            # A plan that was made with another bound on queries has another tile than `unsupported` saw.
            tiling = _query_tiling(p, target.architecture, planning.parameters)
            reason = _key_side_unsupported(p, target.architecture, tiling)
            if reason is not None:
                raise NotImplementedError(f"{target.architecture} kernel: {reason}")
        planned = plan(p, target, planning and planning.parameters, tma_reaches_keys=all(strides_suit[1:]))
        if planned.key.page_span == 0:
            # Copies of 16 bytes take any strides that are multiples of it. A cache is not to be copied.
            strides_suit = (
                strides_suit[0],
                *(not any(s % (TMA_ALIGNMENT // 2) for s in x.stride()[:-1]) for x in (t.k, t.v)),
            )
        key, split = planned.key, None
        if key.splits:
            tokens, heads = key.tile.tile_m // key.rows_per_token, key.qheads_per_kvhead if key.packed else 1
            rows = min(tokens, p.seqlen_q_bound) * heads
            split = SplitSizes.of(planning, key.tile.tile_m, p.head_dim_v, t.q.device, rows)
            key = key._replace(combine_warps=split.warps_per_row)
        scalars = (
            p.softmax_scale,
            p.softcap,
            min(p.window_left or 0, UNBOUNDED),
            min(p.window_right or 0, UNBOUNDED),
            p.seqlen_k or 0,
            planned.num_tiles,
            planned.grid,
            planned.section_heads,
            planned.section_tiles,
            planned.short_from,
            planning.parameters.tiles_per_split if planning else 0,
            *(split.grid if split else (0, 0)),
            target.num_sms,
            divisor_fields(p.page_size or 1),
            1.0 / (p.softcap or p.softmax_scale),
        )
        function = packing = None
        if 0 not in p.out_shape:
            function = cache.get(key, functools.partial(compile_kernel, key))
            if key.skips:
                shape = _list_shape(p, _query_tiling(p, target.architecture, planning and planning.parameters))
                packing = PreparedPacking.of(target.architecture, shape, _key_tensors(t), p.page_size)
        return cls(
            function,
            scalars,
            planned.key.dynamic,
            p.dtype,
            p.out_shape,
            p.lse_shape if p.return_lse else None,
            strides_suit,
            planning,
            split,
            packing,
        )

    def run(
        self, tensors: AttentionTensors, metadata: SchedulerMetadata | bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Launches on the current stream; returns (out, lse). metadata: the same as when it was prepared, or one of the
        same parameters."""
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k = tensors[:7]
        sink, given = tensors.learnable_sink, tensors.out
        device = q.device
        out = torch.empty(self.out_shape, dtype=self.dtype, device=device) if given is None else given
        lse = None
        if self.lse_shape is not None:
            lse = torch.empty(self.lse_shape, dtype=torch.float32, device=device)
        if self.function is None:
            return out, lse
        if k.numel() == 0:  # nothing will be loaded, but a tensor map needs an extent
            k, v = [x.new_empty([max(n, 1) for n in x.shape]) for x in (k, v)]
        if self.strides_suit != TMA_REACHES_ALL or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % TMA_ALIGNMENT:
            q, k, v = map(_for_tma, (q, k, v), self.strides_suit)
        target = out
        if given is not None and not (_strides_suit_tma(out) and out.data_ptr() % TMA_ALIGNMENT == 0):
            target = torch.empty_like(out, memory_format=torch.contiguous_format)
        mask, bias = _key_side(tensors)
        active = counts = None
        if self.packing is not None:
            active = self.packing.run(mask, _key_tensors(tensors))
            counts = active.counts
        work = semaphore = None
        if self.planning is not None:
            if not metadata:
                lengths = LengthTensors(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, counts)
                metadata = plan_batch(lengths, self.planning.extents, self.planning.parameters, "cute", device)
            work, semaphore = metadata.work, metadata.tile_count_semaphore
        if not self.is_dynamic:
            semaphore = None
        elif semaphore is None:
            semaphore = _semaphore(device)
        workspace = (None, None) if self.split is None else self.split.workspace(metadata)
        lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
        of_keys = (tensors.page_table, tensors.leftpad_k, tensors.cache_batch_idx, mask, bias, active)
        of_scores = (*of_keys, *_query_side(tensors))
        self.function((q, k, v, target, lse, *lengths, sink, semaphore, *workspace, work, *of_scores), self.scalars)
        if target is not out:
            out.copy_(target)
        return out, lse


def _key_tensors(t: AttentionTensors) -> KeyTensors:
    return KeyTensors(t.cu_seqlens_k, t.seqused_k, t.leftpad_k, t.page_table, t.cache_batch_idx)


def _key_side(tensors: AttentionTensors) -> tuple[Tensor | None, Tensor | None]:
    """(mask as uint8, bias), with a row for each of batched k. Nothing is copied."""
    mask, bias = tensors.key_mask, tensors.key_bias
    if mask is None and bias is None:
        return None, None
    sequences = tensors.k.shape[0]
    mask = None if mask is None else mask.view(torch.uint8)
    return tuple(
        x.expand(sequences, -1, -1) if x is not None and x.dim() == 3 and x.shape[0] == 1 else x for x in (mask, bias)
    )


def _query_side(tensors: AttentionTensors) -> tuple[Tensor | None, Tensor | None]:
    """(mask as uint8, bias) of each query. Nothing is copied; where no sequence has a key there is a column all the
    same, for a kernel to read and drop."""
    mask, bias = tensors.query_mask, tensors.query_bias
    if mask is None and bias is None:
        return None, None
    if mask is not None:
        mask = mask.view(torch.uint8)
    return tuple(x if x is None or x.shape[2] else x.new_zeros(*x.shape[:2], 1) for x in (mask, bias))


def _for_tma(x: Tensor, strides_suit: bool) -> Tensor:
    """x itself, or a compact copy where TMA cannot address it."""
    if strides_suit and x.data_ptr() % TMA_ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
