"""Variable-length attention on a ragged batch, checked against fp64 and shown as a table.

On a Hopper GPU the CuTe kernel computes it; elsewhere the same compiled kernel does, interpreted by the emulator.
Exits with 1 if a sequence is off by more than its bound. scripts/quickstart.sh starts it; by hand it needs the package
installed, or the repository on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import math
import sys
from itertools import accumulate
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from flash_attn_cute import flash_attn_varlen_func, supports
from flash_attn_cute.emulator.build import CompilerError, find_compiler
from flash_attn_cute.problem import AttentionTensors, Problem
from flash_attn_cute.reference import attention_plain, attention_reference

# Queries and keys of each sequence: prefill, an empty sequence, a decode, a chunk that continues a longer context, one
# whose first rows see no key, and a single token.
LENGTHS_Q = (300, 0, 1, 128, 96, 1)
LENGTHS_K = (300, 0, 777, 640, 64, 1)
HEADS, HEADS_KV, HEAD_DIM = 16, 4, 128

# The error rule of the project: twice what plain PyTorch in bf16 is off by, and a floor.
OUT_FACTOR, OUT_FLOOR = 2.0, 1e-5
# The logsumexp is fp32 throughout, however narrow the inputs are.
LSE_ABSOLUTE, LSE_RELATIVE = 1e-4, 1e-5


class SequenceErrors(NamedTuple):
    """How far one sequence is off, how far it may be, and whether it is right."""

    out: float
    out_bound: float
    lse: float
    ok: bool


def ragged_batch(device: torch.device) -> AttentionTensors:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    def running_sum(lengths: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    return AttentionTensors(
        q=normal(sum(LENGTHS_Q), HEADS, HEAD_DIM),
        k=normal(sum(LENGTHS_K), HEADS_KV, HEAD_DIM),
        v=normal(sum(LENGTHS_K), HEADS_KV, HEAD_DIM),
        cu_seqlens_q=running_sum(LENGTHS_Q),
        cu_seqlens_k=running_sum(LENGTHS_K),
    )


class Choice(NamedTuple):
    tensors: AttentionTensors
    backend: str
    computed_by: str


def best_choice(reference_only: bool) -> Choice:
    """The batch on the best device there is, the backend for it, and in words what computes it."""
    on_cpu = ragged_batch(torch.device("cpu"))
    if reference_only:
        return Choice(on_cpu, "reference", "the PyTorch reference")
    why = "there is no CUDA GPU"
    if torch.cuda.is_available():
        tensors = ragged_batch(torch.device("cuda"))
        support, why = supports(*tensors[:5], causal=True), torch.cuda.get_device_name()
        if support:
            return Choice(tensors, "auto", f"the CuTe kernel on {why}")
        why = f"{why}: {support.reason}"
    try:
        find_compiler()
    except CompilerError as missing:
        return Choice(on_cpu, "reference", f"the PyTorch reference ({why}; {missing})")
    return Choice(on_cpu, "emulator", f"the compiled SM90 kernel in the emulator ({why})")


def largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0


def sequence_errors(
    got: tuple[torch.Tensor, torch.Tensor],
    expected: tuple[torch.Tensor, torch.Tensor],
    plain: torch.Tensor,
    rows: slice,
) -> SequenceErrors:
    """Compares the rows of one sequence: out is (total_q, H, Dv), lse is (H, total_q)."""
    out, out_expected = got[0][rows].double(), expected[0][rows]
    lse, lse_expected = got[1][:, rows].double(), expected[1][:, rows]
    # A row that sees no key is exactly 0, and its lse exactly -inf; it is left out of the difference, where it would be
    # NaN.
    unseen = lse_expected == -math.inf
    unseen_agree = torch.equal(lse == -math.inf, unseen) and not out.transpose(0, 1)[unseen].any()
    lse_off = (lse - lse_expected).masked_fill(unseen, 0.0).abs()
    lse_allowed = LSE_ABSOLUTE + LSE_RELATIVE * lse_expected.masked_fill(unseen, 0.0).abs()
    out_error = largest(out - out_expected)
    out_bound = OUT_FACTOR * largest(plain[rows].double() - out_expected) + OUT_FLOOR
    # Written so that NaN fails.
    ok = unseen_agree and out_error <= out_bound and bool((lse_off <= lse_allowed).all())
    return SequenceErrors(out_error, out_bound, largest(lse_off), ok)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--reference", action="store_true", help="run the reference, and no kernel")
    tensors, backend, computed_by = best_choice(parser.parse_args().reference)
    got = flash_attn_varlen_func(
        *tensors[:5],
        max_seqlen_q=max(LENGTHS_Q),
        max_seqlen_k=max(LENGTHS_K),
        causal=True,
        return_lse=True,
        backend=backend,
    )
    problem = Problem.from_arguments(tensors, causal=True, return_lse=True)
    expected = attention_reference(tensors, problem, round_output=False)
    plain, _ = attention_plain(tensors, problem)

    table = Table(title=f"Causal attention, bf16, {HEADS} query heads on {HEADS_KV} KV heads, d{HEAD_DIM}")
    for column in ("sequence", "len_q", "len_k", "out error", "bound", "lse error", "bound", "ok"):
        table.add_column(column, justify="right")
    offsets = [0, *accumulate(LENGTHS_Q)]
    all_ok = True
    for index, (len_q, len_k) in enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True)):
        errors = sequence_errors(got, expected, plain, slice(offsets[index], offsets[index + 1]))
        all_ok &= errors.ok
        figures = (f"{errors.out:.1e}", f"{errors.out_bound:.1e}", f"{errors.lse:.1e}", f"{LSE_ABSOLUTE:.0e}")
        verdict = "[green]yes[/]" if errors.ok else "[red]NO[/]"
        table.add_row(str(index), str(len_q), str(len_k), *figures, verdict)
    console = Console()
    console.print(table)
    console.print(f"Computed by {computed_by}.\nErrors: largest absolute difference from fp64.", highlight=False)
    return 0 if all_ok else 1


if __name__ == "__main__":
    sys.exit(main())
