"""Every case of an architecture."""

import importlib

from tests.emulated.kernels.case import Case

EITHER = (
    "elementwise",
    "divergence",
    "named_barriers",
    "mbarrier_pipeline",
    "cp_async",
    "matrix_moves",
    "bulk_copy",
    "tma_copy",
    "tma_reduce",
    "tma_multicast",
    "distributed_shared",
    "persistent_atomic",
)
MODULES = {
    "sm_90a": (*EITHER, "wgmma_gemm"),
    "sm_100a": (
        *EITHER,
        "tensor_memory_moves",
        "tensor_memory_copy",
        "tcgen05_gemm",
        "cluster_launch_control",
    ),
}


def cases_by_module(architecture: str) -> dict[str, list[Case]]:
    """The cases that run on `architecture`, which this process has to compile for (CUTE_DSL_ARCH)."""
    modules = {name: importlib.import_module(f"tests.emulated.kernels.{name}") for name in MODULES[architecture]}
    found = {name: module.cases() for name, module in modules.items()}
    names = [case.name for cases in found.values() for case in cases]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return found


def cases(architecture: str) -> list[Case]:
    return [case for cases in cases_by_module(architecture).values() for case in cases]
