"""A mask of keys with a bias of each query, in one call: python examples/mixed.py

The rank of each argument says what it belongs to: 2 dimensions to keys, 3 to queries.
"""

import torch
from ragged_decode import HEADS_KV, Batch, all_heads, attend, check, for_each_query, print_memory


def main() -> None:
    batch = Batch.random([8, 1, 3], [90, 64, 200])
    generator = torch.Generator().manual_seed(1)
    attn_mask = torch.rand(len(batch.k), 1, generator=generator) < 0.6  # (total_k, 1)
    attn_bias = torch.randn(len(batch.q), HEADS_KV, batch.max_seqlen_k, generator=generator)  # (total_q, Hk, longest)

    out, computed_by = attend(batch, attn_mask=attn_mask, attn_bias=attn_bias)
    print(f"out {tuple(out.shape)} by {computed_by}; a mask {tuple(attn_mask.shape)}, a bias {tuple(attn_bias.shape)}")
    dense = for_each_query(batch, attn_mask), all_heads(attn_bias)
    check(batch, out, *dense, attn_mask=attn_mask, attn_bias=attn_bias)
    print_memory(batch, "the mask")
    equal = Batch.random([1] * 3, [200] * 3)
    print_memory(equal, "a mask for one query a sequence, equal lengths")


if __name__ == "__main__":
    main()
