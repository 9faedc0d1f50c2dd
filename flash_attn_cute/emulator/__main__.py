"""python -m flash_attn_cute.emulator --arch sm_100a SCRIPT [ARGS...]: runs a CuTe DSL program as it is, on the CPU."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path

from flash_attn_cute.emulator import options
from flash_attn_cute.emulator.session import Session, emulate


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn_cute.emulator",
        description="Run a Python program that uses CuTe DSL with its kernels emulated on the CPU.",
    )
    options.add_arguments(parser, prefix="--", required=True)
    parser.add_argument("--report", metavar="FILE", help="write every launch's counters to FILE, as JSON")
    parser.add_argument("script", metavar="SCRIPT", help="the program")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")
    given = parser.parse_args(arguments)
    with emulate(given.arch, **options.from_arguments(given)) as session:
        try:
            _run(given.script, given.args)
        finally:
            if given.report:
                _write_report(Path(given.report), session)


def _run(script: str, args: list[str]) -> None:
    """As `python SCRIPT ARGS` would: its own argv, and its directory first on the path."""
    sys.argv = [script, *args]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


def _write_report(path: Path, session: Session) -> None:
    content = {"arch": session.arch, "launches": [launch.as_dict() for launch in session.launches]}
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
