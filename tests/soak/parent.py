"""Scenario ``parent``: programs die in every way, at random moments, while their workers are busy in every way.

Their workers, and the workers of those, must be gone within a second of the program's own end.  (Where it has time to
say goodbye, it waits for what runs first, as with the standard library, so those tasks are short.)  Nothing may be left
in /dev/shm, in the temporary folder and the spill folder.  Shared memory has no name; it is back when no process has
it open or mapped.  So what a task has started itself and lives on must not: a program never; a forked process has,
until it ends, what the worker had mapped.
"""

from __future__ import annotations

import random
import re
import signal
import time
from collections import Counter
from statistics import median
from typing import Any

from support import TIMEUNIT

from .doomed import GRACEFUL, SHORT, SUDDEN, WORKS
from .kill import METHODS
from .processes import send_signal, shared_memory
from .programs import Program
from .report import Report

WORK = (*WORKS, "initializer", "starting", "load")
#: Works that start something with a life of its own, and what that may still have of ours.
OUTLIVING = {"start_a_program": False, "start_a_process": True}
DEATHS = (*GRACEFUL, *SUDDEN)


def run(
    *,
    seed: int,
    seconds: float,
    methods: tuple[str, ...] = METHODS,
    deaths: int = 10**9,
    within: float = 1.0,
) -> Report:
    """Until so many programs have died, or so many seconds are over.

    Parameters
    ----------
    seed : int
    seconds : float
    methods : tuple of str
        How workers are started.
    deaths : int
    within : float
        In how many seconds workers must be gone after the end of their program.
    """
    report = Report("parent", seed)
    total: Counter[str] = Counter()
    took: dict[str, list[float]] = {"suddenly": [], "gracefully": []}
    begin = time.monotonic()
    number = 0
    while number < deaths and time.monotonic() - begin < seconds:
        rng = random.Random(f"{seed} parent {number}")
        settings: dict[str, Any] = {
            "method": rng.choice(methods),
            "work": rng.choice(WORK),
            "death": rng.choice(DEATHS),
            "after": rng.choice((0.0, 0.02, 0.2)) * rng.random(),
            "seed": rng.randrange(1 << 30),
        }
        how = "suddenly" if settings["death"] in SUDDEN else "gracefully"
        took[how].append(die(settings, within, report))
        total.update({settings["death"]: 1, settings["work"]: 1, settings["method"]: 1})
        number += 1
    report.figures = {"deaths": number}
    report.figures |= {f"died by {name}": total[name] for name in DEATHS if total[name]}
    report.figures |= {f"while busy with {name}": total[name] for name in WORK if total[name]}
    report.figures |= {f"with {name}": total[name] for name in methods if total[name]}
    for how, seconds_each in took.items():
        if seconds_each:
            report.figures[f"died {how}: workers gone after, at most, s"] = max(seconds_each)
            report.figures[f"died {how}: workers gone after, median, s"] = median(seconds_each)
    report.figures["seconds"] = round(time.monotonic() - begin, 1)
    return report


def die(settings: dict[str, Any], within: float, report: Report) -> float:
    """Have one program die, and look at what it leaves; in how many seconds its workers were gone."""
    death = str(settings["death"])
    wrong = []
    with Program("doomed", settings) as program:
        said, *words = program.read_line().split() or [""]
        helpers = set(map(int, words))  # they go with the last of the family
        family = program.family()
        if death.startswith("SIG"):
            send_signal(program.pid, getattr(signal, death))
        try:
            helpers |= program.wait_for_end(60 * TIMEUNIT + SHORT)
        except TimeoutError as error:
            wrong.append(str(error))
        limit = 30 * TIMEUNIT
        but = helpers | program.own_children()
        took, late = program.wait_until_gone(within, but)
        left = program.wait_until_gone(limit, but)[1] if late else []
        if not OUTLIVING.get(settings["work"], False):
            wrong += [
                f"a program that a task has started has shared memory: {held}"
                for pid in program.family() - helpers
                if (held := shared_memory(pid))
            ]
        for pid in program.own_children():
            send_signal(pid, signal.SIGKILL)  # they keep the helpers
        left += program.wait_until_gone(limit, but=set())[1]
        if said != "busy":
            wrong.append("it has not come so far")
        if left:
            wrong.append(f"after {limit:g} s these were left: {left}")
        if late:
            wrong.append(f"after {within:g} s these were still there: {late}")
        if names := program.names_left(family):
            wrong.append(f"left in /dev/shm: {names}")
        if files := program.files_left():
            wrong.append(f"left in the temporary folder: {files}")
        if spilled := list((program.folder.parent / "spilled").glob("*")):
            wrong.append(f"left in the spill folder: {spilled}")
        errors = program.errors()
        if wrong or not _is_expected(death, errors):
            report.violated(f"{settings}: {'; '.join(wrong)}\n{errors:.3000}")
        return round(took, 3)


#: What a process says that multiprocessing starts, when its parent dies before it has said what to run.
_CUT_SHORT = re.compile(
    r"Traceback .*\n(?:  .*\n)*?  .*in spawn_main\n(?:  .*\n)*"
    r"(?:EOFError: Ran out of input|.*UnpicklingError: .*)\n"
)


def _is_expected(death: str, errors: str) -> bool:
    """Is that what a program says when it dies this way?"""
    errors = _CUT_SHORT.sub("", errors)
    if death == "exception":
        return errors.count("Traceback") == 1 and errors.endswith("ValueError: on purpose\n")
    return not errors
