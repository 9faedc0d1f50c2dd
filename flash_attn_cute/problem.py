"""What an attention call asks for: validation of its arguments, and one frozen value that says the result.

`Problem.from_arguments` is the only place where user input is checked. It runs on every eager call, so checks read each
tensor attribute once and messages are built only on failure. Nothing here reads the contents of a tensor.

Every message has the form ``name: got ...; takes ...``.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from flash_attn_cute.plan import MAX_SPLITS

INT32_MAX = 2**31 - 1
MAX_HEAD_DIM = 256
SCHEDULERS = ("auto", "single_tile", "static", "dynamic", "clc")

_DEVICE_DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32))
_CPU_DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64))
_ADDEND_DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32))


class AttentionTensors(NamedTuple):
    """The tensors of one call. Shapes are those of the public function; what is not given is None.

    q is (total_q, H, D) or (B, Sq, H, D). k and v are (total_k, Hk, D or Dv), (B, Sk, Hk, D or Dv), or, with a page
    table, (pages, page_size, Hk, D or Dv). key_mask and key_bias are laid out as k is, with (.., H*) in place of
    (.., Hk, D).

    leftpad_k and cache_batch_idx belong to a key cache and are no arguments of `flash_attn_varlen_func`. leftpad_k,
    (B,) int32, with batched or paged keys: those of sequence b are positions [leftpad_k[b], seqused_k[b]) of its cache,
    so that it has seqused_k[b] - leftpad_k[b] of them, and masks and tiles count from the first. cache_batch_idx, (B,)
    int32, with batched keys (B_cache, Sk, Hk, D or Dv): sequence b reads row cache_batch_idx[b].

    query_mask and query_bias, (total_q, H*, max_seqlen_k) with packed queries: a mask and a bias of each query, column
    j for the j-th key of its sequence. `flash_attn_varlen_func` takes them as attn_mask and attn_bias.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    page_table: Tensor | None = None
    learnable_sink: Tensor | None = None
    key_mask: Tensor | None = None
    key_bias: Tensor | None = None
    out: Tensor | None = None
    leftpad_k: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    query_mask: Tensor | None = None
    query_bias: Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """What is asked of the kernels, without tensors: hashable, comparable, valid by construction.

    Build it with `from_arguments`; the plain constructor and `dataclasses.replace` check nothing.

    Each side (q, k) is packed (cu_seqlens given) or batched; the key side may instead be paged. Windows are normalised:
    None is unbounded, and `causal` is True exactly when `window_right` is 0, so `causal=True` and
    `window_size=(None, 0)` are one problem.
    """

    dtype: torch.dtype
    device_type: str
    num_heads: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    batch_size: int
    q_packed: bool
    k_packed: bool
    total_q: int  # rows of q: packed rows, or B * Sq
    total_k: int  # rows of k: packed rows, B * Sk (B_cache * Sk), or pages * page_size
    seqlen_q: int | None  # batched: Sq; packed: max_seqlen_q
    seqlen_k: int | None  # batched: Sk; paged: max_pages * page_size; packed: max_seqlen_k
    max_seqlen_q: int | None  # as given
    max_seqlen_k: int | None  # as given
    has_seqused_q: bool
    has_seqused_k: bool
    has_leftpad_k: bool
    has_cache_batch_idx: bool
    page_size: int | None
    max_pages: int | None  # columns of the page table
    softmax_scale: float
    causal: bool
    window_left: int | None
    window_right: int | None
    softcap: float  # 0.0 is off
    sink_dtype: torch.dtype | None
    key_mask_heads: int | None
    key_bias_heads: int | None
    key_bias_dtype: torch.dtype | None
    query_mask_heads: int | None
    query_bias_heads: int | None
    query_bias_dtype: torch.dtype | None
    num_splits: int
    seqlen_k_per_split: int | None
    pack_gqa: bool | None
    deterministic: bool
    scheduler: str
    return_lse: bool

    @classmethod
    def from_arguments(
        cls,
        tensors: AttentionTensors,
        *,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
        softcap: float = 0.0,
        num_splits: int = 1,
        seqlen_k_per_split: int | None = None,
        pack_gqa: bool | None = None,
        deterministic: bool = False,
        scheduler: str = "auto",
        return_lse: bool = False,
    ) -> Problem:
        """Check every argument and say what is asked.

        Raises TypeError for a value of the wrong type and ValueError for anything else that is wrong.
        """
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table, *others = tensors
        sink, key_mask, key_bias, out, leftpad_k, cache_batch_idx, query_mask, query_bias = others
        _check_are_tensors(tensors)
        dtype, device = q.dtype, q.device
        on_cpu = device.type == "cpu"
        _check_inputs(q, k, v, dtype, device, on_cpu)

        q_packed, k_packed = cu_seqlens_q is not None, cu_seqlens_k is not None
        q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
        _check_ranks(q_shape, k_shape, v_shape, q_packed, k_packed, page_table)
        num_heads, head_dim = q_shape[-2], q_shape[-1]
        num_heads_kv, head_dim_v = _check_heads(num_heads, head_dim, k_shape, v_shape)

        batch_size, total_q, seqlen_q = _query_extent(q_shape, cu_seqlens_q, seqused_q, device)
        total_k, seqlen_k, page_size, max_pages = _key_extent(
            k_shape, cu_seqlens_k, seqused_k, page_table, batch_size, cache_batch_idx is not None, device
        )
        if leftpad_k is not None:
            if k_packed:
                _fail("leftpad_k", "a tensor together with cu_seqlens_k", "batched or paged keys")
            _check_index_tensor("leftpad_k", leftpad_k, 1, device)
            _check_batch("leftpad_k", leftpad_k.shape[0], batch_size)
        if cache_batch_idx is not None:
            if k_packed or page_table is not None:
                beside = "cu_seqlens_k" if k_packed else "page_table"
                _fail("cache_batch_idx", f"a tensor together with {beside}", "batched keys, (B_cache, Sk, Hk, D)")
            _check_index_tensor("cache_batch_idx", cache_batch_idx, 1, device)
            _check_batch("cache_batch_idx", cache_batch_idx.shape[0], batch_size)
        if total_q * num_heads > INT32_MAX:  # (row, head) indexes the LSE as int32
            _fail("q", f"{total_q} rows x {num_heads} heads = {total_q * num_heads}", f"at most {INT32_MAX}")

        if max_seqlen_q is not None:
            max_seqlen_q = _check_max_seqlen("max_seqlen_q", max_seqlen_q, seqlen_q, q_packed or seqused_q is not None)
        if max_seqlen_k is not None:
            max_seqlen_k = _check_max_seqlen("max_seqlen_k", max_seqlen_k, seqlen_k, k_packed or seqused_k is not None)

        addend_dtypes = _CPU_DTYPES if on_cpu else _ADDEND_DTYPES
        sink_dtype = key_mask_heads = key_bias_heads = key_bias_dtype = None
        query_mask_heads = query_bias_heads = query_bias_dtype = None
        if sink is not None:
            sink_dtype = _check_sink(sink, num_heads, addend_dtypes, device)
        if key_mask is not None:
            _check_dtype("key_mask", key_mask, (torch.bool,))
            key_mask_heads = _check_key_side("key_mask", key_mask, k_shape, page_size, num_heads, device)
        if key_bias is not None:
            key_bias_dtype = _check_dtype("key_bias", key_bias, addend_dtypes)
            key_bias_heads = _check_key_side("key_bias", key_bias, k_shape, page_size, num_heads, device)
        if query_mask is not None or query_bias is not None:
            # In messages they have the names under which the public function takes them.
            shape = _query_side_shape(q_packed, total_q, max_seqlen_k)
            head_counts = (1, num_heads_kv, num_heads)
            if query_mask is not None:
                _check_dtype("attn_mask", query_mask, (torch.bool,))
                query_mask_heads = _check_query_side("attn_mask", query_mask, shape, head_counts, device)
            if query_bias is not None:
                query_bias_dtype = _check_dtype("attn_bias", query_bias, addend_dtypes)
                query_bias_heads = _check_query_side("attn_bias", query_bias, shape, head_counts, device)
        if out is not None:
            _check_out(out, (*q_shape[:-1], head_dim_v), dtype, device)

        # The common values skip a call each.
        if softmax_scale is None:
            softmax_scale = head_dim**-0.5
        else:
            softmax_scale = _check_finite("softmax_scale", softmax_scale)
        if type(softcap) is not float or softcap != 0.0:
            softcap = _check_softcap(softcap)
        if type(num_splits) is not int or not 0 <= num_splits <= MAX_SPLITS:
            num_splits = _check_int("num_splits", num_splits, 0, MAX_SPLITS)
        if seqlen_k_per_split is not None:
            seqlen_k_per_split = _check_int("seqlen_k_per_split", seqlen_k_per_split, 1)
            if num_splits > 1:
                _fail("num_splits", f"{num_splits} with seqlen_k_per_split", "0 or 1: boundaries are absolute")
        if pack_gqa is not None:
            _check_bool("pack_gqa", pack_gqa, "True, False or None")
        _check_bool("causal", causal)
        _check_bool("deterministic", deterministic)
        _check_bool("return_lse", return_lse)
        if scheduler not in SCHEDULERS:
            _fail("scheduler", repr(scheduler), f"one of {', '.join(SCHEDULERS)}")
        window_left, window_right = _normalise_window(window_size, causal)

        # A frozen dataclass sets its fields one by one through object.__setattr__, a third of the time of this whole
        # function; filling the instance's dictionary says the same.
        problem = object.__new__(cls)
        problem.__dict__.update(
            dtype=dtype,
            device_type=device.type,
            num_heads=num_heads,
            num_heads_kv=num_heads_kv,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            batch_size=batch_size,
            q_packed=q_packed,
            k_packed=k_packed,
            total_q=total_q,
            total_k=total_k,
            seqlen_q=max_seqlen_q if q_packed else seqlen_q,
            seqlen_k=max_seqlen_k if k_packed else seqlen_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            has_seqused_q=seqused_q is not None,
            has_seqused_k=seqused_k is not None,
            has_leftpad_k=leftpad_k is not None,
            has_cache_batch_idx=cache_batch_idx is not None,
            page_size=page_size,
            max_pages=max_pages,
            softmax_scale=softmax_scale,
            causal=window_right == 0,
            window_left=window_left,
            window_right=window_right,
            softcap=softcap,
            sink_dtype=sink_dtype,
            key_mask_heads=key_mask_heads,
            key_bias_heads=key_bias_heads,
            key_bias_dtype=key_bias_dtype,
            query_mask_heads=query_mask_heads,
            query_bias_heads=query_bias_heads,
            query_bias_dtype=query_bias_dtype,
            num_splits=num_splits,
            seqlen_k_per_split=seqlen_k_per_split,
            pack_gqa=pack_gqa,
            deterministic=deterministic,
            scheduler=scheduler,
            return_lse=return_lse,
        )
        return problem

    @property
    def qheads_per_kvhead(self) -> int:
        return self.num_heads // self.num_heads_kv

    @property
    def out_shape(self) -> tuple[int, ...]:
        """(total_q, H, Dv) packed, (B, Sq, H, Dv) batched."""
        if self.q_packed:
            return (self.total_q, self.num_heads, self.head_dim_v)
        return (self.batch_size, self.seqlen_q, self.num_heads, self.head_dim_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """(H, total_q) packed, (B, H, Sq) batched."""
        if self.q_packed:
            return (self.num_heads, self.total_q)
        return (self.batch_size, self.num_heads, self.seqlen_q)

    @property
    def is_local(self) -> bool:
        """Whether a window beyond plain causal is asked for."""
        return self.window_left is not None or (self.window_right is not None and not self.causal)

    @property
    def is_paged(self) -> bool:
        return self.page_size is not None

    @property
    def seqlen_q_bound(self) -> int:
        """The least bound on the query length of any sequence that is known without reading device memory."""
        bound = self.total_q if self.q_packed else self.seqlen_q
        return bound if self.max_seqlen_q is None else min(bound, self.max_seqlen_q)

    @property
    def seqlen_k_bound(self) -> int:
        """The least bound on the key length of any sequence that is known without reading device memory."""
        bound = self.total_k if self.k_packed else self.seqlen_k
        return bound if self.max_seqlen_k is None else min(bound, self.max_seqlen_k)


def _fail(name: str, got: str, takes: str, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"{name}: got {got}; takes {takes}")


def _check_are_tensors(tensors: AttentionTensors) -> None:
    for index, tensor in enumerate(tensors):
        if not (tensor is None and index >= 3) and not isinstance(tensor, Tensor):
            takes = "a torch.Tensor" if index < 3 else "a torch.Tensor or None"
            _fail(AttentionTensors._fields[index], type(tensor).__name__, takes, TypeError)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, device: torch.device, on_cpu: bool) -> None:
    if dtype not in _DEVICE_DTYPES and not (on_cpu and dtype in _CPU_DTYPES):
        takes = "torch.bfloat16, torch.float16 or torch.float32 (on CPU also torch.float64)"
        _fail("q", f"dtype {dtype} on {device.type}", takes)
    if q.stride(-1) != 1:
        _fail_last_dimension("q", q)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != dtype:
            _fail(name, f"dtype {tensor.dtype}", f"the dtype of q, {dtype}")
        if tensor.device != device:
            _fail_device(name, tensor, device)
        if tensor.stride(-1) != 1:
            _fail_last_dimension(name, tensor)


def _fail_last_dimension(name: str, tensor: Tensor) -> NoReturn:
    _fail(name, f"strides {tuple(tensor.stride())}", "a contiguous last dimension (stride 1)")


def _fail_device(name: str, tensor: Tensor, device: torch.device) -> NoReturn:
    _fail(name, f"device {tensor.device}", f"the device of q, {device}")


def _check_ranks(
    q_shape: torch.Size,
    k_shape: torch.Size,
    v_shape: torch.Size,
    q_packed: bool,
    k_packed: bool,
    page_table: Tensor | None,
) -> None:
    if len(q_shape) != (3 if q_packed else 4):
        takes = "(total_q, H, D) with cu_seqlens_q" if q_packed else "(B, Sq, H, D) without cu_seqlens_q"
        _fail("q", f"shape {tuple(q_shape)}", takes)
    if k_packed and page_table is not None:
        _fail(
            "page_table", "a tensor together with cu_seqlens_k", "no cu_seqlens_k: lengths of paged keys are seqused_k"
        )
    rank = 3 if k_packed else 4
    if len(k_shape) != rank or len(v_shape) != rank:
        if k_packed:
            takes = "(total_k, Hk, {}) with cu_seqlens_k"
        elif page_table is not None:
            takes = "(pages, page_size, Hk, {}) with page_table"
        else:
            takes = "(B, Sk, Hk, {}) without cu_seqlens_k and page_table"
        if len(k_shape) != rank:
            _fail("k", f"shape {tuple(k_shape)}", takes.format("D"))
        _fail("v", f"shape {tuple(v_shape)}", takes.format("Dv"))


def _check_heads(num_heads: int, head_dim: int, k_shape: torch.Size, v_shape: torch.Size) -> tuple[int, int]:
    """Head counts and head dimensions; returns (Hk, Dv)."""
    num_heads_kv, head_dim_v = k_shape[-2], v_shape[-1]
    if num_heads_kv < 1 or num_heads < 1 or num_heads % num_heads_kv:
        _fail("q", f"{num_heads} heads with {num_heads_kv} heads in k", "a positive multiple of the heads of k")
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        _fail("q", f"head dimension {head_dim}", f"a multiple of 8 from 8 to {MAX_HEAD_DIM}")
    if k_shape[-1] != head_dim:
        _fail("k", f"head dimension {k_shape[-1]}", f"the head dimension of q, {head_dim}")
    if head_dim_v % 8 or not 8 <= head_dim_v <= MAX_HEAD_DIM:
        _fail("v", f"head dimension {head_dim_v}", f"a multiple of 8 from 8 to {MAX_HEAD_DIM}")
    if v_shape[:-1] != k_shape[:-1]:
        _fail(
            "v", f"shape {tuple(v_shape)}", f"the shape of k but for the last dimension, {tuple(k_shape[:-1])} + (Dv,)"
        )
    return num_heads_kv, head_dim_v


def _check_index_tensor(name: str, tensor: Tensor, rank: int, device: torch.device) -> None:
    if tensor.dtype != torch.int32:
        _fail(name, f"dtype {tensor.dtype}", "torch.int32")
    if tensor.dim() != rank:
        _fail(name, f"{tensor.dim()} dimensions", f"{rank}")
    if tensor.device != device:
        _fail_device(name, tensor, device)
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        _fail_last_dimension(name, tensor)


def _query_extent(
    q_shape: torch.Size, cu_seqlens_q: Tensor | None, seqused_q: Tensor | None, device: torch.device
) -> tuple[int, int, int | None]:
    """(batch size, rows of q, Sq of batched q)."""
    if cu_seqlens_q is None:
        batch_size, seqlen_q = q_shape[0], q_shape[1]
        total_q = batch_size * seqlen_q
    else:
        _check_index_tensor("cu_seqlens_q", cu_seqlens_q, 1, device)
        batch_size, total_q, seqlen_q = cu_seqlens_q.shape[0] - 1, q_shape[0], None
        if batch_size < 0:
            _fail("cu_seqlens_q", "0 entries", "batch size + 1 entries, at least 1")
    if seqused_q is not None:
        _check_index_tensor("seqused_q", seqused_q, 1, device)
        _check_batch("seqused_q", seqused_q.shape[0], batch_size)
    return batch_size, total_q, seqlen_q


def _key_extent(
    k_shape: torch.Size,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    page_table: Tensor | None,
    batch_size: int,
    indirect: bool,
    device: torch.device,
) -> tuple[int, int | None, int | None, int | None]:
    """(rows of k, Sk of batched or paged k, page size, columns of the page table).

    indirect: cache_batch_idx says which row of batched k is whose.
    """
    seqlen_k = page_size = max_pages = None
    if cu_seqlens_k is not None:
        _check_index_tensor("cu_seqlens_k", cu_seqlens_k, 1, device)
        if cu_seqlens_k.shape[0] != batch_size + 1:
            takes = f"batch size + 1 = {batch_size + 1}, the batch size being that of q"
            _fail("cu_seqlens_k", f"{cu_seqlens_k.shape[0]} entries", takes)
        total_k = k_shape[0]
    elif page_table is not None:
        _check_index_tensor("page_table", page_table, 2, device)
        page_batch, max_pages = page_table.shape
        _check_batch("page_table", page_batch, batch_size)
        page_size = k_shape[1]
        if page_size < 1:
            _fail("k", f"pages of {page_size} keys", "a page size of at least 1")
        total_k, seqlen_k = k_shape[0] * page_size, max_pages * page_size
        if seqlen_k > INT32_MAX:
            _fail("page_table", f"room for {seqlen_k} keys a sequence", f"at most {INT32_MAX}")
    else:
        if not indirect:
            _check_batch("k", k_shape[0], batch_size)
        seqlen_k = k_shape[1]
        total_k = k_shape[0] * seqlen_k
    if total_k > INT32_MAX:
        _fail("k", f"{total_k} rows", f"at most {INT32_MAX}")
    if seqused_k is not None:
        _check_index_tensor("seqused_k", seqused_k, 1, device)
        _check_batch("seqused_k", seqused_k.shape[0], batch_size)
    return total_k, seqlen_k, page_size, max_pages


def _check_batch(name: str, got: int, batch_size: int) -> None:
    if got != batch_size:
        _fail(name, f"batch size {got}", f"the batch size of q, {batch_size}")


def _check_max_seqlen(name: str, value: int, seqlen: int | None, is_bound: bool) -> int:
    """A bound on lengths that only the device knows. Where the host knows them, a smaller bound contradicts them."""
    value = _check_int(name, value, 0)
    if not is_bound and value < seqlen:
        _fail(name, f"{value} for sequences of length {seqlen}", f"None or at least {seqlen}")
    return value


def _check_int(name: str, value: int, least: int, most: int = INT32_MAX) -> int:
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            _fail(name, type(value).__name__, "an int", TypeError)
        value = int(value)
    if not least <= value <= most:
        _fail(name, f"{value}", f"an int from {least} to {most}")
    return value


def _check_finite(name: str, value: float) -> float:
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            _fail(name, type(value).__name__, "a float", TypeError)
        value = float(value)
    if not math.isfinite(value):
        _fail(name, f"{value}", "a finite number")
    return value


def _check_softcap(softcap: float) -> float:
    softcap = _check_finite("softcap", softcap)
    if softcap < 0.0:
        _fail("softcap", f"{softcap}", "a number >= 0, 0 being off")
    return softcap


def _check_bool(name: str, value: bool, takes: str = "True or False") -> None:
    if value is not True and value is not False:
        _fail(name, f"{value!r}", takes, TypeError)


def _check_dtype(name: str, tensor: Tensor, dtypes: frozenset | tuple) -> torch.dtype:
    dtype = tensor.dtype
    if dtype not in dtypes:
        _fail(name, f"dtype {dtype}", "one of " + ", ".join(sorted(map(str, dtypes))))
    return dtype


def _check_sink(sink: Tensor, num_heads: int, dtypes: frozenset, device: torch.device) -> torch.dtype:
    dtype = _check_dtype("learnable_sink", sink, dtypes)
    if sink.shape != (num_heads,):
        _fail("learnable_sink", f"shape {tuple(sink.shape)}", f"one logit a query head, ({num_heads},)")
    if sink.device != device:
        _fail_device("learnable_sink", sink, device)
    if not sink.is_contiguous():
        _fail_last_dimension("learnable_sink", sink)
    return dtype


def _check_key_side(
    name: str, tensor: Tensor, k_shape: torch.Size, page_size: int | None, num_heads: int, device: torch.device
) -> int:
    """Check a tensor that belongs to keys: laid out as k, (.., H*) in place of (.., Hk, D). Returns H*."""
    if tensor.device != device:
        _fail_device(name, tensor, device)
    lead, shape = tuple(k_shape[:-2]), tuple(tensor.shape)
    leads = (lead,)
    if len(lead) == 2 and page_size is None:  # batched: one for every sequence, or one a sequence
        leads = (lead, (1, lead[1]))
    head_counts = (1, k_shape[-2], num_heads)
    if shape[:-1] not in leads or not shape or shape[-1] not in head_counts:
        takes = " or ".join(str((*lead, "H*")) for lead in dict.fromkeys(leads)).replace("'", "")
        _fail(name, f"shape {shape}", f"{takes} with H* in {sorted(set(head_counts))}")
    return shape[-1]


def _query_side_shape(q_packed: bool, total_q: int, max_seqlen_k: int | None) -> tuple[int, int]:
    """Rows and columns of a mask or bias of each query."""
    if not q_packed:
        _fail("q", "batched queries with an attn_mask or attn_bias of each query", "packed ones, with cu_seqlens_q")
    if max_seqlen_k is None:
        takes = "the extent of its last dimension, the length of the longest sequence of keys"
        _fail("max_seqlen_k", "None with an attn_mask or attn_bias of each query", takes)
    return total_q, max_seqlen_k


def _check_query_side(
    name: str, tensor: Tensor, rows_and_columns: tuple[int, int], head_counts: tuple[int, ...], device: torch.device
) -> int:
    """Check a tensor that belongs to queries, (total_q, H*, max_seqlen_k). Returns H*."""
    if tensor.device != device:
        _fail_device(name, tensor, device)
    shape, (rows, columns) = tuple(tensor.shape), rows_and_columns
    if len(shape) != 3 or shape[1] not in head_counts or (shape[0], shape[2]) != rows_and_columns:
        takes = f"(total_q, H*, max_seqlen_k) = ({rows}, H*, {columns}) with H* in {sorted(set(head_counts))}"
        _fail(name, f"shape {shape}", takes)
    return shape[1]


def _check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if out.shape != shape:
        _fail("out", f"shape {tuple(out.shape)}", f"{tuple(shape)}")
    if out.dtype != dtype:
        _fail("out", f"dtype {out.dtype}", f"the dtype of q, {dtype}")
    if out.device != device:
        _fail_device("out", out, device)
    if out.stride(-1) != 1:
        _fail_last_dimension("out", out)
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        _fail("out", f"strides {tuple(out.stride())}", "a tensor whose elements do not share memory")


def _normalise_window(window_size: tuple[int | None, int | None], causal: bool) -> tuple[int | None, int | None]:
    """(left, right) with None for unbounded; causal closes the right side at 0."""
    try:
        left, right = window_size
    except (TypeError, ValueError):
        _fail("window_size", f"{window_size!r}", "a pair (left, right) of ints or None", TypeError)
    if left is not None:
        left = _window_side("window_size[0]", left)
    if right is not None:
        right = _window_side("window_size[1]", right)
    return left, (0 if causal else right)


def _window_side(name: str, value: int) -> int | None:
    value = _check_int(name, value, -INT32_MAX - 1)
    return None if value < 0 else value
