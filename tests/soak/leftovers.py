"""What must be gone when an executor has ended, and what there is after the first of many and after the last."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path

from support import Holdings, wait_until

from .processes import resident
from .report import Report

MB = 1e6
#: What :func:`note_first_and_last` counts.
COUNTED = ("descriptors", "processes", "threads", "blocks")


def take_stock(temporary: Path) -> dict[str, float]:
    """What this process has at this moment: counts by name, and memory in MB."""
    gc.collect()
    holdings = Holdings.now(temporary)
    own, mapped = resident(os.getpid())
    return {
        **{name: getattr(holdings, name).total() for name in COUNTED},
        "own memory, MB": round(own / MB, 1),
        "mapped memory and files, MB": round(mapped / MB, 1),
    }


def note_first_and_last(first: dict[str, float], temporary: Path, report: Report) -> None:
    """Add what there was after the first round, with all modules imported, and is now, to the figures."""
    last = take_stock(temporary)
    for name, value in first.items():
        report.figures[f"{name}: after the first round, the last"] = f"{value:g}, {last[name]:g}"


def check_nothing_is_left(what: str, before: Holdings, temporary: Path, report: Report) -> None:
    """Descriptors, processes, threads, names, files, blocks: all must be as before ``what``."""
    left: dict[str, list[str]] = {}

    def all_gone() -> bool:
        left.clear()
        left.update(Holdings.now(temporary).left_since(before))
        names = [name for name in left.pop("shm", ()) if not _is_anothers(name)]
        if names:
            left["shm"] = names
        return not left

    gc.collect()
    try:
        wait_until(all_gone, 10, "nothing")
    except AssertionError:
        report.violated(f"{what} left behind: {left}")


def _is_anothers(name: str) -> bool:
    """Does a name in /dev/shm name other processes?  Many programs use that folder, and some are killed."""
    pids = set(re.findall(r"(?<![a-zA-Z\d])\d{2,}(?![a-zA-Z\d])", name))
    return bool(pids) and str(os.getpid()) not in pids
