"""Writing to a key-value cache in plain PyTorch: what the kernels of append_kv.py and store_kv.py do, as a loop.

The specification of those kernels and what CPU tensors get. Contents that make no sense are errors here, where a kernel
can only leave them out:

- a position of cos and sin that the tables do not have (kernel: NaN);
- a new key past the end of the cache, or in a table entry or cache row that does not exist (kernel: not written).

One case is none: where the first new key of a sequence would lie in a table entry or cache row below 0, the sequence
is an empty slot of a batch that was made for more, and nothing is appended to it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_cute.kv_cache_arguments import KvCacheTensors, Rotary


def rotate(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of x (tokens, heads, D) at positions (tokens,), in fp32 or wider, rounded to the dtype of x.

    cos, sin: (positions, rotary_dim / 2). Raises ValueError for a position that they do not have.
    """
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < cos.shape[0]:
        raise ValueError(f"rotary_cos: got {cos.shape[0]} positions; takes at least {int(positions.max()) + 1} here")
    half = cos.shape[1]
    compute = torch.promote_types(x.dtype, torch.float32)
    c, s = (table[positions.long()].to(compute)[:, None] for table in (cos, sin))
    rotated, rest = x[..., : 2 * half].to(compute), x[..., 2 * half :]
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    a, b = rotated[..., first], rotated[..., second]
    result = torch.empty_like(rotated)
    result[..., first], result[..., second] = a * c - b * s, b * c + a * s
    return torch.cat([result.to(x.dtype), rest], dim=-1)


def append(t: KvCacheTensors, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """Writes the new keys and values of a call in place. Returns q, rotated, and the lengths afterwards, (B,) int32."""
    cached = t.cache_seqlens.tolist()
    starts = cached if t.rotary_seqlens is None else t.rotary_seqlens.tolist()
    lengths = list(cached)
    for batch, rows in enumerate(_token_rows(t.k, t.cu_seqlens_k_new, len(cached))):
        place = _places(t, batch, cached[batch], rows.stop - rows.start)
        if place is None:
            continue
        k, v = (x.reshape(-1, *x.shape[-2:])[rows] for x in (t.k, t.v))
        if rotary is not None:
            k = rotate(k, starts[batch] + torch.arange(len(k)), t.rotary_cos, t.rotary_sin, rotary.interleaved)
        t.k_cache[place.rows, place.offsets] = k
        t.v_cache[place.rows, place.offsets] = v
        lengths[batch] += len(k)
    q = t.q if rotary is None else _rotated_queries(t, rotary, starts)
    return q, torch.tensor(lengths, dtype=torch.int32, device=t.q.device)


def _rotated_queries(t: KvCacheTensors, rotary: Rotary, starts: list[int]) -> Tensor:
    flat = t.q.reshape(-1, *t.q.shape[-2:])
    rotated = flat.clone()
    for batch, rows in enumerate(_token_rows(t.q, t.cu_seqlens_q, len(starts))):
        count = rows.stop - rows.start
        behind = torch.arange(count) if rotary.queries_advance else torch.zeros(count, dtype=torch.long)
        positions = starts[batch] + behind
        rotated[rows] = rotate(flat[rows], positions, t.rotary_cos, t.rotary_sin, rotary.interleaved)
    return rotated.reshape(t.q.shape)


def _token_rows(x: Tensor, cu_seqlens: Tensor | None, batch_size: int) -> list[slice]:
    """Each sequence's rows of x, its batch and token dimensions taken as one."""
    if cu_seqlens is None:
        return [slice(batch * x.shape[1], (batch + 1) * x.shape[1]) for batch in range(batch_size)]
    bounds = cu_seqlens.tolist()
    return [slice(bounds[batch], bounds[batch + 1]) for batch in range(batch_size)]


class _Places(NamedTuple):
    rows: Tensor
    offsets: Tensor


def _places(t: KvCacheTensors, batch: int, start: int, count: int) -> _Places | None:
    """Where new keys go, or None where nothing is appended."""
    positions = start + torch.arange(count)
    if count == 0:
        return None
    size = t.k_cache.shape[1]
    room = size if t.page_table is None else size * t.page_table.shape[1]
    if not 0 <= start <= start + count <= room:
        raise ValueError(f"cache_seqlens: got {start} and {count} new keys; takes a sum of at most {room}")
    if t.page_table is not None:
        name, rows, offsets = "page_table", t.page_table[batch].cpu()[positions // size].long(), positions % size
    else:
        row = batch if t.cache_batch_idx is None else int(t.cache_batch_idx[batch])
        name, rows, offsets = "cache_batch_idx", torch.full((count,), row), positions
    if int(rows[0]) < 0:
        return None
    if not 0 <= int(rows.min()) <= int(rows.max()) < t.k_cache.shape[0]:
        raise ValueError(f"{name}: got {rows.tolist()} for new keys; takes rows from 0 to {t.k_cache.shape[0] - 1}")
    return _Places(rows, offsets)


def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes the tokens of `slot_mapping` in place; negative slots are skipped. Raises ValueError for slots past the
    end of the cache."""
    page_size = k_cache.shape[1]
    kept = slot_mapping >= 0
    slots = slot_mapping[kept].long()
    if slots.numel() and int(slots.max()) >= k_cache.shape[0] * page_size:
        raise ValueError(f"slot_mapping: got {int(slots.max())}; takes slots below {k_cache.shape[0] * page_size}")
    tokens = kept.nonzero()[:, 0]
    k_cache[slots // page_size, slots % page_size] = k[tokens]
    v_cache[slots // page_size, slots % page_size] = v[tokens]
