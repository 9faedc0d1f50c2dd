"""Who is measured: this library in both layouts, and every other implementation that is installed.

A peer says whether it is here (`available`), whether it takes a workload (`supports`), and gives back a call of no
arguments that computes it (`make`). Calls return the output alone, in the layout of the tensors they were given.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.workloads import Workload

Attention = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class AttentionInputs:
    """The tensors of one workload, packed; equal lengths can also be seen as a batch, without a copy."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor

    @classmethod
    def random(cls, workload: Workload, device: str = "cuda", seed: int = 0) -> AttentionInputs:
        generator = torch.Generator(device=device).manual_seed(seed)
        dtype = getattr(torch, workload.dtype)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

        return cls(
            q=normal(workload.total_q, workload.heads, workload.head_dim),
            k=normal(workload.total_k, workload.heads_kv, workload.head_dim),
            v=normal(workload.total_k, workload.heads_kv, workload.head_dim_v),
            cu_seqlens_q=torch.tensor(workload.cu_q, device=device, dtype=torch.int32),
            cu_seqlens_k=torch.tensor(workload.cu_k, device=device, dtype=torch.int32),
        )

    def batched(self, workload: Workload) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of shape (batch, length, heads, dim)."""
        return tuple(x.view(workload.batch, -1, *x.shape[1:]) for x in (self.q, self.k, self.v))

    @property
    def lengths(self) -> dict[str, torch.Tensor]:
        """The tensors that say how long the sequences are, by the names of their arguments."""
        return {"cu_seqlens_q": self.cu_seqlens_q, "cu_seqlens_k": self.cu_seqlens_k}

    def varlen_arguments(self, workload: Workload) -> dict[str, Any]:
        """The keyword arguments that the whole flash-attention family shares."""
        return {
            **self.lengths,
            "max_seqlen_q": workload.max_q,
            "max_seqlen_k": workload.max_k,
            "causal": workload.causal,
        }


def first(result: Any) -> torch.Tensor:
    """The output, whether or not the implementation returns its logsumexp as well."""
    return result[0] if isinstance(result, tuple) else result


class Peer:
    """One implementation. Subclasses name the module they need and the distributions that may carry it."""

    name: str
    module: str
    distributions: tuple[str, ...] = ()
    takes_pages = False  # whether `make` also takes the keys and values in pages, as paged.PagedInputs

    def available(self) -> bool:
        """Whether it imports. An installation that is there but broken counts as absent; `missing_because` says why."""
        return self.missing_because() is None

    def missing_because(self) -> str | None:
        try:
            importlib.import_module(self.module)
        except Exception as error:  # a peer's import may fail in any way at all, and must not take the run with it
            return f"{type(error).__name__}: {error}"
        return None

    def version(self) -> str:
        for distribution in self.distributions:
            try:
                return importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
        return "unknown"

    def supports(self, workload: Workload) -> bool:
        raise NotImplementedError

    def make(self, workload: Workload, inputs: AttentionInputs) -> Attention:
        raise NotImplementedError


class FlashAttentionFamily(Peer):
    """Everything that offers flash_attn_func and flash_attn_varlen_func with the family's argument names."""

    def supports(self, workload: Workload) -> bool:
        return True

    def options(self) -> dict[str, Any]:
        """What a packed call is given beside the tensors and lengths."""
        return {}

    def make(self, workload: Workload, inputs: AttentionInputs) -> Attention:
        return self.make_packed(workload, inputs) if workload.packed else self.make_batched(workload, inputs)

    def make_packed(self, workload: Workload, inputs: AttentionInputs) -> Attention:
        function = importlib.import_module(self.module).flash_attn_varlen_func
        q, k, v = inputs.q, inputs.k, inputs.v
        arguments = inputs.varlen_arguments(workload) | self.options()
        return lambda: first(function(q, k, v, **arguments))

    def make_batched(self, workload: Workload, inputs: AttentionInputs) -> Attention:
        function = importlib.import_module(self.module).flash_attn_func
        q, k, v = inputs.batched(workload)
        causal = workload.causal
        return lambda: first(function(q, k, v, causal=causal))


class Ours(FlashAttentionFamily):
    name = "ours"
    module = "flash_attn_cute"
    distributions = ("flash-attn-cute",)


class OursBatched(Ours):
    """Our own dense call on the tensors of a packed row: what packing costs is measured in the row's own rounds."""

    name = "ours-batched"

    def supports(self, workload: Workload) -> bool:
        return workload.packed and workload.equal_lengths

    def make(self, workload: Workload, inputs: AttentionInputs) -> Attention:
        return self.make_batched(workload, inputs)


class FlashAttention4(FlashAttentionFamily):
    name = "flash-attn-4"
    module = "flash_attn.cute"
    distributions = ("flash-attn-4",)
    takes_pages = True


class FlashAttention3(FlashAttentionFamily):
    name = "flash-attn-3"
    module = "flash_attn_interface"
    distributions = ("flash_attn_3", "flash-attn-3")


class CudnnSdpa(Peer):
    """cuDNN's fused attention, reached through torch. It takes batches, so ragged rows are beyond it."""

    name = "cudnn"
    module = "torch.nn.attention"

    def missing_because(self) -> str | None:
        return None if torch.backends.cudnn.is_available() else "this torch build has no cuDNN"

    def version(self) -> str:
        return str(torch.backends.cudnn.version())

    def supports(self, workload: Workload) -> bool:
        # torch aligns is_causal to the top left, our meaning only where lengths agree. One query sees all keys.
        return workload.equal_lengths and (workload.square or workload.max_q == 1 or not workload.causal)

    def make(self, workload: Workload, inputs: AttentionInputs) -> Attention:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        # (batch, heads, length, dim) views of the same memory: no copy is made, and none is timed.
        q, k, v = (x.transpose(1, 2) for x in inputs.batched(workload))
        arguments: dict[str, Any] = {"is_causal": workload.causal and workload.max_q > 1}
        if workload.heads != workload.heads_kv:
            arguments["enable_gqa"] = True

        def call() -> torch.Tensor:
            # The context selects the backend; entering it costs host time only, which the events do not see.
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q, k, v, **arguments).transpose(1, 2)

        return call


class TorchVarlen(Peer):
    """torch's own varlen attention (2.10 and newer); its keyword names have moved between releases."""

    name = "torch-varlen"
    module = "torch.nn.attention.varlen"

    def version(self) -> str:
        return torch.__version__

    def supports(self, workload: Workload) -> bool:
        return workload.head_dim == workload.head_dim_v

    def make(self, workload: Workload, inputs: AttentionInputs) -> Attention:
        from torch.nn.attention.varlen import varlen_attn

        known = inspect.signature(varlen_attn).parameters
        arguments: dict[str, Any] = {}
        if workload.causal:
            arguments.update({"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True})
        if workload.heads != workload.heads_kv and "enable_gqa" in known:
            arguments["enable_gqa"] = True
        q, k, v, cu_q, cu_k = inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_q, inputs.cu_seqlens_k
        max_q, max_k = workload.max_q, workload.max_k
        return lambda: first(varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **arguments))


OURS = Ours()
# Our own other layout comes last: outputs are checked in this order, and strangers are the better witnesses.
PEERS: tuple[Peer, ...] = (FlashAttention4(), CudnnSdpa(), FlashAttention3(), TorchVarlen(), OursBatched())


def peers_named(names: str | None, known: tuple[Peer, ...] = PEERS) -> list[Peer]:
    """The peers of a comma-separated list, or all of them; an unknown name is an error, not an empty column."""
    if names is None:
        return list(known)
    by_name = {peer.name: peer for peer in known}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = sorted(set(wanted) - set(by_name))
    if unknown:
        raise ValueError(f"unknown peers {', '.join(unknown)}; there are {', '.join(by_name)}")
    return [by_name[name] for name in wanted]


def installed(wanted: list[Peer]) -> tuple[list[Peer], dict[str, str]]:
    """Those of `wanted` that import here, and what a result file says of all: a version, or why there is none."""
    absent = {peer.name: reason for peer in wanted if (reason := peer.missing_because()) is not None}
    present = [peer for peer in wanted if peer.name not in absent]
    versions = {peer.name: peer.version() for peer in present if not isinstance(peer, Ours)}
    return present, versions | {name: f"absent ({reason})" for name, reason in absent.items()}
