"""Random ragged inputs, guarded outputs and the error rule, shared by the tests. Importing this needs no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from flash_attn_cute.problem import AttentionTensors, Problem
from flash_attn_cute.reference import attention_plain, attention_reference

NAN = float("nan")
# A finite number exact in every dtype used, and unlikely as a result.
SENTINEL = -7.125
# What a page-table entry past the last page in use may hold.
RUBBISH_PAGES = (-1, 2**31 - 1, -(2**31))


def cu_seqlens(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """(B + 1,) int32 running sums."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def build_tensors(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    layout_q: str = "packed",
    layout_k: str = "packed",
    slack_q: int = 0,
    slack_k: int = 0,
    page_size: int = 16,
    sink_dtype: torch.dtype | None = None,
    key_mask_heads: int | None = None,
    key_bias_heads: int | None = None,
    key_bias_dtype: torch.dtype = torch.float32,
    view: str = "contiguous",
    seed: int = 0,
) -> AttentionTensors:
    """Normal random tensors for sequences of the given lengths.

    layout_q is "packed" or "batched"; layout_k may also be "paged". `slack_*` unused rows follow each sequence; they,
    the tails of batched rows and unused pages hold NaN, and seqused is given wherever such rows exist (and with
    pages). `view` is the memory layout of q, k and v (see `as_view`).
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(of)

    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    q_lead, q_used, cu_q, seqused_q = _side(lengths_q, layout_q, slack_q, device)
    page_table = None
    if layout_k == "paged":
        k_lead, k_used, page_table = _pages(lengths_k, page_size, device, seed)
        cu_k, seqused_k = None, torch.tensor(lengths_k, dtype=torch.int32, device=device)
    else:
        k_lead, k_used, cu_k, seqused_k = _side(lengths_k, layout_k, slack_k, device)

    def rows(lead: tuple[int, ...], used: Tensor | None, *last: int) -> Tensor:
        values = normal(*lead, *last)
        if used is not None:
            values[~used] = NAN
        return as_view(values, view)

    key_mask = key_bias = None
    if key_mask_heads is not None:
        key_mask = torch.rand(*k_lead, key_mask_heads, generator=generator, device=device) < 0.6
    if key_bias_heads is not None:
        key_bias = normal(*k_lead, key_bias_heads, of=key_bias_dtype)
    return AttentionTensors(
        q=rows(q_lead, q_used, heads, head_dim),
        k=rows(k_lead, k_used, kv_heads, head_dim),
        v=rows(k_lead, k_used, kv_heads, head_dim_v),
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        page_table=page_table,
        learnable_sink=None if sink_dtype is None else normal(heads, of=sink_dtype),
        key_mask=key_mask,
        key_bias=key_bias,
    )


def _side(
    lengths: Sequence[int], layout: str, slack: int, device: torch.device | str
) -> tuple[tuple[int, ...], Tensor | None, Tensor | None, Tensor | None]:
    """(leading shape, which rows are in use or None for all, cu_seqlens, seqused) of a packed or batched side."""
    lengths_tensor = torch.tensor(lengths, dtype=torch.int32, device=device)
    if layout == "packed":
        room = [length + slack for length in lengths]
        cu = cu_seqlens(room, device)
        if not slack:
            return (sum(room),), None, cu, None
        pattern = [torch.arange(size) < length for size, length in zip(room, lengths, strict=True)]
        used = torch.cat(pattern) if pattern else torch.zeros(0, dtype=torch.bool)
        return (sum(room),), used.to(device), cu, lengths_tensor
    if layout != "batched":
        raise ValueError(f"unknown layout {layout!r}")
    seqlen = max(lengths, default=0) + slack
    if all(length == seqlen for length in lengths):
        return (len(lengths), seqlen), None, None, None
    used = torch.arange(seqlen, device=device)[None, :] < lengths_tensor[:, None]
    return (len(lengths), seqlen), used, None, lengths_tensor


def _pages(
    lengths: Sequence[int], page_size: int, device: torch.device | str, seed: int
) -> tuple[tuple[int, int], Tensor, Tensor]:
    """(leading shape, which slots are in use, page table) of keys in shuffled pages, two of which nobody uses."""
    counts = [-(-length // page_size) for length in lengths]
    pages = sum(counts) + 2
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).tolist()
    width = max(counts, default=0) + 1
    used = torch.zeros(pages, page_size, dtype=torch.bool)
    table = []
    for length, count in zip(lengths, counts, strict=True):
        own = [order.pop() for _ in range(count)]
        for position, page in enumerate(own):
            used[page, : length - position * page_size] = True
        table.append(own + [RUBBISH_PAGES[column % 3] for column in range(count, width)])
    page_table = torch.tensor(table, dtype=torch.int32).reshape(len(lengths), width)
    return (pages, page_size), used.to(device), page_table.to(device)


def in_pages(
    tensors: AttentionTensors, page_size: int, *, order: str = "shuffled", view: str = "contiguous"
) -> AttentionTensors:
    """The same call with its packed keys in pages ("ascending" or "shuffled") of a cache.

    `view` is the layout of the cache: "contiguous", "heads-first" (heads vary slower than rows), or "interleaved" (one
    tensor has keys and values of a row side by side). Nobody's rows are NaN.
    """
    device, bounds = tensors.k.device, tensors.cu_seqlens_k.tolist()
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    (pages, _), _, table = _pages(lengths, page_size, device, seed=1)
    if order == "ascending":
        rank = {page: i for i, page in enumerate(p for p in table.flatten().tolist() if 0 <= p < pages)}
        table = torch.tensor([[rank.get(p, p) for p in row] for row in table.tolist()], dtype=torch.int32).to(device)
    positions = torch.cat(
        [
            torch.tensor(
                [int(table[b, i // page_size]) * page_size + i % page_size for i in range(n)], dtype=torch.long
            )
            for b, n in enumerate(lengths)
        ]
    ).to(device)
    heads, dims = tensors.k.shape[1], [tensors.k.shape[2], tensors.v.shape[2]]
    shape = (pages, page_size, heads, sum(dims))
    if view == "heads-first":
        both = torch.full((pages, heads, page_size, sum(dims)), NAN, dtype=tensors.k.dtype, device=device).movedim(1, 2)
    else:
        both = torch.full(shape, NAN, dtype=tensors.k.dtype, device=device)
    caches = both.split(dims, dim=-1)
    if view == "contiguous":
        caches = [x.contiguous() for x in caches]
    for cache, rows in zip(caches, (tensors.k, tensors.v), strict=True):
        cache[positions // page_size, positions % page_size] = rows
    seqused = torch.tensor(lengths, dtype=torch.int32, device=device)
    return tensors._replace(k=caches[0], v=caches[1], cu_seqlens_k=None, seqused_k=seqused, page_table=table)


def as_view(tensor: Tensor, view: str) -> Tensor:
    """The same values in another memory layout; the last dimension stays contiguous.

    "contiguous"; "heads_first": heads vary slowest; "padded": rows 16 bytes further apart than they are long;
    "odd": a row pitch and a first address that are not multiples of 16 bytes.
    """
    if view == "contiguous":
        return tensor.contiguous()
    if view == "heads_first":
        return tensor.movedim(-2, 0).contiguous().movedim(0, -2)
    left, right = {"padded": (0, 8), "odd": (1, 2)}[view]
    storage = torch.nn.functional.pad(tensor, (left, right), value=NAN)
    return storage[..., left : left + tensor.shape[-1]]


def on_cpu(tensors: AttentionTensors) -> AttentionTensors:
    """Copies on the CPU, where the specification takes float64."""
    return AttentionTensors(*(tensor if tensor is None else tensor.cpu() for tensor in tensors))


def rows_of_keys(tensors: AttentionTensors, index: int) -> tuple[Tensor, ...]:
    """Where the keys of a sequence are in k, a key_mask or a key_bias: what to index them with."""
    t = tensors
    first = 0 if t.leftpad_k is None else int(t.leftpad_k[index])
    start = 0 if t.cu_seqlens_k is None else int(t.cu_seqlens_k[index])
    if t.seqused_k is not None:
        end = int(t.seqused_k[index])
    else:
        end = t.k.shape[1] if t.cu_seqlens_k is None else int(t.cu_seqlens_k[index + 1]) - start
    positions = torch.arange(first, max(end, first), device=t.k.device)
    if t.cu_seqlens_k is not None:
        return (start + positions,)
    if t.page_table is not None:
        return t.page_table[index][positions // t.k.shape[1]].long(), positions % t.k.shape[1]
    row = index if t.cache_batch_idx is None else int(t.cache_batch_idx[index])
    return torch.full_like(positions, row), positions


def hide_spans(tensors: AttentionTensors, span: int, *, kept: float = 0.4, seed: int = 0) -> AttentionTensors:
    """The same call, with spans of that many keys hidden whole (from the first key of each sequence on): in about half
    of those that are not kept, from all heads of the mask."""
    batch_size = len(tensors.seqused_k) if tensors.seqused_k is not None else len(tensors.cu_seqlens_k) - 1
    mask, generator = tensors.key_mask.clone(), torch.Generator().manual_seed(seed)
    for b in range(batch_size):
        rows = rows_of_keys(tensors, b)
        for first in range(0, len(rows[0]), span):
            heads = torch.rand(mask.shape[-1], generator=generator) < kept
            if torch.rand((), generator=generator) < (1 - kept) / 2:
                heads[:] = False
            of_span = tuple(row[first : first + span] for row in rows)
            mask[of_span] &= heads.to(mask.device)
    return tensors._replace(key_mask=mask)


def sequence_alone(tensors: AttentionTensors, index: int) -> AttentionTensors:
    """One sequence of a packed call, copied out, as a packed call of its own."""
    q_start, q_stop = tensors.cu_seqlens_q[index : index + 2].tolist()
    k_start, k_stop = tensors.cu_seqlens_k[index : index + 2].tolist()
    device = tensors.q.device
    return tensors._replace(
        q=tensors.q[q_start:q_stop].clone(),
        k=tensors.k[k_start:k_stop].clone(),
        v=tensors.v[k_start:k_stop].clone(),
        cu_seqlens_q=cu_seqlens([q_stop - q_start], device),
        cu_seqlens_k=cu_seqlens([k_stop - k_start], device),
    )


class GuardedOutput:
    """An `out` tensor inside a larger buffer of sentinels: `check` fails if anything around it was written.

    A batched output has guard rows around every sequence, a packed one before the first row and after the last. With
    `around_heads` there are guard heads and guard columns as well, so `out` is strided.
    """

    def __init__(self, problem: Problem, device: torch.device | str, *, guard: int = 4, around_heads: bool = False):
        *lead, rows, heads, head_dim_v = problem.out_shape
        extra_heads, extra_columns = (2, 16) if around_heads else (0, 0)
        shape = (*lead, rows + 2 * guard, heads + extra_heads, head_dim_v + extra_columns)
        self._buffer = torch.full(shape, SENTINEL, dtype=problem.dtype, device=device)
        first_head, first_column = extra_heads // 2, extra_columns // 2
        self._inside = (
            ...,
            slice(guard, guard + rows),
            slice(first_head, first_head + heads),
            slice(first_column, first_column + head_dim_v),
        )
        self.out = self._buffer[self._inside]

    def check(self) -> None:
        around = self._buffer.clone()
        around[self._inside] = SENTINEL
        written = (around != SENTINEL).nonzero()
        assert written.numel() == 0, f"{len(written)} guard elements were written, first at {written[0].tolist()}"


def problem_of(tensors: AttentionTensors, **options) -> Problem:
    """The Problem of a public call; options that do not say what is computed are dropped."""
    options = {name: value for name, value in options.items() if name not in ("backend", "scheduler_metadata")}
    return Problem.from_arguments(tensors, **options)


def attention(tensors: AttentionTensors, **options) -> tuple[Tensor, Tensor]:
    """The public function on these tensors: (out, lse). Inputs that only the KV-cache interface has go past it."""
    from flash_attn_cute import flash_attn_varlen_func, interface

    if tensors.leftpad_k is not None or tensors.cache_batch_idx is not None:
        problem = Problem.from_arguments(tensors, return_lse=True, **options)
        return interface._attend(tensors, problem, "auto", None, None)
    public_names = {"query_mask": "attn_mask", "query_bias": "attn_bias"}
    given = {public_names.get(name, name): tensor for name, tensor in tensors._asdict().items() if tensor is not None}
    return flash_attn_varlen_func(**given, return_lse=True, **options)


def check_attention(tensors: AttentionTensors, **options) -> tuple[Tensor, Tensor]:
    """Call the public function and hold its result to the error rule."""
    out, lse = attention(tensors, **options)
    assert_close_to_reference(out, lse, tensors, problem_of(tensors, **options))
    return out, lse


def assert_close_to_reference(
    out: Tensor,
    lse: Tensor | None,
    tensors: AttentionTensors,
    problem: Problem,
    *,
    factor: float = 2.0,
    floor: float = 1e-5,
) -> None:
    """The error rule: the largest error is at most `factor` times that of plain PyTorch in the input dtype + `floor`.

    Both errors are taken against the fp64 reference. The LSE is fp32 throughout: 1e-4 leaves room for the fp32
    accumulation of a few thousand terms and the hardware's approximate exponential, and is far below what a score
    rounded to 16 bits would cost; the relative part covers large scores. -inf must match exactly.
    """
    assert tuple(out.shape) == problem.out_shape, f"out has shape {tuple(out.shape)}, not {problem.out_shape}"
    assert out.dtype == problem.dtype
    with torch.no_grad():
        expected, expected_lse = attention_reference(tensors, problem, round_output=False)
        plain, _ = attention_plain(tensors, problem)
    assert not out.isnan().any(), f"out has {int(out.isnan().sum())} NaN"
    error, plain_error = _largest(out - expected), _largest(plain - expected)
    allowed = factor * plain_error + floor
    assert error <= allowed, f"out is off by {error:.3e}; plain {problem.dtype} by {plain_error:.3e}, so {allowed:.3e}"

    # Rows that see nothing, and rows outside sequences, are exactly zero.
    nothing = expected_lse == float("-inf")
    assert not out[_as_out_rows(nothing)].any(), "rows that see no key are not exactly zero"
    if lse is None:
        return
    assert tuple(lse.shape) == problem.lse_shape, f"lse has shape {tuple(lse.shape)}, not {problem.lse_shape}"
    assert lse.dtype == torch.float32
    assert torch.equal(lse == float("-inf"), nothing), "-inf of lse is not where the reference has it"
    excess = (lse - expected_lse).abs() - 1e-5 * expected_lse.abs()
    worst = _largest(excess.masked_fill(nothing, 0.0).clamp(min=0.0))
    assert worst <= 1e-4, f"lse is off by {worst:.3e}"


def _as_out_rows(of_lse: Tensor) -> Tensor:
    """(H, total_q) or (B, H, Sq) -> (total_q, H) or (B, Sq, H)."""
    return of_lse.transpose(-1, -2)


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0
