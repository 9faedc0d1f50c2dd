"""flash-attn-4 adding a bias to the scores of each key, with the means it has: a score_mod that reads an aux tensor."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache

from benchmarks.key_side import KeySideInputs
from benchmarks.peers import Attention, FlashAttention4, first
from benchmarks.workloads import Workload


class ScoreModFlashAttention4(FlashAttention4):
    """Packed keys alone: in pages a score_mod is not told where a key lies. Without a bias it is the plain call."""

    takes_pages = False

    def make(self, workload: Workload, inputs: KeySideInputs) -> Attention:
        function = importlib.import_module(self.module).flash_attn_varlen_func
        q, k, v, bias = inputs.q, inputs.k, inputs.v, inputs.key_bias
        arguments = inputs.inputs.varlen_arguments(workload) | self.options()
        if bias is not None:
            score_mod = adding_bias_of_keys(workload.heads // bias.shape[1])
            arguments |= {"score_mod": score_mod, "aux_tensors": [bias]}
        return lambda: first(function(q, k, v, **arguments))


@cache
def adding_bias_of_keys(heads_a_bias: int) -> Callable:
    """A score_mod: aux tensor 0, (total_k, H*), is added to scaled scores; query heads h // heads_a_bias share one.

    It is handed one score at a time, which is what the interface does for whoever reads an aux tensor.
    """
    import cutlass
    from cutlass import cute

    @cute.jit
    def add_bias_of_key(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        bias = aux_tensors[0]
        place = cute.make_rmem_tensor(2, cutlass.Int32)
        place[0] = (kv_idx + seqlen_info.offset_k)[0]
        place[1] = head[0] // heads_a_bias
        found = cute.make_rmem_tensor(1, bias.element_type)
        found[0] = bias[place[0], place[1]]
        return score + found.load().to(cutlass.Float32)

    return add_bias_of_key
