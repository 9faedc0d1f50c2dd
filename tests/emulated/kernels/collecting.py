"""Cases as pytest parameters. Without the emulator of their architecture they are one skipped test, and no import."""

import pytest


def parametrize(metafunc: pytest.Metafunc, architecture: str) -> None:
    """Gives `case` every case of `architecture`, where pytest was started with --emulate of it."""
    if "case" not in metafunc.fixturenames:
        return
    if metafunc.config.getoption("emulate", default=None) == architecture:
        from tests.emulated.kernels.catalogue import cases

        found = [pytest.param(case, id=case.name) for case in cases(architecture)]
    else:
        reason = f"runs in the emulator: pytest --emulate {architecture} {metafunc.definition.path.name}"
        found = [pytest.param(None, id=architecture, marks=pytest.mark.skip(reason=reason))]
    metafunc.parametrize("case", found)
