"""The emulator's host side: what programs are told, what is captured of their launches, and how failures come back.

The DSL takes one architecture a process and its runtime when it is imported, so programs run in processes of their own.
"""

import json
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from flash_attn_cute.emulator import EmulatorError, build, devices, launch, modules, parameters

ROOT = Path(__file__).parents[2]


def run(program: str, tmp_path: Path, *options: str, arch: str = "sm_90a", code: int = 0) -> str:
    """Runs a program under `python -m flash_attn_cute.emulator` and returns what it printed."""
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(program))
    command = [sys.executable, "-m", "flash_attn_cute.emulator", "--arch", arch, *options, str(script), "argument"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout if code == 0 else result.stderr


SCALE = """
    import cutlass
    import cutlass.cute as cute
    import torch
    from cutlass.cute.runtime import from_dlpack

    @cute.kernel
    def kernel(x: cute.Tensor, y: cute.Tensor, factor: cutlass.Int32, length: cutlass.Constexpr):
        i = cute.arch.block_idx()[0] * 64 + cute.arch.thread_idx()[0]
        if i < length:
            y[i] = x[i] * factor

    @cute.jit
    def host(x: cute.Tensor, y: cute.Tensor, factor: cutlass.Int32, length: cutlass.Constexpr):
        kernel(x, y, factor, length).launch(grid=[-(-length // 64), 1, 1], block=[64, 1, 1])

    def tensors(length=200):
        x = torch.arange(length, dtype=torch.float32, device="cuda")
        return x, torch.zeros_like(x)
"""


def test_a_program_sees_a_gpu(tmp_path):
    run(
        """
        import copy, sys, threading
        import torch
        from cuda.bindings import driver, runtime

        assert sys.argv[1:] == ["argument"] and __name__ == "__main__"
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            torch.ones(2, device="cuda").sum()
        assert any(event.key == "aten::sum" for event in profile.key_averages())
        assert torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
        assert torch.cuda.get_device_properties(0).multi_processor_count == 6

        x = torch.zeros(3, 5, device="cuda")
        assert x.is_cuda and x.device == torch.device("cuda", 0) and str(x).endswith("device='cuda:0')")
        assert (x.T + 1).is_cuda and torch.empty_like(x).is_cuda and x.new_ones(2).is_cuda and copy.deepcopy(x).is_cuda
        assert x.data_ptr() % 256 == 0 and (x + 1).data_ptr() % 256 == 0
        assert not torch.zeros(3).is_cuda and not x.cpu().is_cuda and torch.zeros(3).to(x).is_cuda

        # Crossing copies, staying does not.
        assert x.cpu().data_ptr() != x.data_ptr() and x.cuda() is x and x.to("cuda") is x
        on_host = torch.zeros(3)
        on_host.cuda().add_(1)
        assert on_host.sum() == 0

        layer = torch.nn.Linear(4, 2).cuda()
        layer(torch.ones(1, 4, device="cuda")).sum().backward()
        assert layer.weight.is_cuda and layer.weight.grad.is_cuda

        with torch.device("cuda"):
            assert torch.ones(2).is_cuda
        torch.manual_seed(3)
        first = torch.randn(4, device="cuda")
        torch.cuda.manual_seed(3)
        assert torch.equal(first, torch.randn(4, device="cuda"))
        torch.randn(2, device="cuda", generator=torch.Generator("cuda").manual_seed(1))

        seen = []
        thread = threading.Thread(target=lambda: seen.append((torch.zeros(1, device="cuda") + 1).is_cuda))
        thread.start(); thread.join()
        assert seen == [True]

        stream, start, end = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True), torch.cuda.Event()
        with torch.cuda.stream(stream):
            assert torch.cuda.current_stream() == stream
            start.record(); end.record()
        torch.cuda.synchronize()
        assert start.elapsed_time(end) >= 0

        @torch.library.custom_op("emulated::twice", mutates_args=(), device_types="cuda")
        def twice(x: torch.Tensor) -> torch.Tensor:
            assert x.is_cuda
            return torch.full((3,), 2.0, device="cuda") * x
        assert twice(torch.ones(3, device="cuda")).tolist() == [2, 2, 2]

        status, value = driver.cuDeviceGetAttribute(
            driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, driver.cuDeviceGet(0)[1])
        assert status == driver.CUresult.CUDA_SUCCESS and value == 6
        status, address = driver.cuMemAlloc(64)
        assert driver.cuMemsetD32(address, 7, 16) == (driver.CUresult.CUDA_SUCCESS,)
        back = bytearray(4)
        driver.cuMemcpyDtoH(back, address, 4)
        assert back == b"\\7\\0\\0\\0" and runtime.cudaGetDeviceCount()[1] == 1
        """,
        tmp_path,
        "--sms",
        "6",
    )


def test_plain_and_tvm_ffi_launches_are_captured(tmp_path):
    """Two kernels of one name (another length): each launch has its own PTX, its parameters and its tensors' bounds."""
    program = (
        SCALE
        + """
    import gc

    from flash_attn_cute.emulator import current_session
    from flash_attn_cute.emulator.parameters import layout

    session, records = current_session(), []
    execute = session.execute
    session.execute = lambda record: (records.append(record), execute(record))

    def check(function, length, convert):
        x, y = tensors(length)
        function(convert(x), convert(y), 3)
        assert torch.equal(y, 3 * x), (length, y)
        record = records.pop()
        assert not records and record.arch == "sm_90a" and record.grid == (-(-length // 64), 1, 1)
        assert record.block == (64, 1, 1) and record.cluster == (1, 1, 1)
        assert record.entry in record.ptx and len(record.params) == layout(record.ptx, record.entry).size == 20
        words = [int.from_bytes(record.params[i : i + 8], "little") for i in (0, 8)]
        assert words == [x.data_ptr(), y.data_ptr()] and record.params[16:] == b"\\3\\0\\0\\0"
        assert [(a.address, a.size) for a in record.allocations] == sorted((w, 4 * length) for w in words)

    functions = []
    for length in (100, 200):
        x, y = map(from_dlpack, tensors(length))
        functions.append((length, cute.compile(host, x, y, 3, length), from_dlpack))
        x, y = [cute.runtime.make_fake_compact_tensor(cutlass.Float32, (length,)) for _ in "xy"]
        functions.append((length, cute.compile(host, x, y, 3, length, options="--enable-tvm-ffi"), lambda x: x))
    del x, y
    gc.collect()  # compiling leaves the tensors that it was given in cycles, and what is alive may be touched
    for length, function, convert in functions:
        check(function, length, convert)
    """
    )
    report = tmp_path / "report.json"
    run(program, tmp_path, "--report", str(report), "--schedule", "random", "--seed", "1")
    launches = json.loads(report.read_text())["launches"]
    assert len(launches) == 4 and all(launch["grid"][0] in (2, 4) for launch in launches)


def test_failures_come_back_as_they_were_raised(tmp_path):
    """From a plain call, a tvm-ffi call and a linked one, for a kernel that writes past the end of its tensor."""
    program = (
        SCALE
        + """
    from flash_attn_cute.emulator import EmulatorError
    from flash_attn_cute.emulator.errors import OutOfBounds

    x, y = tensors(128)
    short = y[:100]
    plain = cute.compile(host, from_dlpack(x), from_dlpack(x), 3, 128)
    fake = [cute.runtime.make_fake_compact_tensor(cutlass.Float32, (cute.sym_int(),)) for _ in "xy"]
    fast = cute.compile(host, *fake, 3, 128, options="--enable-tvm-ffi")
    for call in (lambda: plain(from_dlpack(x), from_dlpack(short), 3), lambda: fast(x, short, 3)):
        try:
            call()
        except OutOfBounds as error:
            assert "kernel" in str(error), error
        else:
            raise AssertionError("the write past the end went unnoticed")
    fast(x, y, 3)
    assert torch.equal(y, 3 * x)
    raise KeyError("of the program")
    """
    )
    assert "KeyError: 'of the program'" in run(program, tmp_path, code=1)


def test_more_shared_memory_than_there_is_is_refused(tmp_path):
    program = """
    import cutlass.cute as cute
    from flash_attn_cute.emulator import EmulatorError

    @cute.kernel
    def kernel():
        pass

    @cute.jit
    def host(size: cute.Int32):
        kernel().launch(grid=[1, 1, 1], block=[32, 1, 1], smem=size)

    host(227 * 1024)
    try:
        host(227 * 1024 + 16)
    except EmulatorError as error:
        assert "of 232448 in all" in str(error), error
    else:
        raise AssertionError("the launch went through")
    """
    run(program, tmp_path)


def test_graphs_replay_launches(tmp_path):
    program = (
        SCALE
        + """
    from cuda.bindings import runtime

    x, y = tensors()
    function = cute.compile(host, from_dlpack(x), from_dlpack(y), 3, 200)
    arguments = from_dlpack(x), from_dlpack(y), 3
    stream = runtime.cudaStreamCreate()[1]
    runtime.cudaStreamBeginCapture(stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
    function(*arguments)
    graph = runtime.cudaStreamEndCapture(stream)[1]
    assert runtime.cudaGraphGetNodes(graph)[2] == 1 and not y.any()
    executable = runtime.cudaGraphInstantiate(graph, 0)[1]
    for factor in (1, 2):
        x.fill_(factor)
        runtime.cudaGraphLaunch(executable, stream)
        assert (y == 3 * factor).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        function(*arguments)
    y.zero_()
    graph.replay()
    assert (y == 6).all()
    """
    )
    run(program, tmp_path)


def test_graphs_repeat_what_torch_computes(tmp_path):
    """As on a GPU: nothing that was there before a capture changes in it, and new memory is filled at every replay."""
    program = (
        SCALE
        + """
    x, y = tensors()
    function = cute.compile(host, from_dlpack(x), from_dlpack(y), 3, 200)

    @torch.library.custom_op("test::scaled_sum", mutates_args=(), device_types="cuda")
    def scaled_sum(x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(1, device=x.device)
        scaled = torch.empty_like(x)
        function(from_dlpack(x), from_dlpack(scaled), 3)
        return total.add_(scaled.float().sum())

    calls, on_host = torch.zeros(1, device="cuda"), torch.zeros(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls += 1
        on_host += 1
        fresh = torch.zeros(200, device="cuda")
        fresh[3:5].copy_(x[3:5])
        fresh += 1
        doubled = [x * 2 for _ in range(8)]  # in memory of any alignment
        total = scaled_sum(x)
        try:
            total.item()
        except Exception as error:
            assert "before it is computed" in str(error)
        else:
            raise AssertionError("a value was read in a capture")
    assert calls.item() == 0 and on_host.item() == 1
    for count in (1, 2):
        x.fill_(count)
        graph.replay()
        assert calls.item() == count and on_host.item() == 1
        assert all((each == 2 * count).all() for each in doubled)
        assert fresh.sum() == 200 + 2 * count and total.item() == 3 * count * x.numel()
    """
    )
    run(program, tmp_path)


def test_operators_under_torch_compile(tmp_path):
    program = (
        SCALE
        + """
    x, y = tensors()
    function = cute.compile(host, from_dlpack(x), from_dlpack(y), 3, 200)

    @torch.library.custom_op("test::tripled", mutates_args=(), device_types="cuda")
    def tripled(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        function(from_dlpack(x), from_dlpack(out), 3)
        return out

    tripled.register_fake(torch.empty_like)

    class Model(torch.nn.Module):
        def forward(self, x):
            return tripled(x + 1) - 1

    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        for model in (Model(), lambda x: tripled(x + 1) - 1):
            out = torch.compile(model, backend=backend, fullgraph=True)(x)
            assert out.is_cuda and torch.equal(out, 3 * x + 2)
    """
    )
    run(program, tmp_path)


def test_block_scaled_reference(tmp_path):
    """torch._scaled_mm, against products of numbers that are scaled one by one."""
    program = """
    import torch

    m, n, k = 130, 70, 320
    rows, columns = [torch.randint(0, 256, (x, k // 2), dtype=torch.uint8) for x in (m, n)]
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    scales, numbers = [], []
    for x in (rows, columns):
        plain = torch.randint(1, 5, (len(x), k // 16)).float()
        across, padded = -(-k // 16 // 4), -(-len(x) // 128)
        ordered = torch.full((padded * across * 512,), 7.0)
        for r in range(len(x)):
            for c in range(k // 16):
                ordered[(r // 128 * across + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = plain[r, c]
        scales.append(ordered.to(torch.float8_e4m3fn).cuda())
        codes = torch.stack([x & 15, x >> 4], 2).reshape(len(x), k).long()
        numbers.append(table[codes] * plain.repeat_interleave(16, 1))
    a, b = (x.cuda().view(torch.float4_e2m1fn_x2) for x in (rows, columns))
    out = torch._scaled_mm(a, b.t(), *scales, out_dtype=torch.float32)
    assert out.is_cuda and torch.equal(out.cpu(), numbers[0] @ numbers[1].t())
    """
    run(program, tmp_path, arch="sm_100a")


def test_one_architecture_a_process():
    program = """
    import torch
    from flash_attn_cute.emulator import EmulatorError, current_session, emulate

    def error(arch):
        try:
            with emulate(arch):
                return None
        except EmulatorError as error:
            return str(error)

    with emulate("sm_100a", sms=3) as session:
        assert current_session() is session and torch.zeros(1, device="cuda").is_cuda
        assert torch.cuda.get_device_capability() == (10, 0)
        assert "in progress" in error("sm_100a")
    assert current_session() is None and torch.zeros(1).device.type == "cpu" and not torch.cuda.is_available()
    assert "sm_100a" in error("sm_90a") and error("sm_100a") is None
    """
    late = """
    import cutlass
    from flash_attn_cute.emulator import emulate
    with emulate("sm_90a"): pass
    """
    for text, code, message in ((program, 0, ""), (late, 1, "begin the session first")):
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(text)], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == code and message in result.stderr, result.stderr


def test_parameters_are_laid_out_as_ptx_says():
    ptx = """
    .shared .align 128 .b8 buffer[512];
    .extern .shared .align 16 .b8 dynamic[];
    .visible .entry first(
        .param .u32 first_param_0,
        .param .align 64 .b8 first_param_1[128],
        .param .u64 .ptr .global .align 16 first_param_2,
        .param .u8 first_param_3
    )
    .maxntid 128, 1, 1
    { ret; }
    .visible .entry second() { ret; }
    """
    found = parameters.layout(ptx, "first")
    assert found.parameters == ((0, 4), (64, 128), (192, 8), (200, 1)) and found.size == 201
    assert parameters.layout(ptx, "second") == ((), 0)
    assert parameters.static_shared_bytes(ptx) == 512
    with pytest.raises(EmulatorError, match="no .entry third"):
        parameters.layout(ptx, "third")


def test_modules_are_told_apart_by_their_bytes(tmp_path):
    header = bytearray(b"\x7fELF" + bytes(60))
    struct.pack_into("<Q", header, 32, len(header))  # one program header of six bytes follows
    struct.pack_into("<HH", header, 54, 6, 1)
    known = modules.Modules(tmp_path)
    known.add(bytes(header + b"first."), "ptx 1")
    known.add(bytes(header + b"second"), "ptx 2")
    for each in (known, modules.Modules(tmp_path)):  # the other process has the kernel from a disk cache
        assert each.find(b"fatbin..." + header + b"second...") == "ptx 2"
        with pytest.raises(EmulatorError, match="not known"):
            each.find(bytes(header + b"third."))


def test_options_are_checked():
    with pytest.raises(ValueError, match="arch: got 'sm_80'"):
        devices.device("sm_80")
    with pytest.raises(ValueError, match="schedule: got 'fair'"):
        launch.EngineOptions(schedule="fair")


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASH_ATTN_CUTE_CACHE_DIR", str(tmp_path))
    source = tmp_path / "empty.c"
    source.write_text("int nothing;\n")
    build.find_compiler.cache_clear()
    library = build.shared_library("test", [source])
    assert library.parent == tmp_path / "emulator" and build.shared_library("test", [source]) == library
    source.write_text("int something;\n")
    assert build.shared_library("test", [source]) != library
    build.find_compiler.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(EmulatorError, match="install gcc"):
        build.shared_library("test", [source])
    build.find_compiler.cache_clear()
