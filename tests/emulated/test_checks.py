"""Each check fires, and says which kernel, line and warp; the schedules differ, and repeat with their seed."""

import contextlib

import numpy as np
import pytest

from flash_attn_cute.emulator import errors
from flash_attn_cute.emulator.engine import Engine
from flash_attn_cute.emulator.launch import SCHEDULES, Allocation, EngineOptions, LaunchRecord

HEADER = """.version 8.8
.target {arch}
.address_size 64
.visible .entry k(.param .u64 p0) {{
.reg .pred %p<9>; .reg .b32 %r<19>; .reg .b64 %rd<19>;
.shared .align 16 .b8 memory[1024];
mov.u32 %r0, %tid.x; mov.u32 %r1, memory; ld.param.b64 %rd0, [p0];
"""


def aligned_words(count):
    """Words at a multiple of 32 bytes, as the widest access needs."""
    raw = np.zeros(count + 8, np.uint32)
    return raw[-raw.ctypes.data % 32 // 4 :][:count]


def run(body, array=None, block=32, arch="sm_90a", writable=True, size=None, **options):
    array = aligned_words(64) if array is None else array
    text = HEADER.format(arch=arch) + body + "\nret;\n}"
    allocation = Allocation(array.ctypes.data, size or array.nbytes, "the array", writable)
    params = np.array([array.ctypes.data], np.uint64).tobytes()
    record = LaunchRecord(text, "k", arch, (1, 1, 1), (block, 1, 1), (1, 1, 1), 0, params, [allocation])
    return Engine(EngineOptions(sms=1, **options)).run(record)


FIRES = {
    "global memory, past a tensor": (errors.OutOfBounds, "the array", "ld.global.b32 %r2, [%rd0+256];"),
    "global memory, a vector beyond the last 16 bytes": (
        errors.OutOfBounds,
        "read of 16 bytes",
        "ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd0+256];",
    ),
    "global memory, a vector store across the end": (
        errors.OutOfBounds,
        "write of 32 bytes|write of 16 bytes",
        "st.global.v4.b64 [%rd0+224], {%rd0, %rd0, %rd0, %rd0}; st.global.v4.b32 [%rd0+256], {%r0, %r0, %r0, %r0};",
    ),
    "global memory, before a tensor": (errors.OutOfBounds, "outside every tensor", "st.global.b32 [%rd0+-4], %r0;"),
    "shared memory": (errors.OutOfBounds, "shared address", "st.shared.b32 [%r1+1024], %r0;"),
    "shared memory below the first address": (
        errors.OutOfBounds,
        "shared address",
        "mov.b32 %r2, 0; st.shared.b32 [%r2], %r0;",
    ),
    "alignment": (errors.Misaligned, "not aligned", "ld.global.b32 %r2, [%rd0+2];"),
    "alignment of a vector": (errors.Misaligned, "16 bytes", "st.shared.v4.b32 [%r1+8], {%r0, %r0, %r0, %r0};"),
    "shared memory nobody wrote": (errors.Uninitialised, "never written", "ld.shared.b32 %r2, [%r1+64];"),
    "a barrier before it is one": (errors.BarrierMisuse, "before it was init", "mbarrier.arrive.shared.b64 _, [%r1];"),
    "too many arrivals": (
        errors.BarrierMisuse,
        "2 more arrivals where 1 of 3",
        "setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [%r1], 3; mbarrier.arrive.shared.b64 _, [%r1], 2;",
    ),
    "counts of a named barrier": (errors.BarrierMisuse, "not a multiple", "bar.sync 1, 33;"),
    "a wait for nothing": (errors.Deadlock, "warp 0.*named barrier 2: 32 of 64 threads", "bar.sync 2, 64;"),
    "an mbarrier nobody completes": (
        errors.Deadlock,
        "PTX line 9.*for parity 0: 1 of 1 arrivals pending, 0 bytes outstanding",
        "mbarrier.init.shared.b64 [%r1], 1;\nLOOP: mbarrier.try_wait.parity.shared.b64 %p1, [%r1], 0; @!%p1 bra LOOP;",
    ),
    "bytes that nothing expected": (
        errors.Leak,
        "got 64 bytes that nothing expected",
        "setp.ne.u32 %p1, %r0, 0; @%p1 bra END; mbarrier.init.shared.b64 [%r1], 1;"
        "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r1], 64; END:",
    ),
    "a trap": (errors.Trap, "trapped", "trap;"),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires(name):
    kind, message, body = FIRES[name]
    with pytest.raises(kind, match="(?s)kernel k.*" + message):
        run(body)


def test_a_read_may_end_in_the_last_sixteen_bytes():
    """Memory on a GPU comes in larger pieces than tensors have; writing there is an error all the same."""
    run("ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd0+240]; ld.global.v2.b32 {%r2, %r3}, [%rd0+248];", size=252)


def test_read_only_memory():
    with pytest.raises(errors.OutOfBounds, match="outside every tensor|read only"):
        run("st.global.b32 [%rd0], %r0;", writable=False)


TENSOR_MEMORY = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32; ld.shared.b32 %r2, [%r1];"
FREE = "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, 32;"
FIRES_100 = {
    "tensor memory never freed": (errors.Leak, "still allocated", ""),
    "tensor memory nobody wrote": (
        errors.Uninitialised,
        "tensor memory lane",
        "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r3}, [%r2];" + FREE,
    ),
    "tensor memory outside the allocation": (
        errors.OutOfBounds,
        "column 32 .*not allocated",
        "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r2+32], {%r0};" + FREE,
    ),
    "lanes of another warp": (
        errors.OutOfBounds,
        "reaches lanes 0 to 31",
        "add.u32 %r3, %r2, 0x200000; tcgen05.st.sync.aligned.32x32b.x1.b32 [%r3], {%r0};" + FREE,
    ),
    "a CTA that the cluster does not have": (
        errors.OutOfBounds,
        "names CTA 1 of a cluster of 1",
        "mapa.shared::cluster.u32 %r3, %r1, %r0; setp.lt.u32 %p1, %r0, 2; @%p1 st.shared::cluster.b32 [%r3+8], %r0;"
        + FREE,
    ),
}


@pytest.mark.parametrize("name", FIRES_100)
def test_fires_on_tensor_memory(name):
    kind, message, body = FIRES_100[name]
    with pytest.raises(kind, match="(?s)kernel k.*" + message):
        run(TENSOR_MEMORY + body, arch="sm_100a")


def tensor_map_array():
    """64-byte aligned words: a tensor map (4 rows of 8 floats, a box of 2 rows of 4), and the tensor behind it."""
    raw = np.zeros(64 + 16, np.uint32)
    array = raw[-raw.ctypes.data % 64 // 4 :][:64]
    base = array.ctypes.data + 128
    array[:16] = 0
    array[[0, 1]] = base & 0xFFFFFFFF, base >> 32
    array[2] = 2 | 1 << 4 | 7 << 7 | 1 << 18  # two dimensions of floats
    array[3] = 32 // 16
    array[[8, 9]] = 8 - 1, 4 - 1
    array[[13, 14]] = (4 - 1) << 24, 2 - 1
    return array


TENSOR_COPIES = {
    "inside": (4, 1, None, ""),
    "past the far ends": (8, 3, None, ""),
    "before the first row": (4, -1, errors.OutOfBounds, "coordinate -1 of dimension 1: none may be negative"),
    "before the first column": (-4, 0, errors.OutOfBounds, "coordinate -4 of dimension 0: none may be negative"),
    "off 16 bytes": (1, 0, errors.Misaligned, "coordinate 1 of dimension 0, .*not a multiple of 16 bytes"),
}


@pytest.mark.parametrize("way", ["load", "store"])
@pytest.mark.parametrize("name", TENSOR_COPIES)
def test_coordinates_of_a_tensor_copy(name, way):
    column, row, kind, message = TENSOR_COPIES[name]
    body = f"setp.ne.u32 %p1, %r0, 0; @%p1 bra END; mov.b32 %r2, {column}; mov.b32 %r3, {row}; add.u32 %r4, %r1, 512;"
    if way == "load":
        body += """mbarrier.init.shared.b64 [%r4], 1; mbarrier.arrive.expect_tx.shared.b64 %rd2, [%r4], 32;
        cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd0, {%r2, %r3}], [%r4];
        LOOP: mbarrier.try_wait.parity.shared.b64 %p2, [%r4], 0; @!%p2 bra LOOP;"""
    else:
        body += """st.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0}; st.shared.v4.b32 [%r1+16], {%r0, %r0, %r0, %r0};
        fence.proxy.async.shared::cta;
        cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd0, {%r2, %r3}], [%r1];
        cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"""
    with pytest.raises(kind, match=message) if kind else contextlib.nullcontext():
        run(body + "END:", tensor_map_array())


LOAD_BOX = """setp.ne.u32 %p1, %r0, 0; @%p1 bra END; mov.b32 %r2, 0; mov.b32 %r3, ROW; add.u32 %r4, %r1, 512;
mbarrier.init.shared.b64 [%r4], 1; mbarrier.arrive.expect_tx.shared.b64 %rd2, [%r4], 32;
cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd0, {%r2, %r3}], [%r4];
LOOP: mbarrier.try_wait.parity.shared.b64 %p2, [%r4], 0; @!%p2 bra LOOP; END:"""


def test_a_box_without_a_row_needs_a_first_address():
    """A map may begin before its tensor for boxes that reach into it; one that does not looks up where it begins."""
    rows_before = 1 << 27
    array = tensor_map_array()
    base = array.ctypes.data + 128 - rows_before * 32
    run(LOAD_BOX.replace("ROW", "4"), array)
    array[[0, 1]] = base & 0xFFFFFFFF, base >> 32
    array[9] = rows_before + 4 - 1
    run(LOAD_BOX.replace("ROW", f"{rows_before + 3}"), array)
    with pytest.raises(errors.OutOfBounds, match="first address"):
        run(LOAD_BOX.replace("ROW", f"{rows_before + 4}"), array)


def test_checks_can_be_turned_off():
    reads = "ld.shared.b32 %r2, [%r1+64];"
    run(reads, checks=frozenset({"bounds"}))
    run(reads, checks=frozenset({"-uninitialised"}))
    run(reads, checks=frozenset({"default", "-uninitialised"}))
    with pytest.raises(errors.OutOfBounds):
        run("ld.global.b32 %r2, [%rd0+256];", checks=frozenset({"-uninitialised"}))
    with pytest.raises(ValueError, match="checks: got deadlocks; takes names of "):
        run("", checks=frozenset({"-deadlocks"}))


COPY = """mad.wide.u32 %rd1, %r0, 4, %rd0; shl.b32 %r2, %r0, 2; add.u32 %r2, %r1, %r2; st.shared.b32 [%r2], 0;
cp.async.ca.shared.global [%r2], [%rd1], 4; cp.async.commit_group; WAIT
ld.shared.b32 %r3, [%r2]; add.u32 %r3, %r3, 1; st.global.b32 [%rd1], %r3;"""


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(3))
def test_a_copy_that_is_waited_for(schedule, seed):
    array = np.arange(64, dtype=np.uint32)
    run(COPY.replace("WAIT", "cp.async.wait_group 0;"), array, block=64, schedule=schedule, seed=seed)
    assert (array == np.arange(64) + 1).all()


def test_delayed_shows_a_copy_that_is_not_waited_for():
    array = np.arange(64, dtype=np.uint32)
    report = run(COPY.replace("WAIT", ""), array, block=64, schedule="delayed", seed=1)
    assert (array != np.arange(64) + 1).any() and report.deferred_operations == 64


ORDER = "setp.ne.u32 %p1, %r0, 0; and.b32 %r2, %r0, 31; setp.ne.u32 %p1, %r2, 0; @%p1 bra END;"
ORDER += "atom.global.add.u32 %r3, [%rd0], 1; shr.u32 %r4, %r0, 5; mad.wide.u32 %rd1, %r3, 4, %rd0;"
ORDER += "st.global.b32 [%rd1+4], %r4; END:"


def warp_order(**options):
    array = np.zeros(64, np.uint32)
    run(ORDER, array, block=512, **options)
    return list(array[1:17])


def test_random_schedules_differ_by_seed_and_repeat():
    assert warp_order() == list(range(16))
    orders = [warp_order(schedule="random", seed=seed) for seed in range(4)]
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert orders[2] == warp_order(schedule="random", seed=2)


def test_report_counts_by_class():
    report = run("ex2.approx.ftz.f32 %r2, %r0; fma.rn.f32 %r2, %r2, %r2, %r2; st.global.b32 [%rd0], %r2;", block=64)
    counts = report.by_class()
    assert counts["special"] == 2 and counts["fma"] == 2 and report.global_store_bytes == 64 * 4
    assert sum(report.instructions[0].values()) == sum(report.instructions[1].values())
    assert report.warp_instructions == sum(counts.values()) and report.ctas == 1


def test_bank_conflicts():
    same_bank = run("shl.b32 %r2, %r0, 7; and.b32 %r2, %r2, 1023; add.u32 %r2, %r2, %r1; st.shared.b32 [%r2], %r0;")
    assert same_bank.bank_conflicts == 7
    assert run("shl.b32 %r2, %r0, 2; add.u32 %r2, %r2, %r1; st.shared.b32 [%r2], %r0;").bank_conflicts == 0
