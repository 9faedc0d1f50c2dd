"""A gate and a bias of each cached key, the same for every query: python examples/key_side.py

Scores of keys (an eviction policy, a learned gate, a position bias) are made once and not copied per query.
"""

import torch
from ragged_decode import HEADS_KV, Batch, attend, check, for_each_query, print_memory


def main() -> None:
    # Two decodes, a speculative decode of four tokens, and a prefill chunk of 24 that continues a longer context.
    batch = Batch.random([1, 1, 4, 24], [700, 33, 256, 310])
    generator = torch.Generator().manual_seed(1)
    importance = torch.randn(len(batch.k), HEADS_KV, generator=generator)
    key_mask = importance > -0.5  # (total_k, Hk), True keeps
    key_bias = importance.bfloat16()  # (total_k, Hk)

    out, computed_by = attend(batch, key_mask=key_mask, key_bias=key_bias)
    print(f"out {tuple(out.shape)} by {computed_by}; {key_mask.float().mean():.0%} of the keys kept")
    every_query = for_each_query(batch, key_mask), for_each_query(batch, key_bias)
    check(batch, out, *every_query, key_mask=key_mask, key_bias=key_bias)

    print_memory(batch, "this batch")
    ragged = Batch.random([1] * 4, [700, 33, 256, 310])
    print_memory(ragged, "one query a sequence, ragged")
    equal = Batch.random([1] * 4, [256] * 4)
    print_memory(equal, "one query a sequence, equal lengths")
    print("With one query a sequence the two layouts differ in padding only; where lengths are equal, in nothing.")


if __name__ == "__main__":
    main()
