"""A mask and a bias of each query: python examples/per_query.py

The compatibility form in three dimensions, (total_q, H*, max_seqlen_k): column j is the j-th key of a query's sequence.
"""

import torch
from ragged_decode import HEADS, Batch, all_heads, attend, check, print_memory


def main() -> None:
    batch = Batch.random([5, 1, 16], [40, 120, 16])
    generator = torch.Generator().manual_seed(1)
    shape = (len(batch.q), 1, batch.max_seqlen_k)
    attn_mask = torch.rand(shape, generator=generator) < 0.7  # one for all heads
    attn_bias = torch.randn(len(batch.q), HEADS, batch.max_seqlen_k, generator=generator).bfloat16()  # one a head

    out, computed_by = attend(batch, attn_mask=attn_mask, attn_bias=attn_bias)
    print(f"out {tuple(out.shape)} by {computed_by}; a mask {tuple(attn_mask.shape)}, a bias {tuple(attn_bias.shape)}")
    check(batch, out, all_heads(attn_mask), attn_bias, attn_mask=attn_mask, attn_bias=attn_bias)
    print_memory(batch, "were they of keys alone")
    equal = Batch.random([1] * 3, [120] * 3)
    print_memory(equal, "likewise for one query a sequence, equal lengths")


if __name__ == "__main__":
    main()
