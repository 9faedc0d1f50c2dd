"""A wrong kernel must not win: outputs are compared with fp32 on sampled rows, and in full with each other."""

from __future__ import annotations

import math
import random
from typing import Any

import torch

from benchmarks.peers import AttentionInputs
from benchmarks.workloads import Workload

# A sanity bound, not the accuracy gate (the tests hold that): output and probabilities are bf16, values reach about 4.
ABSOLUTE_BOUND = 2e-2
RELATIVE_BOUND = 1e-2
SAMPLED_SEQUENCES = 12
SAMPLED_ROWS = 128


def excess(got: torch.Tensor, expected: torch.Tensor) -> tuple[float, bool]:
    """Largest absolute difference, and whether every element is within the bound. NaN is never within."""
    got, expected = got.float(), expected.float()
    difference = (got - expected).abs()
    if difference.numel() == 0:
        return 0.0, True
    within = bool((difference <= ABSOLUTE_BOUND + RELATIVE_BOUND * expected.abs()).all())
    return float(difference.max()), within


def attend_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    len_q: int,
    causal: bool,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 attention of some rows of one sequence: q (rows, H, D), k and v (len_k, Hk, D) -> (rows, H, Dv).

    added: (len_k, H) float32, what joins the scores of each key; -inf hides it.
    """
    len_k, heads_kv = k.shape[0], k.shape[1]
    if len_k == 0:
        return q.new_zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float32)
    group = q.shape[1] // heads_kv
    k = k.float().repeat_interleave(group, dim=1)
    v = v.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("rhd,khd->hrk", q.float(), k) / math.sqrt(q.shape[2])
    if added is not None:
        scores = scores + added.T[:, None, :]
    if causal:
        last_visible = rows + (len_k - len_q)
        hidden = torch.arange(len_k, device=q.device)[None, :] > last_visible[:, None]
        scores = scores.masked_fill(hidden, -math.inf)
    # A row that sees no key has softmax NaN and output 0.
    return torch.einsum("hrk,khd->rhd", scores.softmax(dim=-1).nan_to_num(0.0), v)


def sample_rows(length: int, rng: random.Random) -> list[int]:
    """All rows of a short sequence; of a long one both ends, where tiles and masks begin and end, and some between."""
    if length <= SAMPLED_ROWS:
        return list(range(length))
    middle = rng.sample(range(32, length - 32), SAMPLED_ROWS - 64)
    return [*range(32), *sorted(middle), *range(length - 32, length)]


def sample_sequences(workload: Workload, rng: random.Random) -> list[int]:
    """The first, the last, the longest, and some others."""
    if workload.batch <= SAMPLED_SEQUENCES:
        return list(range(workload.batch))
    longest = max(range(workload.batch), key=lambda i: (workload.lens_q[i], workload.lens_k[i]))
    return sorted({0, workload.batch - 1, longest, *rng.sample(range(workload.batch), SAMPLED_SEQUENCES - 3)})


def sampled_reference(
    workload: Workload, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, added: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row indices into packed q, and their fp32 outputs (rows, H, Dv). Takes packed tensors, `added` (total_k, H)."""
    rng = random.Random(0)
    cu_q, cu_k = workload.cu_q, workload.cu_k
    indices, outputs = [], []
    for sequence in sample_sequences(workload, rng):
        len_q = workload.lens_q[sequence]
        rows = torch.tensor(sample_rows(len_q, rng), device=q.device, dtype=torch.long)
        keys = slice(cu_k[sequence], cu_k[sequence + 1])
        indices.append(rows + cu_q[sequence])
        of_keys = None if added is None else added[keys]
        outputs.append(attend_rows(q[indices[-1]], k[keys], v[keys], rows, len_q, workload.causal, of_keys))
    return torch.cat(indices), torch.cat(outputs)


class Check:
    """Compares outputs of one workload: sampled rows with fp32, and all rows with the first output that was right."""

    def __init__(self, workload: Workload, inputs: AttentionInputs, added: torch.Tensor | None = None) -> None:
        self._rows, self._expected = sampled_reference(workload, inputs.q, inputs.k, inputs.v, added)
        self._trusted: torch.Tensor | None = None

    def __call__(self, output: torch.Tensor) -> dict[str, Any]:
        packed = output.reshape(-1, *output.shape[-2:])
        error, correct = excess(packed[self._rows], self._expected)
        if correct and self._trusted is not None:
            error_all, correct = excess(packed, self._trusted)
            error = max(error, error_all)
        elif correct:
            self._trusted = packed.clone()
        return {"max_error": error, "correct": correct}
