"""Leading: a thread that waits for a result reads its worker's answers itself, and need not be woken by the dispatcher.

::

    lead():  waits --answer--> reads --> delivers --> waits ...  until its future is done
               |                 |
               |                 '- interrupted here, by a finalizer or a signal handler that calls the executor: that
               |                    cannot lead, nor wait for anything that this thread would have to read
               '- interrupted here: that takes the lead away from it (:meth:`Leading.stand_down`), since it may wait for
                  what this worker answers; this thread goes on when that has returned, and finds the bell rung

A leading thread holds its worker's ``reader`` from one end to the other.  Which thread leads is guarded by the driver's
lock; a thread may look without it whether it is the one, since only itself makes it so.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Literal

from shmpool.dispatch.answers import Answers
from shmpool.dispatch.attention import Attention
from shmpool.dispatch.foreman import Foreman
from shmpool.dispatch.future import TaskFuture
from shmpool.interrupts import heard, whole
from shmpool.worker.process import WorkerHandle

__all__ = ["Leading"]


class _Lead:
    """A thread reads a worker's answers."""

    __slots__ = ("doing", "handle", "rung")

    def __init__(self, handle: WorkerHandle) -> None:
        self.handle = handle
        self.doing: Literal["", "waits", "reads"] = "waits"  # or is on its way to it
        self.rung = False  # the bell, for it


class Leading:
    """The threads that lead.

    Parameters
    ----------
    foreman : Foreman
    attention : Attention
    answers : Answers
    spin_seconds : float
        For so long a thread asks again and again before it sleeps, where that is worth while.
    """

    def __init__(
        self, foreman: Foreman, attention: Attention, answers: Answers, spin_seconds: float
    ) -> None:
        self._foreman = foreman
        self._attention = attention
        self._answers = answers
        self._spin_seconds = spin_seconds
        self._cpus = len(os.sched_getaffinity(0))
        self._leads: dict[int, _Lead] = {}  # by thread

    def lead(self, number: int, future: TaskFuture, timeout: float | None) -> None:
        """See :meth:`Driver.lead`."""
        if not self.stand_down():
            return  # this interrupts the reading of answers, which could not be gone on with after another lead
        deadline = None if timeout is None else time.monotonic() + timeout
        while not future.is_settled:
            with whole:
                if not self._lead_once(number, deadline):
                    return

    def _lead_once(self, number: int, deadline: float | None) -> bool:
        """Read answers once; False if this thread cannot help.  Of all this, Ctrl-C ends nothing but the wait."""
        attention, lock = self._attention, self._foreman.lock
        with lock:
            lead, spin = self._start(number), self._spin()
        if lead is None:
            return False
        answers, moved = None, False
        try:
            seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
            with heard():
                there = lead.handle.wait(seconds, attention.bell, spin)
            lead.doing = "reads"
            if there and self._is_leading(lead):
                answers = self._answers.read(lead.handle, copy=True)
        finally:
            lead.doing = ""
            with lock:
                if self._is_leading(lead):
                    moved = self._stop(lead.handle)
                elif lead.rung:
                    attention.obey_bell()
        self._answers.deliver(answers or ())
        return answers is not None or moved

    def _start(self, number: int) -> _Lead | None:
        """The worker that has task ``number``, if this thread is to read its answers."""
        handle = self._foreman.table.handle_of(number)
        if handle is None or not handle.reader.acquire(blocking=False):
            return None
        lead = self._leads[threading.get_ident()] = _Lead(handle)
        self._attention.begin_leading(handle, number)
        return lead

    def _spin(self) -> float:
        """For how many seconds it is worth while to ask again and again whether there is an answer.

        To be woken takes as long as a short task.  But who asks again and again needs a processor: so only if there is
        one to spare, and tasks are short.
        """
        machine = self._foreman.machine
        if machine.microseconds < 1e6 * self._spin_seconds and machine.busy < self._cpus:
            return self._spin_seconds
        return 0.0

    def _stop(self, handle: WorkerHandle) -> bool:
        """Leave the worker's answers to the dispatcher again; True if the task was moved to another worker."""
        del self._leads[threading.get_ident()]
        has_tasks = self._foreman.machine.load(handle.number) > 0
        return self._attention.end_leading(handle, has_tasks=has_tasks)

    def _is_leading(self, lead: _Lead) -> bool:
        return self._leads.get(threading.get_ident()) is lead

    def stand_down(self) -> bool:
        """Lead no more, if this thread does: a signal handler or finalizer has interrupted it, and is about to wait.

        False if it cannot: it was interrupted while it read.  (An exception in the wrong place, such as a second
        Ctrl-C, may also leave a thread the leader that it should not be; this mends it.)
        """
        lead = self._leads.get(threading.get_ident())
        if lead is None:
            return True
        if lead.doing == "reads":
            return False
        lead.handle.leave()
        with self._foreman.lock:
            self._stop(lead.handle)
            if lead.doing == "waits":  # and would go on when this is over
                lead.rung = True
                self._attention.ring_bell()
        return True
