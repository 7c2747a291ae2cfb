"""The command line: `python -m benchmarks --help`."""

import argparse
import sys
import time
from pathlib import Path

from . import __doc__ as description
from .contenders import BASIC, CONTENDERS
from .report import Figures, machine, notes, quantity, table, write_json
from .runner import Options, run
from .works import WORKS


def parse() -> tuple[argparse.Namespace, Options]:
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
        choices=["all", *CONTENDERS],
        default=BASIC,
        metavar="NAME",
        help=f"all, or of: {', '.join(CONTENDERS)} (default: {' '.join(BASIC)})",
    )
    parser.add_argument("--no-limit", action="store_true", help="leave out what the machine allows")
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--start-method", default="fork", choices=["fork", "spawn", "forkserver"])
    parser.add_argument("--timeout", type=float, default=60, help="seconds, for one measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples")
    arguments = parser.parse_args()

    contenders = tuple(CONTENDERS if "all" in arguments.contenders else arguments.contenders)
    pace = {"budget": 0.2, "patience": 0.6, "warm_ups": 2} if arguments.quick else {}
    options = Options(
        works=tuple(arguments.only or [w for w in WORKS if WORKS[w].quick or not arguments.quick]),
        contenders=(() if arguments.no_limit else ("limit",)) + contenders,
        workers=arguments.workers,
        rounds=arguments.rounds or (1 if arguments.quick else 3),
        start_method=arguments.start_method,
        timeout=arguments.timeout,
        **pace,
    )
    return arguments, options


def main() -> int:
    arguments, options = parse()
    figures = Figures(options)
    begin = time.monotonic()
    try:
        for work, contender, answer in run(options):
            figures.add(work, contender, answer)
            value = figures.median(work, contender)
            text = answer.get("error") if value is None else quantity(value, WORKS[work].unit)
            clock = f"{time.monotonic() - begin:5.0f} s"
            print(f"{clock}  {work:16} {contender:8} {text}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; what there is so far:", file=sys.stderr)

    about = machine()
    print(f"{about['cpu']}, {about['cores']} cores, {about['system']}, Python {about['python']}")
    print(f"{options.workers} workers, {options.start_method}, median of {options.rounds} rounds\n")
    print(table(figures))
    print(f"\n{notes(figures.answers)}")
    if arguments.json:
        write_json(figures, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
