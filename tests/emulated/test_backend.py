"""backend="emulator": CPU tensors through the compiled SM90 kernel, held to the reference."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

# In a process of its own: the DSL takes its architecture and its runtime once.
PROGRAM = """
import torch
from flash_attn_cute import flash_attn_varlen_func
from tests.attention_cases import assert_close_to_reference, build_tensors, problem_of

tensors = build_tensors([70, 0, 5], [130, 3, 64], head_dim=64)
options = {"causal": True, "return_lse": True}
out, lse = flash_attn_varlen_func(*tensors[:5], **options, backend="emulator")
assert out.device.type == "cpu" and lse.device.type == "cpu"
assert_close_to_reference(out, lse, tensors, problem_of(tensors, **options))

given = torch.full_like(out, float("nan"))
again = flash_attn_varlen_func(*tensors[:5], causal=True, out=given, backend="emulator")
assert again is given and torch.equal(given, out)
print("right")
"""


def test_cpu_tensors_run_the_compiled_kernel():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0 and result.stdout.endswith("right\n"), result.stderr[-3000:]


def test_a_served_model_is_right():
    """Through the kernels: chunks of prompts among decodes over pages, one plan a step."""
    options = ["--backend", "emulator", "--requests", "2", "--new-tokens", "2", "--longest-prompt", "50"]
    command = [sys.executable, "scripts/serve.py", *options]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0 and "4 of 4 tokens compared: equal" in result.stdout, result.stdout + result.stderr
