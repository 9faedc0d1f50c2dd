"""The Hopper and the Blackwell forward on the same inputs, each in an emulator of its own, agree within rounding."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.attention_cases import attention, build_tensors, problem_of

CASES = {
    "d64-causal": ({"head_dim": 64}, {"causal": True}),
    "d192-128-full-large-scores": ({"head_dim": 192, "head_dim_v": 128}, {"softmax_scale": 0.7}),
}
LENGTHS_Q, LENGTHS_K = [150, 1, 0, 3], [150, 300, 7, 0]


def inputs(name):
    build, options = CASES[name]
    return build_tensors(LENGTHS_Q, LENGTHS_K, **build), options


def run_cases(target: str) -> None:
    """In the process of one architecture: saves (out, lse) of each case."""
    results = {}
    for name in CASES:
        tensors, options = inputs(name)
        on_device = type(tensors)(*(None if tensor is None else tensor.cuda() for tensor in tensors))
        results[name] = [result.cpu() for result in attention(on_device, **options)]
    torch.save(results, target)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agree")
    found = {}
    for arch in ("sm_90a", "sm_100a"):
        target = folder / f"{arch}.pt"
        program = [sys.executable, "-m", "flash_attn_cute.emulator", "--arch", arch, __file__, str(target)]
        subprocess.run(program, check=True, timeout=600, cwd=Path(__file__).resolve().parents[2])
        found[arch] = torch.load(target)
    return found


@pytest.mark.parametrize("name", CASES)
def test_hopper_and_blackwell_agree(results, name):
    """As close to each other as a plain computation in the input type is to the exact result."""
    from flash_attn_cute.reference import attention_plain, attention_reference

    tensors, options = inputs(name)
    problem = problem_of(tensors, **options)
    (hopper, hopper_lse), (blackwell, blackwell_lse) = results["sm_90a"][name], results["sm_100a"][name]
    exact, _ = attention_reference(tensors, problem, round_output=False)
    rounding = (attention_plain(tensors, problem)[0] - exact).abs().max()
    assert (hopper.double() - blackwell.double()).abs().max() <= rounding
    assert torch.equal(hopper_lse.isinf(), blackwell_lse.isinf())
    visible = ~hopper_lse.isinf()
    torch.testing.assert_close(hopper_lse[visible], blackwell_lse[visible], rtol=1e-6, atol=1e-5)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    run_cases(sys.argv[1])
