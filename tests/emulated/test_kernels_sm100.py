"""Every kernel of tests/emulated/kernels on an emulated Blackwell: pytest --emulate sm_100a tests/emulated"""

from tests.emulated.kernels.collecting import parametrize

ARCHITECTURE = "sm_100a"


def pytest_generate_tests(metafunc):
    parametrize(metafunc, ARCHITECTURE)


def test_kernel(case):
    case.check(case.run())
