"""A kernel that works through a plan as a forward kernel does, and writes down which tile every number was."""

from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass.cute as cute
import torch
from cutlass import Int32

from flash_attn_cute.device.seqlens import SeqlenSource, SeqlenTensors
from flash_attn_cute.problem import INT32_MAX
from flash_attn_cute.scheduler_metadata import SchedulerMetadata
from flash_attn_cute.tile_scheduler import Found, PlannedOrder, PlannedWork, TileOrder, TileScheduler

FIELDS = 8  # of WorkTile, offset_q and rows_q


class RecorderTensors(NamedTuple):
    work: PlannedWork | None  # None: tiles are numbered without a plan
    cu_seqlens_q: cute.Tensor
    semaphore: cute.Tensor
    seen: cute.Tensor  # (numbers, FIELDS) int32
    taken: cute.Tensor  # (numbers,) int32: how often each number was handed out


class RecorderScalars(NamedTuple):
    heads: Int32
    total_q: Int32
    num_tiles: Int32  # without a plan
    short_from: Int32
    ctas: Int32


class Recorder:
    def __init__(self, dynamic: bool, longest_first: bool, tokens_per_tile: int = 0, keeps_first: bool = False):
        self.dynamic, self.longest_first, self.tokens_per_tile = dynamic, longest_first, tokens_per_tile
        self.keeps_first = keeps_first

    @cute.jit
    def __call__(self, tensors: RecorderTensors, scalars: RecorderScalars, stream: cuda.CUstream):
        self.kernel(tensors, scalars).launch(grid=[scalars.ctas, 1, 1], block=[32, 1, 1], stream=stream)

    def _order(self, tensors: RecorderTensors, scalars: RecorderScalars):
        lengths = SeqlenTensors(tensors.cu_seqlens_q, None, None, None)
        source = SeqlenSource(lengths, cute.size(tensors.cu_seqlens_q) - 1, scalars.total_q, Int32(0))
        if tensors.work is not None:
            return PlannedOrder.create(source, tensors.work, scalars.heads, self.longest_first, self.keeps_first)
        sections = Int32(2), Int32(7)
        return TileOrder(source, scalars.heads, scalars.num_tiles, *sections, self.tokens_per_tile, self.longest_first)

    @cute.kernel
    def kernel(self, tensors: RecorderTensors, scalars: RecorderScalars):
        order = self._order(tensors, scalars)
        scheduler = TileScheduler(tensors.semaphore if self.dynamic else None, scalars.short_from)
        number, found, turn = scheduler.first(), Found.nothing(), Int32(0)
        while number < order.num_tiles:
            tile, found = order.decode(number, found)
            seqlens = found.seqlens
            if cute.arch.lane_idx() == 0:
                for i, word in enumerate((*tile[:6], seqlens.offset_q, seqlens.rows_q)):
                    tensors.seen[number, i] = word
                cute.arch.atomic_add(tensors.taken.iterator + number, Int32(1))
            number = scheduler.next(number, turn)
            turn = turn ^ 1
        scheduler.finish()


_compiled = {}


def record(
    metadata: SchedulerMetadata,
    cu_seqlens_q: torch.Tensor,
    total_q: int,
    ctas: int,
    short_from: int = INT32_MAX,
    **options,
):
    """(seen, taken) of a plan's numbers, with some room behind the last."""
    numbers = metadata.tiles_bound + metadata.slots_bound
    scalars = (metadata.parameters.heads, total_q, 0, short_from, ctas)
    return _run(metadata.work, cu_seqlens_q, metadata.tile_count_semaphore, numbers, scalars, options)


def record_unplanned(
    cu_seqlens_q: torch.Tensor, total_q: int, heads: int, num_tiles: int, ctas: int, short_from: int, **options
):
    """(seen, taken) of the numbers of a packed batch without a plan."""
    semaphore = torch.zeros(2, dtype=torch.int32, device="cuda")
    recorded = _run(None, cu_seqlens_q, semaphore, num_tiles, (heads, total_q, num_tiles, short_from, ctas), options)
    assert semaphore.tolist() == [0, 0]
    return recorded


def _run(work, cu_seqlens_q, semaphore, numbers: int, scalars: tuple, options: dict):
    seen = torch.full((numbers, FIELDS), -9, dtype=torch.int32, device="cuda")
    taken = torch.zeros(numbers, dtype=torch.int32, device="cuda")
    key = (work is None, *options.items())
    if key not in _compiled:
        stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
        fake = _fake_tensors(work is not None), RecorderScalars(*(Int32(1) for _ in RecorderScalars._fields))
        _compiled[key] = cute.compile(Recorder(**options), *fake, stream, options="--enable-tvm-ffi")
    _compiled[key]((work, cu_seqlens_q, semaphore, seen, taken), scalars)
    return seen.cpu(), taken.cpu()


def _fake_tensors(planned: bool):
    def vector():
        return cute.runtime.make_fake_tensor(Int32, (cute.sym_int(),), stride=(1,), assumed_align=4)

    def rows(width):
        return cute.runtime.make_fake_tensor(Int32, (cute.sym_int(), width), stride=(width, 1), assumed_align=16)

    work = PlannedWork(rows(4), vector(), vector(), vector()) if planned else None
    return RecorderTensors(work, vector(), vector(), rows(FIELDS), vector())
