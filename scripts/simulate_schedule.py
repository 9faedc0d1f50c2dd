#!/usr/bin/env python
"""Show what schedulers make of a ragged batch, without a GPU: a table, and a timeline of every SM.

    python scripts/simulate_schedule.py --pattern mixed --plot mixed.png
    python scripts/simulate_schedule.py --decode 96x1024:16384 --prefill 4x2048 --heads 32/8
    python scripts/simulate_schedule.py --pattern one-huge --schedulers dynamic planned --sms 78

What is simulated, and what is not, stands in benchmarks/schedule_simulation.py. --plot needs matplotlib, which the
extra `bench` brings.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import workloads
from benchmarks.schedule_simulation import SCHEDULERS, Gpu, Simulation, Timeline

SHOWN_SCHEDULERS = ("static", "dynamic", "longest-first", "planned-whole", "planned")
COLOURS = {"prefill": "#3b6ea5", "decode": "#d98032", "split": "#5aa469"}


def patterns() -> dict[str, workloads.Workload]:
    generator = random.Random(0)
    uniform = [generator.randint(1, 4096) for _ in range(128)]
    bimodal = [generator.choice([64, 8192]) for _ in range(64)]
    return {
        "constant": workloads.ragged("constant 64x1024", [1024] * 64),
        "uniform": workloads.ragged("uniform 128x1..4096", uniform),
        "sorted-up": workloads.ragged("sorted up 128x1..4096", sorted(uniform)),
        "sorted-down": workloads.ragged("sorted down 128x1..4096", sorted(uniform, reverse=True)),
        "long-tail": workloads.long_tail(),
        "bimodal": workloads.ragged("bimodal 64x64 or 8192", bimodal),
        "mixed": workloads.prefill_among_decodes(),
        "tiny": workloads.tiny_sequences(),
        "one-huge": workloads.ragged("one of 131072 keys among 200 of 300", [1] * 201, [131072] + [300] * 200),
        "long-decode": workloads.ragged("decode of 131072 keys", [1], [131072]),
    }


def main() -> int:
    args = parse_args()
    workload = patterns()[args.pattern] if not (args.decode or args.prefill) else own_workload(args)
    simulation = Simulation(workload, Gpu(num_sms=args.sms), max_splits=args.max_splits)
    timelines = [simulation.run(scheduler) for scheduler in args.schedulers]
    print(
        f"{workload.name}: {workload.batch} sequences on {args.sms} SMs, {simulation.parameters.heads} heads of tiles"
    )
    print(f"{'scheduler':<16}{'work tiles':>11}{'makespan us':>13}{'efficiency':>12}{'idle':>7}{'splits':>8}")
    for timeline in timelines:
        most_splits = max((interval.tile.num_splits for interval in timeline.intervals), default=1)
        print(
            f"{timeline.scheduler:<16}{len(timeline.intervals):>11}{timeline.makespan * 1e6:>13.1f}"
            f"{timeline.efficiency:>12.1%}{timeline.idle:>7.1%}{most_splits:>8}"
        )
    if args.plot:
        draw(timelines, workload, args.plot)
        print(f"wrote {args.plot}")
    return 0


def own_workload(args: argparse.Namespace) -> workloads.Workload:
    generator = random.Random(args.seed)
    heads, heads_kv = (int(part) for part in args.heads.split("/"))
    lens_q, lens_k = [], []
    for option, rows in ((args.prefill, None), (args.decode, 1)):
        if option:
            count, _, length = option.partition("x")
            low, _, high = length.partition(":")
            keys = [generator.randint(int(low), int(high or low)) for _ in range(int(count))]
            lens_k += keys
            lens_q += keys if rows is None else [rows] * len(keys)
    name = " + ".join(
        f"{kind} {given}" for kind, given in (("prefill", args.prefill), ("decode", args.decode)) if given
    )
    return workloads.ragged(name, lens_q, lens_k, heads=heads, heads_kv=heads_kv)


def draw(timelines: list[Timeline], workload: workloads.Workload, path: Path) -> None:
    """One panel a scheduler: time across, SMs down, a bar a work tile."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install -e '.[bench]'")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    figure, panels = plt.subplots(
        len(timelines), 1, sharex=True, squeeze=False, figsize=(12, 2.4 * len(timelines)), layout="constrained"
    )
    for (panel,), timeline in zip(panels, timelines, strict=True):
        for kind, colour in COLOURS.items():
            bars = [i for i in timeline.intervals if kind_of(i.tile, workload) == kind]
            panel.barh(
                [bar.sm for bar in bars],
                [1e6 * (bar.end - bar.start) for bar in bars],
                left=[1e6 * bar.start for bar in bars],
                height=1.0,
                color=colour,
                edgecolor="white",
                linewidth=0.2,
            )
        panel.set_title(
            f"{timeline.scheduler}: {1e6 * timeline.makespan:.0f} us, {timeline.efficiency:.0%}", loc="left"
        )
        panel.set_ylabel("SM")
        panel.invert_yaxis()
        panel.axvline(1e6 * timeline.ideal, color="black", linestyle=":", linewidth=1)
    panels[-1][0].set_xlabel("microseconds of the model; dotted: no idle SM, or memory always busy")
    figure.suptitle(workload.name)
    figure.legend(
        handles=[Patch(color=c, label=kind) for kind, c in COLOURS.items()], loc="outside upper right", ncols=3
    )
    figure.savefig(path, dpi=130)


def kind_of(tile, workload: workloads.Workload) -> str:
    if tile.num_splits > 1:
        return "split"
    return "decode" if workload.lens_q[tile.batch] <= 16 else "prefill"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", choices=list(patterns()), default="mixed")
    parser.add_argument("--prefill", metavar="NxLENGTH", help="own batch: N prompts of LENGTH or LOW:HIGH tokens")
    parser.add_argument("--decode", metavar="NxKEYS", help="own batch: N decodes over KEYS or LOW:HIGH keys")
    parser.add_argument("--heads", default="32/8", metavar="H/HK", help="of an own batch (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of lengths between LOW and HIGH")
    parser.add_argument("--sms", type=int, default=132, help="default %(default)s, an H200")
    parser.add_argument("--max-splits", type=int, default=256)
    parser.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, default=SHOWN_SCHEDULERS)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
