"""The scheduling warp of a forward kernel: finds its CTA's tiles ahead of the other warps and sends them on."""

import cutlass.cute as cute
from cutlass import Int32, const_expr

from flash_attn_cute.device.kv_range import KvRange, Window
from flash_attn_cute.device.output_rows import clear_partial, clear_rows
from flash_attn_cute.device.pipelines import MbarrierRing
from flash_attn_cute.device.seqlens import Seqlens
from flash_attn_cute.forward_spec import ForwardSpec, ForwardTensors, kv_range, with_keys
from flash_attn_cute.tile_scheduler import (
    ClcScheduler,
    Found,
    PlannedOrder,
    TileMailbox,
    TileOrder,
    TileScheduler,
    WorkTile,
)

WARP = 32
LINE_BYTES = 128


@cute.jit
def _settle(spec: ForwardSpec, work: WorkTile, seqlens: Seqlens, tensors: ForwardTensors):
    if const_expr(spec.splits):
        if work.num_splits > 1:
            clear_partial(spec, work.slot, tensors)
        else:
            clear_rows(spec, work, seqlens, tensors)
    else:
        clear_rows(spec, work, seqlens, tensors)


def _keys(spec: ForwardSpec, seqlens: Seqlens, kv: KvRange) -> Int32:
    """That a work tile meets, or more. kv: what it visits."""
    return kv.num_tiles() * spec.tile.tile_n if spec.skips else seqlens.len_k


@cute.jit
def prefetch_lengths(tensors: ForwardTensors):
    """Starts to bring what tiles are found with close to this SM, as far as a line a lane reaches.

    Finding a tile may be a chain of loads. With nothing in L2 each of them would take a trip to memory.
    """
    line = cute.arch.lane_idx() * (LINE_BYTES // 4)
    read = [tensors.cu_seqlens_q, tensors.cu_seqlens_k, tensors.seqused_q, tensors.seqused_k]
    if const_expr(tensors.work is not None):
        work = tensors.work
        read += [work.entries, work.cu_total_splits_m_blocks, work.summary]
    for tensor in read:
        if const_expr(tensor is not None):
            if line < cute.size(tensor):
                _prefetch(tensor.iterator + line)
    if const_expr(tensors.page_table is not None):
        _prefetch_pages(tensors.page_table)


@cute.jit
def _prefetch_pages(table: cute.Tensor):
    """All CTAs together bring the page table, or as much of it as a line a lane reaches."""
    rows, columns = table.shape
    lines = (columns + LINE_BYTES // 4 - 1) // (LINE_BYTES // 4)
    line = cute.arch.block_idx()[0] * WARP + cute.arch.lane_idx()
    if line < rows * lines:
        _prefetch(cute.domain_offset((line // lines, line % lines * (LINE_BYTES // 4)), table).iterator)


def _prefetch(address: cute.Pointer):
    cute.arch.prefetch(address.llvm_ptr, cache_level="L2")


@cute.jit
def schedule(
    spec: ForwardSpec,
    order: TileOrder | PlannedOrder,
    scheduler: TileScheduler | ClcScheduler,
    mailbox: TileMailbox,
    window: Window,
    tensors: ForwardTensors,
):
    """Sends every tile of this CTA that sees a key, and at last `WorkTile.none()`. Tiles that see none it settles."""
    position = MbarrierRing.start()
    number, found, turn = scheduler.first(), Found.nothing(), Int32(0)
    while number < order.num_tiles:
        work, found = order.decode(number, found)
        seqlens = found.seqlens
        if work.is_work():
            tile = with_keys(spec, work, seqlens, window, tensors)
            kv = kv_range(spec, tile, seqlens, window)
            if kv.num_tiles() > 0:
                mailbox.send(position, tile, seqlens)
                position = position.next()
                # Only now: a number taken early is work that an idle CTA cannot have.
                mailbox.wait_sent(position, _keys(spec, seqlens, kv))
            else:
                _settle(spec, tile, seqlens, tensors)
        number = scheduler.next(number, turn)
        turn = turn ^ 1
    mailbox.send(position, WorkTile.none(), Seqlens.none())
    scheduler.finish()
