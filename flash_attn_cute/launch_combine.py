"""`flash_attn_combine`: validation, the choice of a backend, compilation and launch of the combine kernel."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from flash_attn_cute.compile_cache import cache
from flash_attn_cute.plan import MAX_SPLITS
from flash_attn_cute.tuning import merge_blocks

if TYPE_CHECKING:
    from flash_attn_cute.scheduler_metadata import BatchShape, SchedulerMetadata

MAX_ROWS = 2**31 - 2**16  # rows are numbered in int32, and the last step of a grid goes past them
# Above this many splits a row is shared by a whole CTA: a warp alone would take too many memory latencies in a row.
SPLITS_FOR_ONE_WARP = 16
CTAS_PER_SM = 16  # of 128 threads: 2048 threads are resident
# Most plans split little or nothing, and then CTAs only come and go.
PLANNED_CTAS_PER_SM = 4
BACKENDS = ("auto", "cute", "emulator", "reference")

_OUT_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cu_seqlens: Tensor | None = None,
    seqused: Tensor | None = None,
    *,
    learnable_sink: Tensor | None = None,
    return_lse: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Merges attention results over disjoint sets of keys into the result over all of them.

    out_partial: (num_splits, total_q, H, Dv) or (num_splits, B, Sq, H, Dv) float32, each split normalised by itself.
        Dv is a multiple of 8 up to 256, num_splits at most 256.
    lse_partial: (num_splits, total_q, H) or (num_splits, B, Sq, H) float32, natural logarithm.
    out: where to write, (total_q, H, Dv) or (B, Sq, H, Dv).
    out_dtype: torch.bfloat16, torch.float16 or torch.float32; that of `out`, or float32 where neither is given.
    cu_seqlens: (B + 1,) int32, for the packed layout: rows outside every sequence are padding.
    seqused: (B,) int32: rows past it are padding. In the packed layout it needs cu_seqlens.
    learnable_sink: (H,) logits that join the softmax and have no value. The partial results must not contain them: a
        sink counts once, whatever the number of splits.

    A split with lse = -inf contributes nothing, whatever its out_partial holds. Where all are -inf, out is 0 and lse
    -inf (or the sink). Padding rows get 0 and -inf. Returns (out, lse); lse is (H, total_q) or (B, H, Sq) float32, the
    layout of the attention functions, or None.

    A row's bits depend on its own splits alone. Raises ValueError or TypeError for wrong arguments, each naming the
    argument; NotImplementedError where the backend does not take them, or gradients are asked of a kernel.
    """
    call = CombineCall(out_partial, lse_partial, out, cu_seqlens, seqused, learnable_sink)
    dtype = _check(call, out_dtype)
    if torch.compiler.is_compiling():
        from flash_attn_cute import combine_op

        return combine_op.call(call, dtype, return_lse, backend)
    chosen = _backend(call, backend)
    if chosen == "reference":
        from flash_attn_cute.reference import combine_reference

        result, lse = combine_reference(out_partial, lse_partial, cu_seqlens, seqused, learnable_sink)
        result = result.to(dtype) if out is None else out.copy_(result)
        return result, lse.to(torch.float32) if return_lse else None
    if chosen == "emulator":
        return _run_emulated(call, dtype, return_lse)
    return run(call, dtype, return_lse)


class CombineCall(NamedTuple):
    """The tensors of one call, as given."""

    out_partial: Tensor
    lse_partial: Tensor
    out: Tensor | None
    cu_seqlens: Tensor | None
    seqused: Tensor | None
    learnable_sink: Tensor | None

    @property
    def is_packed(self) -> bool:
        return self.out_partial.dim() == 4

    @property
    def out_shape(self) -> tuple[int, ...]:
        return tuple(self.out_partial.shape[1:])

    @property
    def lse_shape(self) -> tuple[int, ...]:
        *lead, rows, heads, _ = self.out_shape
        return (*lead, heads, rows)


def _fail(name: str, got: Any, takes: str, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"{name}: got {got}; takes {takes}")


def _check(call: CombineCall, out_dtype: torch.dtype | None) -> torch.dtype:
    """Checks every argument and returns the dtype of the output."""
    for name, tensor in zip(call._fields, call, strict=True):
        if not isinstance(tensor, Tensor) and (tensor is not None or name in ("out_partial", "lse_partial")):
            _fail(name, type(tensor).__name__, "a torch.Tensor", TypeError)
    partial, lse = call.out_partial, call.lse_partial
    if partial.dtype != torch.float32 or lse.dtype != torch.float32:
        name = "out_partial" if partial.dtype != torch.float32 else "lse_partial"
        _fail(name, f"dtype {getattr(call, name).dtype}", "torch.float32")
    if partial.dim() not in (4, 5):
        _fail("out_partial", f"shape {tuple(partial.shape)}", "(splits, total_q, H, Dv) or (splits, B, Sq, H, Dv)")
    if not 1 <= partial.shape[0] <= MAX_SPLITS:
        _fail("out_partial", f"{partial.shape[0]} splits", f"from 1 to {MAX_SPLITS}")
    if partial.shape[-1] % 8 or not 8 <= partial.shape[-1] <= 256:
        _fail("out_partial", f"head dimension {partial.shape[-1]}", "a multiple of 8 from 8 to 256")
    if partial[0, ..., 0].numel() > MAX_ROWS:
        _fail("out_partial", f"{partial[0, ..., 0].numel()} rows x heads", f"at most {MAX_ROWS}")
    if partial.stride(-1) != 1:
        _fail("out_partial", f"strides {partial.stride()}", "a contiguous last dimension (stride 1)")
    if lse.shape != partial.shape[:-1]:
        _fail(
            "lse_partial", f"shape {tuple(lse.shape)}", f"that of out_partial but for Dv, {tuple(partial.shape[:-1])}"
        )
    for name, tensor in zip(call._fields[1:], call[1:], strict=True):
        if tensor is not None and tensor.device != partial.device:
            _fail(name, f"device {tensor.device}", f"that of out_partial, {partial.device}")
    _check_lengths(call)
    sink = call.learnable_sink
    if sink is not None and (sink.shape != (partial.shape[-2],) or sink.dtype not in _OUT_DTYPES):
        _fail("learnable_sink", f"{sink.dtype} of shape {tuple(sink.shape)}", f"floats ({partial.shape[-2]},)")
    return _check_out(call, out_dtype)


def _check_lengths(call: CombineCall) -> None:
    for name, tensor in (("cu_seqlens", call.cu_seqlens), ("seqused", call.seqused)):
        if tensor is not None and (tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous()):
            _fail(name, f"{tensor.dtype} of shape {tuple(tensor.shape)}", "a contiguous int32 vector")
    if not call.is_packed:
        if call.cu_seqlens is not None:
            _fail("cu_seqlens", "a tensor with batched partials", "None: it belongs to (splits, total_q, H, Dv)")
        batch = call.out_partial.shape[1]
    elif call.cu_seqlens is None:
        if call.seqused is not None:
            _fail("seqused", "a tensor without cu_seqlens", "cu_seqlens beside it in the packed layout")
        return
    else:
        batch = call.cu_seqlens.shape[0] - 1
        if batch < 0:
            _fail("cu_seqlens", "0 entries", "batch size + 1 entries, at least 1")
    if call.seqused is not None and call.seqused.shape[0] != batch:
        _fail("seqused", f"batch size {call.seqused.shape[0]}", f"{batch}")


def _check_out(call: CombineCall, dtype: torch.dtype | None) -> torch.dtype:
    out = call.out
    if dtype is None:
        dtype = torch.float32 if out is None else out.dtype
    if dtype not in _OUT_DTYPES:
        _fail("out_dtype", dtype, f"one of {', '.join(map(str, _OUT_DTYPES))}")
    if out is not None:
        if out.dtype != dtype:
            _fail("out", f"dtype {out.dtype}", f"out_dtype, {dtype}")
        if tuple(out.shape) != call.out_shape:
            _fail("out", f"shape {tuple(out.shape)}", f"{call.out_shape}")
        if out.stride(-1) != 1:
            _fail("out", f"strides {out.stride()}", "a contiguous last dimension (stride 1)")
        if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
            _fail("out", f"strides {out.stride()}", "a tensor whose elements do not share memory")
    return dtype


def _backend(call: CombineCall, backend: str) -> str:
    if backend not in BACKENDS:
        _fail("backend", repr(backend), f"one of {', '.join(BACKENDS)}")
    device = call.out_partial.device
    if backend == "reference" or (backend == "auto" and device.type == "cpu"):
        return "reference"
    wants_gradients = any(t is not None and t.requires_grad for t in call)
    if wants_gradients and torch.is_grad_enabled():
        raise NotImplementedError("the combine kernel has no backward: use torch.no_grad() or backend='reference'")
    if backend == "emulator":
        if device.type != "cpu":
            raise NotImplementedError("backend='emulator' takes CPU tensors")
        return "emulator"
    if device.type != "cuda":
        raise NotImplementedError(f"backend={backend!r} on device type {device.type}: the kernel needs a CUDA device")
    architecture_of(device)
    return "cute"


# Compute capability -> what kernels are compiled for.
ARCHITECTURES = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_103a"}


@functools.cache
def _architecture(index: int) -> str | None:
    return ARCHITECTURES.get(torch.cuda.get_device_capability(index))


def architecture_of(device: torch.device) -> str:
    """What kernels are compiled for on a CUDA device. Raises NotImplementedError where there are none."""
    architecture = _architecture(device.index)
    if architecture is None:
        raise NotImplementedError(f"{torch.cuda.get_device_capability(device)}: there are kernels for SM90 and SM100")
    return architecture


@functools.cache
def _num_sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


class CombineKey(NamedTuple):
    """Everything that changes the generated code."""

    architecture: str
    kernel: str
    out_dtype: str
    head_dim_v: int
    packed: bool
    cu_seqlens: bool
    seqused: bool
    sink: str | None
    lse: bool
    warps_per_row: int


def fake_tensor(element: Any, *shape: int | None, vectors: bool = False) -> Any:
    """A tensor at compile time, of any extent where a shape holds None, contiguous in the last dimension alone.

    vectors: its rows start at multiples of four elements, and are moved four at a time.
    """
    import cutlass.cute as cute

    divisibility = 4 if vectors else 1
    strides = [cute.sym_int64(divisibility=divisibility) for _ in shape[:-1]] + [1]
    shape = tuple(cute.sym_int() if extent is None else extent for extent in shape)
    alignment = element.width // 8 * divisibility
    return cute.runtime.make_fake_tensor(element, shape, stride=tuple(strides), assumed_align=alignment)


def compile_kernel(key: CombineKey) -> Any:
    """Compiles one kernel for tensors of any size, for the architecture of the key. Needs no GPU."""
    import cutlass
    import cutlass.cute as cute
    from cutlass import Float32, Int32

    from flash_attn_cute.combine import Combine, CombineSpec, CombineTensors

    types = {"bf16": cutlass.BFloat16, "fp16": cutlass.Float16, "fp32": Float32}

    rows = (None,) * (1 if key.packed else 2)
    splits_rows_heads = (None, *rows, None)
    lse_partial = cute.runtime.make_fake_tensor(
        Float32,
        tuple(cute.sym_int() for _ in splits_rows_heads),
        stride=tuple(cute.sym_int64() for _ in splits_rows_heads),
        assumed_align=4,
    )
    tensors = CombineTensors(
        partial=fake_tensor(Float32, None, *rows, None, key.head_dim_v, vectors=True),
        lse_partial=lse_partial,
        out=fake_tensor(types[key.out_dtype], *rows, None, key.head_dim_v, vectors=True),
        lse=fake_tensor(Float32, *rows, None) if key.lse else None,
        cu_seqlens=fake_tensor(Int32, None) if key.cu_seqlens else None,
        seqused=fake_tensor(Int32, None) if key.seqused else None,
        sink=fake_tensor(types[key.sink], None) if key.sink else None,
    )
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(
        Combine(CombineSpec(key.head_dim_v, key.warps_per_row)),
        tensors,
        Int32(1),
        stream,
        options=f"--enable-tvm-ffi --gpu-arch {key.architecture}",
    )


def _ctas(rows: int, head_dim_v: int, warps_per_row: int) -> int:
    """CTAs that merge so many rows at once."""
    return -(-rows * merge_blocks(head_dim_v, warps_per_row) * warps_per_row // 4)


def _moves_in_vectors(x: Tensor) -> bool:
    """Whether every row starts at a multiple of four elements, so that it can be moved four elements at a time."""
    return x.data_ptr() % (4 * x.element_size()) == 0 and not any(stride % 4 for stride in x.stride()[:-1])


def _compact(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def run(call: CombineCall, dtype: torch.dtype, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Launches on the current stream; the arguments have been checked."""
    device = call.out_partial.device
    out = torch.empty(call.out_shape, dtype=dtype, device=device) if call.out is None else call.out
    lse = torch.empty(call.lse_shape, dtype=torch.float32, device=device) if return_lse else None
    if out.numel() == 0:
        return out, lse
    sink = None if call.learnable_sink is None else call.learnable_sink.contiguous()
    splits = call.out_partial.shape[0]
    key = CombineKey(
        architecture_of(device),
        "combine",
        _OUT_DTYPES[dtype],
        call.out_partial.shape[-1],
        call.is_packed,
        call.cu_seqlens is not None,
        call.seqused is not None,
        None if sink is None else _OUT_DTYPES[sink.dtype],
        return_lse,
        1 if splits <= SPLITS_FOR_ONE_WARP else 4,
    )
    function = cache.get(key, functools.partial(compile_kernel, key))
    partial = call.out_partial if _moves_in_vectors(call.out_partial) else _compact(call.out_partial)
    target = out if _moves_in_vectors(out) else _compact(out)
    rows = out.numel() // out.shape[-1]
    grid = min(_ctas(rows, key.head_dim_v, key.warps_per_row), CTAS_PER_SM * _num_sms(device.index))
    function((partial, call.lse_partial, target, lse, call.cu_seqlens, call.seqused, sink), grid)
    if target is not out:
        out.copy_(target)
    return out, lse


class Workspace(NamedTuple):
    """Where the work tiles of split sequences leave their partial results, by slot (plan.PlannedTile.slot)."""

    out: Tensor  # (slots, rows of a work tile, Dv) float32
    lse: Tensor  # (slots, rows of a work tile) float32, natural logarithm, -inf where a row saw no key

    @classmethod
    def allocate(cls, slots: int, tile_rows: int, head_dim_v: int, device: torch.device) -> Workspace:
        out = torch.empty(slots, tile_rows, head_dim_v, dtype=torch.float32, device=device)
        return cls(out, torch.empty(slots, tile_rows, dtype=torch.float32, device=device))


class SplitSizes(NamedTuple):
    """What plans of one shape may split: the sizes of the workspace, and of the launch that merges its parts."""

    slots: int
    tile_rows: int
    head_dim_v: int
    warps_per_row: int
    grid: tuple[int, int]

    @classmethod
    def of(
        cls, shape: BatchShape, tile_rows: int, head_dim_v: int, device: torch.device, rows_in_use: int | None = None
    ) -> SplitSizes:
        """rows_in_use: of a work tile, the most that are queries, as far as the host knows; all without it."""
        p, slots = shape.parameters, shape.slots_bound
        # A head of the plan is split over its slots alone, so this many splits are the most that a row can have.
        most_splits = min(p.max_splits, slots // p.heads)
        warps_per_row = 1 if most_splits <= SPLITS_FOR_ONE_WARP else 4
        # A split query tile has two slots at least.
        num_sms = _num_sms(device.index)
        tiles = max(min(slots // 2, shape.tiles_bound, num_sms), 1)
        # Of few tiles, the rows go to as many CTAs as there is room for; one without a row would only come and go.
        groups = _ctas(tile_rows if rows_in_use is None else rows_in_use, head_dim_v, warps_per_row)
        groups = max(min(groups, PLANNED_CTAS_PER_SM * num_sms // tiles), 1)
        return cls(slots, tile_rows, head_dim_v, warps_per_row, (groups, tiles))

    def workspace(self, metadata: SchedulerMetadata) -> Workspace:
        """As large as any plan of the shape can ask for: that of the plan, or a new one."""
        given = metadata.workspace
        if given is not None and given.out.shape == (self.slots, self.tile_rows, self.head_dim_v):
            return given
        return Workspace.allocate(self.slots, self.tile_rows, self.head_dim_v, metadata.device)


def _run_emulated(call: CombineCall, dtype: torch.dtype, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """`run` for CPU tensors, by the kernel of the emulated GPU."""
    from flash_attn_cute.emulator.backend import architecture
    from flash_attn_cute.emulator.session import current_session, emulate

    with contextlib.nullcontext() if current_session() is not None else emulate(architecture()):
        out, lse = run(CombineCall(*(None if tensor is None else tensor.cuda() for tensor in call)), dtype, return_lse)
    out = out.cpu() if call.out is None else call.out.copy_(out.cpu())
    return out, None if lse is None else lse.cpu()
