"""The command line: ``python -m tests.soak --help``."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path

from . import __doc__ as description
from . import interrupts, kill, parent, steady, threads
from .kill import METHODS
from .report import Report

SCENARIOS = ("kill", "threads", "parent", "interrupts", "steady")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("scenario", choices=[*SCENARIOS, "all"])
    add(
        "--minutes",
        type=float,
        default=30,
        help="limit for each scenario, for each start method of kill (30)",
    )
    add("--seed", type=int, help="to repeat a run")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=METHODS,
        help="kill, parent, interrupts: start methods (all)",
    )
    add("--kills", type=int, default=1000, help="kill: so many with each start method (1000)")
    add("--deaths", type=int, default=10**9, help="parent: so many programs (as time allows)")
    add(
        "--tasks",
        type=int,
        default=1_000_000,
        help="steady: tiny ones; a fiftieth as many large ones (1000000)",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> Iterator[Report]:
    """The reports, as they come."""
    chosen = SCENARIOS if arguments.scenario == "all" else (arguments.scenario,)
    seconds, seed = 60 * arguments.minutes, arguments.seed
    for scenario in chosen:
        if scenario == "kill":
            for method in arguments.methods:
                yield kill.run(
                    method, kills=arguments.kills, seed=seed, seconds=seconds, fatal=True
                )
        elif scenario == "interrupts":
            yield interrupts.run(seed=seed, seconds=seconds, methods=tuple(arguments.methods))
        elif scenario == "threads":
            yield threads.run(seed=seed, seconds=seconds / 2, fatal=True)
            yield threads.leave_programs(seed=seed, seconds=seconds / 2)
        elif scenario == "parent":
            yield parent.run(
                seed=seed,
                seconds=seconds,
                methods=tuple(arguments.methods),
                deaths=arguments.deaths,
            )
        else:
            tiny, large = arguments.tasks, arguments.tasks // 50
            yield steady.run(tiny=tiny, large=large, seed=seed, seconds=seconds, fatal=True)


def _temporary_folder() -> str:
    """What appears in it is this run's doing."""
    folder = tempfile.mkdtemp(prefix="soak-")
    # multiprocessing removes a folder of its own in it at exit, with priority -100; this comes after that.
    Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=-101)
    return folder


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.seed is None:
        arguments.seed = secrets.randbits(32)
    print(f"seed {arguments.seed}", flush=True)
    os.environ.setdefault("SHMPOOL_VERIFY", "0" if arguments.scenario == "steady" else "1")
    os.environ["TMPDIR"] = tempfile.tempdir = _temporary_folder()
    reports = []
    for report in run(arguments):
        reports.append(report)
        print(f"\n{report}", flush=True)
    text = json.dumps([report.as_dict() for report in reports])
    print(f"\n{text}")
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return int(any(report.violations for report in reports))


if __name__ == "__main__":
    sys.exit(main())
