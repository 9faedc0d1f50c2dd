"""Mutation: a missing wait is noticed, a fence that only hardware needs is not, and a wrong program is no baseline."""

import subprocess
import sys
from pathlib import Path

import pytest

from flash_attn_cute.emulator import mutations

REPOSITORY = Path(__file__).resolve().parents[2]

# What is compiled stays in a module, so that the runs of the script do not compile again.
COMPILED = """
from tests.emulated.kernels import mbarrier_pipeline
from tests.emulated.kernels.random_integers import RandomIntegers

config = mbarrier_pipeline.Config("tma", stages=1, steps=3)
kernel = mbarrier_pipeline.build(config)
tensors = mbarrier_pipeline.tensors(config, RandomIntegers())
expected = mbarrier_pipeline.reference(*tensors)[0]
"""
SCRIPT = """
import sys
from compiled import expected, kernel, tensors

x, out = (tensor.clone().cuda() for tensor in tensors)
kernel(x, out)
assert (out.cpu() == expected).all()
sys.exit(sys.argv[1:] == ["wrong"])
"""


@pytest.fixture
def mutate(tmp_path):
    """Runs the command over the pipeline with one stage that TMA fills; a process of its own, as it forks."""
    (tmp_path / "compiled.py").write_text(COMPILED)
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(*arguments, after=()):
        command = [sys.executable, "-m", "flash_attn_cute.emulator.mutate", "--arch", "sm_90a", *arguments]
        command += [str(tmp_path / "script.py"), *after]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)

    return run


def outcomes(output):
    """From each mutant's line to what noticed it, without its details."""
    lines = output.splitlines()
    mutants = [n for n, line in enumerate(lines) if line.startswith("PTX line")]
    return [(" ".join(lines[n].split()[3:]), lines[n + 1].split()[0].rstrip(":")) for n in mutants]


def test_a_missing_wait_is_noticed_and_a_fence_survives(mutate):
    result = mutate("--verbose", "--seconds", "10")
    assert result.returncode == 0, result.stderr[-3000:]
    found = outcomes(result.stdout)
    # A fresh ring is empty, and nobody waits for the last stage to become so: one wait and one arrival are not needed.
    waits = [outcome for what, outcome in found if what.startswith("passed: mbarrier.try_wait")]
    assert len(waits) >= 4 and waits.count("survived") == 1, result.stdout
    arrivals = [outcome for what, outcome in found if what.startswith("deleted: mbarrier.arrive")]
    assert len(arrivals) >= 4 and arrivals.count("survived") == 1, result.stdout
    assert ("deleted: fence.mbarrier_init.release.cluster", "survived") in found
    assert "fence.mbarrier_init.release.cluster" in result.stdout.partition("\nsurvived: ")[2]
    noticed = sum(outcome != "survived" for _, outcome in found)
    assert f"noticed: {noticed} of {len(found)} " in result.stdout


def test_the_race_check_notices_the_fence_as_well(mutate):
    result = mutate("--check", "all", "--verbose", "--seconds", "10", "--seeds", "1")
    assert result.returncode == 0, result.stderr[-3000:]
    found = outcomes(result.stdout)
    assert ("deleted: fence.mbarrier_init.release.cluster", "Race") in found
    # What is left: nobody waits for what the last arrival says, nor for the lanes before it, and a fresh ring is empty.
    survivors = sorted(what.split()[1] for what, outcome in found if outcome == "survived")
    assert survivors == ["bar.warp.sync", "mbarrier.arrive.shared.b64", "mbarrier.try_wait.parity.shared.b64"], (
        result.stdout
    )


def test_a_program_that_is_wrong_by_itself_is_refused(mutate):
    result = mutate("--limit", "1", after=["wrong"])
    assert result.returncode == 1 and "noticed" not in result.stdout


PTX = """.version 8.8
.target sm_90a
.address_size 64

.visible .entry other() { fence.sc.cta; ret; }
.visible .entry k(.param .u64 p0)
{
// bar.sync 0;
{ .reg .pred P1;
WAIT: mbarrier.try_wait.parity.shared.b64 P1, [%r1], 0;
@P1 bra DONE; bra WAIT; DONE: }
@!%p1 mbarrier.arrive.expect_tx.shared.b64
    _, [%r1], 4;
ld.acquire.gpu.global.b32 %r2, [%rd0]; ld.relaxed.gpu.global.b32 %r2, [%rd0];
fence.proxy.async; cp.async.bulk.wait_group.read 0; bar.arrive 1, 64; barrier.cluster.wait.acquire;
mbarrier.init.shared.b64 [%r1], 1; wgmma.mma_async.sync {%r1}, 1;
}
"""
SITES = [
    (10, "mbarrier.try_wait.parity.shared.b64 P1, [%r1], 0", "setp.eq.u32 P1, 0, 0", "passed"),
    (12, "@!%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 4", "", "deleted"),
    (14, "ld.acquire.gpu.global.b32 %r2, [%rd0]", "ld.relaxed.gpu.global.b32 %r2, [%rd0]", "relaxed"),
    (15, "fence.proxy.async", "", "deleted"),
    (15, "cp.async.bulk.wait_group.read 0", "", "deleted"),
    (15, "bar.arrive 1, 64", "", "deleted"),
    (15, "barrier.cluster.wait.acquire", "", "deleted"),
]


def test_sites_and_their_replacements():
    sites = mutations.find_sites(PTX, "k")
    assert [(site.line, site.statement, site.replacement, site.change) for site in sites] == SITES
    lines = PTX.count("\n")
    for site in sites:
        mutant = mutations.without(PTX, site)
        assert mutant.count("\n") == lines and len(mutations.find_sites(mutant, "k")) == len(sites) - 1
    assert mutations.marked(PTX, sites).count("\n") == lines
    with pytest.raises(ValueError, match="no entry 'none'"):
        mutations.find_sites(PTX, "none")
