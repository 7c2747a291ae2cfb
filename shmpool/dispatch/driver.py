"""The driver: has tasks run on workers, with real processes, sockets and futures.

Threads and the lock, and which file has what::

    user's threads    driver -----> foreman (machine, tasks, fleet; performs) --sends--> workers
                      leading --.      ^    '--> attention: who waits for a worker's answers
                                v      |                                                    |
                              answers -'  <---------------------------------- answers ------'
    dispatcher thread           ^  '--> unpickle --> futures, without the lock
                      rounds ---'
    lifetime: the first workers, the dispatcher thread, and their end

The lock is the foreman's, and guards the machine, the table of tasks and the fleet, and so all sending.  Futures are
resolved (which runs the user's callbacks) and results unpickled (the user's code, too) without it.  While it is held
the store's lock may be taken, never the other way round.  Our own finalizers and signal handlers only set a flag and
ring a bell.

Those of the user's may call anything, at any line, also while this very thread holds one of the locks: what they call
then says so, instead of waiting for ever (:meth:`Foreman.is_inside`).  Nor may they wait while this thread is the one
that has to read the answers (:meth:`Leading.stand_down`).
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from shmpool.dispatch import living
from shmpool.dispatch.answers import Answers
from shmpool.dispatch.attention import Attention
from shmpool.dispatch.foreman import Foreman
from shmpool.dispatch.future import TaskFuture
from shmpool.dispatch.leading import Leading
from shmpool.dispatch.lifetime import Lifetime
from shmpool.dispatch.rounds import Rounds
from shmpool.dispatch.settle import Failures, each, settle
from shmpool.dispatch.state import Machine
from shmpool.dispatch.task import Task
from shmpool.dispatch.wakeup import WakeUp
from shmpool.errors import BrokenPoolError
from shmpool.interrupts import WholeLock, whole
from shmpool.store.store import ObjectStore
from shmpool.worker.process import Starter

#: For so many seconds at most is waited for somebody who reads answers; a callback may keep him.
_PATIENCE = 1.0

__all__ = ["Driver"]


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

    Attributes
    ----------
    pid : int
        Of the process that it belongs to.
    ref : weak reference to this
    processes : dict of int to process
        Of the workers, by pid.
    counts : Counts
    """

    def __init__(
        self,
        machine: Machine,
        store: ObjectStore,
        make_starters: Callable[[], tuple[Starter, Callable[[], Starter]]],
        cleanup: Callable[[], None],
        idle_timeout: float | None = None,
    ) -> None:
        self._lock = WholeLock()
        self._machine = machine
        self._wakeup = wakeup = WakeUp()
        self._attention = attention = Attention(self._lock)
        self._foreman = foreman = Foreman(self._lock, machine, store, attention, wakeup)
        self._answers = answers = Answers(foreman, store)
        self._leading = Leading(foreman, attention, answers, store.config.spin_seconds)
        self._rounds = rounds = Rounds(foreman, attention, answers, wakeup, store, idle_timeout)
        self._lifetime = Lifetime(foreman, attention, wakeup, rounds, store, make_starters, cleanup)
        self.pid = os.getpid()
        self.ref = weakref.ref(self)
        self.processes = foreman.processes
        self.counts = foreman.counts

    @property
    def broken(self) -> str | None:
        """Why the pool is of no use; None if it is not broken."""
        return self._foreman.broken

    @property
    def finished(self) -> bool:
        """Is the last worker gone, or was it shut down before there was one?"""
        return self._lifetime.finished

    @property
    def ends_late(self) -> bool:
        """At interpreter exit somebody else ends it, later than the others."""
        return self._rounds.ends_late

    def end_late(self) -> None:
        """Somebody else ends it; to be called before the start."""
        self._rounds.ends_late = True

    # ---------------------------------------------------------------- tasks

    def tasks(self) -> dict[int, Task]:
        """Those that were taken on and are not settled yet, by number: as it is now."""
        return self._foreman.table.tasks.copy()

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
        if self._lifetime.thread is None:
            self._lifetime.start(self)

    def check(self) -> None:
        """Raise what submit raises."""
        if self._foreman.broken is not None:
            raise BrokenPoolError(self._foreman.broken)
        if self._machine.closing:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if living.is_exiting(self):
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        if os.getpid() != self.pid:
            raise RuntimeError(
                "this executor belongs to the process that made it; make another one after a fork"
            )

    def submit(self, tasks: Sequence[Task]) -> None:
        """Take on tasks, at least one, all with the same limits.

        Raises
        ------
        RuntimeError
            After shutdown.
        BrokenPoolError
            The pool is broken.
        """
        foreman = self._foreman
        foreman.check_outside()
        with whole:
            with self._lock:
                self.check()
                failures = foreman.take_on(tasks, self.ref)
            settle(failures)

    def take_back(self, number: int) -> bool:
        """Give a task up that was sent, if its worker has not begun it; False if it has."""
        if self._foreman.is_inside():
            return False  # it was garbage, such as the results of a map, and is only run in vain
        return self._give_up(number, kill=False)

    def end_running(self, number: int) -> bool:
        """The same, but if its worker runs it, the worker is killed; False if it has been answered."""
        self._foreman.check_outside()
        until = time.monotonic() + _PATIENCE
        while not self._give_up(number, kill=True):
            handle = self._foreman.table.handle_of(number)
            if handle is None or time.monotonic() > until:
                return False
            # Its worker has answered the tasks before it, but nobody has read that: it is not known yet what runs.
            if handle.reader.acquire(blocking=False):
                try:
                    if not self._answers.pass_on(handle):
                        return self._give_up(number, kill=True)
                finally:
                    handle.reader.release()
            else:
                time.sleep(0.001)  # somebody is reading
        return True

    def _give_up(self, number: int, *, kill: bool) -> bool:
        with whole:
            with self._lock:
                given_up, failures = self._foreman.give_up(number, kill=kill)
            settle(failures)
        return given_up

    def resize(self, max_workers: int) -> None:
        """Have more workers, or fewer."""
        self._foreman.check_outside()
        with whole:
            with self._lock:
                failures = self._foreman.resize(max_workers)
            settle(failures)

    # ---------------------------------------------------------------- who waits for a task

    def lead(self, number: int, future: TaskFuture, timeout: float | None) -> None:
        """Read answers in the thread that waits for one: the dispatcher need not be woken, nor wake that thread.

        Returns when the future is done, when ``timeout`` seconds are over, or when this thread cannot help (any more):
        another one reads this worker's answers, or the worker has ended.
        """
        self._foreman.check_outside()
        self._leading.lead(number, future, timeout)

    def look(self) -> None:
        """Have the dispatcher wait for all answers.  Takes no lock: called from under those of futures."""
        if self._attention.is_missing:
            self._wakeup.ring()

    def wake(self) -> None:
        """Make the dispatcher look around.  Safe in finalizers and signal handlers."""
        self._wakeup.ring()

    # ---------------------------------------------------------------- the end

    def shutdown(
        self, cancel_futures: bool, *, interrupted: bool = False
    ) -> threading.Thread | None:
        """Take no more tasks; return the thread to join, if there is one.

        ``interrupted``: Ctrl-C has ended the tasks that ran, and no other is to begin.
        """
        if os.getpid() != self.pid:
            return None
        lifetime = self._lifetime
        if self._foreman.is_inside() or lifetime.is_starter() or not self._leading.stand_down():
            self._foreman.refuse_more()
            self.abandon()
            return None  # to wait for the end in here would be to prevent it
        with whole:
            with self._lock:
                failures = self._foreman.close()
                thread = lifetime.thread_to_join()
                if thread is None:
                    lifetime.never_begin()
            settle(failures)
        if cancel_futures or interrupted:
            self._cancel_waiting(sent_ahead=interrupted)
        self.wake()
        return thread

    def begin_no_more(self) -> None:
        """Begin no task any more: the program has been interrupted, and ends."""
        self._cancel_waiting(sent_ahead=True)

    def _cancel_waiting(self, *, sent_ahead: bool = False) -> None:
        """Cancel the tasks that have not begun; as in the standard library, what was sent to a worker is finished.

        ``sent_ahead``: it is not, if it can be taken back.
        """
        with self._lock:
            waiting = self._foreman.table.waiting(sent_ahead=sent_ahead)
        # Cancelling runs callbacks, so it happens without the lock; some may begin meanwhile.
        try:
            each(lambda _, task: task.future.cancel(), waiting)
        finally:
            with whole:
                with self._lock:
                    failures = self._foreman.forget_cancelled(waiting)
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
            with whole:
                with self._lock:
                    if not self.finished:
                        why = "the workers of this pool were terminated"
                        failures = self._foreman.break_pool(why, signal_number)
                settle(failures)
                self.wake()

    def abandon(self) -> None:
        """Nobody can submit any more: finish and stop.  Safe in finalizers."""
        self._rounds.abandoned = True
        self.wake()

    def wait_for_end(self) -> None:
        """At interpreter exit: wait until the last worker is gone."""
        self._leading.stand_down()
        with self._lock:  # it may be about to start
            thread = self._lifetime.thread_to_join()
        if thread is not None:
            thread.join()
