"""Small kernels that synchronise in every way there is, and what happens where one synchronisation is missing.

`{name|statement}` is a synchronisation that a mutant lacks, `{name|statement|other}` one that it has another for, and
`//@ name` names a line. Expected of a mutant: the line of the access that is told, and of the one that it races with.
"""

import re
from dataclasses import dataclass

HEADER = """.version 8.8
.target {arch}
.address_size 64
.visible .entry k(.param .u64 p0) {{
.reg .pred %p<9>; .reg .b16 %h<4>; .reg .b32 %r<40>; .reg .b64 %rd<19>; .reg .f32 %f<9>;
.shared .align 1024 .b8 memory[4096]; .shared .align 8 .b8 bar[64];
mov.u32 %r0, %tid.x; mov.u32 %r1, memory; mov.u32 %r2, bar; ld.param.b64 %rd0, [p0];
shr.u32 %r3, %r0, 5; and.b32 %r4, %r0, 31;
setp.eq.u32 %p0, %r0, 0; setp.eq.u32 %p1, %r3, 0; setp.eq.u32 %p2, %r3, 1; setp.eq.u32 %p3, %r4, 0;
mov.u32 %r5, %ctaid.x; setp.eq.u32 %p4, %r5, 0;
shl.b32 %r6, %r0, 2; add.u32 %r7, %r1, %r6; xor.b32 %r8, %r6, 128; add.u32 %r8, %r8, %r1;
xor.b32 %r9, %r6, 64; add.u32 %r9, %r9, %r1; shl.b32 %r10, %r4, 2; add.u32 %r10, %r10, %r1;
"""
INIT = "@%p0 mbarrier.init.shared.b64 [%r2], 1; @%p0 mbarrier.init.shared.b64 [%r2+8], 1;"
INIT += "fence.mbarrier_init.release.cluster; bar.sync 0;"
PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, {%r12, %r12, %r12, %r12}, %rd2, "
WAIT = "W{n}: mbarrier.try_wait.parity.shared.b64 %p8, [%r2+{at}], {parity}; @!%p8 bra W{n};"


def wait(n: int, at: int = 0, parity: int = 0) -> str:
    return WAIT.format(n=n, at=at, parity=parity)


@dataclass(frozen=True)
class Program:
    body: str
    missing: dict[str, tuple[str, str]]  # synchronisation -> (line told, line it races with)
    block: int = 64
    grid: int = 1
    cluster: int = 1
    arch: str = "sm_90a"

    def text(self, without: str | None = None) -> str:
        def choose(found: re.Match) -> str:
            return (found[3] or "") if found[1] == without else found[2]

        body = re.sub(r"\{(\w+)\|([^|}]*)(?:\|([^}]*))?\}", choose, self.body)
        body = re.sub(r"PRODUCT(\d)", PRODUCT + r"\1, 1, 1, 0;", body)  # the digit: whether it keeps the sums
        return HEADER.format(arch=self.arch) + body + "\nret;\n}"

    def line(self, name: str) -> int:
        lines = [n for n, line in enumerate(self.text().splitlines(), 1) if line.endswith(f"//@ {name}")]
        assert len(lines) == 1, name
        return lines[0]


PROGRAMS = {
    "named barrier": Program(
        """
st.shared.b32 [%r7], %r0; //@ store
{sync|bar.sync 0;}
ld.shared.b32 %r11, [%r8]; //@ load
""",
        {"sync": ("load", "store")},
    ),
    "named barrier, arrive and sync": Program(
        """
@!%p1 bra READER;
st.shared.b32 [%r10], %r0; //@ store
bar.arrive 1, 64; bra END;
READER: {sync|bar.sync 1, 64;|bar.arrive 1, 64;}
ld.shared.b32 %r11, [%r10]; //@ load
END:
""",
        {"sync": ("load", "store")},
    ),
    "mbarrier": Program(
        INIT
        + """
@!%p1 bra READER;
st.shared.b32 [%r10], %r0; //@ store
bar.warp.sync -1;
@%p3 mbarrier.arrive{release|.shared|.relaxed.cta.shared}.b64 _, [%r2]; bra END;
READER: {wait|"""
        + wait(1)
        + """}
ld.shared.b32 %r11, [%r10]; //@ load
END:
""",
        {"wait": ("load", "store"), "release": ("load", "store")},
    ),
    "mbarrier, arrival of an elected lane": Program(
        INIT
        + """
@!%p1 bra WRITER;
st.shared.b32 [%r10], %r0; bar.warp.sync -1;
ld.shared.b32 %r11, [%r9]; //@ load
{warp|bar.warp.sync -1;}
@%p3 mbarrier.arrive.shared.b64 _, [%r2]; bra END;
WRITER: """
        + wait(1)
        + """
st.shared.b32 [%r10], %r0; //@ store
END:
""",
        {"warp": ("store", "load")},
    ),
    "mbarrier, wait of an elected lane": Program(
        INIT
        + """
@!%p1 bra READER;
st.shared.b32 [%r10], %r0; //@ store
bar.warp.sync -1; @%p3 mbarrier.arrive.shared.b64 _, [%r2]; bra END;
READER: @!%p3 bra MEET; """
        + wait(1)
        + """
MEET: {warp|bar.warp.sync -1;}
ld.shared.b32 %r11, [%r10]; //@ load
END:
""",
        {"warp": ("load", "store")},
    ),
    "mbarrier initialisation": Program(
        """
@%p0 mbarrier.init.shared.b64 [%r2], 64; //@ init
{sync|bar.sync 0;}
mbarrier.arrive.shared.b64 _, [%r2]; //@ arrive
"""
        + wait(1),
        {"sync": ("arrive", "init")},
    ),
    "lanes of a warp": Program(
        """
st.shared.b32 [%r7], %r0; //@ store
{warp|bar.warp.sync -1;}
ld.shared.b32 %r11, [%r9]; //@ load
{again|shfl.sync.idx.b32 %r11, %r11, 0, 31, -1;}
st.shared.b32 [%r7], %r11; //@ second
""",
        {"warp": ("load", "store"), "again": ("second", "load")},
        block=32,
    ),
    "bulk load": Program(
        """
@%p0 mbarrier.init.shared.b64 [%r2], 1; //@ init
{init|fence.mbarrier_init.release.cluster;}
bar.sync 0;
@!%p0 bra REST;
mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 256;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd0], 256, [%r2]; //@ copy
REST: {wait|"""
        + wait(1)
        + """}
ld.shared.b32 %r11, [%r7]; //@ load
{empty|bar.sync 0;}
@!%p0 bra LAST;
mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 256;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd0], 256, [%r2]; //@ second
LAST: """
        + wait(2, parity=1),
        {"init": ("copy", "init"), "wait": ("load", "copy"), "empty": ("second", "load")},
    ),
    "bulk load, initialisation fenced for the proxy": Program(
        """
@%p0 mbarrier.init.shared.b64 [%r2], 1; //@ init
{init|fence.proxy.async.shared::cta;}
bar.sync 0;
@!%p0 bra REST;
mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 256;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd0], 256, [%r2]; //@ copy
REST: """
        + wait(1),
        {"init": ("copy", "init")},
    ),
    "bulk store": Program(
        """
st.shared.b32 [%r7], %r0; //@ store
{proxy|fence.proxy.async.shared::cta;}
{sync|bar.sync 0;}
@!%p0 bra REST;
cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r1], 256; //@ copy
{commit|cp.async.bulk.commit_group;}
{read|cp.async.bulk.wait_group.read 0;}
REST: bar.sync 0;
st.shared.b32 [%r7], %r0; //@ second
@%p0 cp.async.bulk.wait_group 0;
""",
        {
            "proxy": ("copy", "store"),
            "sync": ("copy", "store"),
            "commit": ("second", "copy"),
            "read": ("second", "copy"),
        },
    ),
    "bulk store, global memory": Program(
        """
st.shared.b32 [%r7], %r0; fence.proxy.async.shared::cta; bar.sync 0;
@!%p0 bra REST;
cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r1], 256; //@ copy
cp.async.bulk.commit_group; cp.async.bulk.wait_group{written||.read} 0;
ld.global.b32 %r11, [%rd0]; //@ load
REST:
""",
        {"written": ("load", "copy")},
    ),
    "cp.async": Program(
        """
mad.wide.u32 %rd1, %r0, 4, %rd0;
cp.async.ca.shared.global [%r7], [%rd1], 4; //@ copy
{commit|cp.async.commit_group;}
{wait|cp.async.wait_group 0;}
ld.shared.b32 %r11, [%r7]; //@ load
{sync|bar.sync 0;}
st.shared.b32 [%r8], %r11; //@ store
""",
        {"commit": ("load", "copy"), "wait": ("load", "copy"), "sync": ("store", "copy")},
    ),
    "cp.async, several lanes to one place": Program(
        """
mov.u32 %r12, 0; shr.u32 %r11, %r0, 3; shl.b32 %r11, %r11, 2; cvt.u64.u32 %rd1, %r11; add.u64 %rd1, %rd1, %rd0;
add.u32 %r11, %r11, %r1;
L: cp.async.ca.shared.global [%r11], [%rd1], 4; //@ copy
{wait|cp.async.wait_all; bar.warp.sync -1;}
add.u32 %r12, %r12, 1; setp.lt.u32 %p5, %r12, 2; @%p5 bra L;
""",
        {"wait": ("copy", "copy")},
    ),
    "cp.async, by halves of a warp": Program(
        """
mad.wide.u32 %rd1, %r0, 4, %rd0; setp.lt.u32 %p5, %r0, 16; @%p5 bra LOW;
cp.async.ca.shared.global [%r7], [%rd1], 4; cp.async.wait_all; bra JOIN;
LOW: cp.async.ca.shared.global [%r7], [%rd1], 4; //@ copy
{wait|cp.async.wait_all;}
JOIN: bar.warp.sync -1;
ld.shared.b32 %r11, [%r9]; //@ load
""",
        {"wait": ("load", "copy")},
    ),
    "cp.async, what another lane copied": Program(
        """
mad.wide.u32 %rd1, %r0, 4, %rd0;
cp.async.ca.shared.global [%r7], [%rd1], 4; //@ copy
cp.async.commit_group;
cp.async.wait_group 0;
ld.shared.b32 %r11, [%r7];
{warp|bar.warp.sync -1;}
ld.shared.b32 %r11, [%r9]; //@ load
""",
        {"warp": ("load", "copy")},
    ),
    "cp.async, arriving on an mbarrier": Program(
        "@%p0 mbarrier.init.shared.b64 [%r2], 64; bar.sync 0;"
        + """
mad.wide.u32 %rd1, %r0, 4, %rd0;
{early||cp.async.mbarrier.arrive.noinc.shared.b64 [%r2];}
cp.async.ca.shared.global [%r7], [%rd1], 4; //@ copy
{early|cp.async.mbarrier.arrive.noinc.shared.b64 [%r2];}
"""
        + wait(1)
        + """
ld.shared.b32 %r11, [%r8]; //@ load
""",
        {"early": ("load", "copy")},
    ),
    "wgmma": Program(
        """
shl.b32 %r11, %r0, 1; add.u32 %r11, %r11, %r1; mov.b16 %h0, 0; mov.b32 %r12, 0;
shr.u32 %r14, %r1, 4; cvt.u64.u32 %rd2, %r14; or.b64 %rd2, %rd2, 0x800080000;
st.shared.b16 [%r11], %h0; //@ store
{proxy|fence.proxy.async.shared::cta;}
{sync|bar.sync 0;}
mov.b32 %f0, 0f00000000; mov.b32 %f1, %f0; mov.b32 %f2, %f0; mov.b32 %f3, %f0;
{fence|wgmma.fence.sync.aligned;}
PRODUCT1 //@ product
{commit|wgmma.commit_group.sync.aligned;}
{wait|wgmma.wait_group.sync.aligned 0;}
bar.sync 0;
st.shared.b16 [%r11], %h0; //@ second
{late|wgmma.wait_group.sync.aligned 0;}
add.f32 %f4, %f0, %f1; //@ use
wgmma.fence.sync.aligned;
""",
        {
            "proxy": ("product", "store"),
            "sync": ("product", "store"),
            "fence": ("product", "product"),
            "commit": ("second", "product"),
            "wait": ("second", "product"),
        },
        block=128,
    ),
    "registers of wgmma": Program(
        """
shl.b32 %r11, %r0, 1; add.u32 %r11, %r11, %r1; mov.b16 %h0, 0; mov.b32 %r12, 0;
shr.u32 %r14, %r1, 4; cvt.u64.u32 %rd2, %r14; or.b64 %rd2, %rd2, 0x800080000;
st.shared.b16 [%r11], %h0; fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;
PRODUCT0 //@ product
PRODUCT1 //@ next
wgmma.commit_group.sync.aligned;
{wait|wgmma.wait_group.sync.aligned 0;}
mul.f32 %f2, %f2, %f2; //@ use
{fence|wgmma.fence.sync.aligned;}
mov.b32 %f4, %f0; mov.b32 %f0, %f4;
PRODUCT1 //@ last
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
""",
        {"wait": ("use", "next"), "fence": ("last", "use")},
        block=128,
    ),
    "tensor memory": Program(
        INIT
        + """
@!%p1 bra SHARED;
tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r2+16], 32;
SHARED: mov.b32 %r12, 0; st.shared.b32 [%r7], %r12; //@ shared
{proxy|fence.proxy.async.shared::cta;}
bar.sync 0;
ld.shared.b32 %r13, [%r2+16]; shr.u32 %r14, %r0, 5; shl.b32 %r14, %r14, 21; add.u32 %r14, %r14, %r13;
tcgen05.st.sync.aligned.32x32b.x8.b32 [%r14], {%r12, %r12, %r12, %r12, %r12, %r12, %r12, %r12}; //@ store
{stored|tcgen05.wait::st.sync.aligned;}
{before|tcgen05.fence::before_thread_sync;}
{sync|bar.sync 0;}
@!%p0 bra REST;
{after|tcgen05.fence::after_thread_sync;}
shr.u32 %r15, %r1, 4; cvt.u64.u32 %rd2, %r15; or.b64 %rd2, %rd2, 0x401000080000; add.u32 %r16, %r13, 16;
setp.ne.u32 %p5, %r0, 0; mov.b32 %r17, 0x08040010;
tcgen05.mma.cta_group::1.kind::f16 [%r16], [%r13], %rd2, %r17, %p5; //@ product
tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r2];
REST: {done|"""
        + wait(1)
        + """}
{seen|tcgen05.fence::after_thread_sync;}
add.u32 %r18, %r14, 16;
tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r19}, [%r18]; //@ load
{loaded|tcgen05.wait::ld.sync.aligned;}
add.u32 %r20, %r19, 1; //@ use
tcgen05.fence::before_thread_sync;
bar.sync 0;
tcgen05.fence::after_thread_sync;
@!%p1 bra END;
tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r13, 32;
END:
""",
        {
            "proxy": ("product", "shared"),
            "stored": ("product", "store"),
            "before": ("product", "store"),
            "sync": ("product", "store"),
            "after": ("product", "store"),
            "done": ("load", "product"),
            "seen": ("load", "product"),
            "loaded": ("use", "load"),
        },
        block=128,
        arch="sm_100a",
    ),
    "tensor memory, loads before the next product": Program(
        """
@!%p1 bra SHARED;
tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r2+16], 32;
SHARED: bar.sync 0; ld.shared.b32 %r13, [%r2+16];
@!%p1 bra OTHER;
tcgen05.st.sync.aligned.32x32b.x1.b32 [%r13], {%r0}; tcgen05.wait::st.sync.aligned; //@ store
tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r19}, [%r13]; //@ load
{loaded|tcgen05.wait::ld.sync.aligned;}
tcgen05.st.sync.aligned.32x32b.x1.b32 [%r13], {%r0}; //@ second
{stored|tcgen05.wait::st.sync.aligned;}
tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r19}, [%r13]; tcgen05.wait::ld.sync.aligned; //@ third
tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r13, 32;
OTHER:
""",
        {"loaded": ("second", "load"), "stored": ("third", "second")},
        arch="sm_100a",
    ),
    "cluster barrier": Program(
        """
mapa.shared::cluster.u32 %r11, %r7, 1;
@%p4 st.shared::cluster.b32 [%r11], %r0; //@ store
barrier.cluster.arrive{release|.release|.relaxed}.aligned;
{wait|barrier.cluster.wait.acquire.aligned;}
@!%p4 ld.shared.b32 %r12, [%r7]; //@ load
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
""",
        {"release": ("load", "store")},
        block=32,
        grid=2,
        cluster=2,
    ),
    "cluster barrier, relaxed behind a fence": Program(
        """
mapa.shared::cluster.u32 %r11, %r7, 1;
@%p4 st.shared::cluster.b32 [%r11], %r0; //@ store
{fence|fence.acq_rel.cluster;}
barrier.cluster.arrive.relaxed.aligned;
barrier.cluster.wait.acquire.aligned;
@!%p4 ld.shared.b32 %r12, [%r7]; //@ load
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
""",
        {"fence": ("load", "store")},
        block=32,
        grid=2,
        cluster=2,
    ),
    "release and acquire": Program(
        """
@!%p3 bra END;
@!%p4 bra READER;
st.global.b32 [%rd0+64], 7; //@ store
st{release|.release|.relaxed}.{scope|gpu|cta}.global.b32 [%rd0], 1; bra END;
READER: ld{acquire|.acquire|.relaxed}.gpu.global.b32 %r11, [%rd0]; setp.eq.u32 %p5, %r11, 0; @%p5 bra READER;
ld.global.b32 %r12, [%rd0+64]; //@ load
END:
""",
        {"release": ("load", "store"), "acquire": ("load", "store")},
        block=32,
        grid=2,
    ),
    "fences around relaxed accesses": Program(
        """
@!%p3 bra END;
@!%p4 bra READER;
st.global.b32 [%rd0+64], 7; //@ store
{release|fence.acq_rel.gpu;|fence.acq_rel.cta;}
st.relaxed.gpu.global.b32 [%rd0], 1; bra END;
READER: ld.relaxed.gpu.global.b32 %r11, [%rd0]; setp.eq.u32 %p5, %r11, 0; @%p5 bra READER;
{acquire|fence.acq_rel.gpu;}
ld.global.b32 %r12, [%rd0+64]; //@ load
END:
""",
        {"release": ("load", "store"), "acquire": ("load", "store")},
        block=32,
        grid=2,
    ),
    "the last CTA resets a counter": Program(
        """
mad.wide.u32 %rd3, %r5, 4, %rd0;
@!%p3 bra END;
st.global.b32 [%rd3+64], %r5; //@ store
atom{order|.acq_rel|.relaxed}.gpu.global.add.u32 %r11, [%rd0], 1;
setp.ne.u32 %p5, %r11, 1; @%p5 bra END;
ld.global.v2.b32 {%r12, %r13}, [%rd0+64]; //@ load
st.global.b32 [%rd0], 0;
END:
""",
        {"order": ("load", "store")},
        block=32,
        grid=2,
    ),
    "the last CTA resets a counter that none of them stores to": Program(
        """
@!%p3 bra END;
red.global.add.u32 [%rd0], 1; //@ count
atom{order|.acq_rel|.relaxed}.gpu.global.add.u32 %r11, [%rd0+64], 1;
setp.ne.u32 %p5, %r11, 1; @%p5 bra END;
st.global.b32 [%rd0], 0; //@ reset
END:
""",
        {"order": ("reset", "count")},
        block=32,
        grid=2,
    ),
    "atomics need no order, plain stores do": Program(
        """
@!%p3 bra END;
{atomic|red.global.add.u32 [%rd0], 1;|st.global.b32 [%rd0], 1;} //@ add
END:
""",
        {"atomic": ("add", "add")},
        block=32,
        grid=2,
    ),
}
