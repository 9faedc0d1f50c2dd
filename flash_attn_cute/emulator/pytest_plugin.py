"""pytest --emulate sm_100a: every test runs in the emulator, as its tests would on that GPU.

Loaded with `-p flash_attn_cute.emulator.pytest_plugin`, or by a conftest.py that names it in `pytest_plugins`. Without
--emulate it does nothing, and tests that take the `emulation` fixture are skipped.
"""

from __future__ import annotations

import contextlib

import pytest

from flash_attn_cute.emulator import options

_session = contextlib.ExitStack()


def pytest_addoption(parser):
    group = parser.getgroup("emulate", "kernels on the CPU")
    group.addoption(
        "--emulate", metavar="ARCH", default=None, help="run in the emulator, as a GPU of this architecture"
    )
    options.add_arguments(group, prefix="--emulate-", required=False)


def pytest_configure(config):
    arch = config.getoption("--emulate")
    if arch:
        # Before any test module is imported, for it may import the DSL.
        from flash_attn_cute.emulator.session import emulate

        _session.enter_context(emulate(arch, **options.from_arguments(config.option)))


def pytest_unconfigure(config):
    _session.close()


@pytest.fixture
def emulation():
    """The session in progress; its launches are those of this test."""
    from flash_attn_cute.emulator.session import current_session

    session = current_session()
    if session is None:
        pytest.skip("runs under --emulate ARCH")
    session.launches.clear()
    return session
