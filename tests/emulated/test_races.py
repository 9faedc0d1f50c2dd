"""Each kind of race is noticed, in whatever order things happened, and its twin with the synchronisation is clean."""

import numpy as np
import pytest

from flash_attn_cute.emulator import errors
from flash_attn_cute.emulator.engine import Engine
from flash_attn_cute.emulator.launch import CHECKS, SCHEDULES, Allocation, EngineOptions, LaunchRecord
from tests.emulated.race_programs import PROGRAMS

RACES_ALONE = {"races", "tcgen05"}
RACES = [(name, missing) for name, program in PROGRAMS.items() for missing in program.missing]


def run(program, without=None, schedule="in-order", seed=0, checks=("all",)):
    array = np.zeros(80, np.uint32)
    start = -array.ctypes.data % 64 // 4  # bulk copies want 16 bytes
    memory = array[start : start + 64]
    allocation = Allocation(memory.ctypes.data, memory.nbytes, "the array")
    params = np.array([memory.ctypes.data], np.uint64).tobytes()
    geometry = (program.grid, 1, 1), (program.block, 1, 1), (program.cluster, 1, 1)
    record = LaunchRecord(program.text(without), "k", program.arch, *geometry, 0, params, [allocation])
    return Engine(EngineOptions(schedule, seed, 2, frozenset(checks))).run(record)


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_synchronised_is_clean(name):
    for schedule in SCHEDULES:
        for seed in range(1 if schedule == "in-order" else 4):
            run(PROGRAMS[name], schedule=schedule, seed=seed)


@pytest.mark.parametrize(("name", "missing"), RACES)
def test_what_is_not_is_told_with_both_lines(name, missing):
    program = PROGRAMS[name]
    with pytest.raises(errors.Race, match="nothing orders") as told:
        run(program, missing, checks=RACES_ALONE)  # others may fire first: what nobody waits for may not be there yet
    expected = sorted(program.line(line) for line in program.missing[missing])
    assert sorted((told.value.line, told.value.other_line)) == expected, told.value
    lines = program.text(missing).splitlines()
    assert all(f"PTX line {line}: {lines[line - 1].strip()[:60]}" in str(told.value) for line in expected)


@pytest.mark.parametrize(("name", "missing"), RACES)
def test_what_is_not_is_told_under_every_schedule(name, missing):
    for schedule in SCHEDULES[1:]:
        for seed in range(3):
            # Where nobody waits, a barrier or tensor memory may be gone when the last access comes.
            with pytest.raises((errors.Race, errors.BarrierMisuse, errors.OutOfBounds)):
                run(PROGRAMS[name], missing, schedule, seed, RACES_ALONE)


def test_races_are_not_looked_for_by_default():
    assert "races" in CHECKS
    program = PROGRAMS["lanes of a warp"]
    run(program, "warp", checks={"default"})
    for checks in ({"races"}, {"default", "races"}, {"all"}):
        with pytest.raises(errors.Race):
            run(program, "warp", checks=checks)


def test_the_letter_of_tensor_memory_is_a_check_of_its_own():
    program = PROGRAMS["tensor memory"]
    run(program, "loaded", checks={"default", "races"})
    with pytest.raises(errors.Race, match="no tcgen05.wait::ld"):
        run(program, "loaded", checks={"tcgen05"})


def test_unknown_checks_are_refused():
    with pytest.raises(ValueError, match="checks: got race; takes names of default, all, bounds"):
        EngineOptions(checks=frozenset({"races", "race"}))
