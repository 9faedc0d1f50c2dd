"""tcgen05.mma with block scales, and operands of less than a byte, against numpy: one instruction, 128 x 32."""

import numpy as np
import pytest

from tests.emulated.ptx_launch import launch

N, ROWS = 32, 128
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
PTX = """.version 8.8
.target sm_100a
.address_size 64
.visible .entry k(.param .u64 p0, .param .u64 p1, .param .u64 p2, .param .u64 p3) {
.reg .b32 %r<49>; .reg .b64 %a<19>; .reg .pred %p<9>;
.shared .align 128 .b8 operands[5120]; .shared .align 8 .b8 barrier[8]; .shared .align 8 .b8 start[8];
mov.u32 %r0, %tid.x; mov.u32 %r1, operands; mov.u32 %r2, barrier; mov.u32 %r3, start;
ld.param.b64 %a0, [p0]; ld.param.b64 %a1, [p1]; ld.param.b64 %a2, [p2]; ld.param.b64 %a3, [p3];
setp.lt.u32 %p0, %r0, 32; setp.eq.u32 %p1, %r0, 0;
@%p0 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r3], 64;
@%p1 mbarrier.init.shared.b64 [%r2], 1;
mov.u32 %r4, %r0;
COPY: shl.b32 %r5, %r4, 2; cvt.u64.u32 %a4, %r5; add.s64 %a5, %a0, %a4; ld.global.b32 %r6, [%a5];
add.u32 %r5, %r5, %r1; st.shared.b32 [%r5], %r6; add.u32 %r4, %r4, 128; setp.lt.u32 %p2, %r4, 1280; @%p2 bra COPY;
bar.sync 0; ld.shared.b32 %r7, [%r3]; shr.u32 %r8, %r0, 5; shl.b32 %r8, %r8, 21; add.u32 %r8, %r8, %r7;
and.b32 %r9, %r0, 31; mul.wide.u32 %a6, %r9, 20; add.s64 %a6, %a6, %a1;
ld.global.b32 %r10, [%a6]; ld.global.b32 %r11, [%a6+4]; ld.global.b32 %r12, [%a6+8]; ld.global.b32 %r13, [%a6+12];
ld.global.b32 %r14, [%a6+16];
tcgen05.st.sync.aligned.32x32b.x4.b32 [%r8+32], {%r10, %r11, %r12, %r13};
tcgen05.st.sync.aligned.32x32b.x1.b32 [%r8+36], {%r14}; tcgen05.wait::st.sync.aligned;
bar.sync 0; @!%p1 bra WAIT;
ld.global.b64 %a7, [%a2]; ld.global.b64 %a8, [%a2+8]; ld.global.b32 %r15, [%a2+16];
shr.u32 %r16, %r1, 4; cvt.u64.u32 %a9, %r16; add.s64 %a7, %a7, %a9; add.s64 %a8, %a8, %a9; setp.ne.u32 %p3, 0, 0;
add.u32 %r17, %r7, 36;
tcgen05.mma.cta_group::1.KIND.block_scale [%r7], %a7, %a8, %r15, [%r7+32], [%r17], %p3;
tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r2];
WAIT: mbarrier.try_wait.parity.shared.b64 %p4, [%r2], 0; @!%p4 bra WAIT;
mov.u32 %r20, 0; shl.b32 %r21, %r0, 7; cvt.u64.u32 %a10, %r21; add.s64 %a10, %a10, %a3;
READ: add.u32 %r22, %r8, %r20; tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r23}, [%r22];
shl.b32 %r24, %r20, 2; cvt.u64.u32 %a11, %r24; add.s64 %a11, %a11, %a10; st.global.b32 [%a11], %r23;
add.u32 %r20, %r20, 1; setp.lt.u32 %p5, %r20, 32; @%p5 bra READ;
bar.sync 0; @%p0 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r7, 64; ret; }"""

# kind; elements along k; scales of a row; whether they are exponents; formats of a and b: (code, bits)
KINDS = {
    "mxf8f6f4 e4m3 with e2m1": ("kind::mxf8f6f4", 32, 1, True, (0, 8), (5, 4)),
    "mxf4": ("kind::mxf4", 64, 2, True, (1, 4), (1, 4)),
    "nvfp4": ("kind::mxf4nvf4.block16", 64, 4, False, (1, 4), (1, 4)),
    "mxf4nvf4 by 32": ("kind::mxf4nvf4.scale_vec::2X", 64, 2, True, (1, 4), (1, 4)),
}


def numbers(rng, rows, k, bits):
    """Small numbers: their values, and 32 bytes a row as the instruction reads them."""
    if bits == 8:  # e4m3 of the whole numbers from -8 to 8
        values = rng.integers(-8, 9, (rows, k))
        magnitude = np.abs(values)
        exponent = np.where(magnitude, np.floor(np.log2(np.maximum(magnitude, 1))), -7).astype(int)
        fraction = np.where(magnitude, magnitude * 8 // 2.0**exponent - 8, 0).astype(int)
        return values, ((values < 0) << 7 | (exponent + 7) << 3 | fraction).astype(np.uint8)
    codes = rng.integers(0, 16, (rows, k), dtype=np.uint8)
    values = np.where(codes > 7, -1, 1) * E2M1[codes & 7]
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    if k == 32:  # sixteen numbers in each sixteen bytes
        packed = np.concatenate([packed.reshape(rows, 2, 8), np.full((rows, 2, 8), 0xAA, np.uint8)], 2).reshape(
            rows, 32
        )
    return values, packed


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("last", [False, True])
def test_block_scaled_product(name, last):
    """`last`: the scales stand in the last bytes of their words that they can."""
    kind, k, count, exponents, (a_code, a_bits), (b_code, b_bits) = KINDS[name]
    rng = np.random.default_rng(3)
    (a, a_bytes), (b, b_bytes) = numbers(rng, ROWS, k, a_bits), numbers(rng, N, k, b_bits)
    # Canonical layout without a swizzle: sixteen bytes of every row, then the next sixteen.
    operands = [x.reshape(len(x), 2, 16).transpose(1, 0, 2) for x in (a_bytes, b_bytes)]
    memory = np.concatenate([x.reshape(-1) for x in operands])
    first = 4 - count if last else 0
    words = np.zeros((32, 5, 4), np.uint8)  # lane; columns: four of a's rows, one of b's; bytes
    scales = rng.integers(0, 3, (ROWS + N, count))
    codes = scales + 127 - 1 if exponents else (scales + 7 - 1) << 3  # powers of two either way
    words[:, :, first : first + count] = codes.reshape(5, 32, count).transpose(1, 0, 2)
    row = 2.0 ** (scales - 1).repeat(k // count, 1)
    descriptors = np.zeros(3, np.uint64)
    for index, (start, rows) in enumerate([(0, ROWS), (2 * 16 * ROWS, N)]):
        descriptors[index] = start >> 4 | (rows * 16 >> 4) << 16 | (128 >> 4) << 32
    descriptors[2] = (
        first << 4 | a_code << 7 | b_code << 10 | N >> 3 << 17 | exponents << 23 | ROWS >> 4 << 24 | first << 29
    )
    out = np.full((ROWS, N), np.nan, np.float32)
    launch(PTX.replace("KIND", kind).replace(".block16.block_scale", ".block_scale.block16")
           .replace(".scale_vec::2X.block_scale", ".block_scale.scale_vec::2X"),
           [], [memory, words, descriptors, out], block=(128, 1, 1), arch="sm_100a")  # fmt: skip
    assert (out == (a * row[:ROWS]) @ (b * row[ROWS:]).T).all()
