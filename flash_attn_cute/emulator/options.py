"""The emulator's options as a command line has them; the same for `python -m` and for pytest."""

from __future__ import annotations

import argparse
from typing import Any

from flash_attn_cute.emulator.devices import ARCHITECTURES
from flash_attn_cute.emulator.launch import CHECKS, SCHEDULES, EngineOptions


def add_arguments(parser: Any, prefix: str, required: bool) -> None:
    """Adds the options to an argparse parser or a pytest option group. `prefix` keeps pytest's names apart."""
    add = getattr(parser, "addoption", None) or parser.add_argument
    if required:
        add(f"{prefix}arch", dest="arch", required=True, metavar="ARCH", help=f"one of {', '.join(ARCHITECTURES)}")
    add(
        f"{prefix}schedule",
        dest="emulate_schedule",
        choices=SCHEDULES,
        default="in-order",
        help="which warp goes next, and how late asynchronous work completes",
    )
    add(f"{prefix}seed", dest="emulate_seed", type=int, default=0, metavar="N", help="seed of the schedule")
    add(
        f"{prefix}sms",
        dest="emulate_sms",
        type=int,
        default=0,
        metavar="N",
        help="CTAs that are resident at once, and SMs that the device says it has; 0 is the architecture's own number",
    )
    add(
        f"{prefix}check",
        dest="emulate_check",
        type=_checks,
        default="default",
        metavar="A,B",
        help=f"checks by name ({', '.join(CHECKS)}), 'default' (all but races and tcgen05), 'all' or 'none'; "
        "-NAME leaves one out, as in --check=-uninitialised",
    )


def from_arguments(given: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `emulate`."""
    return {
        "schedule": given.emulate_schedule,
        "seed": given.emulate_seed,
        "sms": given.emulate_sms,
        "checks": given.emulate_check,
    }


def _checks(text: str) -> frozenset[str]:
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    try:
        return EngineOptions(checks=names - {"none"}).checks
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
