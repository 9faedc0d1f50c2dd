"""python -m flash_attn_cute.emulator --arch sm_100a SCRIPT [ARGS...]: runs a CuTe DSL program as it is, on the CPU."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path

from flash_attn_cute.emulator import options, report_text
from flash_attn_cute.emulator.session import Session, emulate


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn_cute.emulator",
        description="Run a Python program that uses CuTe DSL with its kernels emulated on the CPU.",
    )
    options.add_arguments(parser, prefix="--", required=True)
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="write what every launch cost to FILE: tables if it ends in .txt or is - (standard output), else JSON",
    )
    parser.add_argument("script", metavar="SCRIPT", help="the program")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")
    given = parser.parse_args(arguments)
    with emulate(given.arch, **options.from_arguments(given)) as session:
        try:
            _run(given.script, given.args)
        finally:
            if given.report:
                _write_report(given.report, session)


def _run(script: str, args: list[str]) -> None:
    """As `python SCRIPT ARGS` would: its own argv, and its directory first on the path."""
    sys.argv = [script, *args]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


def _write_report(target: str, session: Session) -> None:
    if target == "-" or target.endswith(".txt"):
        content = "\n\n".join(map(report_text.render, session.launches))
    else:
        launches = [launch.as_dict() for launch in session.launches]
        content = json.dumps({"arch": session.arch, "launches": launches}, indent=1)
    if target == "-":
        print(content)
    else:
        Path(target).write_text(content + "\n")


if __name__ == "__main__":
    main()
