"""The drivers of this process that have a thread: at interpreter exit they are told to finish, and waited for.

As in ``concurrent.futures``, that is when the main thread has ended, and before others that are no daemons are waited
for: whoever submits in one of those is told that it is too late.  Pools go on until these have ended, too, and for the
program's exit handlers: their drivers are left alone here (``ends_late``), and whoever has them ends them.
"""

from __future__ import annotations

import os
import sys
import threading
from functools import partial
from multiprocessing import util
from typing import Protocol

from shmpool.dispatch.counts import Counts

__all__ = ["EndsLate", "Living", "is_exiting", "register", "total_counts", "unregister"]


class EndsLate(Protocol):
    """May end after the others."""

    @property
    def ends_late(self) -> bool: ...  # noqa: D102  # documented at the driver, as are the others


class Living(EndsLate, Protocol):
    """What is known of a driver here."""

    counts: Counts

    def wake(self) -> None: ...  # noqa: D102
    def begin_no_more(self) -> None: ...  # noqa: D102
    def wait_for_end(self) -> None: ...  # noqa: D102


_running: set[Living] = set()
_past = Counts()  # of the drivers that had a thread
_running_lock = threading.Lock()  # guards _running and _past
_exiting = False


def is_exiting(driver: EndsLate) -> bool:
    """Is the interpreter about to end, so that nothing new may begin?"""
    return _exiting and not driver.ends_late


def register(driver: Living) -> None:
    """A driver's thread has started."""
    with _running_lock:
        _running.add(driver)


def unregister(driver: Living) -> None:
    """A driver's thread is about to end."""
    with _running_lock:
        if driver in _running:
            _running.discard(driver)
            _past.add(driver.counts)


def total_counts() -> Counts:
    """What went through all executors of this process so far."""
    total = Counts()
    with _running_lock:
        for counts in (_past, *(driver.counts for driver in _running)):
            total.add(counts)
    return total


def _at_exit() -> None:
    global _exiting
    _exiting = True
    with _running_lock:
        running = [driver for driver in _running if not driver.ends_late]
    interrupted = _was_interrupted()
    for driver in running:
        if interrupted:
            driver.begin_no_more()
        driver.wake()
    try:
        for driver in running:
            driver.wait_for_end()
    except KeyboardInterrupt:
        for driver in running:
            driver.begin_no_more()
        raise


def _was_interrupted() -> bool:
    """Does the program end by Ctrl-C?  That has ended the tasks that ran; nobody wants those now that wait."""
    last = getattr(sys, "last_type", None)
    return (
        isinstance(last, type) and issubclass(last, KeyboardInterrupt) and not hasattr(sys, "ps1")
    )


def _after_fork_in_child() -> None:
    global _past, _running_lock, _exiting
    _exiting = False  # a pool may fork when the main thread has ended
    _running.clear()
    _past = Counts()
    _running_lock = threading.Lock()


# As concurrent.futures does: it must happen before threading waits for non-daemon threads.
try:
    threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
except RuntimeError:
    _exiting = True  # it has happened: too late for an executor, but not for a pool
# A child of multiprocessing waits for its own children, our workers, before it comes to threading's hooks.
util.Finalize(None, _at_exit, exitpriority=10)
util.register_after_fork(_at_exit, partial(util.Finalize, None, exitpriority=10))
os.register_at_fork(after_in_child=_after_fork_in_child)
