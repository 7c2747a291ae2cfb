"""The foreman: has the tasks and the workers, and performs what the state machine says about them.

All of it happens under one lock, the driver's, which guards the machine, the table of tasks and the fleet, and so all
sending.  The caller takes it; what is safe without says so.  While it is held the store's lock may be taken, never the
other way round, and no future is resolved: methods return the tasks that failed, to be settled without the lock.

This file is longer than most because its idea cannot be halved: each event (a task is taken on, answered, given up, a
worker is ready, dies, is late) changes the same three tables, has the machine decide, and performs that at once, which
can make more events.  What need not be in here is not: sockets and processes are the fleet's, clocks the deadlines',
who waits for answers is up to the attention, reading them to the answers.
"""

from __future__ import annotations

import signal
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import Any

from shmpool.dispatch.attention import Attention
from shmpool.dispatch.counts import Counts
from shmpool.dispatch.deadlines import Deadlines
from shmpool.dispatch.fleet import Fleet
from shmpool.dispatch.settle import Failures, death, lack
from shmpool.dispatch.state import (
    Action,
    Again,
    Break,
    Fail,
    Machine,
    Recall,
    Retire,
    Send,
    Start,
    Stop,
    Watch,
)  # fmt: skip
from shmpool.dispatch.table import Table
from shmpool.dispatch.task import Task
from shmpool.dispatch.wakeup import WakeUp
from shmpool.errors import BrokenPoolError, TaskTimeoutError
from shmpool.interrupts import WholeLock
from shmpool.store.books import INSIDE
from shmpool.store.store import ObjectStore
from shmpool.worker.process import ProcessLike, WorkerHandle

__all__ = ["Foreman"]


class Foreman:
    """Has tasks run by workers.

    Parameters
    ----------
    lock : WholeLock
    machine : Machine
    store : ObjectStore
    attention : Attention
    wakeup : WakeUp

    Attributes
    ----------
    lock : WholeLock
        Never taken twice, but it knows which thread has it.
    machine : Machine
        For others to look at, not to tell anything.
    table : Table
        The tasks.
    fleet : Fleet or None
        None before the first workers are to be started.
    processes : dict of int to process
        Of the workers, by pid.
    deadlines : Deadlines
    counts : Counts
    broken : str or None
        Why the pool is of no use.
    """

    def __init__(
        self,
        lock: WholeLock,
        machine: Machine,
        store: ObjectStore,
        attention: Attention,
        wakeup: WakeUp,
    ) -> None:
        self.lock = lock
        self.machine = machine
        self.fleet: Fleet | None = None
        self.processes: dict[int, ProcessLike] = {}
        self.deadlines = Deadlines(wakeup)
        self.counts = Counts()
        self.table = Table(self.deadlines, self.counts)
        self.broken: str | None = None
        self._store = store
        self._attention = attention
        self._init_failures: dict[int, str] = {}  # workers whose initializer raised: the traceback
        self._no_room: Callable[[], Exception] | None = None  # why no worker could be started

    def is_inside(self) -> bool:
        """Does this thread hold a lock of ours, so that this is a finalizer or a signal handler that interrupted it?

        Safe without the lock.
        """
        return self.lock.is_owned() or self._store.is_inside()

    def check_outside(self) -> None:
        """Raise if so."""
        if self.is_inside():
            raise RuntimeError(INSIDE)

    # ---------------------------------------------------------------- what users want

    def take_on(self, tasks: Sequence[Task], driver: weakref.ref[Any]) -> Failures:
        """New tasks, at least one, all with the same limits; ``driver``: whom their futures ask."""
        numbers = self.table.add(tasks, driver)
        timeout, retries, _ = tasks[0].limits
        actions = self.machine.submitted_all(numbers, timeout is not None, retries)
        return self._perform(actions, quietly=len(numbers) == 1)

    def give_up(self, number: int, *, kill: bool) -> tuple[bool, Failures]:
        """Give up a task that was sent: take it back, or else kill the worker if it runs it; and whether it came so."""
        assert self.lock.is_owned()
        task = self.table.tasks.get(number)
        if task is None:
            return False, []
        handle = task.handle
        if handle is None:  # it was sent, taken back, and not yet sent again
            unread = [number]
            actions = self.machine.withdrawn(number)
        else:
            unread = self._take_back_from(handle)
            unwanted = number if number in unread else None
            kill = kill and self._doom(handle, number, unread, CancelledError())
            actions = self.machine.recalled(handle.number, unread, unwanted) if unread else []
        taken = number in unread
        if taken:
            self.table.drop(number)
        return taken or kill, self._perform(actions)

    def resize(self, max_workers: int) -> Failures:
        """Have more workers, or fewer."""
        return self._perform(self.machine.resized(max_workers))

    def refuse_more(self) -> None:
        """Take on no more tasks.  Safe without the lock: :meth:`close` is to follow."""
        self.machine.closing = True

    def close(self) -> Failures:
        """No more tasks will come: finish, and let the workers end."""
        return self._perform(self.machine.closed())

    def forget_cancelled(self, tasks: list[tuple[int, Task]]) -> Failures:
        """Those of these tasks are wanted no more that were cancelled before they were sent."""
        assert self.lock.is_owned()
        failures: Failures = []
        for number, _ in tasks:
            if self.table.drop_if_cancelled(number):
                failures += self._perform(self.machine.withdrawn(number))
        return failures

    def break_pool(self, reason: str, signal_number: int = signal.SIGTERM) -> Failures:
        """The pool is of no use: end the workers, fail what is left."""
        assert self.lock.is_owned()
        self.broken = reason
        self.machine.closing = self.machine.stopped = True
        if self.fleet is not None:
            self.fleet.signal(signal_number)
            self.fleet.stop()  # for who does not listen to the signal
        return [
            self._failure(action) for action in self.machine.broke() if isinstance(action, Fail)
        ]

    # ---------------------------------------------------------------- what workers do

    def start_first(self) -> None:
        """Start the workers that must be there before the first task.

        Raises
        ------
        Exception
            What starting one raised.
        """
        assert self.lock.is_owned()
        assert self.fleet is not None
        for action in self.machine.started():
            assert isinstance(action, Start)
            self.fleet.start(action.worker)

    def unstart(self) -> None:
        """The first workers, or what goes with them, could not be had: have none, and no fleet, as before."""
        assert self.lock.is_owned()
        assert self.fleet is not None
        self.fleet.signal(signal.SIGKILL)
        self.fleet.bury()
        self.machine.unstarted()
        self.fleet = None

    def ready(self, handle: WorkerHandle) -> Failures:
        """A worker has started."""
        assert self.fleet is not None
        self.fleet.ready(handle)
        return self._perform(self.machine.ready(handle.number))

    def init_failed(self, handle: WorkerHandle, text: str) -> None:
        """A worker's initializer has raised.  It may have more to do: the pool breaks when it has ended."""
        assert self.lock.is_owned()
        self._init_failures[handle.number] = text

    def go_on(self, handle: WorkerHandle, done: list[tuple[int, int]]) -> Failures:
        """Decide what is next, once a worker has answered these tasks, in so many microseconds each."""
        return self._perform(self.machine.answered_all(handle.number, done))

    def stop_reading(self, handle: WorkerHandle) -> None:
        """Nothing more will come from a worker."""
        assert self.lock.is_owned()
        assert self.fleet is not None
        self.fleet.stop_reading(handle)

    def condemn(self, handle: WorkerHandle, problem: str) -> None:
        """Whatever it was, this worker cannot be relied upon any more; the others can."""
        assert self.lock.is_owned()
        handle.end.problem = problem
        self.machine.condemned(handle.number)
        handle.signal(signal.SIGKILL)

    def died(self, handle: WorkerHandle) -> Failures:
        """A worker has ended, and its last answers were read."""
        assert self.lock.is_owned()
        assert self.fleet is not None
        worker = handle.number
        failures: Failures = []
        text = self._init_failures.pop(worker, None)
        if text is not None and self.broken is None:
            failures += self.break_pool(
                f"A process in the process pool failed to initialize:\n{text}"
            )
        unread = self.fleet.take_back(worker) if worker in self.fleet.workers else []
        self._moved(handle, unread)
        failures += self._perform(self.machine.died(worker, unread))
        self.fleet.remove(worker, handle)
        self._attention.lost(handle)
        return failures

    def sweep(self) -> Failures:
        """Let workers leave that have had nothing to do for long: some time has passed, always the same."""
        return self._perform(self.machine.swept())

    def tell_idle(self) -> None:
        """After some idle time: tell workers what they need not keep."""
        assert self.lock.is_owned()
        if self.fleet is not None and not self.machine.stopped:  # else nobody listens
            self.fleet.tell_idle()

    def is_done(self) -> bool:
        """Is the last task settled, and the last worker gone?"""
        assert self.lock.is_owned()
        return self.machine.stopped and not self.fleet

    def end_overdue(self) -> Failures:
        """End the tasks that have run for too long."""
        assert self.lock.is_owned()
        failures: Failures = []
        for number in self.deadlines.overdue():
            task = self.table.tasks[number]
            handle, timeout = task.handle, task.limits.timeout
            assert handle is not None  # or it would have no deadline
            assert timeout is not None
            unread = self._take_back_from(handle)
            why = TaskTimeoutError(task=task.function.name, timeout=timeout)
            self._doom(handle, number, unread, why)
            if unread:
                failures += self._perform(self.machine.recalled(handle.number, unread))
        return failures

    # ---------------------------------------------------------------- performing actions

    def _perform(self, actions: list[Action], *, quietly: bool = False) -> Failures:
        """Do it; return the tasks that failed, for the caller to settle without the lock.

        ``quietly``: the caller may be about to wait for the answer, and wants to read it itself.
        """
        assert self.lock.is_owned()
        failures: Failures = []
        todo = deque(actions)
        fleet, machine = self.fleet, self.machine
        while todo:
            if type(todo[0]) is Send:
                self._send(todo, failures, quietly)
                continue
            action = todo.popleft()
            if isinstance(action, Fail):
                failures.append(self._failure(action))
                continue
            if isinstance(action, Watch):
                task = self.table.tasks.get(action.task)
                if task is not None and task.handle is not None and task.limits.timeout is not None:
                    self.deadlines.begin(action.task, task.limits.timeout)
                continue
            if fleet is None:
                continue  # nothing was ever started
            if isinstance(action, Start):
                todo.extend(self._start(fleet, action.worker, failures))
            elif isinstance(action, Recall):
                numbers = fleet.take_back(action.worker, action.most)
                self._moved(fleet.workers[action.worker], numbers)
                todo.extend(machine.recalled(action.worker, numbers))
            elif isinstance(action, Again):
                self.counts.retried += 1
                self._moved(fleet.workers[action.worker], [action.task])
            elif isinstance(action, Retire):
                fleet.retire(action.worker)
            elif isinstance(action, Stop):
                fleet.stop()
            elif isinstance(action, Break):
                failures += self.break_pool(
                    "A child process terminated abruptly, the process pool is not usable anymore: workers end before "
                    "they are ready to run a task"
                )
        return failures

    def _send(self, todo: deque[Action], failures: Failures, quietly: bool) -> None:
        """Take off all Sends that come next, and send each worker its tasks together; enter what follows from it."""
        fleet, machine, table = self.fleet, self.machine, self.table
        assert fleet is not None
        batches: dict[int, list[tuple[int, Task]]] = {}
        while todo and type(send := todo[0]) is Send:
            todo.popleft()
            number, worker = send
            task = table.begin(number)
            if task is None:
                todo.extend(machine.dropped(worker, number))
            else:
                batches.setdefault(worker, []).append((number, task))
        for worker, batch in batches.items():
            handle = fleet.workers[worker]
            self._attention.expect(handle, quietly=quietly and machine.load(worker) == 1)
            while batch:
                sent, error = fleet.send(worker, batch)
                del batch[:sent]
                if error is None:
                    break
                if isinstance(error, ConnectionError):
                    handle.signal(signal.SIGKILL)  # it reads no more
                    break
                # Too many descriptors, too long: it will not go later either.
                number, _ = batch.pop(0)
                failures.append((table.failed(number), error))
                todo.extend(machine.dropped(worker, number))
            for number, task in reversed(batch):
                task.handle = None
                todo.extend(machine.refused(worker, number))

    def _start(self, fleet: Fleet, worker: int, failures: Failures) -> list[Action]:
        try:
            fleet.start(worker)
        except Exception as error:  # the system's, or what pickling the initializer raised
            if self.machine.start_failed(worker):
                return []  # the others go on, and a later event tries again
            self._no_room = lack(error)
            if self._no_room is not None:
                return self.machine.starved()  # ... and so does the next task
            reason = f"no worker could be started: {type(error).__name__}: {error}"
            failures += self.break_pool(reason)
        return []

    def _failure(self, action: Fail) -> tuple[Task, BaseException]:
        task = self.table.failed(action.task)
        if task.doom is not None:
            return task, task.doom
        if action.worker is None and self.broken is None and self._no_room is not None:
            return task, self._no_room()
        if action.worker is None:
            return task, BrokenPoolError(self.broken or "the pool is broken")
        self.counts.died += 1
        assert self.fleet is not None
        handle = self.fleet.workers[action.worker]
        return task, death(handle, task, handle.process.exitcode)

    # ---------------------------------------------------------------- taking back

    def _take_back_from(self, handle: WorkerHandle) -> list[int]:
        """What a worker has not read."""
        assert self.fleet is not None
        unread = self.fleet.take_back(handle.number)
        self._moved(handle, unread)
        return unread

    def _moved(self, handle: WorkerHandle, numbers: list[int]) -> None:
        """These tasks were taken back from a worker: who waits for one of them there must wait elsewhere."""
        self.table.moved(numbers)
        self._attention.moved(handle, numbers)

    def _doom(
        self, handle: WorkerHandle, number: int, unread: list[int], why: BaseException
    ) -> bool:
        """End a task with the worker that runs it: its future fails when the worker has ended.

        False if the worker, of which this is what it has not read, does not run it: it may not have come to read it, on
        a busy system; or it has answered it, and another task would be lost.
        """
        if not self.machine.is_running(handle.number, number, unread):
            return False
        self.table.tasks[number].doom = why
        self.machine.doomed(number)
        self.machine.condemned(handle.number)
        handle.signal(signal.SIGKILL)
        return True
