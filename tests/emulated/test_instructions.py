"""Instruction families against numpy: hand-written PTX goes straight through the engine."""

import numpy as np
import pytest

from flash_attn_cute.emulator.errors import UnknownInstruction
from tests.emulated.ptx_launch import launch

LETTER = {2: "b16", 4: "b32", 8: "b64"}
PREFIX = {2: "%h", 4: "%r", 8: "%rd"}


def lanes(body, *inputs, out=np.uint32, outputs=1):
    """Runs `body` once a lane: inputs arrive in %r1.. (%rd1.., %h1..) in order, results are taken from %o0, %o1."""
    inputs = [np.ascontiguousarray(array) for array in inputs]
    results = [np.zeros(32, out) for _ in range(outputs)]
    arrays = [*inputs, *results]
    header = ", ".join(f".param .u64 p{n}" for n in range(len(arrays)))
    text = [".version 8.8", ".target sm_90a", ".address_size 64", f".visible .entry k({header})", "{"]
    size = np.dtype(out).itemsize
    text += [".reg .pred %p<9>;", ".reg .b16 %h<40>;", ".reg .b32 %r<40>;", ".reg .b64 %rd<40>;", ".reg .b64 %a<40>;"]
    text += [f".reg .{LETTER[size]} %o<{outputs}>;", ".reg .b32 %t;", "mov.u32 %t, %tid.x;"]
    for n, array in enumerate(inputs):
        width = array.itemsize
        text += [f"ld.param.b64 %a{n}, [p{n}];", f"mad.wide.u32 %a{n}, %t, {width}, %a{n};"]
        text += [f"ld.global.{LETTER[width]} {PREFIX[width]}{n + 1}, [%a{n}];"]
    text += [body]
    for n in range(outputs):
        m = len(inputs) + n
        text += [f"ld.param.b64 %a{m}, [p{m}];", f"mad.wide.u32 %a{m}, %t, {size}, %a{m};"]
        text += [f"st.global.{LETTER[size]} [%a{m}], %o{n};"]
    text += ["ret;", "}"]
    launch("\n".join(text), [], arrays)
    return results[0] if outputs == 1 else results


rng = np.random.default_rng(0)
U32 = rng.integers(0, 2**32, 32, dtype=np.uint32)
V32 = rng.integers(0, 2**32, 32, dtype=np.uint32)
U32[:4] = [0, 1, 0x80000000, 0xFFFFFFFF]
V32[:4] = [1, 0xFFFFFFFF, 0xFFFFFFFF, 3]
U64 = rng.integers(0, 2**64, 32, dtype=np.uint64)
V64 = rng.integers(1, 2**64, 32, dtype=np.uint64)
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.4e38], np.float32)
F32 = np.concatenate([SPECIAL, rng.standard_normal(24).astype(np.float32)])
G32 = np.concatenate([SPECIAL[::-1], rng.standard_normal(24).astype(np.float32) * 3])
S = np.int32
L = np.int64


def same(got, expected):
    """Bit for bit, NaN equal to NaN whatever its payload."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype
    if got.dtype.kind == "f":
        nan = np.isnan(expected)
        assert (np.isnan(got) == nan).all()
        got, expected = got[~nan], expected[~nan]
    assert (got.view(f"u{got.itemsize}") == expected.view(f"u{got.itemsize}")).all()


@pytest.mark.parametrize(
    "opcode, expected",
    [
        ("add.s32", U32 + V32),
        ("sub.s32", U32 - V32),
        ("mul.lo.s32", U32 * V32),
        ("mul.hi.u32", (U32.astype(np.uint64) * V32 >> np.uint64(32)).astype(np.uint32)),
        ("mul.hi.s32", (U32.view(S).astype(L) * V32.view(S) >> 32).astype(S).view(np.uint32)),
        ("and.b32", U32 & V32),
        ("or.b32", U32 | V32),
        ("xor.b32", U32 ^ V32),
        ("min.s32", np.minimum(U32.view(S), V32.view(S)).view(np.uint32)),
        ("max.u32", np.maximum(U32, V32)),
        ("min.u32", np.minimum(U32, V32)),
        ("max.s32", np.maximum(U32.view(S), V32.view(S)).view(np.uint32)),
        ("div.u32", U32 // V32),
        ("rem.u32", U32 % V32),
    ],
)
def test_integer(opcode, expected):
    same(lanes(f"{opcode} %o0, %r1, %r2;", U32, V32), expected)


def test_signed_division_truncates():
    a, b = U32.view(S).astype(L), V32.view(S).astype(L)
    quotient = np.trunc(a / b).astype(L)
    quotient[2] = -(2**31)  # the lowest integer by -1 wraps
    same(lanes("div.s32 %o0, %r1, %r2;", U32, V32), quotient.astype(S).view(np.uint32))
    remainder = np.where(b == -1, 0, a - b * quotient)
    same(lanes("rem.s32 %o0, %r1, %r2;", U32, V32), remainder.astype(S).view(np.uint32))


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 63, 64, 65, 0xFFFFFFFF])
def test_shifts_past_the_width(count):
    left = [0 if count > 31 else (int(u) << count) & 0xFFFFFFFF for u in U32]
    same(lanes(f"shl.b32 %o0, %r1, {count};", U32), np.array(left, np.uint32))
    right = [int(u) >> min(count, 40) for u in U32]
    same(lanes(f"shr.u32 %o0, %r1, {count};", U32), np.array(right, np.uint32))
    arithmetic = [(int(u) >> min(count, 40)) & 0xFFFFFFFF for u in U32.view(S)]
    same(lanes(f"shr.s32 %o0, %r1, {count};", U32), np.array(arithmetic, np.uint32))
    left = [0 if count > 63 else (int(u) << count) & (2**64 - 1) for u in U64]
    same(lanes(f"shl.b64 %o0, %rd1, {count};", U64, out=np.uint64), np.array(left, np.uint64))


def test_wide_products():
    same(lanes("mul.wide.u32 %o0, %r1, %r2;", U32, V32, out=np.uint64), U32.astype(np.uint64) * V32)
    expected = (U32.view(S).astype(L) * V32.view(S) + U64.view(L)).view(np.uint64)
    same(lanes("mad.wide.s32 %o0, %r1, %r2, %rd3;", U32, V32, U64, out=np.uint64), expected)
    high = np.array([(int(a) * int(b)) >> 64 for a, b in zip(U64, V64, strict=True)], np.uint64)
    same(lanes("mul.hi.u64 %o0, %rd1, %rd2;", U64, V64, out=np.uint64), high)


def test_carries():
    body = "add.cc.u32 %o0, %r1, %r2; addc.u32 %o1, 0, 0;"
    low, carry = lanes(body, U32, V32, outputs=2)
    total = U32.astype(np.uint64) + V32
    same(low, total.astype(np.uint32))
    same(carry, (total >> np.uint64(32)).astype(np.uint32))


def test_bit_fields_and_permutations():
    same(lanes("bfe.u32 %o0, %r1, 5, 9;", U32), U32 >> 5 & 0x1FF)
    signed = ((U32 >> 5 & 0x1FF).astype(S) << 23 >> 23).view(np.uint32)
    same(lanes("bfe.s32 %o0, %r1, 5, 9;", U32), signed)
    same(lanes("bfi.b32 %o0, %r1, %r2, 8, 4;", U32, V32), V32 & ~np.uint32(0xF00) | (U32 & 15) << 8)
    same(lanes("lop3.b32 %o0, %r1, %r2, 0x0f0f0f0f, 0xb8;", U32, V32), _lop3(0xB8))
    same(lanes("prmt.b32 %o0, %r1, %r2, 0x5410;", U32, V32), U32 & 0xFFFF | V32 << 16)
    same(lanes("prmt.b32 %o0, %r1, %r2, 0x0008;", U32, V32), _sign_byte(U32))
    same(lanes("shf.l.wrap.b32 %o0, %r1, %r2, 4;", U32, V32), V32 << 4 | U32 >> 28)
    same(lanes("shf.r.clamp.b32 %o0, %r1, %r2, 40;", U32, V32), V32)
    same(lanes("popc.b32 %o0, %r1;", U32), np.array([int(u).bit_count() for u in U32], np.uint32))
    same(lanes("clz.b32 %o0, %r1;", U32), np.array([32 - int(u).bit_length() for u in U32], np.uint32))
    same(lanes("brev.b32 %o0, %r1;", U32), np.array([int(f"{u:032b}"[::-1], 2) for u in U32], np.uint32))


def _lop3(table):
    c = np.uint32(0x0F0F0F0F)
    out = np.zeros(32, np.uint32)
    for term in range(8):
        if table >> term & 1:
            out |= (U32 if term & 4 else ~U32) & (V32 if term & 2 else ~V32) & (c if term & 1 else ~c)
    return out


def _sign_byte(values):
    sign = np.where(values & 0x80, 0xFF, 0).astype(np.uint32)
    low = values & 0xFF
    return sign | low << 8 | low << 16 | low << 24


@pytest.mark.parametrize(
    "opcode, operation",
    [("add.f32", np.add), ("sub.f32", np.subtract), ("mul.f32", np.multiply), ("div.rn.f32", np.divide)],
)
def test_float(opcode, operation):
    with np.errstate(all="ignore"):
        expected = operation(F32, G32)
    same(lanes(f"{opcode} %o0, %r1, %r2;", F32, G32).view(np.float32), expected)


def test_nan_is_canonical():
    got = lanes("add.f32 %o0, %r1, %r2;", F32, G32)
    assert got[4] == 0x7FFFFFFF


def test_fma_rounds_once():
    a = np.full(32, 1 + 2**-12, np.float32)
    c = np.full(32, -1, np.float32)
    got = lanes("fma.rn.f32 %o0, %r1, %r2, %r3;", a, a, c).view(np.float32)
    assert (got == np.float32(2**-11 + 2**-24)).all()


@pytest.mark.parametrize("mode, up", [("rm", -1), ("rp", 1), ("rz", 0)])
def test_rounding_modes(mode, up):
    one, tiny = np.full(32, 1, np.float32), np.full(32, 1e-20, np.float32)
    tiny[::2] *= -1
    got = lanes(f"add.{mode}.f32 %o0, %r1, %r2;", one, tiny).view(np.float32)
    below, above = np.nextafter(np.float32(1), np.float32(0)), np.nextafter(np.float32(1), np.float32(2))
    for value, addend in zip(got, tiny, strict=True):
        if addend < 0:
            assert value == (np.float32(1) if up == 1 else below)
        else:
            assert value == (above if up == 1 else np.float32(1))


def test_flush_to_zero_and_saturation():
    got = lanes("mul.ftz.f32 %o0, %r1, %r2;", F32, np.ones(32, np.float32)).view(np.float32)
    assert got[5] == 0 and got[6] == 0 and np.signbit(got[6])
    got = lanes("add.sat.f32 %o0, %r1, 0f00000000;", F32).view(np.float32)
    finite = np.clip(np.nan_to_num(F32, nan=0.0, posinf=1, neginf=0), 0, 1)
    assert (got == finite).all()


def test_min_max_of_nan_and_zeros():
    a = np.array([np.nan, 1, np.nan, -0.0, 0.0, 2] + [0] * 26, np.float32)
    b = np.array([1, np.nan, np.nan, 0.0, -0.0, 3] + [0] * 26, np.float32)
    low = lanes("min.f32 %o0, %r1, %r2;", a, b).view(np.float32)
    high = lanes("max.f32 %o0, %r1, %r2;", a, b).view(np.float32)
    assert low[0] == low[1] == high[0] == high[1] == 1 and np.isnan(low[2]) and np.isnan(high[2])
    assert np.signbit(low[3:5]).all() and not np.signbit(high[3:5]).any()
    assert np.isnan(lanes("max.NaN.f32 %o0, %r1, %r2;", a, b).view(np.float32)[:3]).all()
    assert lanes("max.f32 %o0, %r1, %r2, 0f41200000;", a, b).view(np.float32)[5] == 10


@pytest.mark.parametrize(
    "opcode, function",
    [
        ("ex2.approx.ftz.f32", np.exp2),
        ("lg2.approx.ftz.f32", np.log2),
        ("rcp.approx.ftz.f32", np.reciprocal),
        ("sqrt.approx.ftz.f32", np.sqrt),
        ("rsqrt.approx.ftz.f32", lambda x: 1 / np.sqrt(x)),
        ("tanh.approx.f32", np.tanh),
        ("sin.approx.ftz.f32", np.sin),
        ("cos.approx.ftz.f32", np.cos),
    ],
)
def test_special_functions(opcode, function):
    x = np.abs(rng.standard_normal(32)).astype(np.float32) + 0.01
    got = lanes(f"{opcode} %o0, %r1;", x).view(np.float32)
    np.testing.assert_allclose(got, function(x.astype(np.float64)), rtol=3e-7, atol=3e-7)


def test_exponential_of_integers_is_exact():
    x = np.concatenate([np.arange(-20, 8), [-np.inf, np.inf, np.nan, -127]]).astype(np.float32)
    got = lanes("ex2.approx.ftz.f32 %o0, %r1;", x).view(np.float32)
    expected = np.exp2(x)
    expected[-1] = 0  # subnormal, flushed
    same(got, expected)


def bf16(x):
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)).astype(np.uint32)


def test_packing_conversions():
    a, b = F32[8:].repeat(2)[:32].copy(), G32[8:].repeat(2)[1:33].copy()
    same(lanes("cvt.rn.bf16x2.f32 %o0, %r1, %r2;", a, b), bf16(a) << 16 | bf16(b))
    halves = a.astype(np.float16).view(np.uint16).astype(np.uint32) << 16 | b.astype(np.float16).view(np.uint16)
    same(lanes("cvt.rn.f16x2.f32 %o0, %r1, %r2;", a, b), halves)
    same(lanes("{.reg .b16 x, y; mov.b32 {x, y}, %r1; mov.b32 %o0, {y, x};}", U32), U32 >> 16 | U32 << 16)


def test_float_to_integer():
    x = F32.copy()
    x[8:12] = [2.5, 3.5, -2.5, 1e20]
    nearest = lanes("cvt.rni.s32.f32 %o0, %r1;", x).view(S)
    assert list(nearest[8:12]) == [2, 4, -2, 2**31 - 1] and nearest[4] == 0 and nearest[3] == -(2**31)
    down = lanes("cvt.rmi.f32.f32 %o0, %r1;", x).view(np.float32)
    same(down, np.floor(x))
    same(lanes("cvt.rn.f32.s32 %o0, %r1;", U32).view(np.float32), U32.view(S).astype(np.float32))
    same(lanes("cvt.s32.s8 %o0, %r1;", U32), U32.astype(np.uint8).view(np.int8).astype(S).view(np.uint32))


def test_fp8_pairs():
    a = np.full(32, 448, np.float32)
    b = np.full(32, -1.5, np.float32)
    body = "{.reg .b16 x; cvt.rn.satfinite.e4m3x2.f32 x, %r1, %r2; cvt.rn.f16x2.e4m3x2 %o0, x;}"
    got = lanes(body, a, b)
    assert got[0] & 0xFFFF == np.float16(-1.5).view(np.uint16) and got[0] >> 16 == np.float16(448).view(np.uint16)


def test_float_pairs():
    pair = np.stack([F32[8:24], G32[8:24]]).T.copy()
    x = np.tile(pair, (2, 1)).reshape(64).view(np.uint64)
    got = lanes("fma.rn.f32x2 %o0, %rd1, %rd1, %rd1;", x, out=np.uint64).view(np.float32)
    exact = x.view(np.float32).astype(np.float64)
    np.testing.assert_allclose(got, exact * exact + exact, rtol=2e-7, atol=1e-7)
    down = lanes("add.rm.f32x2 %o0, %rd1, %rd1;", x, out=np.uint64).view(np.float32)
    same(down, 2 * x.view(np.float32))


@pytest.mark.parametrize("comparison", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "geu", "num", "nan"])
def test_comparisons_of_floats(comparison):
    nan = np.isnan(F32) | np.isnan(G32)
    base = {"eq": np.equal, "ne": np.not_equal, "neu": np.not_equal, "lt": np.less, "le": np.less_equal}
    base |= {"gt": np.greater, "ge": np.greater_equal, "equ": np.equal, "ltu": np.less, "geu": np.greater_equal}
    if comparison in ("num", "nan"):
        expected = nan if comparison == "nan" else ~nan
    else:
        expected = base[comparison](F32, G32)
        expected = expected | nan if comparison.endswith("u") and comparison != "u" else expected & ~nan
    got = lanes(f"setp.{comparison}.f32 %p1, %r1, %r2; selp.b32 %o0, 1, 0, %p1;", F32, G32)
    same(got, expected.astype(np.uint32))


def test_setp_combines_and_pairs():
    body = "setp.gt.s32 %p3, %r1, 0; setp.lt.and.u32 %p1|%p2, %r1, %r2, !%p3;"
    body += "selp.b32 %o0, 1, 0, %p1; selp.b32 %o1, 1, 0, %p2;"
    first, second = lanes(body, U32, V32, outputs=2)
    with_ = ~(U32.view(S) > 0)
    same(first, ((U32 < V32) & with_).astype(np.uint32))
    same(second, (~(U32 < V32) & with_).astype(np.uint32))


def test_shuffles():
    lane = np.arange(32, dtype=np.uint32)
    same(lanes("shfl.sync.bfly.b32 %o0, %r1, 5, 31, -1;", lane), lane ^ 5)
    same(lanes("shfl.sync.idx.b32 %o0, %r1, 7, 31, -1;", lane), np.full(32, 7, np.uint32))
    up = np.where(lane < 3, lane, lane - 3).astype(np.uint32)
    same(lanes("shfl.sync.up.b32 %o0, %r1, 3, 0, -1;", lane), up)
    down = np.where(lane % 8 > 5, lane, lane + 2).astype(np.uint32)
    same(lanes("shfl.sync.down.b32 %o0|%p1, %r1, 2, 0x1807, -1;", lane), down)


def test_votes_matches_and_reductions():
    lane = np.arange(32, dtype=np.uint32)
    same(
        lanes("setp.gt.u32 %p1, %r1, 29; vote.sync.ballot.b32 %o0, %p1, -1;", lane), np.full(32, 0xC0000000, np.uint32)
    )
    groups = np.array([sum(1 << j for j in range(32) if j % 3 == i % 3) for i in range(32)], np.uint32)
    same(lanes("match.any.sync.b32 %o0, %r1, -1;", lane % 3), groups)
    same(lanes("redux.sync.add.u32 %o0, %r1, -1;", lane), np.full(32, 496, np.uint32))
    same(lanes("redux.sync.min.s32 %o0, %r1, -1;", U32), np.full(32, U32.view(S).min(), S).view(np.uint32))
    same(lanes("elect.sync %r2|%p1, -1; selp.b32 %o0, 1, 0, %p1;", lane), (lane == 0).astype(np.uint32))


def test_divergence_merges_again():
    body = """mov.b32 %r2, 0; setp.lt.u32 %p1, %r1, 16; @%p1 bra LOW;
    add.u32 %r2, %r1, 100; bra.uni JOIN;
    LOW: add.u32 %r2, %r1, 200;
    JOIN: shfl.sync.bfly.b32 %o0, %r2, 16, 31, -1;"""
    lane = np.arange(32, dtype=np.uint32)
    same(lanes(body, lane), np.where(lane < 16, lane + 116, lane - 16 + 200).astype(np.uint32))


def test_loops_that_lanes_leave_at_different_times():
    body = """mov.b32 %o0, 0;
    LOOP: add.u32 %o0, %o0, %r1; sub.s32 %r1, %r1, 1; setp.ge.s32 %p1, %r1, 0; @%p1 bra LOOP;"""
    lane = np.arange(32, dtype=np.uint32)
    same(lanes(body, lane), (lane * (lane + 1) // 2).astype(np.uint32))


def test_indirect_branches():
    body = """TABLE: .branchtargets A, B, C;
    brx.idx %r1, TABLE;
    A: mov.b32 %o0, 10; bra.uni END;
    B: mov.b32 %o0, 20; bra.uni END;
    C: mov.b32 %o0, 30;
    END:"""
    lane = np.arange(32, dtype=np.uint32) % 3
    same(lanes(body, lane), (lane + 1) * 10)


def test_atomics():
    counter = np.zeros(4, np.uint32)
    out = np.zeros(64, np.uint32)
    ptx = """.version 8.8
    .target sm_90a
    .address_size 64
    .visible .entry k(.param .u64 p0, .param .u64 p1) {
    .reg .b32 %r<9>; .reg .b64 %a<9>;
    ld.param.b64 %a0, [p0]; ld.param.b64 %a1, [p1];
    mov.u32 %r0, %tid.x;
    atom.global.add.u32 %r1, [%a0], 1;
    red.global.max.u32 [%a0+4], %r0;
    atom.global.cas.b32 %r2, [%a0+8], 0, 7;
    atom.add.f32 %r3, [%a0+12], 0f3F000000;
    mad.wide.u32 %a2, %r0, 4, %a1;
    st.global.b32 [%a2], %r1;
    ret; }"""
    launch(ptx, [], [counter, out], block=(64, 1, 1))
    assert counter[0] == 64 and counter[1] == 63 and counter[2] == 7 and counter[3:].view(np.float32)[0] == 32
    assert sorted(out) == list(range(64))


def test_vector_and_128_bit_accesses():
    data = rng.integers(0, 2**32, 128, dtype=np.uint32)
    out = np.zeros(128, np.uint32)
    ptx = """.version 8.8
    .target sm_90a
    .address_size 64
    .visible .entry k(.param .u64 p0, .param .u64 p1) {
    .reg .b32 %r<9>; .reg .b64 %a<9>; .reg .b128 %q; .shared .align 16 .b8 buffer[512];
    ld.param.b64 %a0, [p0]; ld.param.b64 %a1, [p1];
    mov.u32 %r0, %tid.x; shl.b32 %r5, %r0, 4; cvt.u64.u32 %a2, %r5;
    add.s64 %a3, %a0, %a2; add.s64 %a4, %a1, %a2; mov.u32 %r6, buffer; add.s32 %r6, %r6, %r5;
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%a3];
    st.shared.v4.b32 [%r6], {%r4, %r3, %r2, %r1};
    ld.shared.b128 %q, [%r6];
    mov.b128 {%a5, %a6}, %q; mov.b128 %q, {%a6, %a5};
    st.global.b128 [%a4], %q;
    ret; }"""
    launch(ptx, [], [data, out])
    assert (out.reshape(32, 4) == data.reshape(32, 4)[:, [1, 0, 3, 2]]).all()


def test_local_memory_and_constants():
    ptx_out = np.zeros(32, np.uint32)
    ptx = """.version 8.8
    .target sm_90a
    .address_size 64
    .const .align 4 .b32 table[3] = {5, 6, 7};
    .visible .entry k(.param .u64 p0) {
    .local .align 4 .b8 depot[16];
    .reg .b32 %r<9>; .reg .b64 %a<9>;
    mov.b64 %a1, depot; cvta.local.u64 %a2, %a1;
    mov.u32 %r0, %tid.x; st.b32 [%a2+4], %r0; ld.local.b32 %r1, [depot+4];
    mov.b64 %a4, table; ld.const.b32 %r2, [%a4+8]; add.u32 %r1, %r1, %r2;
    ld.param.b64 %a0, [p0]; mad.wide.u32 %a3, %r0, 4, %a0; st.global.b32 [%a3], %r1;
    ret; }"""
    launch(ptx, [], [ptx_out])
    assert (ptx_out == np.arange(32) + 7).all()


MATRICES = """.version 8.8
.target sm_100a
.address_size 64
.visible .entry k(.param .u64 p0, .param .u64 p1) {
.reg .b32 %r<19>; .reg .b64 %a<9>; .shared .align 16 .b8 buffer[512];
ld.param.b64 %a0, [p0]; ld.param.b64 %a1, [p1];
mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 4; cvt.u64.u32 %a2, %r1; mov.u32 %r2, buffer; add.u32 %r3, %r2, %r1;
add.s64 %a0, %a0, %a2; add.s64 %a1, %a1, %a2;
ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%a0];
BODY
ret; }"""


def test_byte_matrices_are_stored_transposed():
    """stmatrix.m16n8: register j of lane 4 g + t has rows g, g, g + 8, g + 8 of columns 2 t and 2 t + 1 of tile j."""
    given, out = rng.integers(0, 256, (32, 16), dtype=np.uint8), np.zeros((32, 16), np.uint8)
    body = """stmatrix.sync.aligned.m16n8.x4.trans.shared.b8 [%r3], {%r4, %r5, %r6, %r7}; bar.warp.sync -1;
    ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3]; st.global.v4.b32 [%a1], {%r4, %r5, %r6, %r7};"""
    launch(MATRICES.replace("BODY", body), [], [given, out], arch="sm_100a")
    for lane in range(32):
        g, t = divmod(lane, 4)
        for j in range(4):
            first, second = out[8 * j + 2 * t], out[8 * j + 2 * t + 1]
            assert list(given[lane, 4 * j : 4 * j + 4]) == [first[g], second[g], first[g + 8], second[g + 8]]


def test_byte_matrices_are_loaded_transposed():
    """ldmatrix.m16n16: register j of lane 4 g + t has byte g + 8 j of stored rows 4 t to 4 t + 3."""
    given, out = rng.integers(0, 256, (32, 16), dtype=np.uint8), np.zeros((32, 16), np.uint8)
    body = """st.shared.v4.b32 [%r3], {%r4, %r5, %r6, %r7}; bar.warp.sync -1;
    ldmatrix.sync.aligned.m16n16.x2.trans.shared.b8 {%r4, %r5, %r6, %r7}, [%r3];
    st.global.v4.b32 [%a1], {%r4, %r5, %r6, %r7};"""
    launch(MATRICES.replace("BODY", body), [], [given, out], arch="sm_100a")
    for lane in range(32):
        g, t = divmod(lane, 4)
        for j in range(4):
            row = 16 * (j // 2) + 4 * t
            assert list(out[lane, 4 * j : 4 * j + 4]) == list(given[row : row + 4, g + 8 * (j % 2)])


def test_tensor_memory_lanes_are_relative_to_the_warp():
    """An address with lane 0 means each warp's own quarter, as one with the quarter's first lane does."""
    out = np.zeros(128, np.uint32)
    ptx = """.version 8.8
    .target sm_100a
    .address_size 64
    .visible .entry k(.param .u64 p0) {
    .reg .b32 %r<9>; .reg .b64 %a<9>; .reg .pred %p; .shared .align 16 .b8 buffer[16];
    ld.param.b64 %a0, [p0]; mov.u32 %r0, %tid.x; mov.u32 %r1, buffer; setp.lt.u32 %p, %r0, 32;
    @%p tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;
    bar.sync 0; ld.shared.b32 %r2, [%r1]; tcgen05.st.sync.aligned.32x32b.x1.b32 [%r2], {%r0};
    shr.u32 %r3, %r0, 5; shl.b32 %r3, %r3, 21; add.u32 %r3, %r3, %r2;
    tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r4}, [%r3];
    mad.wide.u32 %a1, %r0, 4, %a0; st.global.b32 [%a1], %r4;
    bar.sync 0; @%p tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, 32; ret; }"""
    launch(ptx, [], [out], block=(128, 1, 1), arch="sm_100a")
    assert (out == np.arange(128)).all()


@pytest.mark.parametrize("kind, bits", [(11, 4), (12, 4), (13, 6)])
def test_tensor_copies_of_less_than_a_byte(kind, bits):
    """Packed (11), or each sixteen numbers at the start of sixteen bytes (12, 13); outside the tensor zeros."""
    rows, columns, box = 6, 256, 128
    row_bytes = columns * bits // 8
    source = rng.integers(1, 256, (rows, row_bytes), dtype=np.uint8)
    packed = box * bits // 8
    width = packed if kind == 11 else box
    out = np.zeros((8, width), np.uint8)
    memory = np.zeros(32 + 64, np.uint32)
    start = -memory.ctypes.data % 128 // 4
    tensor_map = memory[start : start + 32]
    address = source.ctypes.data
    tensor_map[:4] = address & 0xFFFFFFFF, address >> 32, 2 | 1 << 4 | kind << 7 | 1 << 18, row_bytes // 16
    tensor_map[8:10] = columns - 1, rows - 1
    tensor_map[13:15] = (box - 1) << 24, 7
    ptx = f""".version 8.8
    .target sm_100a
    .address_size 64
    .visible .entry k(.param .u64 p0, .param .u64 p1, .param .u64 p2) {{
    .reg .b32 %r<9>; .reg .b64 %a<9>; .reg .pred %p<3>; .shared .align 128 .b8 tile[{8 * width}];
    .shared .align 8 .b8 barrier[8];
    ld.param.b64 %a0, [p0]; ld.param.b64 %a1, [p2]; mov.u32 %r0, %tid.x; mov.u32 %r1, tile; mov.u32 %r2, barrier;
    setp.ne.u32 %p1, %r0, 0; @%p1 bra WAIT;
    mbarrier.init.shared.b64 [%r2], 1; mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {8 * packed};
    cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r1], [%a0, {{128, 0}}], [%r2];
    WAIT: bar.warp.sync -1; mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra WAIT;
    mov.u32 %r3, 0;
    NEXT: add.u32 %r4, %r3, %r0; shl.b32 %r4, %r4, 2; add.u32 %r5, %r1, %r4; ld.shared.b32 %r6, [%r5];
    cvt.u64.u32 %a2, %r4; add.s64 %a2, %a2, %a1; st.global.b32 [%a2], %r6;
    add.u32 %r3, %r3, 32; setp.lt.u32 %p1, %r3, {2 * width}; @%p1 bra NEXT;
    ret; }}"""
    launch(ptx, [], [tensor_map, source, out], arch="sm_100a")
    expected = np.zeros((8, packed), np.uint8)
    expected[:rows] = source[:, row_bytes // 2 : row_bytes // 2 + packed]
    if kind != 11:
        spread = np.zeros((8, box // 16, 16), np.uint8)
        spread[:, :, : 2 * bits] = expected.reshape(8, box // 16, 2 * bits)
        expected = spread.reshape(8, box)
    assert (out == expected).all()


def test_tensor_maps_are_changed_field_by_field():
    memory = np.zeros(64 + 32, np.uint32)
    start = -memory.ctypes.data % 128 // 4
    maps = memory[start : start + 64].reshape(2, 32)
    maps[:, 2] = 2 | 1 << 18
    fields = """global_address.WHERE.b1024.b64 [BASE], 0x123456789ab0;
    rank.WHERE.b1024.b32 [BASE], 2;
    box_dim.WHERE.b1024.b32 [BASE], 0, 64; box_dim.WHERE.b1024.b32 [BASE], 2, 3;
    global_dim.WHERE.b1024.b32 [BASE], 1, 1000; global_stride.WHERE.b1024.b64 [BASE], 0, 4096;
    global_stride.WHERE.b1024.b64 [BASE], 1, 0x2000000010; element_stride.WHERE.b1024.b32 [BASE], 1, 1;
    elemtype.WHERE.b1024.b32 [BASE], 13; swizzle_mode.WHERE.b1024.b32 [BASE], 3;
    swizzle_atomicity.WHERE.b1024.b32 [BASE], 1; fill_mode.WHERE.b1024.b32 [BASE], 0;"""
    fields = "".join(f"tensormap.replace.tile.{field.strip()};" for field in fields.split(";") if field.strip())
    ptx = """.version 8.8
    .target sm_90a
    .address_size 64
    .visible .entry k(.param .u64 p0) {
    .reg .b32 %r<9>; .reg .b64 %a<9>; .reg .pred %p1; .shared .align 128 .b8 buffer[256];
    ld.param.b64 %a0, [p0]; mov.u32 %r0, %tid.x; mov.u32 %r1, buffer; shl.b32 %r2, %r0, 2; cvt.u64.u32 %a2, %r2;
    add.s64 %a2, %a0, %a2; ld.global.b32 %r3, [%a2]; add.u32 %r4, %r1, %r2; st.shared.b32 [%r4+128], %r3;
    bar.warp.sync -1; setp.ne.u32 %p1, %r0, 0; @%p1 bra END;
    """ + fields.replace("WHERE", "global").replace("BASE", "%a0")  # fmt: skip
    ptx += fields.replace("WHERE", "shared::cta").replace("BASE", "%r1+128")
    ptx += """add.u32 %r5, %r1, 128;
    END: bar.warp.sync -1; add.u32 %r5, %r1, 128;
    tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%a0+128], [%r5], 128;
    ret; }"""
    launch(ptx, [], [memory[start:]])
    expected = np.zeros(32, np.uint32)
    expected[:5] = 0x56789AB0, 0x1234, 2 | 2 << 4 | 11 << 7 | 3 << 13 | 1 << 18 | 1 << 19, 256, 1
    expected[7] = 2 << 4
    expected[9], expected[13], expected[14] = 999, 63 << 24, 2 << 8
    assert (maps == expected).all()


CALLS = """.version 8.8
.target sm_90a
.address_size 64
.extern .func (.param .b32 r) vprintf (.param .b64 a, .param .b64 b);
.global .align 1 .b8 words[32] = {37, 100, 32, 37, 115, 32, 37, 46, 50, 102, 32, 37, 108, 120, 37, 37, 10, 0,
111, 107, 0};
.func (.param .b32 twice_r) twice (.param .b32 twice_x) {
.reg .b32 %r<3>;
ld.param.b32 %r1, [twice_x]; add.u32 %r2, %r1, %r1; st.param.b32 [twice_r], %r2; ret; }
.func (.param .b32 f_r) f (.param .b32 f_x, .param .align 8 .b8 f_y[16]) {
.reg .b32 %r<9>; .reg .pred %p1;
ld.param.b32 %r1, [f_x]; ld.param.b32 %r2, [f_y+12]; setp.gt.u32 %p1, %r1, 9; @%p1 bra MORE;
add.u32 %r3, %r1, %r2; st.param.b32 [f_r], %r3; ret;
MORE: { .param .b32 x; .param .b32 y; st.param.b32 [x], %r1; call (y), twice, (x); ld.param.b32 %r3, [y]; }
st.param.b32 [f_r], %r3; ret; }
.visible .entry k(.param .u64 p0) {
.reg .b32 %r<9>; .reg .b64 %a<9>; .reg .pred %p1;
mov.u32 %r0, %tid.x; ld.param.b64 %a0, [p0]; mad.wide.u32 %a1, %r0, 4, %a0;
BODY
ret; }"""


def test_calls_of_device_functions():
    out = np.zeros(32, np.uint32)
    body = """{ .param .b32 x; .param .align 8 .b8 y[16]; .param .b32 z;
    st.param.b32 [x], %r0; st.param.b32 [y+12], 100; call.uni (z), f, (x, y); ld.param.b32 %r1, [z]; }
    { .param .b32 x; .param .b32 z; st.param.b32 [x], %r1; call.uni (z), twice, (x); ld.param.b32 %r1, [z]; }
    st.global.b32 [%a1], %r1;"""
    launch(CALLS.replace("BODY", body), [], [out])
    lane = np.arange(32)
    assert (out == np.where(lane > 9, 4 * lane, 2 * (lane + 100))).all()


def test_printf(capsys):
    body = """.local .align 8 .b8 depot[32];
    setp.gt.u32 %p1, %r0, 1; @%p1 bra END;
    mov.b64 %a2, depot; cvta.local.u64 %a3, %a2; sub.u32 %r1, %r0, 1; st.local.b32 [%a2], %r1;
    mov.b64 %a4, words; add.u64 %a5, %a4, 18; st.local.b64 [%a2+8], %a5;
    mov.b64 %a6, 0x4000000000000000; st.local.b64 [%a2+16], %a6; st.local.b64 [%a2+24], 255;
    { .param .b64 p; .param .b64 q; .param .b32 z; st.param.b64 [p], %a4; st.param.b64 [q], %a3;
    call.uni (z), vprintf, (p, q); }
    END:"""
    launch(CALLS.replace("BODY", body), [], [np.zeros(32, np.uint32)])
    assert capsys.readouterr().out == "-1 ok 2.00 ff%\n0 ok 2.00 ff%\n"


def test_unknown_instruction_is_an_error_only_where_it_is_reached():
    lane = np.arange(32, dtype=np.uint32)
    body = "setp.gt.u32 %p1, %r1, {limit}; mov.b32 %o0, %r1; @%p1 frobnicate.b32 %o0, %r1;"
    same(lanes(body.replace("{limit}", "99"), lane), lane)
    with pytest.raises(UnknownInstruction, match="kernel k, PTX line 17: .*frobnicate.b32"):
        lanes(body.replace("{limit}", "9"), lane)


def test_stores_and_conversions_take_the_low_part_of_wide_registers():
    out = np.zeros((32, 2), np.uint32)
    ptx = """.version 8.8
    .target sm_90a
    .address_size 64
    .visible .entry k(.param .u64 p0) {
    .reg .b32 %r<9>; .reg .b64 %a<9>;
    ld.param.b64 %a0, [p0]; mov.u32 %r0, %tid.x; mad.wide.u32 %a1, %r0, 8, %a0; mad.wide.u32 %a2, %r0, 3, 0x500000007;
    st.global.b32 [%a1], %a2; cvt.u32.u16 %r1, %a2; st.global.b32 [%a1+4], %r1; ret; }"""
    launch(ptx, [], [out])
    assert (out == 7 + 3 * np.arange(32)[:, None]).all()


def test_vector_registers():
    a, b, c, d = lanes(
        """{ .reg .v4 .b32 four; .reg .v2 .b32 two; .shared .align 16 .b8 rows[512]; .reg .b32 row;
        mov.b32 row, rows; mad.lo.u32 row, %t, 16, row;
        mov.b32 two.x, %r1; mov.b32 two.y, %r2; mov.b32 four.x, two.y; mov.b32 four.y, two.x;
        add.u32 four.z, two.x, two.y; mov.b32 four.w, 5;
        st.shared.v4.b32 [row], four; ld.shared.v4.b32 {%o0, %o1, %o2, %o3}, [row]; }""",
        U32,
        V32,
        outputs=4,
    )
    same(np.stack([a, b, c, d]), np.stack([V32, U32, U32 + V32, np.full(32, 5, np.uint32)]))
