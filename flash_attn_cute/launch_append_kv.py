"""Compilation and launch of the kernels that write a key-value cache: `append_kv` and `store_kv`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn_cute.compile_cache import cache
from flash_attn_cute.kv_cache_arguments import KvCacheTensors, Rotary
from flash_attn_cute.launch import ARCHITECTURES

VECTOR_BYTES = 16
# Enough for the kernels that only copy, of which so many are resident; of one that rotates it is 6, and others wait.
CTAS_PER_SM = 16
SEQUENCES_A_CTA = 128  # whose lengths one CTA writes

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class AppendKey(NamedTuple):
    """Everything that changes the generated code."""

    architecture: str
    kernel: str
    dtype: str
    head_dim: int
    head_dim_v: int
    packed_k: bool
    paged: bool
    cache_batch_idx: bool
    packed_q: bool
    rotary: str | None  # how it pairs elements; None: nothing is rotated
    rotary_dim: int
    rotary_dtype: str | None
    rotary_seqlens: bool
    queries_advance: bool
    aligned: bool  # every vector lies at a multiple of 16 bytes


class StoreKey(NamedTuple):
    """Everything that changes the generated code."""

    architecture: str
    kernel: str
    dtype: str
    head_dim: int
    head_dim_v: int
    slot_bits: int
    aligned: bool


@functools.cache
def _device(index: int) -> tuple[str, int]:
    """(what kernels are compiled for, SMs)."""
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    if capability not in ARCHITECTURES:
        built = ", ".join(f"{major}.{minor}" for major, minor in ARCHITECTURES)
        raise NotImplementedError(f"compute capability {capability[0]}.{capability[1]}: there are kernels for {built}")
    return ARCHITECTURES[capability], properties.multi_processor_count


class PreparedAppend(NamedTuple):
    """An append that has been checked: what is left is to allocate and to launch."""

    key: AppendKey
    functions: dict[bool, Any]  # by whether every vector is aligned
    grid: int
    rotates: bool

    @classmethod
    def of(cls, t: KvCacheTensors, rotary: Rotary | None, batch_size: int) -> PreparedAppend:
        """The arguments have been checked. Compiles the kernel if that has not been done."""
        architecture, num_sms = _device(t.q.device.index)
        key = AppendKey(
            architecture,
            "append_kv",
            _DTYPE_NAMES[t.q.dtype],
            t.k.shape[-1],
            t.v.shape[-1],
            t.cu_seqlens_k_new is not None,
            t.page_table is not None,
            t.cache_batch_idx is not None,
            rotary is not None and t.cu_seqlens_q is not None,
            rotary and ("interleaved" if rotary.interleaved else "halves"),
            rotary.dim if rotary else 0,
            _DTYPE_NAMES[t.rotary_cos.dtype] if rotary else None,
            t.rotary_seqlens is not None,
            rotary is not None and rotary.queries_advance,
            _strides_suit(t.k, t.v, t.k_cache, t.v_cache, *((t.q, t.rotary_cos, t.rotary_sin) if rotary else ())),
        )
        tokens = 2 * t.k.shape[:-2].numel() + (t.q.shape[:-2].numel() if rotary else 0)
        grid = min(tokens - -batch_size // SEQUENCES_A_CTA, CTAS_PER_SM * num_sms)
        prepared = cls(key, {}, grid, rotary is not None)
        if grid > 0:
            prepared._function(key.aligned)
        return prepared

    def run(self, t: KvCacheTensors) -> tuple[Tensor, Tensor]:
        """Launches on the current stream; returns q, rotated where that is asked for, and the lengths afterwards."""
        seqused = torch.empty_like(t.cache_seqlens)  # half the host time of torch.empty
        if self.grid == 0:
            return t.q, seqused
        addresses = t.k.data_ptr() | t.v.data_ptr() | t.k_cache.data_ptr() | t.v_cache.data_ptr()
        q = q_rotated = None
        if self.rotates:
            q, q_rotated = t.q, torch.empty_like(t.q)
            addresses |= q.data_ptr() | t.rotary_cos.data_ptr() | t.rotary_sin.data_ptr()
        function = self._function(self.key.aligned and addresses % VECTOR_BYTES == 0)
        function(
            (
                t.k,
                t.v,
                t.k_cache,
                t.v_cache,
                t.cache_seqlens,
                seqused,
                t.page_table,
                t.cache_batch_idx,
                t.cu_seqlens_k_new,
                q,
                q_rotated,
                t.cu_seqlens_q if self.rotates else None,
                t.rotary_cos,
                t.rotary_sin,
                t.rotary_seqlens,
            ),
            self.grid,
        )
        return (q_rotated if self.rotates else t.q), seqused

    def _function(self, aligned: bool) -> Any:
        function = self.functions.get(aligned)
        if function is None:
            key = self.key._replace(aligned=aligned)
            function = self.functions[aligned] = cache.get(key, functools.partial(compile_append, key))
        return function


def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Launches `store_kv` on the current stream; the arguments have been checked."""
    if k.dtype not in (torch.bfloat16, torch.float16):
        raise NotImplementedError(f"store_kv_cache: the kernel takes torch.bfloat16 and torch.float16, not {k.dtype}")
    architecture, num_sms = _device(k.device.index)
    if slot_mapping.numel() == 0:
        return
    addresses = k.data_ptr() | v.data_ptr() | k_cache.data_ptr() | v_cache.data_ptr()
    key = StoreKey(
        architecture,
        "store_kv",
        _DTYPE_NAMES[k.dtype],
        k.shape[-1],
        v.shape[-1],
        8 * slot_mapping.element_size(),
        addresses % VECTOR_BYTES == 0 and _strides_suit(k, v, k_cache, v_cache),
    )
    function = cache.get(key, functools.partial(compile_store, key))
    function((k, v, k_cache, v_cache, slot_mapping), min(2 * slot_mapping.numel(), CTAS_PER_SM * num_sms))


def _strides_suit(*tensors: Tensor) -> bool:
    """Whether all rows of all tensors begin at multiples of 16 bytes, if the tensors do."""
    return not any(stride * x.element_size() % VECTOR_BYTES for x in tensors for stride in x.stride()[:-1])


def _token_tensor(element: Any, *shape: int | None, aligned: bool) -> Any:
    """A tensor at compile time, of any extent where a shape holds None, contiguous in the last dimension alone.

    Strides have 64 bits, and so have offsets.
    """
    import cutlass.cute as cute

    alignment = VECTOR_BYTES if aligned else element.width // 8
    strides = [cute.sym_int64(divisibility=alignment * 8 // element.width) for _ in shape[:-1]] + [1]
    shape = tuple(cute.sym_int() if extent is None else extent for extent in shape)
    return cute.runtime.make_fake_tensor(element, shape, stride=tuple(strides), assumed_align=alignment)


def _vector(element: Any) -> Any:
    import cutlass.cute as cute

    return cute.runtime.make_fake_tensor(element, (cute.sym_int(),), stride=(1,), assumed_align=element.width // 8)


def compile_append(key: AppendKey) -> Any:
    """Compiles one kernel for tensors of any size, for the architecture of the key. Needs no GPU."""
    import cutlass
    import cutlass.cute as cute
    from cutlass import Int32

    from flash_attn_cute.append_kv import AppendKv, AppendSpec, AppendTensors

    types = {"bf16": cutlass.BFloat16, "fp16": cutlass.Float16, "fp32": cutlass.Float32}
    dtype, rotates = types[key.dtype], key.rotary is not None

    def tokens(packed, dim, present=True):
        rows = (None,) if packed else (None, None)
        return _token_tensor(dtype, *rows, None, dim, aligned=key.aligned) if present else None

    def table():
        if not rotates:
            return None
        return _token_tensor(types[key.rotary_dtype], None, key.rotary_dim // 2, aligned=key.aligned)

    def integers(present=True):
        return _vector(Int32) if present else None

    tensors = AppendTensors(
        k=tokens(key.packed_k, key.head_dim),
        v=tokens(key.packed_k, key.head_dim_v),
        k_cache=tokens(False, key.head_dim),
        v_cache=tokens(False, key.head_dim_v),
        cache_seqlens=integers(),
        seqused=integers(),
        page_table=_token_tensor(Int32, None, None, aligned=False) if key.paged else None,
        cache_batch_idx=integers(key.cache_batch_idx),
        cu_seqlens_k=integers(key.packed_k),
        q=tokens(key.packed_q, key.head_dim, rotates),
        q_rotated=tokens(key.packed_q, key.head_dim, rotates),
        cu_seqlens_q=integers(key.packed_q),
        cos=table(),
        sin=table(),
        rotary_seqlens=integers(key.rotary_seqlens),
    )
    spec = AppendSpec(key.rotary_dim, key.rotary == "interleaved", key.queries_advance)
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    options = f"--enable-tvm-ffi --gpu-arch {key.architecture}"
    return cute.compile(AppendKv(spec), tensors, Int32(1), stream, options=options)


def compile_store(key: StoreKey) -> Any:
    """Compiles one kernel for tensors of any size, for the architecture of the key. Needs no GPU."""
    import cutlass
    import cutlass.cute as cute
    from cutlass import Int32

    from flash_attn_cute.store_kv import StoreTensors, store_kv

    dtype = {"bf16": cutlass.BFloat16, "fp16": cutlass.Float16}[key.dtype]

    def tokens(rows, dim):
        return _token_tensor(dtype, *(None,) * rows, None, dim, aligned=key.aligned)

    tensors = StoreTensors(
        k=tokens(1, key.head_dim),
        v=tokens(1, key.head_dim_v),
        k_cache=tokens(2, key.head_dim),
        v_cache=tokens(2, key.head_dim_v),
        slot_mapping=_vector(cutlass.Int64 if key.slot_bits == 64 else Int32),
    )
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    options = f"--enable-tvm-ffi --gpu-arch {key.architecture}"
    return cute.compile(store_kv, tensors, Int32(1), stream, options=options)
