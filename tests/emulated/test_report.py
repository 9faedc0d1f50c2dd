"""The report's figures for kernels small enough to count by hand: hand-written PTX through the engine."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flash_attn_cute import Support
from flash_attn_cute.emulator import report_text
from flash_attn_cute.emulator.__main__ import _write_report
from flash_attn_cute.emulator.costs import rates
from flash_attn_cute.emulator.engine import Engine
from flash_attn_cute.emulator.launch import SCHEDULES, Allocation, EngineOptions, LaunchRecord

REPOSITORY = Path(__file__).resolve().parents[2]
# %r0: thread, %r1: shared memory, %rd0: 4 KiB of global memory. Three instructions before the body: 2 mov, 1 ld.param.
HEADER = """.version 8.8
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 p0) {
.reg .pred %p<9>; .reg .b32 %r<19>; .reg .b64 %rd<19>; .reg .f32 %f<64>;
.shared .align 128 .b8 memory[16384];
mov.u32 %r0, %tid.x; mov.u32 %r1, memory; ld.param.b64 %rd0, [p0];
"""
UNWRITTEN = frozenset({"bounds"})  # for kernels that read shared memory only to be counted


def run(body, block=32, grid=1, arch="sm_90a", cluster=1, memory=None, **options):
    memory = np.zeros(1024, np.uint32) if memory is None else memory
    allocation = Allocation(memory.ctypes.data, memory.nbytes, "memory")
    params = np.array([memory.ctypes.data], np.uint64).tobytes()
    text = HEADER + body + "\nret;\n}"
    record = LaunchRecord(text, "k", arch, (grid, 1, 1), (block, 1, 1), (cluster, 1, 1), 0, params, [allocation])
    return Engine(EngineOptions(sms=2, **options)).run(record)


def counts(body, **options):
    """Executed warp-instructions by class, without the header's and the ret."""
    report = run(body, **options)
    found = report.by_class()
    warps = report.ctas * len(report.instructions)
    for name, count in (("move", 2), ("memory", 1), ("control", 1)):
        found[name] -= count * warps
    return {name: count for name, count in found.items() if count}


# -- classes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "name"),
    [
        ("ex2.approx.ftz.f32 %f0, %f1;", "special"),
        ("fma.rn.f32 %f0, %f1, %f1, %f1;", "fma"),
        ("add.s32 %r2, %r0, %r0;", "integer"),
        ("max.f32 %f0, %f1, %f2;", "integer"),
        ("setp.lt.s32 %p1, %r0, %r1;", "integer"),
        ("setp.eq.s32 %p1, %r0, %r1, !%p2;", "integer"),  # which takes the core two operations
        ("cvt.rn.bf16x2.f32 %r2, %f0, %f1;", "convert"),
        ("mov.b64 %rd1, {%r0, %r1};", "move"),
        ("st.global.b32 [%rd0], %r0;", "memory"),
        ("bar.sync 0;", "barrier"),
        ("fence.proxy.async;", "barrier"),
        ("wgmma.fence.sync.aligned;", "barrier"),
        ("wgmma.wait_group.sync.aligned 0;", "barrier"),
        ("shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;", "control"),
        ("setmaxnreg.dec.sync.aligned.u32 24;", "control"),
    ],
)
def test_each_instruction_counts_once(instruction, name):
    assert counts(instruction) == {name: 1}
    assert counts(instruction, block=96, grid=2) == {name: 6}


def test_guards_that_hold_in_no_lane_are_counted_apart():
    body = "setp.lt.u32 %p1, %r0, 40; @%p1 add.s32 %r2, %r0, 1; @!%p1 add.s32 %r2, %r0, 2;"
    report = run(body, block=96)  # all lanes of the first warp, some of the second, none of the third
    assert [warp["integer"] for warp in report.instructions] == [1 + 1, 1 + 2, 1 + 1]
    assert report.skipped == [1, 0, 1]


WAIT = """setp.ne.u32 %p1, %r0, 0; @%p1 bra READY; mbarrier.init.shared.b64 [%r1], 1; READY: bar.sync 0;
setp.lt.u32 %p2, %r0, 32; @%p2 bra WAITING;
mov.b32 %r2, 0; MORE: add.s32 %r2, %r2, 1; setp.lt.s32 %p3, %r2, 2000; @%p3 bra MORE;
setp.ne.u32 %p1, %r0, 32; @%p1 bra END; mbarrier.arrive.shared.b64 _, [%r1]; bra END;
WAITING: LOOP END:"""
LOOPS = {
    "branch out": "AGAIN: mbarrier.try_wait.parity.shared.b64 %p4, [%r1], 0, 1000; @%p4 bra END; bra AGAIN;",
    "branch back": "AGAIN: mbarrier.try_wait.parity.shared.b64 %p4, [%r1], 0; @!%p4 bra AGAIN;",
    "compilers'": """AGAIN: mbarrier.try_wait.parity.shared.b64 %p4, [%r1], 0; selp.u32 %r3, 1, 0, %p4;
        setp.eq.u32 %p5, %r3, 0; @%p5 bra AGAIN;""",
}


@pytest.mark.parametrize("name", LOOPS)
def test_waits_tried_again_are_counted_apart(name):
    reports = [
        run(WAIT.replace("LOOP", LOOPS[name]), block=64, schedule=schedule, seed=seed)
        for schedule in SCHEDULES
        for seed in range(3)
    ]
    assert {report.names["mbarrier.try_wait.parity.shared.b64"][0] for report in reports} == {1}
    assert len({str(report.instructions) for report in reports}) == 1
    assert all(report.retried[0] > 0 for report in reports) and all(report.retried[1] == 0 for report in reports)


def test_an_instruction_that_waits_for_other_lanes_counts_once():
    """The odd lanes come later; the shuffle runs when all are there."""
    body = """and.b32 %r2, %r0, 1; setp.eq.u32 %p1, %r2, 0; @%p1 bra MEET; add.s32 %r3, %r0, 1; add.s32 %r3, %r3, 1;
    MEET: shfl.sync.bfly.b32 %r4, %r0, 1, 31, -1;"""
    for schedule in SCHEDULES:
        assert run(body, schedule=schedule).names["shfl.sync.bfly.b32"] == [1]


# -- units -------------------------------------------------------------------------------------------------------------


SPECIAL = """ex2.approx.ftz.f32 %f0, %f1; ex2.approx.ftz.f32 %f0, %f1; rcp.approx.ftz.f32 %f0, %f1;
ex2.approx.ftz.bf16x2 %r2, %r0;"""


@pytest.mark.parametrize(("arch", "cycles"), [("sm_90a", 10), ("sm_100a", 10), ("sm_103a", 6)])
def test_special_functions(arch, cycles):
    """Two of one exponential, one of two, a reciprocal: 32 lanes at 16 a clock, exponentials on sm_103 at 32."""
    report = run(SPECIAL, arch=arch)
    assert (report.special_operations, report.exponentials) == (5, 4)
    assert report.special_cycles == cycles


def test_fma_pipe():
    """32 lanes at 128 a clock; a packed instruction has two products a lane."""
    body = "fma.rn.f32 %f0, %f1, %f1, %f1; add.f32 %f0, %f1, %f1; fma.rn.f32x2 %rd1, %rd2, %rd2, %rd2; "
    report = run(body + "mul.lo.s32 %r2, %r0, %r0; max.f32 %f0, %f1, %f1;", arch="sm_100a")
    assert report.fma_operations == 4 and report.fma_cycles == 1.0 and report.by_class()["fma"] == 3


def test_wgmma_cycles():
    """64 x 64 x 16 in 16 bits: 65536 multiply-adds at 2048 a clock, and twice that time for half as wide tf32."""
    registers = ", ".join(f"%f{n}" for n in range(32))
    for kind, k, majors in (("bf16.bf16", 16, ", 0, 0"), ("tf32.tf32", 8, "")):
        body = "mov.b64 %rd1, 0x4000004000010040; setp.eq.u32 %p1, 0, 1;" + (
            f"wgmma.mma_async.sync.aligned.m64n64k{k}.f32.{kind} {{{registers}}}, %rd1, %rd1, %p1, 1, 1{majors};"
        )
        report = run(body, block=128, checks=UNWRITTEN)
        assert report.mma_multiply_adds == 64 * 64 * k and report.mma_cycles == 32.0
        assert [warp["tensor"] for warp in report.instructions] == [1] * 4


@pytest.mark.parametrize(("ctas", "rows", "descriptor"), [(1, 128, "0x08100490"), (2, 256, "0x10100490")])
def test_tcgen05_cycles(ctas, rows, descriptor):
    """128 x 64 x 16 in 16 bits for each CTA: 131072 multiply-adds at 4096 a clock, issued by one thread."""
    body = """setp.ge.u32 %p2, %r0, 32; @%p2 bra END;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 64; ld.shared.b32 %r2, [%r1];
    mov.b64 %rd1, 0x4000404000010040; mov.b32 %r3, DESCRIPTOR; setp.eq.u32 %p3, 0, 1;
    barrier.cluster.arrive; barrier.cluster.wait; mov.u32 %r4, %cluster_ctarank; or.b32 %r4, %r4, %r0;
    setp.ne.u32 %p1, %r4, 0;
    @%p1 bra FREE; tcgen05.mma.cta_group::1.kind::f16 [%r2], %rd1, %rd1, %r3, %p3;
    FREE: barrier.cluster.arrive; barrier.cluster.wait; tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, 64; END:"""
    body = body.replace("cta_group::1", f"cta_group::{ctas}").replace("DESCRIPTOR", descriptor)
    report = run(body, block=32, grid=ctas, cluster=ctas, arch="sm_100a", checks=UNWRITTEN)
    assert report.mma_multiply_adds == rows * 64 * 16 and report.mma_cycles == 32.0 * ctas
    assert report.by_class()["tensor"] == 1
    assert report.mma_tiles(64, 64) == ctas * 131072 / (128 * 128 * 128)


def test_rates_are_the_architectures_own():
    assert [rates(arch).multiply_adds for arch in ("sm_80", "sm_90a", "sm_100a", "sm_103a")] == [1024, 2048, 4096, 4096]


def test_issue_cycles_follow_the_schedulers():
    """Of eight warps, 1 and 5 have ten moves and ten additions more; they share a scheduler."""
    body = "shr.u32 %r2, %r0, 5; and.b32 %r2, %r2, 3; setp.ne.u32 %p1, %r2, 1; @%p1 bra END;"
    report = run(body + 10 * "mov.b32 %r3, 1; add.s32 %r3, %r3, %r0;" + "END:", block=256)
    plain = 3 + 4 + 1  # header, body and ret; the branch is not taken by warps 1 and 5, so it counts as skipped there
    long = plain - 1 + 20
    assert report.issued_by_scheduler == [2 * plain, 2 * long, 2 * plain, 2 * plain]
    assert report.issue_cycles == 2 * long and report.issue_cycles_mean == (6 * plain + 2 * long) / 4
    assert report.issue_cycles_without_moves == 2 * (long - 10 - 2)
    assert report.bound == ("issue", report.issue_cycles_without_moves)


# -- memory ------------------------------------------------------------------------------------------------------------


def address(stride_bytes):
    return f"mad.lo.u32 %r2, %r0, {stride_bytes}, %r1;"


@pytest.mark.parametrize(
    ("instruction", "stride", "wavefronts", "conflicts"),
    [
        ("ld.shared.b32 %r3, [%r2];", 4, 1, 0),
        ("ld.shared.b32 %r3, [%r2];", 8, 2, 1),
        ("ld.shared.b32 %r3, [%r2];", 128, 32, 31),
        ("ld.shared.b32 %r3, [%r2];", 132, 1, 0),
        ("ld.shared.b32 %r3, [%r2];", 0, 1, 0),  # one word for all
        ("st.shared.b32 [%r2], %r0;", 64, 16, 15),
        ("st.shared.b16 [%r2], 0;", 2, 1, 0),
        ("ld.shared.b64 %rd1, [%r2];", 8, 2, 0),
        ("ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r2];", 16, 4, 0),
        ("ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r2];", 128, 32, 28),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r3, %r4, %r5, %r6}, [%r2];", 16, 4, 0),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r3, %r4, %r5, %r6}, [%r2];", 128, 32, 28),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r2];", 32, 2, 1),
        ("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r2], {%r0, %r0};", 64, 8, 6),
    ],
)
def test_wavefronts(instruction, stride, wavefronts, conflicts):
    report = run(address(stride) + instruction, checks=UNWRITTEN)
    kind = instruction.split(".")[0]
    assert vars(report.shared[kind]) == {"accesses": 1, "wavefronts": wavefronts, "conflicts": conflicts}
    assert report.bank_conflicts == conflicts


def test_lanes_that_are_off_make_no_conflicts():
    body = address(128) + "setp.lt.u32 %p1, %r0, 2; @%p1 st.shared.b32 [%r2], %r0;"
    assert vars(run(body).shared["st"]) == {"accesses": 1, "wavefronts": 2, "conflicts": 1}


def test_generic_addresses_are_counted_where_they_point():
    body = "cvt.u64.u32 %rd1, %r1; cvta.shared.u64 %rd1, %rd1; st.b32 [%rd1], %r0; ld.b32 %r2, [%rd0];"
    report = run(body)
    assert report.shared["st"].accesses == 1 and report.global_load_bytes == 32 * 4 and report.global_store_bytes == 0


def test_global_bytes():
    body = "setp.lt.u32 %p1, %r0, 4; ld.global.v2.b32 {%r2, %r3}, [%rd0]; @%p1 st.global.b16 [%rd0], 0; "
    report = run(body + "@%p1 atom.global.add.u32 %r2, [%rd0], 1; @%p1 red.global.add.u32 [%rd0], 1;")
    assert report.global_load_bytes == 32 * 8 + 4 * 4  # parameters are no traffic
    assert report.global_store_bytes == 4 * 2 + 4 * 4 + 4 * 4


BULK = """setp.ne.u32 %p1, %r0, 0; @%p1 bra END;
mbarrier.init.shared.b64 [%r1], 1; mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 512; add.u32 %r2, %r1, 1024;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd0], 512, [%r1];
WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0; @!%p2 bra WAIT;
cp.async.bulk.global.shared::cta.bulk_group [%rd0+1024], [%r2], 256;
cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd0+2048], [%r2], 64;
cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; END:"""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tma_bytes(schedule):
    report = run(BULK, schedule=schedule)
    assert (report.tma_load_bytes, report.tma_store_bytes, report.tma_reduce_bytes) == (512, 256, 64)
    assert (report.global_load_bytes, report.global_store_bytes) == (512, 256 + 64)


def test_tma_counts_a_warps_store_once_and_global_bytes_inside_the_tensor():
    """64 floats from the 32nd of a tensor of 64: half of the box is outside. All lanes ask for it, as one."""
    raw = np.zeros(1024 + 16, np.uint32)
    memory = raw[-raw.ctypes.data % 64 // 4 :][:1024]
    start = memory.ctypes.data + 1024
    memory[:3] = [start & 0xFFFFFFFF, start >> 32, 2 | 7 << 7 | 1 << 18]  # a vector of floats
    memory[8], memory[13] = 64 - 1, 64 - 1 << 24  # its length and the box
    body = """mad.lo.u32 %r2, %r0, 8, %r1; st.shared.v2.b32 [%r2], {%r0, %r0}; bar.warp.sync -1;
    cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%rd0, {32}], [%r1];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"""
    report = run(body, memory=memory)
    assert (report.tma_store_bytes, report.global_store_bytes) == (256, 128)
    assert memory[256 + 32 : 256 + 64].tolist() == [lane for lane in range(16) for _ in "xy"]


# -- roles -------------------------------------------------------------------------------------------------------------


ROLES = """setp.lt.u32 %p1, %r0, 128; @%p1 bra PRODUCER;
setmaxnreg.inc.sync.aligned.u32 240; fma.rn.f32 %f0, %f1, %f1, %f1; bra END;
PRODUCER: setmaxnreg.dec.sync.aligned.u32 24; setp.ge.u32 %p2, %r0, 32; @%p2 bra END;
st.global.b32 [%rd0], %r0; st.global.b32 [%rd0], %r0; st.global.b32 [%rd0], %r0; END:"""


def test_roles_are_found_by_what_warps_execute():
    report = run(ROLES, block=384)
    assert report.roles == {"warp 0": [0], "warps 1-3": [1, 2, 3], "warps 4-11": list(range(4, 12))}
    by_role = report.by_role()
    assert by_role["warps 4-11"]["fma"] == 8 and by_role["warp 0"]["memory"] == 1 + 3
    assert sum(sum(role.values()) for role in by_role.values()) == report.warp_instructions


def test_roles_can_be_named():
    report = run(ROLES, block=384)
    report.name_roles({"load": [0], "softmax": range(4, 20)})
    assert report.roles == {"load": [0], "softmax": list(range(4, 12)), "warps 1-3": [1, 2, 3]}


# -- what is written ---------------------------------------------------------------------------------------------------


FIELDS = """kernel arch grid block cluster ctas instructions skipped retried names roles special_operations exponentials
fma_operations mma_multiply_adds mma_cycles tma_load_bytes tma_store_bytes tma_reduce_bytes global_load_bytes
global_store_bytes shared deferred_operations seconds warp_instructions bank_conflicts issued_by_scheduler
special_cycles fma_cycles issue_cycles issue_cycles_mean issue_cycles_without_moves by_class by_role
bound bound_cycles per_tile"""
PER_TILE = """tiles bound warp_instructions tensor special fma integer convert move memory barrier control skipped
special_operations fma_operations mma_cycles special_cycles fma_cycles issue_cycles issue_cycles_mean
issue_cycles_without_moves bound_cycles tma_load_bytes tma_store_bytes tma_reduce_bytes global_load_bytes
global_store_bytes bank_conflicts"""


def test_json_has_the_documented_fields():
    report = run(ROLES, block=384)
    written = json.loads(json.dumps(report.as_dict(tiles=4)))
    assert set(written) == set(FIELDS.split()) and set(written["per_tile"]) == set(PER_TILE.split())
    assert written["per_tile"]["warp_instructions"] == report.warp_instructions / 4
    assert written["by_role"]["warp 0"]["memory"] == 4


def test_the_table_shows_the_counts():
    text = report_text.render(run(ROLES, block=384), tiles=2)
    rows = {line[:22].strip(): line.split() for line in text.splitlines()}
    assert rows["warps 4-11"][2:6] == [str(8 * 8), "0", "0", "8"]
    assert "bound: issue" in text and "all, per tile" in text


@pytest.mark.parametrize("name", ["costs.json", "costs.txt", "-"])
def test_report_files(name, tmp_path, capsys):
    target = name if name == "-" else str(tmp_path / name)
    _write_report(target, SimpleNamespace(arch="sm_90a", launches=[run("bar.sync 0;")]))
    text = capsys.readouterr().out if name == "-" else Path(target).read_text()
    if name.endswith(".json"):
        assert json.loads(text)["launches"][0]["by_class"]["barrier"] == 1
    else:
        assert text.startswith("k\nsm_90a, grid 1x1x1")


# -- scripts/report.py -------------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # scripts put the repository first
    spec = importlib.util.spec_from_file_location("report_script", REPOSITORY / "scripts" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_counts_visible_tiles(script):
    full = script.Case("sm_90a", "ours", 64, 2048, False)
    assert (full.tiles, full._replace(causal=True).tiles) == (256, 136)
    assert full._replace(seqlen=129, causal=True).tiles == 3


def test_the_script_says_what_is_missing(script, monkeypatch):
    no_kernel = SimpleNamespace(supports=lambda *arguments, **options: Support(False, "no kernel for 10.0"))
    monkeypatch.setitem(sys.modules, "without_kernel", no_kernel)
    monkeypatch.setattr(script, "MODULES", {"ours": "without_kernel", "flash-attn-4": "no_such_module"})
    case = script.Case("sm_100a", "ours", 64, 2048, False)
    _, missing = script.implementation(case, ())
    assert missing == "not built: no kernel for 10.0"
    row = script.as_row(case._asdict() | {"missing": missing})
    assert row[4] == "not built" and len(row) == len(script.COLUMNS)
    assert script.implementation(case._replace(kernel="flash-attn-4"), ())[1].startswith("not importable")


def test_the_script_measures(tmp_path):
    target = tmp_path / "costs.json"
    command = [
        sys.executable,
        "scripts/report.py",
        "--arch",
        "sm_90a",
        "--headdim",
        "64",
        "--seqlen",
        "384",
        "--causal",
    ]
    subprocess.run([*command, "--json", str(target)], cwd=REPOSITORY, check=True)
    (measured,) = json.loads(target.read_text())
    assert measured["tiles"] == 3 + 2 + 1 and measured["report"]["roles"]["load"] == [0]
    # 128 x 128 exponentials a tile are 512 warps' worth, also on the diagonal; each row takes a few more.
    assert 512 <= measured["report"]["per_tile"]["special_operations"] < 900
