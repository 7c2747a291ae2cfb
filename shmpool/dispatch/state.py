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
* Tasks are sent to workers that are ready, oldest first: of idle ones to the one that worked last, whose freed memory
  is then used again; if there is none, a new worker is started if there may be more; else they are sent ahead to busy
  ones, as many as keep a worker busy for about a millisecond.
* When a worker has nothing left to do and nothing is pending, tasks that another has not read are taken back for it.
  So a task never waits for a long one while a worker is idle, and tasks that wait for each other get a worker each.
* A task with retries is pending again when its worker dies, until it has none left.
* A worker reads one task at a time.  So when it dies, the tasks that could be taken back were not begun, and of the
  others exactly one, if any, was running.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict, deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

__all__ = [
    "Action", "Again", "Break", "Fail", "Machine", "Recall", "Retire", "Send", "Start", "Stop", "Watch",
]  # fmt: skip


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
    """Let the worker end: it is not needed any more, or has run as many tasks as it may.  No more is heard of it."""

    worker: int


class Stop(NamedTuple):
    """All is done: let all workers end."""


class Fail(NamedTuple):
    """The task is lost: the worker that ran it died; or, if ``worker`` is None, there is none that could run it."""

    task: int
    worker: int | None


class Again(NamedTuple):
    """The worker that ran the task died, and the task will be sent once more: it is nowhere until then."""

    task: int
    worker: int


class Watch(NamedTuple):
    """A task whose time is limited is the first in its worker's queue: its time runs."""

    task: int


class Break(NamedTuple):
    """Workers die before they are ready: the pool is of no use; tell :meth:`Machine.broke`."""

    worker: int


Action = Start | Send | Recall | Retire | Stop | Fail | Again | Watch | Break

#: So many workers in a row may die before they are ready. One can be the system's doing; three are the initializer's.
_MOST_STILLBORN = 3
#: A worker that was idle at so many sweeps in a row leaves.
SWEEPS = 4


class _Worker:
    __slots__ = ("assigned", "condemned", "full", "ready", "tasks")

    def __init__(self) -> None:
        self.ready = False
        self.condemned = False  # it is being killed
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

    Attributes
    ----------
    start_all : bool
        As given; may be set as long as nothing has started.
    """

    __slots__ = (
        "_ahead", "_idle", "_limit", "_max_workers", "_microseconds", "_next_worker", "_pending", "_prefetch_max",
        "_prefetch_min", "_prefetch_us", "_retries", "_room", "_sent", "_stillborn", "_timed", "_workers",
        "broken", "closing", "start_all", "stopped",
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
        self.start_all = start_all
        self._prefetch_min = prefetch_min
        self._prefetch_max = prefetch_max
        self._prefetch_us = prefetch_us
        self._ahead = prefetch_min
        self._microseconds = (
            1e6  # moving average of a task's duration: long until known to be short
        )
        self._pending: deque[int] = deque()
        self._workers: dict[int, _Worker] = {}
        self._idle: OrderedDict[int, int] = (
            OrderedDict()
        )  # ready, nothing to do; seen so at so many sweeps
        self._room: OrderedDict[int, None] = OrderedDict()  # busy, and may be sent more
        self._next_worker = 0
        self._stillborn = 0
        self._sent = 0  # tasks sent and not answered
        self._timed: set[int] = set()  # tasks whose time is limited
        self._retries: dict[int, int] = {}  # how often a task may be run again
        self.closing = False
        self.stopped = False
        self.broken = False

    # ---------------------------------------------------------------- what has happened

    def started(self) -> list[Action]:
        """The pool begins: which workers must be there before the first task?"""
        return [self._start() for _ in range(self._max_workers)] if self.start_all else []

    def submitted(self, task: int, timed: bool = False, retries: int = 0) -> list[Action]:
        """There is a new task: is its time limited, and how often may it be run again if its worker dies?"""
        return self.submitted_all([task], timed, retries)

    def submitted_all(
        self, tasks: Sequence[int], timed: bool = False, retries: int = 0
    ) -> list[Action]:
        """There are several new tasks."""
        if timed:
            self._timed.update(tasks)
        if retries:
            self._retries.update(dict.fromkeys(tasks, retries))
        self._pending.extend(tasks)
        return self._next()

    def ready(self, worker: int) -> list[Action]:
        """A worker has started."""
        state = self._workers.get(worker)
        if state is None:
            return []
        self._stillborn = 0
        state.ready = True
        self._place(worker)
        return self._next()

    def answered(self, worker: int, task: int, microseconds: int) -> list[Action]:
        """A worker has run a task, in so many microseconds."""
        return self.answered_all(worker, [(task, microseconds)])

    def answered_all(self, worker: int, answers: list[tuple[int, int]]) -> list[Action]:
        """A worker has run several tasks: the task and its microseconds, each."""
        for _, microseconds in answers:
            self._microseconds += (microseconds - self._microseconds) * 0.2
        self._ahead = max(
            self._prefetch_min,
            min(self._prefetch_max, int(self._prefetch_us / (self._microseconds + 1.0))),
        )
        return self._done(worker, [task for task, _ in answers])

    def dropped(self, worker: int, task: int) -> list[Action]:
        """A task that was to be sent turned out to be cancelled."""
        self._workers[worker].assigned -= 1
        return self._done(worker, [task])

    def load(self, worker: int) -> int:
        """How many tasks were sent to a worker and not answered?"""
        state = self._workers.get(worker)
        return 0 if state is None else len(state.tasks)

    @property
    def busy(self) -> int:
        """How many workers have something to do, or are about to be ready for it."""
        return len(self._workers) - len(self._idle)

    @property
    def microseconds(self) -> float:
        """How long tasks take, of late; a second as long as nothing is known."""
        return self._microseconds

    def is_running(self, worker: int, task: int, unread: Collection[int]) -> bool:
        """Does a worker run a task, if these are what it has not read?  If it has read others, they came after it."""
        state = self._workers.get(worker)
        return state is not None and state.tasks.keys() - set(unread) == {task}

    def doomed(self, task: int) -> None:
        """A task's worker is being killed on purpose, because of this task: it is not to be run again."""
        self._retries.pop(task, None)

    def condemned(self, worker: int) -> None:
        """A worker is being killed on purpose: it is sent nothing more."""
        state = self._workers.get(worker)
        if state is not None:
            state.condemned = True
            self._place(worker)

    def swept(self) -> list[Action]:
        """Some time has passed, always the same: workers that had nothing to do for :data:`SWEEPS` times leave."""
        actions: list[Action] = []
        for worker, times in list(self._idle.items()):
            if times < SWEEPS:
                self._idle[worker] = times + 1
            else:
                actions.append(self._retire(worker))
        return actions

    def resized(self, max_workers: int) -> list[Action]:
        """There may be more workers, or fewer: those that are too many leave when they have nothing to do."""
        self._max_workers = max_workers
        return self._next()

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

    def unstarted(self) -> None:
        """What :meth:`started` asked for could not be had: it will be asked again."""
        self._workers.clear()

    def start_failed(self, worker: int) -> bool:
        """A worker could not be started; False if the pool has none now."""
        del self._workers[worker]
        return bool(self._workers)

    def starved(self) -> list[Action]:
        """There is no worker, and none can be started now: what is pending is not to wait for that to change."""
        actions: list[Action] = [Fail(task, None) for task in self._pending]
        for task in self._pending:
            self._forget(task)
        self._pending.clear()
        return actions + self._next()

    def recalled(self, worker: int, tasks: list[int], unwanted: int | None = None) -> list[Action]:
        """These tasks were taken back from a worker, unread; one of them may be wanted no more."""
        state = self._workers[worker]
        first = next(iter(state.tasks), None)
        tasks = [task for task in tasks if task in state.tasks]  # all, of a worker that is honest
        for task in tasks:
            del state.tasks[task]
        state.assigned -= len(tasks)
        self._sent -= len(tasks)
        if unwanted is not None:
            self._forget(unwanted)
        self._put_back([task for task in tasks if task != unwanted])
        self._place(worker)
        # What has brought nothing would bring nothing again, for ever. What has brought something may not have been
        # enough for all who are idle; and after a cancel the worker itself may have nothing left to do.
        return self._watch(state, first) + self._next(recall=bool(tasks))

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
        unread = [task for task in unread if task in state.tasks]  # see recalled()
        for task in unread:
            del state.tasks[task]
        for task in state.tasks:
            left = self._retries.get(task, 0)
            if left:
                self._retries[task] = left - 1
                actions.append(Again(task, worker))
                self._put_back([task])
            else:
                self._forget(task)
                actions.append(Fail(task, worker))
        self._put_back(unread)
        if not state.ready:
            self._stillborn += 1
            if self._stillborn >= _MOST_STILLBORN:
                return [*actions, Break(worker)]
        if self.start_all and not self.closing and len(self._workers) < self._max_workers:
            actions.append(self._start())
        return actions + self._next()

    def withdrawn(self, task: int) -> list[Action]:
        """A pending task was cancelled, or is no more wanted."""
        with contextlib.suppress(ValueError):
            self._pending.remove(task)
        self._forget(task)
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
        self._timed.clear()
        self._retries.clear()
        self._idle.clear()
        self._room.clear()
        return actions

    # ---------------------------------------------------------------- what to do about it

    def _done(self, worker: int, tasks: list[int]) -> list[Action]:
        state = self._workers.get(worker)
        if state is None:
            return []
        first = next(iter(state.tasks), None)
        known = [task for task in tasks if task in state.tasks]
        if not known:
            return []
        for task in known:
            del state.tasks[task]
            self._forget(task)
        self._sent -= len(known)
        state.full = False
        spent = self._limit is not None and state.assigned >= self._limit
        if not state.tasks and (spent or len(self._workers) > self._max_workers):
            actions: list[Action] = [self._retire(worker)]
            if self.start_all and not self.closing and len(self._workers) < self._max_workers:
                actions.append(self._start())
            return actions + self._next()
        self._place(worker)
        return self._watch(state, first) + self._next() if self._timed else self._next()

    def _watch(self, state: _Worker, before: int | None) -> list[Action]:
        """Does the time of a task begin, which was behind task ``before`` in its worker's queue?"""
        first = next(iter(state.tasks), None)
        return (
            [Watch(first)] if first is not None and first != before and first in self._timed else []
        )

    def _forget(self, task: int) -> None:
        """A task is settled."""
        if self._timed:
            self._timed.discard(task)
        if self._retries:
            self._retries.pop(task, None)

    def _retire(self, worker: int) -> Retire:
        del self._workers[worker]
        self._idle.pop(worker, None)
        self._room.pop(worker, None)
        return Retire(worker)

    def _put_back(self, tasks: list[int]) -> None:
        """These are pending again; the pending tasks stay in the order of their numbers."""
        for task in tasks:
            later = next((i for i, other in enumerate(self._pending) if other > task), None)
            if later is None:
                self._pending.append(task)
            else:
                self._pending.insert(later, task)

    def _takes(self, state: _Worker) -> int:
        """How many more tasks may a worker be sent now?"""
        is_full = state.full and state.tasks  # else all was taken back since
        if not state.ready or state.condemned or is_full:
            return 0
        room = self._ahead + 1 - len(state.tasks)
        return room if self._limit is None else min(room, self._limit - state.assigned)

    def _place(self, worker: int) -> None:
        """Enter a worker where it belongs: idle, with room for more, or neither."""
        state = self._workers[worker]
        takes = self._takes(state) > 0
        if takes and not state.tasks:
            self._idle[worker] = 0
        else:
            self._idle.pop(worker, None)
        if takes and state.tasks:
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
                    worker = next(reversed(self._idle))
                elif self._room:
                    worker = next(iter(self._room))
                    self._room.move_to_end(worker)
                else:
                    break
                state = self._workers[worker]
                count = self._takes(state)
                if count < 1:  # it was entered when more was sent ahead
                    self._place(worker)
                    continue
                # All that it takes, if there is no other: the same as one at a time, at less cost.
                alone = len(self._idle) + len(self._room) == 1
                count = min(count, len(pending)) if alone else 1
                for _ in range(count):
                    task = pending.popleft()
                    state.tasks[task] = None
                    actions.append(Send(task, worker))
                    if self._timed and task in self._timed and len(state.tasks) == 1:
                        actions.append(Watch(task))
                state.assigned += count
                self._sent += count
                self._place(worker)
            if len(self._workers) < self._max_workers:
                self._start_workers(actions)
        while self._idle and len(self._workers) > self._max_workers:
            actions.append(self._retire(next(iter(self._idle))))
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
            needed = self._max_workers if self.start_all else waiting - len(self._idle) - starting
            missing = min(needed, self._max_workers - len(self._workers))
            actions.extend(self._start() for _ in range(missing))

    def _recall(self, actions: list[Action]) -> None:
        """Something to do for an idle worker: half of what the busiest has not begun."""
        busiest = max(self._workers, key=lambda worker: len(self._workers[worker].tasks))
        waiting = len(self._workers[busiest].tasks) - 1
        if waiting > 0:
            actions.append(Recall(busiest, (waiting + 1) // 2))
