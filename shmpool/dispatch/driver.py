"""The driver: performs what the state machine says, with real processes, sockets and futures.

Threads and the lock::

    submit() in any thread ----> _lock: machine, sends to an idle worker ---.
                                                                           v
    dispatcher thread: one wait on all answers, exits and the wake-up <-- workers
         reads answers -> _lock: machine, sends what is next -> unpickles -> futures

``_lock`` guards the machine, the table of tasks and the fleet, and so all sending.  Futures are resolved (which runs
the user's callbacks) and results unpickled (the user's code, too) without it.  While it is held the store's lock may
be taken, never the other way round.  Finalizers and signal handlers only set a flag and write to the wake-up.

The dispatcher thread starts after the first workers, so that under fork they are forked from a process that has no
thread of ours, and ends when the last worker is gone.
"""

from __future__ import annotations

import itertools
import logging
import os
import select
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

from shmpool.dispatch.fleet import Fleet, Source
from shmpool.dispatch.state import Action, Break, Fail, Machine, Recall, Retire, Send, Start, Stop
from shmpool.dispatch.task import Task, TaskFuture
from shmpool.errors import BrokenPoolError, WireError, WorkerDiedError
from shmpool.memory.segment import Mode
from shmpool.store.blocks import ArenaInfo, Block
from shmpool.store.store import ObjectStore, Payload
from shmpool.wire import messages
from shmpool.wire.messages import Answer, Failed, Ready
from shmpool.worker.process import ProcessLike, Starter, WorkerHandle

__all__ = ["Counts", "Driver"]

_log = logging.getLogger("shmpool")

#: A task, whether it raised nothing, and its result (or what it raised), still packed.
_Answered = tuple[Task, bool, Payload]
#: Tasks that failed, for whoever holds no lock to settle.
Failures = list[tuple[Task, BaseException]]


class Counts:
    """What went through an executor so far: tasks, and bytes of arguments and results together."""

    __slots__ = ("copied", "died", "done", "failed", "inline", "shared", "submitted")

    def __init__(self) -> None:
        self.submitted = self.done = self.failed = self.died = 0
        self.copied = self.shared = self.inline = 0

    def count(self, payload: Payload) -> None:
        """Add what was sent."""
        self.inline += len(payload.data)
        self.copied += payload.copied
        self.shared += payload.shared

    def count_answer(self, answer: Answer) -> None:
        """Add what was received."""
        self.done += 1
        self.inline += len(answer.result)
        self.copied += answer.copied
        self.shared += answer.shared


class Driver:
    """Runs tasks on workers.

    Parameters
    ----------
    machine : Machine
    store : ObjectStore
    mode : {"c", "r"}
        How results are mapped.
    make_starters : callable
        Returns what starts the first workers, and what then makes the starter of all others; called once, before this
        process has a thread of the driver's.
    cleanup : callable
        Called after the last worker is gone.
    """

    def __init__(
        self,
        machine: Machine,
        store: ObjectStore,
        mode: Mode,
        make_starters: Callable[[], tuple[Starter, Callable[[], Starter]]],
        cleanup: Callable[[], None],
    ) -> None:
        self._lock = threading.Lock()
        self._machine = machine
        self._store = store
        self._mode = mode
        self._make_starters = make_starters
        self._cleanup = cleanup
        self._fleet: Fleet | None = None
        self._tasks: dict[int, Task] = {}
        self._task_ids = itertools.count()
        self._init_failures: dict[int, str] = {}  # workers whose initializer raised: the traceback
        self._wake = -1
        self._bell = -1  # readable once for each leading thread whose task was moved
        self._wake_lock = threading.Lock()  # guards the closing of _wake
        self._thread: threading.Thread | None = None
        self._abandoned = False
        self._pid = os.getpid()
        self._ref = weakref.ref(self)
        self.processes: dict[int, ProcessLike] = {}
        self.counts = Counts()
        self.broken: str | None = None
        self.finished = False

    # ---------------------------------------------------------------- from the user's threads

    def start(self) -> None:
        """Start the workers that must be there before the first task is pickled, once.

        Raises
        ------
        Exception
            What starting a process raised.
        """
        if self._thread is not None:
            return
        with self._lock:
            if self._thread is not None or self.finished:  # type: ignore[redundant-expr]  # another thread was faster
                return
            self._store.start_use(self.wake)
            self._fleet = fleet = Fleet(self._store, self.processes)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            fleet.poller.register(self._wake, select.EPOLLIN)
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
            try:
                fleet.starter, make_later = self._make_starters()
                for action in self._machine.started():
                    assert isinstance(action, Start)
                    fleet.start(action.worker)
                fleet.starter = make_later()
            except BaseException:
                self.broken = "the workers could not be started"
                fleet.signal(signal.SIGKILL)
                for worker, handle in list(fleet.workers.items()):
                    handle.process.join()
                    fleet.remove(worker, handle)
                self._finish()
                raise
            self._thread = threading.Thread(target=self._run, name="shmpool-dispatcher")
            _register(self)
            self._thread.start()

    def submit(self, task: Task) -> None:
        """Take on a task.

        Raises
        ------
        RuntimeError
            After shutdown.
        BrokenPoolError
            The pool is broken.
        """
        with self._lock:
            self.check()
            number = next(self._task_ids)
            self._tasks[number] = task
            task.future.lead = self._leader(number)
            task.future.take_back = self._taker(number)
            self.counts.submitted += 1
            self.counts.count(task.arguments)
            if not task.function.counted:
                task.function.counted = True
                self.counts.count(task.function.payload)
            failures = self._perform(self._machine.submitted(number))
        _settle(failures)

    def _leader(self, number: int) -> Callable[[TaskFuture, float | None], None]:
        """What a thread that waits for task ``number`` calls; it keeps neither the driver nor the task alive."""
        ref = self._ref

        def lead(future: TaskFuture, timeout: float | None) -> None:
            driver = ref()
            if driver is not None and os.getpid() == driver._pid:
                driver.lead(number, future, timeout)

        return lead

    def _taker(self, number: int) -> Callable[[], bool]:
        """What cancelling the future of task ``number`` calls."""
        ref = self._ref

        def take_back() -> bool:
            driver = ref()
            return driver is not None and os.getpid() == driver._pid and driver.take_back(number)

        return take_back

    def take_back(self, number: int) -> bool:
        """Give a task up if its worker has not begun it; False if it has."""
        with self._lock:
            task = self._tasks.get(number)
            if task is None or task.handle is None:
                return False
            handle = task.handle
            assert self._fleet is not None
            if self._fleet.workers.get(handle.number) is not handle:
                return False
            unread = self._fleet.take_back(handle.number)
            self._moved(handle, unread)
            if number in unread:
                del self._tasks[number]
                task.arguments.release()
            failures = self._perform(self._machine.recalled(handle.number, unread, number))
        _settle(failures)
        return number in unread

    def lead(self, number: int, future: TaskFuture, timeout: float | None) -> None:
        """Read answers in the thread that waits for one: the dispatcher need not be woken, nor wake that thread.

        Returns when the future is done, when ``timeout`` seconds are over, or when this thread cannot help (any more):
        another one reads this worker's answers, or the worker has ended.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not future.done():
            with self._lock:
                handle = self._start_leading(number)
            if handle is None:
                return
            answers = None
            try:
                seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
                if handle.wait(seconds, self._bell):
                    answers = self._read_once(handle, copy=True)
            finally:
                with self._lock:
                    moved = self._stop_leading(handle)
            for answer in answers or ():
                self._deliver(*answer)
            if answers is None and not moved:
                return

    def _start_leading(self, number: int) -> WorkerHandle | None:
        """The worker that has task ``number``, if this thread is to read its answers."""
        task = self._tasks.get(number)
        handle = None if task is None else task.handle
        if handle is None or not handle.reader.acquire(blocking=False):
            return None
        assert self._fleet is not None
        handle.leading = number
        self._fleet.pause(handle)
        return handle

    def _stop_leading(self, handle: WorkerHandle) -> bool:
        """Leave the worker's answers to the dispatcher again; True if the task was moved to another worker."""
        assert self._fleet is not None
        moved, handle.leading = handle.leading is None, None
        if moved:
            os.eventfd_read(self._bell)
        self._fleet.resume(handle)
        handle.reader.release()
        return moved

    def _moved(self, handle: WorkerHandle, numbers: list[int]) -> None:
        """These tasks were taken back from a worker: who waits for one of them there must wait elsewhere."""
        for number in numbers:
            if number in self._tasks:
                self._tasks[number].handle = None
                self._tasks[number].introduced = []
        if handle.leading in numbers:
            handle.leading = None
            os.eventfd_write(self._bell, 1)

    def check(self) -> None:
        """Raise what submit raises."""
        if self.broken is not None:
            raise BrokenPoolError(self.broken)
        if self._machine.closing:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if _exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this executor belongs to the process that made it; make another one after a fork"
            )

    def shutdown(self, cancel_futures: bool) -> threading.Thread | None:
        """Take no more tasks; return the thread to join, if there is one."""
        if os.getpid() != self._pid:
            return None
        with self._lock:
            failures = self._perform(self._machine.closed())
            thread = self._thread
            if thread is None:
                self.finished = True
        _settle(failures)
        if cancel_futures:
            self._cancel_waiting()
        self.wake()
        return thread

    def _cancel_waiting(self) -> None:
        """Cancel the tasks that have not begun."""
        with self._lock:
            # As in the standard library, what was sent to a worker is finished.
            waiting = [(number, task) for number, task in self._tasks.items() if not task.started]
        # Cancelling runs callbacks, so it happens without the lock; some may begin meanwhile.
        failures: Failures = []
        cancelled = [(number, task) for number, task in waiting if task.future.cancel()]
        with self._lock:
            for number, task in cancelled:
                if self._tasks.get(number) is task:
                    del self._tasks[number]
                    task.future.set_running_or_notify_cancel()
                    task.arguments.release()
                    failures += self._perform(self._machine.withdrawn(number))
        _settle(failures)

    def terminate(self, signal_number: int) -> None:
        """End all workers with a signal; tasks under way fail, the others are cancelled, no more are taken."""
        thread = self.shutdown(cancel_futures=True)
        if thread is None:
            return
        with self._lock:
            if self.finished:
                return
            failures = self._break("the workers of this pool were terminated", signal_number)
        _settle(failures)
        self.wake()

    def abandon(self) -> None:
        """Nobody can submit any more: finish and stop.  Safe in finalizers."""
        self._abandoned = True
        self.wake()

    def wake(self) -> None:
        """Make the dispatcher thread look around.  Safe in finalizers and signal handlers."""
        # Whoever holds this lock is waking it up, too, or has ended it.
        if self._wake_lock.acquire(blocking=False):
            try:
                if self._wake >= 0 and os.getpid() == self._pid:
                    os.eventfd_write(self._wake, 1)
            finally:
                self._wake_lock.release()

    # ---------------------------------------------------------------- performing actions (holding _lock)

    def _perform(self, actions: list[Action]) -> Failures:
        """Do it; return the tasks that failed, for the caller to settle without the lock."""
        assert self._lock.locked()
        failures: Failures = []
        todo = deque(actions)
        fleet, machine = self._fleet, self._machine
        while todo:
            action = todo.popleft()
            if isinstance(action, Send):
                todo.extend(self._send(action.task, action.worker, failures))
                continue
            if isinstance(action, Fail):
                failures.append(self._failure(action))
                continue
            if fleet is None:
                continue  # nothing was ever started
            if isinstance(action, Start):
                self._start(action.worker, failures)
            elif isinstance(action, Recall):
                numbers = fleet.take_back(action.worker, action.most)
                self._moved(fleet.workers[action.worker], numbers)
                todo.extend(machine.recalled(action.worker, numbers))
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

    def _send(self, number: int, worker: int, failures: Failures) -> list[Action]:
        task = self._tasks[number]
        assert self._fleet is not None
        if not task.started:
            if not task.future.set_running_or_notify_cancel():
                del self._tasks[number]
                task.arguments.release()
                return self._machine.dropped(worker, number)
            task.started = True
        try:
            if self._fleet.send(worker, number, task):
                return []
        except Exception as error:  # too many descriptors, too long: it will not go later either
            del self._tasks[number]
            self.counts.failed += 1
            failures.append((task, error))
            return self._machine.dropped(worker, number)
        return self._machine.refused(worker, number)

    def _start(self, worker: int, failures: Failures) -> None:
        assert self._fleet is not None
        try:
            self._fleet.start(worker)
        except Exception as error:  # the system's, or what pickling the initializer raised
            if not self._machine.start_failed(
                worker
            ):  # else the others go on, and a later event tries again
                failures += self._break(
                    f"no worker could be started: {type(error).__name__}: {error}"
                )

    def _failure(self, action: Fail) -> tuple[Task, BaseException]:
        task = self._tasks.pop(action.task)
        self.counts.failed += 1
        if action.worker is None:
            return task, BrokenPoolError(self.broken or "the pool is broken")
        self.counts.died += 1
        assert self._fleet is not None
        handle = self._fleet.workers[action.worker]
        name = task.function.name
        return task, WorkerDiedError(pid=handle.pid, exitcode=handle.process.exitcode, task=name)

    def _break(self, reason: str, signal_number: int = signal.SIGTERM) -> Failures:
        """The pool is of no use: end the workers, fail what is left."""
        self.broken = reason
        self._machine.closing = self._machine.stopped = True
        if self._fleet is not None:
            self._fleet.signal(signal_number)
        return [
            self._failure(action) for action in self._machine.broke() if isinstance(action, Fail)
        ]

    # ---------------------------------------------------------------- the dispatcher thread

    def _run(self) -> None:
        try:
            self._dispatch()
        except BaseException:
            # A mistake of ours. Nobody may wait for ever because of it.
            _log.exception("the dispatcher failed; its pool is broken")
            with self._lock:
                assert self._fleet is not None
                failures = self._break("the dispatcher failed; see the log", signal.SIGKILL)
                for worker, handle in [*self._fleet.workers.items(), *self._fleet.leaving.items()]:
                    self._fleet.remove(worker, handle)
            _settle(failures)
        finally:
            self._finish()

    def _dispatch(self) -> None:
        fleet, store = self._fleet, self._store
        assert fleet is not None
        while not self._is_finished():
            for source in fleet.wait(store.idle_seconds()):
                if source == self._wake:
                    os.eventfd_read(self._wake)
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
            if store.give_back_if_idle():
                with self._lock:
                    fleet.tell_idle()
            if self._abandoned or _exiting:
                with self._lock:
                    failures = self._perform(self._machine.closed())
                _settle(failures)

    def _is_finished(self) -> bool:
        with self._lock:
            return self._machine.stopped and not self._fleet

    def _finish(self) -> None:
        self.finished = True
        with self._wake_lock:
            os.close(self._wake)
            self._wake = -1
        with self._lock:
            os.close(self._bell)
            self._bell = -1
        assert self._fleet is not None
        self._fleet.close()
        self._cleanup()
        self._store.end_use(self.wake)
        _unregister(self)

    def _read(self, handle: WorkerHandle) -> bool:
        """Read once what a worker has answered, and deliver it; False if there was nothing."""
        answers = self._read_once(handle)
        for answer in answers or ():
            self._deliver(*answer)
        return answers is not None

    def _read_once(self, handle: WorkerHandle, *, copy: bool = False) -> list[_Answered] | None:
        """Read once what a worker has answered; None if there was nothing.  The caller holds ``handle.reader``.

        Unless copied, small results lie in the channel's buffer: to be delivered before anything else is read.
        """
        answers: list[_Answered] = []
        problem: Exception | None = None
        got: int | None = 0
        try:
            received, got = handle.end.receive()
            for data in received:
                message = messages.decode(bytes(data) if copy else data)
                answer = self._take(handle, message)
                if answer is not None:
                    answers.append(answer)
        except (WireError, OSError) as error:
            problem = error
        if problem is not None:
            # Whatever it was, this worker cannot be relied upon any more; the others can.
            _log.error("worker %d broke the protocol and is killed: %s", handle.pid, problem)
            handle.signal(signal.SIGKILL)
        if problem is not None or got == 0:
            assert self._fleet is not None
            with self._lock:
                self._fleet.stop_reading(handle)
            return answers or None
        return answers if got else None

    def _take(
        self, handle: WorkerHandle, message: messages.FromParent | messages.FromWorker
    ) -> _Answered | None:
        """Let the machine know of a message; return the task it answers, with the result still packed."""
        assert self._fleet is not None
        if isinstance(message, Answer):
            with self._lock:
                task = self._tasks.pop(message.task, None)
                failures = self._perform(
                    self._machine.answered(handle.number, message.task, message.microseconds)
                )
                self.counts.count_answer(message)
            _settle(failures)
            if task is not None:
                return task, message.ok, self._receive(handle, task, message)
            if self.broken is None:
                raise WireError(f"an answer to task {message.task}, which was not asked")
        elif isinstance(message, Ready):
            with self._lock:
                self._fleet.ready(handle)
                failures = self._perform(self._machine.ready(handle.number))
            _settle(failures)
        elif isinstance(message, Failed):
            # The worker may have more to do, such as to flush its log: the pool breaks when it has ended.
            self._init_failures[handle.number] = message.text
        else:
            raise WireError(f"a worker sent {type(message).__name__}")
        return None

    def _receive(self, handle: WorkerHandle, task: Task, answer: Answer) -> Payload:
        """Take over the blocks of a result, then let go of the arguments'."""
        store, peer, extras = self._store, handle.peer, answer.extras
        try:
            if extras is not None:
                fds = handle.end.descriptors.take(len(extras.arenas))
                for (arena_id, size, flags), fd in zip(extras.arenas, fds, strict=True):
                    store.meet(ArenaInfo(arena_id, size, flags), fd, peer)
            store.peer_resident(peer, answer.resident)
            payload = store.receive(answer.result, peer)
            if extras is not None and (extras.kept or extras.released):
                kept = [Block(*block) for block in extras.kept]
                store.peer_keeps(peer, kept, [Block(*block) for block in extras.released])
        except Exception as error:
            _resolve(task.future, False, error)
            raise
        finally:
            task.arguments.release()
        if task.introduced:
            peer.knows.update(task.introduced)
        return payload

    def _deliver(self, task: Task, ok: bool, payload: Payload) -> None:
        """Unpickle a result and resolve the future."""
        try:
            value = self._store.load(payload, self._mode)
        except BaseException as error:
            ok, value = False, error
        finally:
            payload.release()
        _resolve(task.future, ok, value)

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
        _settle(failures)


def _resolve(future: Future[Any], ok: bool, value: Any) -> None:
    """Give a future its result.  Runs callbacks: no lock may be held."""
    try:
        if ok:
            future.set_result(value)
        else:
            future.set_exception(value)
    except InvalidStateError:
        pass  # somebody else has resolved it
    except BaseException:
        # Of a callback; exceptions that are no Exception pass through Future. In the main thread it may be a Ctrl-C.
        if threading.current_thread() is threading.main_thread():
            raise
        _log.exception("a callback of %r raised", future)


def _settle(failures: Failures) -> None:
    """Give failed tasks their exceptions.  Runs callbacks: no lock may be held."""
    for task, error in failures:
        task.arguments.release()
        _resolve(task.future, False, error)


# Drivers that have a thread: at interpreter exit they are told to finish, and waited for.
_running: set[Driver] = set()
_running_lock = threading.Lock()  # guards _running
_exiting = False


def _register(driver: Driver) -> None:
    with _running_lock:
        _running.add(driver)


def _unregister(driver: Driver) -> None:
    with _running_lock:
        _running.discard(driver)


def _at_exit() -> None:
    global _exiting
    _exiting = True
    with _running_lock:
        running = list(_running)
    for driver in running:
        driver.wake()
    for driver in running:
        if driver._thread is not None:
            driver._thread.join()


def _after_fork_in_child() -> None:
    global _running_lock
    _running.clear()
    _running_lock = threading.Lock()


# As concurrent.futures does: it must happen before threading waits for non-daemon threads.
threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_after_fork_in_child)
