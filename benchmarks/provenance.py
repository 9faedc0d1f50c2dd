"""Where the numbers come from: GPU, driver, versions, commit, date and command. A figure without these is a rumour."""

from __future__ import annotations

import importlib.metadata
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def output_of(*command: str) -> str | None:
    """First line a command prints, or None where it is absent or fails."""
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if lines else None


def commit() -> str:
    """The commit, with a mark where tracked files differ from it; a copy without its history has none to tell."""
    revision = output_of("git", "rev-parse", "--short=12", "HEAD")
    if revision is None:
        return "unknown"
    return revision + ("+changes" if output_of("git", "status", "--porcelain", "--untracked-files=no") else "")


def package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def provenance(revision: str | None = None) -> dict[str, str]:
    """What every result file and table starts with. `revision` stands in where there is no git history to ask."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": f"{properties.name} ({properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB)",
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
        "dsl": package_version("nvidia-cutlass-dsl"),
        "python": sys.version.split()[0],
        "commit": revision or commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", *sys.argv]),
    }
