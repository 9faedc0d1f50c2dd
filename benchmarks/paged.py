"""Keys and values in pages, as an inference engine keeps them: pages of a sequence lie anywhere in a larger pool."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.peers import AttentionInputs
from benchmarks.workloads import Workload

# A pool is larger than what is in use: by this part of it, and by at least one page.
SPARE_PAGES = 1 / 8


def slots_of(table: torch.Tensor, lengths: torch.Tensor, page_size: int) -> torch.Tensor:
    """(total_k,) rows of the pool, of the keys of all sequences one after another."""
    lengths = lengths.long()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=table.device), lengths)
    position = torch.arange(len(sequence), device=table.device) - (lengths.cumsum(0) - lengths)[sequence]
    return table[sequence, position // page_size].long() * page_size + position % page_size


@dataclass(frozen=True)
class PagedInputs:
    """The queries, keys and values of one workload, the keys and values in pages in random order.

    k, v: (pages, page_size, Hk, D or Dv); page_table: (B, W) int32, -1 past what is used; seqused_k: (B,) int32.
    Pages that no sequence uses are NaN, so that an output that touched one is wrong; what is left of a last page is 0,
    since some implementations multiply it by 0.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seqused_k: torch.Tensor
    page_table: torch.Tensor

    @classmethod
    def scatter(cls, workload: Workload, inputs: AttentionInputs, page_size: int, seed: int = 0) -> PagedInputs:
        """The same numbers as `inputs`, in pages."""
        device = inputs.q.device
        generator = torch.Generator(device=device).manual_seed(seed)
        lengths = torch.tensor(workload.lens_k, device=device)
        pages = -(-lengths // page_size)
        used = sum(-(-length // page_size) for length in workload.lens_k)
        pool = used + max(1, int(used * SPARE_PAGES))
        ids = torch.randperm(pool, device=device, generator=generator)[:used]

        # Even the longest sequence has an entry that it does not use.
        width = -(-workload.max_k // page_size) + 1
        table = torch.full((workload.batch, width), -1, dtype=torch.int32, device=device)
        table[torch.arange(width, device=device) < pages[:, None]] = ids.int()

        lengths = lengths.int()
        slots = slots_of(table, lengths, page_size)

        def paged(rows: torch.Tensor) -> torch.Tensor:
            result = rows.new_full((pool, page_size, *rows.shape[1:]), float("nan"))
            result[ids] = 0.0
            result.view(-1, *rows.shape[1:])[slots] = rows
            return result

        return cls(inputs.q, paged(inputs.k), paged(inputs.v), inputs.cu_seqlens_q, lengths, table)

    def like_keys(self, rows: torch.Tensor) -> torch.Tensor:
        """(total_k, ...) of packed keys -> (pages, page_size, ...), where their keys are; elsewhere 0, or False."""
        result = rows.new_zeros(*self.k.shape[:2], *rows.shape[1:])
        result.flatten(0, 1)[slots_of(self.page_table, self.seqused_k, self.page_size)] = rows
        return result

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    @property
    def lengths(self) -> dict[str, torch.Tensor]:
        """The tensors that say how long the sequences are, by the names of their arguments."""
        return {"cu_seqlens_q": self.cu_seqlens_q, "seqused_k": self.seqused_k}

    def varlen_arguments(self, workload: Workload) -> dict[str, Any]:
        """The keyword arguments of flash_attn_varlen_func in the family that has pages in it."""
        return {
            **self.lengths,
            "page_table": self.page_table,
            "max_seqlen_q": workload.max_q,
            "max_seqlen_k": workload.max_k,
            "causal": workload.causal,
        }

    def with_valid_entries(self) -> PagedInputs:
        """For implementations that promise nothing about an entry of -1: it is a page in use there, without NaN."""
        in_use = self.page_table.max().clamp(min=0)
        return replace(self, page_table=self.page_table.where(self.page_table >= 0, in_use))
