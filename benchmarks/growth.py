"""Does the cost grow faster than the work?  `python -m benchmarks.growth`

    python -m benchmarks.growth                          # writes growth.json and plots/growth.png
    python -m benchmarks.growth --quick                  # the lower part of each curve, once
    python -m benchmarks.growth --only workers tasks     # some curves

More workers than cores, more tasks, more bytes, more objects that live at the same time. A power
law is fitted to the upper half of each curve (on the logarithmic scale), since below it the fixed
costs hide what grows; the exponent says how the cost grows there: 1 is linear, 0 is not at all. It
is fitted to each round, and shown with its range; the median is compared.

Where bytes grow, some of the growth is the memory's: what fits into the processor's caches is
copied faster. memcpy stands beside it for that: if it grows faster than linearly, so may others.
"""

import argparse
import json
import math
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from . import processes
from .contenders import BOUNDS, CONTENDERS
from .curves import CURVES
from .machine import about
from .report import TITLES, markdown, quantity

HERE = Path(__file__).parent
TOLERANCE = 0.15  # of the exponent: caches, and noise
TIMEOUT = 180.0  # seconds for a curve

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Growth:
    """A curve by a contender.

    Attributes
    ----------
    rounds : list of list of (int, float)
        What grew, and seconds.
    error : str
        Instead.
    """

    rounds: list[Points]
    error: str = ""

    @property
    def medians(self) -> Points:
        return [
            (points[0][0], statistics.median(seconds for _, seconds in points))
            for points in zip(*self.rounds, strict=True)
        ]

    @property
    def exponents(self) -> list[float]:
        """Of each round."""
        return sorted(map(exponent, self.rounds))


def exponent(points: Points) -> float:
    """The slope of the upper half of a curve, both axes logarithmic, by least squares."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    middle = (logs[0][0] + logs[-1][0]) / 2
    upper = [log for log in logs if log[0] >= middle]
    return statistics.linear_regression(*zip(*upper, strict=True)).slope


def measure(names: list[str], options: argparse.Namespace) -> dict[str, dict[str, Growth]]:
    growths: dict[str, dict[str, Growth]] = {}
    begin = time.monotonic()
    for number in range(options.rounds):
        for name in names:
            for contender in CURVES[name].contenders:
                growth = growths.setdefault(name, {}).setdefault(contender, Growth([]))
                if growth.error:
                    continue
                spec = {
                    "curve": name,
                    "contender": contender,
                    "workers": options.workers,
                    "start_method": options.start_method,
                    "most": 0.01 if options.quick else 1.0,
                }
                answer = processes.answer_of("benchmarks.curves", spec, TIMEOUT)
                if answer["status"] == "ok":
                    growth.rounds.append(answer["points"])
                    text = quantity(answer["points"][-1][1], "seconds")
                else:
                    text = answer.get("traceback") or answer["error"]
                    growths[name][contender] = Growth([], text)
                clock = f"{time.monotonic() - begin:5.0f} s"
                print(f"{clock}  {number + 1}  {name:14} {contender:10} {text}", file=sys.stderr)
    return growths


def verdict(name: str, growth: Growth, growths: dict[str, dict[str, Growth]]) -> str:
    """In a word."""
    if name == "memcpy":
        return "the memory's own"
    linear, beside = CURVES[name].linear, growths.get(CURVES[name].beside, {})
    least = [statistics.median(other.exponents) for other in beside.values() if other.rounds]
    is_worse = statistics.median(growth.exponents) > max([linear, *least]) + TOLERANCE
    if linear:
        return "WORSE than linear" if is_worse else "no worse than linear"
    return "GROWS" if is_worse else "flat: linear in all"


def report(growths: dict[str, dict[str, Growth]]) -> str:
    parts = []
    summary = [["", "grows", "", "from", "to", "exponent", "rounds", ""]]
    for name, curve in CURVES.items():
        contenders = {c: g for c, g in growths.get(name, {}).items() if g.rounds}
        if not contenders:
            continue
        rows = [[f"{curve.title}: {curve.x}", *map(TITLES.__getitem__, contenders)]]
        rows += [
            [f"{points[0][0]:,}", *(quantity(y, "seconds") for _, y in points)]
            for points in zip(*(growth.medians for growth in contenders.values()), strict=False)
        ]
        parts.append(markdown(rows))
        for contender, growth in contenders.items():
            medians, exponents = growth.medians, growth.exponents
            summary.append(
                [
                    curve.title,
                    f"{curve.x}, {medians[0][0]:,} to {medians[-1][0]:,}",
                    TITLES[contender],
                    quantity(medians[0][1], "seconds"),
                    quantity(medians[-1][1], "seconds"),
                    f"{statistics.median(exponents):.2f}",
                    f"{exponents[0]:.2f} to {exponents[-1]:.2f}",
                    verdict(name, growth, growths),
                ]
            )
    errors = [
        f"{CURVES[name].title}, {TITLES[contender]}: {growth.error.strip().splitlines()[-1]}"
        for name, contenders in growths.items()
        for contender, growth in contenders.items()
        if growth.error
    ]
    return "\n\n".join([*parts, markdown(summary, left=(0, 1, 2, 7)), *errors])


def as_json(growths: dict[str, dict[str, Growth]], on: dict) -> dict:
    curves: dict = {}
    for name, contenders in growths.items():
        curves[name] = {
            contender: {"rounds": growth.rounds}
            | (
                {"error": growth.error}
                if growth.error
                else {"exponents": growth.exponents, "verdict": verdict(name, growth, growths)}
            )
            for contender, growth in contenders.items()
        }
    return {"about": on, "curves": curves}


def read(file: Path) -> dict[str, dict[str, Growth]]:
    """What was written as JSON; curves and contenders that are no more are left out."""
    curves = json.loads(file.read_text())["curves"]
    return {
        name: {
            contender: Growth(growth["rounds"], growth.get("error", ""))
            for contender, growth in curves[name].items()
            if contender in CONTENDERS or contender in BOUNDS
        }
        for name in CURVES
        if name in curves
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="only the lower part, and one round")
    parser.add_argument(
        "--only", nargs="+", choices=CURVES, metavar="CURVE", help=", ".join(CURVES)
    )
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--start-method", default="fork", choices=["fork", "spawn", "forkserver"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="a full run: growth.json")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="a full run: plots")
    parser.add_argument(
        "--from", type=Path, dest="source", metavar="FILE", help="measure nothing, read this JSON"
    )
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    if not (options.quick or options.only or options.source):
        options.json = options.json or HERE / "growth.json"
        options.plots = options.plots or HERE / "plots"
    return options


def main() -> int:
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # nothing is left running
    options = parse()
    growths = (
        read(options.source) if options.source else measure(options.only or [*CURVES], options)
    )
    print(report(growths))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(as_json(growths, about()), indent=1) + "\n")
    if options.plots:
        try:
            from .plots import draw_growth
        except ModuleNotFoundError as error:
            print(f"no pictures: {error}", file=sys.stderr)
        else:
            draw_growth(growths, options.plots)
    return 0


if __name__ == "__main__":
    sys.exit(main())
