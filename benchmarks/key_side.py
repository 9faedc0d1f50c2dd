"""Masks and biases of keys: which a call has, their numbers, and the inputs of a call that has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.paged import PagedInputs
from benchmarks.peers import AttentionInputs
from benchmarks.workloads import Workload
from flash_attn_cute.tuning import SM90_TILES

# Of the kernel at the head dimension of all cases: a mask is skipped in tiles of so many keys of a sequence.
KEY_TILE = SM90_TILES[(128, 128)].tile_n
# A mask without structure: no tile of it could be skipped.
KEPT_KEYS = 0.9
KEPT_TILES = 10


@dataclass(frozen=True)
class KeySide:
    """What a call hides and adds, and for which heads: "1" for all of them, "Hk" a KV head, "H" a query head.

    tiles: the mask keeps one KV tile in KEPT_TILES and hides the others whole; without, it keeps random keys.
    each_query: a call is given what belongs to its keys once for each query, as `attn_mask` and `attn_bias`.
    """

    name: str
    bias: str | None = None
    mask: str | None = None
    tiles: bool = False
    each_query: bool = False

    def random(self, workload: Workload, device: torch.device | str, seed: int = 1) -> KeyRows:
        """A bias is normal, in the dtype of the keys: in fp32 one a query head would be a twentieth of the traffic."""
        generator = torch.Generator(device=device).manual_seed(seed)
        rows, bias, mask = workload.total_k, None, None
        if self.bias is not None:
            shape = (rows, head_count(workload, self.bias))
            bias = torch.randn(shape, device=device, generator=generator).to(getattr(torch, workload.dtype))
        if self.mask is not None and self.tiles:
            mask = one_tile_in(KEPT_TILES, workload, device)[:, None].repeat(1, head_count(workload, self.mask))
        elif self.mask is not None:
            shape = (rows, head_count(workload, self.mask))
            mask = torch.rand(shape, device=device, generator=generator) < KEPT_KEYS
        return KeyRows(bias, mask)

    def inputs(self, workload: Workload, inputs: AttentionInputs | PagedInputs, rows: KeyRows) -> KeySideInputs:
        """What a call is given that has these rows."""
        return KeySideInputs.spread(workload, inputs, rows) if self.each_query else KeySideInputs.of(inputs, rows)


def head_count(workload: Workload, heads: str) -> int:
    return {"1": 1, "Hk": workload.heads_kv, "H": workload.heads}[heads]


def one_tile_in(every: int, workload: Workload, device: torch.device | str) -> torch.Tensor:
    """(total_k,) bool: each sequence keeps one of its first `every` tiles, another than the last one did, and so on."""
    kept = [
        (torch.arange(length, device=device) // KEY_TILE) % every == sequence % every
        for sequence, length in enumerate(workload.lens_k)
    ]
    return torch.cat(kept)


@dataclass(frozen=True)
class KeyRows:
    """bias (total_k, H*) and mask (total_k, H*) bool, True keeps, over packed keys; None where there is none."""

    bias: torch.Tensor | None
    mask: torch.Tensor | None

    def added(self, workload: Workload) -> torch.Tensor | None:
        """(total_k, H) float32, what the scores of every query head are given; -inf hides."""
        total = None
        if self.bias is not None:
            total = _per_query_head(self.bias.float(), workload)
        if self.mask is not None:
            hidden = _per_query_head(~self.mask, workload)
            total = torch.zeros(hidden.shape, device=hidden.device) if total is None else total
            total = total.masked_fill(hidden, float("-inf"))
        return total


def _per_query_head(rows: torch.Tensor, workload: Workload) -> torch.Tensor:
    return rows.repeat_interleave(workload.heads // rows.shape[1], dim=1)


@dataclass(frozen=True)
class KeySideInputs:
    """Inputs of a call with a mask and a bias, laid out as its keys are or for each query; to be used as inputs are."""

    inputs: AttentionInputs | PagedInputs
    key_bias: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    attn_bias: torch.Tensor | None = None
    attn_mask: torch.Tensor | None = None

    @classmethod
    def of(cls, inputs: AttentionInputs | PagedInputs, rows: KeyRows) -> KeySideInputs:
        if isinstance(inputs, AttentionInputs):
            return cls(inputs, rows.bias, rows.mask)
        return cls(inputs, *(x if x is None else inputs.like_keys(x) for x in (rows.bias, rows.mask)))

    @classmethod
    def spread(cls, workload: Workload, inputs: AttentionInputs | PagedInputs, rows: KeyRows) -> KeySideInputs:
        """(total_q, H*, max_seqlen_k): what the rows say of the keys of a sequence for each query, 0 behind them."""

        def for_each_query(x: torch.Tensor | None) -> torch.Tensor | None:
            if x is None:
                return None
            spread = x.new_zeros(workload.total_q, x.shape[1], workload.max_k)
            queries = spread.split(workload.lens_q)
            for of_sequence, of_keys in zip(queries, x.split(workload.lens_k), strict=True):
                of_sequence[:, :, : len(of_keys)] = of_keys.T
            return spread

        return cls(inputs, attn_bias=for_each_query(rows.bias), attn_mask=for_each_query(rows.mask))

    @property
    def q(self) -> torch.Tensor:
        return self.inputs.q

    @property
    def k(self) -> torch.Tensor:
        return self.inputs.k

    @property
    def v(self) -> torch.Tensor:
        return self.inputs.v

    @property
    def lengths(self) -> dict[str, torch.Tensor]:
        """What a plan is told: a mask, and the pages in which it lies, say how much of a length there is to do."""
        of_mask = {} if self.key_mask is None else {"key_mask": self.key_mask}
        if of_mask and isinstance(self.inputs, PagedInputs):
            of_mask["page_table"] = self.inputs.page_table
        return self.inputs.lengths | of_mask

    def varlen_arguments(self, workload: Workload) -> dict[str, Any]:
        names = ("key_bias", "key_mask", "attn_bias", "attn_mask")
        given = {name: getattr(self, name) for name in names}
        return self.inputs.varlen_arguments(workload) | {name: x for name, x in given.items() if x is not None}
