"""What to do next: the state machine of an executor.  Events in, actions out; no sockets, threads or clock.

Everything that decides who runs which task must live here.  Tasks and workers are numbers.  Each method is an event
that has happened; it returns the actions that the driver has to perform, in order.  Some actions have outcomes that
come back as events (:class:`Recall` as :meth:`Machine.recalled`, :class:`Start` as :meth:`Machine.ready` or
:meth:`Machine.died`).

A worker's life::

    Start --> starting --ready--> working --Retire / Stop--> (out of the machine)
                 |                   |
                 +------- died ------+

Rules

* A task is in one place: pending, or sent to one worker, or settled (answered, failed, cancelled).
* Tasks are sent to workers that are ready, oldest first: to an idle one if there is one; else a new worker is started
  if there may be more; else they are sent ahead to busy ones, as many as keep a worker busy for about a millisecond.
* When a worker has nothing left to do and nothing is pending, tasks that another has not read are taken back for it.
  So a task never waits for a long one while a worker is idle, and tasks that wait for each other get a worker each.
* A worker reads one task at a time.  So when it dies, the tasks that could be taken back were not begun, and of the
  others exactly one, if any, was running.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict, deque
from typing import NamedTuple

__all__ = ["Action", "Break", "Fail", "Machine", "Recall", "Retire", "Send", "Start", "Stop"]


class Start(NamedTuple):
    """Start a process, as worker ``worker``."""

    worker: int


class Send(NamedTuple):
    """Send a task to a worker."""

    task: int
    worker: int


class Recall(NamedTuple):
    """Take back up to ``most`` tasks that the worker has not read, oldest first; tell :meth:`Machine.recalled`."""

    worker: int
    most: int


class Retire(NamedTuple):
    """The worker has run as many tasks as it may: let it end; nothing more is heard of it here."""

    worker: int


class Stop(NamedTuple):
    """All is done: let all workers end."""


class Fail(NamedTuple):
    """The task is lost: the worker that ran it died; or the pool is broken, if ``worker`` is None."""

    task: int
    worker: int | None


class Break(NamedTuple):
    """Workers die before they are ready: the pool is of no use; tell :meth:`Machine.broke`."""

    worker: int


Action = Start | Send | Recall | Retire | Stop | Fail | Break

#: So many workers in a row may die before they are ready. One can be the system's doing; three are the initializer's.
_MOST_STILLBORN = 3


class _Worker:
    __slots__ = ("assigned", "full", "ready", "tasks")

    def __init__(self) -> None:
        self.ready = False
        self.full = False  # its socket takes no more for now
        self.assigned = 0
        self.tasks: OrderedDict[int, None] = OrderedDict()  # sent and not answered, oldest first


class Machine:
    """The state of one executor.

    Parameters
    ----------
    max_workers : int
    max_tasks_per_child : int or None
    start_all : bool
        Start all workers with the first task, and keep up their number; else start them on demand.
    prefetch_min, prefetch_max, prefetch_us : int
        How far to send ahead, see :class:`shmpool.config.Config`.
    """

    __slots__ = (
        "_ahead", "_idle", "_limit", "_max_workers", "_microseconds", "_next_worker", "_pending", "_prefetch_max",
        "_prefetch_min", "_prefetch_us", "_room", "_sent", "_start_all", "_stillborn", "_workers",
        "broken", "closing", "stopped",
    )  # fmt: skip

    def __init__(
        self,
        max_workers: int,
        max_tasks_per_child: int | None,
        start_all: bool,
        prefetch_min: int,
        prefetch_max: int,
        prefetch_us: int,
    ) -> None:
        self._max_workers = max_workers
        self._limit = max_tasks_per_child
        self._start_all = start_all
        self._prefetch_min = prefetch_min
        self._prefetch_max = prefetch_max
        self._prefetch_us = prefetch_us
        self._ahead = prefetch_min
        self._microseconds = (
            1e6  # moving average of a task's duration: long until known to be short
        )
        self._pending: deque[int] = deque()
        self._workers: dict[int, _Worker] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # ready, nothing to do
        self._room: OrderedDict[int, None] = OrderedDict()  # busy, and may be sent more
        self._next_worker = 0
        self._stillborn = 0
        self._sent = 0  # tasks sent and not answered
        self.closing = False
        self.stopped = False
        self.broken = False

    # ---------------------------------------------------------------- what has happened

    def started(self) -> list[Action]:
        """The pool begins: which workers must be there before the first task?"""
        return [self._start() for _ in range(self._max_workers)] if self._start_all else []

    def submitted(self, task: int) -> list[Action]:
        """There is a new task."""
        self._pending.append(task)
        return self._next()

    def ready(self, worker: int) -> list[Action]:
        """A worker has started."""
        self._stillborn = 0
        self._workers[worker].ready = True
        self._place(worker)
        return self._next()

    def answered(self, worker: int, task: int, microseconds: int) -> list[Action]:
        """A worker has run a task, in so many microseconds."""
        self._microseconds += (microseconds - self._microseconds) * 0.2
        self._ahead = max(
            self._prefetch_min,
            min(self._prefetch_max, int(self._prefetch_us / (self._microseconds + 1.0))),
        )
        return self._done(worker, task)

    def dropped(self, worker: int, task: int) -> list[Action]:
        """A task that was to be sent turned out to be cancelled."""
        self._workers[worker].assigned -= 1
        return self._done(worker, task)

    def refused(self, worker: int, task: int) -> list[Action]:
        """The worker's socket is full: the task was not sent."""
        state = self._workers[worker]
        del state.tasks[task]
        self._sent -= 1
        state.assigned -= 1
        state.full = bool(state.tasks)  # it has room again when it answers
        self._put_back([task])
        self._place(worker)
        return []

    def start_failed(self, worker: int) -> bool:
        """A worker could not be started; False if the pool has none now."""
        del self._workers[worker]
        return bool(self._workers)

    def recalled(self, worker: int, tasks: list[int], unwanted: int | None = None) -> list[Action]:
        """These tasks were taken back from a worker, unread; one of them may be wanted no more."""
        state = self._workers[worker]
        for task in tasks:
            del state.tasks[task]
        state.assigned -= len(tasks)
        self._sent -= len(tasks)
        self._put_back([task for task in tasks if task != unwanted])
        self._place(worker)
        return self._next(recall=False)

    def died(self, worker: int, unread: list[int]) -> list[Action]:
        """A worker is dead; the tasks ``unread`` were taken back from it."""
        state = self._workers.pop(worker, None)
        if state is None:
            return []
        self._idle.pop(worker, None)
        self._room.pop(worker, None)
        if self.broken:
            return []
        self._sent -= len(state.tasks)
        actions: list[Action] = []
        for task in unread:
            del state.tasks[task]
        actions += [Fail(task, worker) for task in state.tasks]
        self._put_back(unread)
        if not state.ready:
            self._stillborn += 1
            if self._stillborn >= _MOST_STILLBORN:
                return [*actions, Break(worker)]
        if self._start_all and not self.closing and not self.broken:
            actions.append(self._start())
        return actions + self._next()

    def withdrawn(self, task: int) -> list[Action]:
        """A pending task was cancelled, or is no more wanted."""
        with contextlib.suppress(ValueError):
            self._pending.remove(task)
        return self._next()

    def closed(self) -> list[Action]:
        """No more tasks will come: finish, and stop."""
        self.closing = True
        return self._next()

    def broke(self) -> list[Action]:
        """The pool can run nothing any more: fail what is left."""
        self.broken = True
        actions: list[Action] = []
        for state in self._workers.values():
            actions += [Fail(task, None) for task in state.tasks]
            state.tasks.clear()
        self._sent = 0
        actions += [Fail(task, None) for task in self._pending]
        self._pending.clear()
        self._idle.clear()
        self._room.clear()
        return actions

    # ---------------------------------------------------------------- what to do about it

    def _done(self, worker: int, task: int) -> list[Action]:
        state = self._workers.get(worker)
        if state is None or task not in state.tasks:
            return []
        del state.tasks[task]
        self._sent -= 1
        state.full = False
        if self._limit is not None and state.assigned >= self._limit and not state.tasks:
            del self._workers[worker]
            self._idle.pop(worker, None)
            self._room.pop(worker, None)
            actions: list[Action] = [Retire(worker)]
            if self._start_all and not self.closing:
                actions.append(self._start())
            return actions + self._next()
        self._place(worker)
        return self._next()

    def _put_back(self, tasks: list[int]) -> None:
        """These are pending again; the pending tasks stay in the order of their numbers."""
        for task in tasks:
            later = next((i for i, other in enumerate(self._pending) if other > task), None)
            if later is None:
                self._pending.append(task)
            else:
                self._pending.insert(later, task)

    def _place(self, worker: int) -> None:
        """Enter a worker where it belongs: idle, with room for more, or neither."""
        state = self._workers[worker]
        idle = room = False
        if state.ready and (self._limit is None or state.assigned < self._limit):
            if not state.tasks:
                idle = True
            else:
                room = len(state.tasks) <= self._ahead and not state.full
        if idle:
            self._idle[worker] = None
        else:
            self._idle.pop(worker, None)
        if room:
            self._room[worker] = None
        else:
            self._room.pop(worker, None)

    def _start(self) -> Start:
        worker = self._next_worker
        self._next_worker += 1
        self._workers[worker] = _Worker()
        return Start(worker)

    def _next(self, recall: bool = True) -> list[Action]:
        actions: list[Action] = []
        pending = self._pending
        if not self.broken:
            while pending:
                if self._idle:
                    worker = next(iter(self._idle))
                elif self._room:
                    worker = next(iter(self._room))
                    self._room.move_to_end(worker)
                else:
                    break
                task = pending.popleft()
                state = self._workers[worker]
                state.tasks[task] = None
                state.assigned += 1
                self._sent += 1
                self._place(worker)
                actions.append(Send(task, worker))
            if len(self._workers) < self._max_workers:
                self._start_workers(actions)
        if recall and self._idle and self._sent > 1 and not pending:
            self._recall(actions)
        if self.closing and not self.stopped and not pending and not self._sent:
            self.stopped = True
            actions.append(Stop())
        return actions

    def _start_workers(self, actions: list[Action]) -> None:
        """One for each task that waits, be it here or in a busy worker's socket, as far as there may be more."""
        waiting = len(self._pending)
        starting = 0
        for worker in self._workers.values():
            waiting += max(0, len(worker.tasks) - 1)
            starting += not worker.ready
        if waiting:
            needed = self._max_workers if self._start_all else waiting - len(self._idle) - starting
            missing = min(needed, self._max_workers - len(self._workers))
            actions.extend(self._start() for _ in range(missing))

    def _recall(self, actions: list[Action]) -> None:
        """Something to do for an idle worker: half of what the busiest has not begun."""
        busiest = max(self._workers, key=lambda worker: len(self._workers[worker].tasks))
        waiting = len(self._workers[busiest].tasks) - 1
        if waiting > 0:
            actions.append(Recall(busiest, (waiting + 1) // 2))
