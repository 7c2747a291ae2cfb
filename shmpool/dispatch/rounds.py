"""The dispatcher's rounds: wait for whatever happens, see to it, until the last worker is gone.

One wait on all workers' answers and ends, the bell that wakes it up, and a timer; nothing is looked at again and again.
"""

from __future__ import annotations

import math
import time

from shmpool.dispatch import living
from shmpool.dispatch.answers import Answers
from shmpool.dispatch.attention import Attention
from shmpool.dispatch.fleet import Fleet, Source
from shmpool.dispatch.foreman import Foreman
from shmpool.dispatch.settle import settle
from shmpool.dispatch.state import SWEEPS
from shmpool.dispatch.wakeup import WakeUp
from shmpool.store.store import ObjectStore
from shmpool.worker.process import WorkerHandle

__all__ = ["Rounds"]


class Rounds:
    """What the dispatcher thread does.

    Parameters
    ----------
    foreman : Foreman
    attention : Attention
    answers : Answers
    wakeup : WakeUp
    store : ObjectStore
    idle_timeout : float or None
        Workers leave that had nothing to do for so many seconds, or up to a quarter longer.

    Attributes
    ----------
    abandoned : bool
        Nobody can submit any more: to finish, and then end.  May be set by anybody, who then wakes it up.
    ends_late : bool
        At interpreter exit somebody else ends it, later.  To be set before the start.
    """

    def __init__(
        self,
        foreman: Foreman,
        attention: Attention,
        answers: Answers,
        wakeup: WakeUp,
        store: ObjectStore,
        idle_timeout: float | None,
    ) -> None:
        self._foreman = foreman
        self._attention = attention
        self._answers = answers
        self._wakeup = wakeup
        self._store = store
        self._idle_timeout = idle_timeout
        self._next_sweep = math.inf  # by time.monotonic
        self.abandoned = False
        self.ends_late = False

    def run(self) -> None:
        """Go on until the last worker is gone."""
        foreman, attention, lock = self._foreman, self._attention, self._foreman.lock
        fleet = foreman.fleet
        assert fleet is not None
        while not self._is_done():
            for source in fleet.wait(self._seconds_to_wait(fleet)):
                self._see_to(fleet, source)
            if attention.is_missing:
                with lock:
                    attention.complete()
            if foreman.deadlines:
                with lock:
                    failures = foreman.end_overdue()
                settle(failures)
            if self._idle_timeout is not None and self._next_sweep <= time.monotonic():
                self._next_sweep = time.monotonic() + self._idle_timeout / SWEEPS
                with lock:
                    failures = foreman.sweep()
                settle(failures)
            if self._store.give_back_if_idle():
                with lock:
                    foreman.tell_idle()
            if self.abandoned or living.is_exiting(self):
                with lock:
                    failures = foreman.close()
                settle(failures)

    def _see_to(self, fleet: Fleet, source: Source | int) -> None:
        if not isinstance(source, Source):
            if source == self._wakeup.fd:
                self._wakeup.clear()
            else:
                self._attention.notice(source)  # or another thread has just taken it off
        elif not fleet.is_current(source):
            pass
        elif source.is_exit:
            self._reap(source.handle)
        elif source.handle.reader.acquire(blocking=False):  # else another thread leads
            try:
                self._answers.pass_on(source.handle)
            finally:
                source.handle.reader.release()

    def _seconds_to_wait(self, fleet: Fleet) -> float | None:
        """How long nothing may happen until there is something to do all the same; None: for ever."""
        with self._foreman.lock:
            until = self._foreman.deadlines.next()
            if self._idle_timeout is not None:
                if not fleet:
                    self._next_sweep = math.inf
                elif self._next_sweep == math.inf:
                    self._next_sweep = time.monotonic() + self._idle_timeout / SWEEPS
                until = min(until, self._next_sweep)
        seconds = self._store.idle_seconds()
        if until == math.inf:
            return seconds
        left = max(0.0, until - time.monotonic())
        return left if seconds is None else min(left, seconds)

    def _is_done(self) -> bool:
        with self._foreman.lock:
            return self._foreman.is_done()

    def _reap(self, handle: WorkerHandle) -> None:
        """A worker has ended: take its last answers, then settle what it leaves."""
        with handle.reader:  # whoever leads has noticed, too, and lets go
            while self._answers.pass_on(handle):
                pass
        handle.process.join()
        with self._foreman.lock:
            failures = self._foreman.died(handle)
        settle(failures)
