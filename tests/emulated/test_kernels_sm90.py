"""Every kernel of tests/emulated/kernels on an emulated Hopper: pytest --emulate sm_90a tests/emulated"""

from tests.emulated.kernels.collecting import parametrize

ARCHITECTURE = "sm_90a"


def pytest_generate_tests(metafunc):
    parametrize(metafunc, ARCHITECTURE)


def test_kernel(case):
    case.check(case.run())
