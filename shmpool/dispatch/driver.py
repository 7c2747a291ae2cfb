"""The driver: performs what the state machine says, with real processes, sockets and futures.

Threads and the lock::

    submit() in any thread ----> _lock: machine, sends to an idle worker ---.
                                                                           v
    dispatcher thread: one wait on all answers, exits and the wake-up <-- workers
         reads answers -> _lock: machine, sends what is next -> unpickles -> futures

``_lock`` guards the machine, the tables of tasks and workers, and all sending.  Futures are resolved (which runs the
user's callbacks) and results unpickled (the user's code, too) without it.  While it is held the store's lock may be
taken, never the other way round.  Finalizers and signal handlers only set a flag and write to the wake-up.

The dispatcher thread starts after the first workers, so that under fork they are forked from a process that has no
thread of ours, and ends when the last worker is gone.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import signal
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

from shmpool.dispatch.state import Action, Break, Fail, Machine, Recall, Retire, Send, Start, Stop
from shmpool.dispatch.task import Task
from shmpool.errors import BrokenPoolError, WireError, WorkerDiedError
from shmpool.memory.segment import Mode
from shmpool.store.blocks import ArenaInfo, Block
from shmpool.store.store import ObjectStore, Payload
from shmpool.wire import messages
from shmpool.wire.messages import Answer, Call, Extras, Failed, Notice, Ready
from shmpool.worker.process import ProcessLike, Starter, WorkerHandle, start_worker

__all__ = ["Counts", "Driver"]

_log = logging.getLogger("shmpool")

#: A message to a worker names at most so many freed blocks, so that it fits in a packet.
_MOST_FREED = 1000


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
    first_starter, later_starter : callable
        Makes the function that starts processes: the first for the first workers, the second for the others, both
        called once, before this process has a thread of the driver's.
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
        self._starter: Starter | None = None
        self._tasks: dict[int, Task] = {}
        self._task_ids = itertools.count()
        self._workers: dict[int, WorkerHandle] = {}
        self._leaving: dict[int, WorkerHandle] = {}  # retired, not yet ended
        self._by_fd: dict[
            int, tuple[int, WorkerHandle, bool]
        ] = {}  # (worker, handle, is it its exit?)
        self._failed: dict[int, str] = {}  # workers whose initializer raised: the traceback
        self._poller: select.epoll | None = None
        self._wake = -1
        self._wake_lock = threading.Lock()  # guards the closing of _wake
        self._thread: threading.Thread | None = None
        self._abandoned = False
        self._pid = os.getpid()
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
            self._poller = select.epoll()
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._poller.register(self._wake, select.EPOLLIN)
            self._starter, make_later = self._make_starters()
            try:
                for action in self._machine.started():
                    assert isinstance(action, Start)
                    self._start_worker(action.worker)
                self._starter = make_later()
            except BaseException:
                self._tear_down_start()
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
            self.counts.submitted += 1
            self.counts.count(task.arguments)
            if not task.function.counted:
                task.function.counted = True
                self.counts.count(task.function.payload)
            settled = self._perform(self._machine.submitted(number))
        _settle(settled)

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
        if cancel_futures:
            self._cancel_waiting()
        with self._lock:
            settled = self._perform(self._machine.closed())
            thread = self._thread
            if thread is None:
                self.finished = True
        _settle(settled)
        self.wake()
        return thread

    def _cancel_waiting(self) -> None:
        """Take no more tasks, and cancel those that have not begun."""
        with self._lock:
            settled = self._perform(self._machine.closed())
            waiting = [(number, task) for number, task in self._tasks.items() if not task.started]
        _settle(settled)
        cancelled = [(number, task) for number, task in waiting if task.future.cancel()]
        with self._lock:
            for number, task in cancelled:
                if self._tasks.get(number) is task:
                    del self._tasks[number]
                    task.future.set_running_or_notify_cancel()
                    task.arguments.release()
                    settled = self._perform(self._machine.withdrawn(number))
                    assert not settled

    def terminate(self, signal_number: int) -> None:
        """End all workers with a signal; tasks under way fail, the others are cancelled, no more are taken."""
        if os.getpid() != self._pid:
            return
        self._cancel_waiting()
        with self._lock:
            if self._thread is not None and not self.finished:
                self._break("the workers of this pool were terminated", signal_number)
            settled = self._perform(self._machine.broke())
        _settle(settled)
        self.shutdown(cancel_futures=False)

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

    def _perform(self, actions: list[Action]) -> list[tuple[Task, BaseException]]:
        """Do it; return the tasks that failed, for the caller to settle without the lock."""
        assert self._lock.locked()
        settled: list[tuple[Task, BaseException]] = []
        todo = deque(actions)
        while todo:
            action = todo.popleft()
            if isinstance(action, Send):
                todo.extend(self._send(action.task, action.worker))
            elif isinstance(action, Start):
                todo.extend(self._start_or_give_up(action.worker))
            elif isinstance(action, Recall):
                todo.extend(
                    self._machine.recalled(
                        action.worker, self._take_back(action.worker, action.most)
                    )
                )
            elif isinstance(action, Retire):
                handle = self._workers.pop(action.worker)
                self._leaving[action.worker] = handle
                self.processes.pop(handle.pid, None)
                handle.end.end_of_calls()
            elif isinstance(action, Stop):
                for handle in self._workers.values():
                    handle.end.end_of_calls()
            elif isinstance(action, Break):
                self._break(
                    "A child process terminated abruptly, the process pool is not usable anymore: workers end before "
                    "they are ready to run a task"
                )
            elif isinstance(action, Fail):
                task = self._tasks.pop(action.task)
                self.counts.failed += 1
                error: BaseException
                if action.worker is None:
                    error = BrokenPoolError(self.broken or "the pool was terminated")
                else:
                    self.counts.died += 1
                    process = self._workers[action.worker].process
                    error = WorkerDiedError(
                        pid=self._workers[action.worker].pid,
                        exitcode=process.exitcode,
                        task=task.function.name,
                    )
                settled.append((task, error))
        return settled

    def _send(self, number: int, worker: int) -> list[Action]:
        task = self._tasks[number]
        if not task.started:
            if not task.future.set_running_or_notify_cancel():
                del self._tasks[number]
                task.arguments.release()
                return self._machine.dropped(worker, number)
            task.started = True
        handle = self._workers[worker]
        peer = handle.peer
        extras, fds = None, None
        if task.blocks or peer.to_free or peer.to_forget:
            extras, fds = self._extras(handle, task.blocks)
            task.introduced = [arena[0] for arena in extras.arenas]
            task.freed, task.forgotten = extras.freed, extras.forgotten
        room = self._store.room_for(peer)
        call = Call(
            number, task.function.payload.data, task.arguments.data, task.readonly, room, extras
        )
        try:
            sent = handle.end.send(messages.encode(call), fds)
        except OSError:
            sent = False
        finally:
            for fd in fds or ():
                os.close(fd)
        if not sent:
            self._unsaid(handle, extras)
            return self._machine.refused(worker, number)
        return []

    def _extras(self, handle: WorkerHandle, blocks: list[Block]) -> tuple[Extras, list[int]]:
        freed, forgotten = self._store.take_frees(handle.peer, _MOST_FREED)
        extras = Extras(freed=freed, forgotten=forgotten)
        fds = []
        for info, fd in self._store.introduce(handle.peer, blocks):
            extras.arenas.append(info)
            fds.append(fd)
        return extras, fds

    def _unsaid(self, handle: WorkerHandle, extras: Extras | None) -> None:
        if extras is not None and (extras.freed or extras.forgotten):
            self._store.untake_frees(handle.peer, extras.freed, extras.forgotten)

    def _take_back(self, worker: int, count: int) -> list[int]:
        """Tasks that a worker has not read; what else their messages said is to be said again."""
        handle = self._workers[worker]
        numbers: list[int] = []
        while len(numbers) < count:
            data = handle.end.take_back()
            if data is None:
                break
            message = messages.decode(data)
            assert isinstance(message, Call | Notice)
            self._unsaid(handle, message.extras)
            if isinstance(message, Call):
                numbers.append(message.task)
        return numbers

    def _start_worker(self, worker: int) -> None:
        assert self._starter is not None
        assert self._poller is not None
        handle = start_worker(self._starter)
        self._workers[worker] = handle
        self.processes[handle.pid] = handle.process
        self._store.add_peer(handle.peer)
        answers = handle.end.answers.fileno()
        self._by_fd[answers] = worker, handle, False
        self._by_fd[handle.exited] = worker, handle, True
        self._poller.register(answers, select.EPOLLIN)
        self._poller.register(handle.exited, select.EPOLLIN)
        if handle.lent is not None and handle.lent.blocks:
            extras, fds = self._extras(handle, handle.lent.blocks)
            try:
                handle.end.send(messages.encode(Notice(extras, 0)), fds)
            finally:
                for fd in fds:
                    os.close(fd)

    def _start_or_give_up(self, worker: int) -> list[Action]:
        try:
            self._start_worker(worker)
        except Exception as error:  # the system's, or what pickling the initializer raised
            if self._machine.start_failed(worker):
                return []  # others go on; a later event tries again
            self._break(f"no worker could be started: {type(error).__name__}: {error}")
            return self._machine.broke()
        return []

    def _break(self, reason: str, signal_number: int = signal.SIGTERM) -> None:
        """The pool is of no use: end what there is."""
        self.broken = reason
        self._machine.closing = self._machine.stopped = True
        for handle in (*self._workers.values(), *self._leaving.values()):
            handle.signal(signal_number)

    # ---------------------------------------------------------------- the dispatcher thread

    def _run(self) -> None:
        try:
            self._dispatch()
        except BaseException:
            # A mistake of ours. Nobody may wait for ever because of it.
            _log.exception("the dispatcher failed; its pool is broken")
            with self._lock:
                self._break("the dispatcher failed; see the log", signal.SIGKILL)
                settled = self._perform(self._machine.broke())
                for worker, handle in list({**self._workers, **self._leaving}.items()):
                    self._remove(worker, handle)
            _settle(settled)
        finally:
            self._finish()

    def _dispatch(self) -> None:
        poller = self._poller
        assert poller is not None
        while not self._is_finished():
            for fd, _ in poller.poll(self._store.idle_seconds()):
                if fd == self._wake:
                    os.eventfd_read(fd)
                    continue
                found = self._by_fd.get(fd)
                if found is None:
                    continue
                worker, handle, is_exit = found
                if is_exit:
                    self._reap(worker, handle)
                else:
                    self._read(worker, handle)
            if self._store.give_back_if_idle():
                self._tell_idle_workers()
            if self._abandoned or _exiting:
                with self._lock:
                    settled = self._perform(self._machine.closed())
                _settle(settled)

    def _tell_idle_workers(self) -> None:
        """After some idle time: tell workers what they need not keep, although there is no call to say it with."""
        with self._lock:
            for handle in self._workers.values():
                extras, _ = self._extras(handle, [])
                if extras:
                    notice = Notice(extras, self._store.room_for(handle.peer))
                    if not handle.end.send(messages.encode(notice)):
                        self._unsaid(handle, extras)

    def _is_finished(self) -> bool:
        with self._lock:
            return self._machine.stopped and not self._workers and not self._leaving

    def _finish(self) -> None:
        with self._lock:
            self.finished = True
        with self._wake_lock:
            os.close(self._wake)
            self._wake = -1
        assert self._poller is not None
        self._poller.close()
        self._cleanup()
        self._store.end_use(self.wake)
        _unregister(self)

    def _read(self, worker: int, handle: WorkerHandle) -> bool:
        """Take in what a worker has answered; False if nothing more will come."""
        try:
            received, more = handle.end.receive()
            answers = [
                message
                for data in received
                if (message := self._take(worker, handle, messages.decode(data)))
            ]
        except WireError as error:
            # Whatever it was, this worker cannot be trusted any more; the others can.
            self._disown(handle, error)
            return False
        if not more and self._poller is not None:
            self._forget_fd(handle.end.answers.fileno())
        self._deliver(answers)
        return more and bool(received)

    def _take(
        self, worker: int, handle: WorkerHandle, message: messages.FromParent | messages.FromWorker
    ) -> tuple[Task, bool, Payload] | None:
        """Let the machine know of a message; return the task it answers, with the result still packed."""
        settled: list[tuple[Task, BaseException]] = []
        found: tuple[Task, bool, Payload] | None = None
        if isinstance(message, Answer):
            with self._lock:
                task = self._tasks.pop(message.task, None)
                settled = self._perform(
                    self._machine.answered(worker, message.task, message.microseconds)
                )
                self.counts.count_answer(message)
            if task is not None:
                found = task, message.ok, self._receive(handle, task, message)
            elif self.broken is None:
                raise WireError(f"an answer to task {message.task}, which was not asked")
        elif isinstance(message, Ready):
            with self._lock:
                settled = self._perform(self._machine.ready(worker))
        elif isinstance(message, Failed):
            # The worker may have more to do, such as to flush its log: the pool breaks when it has ended.
            self._failed[worker] = message.text
        else:
            raise WireError(f"a worker sent {type(message).__name__}")
        _settle(settled)
        return found

    def _receive(self, handle: WorkerHandle, task: Task, answer: Answer) -> Payload:
        """Take over the blocks of a result, then let go of the arguments'."""
        store, peer, extras = self._store, handle.peer, answer.extras
        if extras is not None:
            fds = handle.end.descriptors.take(len(extras.arenas))
            for (arena_id, size, shared), fd in zip(extras.arenas, fds, strict=True):
                store.meet(ArenaInfo(arena_id, size, bool(shared)), fd, peer)
        store.peer_resident(peer, answer.resident)
        payload = store.receive(answer.result, peer)
        if extras is not None and (extras.kept or extras.released):
            store.peer_keeps(
                peer, [Block(*b) for b in extras.kept], [Block(*b) for b in extras.released]
            )
        if task.introduced:
            peer.knows.update(task.introduced)
        task.arguments.release()
        return payload

    def _deliver(self, answers: list[tuple[Task, bool, Payload]]) -> None:
        """Unpickle results and resolve futures."""
        for task, ok, payload in answers:
            future = task.future
            try:
                value = self._store.load(payload, self._mode)
            except BaseException as error:
                _resolve(future, False, error)
            else:
                _resolve(future, ok, value)
                del value
            finally:
                payload.release()
            del future, task

    def _disown(self, handle: WorkerHandle, error: WireError) -> None:
        _log.error("worker %d broke the protocol and is killed: %s", handle.pid, error)
        handle.signal(signal.SIGKILL)
        self._forget_fd(handle.end.answers.fileno())

    def _reap(self, worker: int, handle: WorkerHandle) -> None:
        """A worker has ended: take its last answers, then settle what it leaves."""
        if handle.end.answers.fileno() in self._by_fd:
            while self._read(worker, handle):
                pass
            self._forget_fd(handle.end.answers.fileno())
        handle.process.join()
        self._forget_fd(handle.exited)
        with self._lock:
            unread = self._take_back(worker, 1 << 30) if worker in self._workers else []
            for number in unread:
                if number in self._tasks:
                    self._tasks[number].introduced = []
            settled = self._init_failed(worker)
            settled += self._perform(self._machine.died(worker, unread))
            self._remove(worker, handle)
        _settle(settled)

    def _remove(self, worker: int, handle: WorkerHandle) -> None:
        """A worker is no more."""
        self._workers.pop(worker, None)
        self._leaving.pop(worker, None)
        self.processes.pop(handle.pid, None)
        self._store.lost_peer(handle.peer)
        handle.close()

    def _init_failed(self, worker: int) -> list[tuple[Task, BaseException]]:
        """If a worker has ended since its initializer raised, so will the others: the pool is broken."""
        text = self._failed.pop(worker, None)
        if text is None or self.broken is not None:
            return []
        self._break(f"A process in the process pool failed to initialize:\n{text}")
        return self._perform(self._machine.broke())

    def _forget_fd(self, fd: int) -> None:
        if self._by_fd.pop(fd, None) is not None:
            assert self._poller is not None
            self._poller.unregister(fd)

    def _tear_down_start(self) -> None:
        """The first workers could not all be started: end those that were."""
        for handle in self._workers.values():
            handle.close()
            handle.process.join()
            self._store.lost_peer(handle.peer)
        self._workers.clear()
        self.processes.clear()
        self._by_fd.clear()
        assert self._poller is not None
        self._poller.close()
        os.close(self._wake)
        self._wake = -1
        self._cleanup()
        self._store.end_use(self.wake)
        self.finished = True
        self.broken = "the workers could not be started"


def _resolve(future: Future[Any], ok: bool, value: Any) -> None:
    try:
        if ok:
            future.set_result(value)
        else:
            future.set_exception(value)
    except InvalidStateError:
        pass  # somebody else has resolved it


def _settle(settled: list[tuple[Task, BaseException]]) -> None:
    """Give failed tasks their exceptions.  Runs callbacks: no lock may be held."""
    for task, error in settled:
        _resolve(task.future, False, error)
        task.arguments.release()


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
