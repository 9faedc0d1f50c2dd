"""The public functions: arguments to a Problem, a backend for it, and its result."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn_cute import attn_mask as compatibility
from flash_attn_cute import launch, prepared_calls
from flash_attn_cute.batch_invariant import backend as triton_backend
from flash_attn_cute.problem import AttentionTensors, Problem
from flash_attn_cute.scheduler_metadata import SchedulerMetadata, check_scheduler_metadata
from flash_attn_cute.split_policy import splits_of

BACKENDS = ("auto", "cute", "triton", "cute+triton", "emulator", "reference")
NO_BACKWARD = (
    "the CuTe kernels have no backward: call them under torch.no_grad(), or use backend='cute+triton', 'triton' or "
    "'reference' for gradients"
)


class Support(NamedTuple):
    """Answer of `supports`: true in a condition where the call would run; `reason` says why not where it would not."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    learnable_sink: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    num_splits: int = 1,
    seqlen_k_per_split: int | None = None,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    scheduler: str = "auto",
    scheduler_metadata: Any = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over sequences of different lengths.

    q: (total_q, H, D) with cu_seqlens_q, else (B, Sq, H, D); bf16 or fp16 (Triton
        and the CPU: also fp32; the CPU: also fp64).
    k, v: (total_k, Hk, D or Dv) with cu_seqlens_k, (pages, page_size, Hk, D or Dv) with page_table, else
        (B, Sk, Hk, D or Dv). H must be a multiple of Hk. The last dimension is contiguous, other strides are free.
    cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 on the device, offsets of the sequences. Rows of q past the last are
    padding.
    max_seqlen_q, max_seqlen_k: bounds on the lengths, hints only (but see attn_mask).
    seqused_q, seqused_k: (B,) int32, how much of each sequence is used.
    page_table: (B, W) int32.
    softmax_scale: defaults to D ** -0.5.
    causal: query i sees keys up to i + len_k - len_q.
    window_size: (left, right): query i sees keys from i + len_k - len_q - left to i + len_k - len_q + right; None or a
        negative number is unbounded.
    softcap: c > 0 makes a score c * tanh(score / c).
    learnable_sink: (H,) logits that join the softmax and have no value.
    key_mask: bool, True keeps; (total_k, H*), (B or 1, Sk, H*) or (pages, page_size, H*), as k is, any strides. H* is
        1, Hk or H, and query head h takes h // (H // H*). The same for every query of a sequence. Where a KV tile is
        hidden from all heads of a query tile, the CuTe kernels do not visit it, which changes no bit.
    key_bias: bf16, fp16 or fp32, laid out likewise; added to a score after scale and softcap. -inf and the least finite
        number of its dtype mask, but no KV tile is left out for that.
    attn_mask, attn_bias: a compatibility form, told apart by rank: 2 dimensions, (total_k, H*), are key_mask and
        key_bias of packed keys; 3 dimensions, (total_q, H*, max_seqlen_k) with packed queries, hold for each query what
        it is for the j-th key of its sequence. The two may differ; neither goes with its key-side namesake. In the
        CuTe kernels NaN in a value spreads to queries that alone of others hide it.
    pack_gqa: put the query heads of a KV head into one query tile; None chooses. It never changes the result.
    num_splits: how many CTAs may share the keys of a query tile: 1 never splits, 0 as the batch asks for, n at most n
        (up to 256). Splits are merged in fp32; with them a row's bits depend on the batch, unless seqlen_k_per_split is
        given.
    seqlen_k_per_split: keys between absolute split boundaries, rounded up to whole KV tiles, whatever the batch.
    scheduler: "auto", "single_tile", "static", "dynamic" or, on Blackwell, "clc". It never changes the result.
    scheduler_metadata: a plan from `get_scheduler_metadata`, for any number of calls of the same lengths; None plans
        where splits are asked for; False never plans, and then nothing is split. A plan alone changes no bits.
    deterministic: the forward is always bitwise reproducible; accepted for callers that ask.
    return_lse: also return the log-sum-exp of each row, natural logarithm, float32: (H, total_q) or (B, H, Sq).
    out: where to write, as q with Dv.
    backend: "auto" (CuTe kernels where the GPU has them, Triton on others from compute capability 8.0, the reference on
        the CPU), "cute" (the CuTe kernels), "triton" (differentiable; also fp32; never splits, so num_splits chooses
        nothing), "cute+triton" (CuTe forward, Triton backward), "reference" (plain PyTorch in fp64, any device,
        differentiable) or "emulator" (CPU tensors through the compiled SM90 kernel, interpreted; for checking, not for
        speed).

    A row that sees no key, and any row past seqused_q or of padding, is 0 (lse: -inf, or the sink where there is one
    and the row is a query). Returns out, or (out, lse). Each row's bits depend on
    its own query, keys and values alone: not on the batch around it, on packing or on the scheduler.

    Raises ValueError or TypeError for wrong arguments, each naming the argument; NotImplementedError for a combination
    that the chosen backend does not have. Nothing is compiled or launched before that.
    """
    if torch.compiler.is_compiling():
        return _compiled_call(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            seqused_q=seqused_q,
            seqused_k=seqused_k,
            page_table=page_table,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            learnable_sink=learnable_sink,
            key_mask=key_mask,
            key_bias=key_bias,
            attn_mask=attn_mask,
            attn_bias=attn_bias,
            num_splits=num_splits,
            seqlen_k_per_split=seqlen_k_per_split,
            pack_gqa=pack_gqa,
            deterministic=deterministic,
            scheduler=scheduler,
            scheduler_metadata=scheduler_metadata,
            return_lse=return_lse,
            out=out,
            backend=backend,
        )
    num_splits, seqlen_k_per_split = splits_of(num_splits, seqlen_k_per_split, backend)
    query_mask = query_bias = None
    if attn_mask is not None or attn_bias is not None:
        key_mask, key_bias, query_mask, query_bias = compatibility.by_rank(
            attn_mask, attn_bias, key_mask, key_bias, cu_seqlens_k is not None
        )
    tensors = AttentionTensors(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        page_table,
        learnable_sink,
        key_mask,
        key_bias,
        out,
        query_mask=query_mask,
        query_bias=query_bias,
    )
    options = (
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_size,
        softcap,
        num_splits,
        seqlen_k_per_split,
        pack_gqa,
        deterministic,
        scheduler,
        what_decides(scheduler_metadata),
        return_lse,
        backend,
    )
    signature = prepared_calls.signature(tensors, options)
    prepared = prepared_calls.find(signature)
    if prepared is not None and not _wants_gradients(tensors):
        out, lse = prepared.run(tensors, scheduler_metadata)
        return (out, lse) if return_lse else out
    problem = compatibility.checked_problem(
        tensors,
        attn_mask,
        attn_bias,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        num_splits=num_splits,
        seqlen_k_per_split=seqlen_k_per_split,
        pack_gqa=pack_gqa,
        deterministic=deterministic,
        scheduler=scheduler,
        return_lse=return_lse,
    )
    check_scheduler_metadata(problem, scheduler_metadata)
    out, lse = _attend(tensors, problem, backend, scheduler_metadata, signature)
    return (out, lse) if return_lse else out


def what_decides(scheduler_metadata: Any) -> Any:
    """What of the argument is part of a call's signature."""
    return scheduler_metadata.kind if isinstance(scheduler_metadata, SchedulerMetadata) else scheduler_metadata


def _compiled_call(**arguments) -> Tensor | tuple[Tensor, Tensor]:
    from flash_attn_cute import custom_op

    return custom_op.call(arguments)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a batch of equal lengths: q (B, Sq, H, D), k and v (B, Sk, Hk, D or Dv).

    Options and result are those of `flash_attn_varlen_func`, less the tensors that describe ragged batches.
    """
    ragged = [name for name in _RAGGED_OPTIONS if options.get(name) is not None]
    if ragged:
        raise TypeError(f"flash_attn_func takes no {ragged[0]}: use flash_attn_varlen_func")
    return flash_attn_varlen_func(q, k, v, **options)


# Of the tensors of a call, those that the public function takes under the same name.
_OPTIONAL_TENSORS = AttentionTensors._fields[3 : AttentionTensors._fields.index("out") + 1]
_RAGGED_OPTIONS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table")


def supports(q: Tensor, k: Tensor, v: Tensor, *args, device: Any = None, backend: str = "auto", **options) -> Support:
    """Whether `flash_attn_varlen_func` with these arguments runs, without compiling or launching anything.

    The tensors may be on the meta device. device: a device, a device string, or a compute capability such as (9, 0) to
    judge for instead of q's own device. Returns a `Support`; wrong arguments raise as the call itself would.
    """
    positional = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")[: len(args)]
    if len(args) > len(positional) or options.keys() & set(positional):
        raise TypeError("supports: got an argument twice or too many positional ones; takes those of the call itself")
    named = dict(zip(positional, args, strict=True)) | options
    tensors = AttentionTensors(q, k, v, **{f: named.pop(f, None) for f in _OPTIONAL_TENSORS})
    attn = named.pop("attn_mask", None), named.pop("attn_bias", None)
    of_keys = tensors.key_mask, tensors.key_bias
    tensors = tensors._replace(**compatibility.by_rank(*attn, *of_keys, tensors.cu_seqlens_k is not None)._asdict())
    metadata = named.pop("scheduler_metadata", None)
    splits = splits_of(named.get("num_splits", 1), named.get("seqlen_k_per_split"), backend)
    named["num_splits"], named["seqlen_k_per_split"] = splits
    problem = compatibility.checked_problem(tensors, *attn, **named)
    check_scheduler_metadata(problem, metadata)
    chosen, reason = _choose(problem, backend, _capability(q.device if device is None else device))
    if reason is None and chosen != "reference" and _wants_gradients(tensors):
        reason = triton_backend.why_no_gradients(problem) if chosen in triton_backend.NAMES else NO_BACKWARD
    return Support(reason is None, reason or "")


def _capability(device: Any) -> tuple[int, int] | str:
    """Compute capability of a CUDA device, or the type of another one."""
    if isinstance(device, tuple):
        return device
    device = torch.device(device)
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else device.type


def _choose(problem: Problem, backend: str, capability: tuple[int, int] | str) -> tuple[str | None, str | None]:
    """(backend, None), or (None, why none of them takes the problem)."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; takes one of {', '.join(BACKENDS)}")
    if backend == "reference" or (backend == "auto" and capability == "cpu"):
        return "reference", None
    if backend == "emulator":
        if capability != "cpu":
            return None, "backend='emulator' takes CPU tensors"
        from flash_attn_cute.emulator import backend as emulator

        return _if_kernel_takes(problem, emulator.architecture(), "emulator")
    is_gpu = not isinstance(capability, str)
    if backend == "triton" or (backend == "auto" and is_gpu and capability not in launch.ARCHITECTURES):
        reason = triton_backend.why_not(problem, capability)
        return (None, reason) if reason else ("triton", None)
    if not is_gpu:
        return None, f"backend={backend!r} on device type {capability}: the CuTe kernels need a CUDA device"
    architecture = launch.ARCHITECTURES.get(capability)
    if architecture is None:
        built = ", ".join(f"{major}.{minor}" for major, minor in launch.ARCHITECTURES)
        return None, f"compute capability {capability[0]}.{capability[1]}: there are kernels for {built}"
    return _if_kernel_takes(problem, architecture, "cute" if backend == "auto" else backend)


def _if_kernel_takes(problem: Problem, architecture: str, backend: str) -> tuple[str | None, str | None]:
    reason = launch.unsupported(problem, architecture)
    return (None, f"{architecture} kernel: {reason}") if reason else (backend, None)


def choose(problem: Problem, backend: str, q: Tensor) -> str:
    """What computes the problem where q is: one of `BACKENDS` but "auto".

    Raises NotImplementedError where nothing does that `backend` allows.
    """
    chosen, reason = _choose(problem, backend, capability_of(q))
    if chosen is None:
        raise NotImplementedError(reason)
    return chosen


def _attend(
    tensors: AttentionTensors,
    problem: Problem,
    backend: str,
    metadata: SchedulerMetadata | bool | None,
    signature: tuple | None,
) -> tuple[Tensor, Tensor | None]:
    chosen = choose(problem, backend, tensors.q)
    if chosen == "reference":
        from flash_attn_cute.reference import attention_reference

        out, lse = attention_reference(tensors, problem)
        if tensors.out is not None:
            out = tensors.out.copy_(out)
        return out, lse
    wants_gradients = _wants_gradients(tensors)
    if chosen == "triton":
        return triton_backend.run(tensors, problem, metadata, wants_gradients)
    if wants_gradients and chosen == "cute+triton":
        return triton_backend.run_with_cute_forward(tensors, problem, metadata)
    if wants_gradients:
        raise NotImplementedError(NO_BACKWARD)
    if chosen == "emulator":
        from flash_attn_cute.emulator import backend as emulator

        return emulator.run(tensors, problem, metadata)
    prepared = launch.PreparedLaunch.of(tensors, problem, metadata)
    prepared_calls.keep(signature, prepared)
    return prepared.run(tensors, metadata)


_capabilities: dict[torch.device, tuple[int, int] | str] = {}


def capability_of(q: Tensor) -> tuple[int, int] | str:
    """Compute capability of a tensor's CUDA device, or the type of another one."""
    device = q.device
    found = _capabilities.get(device)
    if found is None:
        found = _capabilities[device] = _capability(device)
    return found


def _wants_gradients(tensors: AttentionTensors) -> bool:
    if not torch.is_grad_enabled():
        return False
    q, k, v = tensors[:3]
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return True
    for x in (tensors.learnable_sink, tensors.key_bias, tensors.query_bias):
        if x is not None and x.requires_grad:
            return True
    return False
