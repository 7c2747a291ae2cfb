"""A program that is left while sixteen threads use an executor.  Settings come as JSON in the first argument.

``seed``; ``way``: how the main thread leaves; ``daemons``: are the threads daemons, which the interpreter leaves to
themselves; ``after``: seconds from when the threads have begun until then; ``method``: how workers are started.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shmpool import ObjectStore, ShmExecutor

from . import tasks
from .load import Circumstances
from .report import Report
from .threads import THREADS, be_silent, live, make_members
from .watchdog import PATIENCE, Watchdog


def raise_an_error() -> None:
    raise ValueError("on purpose")


WAYS: dict[str, Callable[[], object]] = {
    "return": lambda: None,
    "exception": raise_an_error,
    "sys.exit": lambda: sys.exit(3),
    "shutdown": lambda: None,  # ... that does not wait
}
EXIT_CODES = {"return": 0, "exception": 1, "sys.exit": 3, "shutdown": 0}


def main(settings: dict[str, Any]) -> None:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    rng = random.Random(settings["seed"])
    folder = Path(settings["folder"])
    report = Report("leaving", settings["seed"])
    store = ObjectStore()
    executor = ShmExecutor(
        rng.randint(1, 3), settings["method"], tasks.listen, (str(folder),), store=store
    )
    circumstances = Circumstances(ending=True)
    members = make_members(executor, store, rng, report, circumstances, Watchdog(folder), THREADS)
    atexit.register(_use_it_after_the_end, executor, report)
    threads = [
        threading.Thread(
            target=live, args=(member, report, threading.Event()), daemon=settings["daemons"]
        )
        for member in members
    ]
    be_silent()
    for thread in threads:
        thread.start()
    time.sleep(settings["after"])
    if settings["way"] == "shutdown":
        executor.shutdown(wait=False)
    WAYS[settings["way"]]()


def _use_it_after_the_end(executor: ShmExecutor, report: Report) -> None:
    """Comes after the executors' own end; says what was found."""
    with contextlib.suppress(RuntimeError):
        executor.submit(tasks.minus, 1)
        report.violated("an executor takes tasks after the end")
    for violation in report.violations:
        print(violation)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
