"""What is measured: each workload is a value that knows its own floating-point operations and its own minimal traffic.

Both counts are exact, not the usual "half of it when causal": a floor computed from an estimate proves nothing.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any


def visible_pairs(len_q: int, len_k: int, causal: bool) -> int:
    """Number of (query, key) pairs that one head of one sequence computes; causal is aligned to the bottom right."""
    if not causal:
        return len_q * len_k
    if len_q <= len_k:
        # Row i sees len_k - len_q + i + 1 keys.
        return len_q * (len_k - len_q) + len_q * (len_q + 1) // 2
    # The first len_q - len_k rows see nothing; the rest is a full triangle.
    return len_k * (len_k + 1) // 2


@dataclass(frozen=True)
class Workload:
    """One attention forward: the lengths of its sequences, its heads, and how its tensors are laid out.

    `packed` asks for (total, heads, dim) tensors with cu_seqlens; otherwise they are (batch, length, heads, dim), which
    needs equal lengths. `group` names the shape family under which a row is summarised.
    """

    name: str
    group: str
    lens_q: tuple[int, ...]
    lens_k: tuple[int, ...]
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    causal: bool
    packed: bool
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if len(self.lens_q) != len(self.lens_k):
            raise ValueError(f"{self.name}: {len(self.lens_q)} query lengths but {len(self.lens_k)} key lengths")
        if self.heads % self.heads_kv:
            raise ValueError(f"{self.name}: {self.heads} query heads are not a multiple of {self.heads_kv} KV heads")
        if not self.packed and not self.equal_lengths:
            raise ValueError(f"{self.name}: a batched workload needs equal lengths; ask for packed=True")

    @property
    def batch(self) -> int:
        return len(self.lens_q)

    @property
    def total_q(self) -> int:
        return sum(self.lens_q)

    @property
    def total_k(self) -> int:
        return sum(self.lens_k)

    @property
    def max_q(self) -> int:
        return max(self.lens_q, default=0)

    @property
    def max_k(self) -> int:
        return max(self.lens_k, default=0)

    @property
    def cu_q(self) -> list[int]:
        """Running sum of the query lengths, from 0: what cu_seqlens_q holds."""
        return [0, *accumulate(self.lens_q)]

    @property
    def cu_k(self) -> list[int]:
        return [0, *accumulate(self.lens_k)]

    @property
    def equal_lengths(self) -> bool:
        """Whether the same tensors can also be seen as a batch."""
        return len(set(self.lens_q)) <= 1 and len(set(self.lens_k)) <= 1

    @property
    def square(self) -> bool:
        """Whether every sequence has as many queries as keys, where top-left and bottom-right causal agree."""
        return self.lens_q == self.lens_k

    def described(self) -> dict[str, Any]:
        """What a result file says of it: sizes, not thousands of lengths, which the preset makes again."""
        fields = {key: value for key, value in asdict(self).items() if key not in ("lens_q", "lens_k")}
        sizes = {key: getattr(self, key) for key in ("batch", "total_q", "total_k", "max_q", "max_k")}
        return {**fields, **sizes, "flops": self.flops, "min_bytes": self.min_bytes}

    @property
    def pairs(self) -> int:
        return sum(visible_pairs(q, k, self.causal) for q, k in zip(self.lens_q, self.lens_k, strict=True))

    @property
    def flops(self) -> int:
        """Both products, a multiply and an add each, over the pairs that are visible."""
        return 2 * self.pairs * self.heads * (self.head_dim + self.head_dim_v)

    @property
    def min_bytes(self) -> int:
        """q, k, v and out moved once each. Keys of a sequence without queries need not be read."""
        element = 4 if self.dtype == "float32" else 2
        query_side = self.total_q * self.heads * (self.head_dim + self.head_dim_v)
        keys_needed = sum(k for q, k in zip(self.lens_q, self.lens_k, strict=True) if q)
        key_side = keys_needed * self.heads_kv * (self.head_dim + self.head_dim_v)
        return element * (query_side + key_side)

    def floor_seconds(self, matmul_flops_per_s: float, read_bytes_per_s: float) -> float:
        """No kernel on this GPU can be faster: the larger of the arithmetic and the traffic."""
        return max(self.flops / matmul_flops_per_s, self.min_bytes / read_bytes_per_s)


def equal(
    batch: int,
    length: int,
    *,
    causal: bool,
    heads: int = 16,
    heads_kv: int | None = None,
    head_dim: int = 128,
    head_dim_v: int | None = None,
    packed: bool = False,
) -> Workload:
    """A workload of `batch` sequences of one length, named after its shape."""
    heads_kv = heads if heads_kv is None else heads_kv
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    dims = f"d{head_dim}" if head_dim == head_dim_v else f"d{head_dim}-{head_dim_v}"
    gqa = "" if heads == heads_kv else f" {heads}/{heads_kv}"
    return Workload(
        name=f"{dims} {batch}x{length}{gqa} {'causal' if causal else 'full'}{' packed' if packed else ''}",
        group=dims,
        lens_q=(length,) * batch,
        lens_k=(length,) * batch,
        heads=heads,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        causal=causal,
        packed=packed,
    )


def ragged(
    name: str, lens_q: list[int], lens_k: list[int] | None = None, *, heads: int = 32, heads_kv: int = 8
) -> Workload:
    """A packed causal workload of head dimension 128 with lengths of its own."""
    return Workload(
        name=name,
        group="ragged",
        lens_q=tuple(lens_q),
        lens_k=tuple(lens_q if lens_k is None else lens_k),
        heads=heads,
        heads_kv=heads_kv,
        head_dim=128,
        head_dim_v=128,
        causal=True,
        packed=True,
    )


def tiny_sequences() -> Workload:
    """Thousands of sequences far shorter than a tile: the cost of a sequence, not of its arithmetic."""
    rng = random.Random(0)
    return ragged("tiny 4096x1..20 32/8 causal", [rng.randint(1, 20) for _ in range(4096)])


def long_tail() -> Workload:
    """Mostly short sequences and a few very long ones: whoever schedules the long ones last waits for them."""
    rng = random.Random(1)
    lengths = [min(16384, int(32 * rng.paretovariate(0.8))) for _ in range(255)] + [16384]
    rng.shuffle(lengths)
    return ragged("long-tail 256x32..16384 32/8 causal", lengths)


def prefill_among_decodes() -> Workload:
    """A few prefill chunks (compute-bound) among many decodes (memory-bound), as an inference engine batches them."""
    rng = random.Random(2)
    lens_q = [2048] * 4 + [1] * 96
    lens_k = [2048, 4096, 6144, 8192] + [rng.randint(1024, 16384) for _ in range(96)]
    return ragged("mixed 4 prefills + 96 decodes 32/8 causal", lens_q, lens_k)


D128_SHAPES = ((16, 1024), (4, 4096), (1, 16384))
SHORT_SEQUENCES = equal(512, 128, causal=True, heads=32, heads_kv=8, packed=True)


def dense_preset() -> list[Workload]:
    rows = [equal(batch, length, causal=causal) for batch, length in D128_SHAPES for causal in (False, True)]
    for head_dim, head_dim_v in ((64, 64), (256, 256), (192, 128)):
        rows += [equal(2, 8192, causal=causal, head_dim=head_dim, head_dim_v=head_dim_v) for causal in (False, True)]
    return rows


def varlen_preset() -> list[Workload]:
    rows = [
        equal(batch, length, causal=causal, packed=True) for batch, length in D128_SHAPES for causal in (False, True)
    ]
    return [*rows, SHORT_SEQUENCES, tiny_sequences(), long_tail(), prefill_among_decodes()]


def quick_preset() -> list[Workload]:
    return [equal(4, 4096, causal=False), equal(4, 4096, causal=True, packed=True), SHORT_SEQUENCES]


PRESETS = {
    "dense": dense_preset,
    "varlen": varlen_preset,
    "quick": quick_preset,
    "all": lambda: [*dense_preset(), *varlen_preset()],
}

# The smallest problem that still launches a kernel: its GPU time is far below its host time, which is what it is for.
HOST_TIME_WORKLOAD = replace(equal(1, 128, causal=True, packed=True), name="host time of an eager call")
