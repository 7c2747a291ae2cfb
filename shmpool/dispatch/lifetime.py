"""From the first workers to the end of the last: how a driver's workers and its dispatcher thread begin and end.

The dispatcher thread starts after the first workers, so that under fork they are forked from a process that has no
thread of ours, and ends when the last worker is gone.  It is started without the lock: that takes threading's own, and
a finalizer that runs inside of those, in any thread, may want ours.  Meanwhile all may submit.

::

    nothing --start_workers--> starting --start_thread--> running --the last worker is gone--> finished
       ^            |             |            |
       '------------'             |            '- tasks were taken on, and there is no thread: broken, then finished
        no workers, or            '- no thread, no tasks: as if nothing had happened
        descriptors
"""

from __future__ import annotations

import logging
import select
import signal
import threading
from collections.abc import Callable

from shmpool.dispatch import living
from shmpool.dispatch.attention import Attention
from shmpool.dispatch.fleet import Fleet
from shmpool.dispatch.foreman import Foreman
from shmpool.dispatch.rounds import Rounds
from shmpool.dispatch.settle import Failures, settle
from shmpool.dispatch.wakeup import WakeUp
from shmpool.interrupts import JoinableThread, whole
from shmpool.store.books import INSIDE
from shmpool.store.store import ObjectStore
from shmpool.worker.process import Starter

__all__ = ["Lifetime"]

_log = logging.getLogger("shmpool")


class Lifetime:
    """The workers' and the dispatcher thread's.

    Parameters
    ----------
    foreman : Foreman
    attention : Attention
    wakeup : WakeUp
    rounds : Rounds
    store : ObjectStore
    make_starters, cleanup : callable
        See :class:`Driver`.

    Attributes
    ----------
    thread : JoinableThread or None
        The dispatcher's, once it runs (or failed to).
    finished : bool
        All is over, or nothing will ever begin.
    """

    def __init__(
        self,
        foreman: Foreman,
        attention: Attention,
        wakeup: WakeUp,
        rounds: Rounds,
        store: ObjectStore,
        make_starters: Callable[[], tuple[Starter, Callable[[], Starter]]],
        cleanup: Callable[[], None],
    ) -> None:
        self._foreman = foreman
        self._attention = attention
        self._wakeup = wakeup
        self._rounds = rounds
        self._store = store
        self._make_starters = make_starters
        self._cleanup = cleanup
        self._owner: living.Living | None = None  # from the start of the workers to their end
        self.thread: JoinableThread | None = None
        self._starting: JoinableThread | None = None  # the same, until it runs
        self._starter = 0  # the thread that is starting it
        self.finished = False

    # ---------------------------------------------------------------- the beginning

    def start(self, owner: living.Living) -> None:
        """Start the first workers and the thread, once; ``owner`` is kept alive until they have ended.

        Raises
        ------
        Exception
            What starting a process or the thread raised.
        """
        self._foreman.check_outside()
        with whole:
            with self._foreman.lock:
                thread = self._start_workers(owner)
            if thread is not None:
                self._start_thread(thread)

    def _start_workers(self, owner: living.Living) -> JoinableThread | None:
        """Start the first workers; return the dispatcher thread if the caller is the one to start it."""
        foreman = self._foreman
        assert foreman.lock.is_owned()
        if self.thread is not None or self.finished:  # another thread was faster
            return None
        if self._starting is not None:
            if self.is_starter():
                raise RuntimeError(INSIDE)
            return None
        fleet = Fleet(self._store, foreman.processes)
        self._store.start_use(self._wakeup.ring)
        try:
            foreman.fleet = fleet
            self._wakeup.open()
            fleet.poller.register(self._wakeup.fd, select.EPOLLIN)
            self._attention.open(fleet)
            fleet.starter, make_later = self._make_starters()
            foreman.start_first()
            fleet.starter = make_later()
            thread = JoinableThread(self._run, "shmpool-dispatcher")
            if self._rounds.ends_late:
                thread.daemon = True  # else threading would wait for it
        except BaseException:
            self._unstart(fleet)
            raise
        self._starting, self._starter = thread, threading.get_ident()
        self._owner = owner
        living.register(owner)
        return thread

    def _unstart(self, fleet: Fleet) -> None:
        """The system may have had no room.  Nothing has been taken on: whoever asks next tries again."""
        self._foreman.unstart()
        self._finish(fleet)
        self.finished = False

    def _start_thread(self, thread: JoinableThread) -> None:
        foreman = self._foreman
        failures: Failures = []
        try:
            thread.start()
            self.thread = thread  # it says so itself, but it may not have come to that
        except BaseException as error:
            with foreman.lock:
                if self._starting is not thread:
                    raise  # it runs: this is what a signal handler raised
                self._starting = None
                if foreman.counts.submitted or foreman.machine.closing:  # by others, meanwhile
                    self.thread = thread
                    failures = foreman.break_pool(
                        f"no thread could be started: {error}", signal.SIGKILL
                    )
                else:
                    assert foreman.fleet is not None
                    self._unstart(foreman.fleet)
            try:
                settle(failures)
            finally:
                if self.thread is thread:
                    self._work()  # until the workers are gone
                thread.give_up()
            raise
        finally:
            self._starter = 0

    def is_starter(self) -> bool:
        """Is this a finalizer or a signal handler in the thread that starts the dispatcher, and so must not wait?"""
        return self._starting is not None and self._starter == threading.get_ident()

    # ---------------------------------------------------------------- the end

    def thread_to_join(self) -> JoinableThread | None:
        """The dispatcher thread, also if it is about to be started; None if there is none."""
        assert self._foreman.lock.is_owned()
        return self.thread or self._starting

    def never_begin(self) -> None:
        """The driver was shut down before there was anything to do."""
        assert self._foreman.lock.is_owned()
        self.finished = True

    def _run(self) -> None:
        with self._foreman.lock:
            if self._starting is not threading.current_thread():
                return  # who started it has given it up
            self.thread, self._starting = self._starting, None
        self._work()

    def _work(self) -> None:
        foreman = self._foreman
        fleet = foreman.fleet
        assert fleet is not None
        try:
            self._rounds.run()
        except BaseException:
            # A mistake of ours. Nobody may wait for ever because of it.
            _log.exception("the dispatcher failed; its pool is broken")
            with foreman.lock:
                why = "the dispatcher failed; see the log"
                failures = foreman.break_pool(why, signal.SIGKILL)
                fleet.bury()
            settle(failures)
        finally:
            self._finish(fleet)

    def _finish(self, fleet: Fleet) -> None:
        self.finished = True
        self._wakeup.close()
        # No lock: workers are gone, and so is who led; and start() holds it when it fails.
        self._attention.close()
        fleet.close()
        self._cleanup()
        self._store.end_use(self._wakeup.ring)
        owner, self._owner = self._owner, None
        if owner is not None:
            living.unregister(owner)
