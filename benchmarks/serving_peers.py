"""Who is measured where keys and values lie in a cache: with splits of long sequences where they have them.

Peers that know no pages take part where the keys are contiguous. flashinfer plans once, outside of what is timed, as
its interface has it; FlashAttention-3 plans in the call.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from benchmarks.paged import PagedInputs
from benchmarks.peers import (
    Attention,
    AttentionInputs,
    CudnnSdpa,
    FlashAttention3,
    FlashAttention4,
    Peer,
    first,
)
from benchmarks.workloads import Workload

FLASHINFER_WORKSPACE_BYTES = 512 * 2**20


class ServingFlashAttention4(FlashAttention4):
    """Splits where its kernel has them: on Blackwell, as many as its own heuristic says."""

    def options(self) -> dict[str, Any]:
        return {"num_splits": 0 if torch.cuda.get_device_capability()[0] >= 10 else 1}


class ServingFlashAttention3(FlashAttention3):
    """Splits as its own heuristic says. Its varlen function has no pages, its cache function has no packed keys."""

    takes_pages = True

    def options(self) -> dict[str, Any]:
        return {"num_splits": 0}

    def make(self, workload: Workload, inputs: AttentionInputs | PagedInputs) -> Attention:
        if isinstance(inputs, AttentionInputs):
            return self.make_packed(workload, inputs)
        function = importlib.import_module(self.module).flash_attn_with_kvcache
        q, k, v = inputs.q, inputs.k, inputs.v
        arguments = {
            "cache_seqlens": inputs.seqused_k,
            "page_table": inputs.page_table,
            "cu_seqlens_q": inputs.cu_seqlens_q,
            "max_seqlen_q": workload.max_q,
            "causal": workload.causal,
        } | self.options()
        return lambda: first(function(q, k, v, **arguments))


class FlashInfer(Peer):
    """flashinfer's batch wrappers, planned once: of decode for one query a sequence on pages, else of prefill."""

    name = "flashinfer"
    module = "flashinfer"
    distributions = ("flashinfer-python", "flashinfer")
    takes_pages = True

    def supports(self, workload: Workload) -> bool:
        return workload.head_dim == workload.head_dim_v

    def make(self, workload: Workload, inputs: AttentionInputs | PagedInputs) -> Attention:
        flashinfer = importlib.import_module(self.module)
        workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.q.device)
        heads = (workload.heads, workload.heads_kv, workload.head_dim)
        dtypes = {"q_data_type": inputs.q.dtype, "kv_data_type": inputs.k.dtype}
        q, k, v = inputs.q, inputs.k, inputs.v
        if isinstance(inputs, AttentionInputs):
            wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
            wrapper.plan(inputs.cu_seqlens_q, inputs.cu_seqlens_k, *heads, causal=workload.causal, **dtypes)
            return lambda: first(wrapper.run(q, k, v))
        if workload.max_q == 1:
            # Its tensor-core kernels pay from four query heads a KV head on.
            several = workload.heads >= 4 * workload.heads_kv
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=several)
            wrapper.plan(*compressed_table(inputs), *heads, inputs.page_size, **dtypes)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            pages = compressed_table(inputs)
            wrapper.plan(inputs.cu_seqlens_q, *pages, *heads, inputs.page_size, causal=workload.causal, **dtypes)
        return lambda: first(wrapper.run(q, (k, v)))


def compressed_table(inputs: PagedInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The page table as flashinfer takes it: (B + 1,) begins in a list of pages, the list, (B,) keys in last pages."""
    pages = (inputs.seqused_k + inputs.page_size - 1) // inputs.page_size
    begins = torch.zeros(len(pages) + 1, dtype=torch.int32, device=pages.device)
    begins[1:] = pages.cumsum(0)
    column = torch.arange(inputs.page_table.shape[1], device=pages.device)
    listed = inputs.page_table[column < pages[:, None]]
    in_last = inputs.seqused_k - (pages - 1).clamp(min=0) * inputs.page_size
    return begins, listed, in_last


SERVING_PEERS: tuple[Peer, ...] = (ServingFlashAttention4(), CudnnSdpa(), ServingFlashAttention3(), FlashInfer())
