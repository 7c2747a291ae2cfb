"""The table of tasks: those that were taken on and are not settled yet, by number.  Guarded by the driver's lock.

::

    add --> waiting --begin--> sent --answered / failed / drop--> (out of the table)
               |                 |
               |                 '--moved: taken back, to be sent to another worker; its future runs all the same
               '--begin finds it cancelled, or drop--> (out of the table)
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Collection, Sequence
from typing import Any

from shmpool.dispatch.counts import Counts
from shmpool.dispatch.deadlines import Deadlines
from shmpool.dispatch.task import Task
from shmpool.wire.messages import Answer
from shmpool.worker.process import WorkerHandle

__all__ = ["Table"]


class Table:
    """Tasks by number, oldest first.

    Parameters
    ----------
    deadlines : Deadlines
        Of these tasks: who leaves the table, or is taken back, has none.
    counts : Counts
        Of what goes in and out.

    Attributes
    ----------
    tasks : dict of int to Task
        For others to look at.
    """

    __slots__ = ("_counts", "_deadlines", "_numbers", "tasks")

    def __init__(self, deadlines: Deadlines, counts: Counts) -> None:
        self.tasks: dict[int, Task] = {}
        self._numbers = itertools.count()
        self._deadlines = deadlines
        self._counts = counts

    def add(self, tasks: Sequence[Task], driver: weakref.ref[Any]) -> list[int]:
        """New tasks, and the numbers that they get; ``driver`` is whom their futures ask."""
        counts, table = self._counts, self.tasks
        numbers = []
        for task in tasks:
            number = next(self._numbers)
            numbers.append(number)
            table[number] = task
            task.future.driver = driver
            task.future.number = number
            counts.count(task.arguments)
            if not task.function.counted:
                task.function.counted = True
                counts.count(task.function.payload)
        counts.submitted += len(numbers)
        return numbers

    def handle_of(self, number: int) -> WorkerHandle | None:
        """The worker that a task was sent to, if it was, and has not been answered.  Safe without the lock."""
        task = self.tasks.get(number)
        return None if task is None else task.handle

    def begin(self, number: int) -> Task | None:
        """A task is about to be sent: its future runs, or has been cancelled (None)."""
        task = self.tasks[number]
        if not task.started:
            if not task.future.set_running_or_notify_cancel():
                self.drop(number)
                return None
            task.started = True
        return task

    def moved(self, numbers: Collection[int]) -> None:
        """These tasks were taken back from a worker."""
        for number in numbers:
            task = self.tasks.get(number)
            if task is not None:
                task.handle = None
                task.introduced = ()
                self._deadlines.forget(number)

    def answered(self, handle: WorkerHandle, answer: Answer) -> Task | None:
        """The task that a worker has answered; None if it was not asked."""
        number = answer.task
        task = self.tasks.get(number)
        if task is None or task.handle is not handle:
            return None
        del self.tasks[number]
        if self._deadlines.until:
            self._deadlines.forget(number)
        self._counts.count_answer(answer)
        return task

    def failed(self, number: int) -> Task:
        """The task that fails, for a reason other than its own."""
        self._deadlines.forget(number)
        self._counts.failed += 1
        return self.tasks.pop(number)

    def drop(self, number: int) -> None:
        """A task was cancelled, or is given up: its future has been told, or will be."""
        self.tasks.pop(number).arguments.release()

    def waiting(self, *, sent_ahead: bool) -> list[tuple[int, Task]]:
        """The tasks that have not begun, last first; ``sent_ahead``: and then those that were sent to a worker.

        Those that begin while others are cancelled are so the oldest.
        """
        waiting = [item for item in reversed(self.tasks.items()) if not item[1].started]
        if sent_ahead:
            waiting += [item for item in reversed(self.tasks.items()) if item[1].started]
        return waiting

    def drop_if_cancelled(self, number: int) -> bool:
        """Drop a task that was cancelled before it was sent; True if so."""
        task = self.tasks.get(number)
        if task is None or task.started or not task.future.cancelled():
            return False
        task.future.set_running_or_notify_cancel()
        self.drop(number)
        return True
