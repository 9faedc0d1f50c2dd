"""Compiles every case, and runs none: CUTE_DSL_ARCH=sm_90a python -m tests.emulated.kernels [PART OF A NAME ...]"""

import os
import sys
import time
import traceback


def main() -> int:
    architecture = os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")
    # After the architecture is set: the DSL reads it when it is imported.
    from tests.emulated.kernels.catalogue import cases

    wanted = [case for case in cases(architecture) if all(part in case.name for part in sys.argv[1:])]
    failures = []
    for case in wanted:
        start = time.perf_counter()
        try:
            case.build()
            case.expected()
        except Exception:  # noqa: BLE001
            traceback.print_exc()
            failures.append(case.name)
        print(f"{time.perf_counter() - start:6.2f} s  {case.name}", flush=True)
    print(f"{len(wanted) - len(failures)} of {len(wanted)} cases compile for {architecture}")
    for name in failures:
        print(f"  failed: {name}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
