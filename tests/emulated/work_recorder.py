"""A kernel that works through a plan as a forward kernel does, and writes down which tile every number was."""

from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass.cute as cute
import torch
from cutlass import Int32

from flash_attn_cute.device.seqlens import SeqlenSource, SeqlenTensors
from flash_attn_cute.problem import INT32_MAX
from flash_attn_cute.scheduler_metadata import SchedulerMetadata
from flash_attn_cute.tile_scheduler import Found, PlannedOrder, PlannedWork, TileScheduler

FIELDS = 8  # of WorkTile, offset_q and rows_q


class RecorderTensors(NamedTuple):
    work: PlannedWork
    cu_seqlens_q: cute.Tensor
    semaphore: cute.Tensor
    seen: cute.Tensor  # (numbers, FIELDS) int32
    taken: cute.Tensor  # (numbers,) int32: how often each number was handed out


class Recorder:
    def __init__(self, dynamic: bool, longest_first: bool):
        self.dynamic, self.longest_first = dynamic, longest_first

    @cute.jit
    def __call__(
        self,
        tensors: RecorderTensors,
        heads: Int32,
        total_q: Int32,
        short_from: Int32,
        ctas: Int32,
        stream: cuda.CUstream,
    ):
        self.kernel(tensors, heads, total_q, short_from).launch(grid=[ctas, 1, 1], block=[32, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, tensors: RecorderTensors, heads: Int32, total_q: Int32, short_from: Int32):
        lengths = SeqlenTensors(tensors.cu_seqlens_q, None, None, None)
        source = SeqlenSource(lengths, cute.size(tensors.cu_seqlens_q) - 1, total_q, Int32(0))
        order = PlannedOrder.create(source, tensors.work, heads, self.longest_first)
        scheduler = TileScheduler(tensors.semaphore if self.dynamic else None, short_from)
        number, found = scheduler.first(), Found.nothing()
        while number < order.num_tiles:
            tile, found = order.decode(number, found)
            seqlens = found.seqlens
            if cute.arch.lane_idx() == 0:
                for i, word in enumerate((*tile, seqlens.offset_q, seqlens.rows_q)):
                    tensors.seen[number, i] = word
                cute.arch.atomic_add(tensors.taken.iterator + number, Int32(1))
            number = scheduler.next(number)
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
    """(seen, taken) with some room behind the last number."""
    numbers = metadata.tiles_bound + metadata.slots_bound
    seen = torch.full((numbers, FIELDS), -9, dtype=torch.int32, device="cuda")
    taken = torch.zeros(numbers, dtype=torch.int32, device="cuda")
    key = tuple(options.items())
    if key not in _compiled:
        stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
        _compiled[key] = cute.compile(
            Recorder(**options), _fake_tensors(), *(Int32(1) for _ in range(4)), stream, options="--enable-tvm-ffi"
        )
    m = metadata
    work = (m.entries, m.cu_total_m_blocks, m.cu_total_splits_m_blocks, m.summary)
    tensors = (work, cu_seqlens_q, m.tile_count_semaphore, seen, taken)
    _compiled[key](tensors, m.parameters.heads, total_q, short_from, ctas)
    return seen.cpu(), taken.cpu()


def _fake_tensors():
    def vector():
        return cute.runtime.make_fake_tensor(Int32, (cute.sym_int(),), stride=(1,), assumed_align=4)

    def rows(width):
        return cute.runtime.make_fake_tensor(Int32, (cute.sym_int(), width), stride=(width, 1), assumed_align=16)

    work = PlannedWork(rows(4), vector(), vector(), vector())
    return RecorderTensors(work, vector(), vector(), rows(FIELDS), vector())
