"""A pool's callbacks: one at a time, in the order in which results arrive, in a thread of their own.

In multiprocessing they run in the thread that handles the results, so that one that raises, or that waits for another
result, stops the pool.  Here it does not: the thread only calls back, what a callback raises is logged, and a callback
may use the pool.  The thread is there while results with callbacks are to come, and a little longer.  (Where the main
thread has ended, and Python starts no others any more, they run where the result arrives, as in multiprocessing.)

This object knows neither pool nor executor: results hold it, and shall keep neither alive.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import main_thread
from typing import Any, Protocol

from shmpool.interrupts import JoinableThread
from shmpool.pool.outcomes import Outcome

__all__ = ["Callback", "Callbacks"]

Callback = Callable[[Any], object]

_log = logging.getLogger("shmpool")

#: Seconds that the thread waits for more: to start one takes as long as a task.
LINGERS = 1.0


class HasCallbacks(Protocol):
    """A result that has callbacks."""

    def arrive(self) -> tuple[Callback | None, Outcome]:
        """The callback that is due, if any, and what to call it with."""

    def was_called(self) -> None:
        """The callback has returned: now the result is ready."""


class Callbacks:
    """Calls back.

    Attributes
    ----------
    terminated : bool
        The pool was terminated: nothing is called any more.
    """

    def __init__(self) -> None:
        self.terminated = False
        # Guards the next three. Nothing is called or made under it, so no finalizer runs there that may want it.
        self._lock = threading.Lock()
        self._has_thread = False  # or is about to
        self._thread: JoinableThread | None = None
        self._expected: set[HasCallbacks] = set()
        self._arrived: SimpleQueue[HasCallbacks | None] = SimpleQueue()
        self._is_direct = False  # there can be no thread any more

    def expect(self, result: HasCallbacks) -> None:
        """It will arrive."""
        with self._lock:
            self._expected.add(result)
            had_thread, self._has_thread = self._has_thread, True
        if not had_thread:
            self._start(result)

    def expected(self) -> list[HasCallbacks]:
        """Those that have not arrived yet, or whose callback has not returned."""
        with self._lock:
            return list(self._expected)

    def _start(self, result: HasCallbacks) -> None:
        thread = JoinableThread(self._run, "shmpool-callbacks")
        thread.daemon = True
        self._thread = thread
        try:
            thread.start()
        except BaseException as error:
            self._thread = None
            thread.give_up()
            self._is_direct = isinstance(error, RuntimeError) and not main_thread().is_alive()
            with self._lock:
                self._has_thread = False
                if not self._is_direct:
                    self._expected.discard(result)
            if not self._is_direct:
                raise

    def arrived(self, result: HasCallbacks) -> None:
        """Here it is."""
        if self._is_direct:
            self._call(result)
            with self._lock:
                self._expected.discard(result)
        else:
            self._arrived.put(result)

    def join(self) -> None:
        """Wait until the callbacks of all expected results have returned; not if this is one."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            self._arrived.put(None)
            thread.join()

    @property
    def is_calling(self) -> bool:
        """Is the caller a callback?"""
        return self._thread is threading.current_thread()

    def _run(self) -> None:
        while True:
            try:
                result = self._arrived.get(timeout=LINGERS)
            except Empty:
                result = None
            if result is not None:
                self._call(result)
            with self._lock:
                if result is not None:
                    self._expected.discard(result)
                if result is None and not self._expected:
                    self._thread, self._has_thread = None, False
                    return
            del result

    def _call(self, result: HasCallbacks) -> None:
        try:
            callback, outcome = result.arrive()
            if callback is not None and not self.terminated:
                callback(outcome.value)
        except BaseException:  # whatever it is: who waits for the result shall wake up
            _log.exception("a callback of a pool raised")
        finally:
            result.was_called()
