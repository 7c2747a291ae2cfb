"""What is behind a pool, and behind all views of it: the executor, what runs beside it, and its end.

States, as in multiprocessing::

    RUN --close--> CLOSE --terminate--> TERMINATE
     '------------ terminate ---------------^

A closed pool finishes what it was given: the executor is shut down when the last reader has ended.  A terminated one
finishes nothing; who waits for a result gets an error.  At interpreter exit all pools are terminated, as in
multiprocessing: a script does not wait for what it did not wait for.  That is after all threads that are no daemons
have ended, and after the program's own exit handlers, which may use pools.
"""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections import deque
from multiprocessing import util
from multiprocessing.pool import CLOSE, RUN, TERMINATE

from shmpool.dispatch.driver import Driver
from shmpool.errors import BrokenPoolError
from shmpool.executor import ShmExecutor
from shmpool.pool.arrivals import InOrder, Unordered
from shmpool.pool.callbacks import Callbacks
from shmpool.pool.imap import Reader
from shmpool.pool.outcomes import TERMINATED
from shmpool.worker.process import ProcessLike

__all__ = ["Core"]

#: Seconds that a worker has to end after SIGTERM, before SIGKILL: under fork it may have inherited a handler that only
#: sets a flag, and multiprocessing's terminate() then waits for ever.
PATIENCE = 5.0


class Core:
    """An executor with the life of a pool.

    Parameters
    ----------
    executor : ShmExecutor

    Attributes
    ----------
    executor : ShmExecutor
    callbacks : Callbacks
    state : {"RUN", "CLOSE", "TERMINATE"}
    """

    def __init__(self, executor: ShmExecutor) -> None:
        self.executor = executor
        self.callbacks = Callbacks()
        self.state: str = RUN
        self._lock = threading.RLock()  # guards the next two; finalizers may run under it
        self._readers: set[Reader] = set()
        self._is_ending = False  # the last reader to end shuts the executor down
        self._given_up: deque[InOrder | Unordered] = deque()
        self._last_workers: list[ProcessLike] = []
        self._pid = os.getpid()
        executor._driver.end_late()
        # Before there are workers: if Ctrl-C comes just after their start, they are all that there is of this pool.
        _living[executor._driver] = self.callbacks
        _end_at_exit()
        executor._start_all_workers()

    def check(self) -> None:
        """Raise unless tasks may be submitted."""
        if self.state != RUN:
            raise ValueError("Pool not running")
        if not self.is_own:
            raise RuntimeError(
                "this pool belongs to the process that made it; make another one after a fork"
            )
        if self._given_up:
            self._cancel_given_up()

    @property
    def is_own(self) -> bool:
        """Was it made by this process, not by the one that this was forked from?"""
        return self._pid == os.getpid()

    @property
    def workers(self) -> list[ProcessLike]:
        """The processes; after the end, those of the end."""
        return list(self.executor._processes.values()) or self._last_workers

    # ---------------------------------------------------------------- imap

    def add_reader(self, reader: Reader) -> None:
        """It begins."""
        with self._lock:
            self._readers.add(reader)

    def reader_ended(self, reader: Reader) -> None:
        """It will submit nothing more."""
        with self._lock:
            self._readers.discard(reader)
            is_last = self._is_ending and not self._readers
        if is_last:
            self.executor.shutdown(wait=False)

    def give_up(self, results: InOrder | Unordered) -> None:
        """Nobody will take these results.  Safe in finalizers: they are cancelled later, since that takes locks."""
        self._given_up.append(results)

    def _cancel_given_up(self) -> None:
        while self._given_up:
            self._given_up.popleft().cancel()

    # ---------------------------------------------------------------- the end

    def close(self) -> None:
        """Take no more tasks; finish."""
        if self.state != RUN or not self.is_own:
            return
        self.state = CLOSE
        self._last_workers = self.workers
        self._cancel_given_up()
        with self._lock:
            self._is_ending = True
            is_reading = bool(self._readers)
        if not is_reading:
            self.executor.shutdown(wait=False)

    def join(self) -> None:
        """Wait for the end, after :meth:`close` or :meth:`terminate`."""
        if not self.is_own:
            return
        if self.state == RUN:
            raise ValueError("Pool is still running")
        self._cancel_given_up()
        if self.state == CLOSE:
            self._join_readers()
        self.executor.shutdown(wait=True)
        self.callbacks.join()

    def _join_readers(self) -> None:
        with self._lock:
            readers = list(self._readers)
        for reader in readers:
            reader.window.remove_limits()  # there may be nobody else to take results
        for reader in readers:
            reader.join()

    def terminate(self) -> None:
        """End now.  Tasks under way fail, the others do not begin; callbacks are not called any more."""
        if not self.is_own:
            return
        self.state = TERMINATE
        self._last_workers = self.workers
        self.callbacks.terminated = True
        with self._lock:
            self._is_ending = True
            readers = list(self._readers)
        for reader in readers:
            # Before the reader says that there is no more. It may not come to it: its iterable may block.
            reader.results.end(BrokenPoolError(TERMINATED))
            reader.window.close()
        _end_workers(self.executor._driver)


def _end_workers(driver: Driver) -> None:
    """End them, and wait until they have ended."""
    driver.terminate(signal.SIGTERM)
    thread = driver.shutdown(cancel_futures=True)
    if thread is None or thread is threading.current_thread():
        return
    thread.join(PATIENCE)
    if thread.is_alive():
        driver.terminate(signal.SIGKILL)
        thread.join()


#: A driver lives until its workers have ended, also when its pool was dropped.
_living: weakref.WeakKeyDictionary[Driver, Callbacks] = weakref.WeakKeyDictionary()


def _at_exit() -> None:
    for driver, callbacks in list(_living.items()):
        if driver.pid == os.getpid() and not driver.finished:
            callbacks.terminated = True
            _end_workers(driver)


_finalizer: util.Finalize | None = None


def _end_at_exit() -> None:
    """Have the pools of this process ended when multiprocessing would end its own."""
    global _finalizer
    if _finalizer is None or not _finalizer.still_active():
        _finalizer = util.Finalize(None, _at_exit, exitpriority=15)


def _after_fork_in_child() -> None:
    global _finalizer
    _finalizer = None  # it is of the parent


os.register_at_fork(after_in_child=_after_fork_in_child)
