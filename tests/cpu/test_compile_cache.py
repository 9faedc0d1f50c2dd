"""The compile cache: one compile per key, across threads and processes, whatever happens to the files.

Most functions compiled here are host code over CPU tensors, so that what comes out of the cache runs and has a result
to check without a GPU; one test compiles a kernel. Run as a script, this file is the other process of a test.
"""

import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")  # the DSL reads it when it is imported

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import pytest
import torch

from flash_attn_cute import compile_cache
from flash_attn_cute.compile_cache import CompileCache

KEY = ("sm_90a", "axpy", 1, True, None, ("fp32", 2.5))


@cute.jit
def _axpy(x: cute.Tensor, y: cute.Tensor, scale: cutlass.Float32):
    for i in range(cute.size(x)):
        y[i] = scale * x[i] + y[i]


@cute.jit
def _scaled_product(x: cute.Tensor, y: cute.Tensor, scale: cutlass.Float32):
    for i in range(cute.size(x)):
        y[i] = scale * x[i] * y[i]


@cute.kernel
def _add_kernel(x: cute.Tensor, y: cute.Tensor, n: cutlass.Int32):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    i = block * 128 + thread
    if i < n:
        y[i] = x[i] + y[i]


@cute.jit
def _add(x: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream):
    n = cute.size(x)
    _add_kernel(x, y, n).launch(grid=[cute.ceil_div(n, 128), 1, 1], block=[128, 1, 1], stream=stream)


def _vectors(memspace):
    n = cute.sym_int()
    return [cute.runtime.make_fake_compact_tensor(cutlass.Float32, (n,), memspace=memspace) for _ in range(2)]


def _build_host(function=_axpy):
    return cute.compile(
        function, *_vectors(cute.AddressSpace.generic), cutlass.Float32(1.0), options="--enable-tvm-ffi"
    )


def _build_kernel():
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(_add, *_vectors(cute.AddressSpace.gmem), stream, options="--enable-tvm-ffi")


def _must_not_build():
    raise AssertionError("compiled, though the function was there")


def _check_axpy(function):
    x, y = torch.arange(5.0), torch.ones(5)
    function(x, y, 2.0)
    assert torch.equal(y, 2 * torch.arange(5.0) + 1)


def _entries(directory):
    return sorted(Path(directory).rglob("*.o"))


def _compiles(caplog):
    return [record for record in caplog.records if record.levelno == logging.INFO]


def _warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.fixture(autouse=True)
def _log(caplog, monkeypatch):
    monkeypatch.delenv("FLASH_ATTN_CUTE_CACHE", raising=False)
    caplog.set_level(logging.DEBUG, logger="flash_attn_cute")


def test_compiles_once_and_returns_the_same_function(tmp_path, caplog):
    cache = CompileCache(tmp_path)
    function = cache.get(KEY, _build_host)
    assert cache.get(KEY, _must_not_build) is function
    _check_axpy(function)
    (record,) = _compiles(caplog)
    assert "'axpy'" in record.getMessage() and record.getMessage().endswith(" s")
    assert len(_entries(tmp_path)) == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_loads_from_disk_without_compiling(tmp_path, caplog):
    CompileCache(tmp_path).get(KEY, _build_host)
    caplog.clear()
    _check_axpy(CompileCache(tmp_path).get(KEY, _must_not_build))
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG and "loaded" in record.getMessage()


def test_functions_of_different_keys_do_not_mix(tmp_path):
    """Every entry has the same entry symbol; loaded together, each keeps its own."""
    cache = CompileCache(tmp_path)
    axpy = cache.get(KEY, _build_host)
    product = cache.get(("sm_90a", "product"), lambda: _build_host(_scaled_product))
    x, y = torch.arange(4.0), torch.full((4,), 3.0)
    product(x, y, 2.0)
    assert torch.equal(y, 6 * x)
    _check_axpy(axpy)
    assert len(_entries(tmp_path)) == 2


def test_kernel_is_compiled_and_found_again(tmp_path):
    """A kernel with the environment's stream: loadable without a GPU, and checks its arguments before any launch."""
    key = (os.environ["CUTE_DSL_ARCH"], "add")
    CompileCache(tmp_path).get(key, _build_kernel)
    function = CompileCache(tmp_path).get(key, _must_not_build)
    with pytest.raises(ValueError, match="expected device_type=cuda"):
        function(torch.zeros(3), torch.zeros(3))
    with pytest.raises(TypeError, match="Expects 2 parameters"):
        function(torch.zeros(3))


def test_other_process_loads_without_compiling_or_a_toolchain(tmp_path):
    CompileCache(tmp_path).get(KEY, _build_host)
    log = _child(tmp_path, PATH="/nonexistent").communicate(timeout=60)[1]
    assert "compiled" not in log and "loaded" in log


def test_two_processes_at_once_compile_once(tmp_path):
    children = [_child(tmp_path / "cache", barrier=tmp_path / "barrier") for _ in range(2)]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("barrier.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "barrier").touch()
    logs = [child.communicate(timeout=60)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], logs
    assert sum(log.count("compiled") for log in logs) == 1
    assert sum(log.count("loaded") for log in logs) == 1


def test_threads_compile_once(tmp_path):
    cache, builds, functions = CompileCache(tmp_path), [], []

    def build():
        builds.append(threading.get_ident())
        time.sleep(0.1)
        return _build_host()

    threads = [threading.Thread(target=lambda: functions.append(cache.get(KEY, build))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert len(functions) == 4 and len(set(map(id, functions))) == 1


def test_other_fingerprint_compiles_again(tmp_path, caplog, monkeypatch):
    CompileCache(tmp_path).get(KEY, _build_host)
    monkeypatch.setattr(compile_cache, "fingerprint", lambda: "another")
    CompileCache(tmp_path).get(KEY, _build_host)
    assert len(_compiles(caplog)) == 2
    assert len(_entries(tmp_path)) == 2


@pytest.mark.parametrize("changed", ["_version", "_cpu_features"])
def test_fingerprint_follows_versions_and_cpu(monkeypatch, changed):
    before = compile_cache.fingerprint.__wrapped__()
    assert compile_cache.fingerprint.__wrapped__() == before
    monkeypatch.setattr(compile_cache, changed, lambda *_: "9.9.9")
    assert compile_cache.fingerprint.__wrapped__() != before


def test_fingerprint_follows_the_source(monkeypatch, tmp_path):
    package = tmp_path / "package"
    (package / "device").mkdir(parents=True)
    monkeypatch.setattr(compile_cache, "__file__", str(package / "compile_cache.py"))
    seen = set()
    for name, text in [("a.py", "x = 1"), ("a.py", "x = 2"), ("device/b.py", ""), ("notes.txt", "not source")]:
        (package / name).write_text(text)
        seen.add(compile_cache.fingerprint.__wrapped__())
    assert len(seen) == 3


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "not an object"])
def test_damaged_entry_is_compiled_again(tmp_path, caplog, damage):
    CompileCache(tmp_path).get(KEY, _build_host)
    (path,) = _entries(tmp_path)
    good = path.read_bytes()
    middle = len(good) // 2
    path.write_bytes(
        {
            "truncated": good[:middle],
            "flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            "empty": b"",
            "not an object": b"text" + compile_cache.hashlib.sha256(b"text").digest(),  # intact, but cannot be linked
        }[damage]
    )
    caplog.clear()
    _check_axpy(CompileCache(tmp_path).get(KEY, _build_host))
    (warning,) = _warnings(caplog)
    assert "damaged" in warning and str(path) in warning
    assert len(_compiles(caplog)) == 1
    assert CompileCache(tmp_path).get(KEY, _must_not_build)


def test_place_that_cannot_be_written_costs_one_warning(tmp_path, caplog):
    """A file where the directory should be: like a read-only disk, but it also stops a root user."""
    (tmp_path / "file").touch()
    cache = CompileCache(tmp_path / "file")
    _check_axpy(cache.get(KEY, _build_host))
    cache.get(("sm_90a", "product"), lambda: _build_host(_scaled_product))
    assert len(_compiles(caplog)) == 2
    (warning,) = _warnings(caplog)
    assert "not kept on disk" in warning


def test_full_disk_costs_one_warning_and_leaves_nothing(tmp_path, caplog, monkeypatch):
    def no_space(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    cache = CompileCache(tmp_path)
    _check_axpy(cache.get(KEY, _build_host))
    cache.get(("sm_90a", "product"), lambda: _build_host(_scaled_product))
    (warning,) = _warnings(caplog)
    assert "No space left" in warning
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]


def test_finished_cache_is_read_where_nothing_can_be_written(tmp_path, monkeypatch, caplog):
    CompileCache(tmp_path).get(KEY, _build_host)
    caplog.clear()
    monkeypatch.setattr(compile_cache, "_file_lock", None)  # a lock file could not be made there, and none is needed
    _check_axpy(CompileCache(tmp_path).get(KEY, _must_not_build))
    assert not _warnings(caplog)


def test_lock_that_is_never_released_is_waited_for_then_ignored(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(compile_cache, "LOCK_TIMEOUT_SECONDS", 0.2)
    CompileCache(tmp_path).get(KEY, _build_host)
    (path,) = _entries(tmp_path)
    path.unlink()
    caplog.clear()
    with compile_cache._file_lock(path.with_suffix(".lock"), 0):
        CompileCache(tmp_path).get(KEY, _build_host)
    (warning,) = _warnings(caplog)
    assert "waited" in warning
    assert len(_compiles(caplog)) == 1
    assert path.exists()


def test_failed_build_is_not_kept(tmp_path):
    cache = CompileCache(tmp_path)
    with pytest.raises(AssertionError):
        cache.get(KEY, _must_not_build)
    _check_axpy(cache.get(KEY, _build_host))


def test_disabled_disk(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FLASH_ATTN_CUTE_CACHE", "0")
    cache = CompileCache(tmp_path)
    assert cache.directory is None
    function = cache.get(KEY, _build_host)
    _check_axpy(function)
    assert cache.get(KEY, _must_not_build) is function
    assert not list(tmp_path.iterdir())
    assert len(_compiles(caplog)) == 1 and not _warnings(caplog)


def test_directory_comes_from_the_environment(tmp_path, monkeypatch):
    for name in ("FLASH_ATTN_CUTE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CompileCache().directory == tmp_path / ".cache" / "flash_attn_cute"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert CompileCache().directory == tmp_path / "xdg" / "flash_attn_cute"
    monkeypatch.setenv("FLASH_ATTN_CUTE_CACHE_DIR", str(tmp_path / "moved"))
    assert CompileCache().directory == tmp_path / "moved"
    assert CompileCache(tmp_path / "given").directory == tmp_path / "given"


@pytest.mark.parametrize("key", [(), ("axpy",), (90, "axpy"), "sm_90a"])
def test_key_must_name_its_architecture(tmp_path, key):
    with pytest.raises(ValueError, match="begins with the target architecture"):
        CompileCache(tmp_path).get(key, _must_not_build)


@pytest.mark.parametrize("item", [torch.float16, object(), ("nested", b"bytes")])
def test_key_must_be_primitive(tmp_path, item):
    with pytest.raises(TypeError, match="a key holds"):
        CompileCache(tmp_path).get(("sm_90a", item), _must_not_build)


def test_precompile_presets_are_complete_and_without_repeats(tmp_path):
    precompile = _precompile_script()
    for preset in ("common", "serving", "all"):
        configs = precompile.load_configs(preset)
        assert len({json.dumps(config, sort_keys=True) for config in configs}) == len(configs) > 10
        assert all(config.keys() == precompile.DEFAULTS.keys() for config in configs)
    path = tmp_path / "configs.json"
    path.write_text('[{"head_dim": 64}]')
    (config,) = precompile.load_configs(str(path))
    assert (config["head_dim"], config["head_dim_v"], config["dtype"]) == (64, 64, "bf16")
    path.write_text('[{"headdim": 64}]')
    with pytest.raises(ValueError, match="headdim"):
        precompile.load_configs(str(path))


def _precompile_script():
    path = Path(__file__).parents[2] / "scripts" / "precompile.py"
    spec = importlib.util.spec_from_file_location("precompile", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _child(directory, barrier="", **environment):
    """Start this file as a process that gets KEY from ``directory``, once ``barrier`` exists if one is given."""
    return subprocess.Popen(
        [sys.executable, __file__, str(directory), str(barrier)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def _child_main(directory, barrier):
    logging.basicConfig(level=logging.DEBUG, format="%(name)s %(message)s")
    if barrier:
        Path(f"{barrier}.{os.getpid()}").touch()
        while not Path(barrier).exists():
            time.sleep(0.001)
    _check_axpy(CompileCache(directory).get(KEY, _build_host))


if __name__ == "__main__":
    _child_main(*sys.argv[1:])
