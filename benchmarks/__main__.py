"""The command line: `python -m benchmarks --help`."""

import argparse
import signal
import sys
import time
from pathlib import Path

from . import __doc__ as description
from .contenders import BASIC, BOUNDS, CONTENDERS
from .figures import Figures
from .machine import about
from .report import quantity, report
from .runner import Options, run
from .works import WORKS

HERE = Path(__file__).parent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one short round, and not all works")
    parser.add_argument("--only", nargs="+", choices=WORKS, metavar="WORK", help=", ".join(WORKS))
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=["all", "basic", *CONTENDERS],
        default=["all"],
        metavar="NAME",
        help=f"all (the default), basic ({' '.join(BASIC)}), or of: {', '.join(CONTENDERS)}",
    )
    parser.add_argument(
        "--no-limit", action="store_true", help="leave out what the machine allows, and no pool"
    )
    parser.add_argument("--rounds", type=int, help="default 5")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--start-method", default="fork", choices=["fork", "spawn", "forkserver"])
    parser.add_argument(
        "--limit", type=float, default=20, help="seconds for one measurement, default 20"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all samples (a full run: figures.json)"
    )
    parser.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="draw pictures (a full run: plots)"
    )
    parser.add_argument(
        "--from", type=Path, dest="source", metavar="FILE", help="measure nothing, read this JSON"
    )
    arguments = parser.parse_args()
    # What is published comes from full runs, and from nothing else by accident.
    is_full = not (arguments.quick or arguments.only or arguments.source or arguments.no_limit)
    if is_full and "all" in arguments.contenders:
        arguments.json = arguments.json or HERE / "figures.json"
        arguments.plots = arguments.plots or HERE / "plots"
    return arguments


def options_of(arguments: argparse.Namespace) -> Options:
    chosen = set(arguments.contenders)
    if "basic" in chosen:
        chosen.update(BASIC)
    contenders = tuple(c for c in CONTENDERS if c in chosen or "all" in chosen)
    pace = {"budget": 0.2, "patience": 0.6, "warm_ups": 2} if arguments.quick else {}
    return Options(
        works=tuple(arguments.only or [w for w in WORKS if WORKS[w].quick or not arguments.quick]),
        contenders=(() if arguments.no_limit else tuple(BOUNDS)) + contenders,
        workers=arguments.workers,
        rounds=arguments.rounds or (1 if arguments.quick else 5),
        start_method=arguments.start_method,
        limit=arguments.limit,
        **pace,
    )


def race(options: Options, file: Path | None) -> Figures:
    """Run, and write what there is after each round."""
    figures = Figures(options, about())
    begin, before = time.monotonic(), 0
    try:
        for number, work, contender, answer in run(options):
            if file and number > before:
                figures.write(file)
            before = number
            shown = figures.add(work, contender, answer)
            text = shown.get("error") or quantity(
                figures.rounds(work, contender)[-1], WORKS[work].unit
            )
            clock = f"{time.monotonic() - begin:5.0f} s"
            print(f"{clock}  {number + 1}  {work:20} {contender:14} {text}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; what there is so far:", file=sys.stderr)
    return figures


def main() -> int:
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # nothing is left running
    arguments = parse()
    source = arguments.source
    figures = Figures.read(source) if source else race(options_of(arguments), arguments.json)
    print(report(figures))
    if arguments.json:
        figures.write(arguments.json)
    if arguments.plots:
        try:
            from .plots import draw_race
        except ModuleNotFoundError as error:
            print(f"no pictures: {error}", file=sys.stderr)
        else:
            draw_race(figures, arguments.plots)
    return 0


if __name__ == "__main__":
    sys.exit(main())
