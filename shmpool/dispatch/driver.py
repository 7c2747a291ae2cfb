"""The driver: performs what the state machine says, with real processes, sockets and futures.

Threads and the lock::

    submit() in any thread ----> _lock: machine, sends to an idle worker ---.
                                                                           v
    dispatcher thread: one wait on all answers, exits and the wake-up <-- workers
         reads answers -> _lock: machine, sends what is next -> unpickles -> futures

``_lock`` guards the machine, the table of tasks and the fleet, and so all sending.  Futures are resolved (which runs
the user's callbacks) and results unpickled (the user's code, too) without it.  While it is held the store's lock may
be taken, never the other way round.  Our own finalizers and signal handlers only set a flag and write to the wake-up.

Those of the user's may call anything, at any line, also while this very thread holds one of the locks: what they call
then says so, instead of waiting for ever (:meth:`Driver._is_inside`).  Nor may they wait while this thread is the one
that has to read the answers (:meth:`Driver._stand_down`).

The dispatcher thread starts after the first workers, so that under fork they are forked from a process that has no
thread of ours, and ends when the last worker is gone.  It is started without the lock: that takes threading's own, and
a finalizer that runs inside of those, in any thread, may want ours.  Meanwhile all may submit.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import select
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError
from typing import Literal

from shmpool.dispatch import living
from shmpool.dispatch.counts import Counts
from shmpool.dispatch.fleet import Fleet, Source
from shmpool.dispatch.future import TaskFuture
from shmpool.dispatch.settle import Failures, death, each, resolve, settle, without_frames
from shmpool.dispatch.state import (
    SWEEPS,
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
from shmpool.dispatch.task import Task
from shmpool.dispatch.timer import Timer
from shmpool.errors import BrokenPoolError, TaskTimeoutError, WireError
from shmpool.interrupts import JoinableThread, WholeLock, heard, whole
from shmpool.store.blocks import ArenaInfo, Block
from shmpool.store.books import INSIDE
from shmpool.store.store import ObjectStore, Payload
from shmpool.wire import messages
from shmpool.wire.messages import Answer, Failed, Ready
from shmpool.worker.process import ProcessLike, Starter, WorkerHandle

#: For so many seconds nobody may wait for the answer to a task that was sent to an idle worker.
_UNWATCHED = 0.005
#: For so many seconds at most is waited for somebody who reads answers; a callback may keep him.
_PATIENCE = 1.0

__all__ = ["Driver"]

_log = logging.getLogger("shmpool")

#: A task, whether it raised nothing, and its result (or what it raised), still packed; or why there is none.
_Answered = tuple[Task, bool, Payload | BaseException]


class _Lead:
    """A thread reads a worker's answers."""

    __slots__ = ("doing", "handle", "rung")

    def __init__(self, handle: WorkerHandle) -> None:
        self.handle = handle
        self.doing: Literal["", "waits", "reads"] = "waits"  # or is on its way to it
        self.rung = False  # the bell, for it


class Driver:
    """Runs tasks on workers.

    Parameters
    ----------
    machine : Machine
    store : ObjectStore
    make_starters : callable
        Returns what starts the first workers, and what then makes the starter of all others; called once, before this
        process has a thread of the driver's.
    cleanup : callable
        Called after the last worker is gone.
    idle_timeout : float or None
        Workers leave that had nothing to do for so many seconds, or up to a quarter longer.
    """

    def __init__(
        self,
        machine: Machine,
        store: ObjectStore,
        make_starters: Callable[[], tuple[Starter, Callable[[], Starter]]],
        cleanup: Callable[[], None],
        idle_timeout: float | None = None,
    ) -> None:
        self._lock = WholeLock()  # never taken twice, but it knows which thread has it
        self._machine = machine
        self._store = store
        self._make_starters = make_starters
        self._cleanup = cleanup
        self._idle_timeout = idle_timeout
        self._next_sweep = math.inf  # a time, as all: by time.monotonic
        self._fleet: Fleet | None = None
        self._tasks: dict[int, Task] = {}
        self._task_ids = itertools.count()
        self._deadlines: dict[
            int, float
        ] = {}  # tasks that run, and whose time is limited: until when
        self._looks_at = (
            math.inf
        )  # when the dispatcher will look at those, if nothing happens before
        self._init_failures: dict[int, str] = {}  # workers whose initializer raised: the traceback
        self._wake = -1
        self._timer: Timer | None = None
        self._unwatched: set[WorkerHandle] = (
            set()
        )  # have a task, and nobody waits for their answers yet
        self._bell = -1  # readable once for each leading thread that should stop
        self._leaders: dict[int, _Lead] = {}  # whose answers a thread reads, by thread
        self._wake_lock = threading.Lock()  # guards the closing of _wake
        self._thread: JoinableThread | None = None
        self._starting: JoinableThread | None = None  # the same, until it runs
        self._starter = 0  # the thread that is starting it
        self._abandoned = False
        #: At interpreter exit somebody else ends it, later: to be set before the start.
        self.ends_late = False
        self.pid = os.getpid()
        self.ref = weakref.ref(self)
        self.processes: dict[int, ProcessLike] = {}
        self.counts = Counts()
        self.broken: str | None = None
        self._no_room: tuple[int | None, str] | None = None  # why no worker could be started
        self.finished = False

    # ---------------------------------------------------------------- from the user's threads

    def _is_inside(self) -> bool:
        """Does this thread hold a lock of ours, so that this is a finalizer or a signal handler that interrupted it?"""
        return self._lock.is_owned() or self._store.is_inside()

    def _check_outside(self) -> None:
        if self._is_inside():
            raise RuntimeError(INSIDE)

    def start_all(self) -> None:
        """Start all workers now, and keep up their number; to be called before anything else."""
        self._machine.start_all = True
        self.start()

    def start(self) -> None:
        """Start the workers that must be there before the first task is pickled, once.

        Raises
        ------
        Exception
            What starting a process raised.
        """
        if self._thread is not None:
            return
        self._check_outside()
        with whole:
            with self._lock:
                thread = self._start_workers()
            if thread is not None:
                self._start_thread(thread)

    def _start_workers(self) -> JoinableThread | None:
        """Start the first workers; return the dispatcher thread if the caller is the one to start it."""
        if self._thread is not None or self.finished:  # another thread was faster
            return None
        if self._starting is not None:
            if self._is_starter():
                raise RuntimeError(INSIDE)
            return None
        fleet = Fleet(self._store, self.processes)
        self._store.start_use(self.wake)
        try:
            self._fleet = fleet
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            fleet.poller.register(self._wake, select.EPOLLIN)
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
            self._timer = Timer(_UNWATCHED)
            fleet.poller.register(self._timer.fd, select.EPOLLIN)
            fleet.starter, make_later = self._make_starters()
            for action in self._machine.started():
                assert isinstance(action, Start)
                fleet.start(action.worker)
            fleet.starter = make_later()
            thread = JoinableThread(self._run, "shmpool-dispatcher")
            thread.daemon = thread.daemon or self.ends_late  # else threading would wait for it
        except BaseException:
            self._unstart(fleet)
            raise
        self._starting, self._starter = thread, threading.get_ident()
        living.register(self)
        return thread

    def _unstart(self, fleet: Fleet) -> None:
        """The system may have had no room.  Nothing has been taken on: whoever asks next tries again."""
        fleet.signal(signal.SIGKILL)
        for worker, handle in list(fleet.workers.items()):
            handle.process.join()
            fleet.remove(worker, handle)
        self._machine.unstarted()
        self._finish()
        self._fleet, self.finished = None, False

    def _start_thread(self, thread: JoinableThread) -> None:
        failures: Failures = []
        try:
            thread.start()
            self._thread = thread  # it says so itself, but it may not have come to that
        except BaseException as error:
            with self._lock:
                if self._starting is not thread:
                    raise  # it runs: this is what a signal handler raised
                self._starting = None
                if self.counts.submitted or self._machine.closing:  # by others, meanwhile
                    self._thread = thread
                    failures = self._break(f"no thread could be started: {error}", signal.SIGKILL)
                else:
                    assert self._fleet is not None
                    self._unstart(self._fleet)
            try:
                settle(failures)
            finally:
                if self._thread is thread:
                    self._work()  # until the workers are gone
                thread.give_up()
            raise
        finally:
            self._starter = 0

    def _is_starter(self) -> bool:
        """Is this a finalizer or a signal handler in the thread that starts the dispatcher, and so must not wait?"""
        return self._starting is not None and self._starter == threading.get_ident()

    def submit(self, tasks: Sequence[Task]) -> None:
        """Take on tasks, at least one, all with the same limits.

        Raises
        ------
        RuntimeError
            After shutdown.
        BrokenPoolError
            The pool is broken.
        """
        self._check_outside()
        counts, table = self.counts, self._tasks
        with self._lock:
            self.check()
            numbers = []
            for task in tasks:
                number = next(self._task_ids)
                numbers.append(number)
                table[number] = task
                task.future.driver = self.ref
                task.future.number = number
                counts.count(task.arguments)
                if not task.function.counted:
                    task.function.counted = True
                    counts.count(task.function.payload)
            counts.submitted += len(numbers)
            timeout, retries, _ = tasks[0].limits
            actions = self._machine.submitted_all(numbers, timeout is not None, retries)
            failures = self._perform(actions, quietly=len(numbers) == 1)
        settle(failures)

    def take_back(self, number: int) -> bool:
        """Give a task up that was sent, if its worker has not begun it; False if it has."""
        if self._is_inside():
            return False  # it was garbage, such as the results of a map, and is only run in vain
        return self._give_up(number, kill=False)

    def end_running(self, number: int) -> bool:
        """The same, but if its worker runs it, the worker is killed; False if it has been answered."""
        self._check_outside()
        until = time.monotonic() + _PATIENCE
        while not self._give_up(number, kill=True):
            task = self._tasks.get(number)
            handle = None if task is None else task.handle
            if handle is None or time.monotonic() > until:
                return False
            # Its worker has answered the tasks before it, but nobody has read that: it is not known yet what runs.
            if handle.reader.acquire(blocking=False):
                try:
                    if not self._read(handle):
                        return self._give_up(number, kill=True)
                finally:
                    handle.reader.release()
            else:
                time.sleep(0.001)  # somebody is reading
        return True

    def _give_up(self, number: int, *, kill: bool) -> bool:
        with self._lock:
            task = self._tasks.get(number)
            if task is None:
                return False
            handle = task.handle
            if handle is None:  # it was sent, taken back, and not yet sent again
                unread = [number]
                actions = self._machine.withdrawn(number)
            else:
                unread = self._take_back_from(handle)
                unwanted = number if number in unread else None
                kill = kill and self._doom(handle, number, unread, CancelledError())
                actions = self._machine.recalled(handle.number, unread, unwanted) if unread else []
            taken = number in unread
            if taken:
                del self._tasks[number]
                task.arguments.release()
            failures = self._perform(actions)
        settle(failures)
        return taken or kill

    def _take_back_from(self, handle: WorkerHandle) -> list[int]:
        """What a worker has not read."""
        assert self._fleet is not None
        if self._fleet.workers.get(handle.number) is not handle:
            return []
        unread = self._fleet.take_back(handle.number)
        self._moved(handle, unread)
        return unread

    def _doom(
        self, handle: WorkerHandle, number: int, unread: list[int], why: BaseException
    ) -> bool:
        """End a task with the worker that runs it: its future fails when the worker has ended.

        False if the worker, of which this is what it has not read, does not run it: it may not have come to read it, on
        a busy system; or it has answered it, and another task would be lost.
        """
        if not self._machine.is_running(handle.number, number, unread):
            return False
        self._tasks[number].doom = why
        self._machine.doomed(number)
        self._machine.condemned(handle.number)
        handle.signal(signal.SIGKILL)
        return True

    def resize(self, max_workers: int) -> None:
        """Have more workers, or fewer."""
        self._check_outside()
        with self._lock:
            failures = self._perform(self._machine.resized(max_workers))
        settle(failures)

    def lead(self, number: int, future: TaskFuture, timeout: float | None) -> None:
        """Read answers in the thread that waits for one: the dispatcher need not be woken, nor wake that thread.

        Returns when the future is done, when ``timeout`` seconds are over, or when this thread cannot help (any more):
        another one reads this worker's answers, or the worker has ended.
        """
        self._check_outside()
        if not self._stand_down():
            return  # this interrupts the reading of answers, which could not be gone on with after another lead
        deadline = None if timeout is None else time.monotonic() + timeout
        while not future.is_settled:
            with whole:
                if not self._lead_once(number, deadline):
                    return

    def _lead_once(self, number: int, deadline: float | None) -> bool:
        """Read answers once; False if this thread cannot help.  Of all this, Ctrl-C ends nothing but the wait."""
        with self._lock:
            lead = self._start_leading(number)
        if lead is None:
            return False
        answers, moved = None, False
        try:
            seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
            with heard():
                there = lead.handle.wait(seconds, self._bell)
            lead.doing = "reads"
            if there and self._is_leading(lead):
                answers = self._read_once(lead.handle, copy=True)
        finally:
            lead.doing = ""
            with self._lock:
                if self._is_leading(lead):
                    moved = self._stop_leading(lead.handle)
                elif lead.rung and not self.finished:
                    os.eventfd_read(self._bell)
        self._deliver(answers or ())
        return answers is not None or moved

    def _start_leading(self, number: int) -> _Lead | None:
        """The worker that has task ``number``, if this thread is to read its answers."""
        task = self._tasks.get(number)
        handle = None if task is None else task.handle
        if handle is None or not handle.reader.acquire(blocking=False):
            return None
        assert self._fleet is not None
        lead = self._leaders[threading.get_ident()] = _Lead(handle)
        handle.leading = number
        self._fleet.disarm(handle)
        self._unwatched.discard(handle)
        return lead

    def _stop_leading(self, handle: WorkerHandle) -> bool:
        """Leave the worker's answers to the dispatcher again; True if the task was moved to another worker."""
        assert self._fleet is not None
        del self._leaders[threading.get_ident()]
        moved, handle.leading = handle.leading is None, None
        if moved:
            os.eventfd_read(self._bell)
        if self._machine.load(handle.number):
            self._fleet.arm(handle)
        handle.reader.release()
        return moved

    def _is_leading(self, lead: _Lead) -> bool:
        return self._leaders.get(threading.get_ident()) is lead

    def _stand_down(self) -> bool:
        """Lead no more, if this thread does: a signal handler or finalizer has interrupted it, and is about to wait.

        False if it cannot: it was interrupted while it read.  (An exception in the wrong place, such as a second
        Ctrl-C, may also leave a thread the leader that it should not be; this mends it.)
        """
        lead = self._leaders.get(threading.get_ident())
        if lead is None:
            return True
        if lead.doing == "reads":
            return False
        lead.handle.leave()
        with self._lock:
            self._stop_leading(lead.handle)
            if lead.doing == "waits":  # and would go on when this is over
                lead.rung = True
                os.eventfd_write(self._bell, 1)
        return True

    def _moved(self, handle: WorkerHandle, numbers: list[int]) -> None:
        """These tasks were taken back from a worker: who waits for one of them there must wait elsewhere."""
        for number in numbers:
            if number in self._tasks:
                self._tasks[number].handle = None
                self._tasks[number].introduced = ()
                self._deadlines.pop(number, None)
        if handle.leading in numbers:
            handle.leading = None
            os.eventfd_write(self._bell, 1)

    def check(self) -> None:
        """Raise what submit raises."""
        if self.broken is not None:
            raise BrokenPoolError(self.broken)
        if self._machine.closing:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if living.is_exiting(self):
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        if os.getpid() != self.pid:
            raise RuntimeError(
                "this executor belongs to the process that made it; make another one after a fork"
            )

    def shutdown(
        self, cancel_futures: bool, *, interrupted: bool = False
    ) -> threading.Thread | None:
        """Take no more tasks; return the thread to join, if there is one.

        ``interrupted``: Ctrl-C has ended the tasks that ran, and no other is to begin.
        """
        if os.getpid() != self.pid:
            return None
        if self._is_inside() or self._is_starter() or not self._stand_down():
            self._machine.closing = True
            self.abandon()
            return None  # to wait for the end in here would be to prevent it
        with self._lock:
            failures = self._perform(self._machine.closed())
            thread = self._thread or self._starting
            if thread is None:
                self.finished = True
        settle(failures)
        if cancel_futures or interrupted:
            self._cancel_waiting(sent_ahead=interrupted)
        self.wake()
        return thread

    def begin_no_more(self) -> None:
        """Begin no task any more: the program has been interrupted, and ends."""
        self._cancel_waiting(sent_ahead=True)

    def _cancel_waiting(self, *, sent_ahead: bool = False) -> None:
        """Cancel the tasks that have not begun."""
        with self._lock:
            # As in the standard library, what was sent to a worker is finished.
            waiting = [(number, task) for number, task in self._tasks.items() if not task.started]
            if sent_ahead:
                # Last first: what is taken back is not to be sent anew.
                waiting += [item for item in reversed(self._tasks.items()) if item[1].started]
        # Cancelling runs callbacks, so it happens without the lock; some may begin meanwhile.
        try:
            each(lambda _, task: task.future.cancel(), waiting)
        finally:
            failures: Failures = []
            with self._lock:
                for number, task in waiting:
                    if number in self._tasks and not task.started and task.future.cancelled():
                        del self._tasks[number]
                        task.future.set_running_or_notify_cancel()
                        task.arguments.release()
                        failures += self._perform(self._machine.withdrawn(number))
            settle(failures)

    def terminate(self, signal_number: int) -> None:
        """End all workers with a signal; tasks under way fail, the others are cancelled, no more are taken."""
        thread = self.shutdown(cancel_futures=False)
        if thread is None:
            return
        try:
            self._cancel_waiting()
        finally:
            failures: Failures = []
            with self._lock:
                if not self.finished:
                    why = "the workers of this pool were terminated"
                    failures = self._break(why, signal_number)
            settle(failures)
            self.wake()

    def wait_for_end(self) -> None:
        """At interpreter exit: wait until the last worker is gone."""
        self._stand_down()
        with self._lock:  # it may be about to start
            thread = self._thread or self._starting
        if thread is not None:
            thread.join()

    def abandon(self) -> None:
        """Nobody can submit any more: finish and stop.  Safe in finalizers."""
        self._abandoned = True
        self.wake()

    def wake(self) -> None:
        """Make the dispatcher thread look around.  Safe in finalizers and signal handlers."""
        # Whoever holds this lock is waking it up, too, or has ended it.
        with whole:
            if self._wake_lock.acquire(blocking=False):
                try:
                    if self._wake >= 0 and os.getpid() == self.pid:
                        os.eventfd_write(self._wake, 1)
                finally:
                    self._wake_lock.release()

    # ---------------------------------------------------------------- performing actions (holding _lock)

    def _perform(self, actions: list[Action], *, quietly: bool = False) -> Failures:
        """Do it; return the tasks that failed, for the caller to settle without the lock.

        ``quietly``: the caller may be about to wait for the answer, and wants to read it itself.
        """
        assert self._lock.is_owned()
        failures: Failures = []
        todo = deque(actions)
        fleet, machine = self._fleet, self._machine
        while todo:
            if type(todo[0]) is Send:
                self._send(todo, failures, quietly)
                continue
            action = todo.popleft()
            if isinstance(action, Fail):
                failures.append(self._failure(action))
                continue
            if isinstance(action, Watch):
                self._watch(action.task)
                continue
            if fleet is None:
                continue  # nothing was ever started
            if isinstance(action, Start):
                todo.extend(self._start(action.worker, failures))
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
                failures += self._break(
                    "A child process terminated abruptly, the process pool is not usable anymore: workers end before "
                    "they are ready to run a task"
                )
        return failures

    def _send(self, todo: deque[Action], failures: Failures, quietly: bool) -> None:
        """Take off all Sends that come next, and send each worker its tasks together; enter what follows from it."""
        batches: dict[int, list[tuple[int, Task]]] = {}
        while todo and type(send := todo[0]) is Send:
            todo.popleft()
            number, worker = send
            task = self._tasks[number]
            if not task.started:
                if not task.future.set_running_or_notify_cancel():
                    del self._tasks[number]
                    task.arguments.release()
                    todo.extend(self._machine.dropped(worker, number))
                    continue
                task.started = True
            batches.setdefault(worker, []).append((number, task))
        assert self._fleet is not None
        for worker, batch in batches.items():
            self._watch_answers(worker, quietly)
            while batch:
                sent, error = self._fleet.send(worker, batch)
                del batch[:sent]
                if error is None:
                    break
                if isinstance(error, ConnectionError):
                    self._fleet.workers[worker].signal(signal.SIGKILL)  # it reads no more
                    break
                # Too many descriptors, too long: it will not go later either.
                number, task = batch.pop(0)
                del self._tasks[number]
                self.counts.failed += 1
                failures.append((task, error))
                todo.extend(self._machine.dropped(worker, number))
            for number, task in reversed(batch):
                task.handle = None
                todo.extend(self._machine.refused(worker, number))

    def _watch_answers(self, worker: int, quietly: bool) -> None:
        """A worker is about to get tasks: is the dispatcher to wait for the answers?

        Most who submit one task wait for it next.  If the dispatcher waits as well, it wakes up first, and both fight
        for the interpreter lock.  So the first task of an idle worker has nobody who waits for its answer at first.
        The dispatcher does as soon as somebody takes an interest in the future other than by waiting in ``result()``,
        there are more tasks, or some milliseconds have passed.
        """
        assert self._fleet is not None
        handle = self._fleet.workers[worker]
        if handle.leading is not None:
            return  # whoever leads has the dispatcher wait in the end
        if quietly and self._machine.load(worker) == 1:
            assert self._timer is not None
            self._fleet.disarm(handle)
            self._unwatched.add(handle)
            self._timer.start()
        else:
            self._fleet.arm(handle)
            self._unwatched.discard(handle)

    def look(self) -> None:
        """Wait for all answers.  Takes no lock: called from under those of futures."""
        if self._unwatched:
            self.wake()

    def _watch(self, number: int) -> None:
        """A task's time begins, if it was sent."""
        task = self._tasks.get(number)
        if task is None or task.handle is None or task.limits.timeout is None:
            return
        self._deadlines[number] = deadline = time.monotonic() + task.limits.timeout
        if deadline < self._looks_at:
            self.wake()

    def _end_overdue(self) -> None:
        """End the tasks that have run for too long."""
        failures: Failures = []
        now = time.monotonic()
        with self._lock:
            due = [number for number, deadline in self._deadlines.items() if deadline <= now]
            for number in due:
                if self._deadlines.get(number, math.inf) > now:
                    continue  # it was taken back from a worker together with another one
                del self._deadlines[number]
                task = self._tasks.get(number)
                if task is None or task.handle is None or task.limits.timeout is None:
                    continue
                handle = task.handle
                unread = self._take_back_from(handle)
                why = TaskTimeoutError(task=task.function.name, timeout=task.limits.timeout)
                self._doom(handle, number, unread, why)
                if unread:
                    failures += self._perform(self._machine.recalled(handle.number, unread))
        settle(failures)

    def _sweep(self) -> None:
        """Let workers leave that have had nothing to do for long."""
        assert self._idle_timeout is not None
        self._next_sweep = time.monotonic() + self._idle_timeout / SWEEPS
        with self._lock:
            failures = self._perform(self._machine.swept())
        settle(failures)

    def _start(self, worker: int, failures: Failures) -> list[Action]:
        assert self._fleet is not None
        try:
            self._fleet.start(worker)
        except Exception as error:  # the system's, or what pickling the initializer raised
            if self._machine.start_failed(worker):
                return []  # the others go on, and a later event tries again
            if isinstance(error, OSError):
                self._no_room = error.errno, error.strerror or str(error)
                return self._machine.starved()  # ... and so does the next task
            failures += self._break(f"no worker could be started: {type(error).__name__}: {error}")
        return []

    def _failure(self, action: Fail) -> tuple[Task, BaseException]:
        task = self._tasks.pop(action.task)
        self._deadlines.pop(action.task, None)
        self.counts.failed += 1
        if task.doom is not None:
            return task, task.doom
        if action.worker is None and self.broken is None and self._no_room is not None:
            number, why = self._no_room
            told = f"no worker could be started: {why}"
            return task, OSError(number, told) if number else OSError(told)
        if action.worker is None:
            return task, BrokenPoolError(self.broken or "the pool is broken")
        self.counts.died += 1
        assert self._fleet is not None
        handle = self._fleet.workers[action.worker]
        return task, death(handle, task, handle.process.exitcode)

    def _break(self, reason: str, signal_number: int = signal.SIGTERM) -> Failures:
        """The pool is of no use: end the workers, fail what is left."""
        self.broken = reason
        self._machine.closing = self._machine.stopped = True
        if self._fleet is not None:
            self._fleet.signal(signal_number)
            self._fleet.stop()  # for who does not listen to the signal
        return [
            self._failure(action) for action in self._machine.broke() if isinstance(action, Fail)
        ]

    # ---------------------------------------------------------------- the dispatcher thread

    def _run(self) -> None:
        with self._lock:
            if self._starting is not threading.current_thread():
                return  # who started it has given it up
            self._thread, self._starting = self._starting, None
        self._work()

    def _work(self) -> None:
        try:
            self._dispatch()
        except BaseException:
            # A mistake of ours. Nobody may wait for ever because of it.
            _log.exception("the dispatcher failed; its pool is broken")
            with self._lock:
                assert self._fleet is not None
                failures = self._break("the dispatcher failed; see the log", signal.SIGKILL)
                for worker, handle in [*self._fleet.workers.items(), *self._fleet.leaving.items()]:
                    handle.process.join()  # it is killed; else it would stay a zombie
                    self._fleet.remove(worker, handle)
            settle(failures)
        finally:
            self._finish()

    def _dispatch(self) -> None:
        fleet, store, timer = self._fleet, self._store, self._timer
        assert fleet is not None
        assert timer is not None
        while not self._is_finished():
            for source in fleet.wait(self._seconds_to_wait()):
                if source == self._wake:
                    os.eventfd_read(self._wake)
                elif source == timer.fd:
                    timer.clear()
                elif not isinstance(source, Source):
                    continue  # another thread has just taken it off
                elif not fleet.is_current(source):
                    continue
                elif source.is_exit:
                    self._reap(source.worker, source.handle)
                elif source.handle.reader.acquire(blocking=False):  # else another thread leads
                    try:
                        self._read(source.handle)
                    finally:
                        source.handle.reader.release()
            if self._unwatched:
                with self._lock:
                    for handle in self._unwatched:
                        fleet.arm(handle)
                    self._unwatched.clear()
            if self._deadlines:
                self._end_overdue()
            if self._next_sweep <= time.monotonic():
                self._sweep()
            if store.give_back_if_idle():
                with self._lock:
                    if not self._machine.stopped:  # else nobody listens
                        fleet.tell_idle()
            if self._abandoned or living.is_exiting(self):
                with self._lock:
                    failures = self._perform(self._machine.closed())
                settle(failures)

    def _seconds_to_wait(self) -> float | None:
        """How long nothing may happen until there is something to do all the same; None: for ever."""
        with self._lock:
            self._looks_at = min(self._deadlines.values(), default=math.inf)
            if self._idle_timeout is not None:
                if not self._fleet:
                    self._next_sweep = math.inf
                elif self._next_sweep == math.inf:
                    self._next_sweep = time.monotonic() + self._idle_timeout / SWEEPS
            until = min(self._looks_at, self._next_sweep)
        seconds = self._store.idle_seconds()
        if until == math.inf:
            return seconds
        left = max(0.0, until - time.monotonic())
        return left if seconds is None else min(left, seconds)

    def _is_finished(self) -> bool:
        with self._lock:
            return self._machine.stopped and not self._fleet

    def _finish(self) -> None:
        self.finished = True
        with self._wake_lock:
            if self._wake >= 0:
                os.close(self._wake)
            self._wake = -1
        # No lock: workers are gone, and so is who led; and start() holds it when it fails.
        if self._bell >= 0:
            os.close(self._bell)
        self._bell = -1
        if self._timer is not None:
            self._timer.close()
            self._timer = None
        assert self._fleet is not None
        self._fleet.close()
        self._cleanup()
        self._store.end_use(self.wake)
        living.unregister(self)

    def _read(self, handle: WorkerHandle) -> bool:
        """Read once what a worker has answered, and deliver it; False if there was nothing."""
        answers = self._read_once(handle)
        self._deliver(answers or ())
        return answers is not None

    def _read_once(self, handle: WorkerHandle, *, copy: bool = False) -> list[_Answered] | None:
        """Read once what a worker has answered; None if there was nothing.  The caller holds ``handle.reader``.

        Unless copied, small results lie in the channel's buffer: to be delivered before anything else is read.
        """
        if handle.end.problem is not None:
            return None
        received: list[messages.FromParent | messages.FromWorker] = []
        problem: str | None = None
        got: int | None = 0
        try:
            data, got = handle.end.receive()
            problem = handle.end.problem
            for one in data:
                # One by one: what came before something wrong counts.
                received.append(messages.decode(bytes(one) if copy else one))  # noqa: PERF401
        except (WireError, OSError) as error:
            problem = str(error)
        answers, wrong = self._take(handle, received) if received else ([], None)
        problem = wrong or problem
        if problem is not None:
            _log.error("worker %d is of no more use, and is killed: %s", handle.pid, problem)
        if problem is not None or got == 0:
            assert self._fleet is not None
            with self._lock:
                if problem is not None:
                    self._condemn(handle, problem)
                self._fleet.stop_reading(handle)
            return answers or None
        return answers if got else None

    def _take(
        self, handle: WorkerHandle, received: list[messages.FromParent | messages.FromWorker]
    ) -> tuple[list[_Answered], str | None]:
        """Let the machine know of messages.

        Returns
        -------
        list
            The tasks that they answer, with the results still packed.
        str or None
            What is wrong with them.
        """
        assert self._fleet is not None
        machine, tasks, deadlines = self._machine, self._tasks, self._deadlines
        taken: list[tuple[Task, Answer]] = []
        done: list[tuple[int, int]] = []
        actions: list[Action] = []
        problem: str | None = None
        with self._lock:
            for message in received:
                if type(message) is Answer:
                    number = message.task
                    task = tasks.get(number)
                    if task is not None and task.handle is handle:
                        del tasks[number]
                        if deadlines:
                            deadlines.pop(number, None)
                        done.append((number, message.microseconds))
                        self.counts.count_answer(message)
                        taken.append((task, message))
                    elif self.broken is None:
                        problem = f"an answer to task {number}, which was not asked"
                    else:  # it has failed with the pool
                        handle.end.descriptors.close()
                elif isinstance(message, Ready) and not handle.ready:
                    self._fleet.ready(handle)
                    actions += machine.ready(handle.number)
                elif isinstance(message, Failed) and handle.ready:
                    problem = message.text
                elif isinstance(message, Failed):
                    # The worker may have more to do, such as to flush its log: the pool breaks when it has ended.
                    self._init_failures[handle.number] = message.text
                else:
                    problem = f"{type(message).__name__}, which was not asked"
                if problem is not None:
                    self._condemn(handle, problem)
                    break
            if done:
                actions += machine.answered_all(handle.number, done)
            failures = self._perform(actions)
        # Not settled here: a callback that exits would lose the answers.
        answers: list[_Answered] = [(task, False, error) for task, error in failures]
        wrong: str | None = None
        for task, answer in taken:
            if wrong is None:
                try:
                    answers.append((task, answer.ok, self._receive(handle, task, answer)))
                    continue
                except Exception as error:
                    wrong = f"{type(error).__name__}: {error}"
                    with self._lock:
                        self._condemn(handle, wrong)
            answers.append((task, False, death(handle, task, -signal.SIGKILL)))
        return answers, wrong or problem

    def _condemn(self, handle: WorkerHandle, problem: str) -> None:
        """Whatever it was, this worker cannot be relied upon any more; the others can."""
        handle.end.problem = problem
        self._machine.condemned(handle.number)
        handle.signal(signal.SIGKILL)

    def _receive(self, handle: WorkerHandle, task: Task, answer: Answer) -> Payload:
        """Take over the blocks of a result, then let go of the arguments'."""
        store, peer, extras = self._store, handle.peer, answer.extras
        fds: list[int] = []
        payload: Payload | None = None
        try:
            if extras is not None:
                fds = handle.end.descriptors.take(len(extras.arenas))
                for arena in extras.arenas:
                    store.meet(ArenaInfo(*arena), fds.pop(0), peer)
            store.peer_resident(peer, answer.resident)
            payload = store.receive(answer.result, peer)
            if extras is not None and (extras.kept or extras.released):
                kept = [Block(*block) for block in extras.kept]
                store.peer_keeps(peer, kept, [Block(*block) for block in extras.released])
        except BaseException:
            if payload is not None:
                payload.release()
            raise
        finally:
            for fd in fds:
                os.close(fd)
            task.arguments.release()
        if task.introduced:
            peer.knows.update(task.introduced)
        return payload

    def _deliver(self, answers: Iterable[_Answered]) -> None:
        """Unpickle results and resolve the futures: all of them, also if a callback of one says ``sys.exit()``."""
        each(self._deliver_one, answers)

    def _deliver_one(self, task: Task, ok: bool, payload: Payload | BaseException) -> None:
        if isinstance(payload, BaseException):
            settle([(task, payload)])
            return
        try:
            value = self._store.load(payload, "r" if task.limits.readonly else "c")
            if not ok and not isinstance(value, BaseException):
                raise TypeError(f"what was raised arrived as {value!r:.100}, which is no exception")  # noqa: TRY301
        except BaseException as error:
            ok, value = False, without_frames(error)
        finally:
            payload.release()
        resolve(task.future, ok, value)

    def _reap(self, worker: int, handle: WorkerHandle) -> None:
        """A worker has ended: take its last answers, then settle what it leaves."""
        with handle.reader:  # whoever leads has noticed, too, and lets go
            while self._read(handle):
                pass
        handle.process.join()
        fleet = self._fleet
        assert fleet is not None
        failures: Failures = []
        with self._lock:
            text = self._init_failures.pop(worker, None)
            if text is not None and self.broken is None:
                failures += self._break(
                    f"A process in the process pool failed to initialize:\n{text}"
                )
            unread = fleet.take_back(worker) if worker in fleet.workers else []
            self._moved(handle, unread)
            failures += self._perform(self._machine.died(worker, unread))
            fleet.remove(worker, handle)
            self._unwatched.discard(handle)
        settle(failures)
