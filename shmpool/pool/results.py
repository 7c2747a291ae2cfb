"""The results of ``apply_async`` and ``map_async``.

A result without callbacks is a thin cover over the executor's futures: nothing is called, locked or copied when a task
is done, and the thread that waits reads the answer itself.  With callbacks, a result is ready when its callback has
returned, as in multiprocessing.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from multiprocessing import TimeoutError as PoolTimeoutError
from multiprocessing import pool as stdlib
from typing import Any

from shmpool.pool.callbacks import Callback, Callbacks
from shmpool.pool.outcomes import Outcome, is_done, outcome_of
from shmpool.progress import Bar

__all__ = ["AsyncResult", "MapResult"]

#: Guards the counting of the futures that a result with callbacks still waits for.
_left_lock = threading.Lock()


class AsyncResult(stdlib.ApplyResult[Any]):
    """What :meth:`Pool.apply_async` returns.

    Parameters
    ----------
    futures : list of Future
        Of the tasks whose outcome this is.
    callbacks : Callbacks
        The pool's.
    callback, error_callback : callable, optional
    """

    _outcome: Outcome | None = None
    _called: threading.Event | None = (
        None  # set when the callback has returned; None: there is none
    )
    _done = 0  # so many futures are known to be done

    def __init__(
        self,
        futures: list[Future[Any]],
        callbacks: Callbacks,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
    ) -> None:
        # Not the base's: that one makes an event for each result, and enters it into the pool's table.
        self._futures = futures
        self._callbacks = callbacks
        if futures and (callback is not None or error_callback is not None):
            self._called = threading.Event()
            self._callback, self._error_callback = callback, error_callback
            self._left = len(futures)
            callbacks.expect(self)
            for future in futures:
                future.add_done_callback(self._one_done)

    def get(self, timeout: float | None = None) -> Any:
        """The result.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait for it.

        Raises
        ------
        multiprocessing.TimeoutError
            It was not there in time.
        Exception
            What the task raised; its cause is a ``multiprocessing.pool.RemoteTraceback``.
        WorkerDiedError
            The worker that ran the task died.
        BrokenPoolError
            The pool was terminated, or its workers cannot start.
        """
        if (self._called is not None or timeout is not None) and not self._wait(timeout):
            raise PoolTimeoutError
        ok, value = self._take()
        if ok:
            return value
        try:
            raise value
        finally:
            del self, value  # breaks a cycle with the exception's traceback

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the result is there, at most ``timeout`` seconds."""
        self._wait(timeout)

    def ready(self) -> bool:
        """Is the result there?"""
        if self._called is not None and not self._callbacks.is_calling:
            return self._called.is_set()
        return self._wait(0)

    def successful(self) -> bool:
        """Did the task raise nothing?

        Raises
        ------
        ValueError
            The result is not there yet.
        """
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return self._take().ok

    def _wait(self, timeout: float | None) -> bool:
        """Wait; False if it took too long."""
        deadline = None if timeout is None else time.monotonic() + timeout
        futures = self._futures
        for number in range(self._done, len(futures)):
            if not is_done(futures[number], deadline):
                return False
            self._done = number + 1
        # A callback that waits for another result waits for the task only: the callback of that comes after it.
        if self._called is None or self._callbacks.is_calling:
            return True
        return self._called.wait(None if deadline is None else deadline - time.monotonic())

    def _take(self) -> Outcome:
        """The outcome, from the futures the first time."""
        futures, outcome = self._futures, self._outcome
        if outcome is None:
            # Two threads may come here at once, and find the same.
            self._outcome = outcome = self._collect(futures)
            self._futures = []
        return outcome

    def _collect(self, futures: list[Future[Any]]) -> Outcome:
        return outcome_of(futures[0], self._callbacks)

    # ---------------------------------------------------------------- what is private in multiprocessing, and read

    @property
    def _success(self) -> bool:
        """For programs that look at it instead of asking ``successful()``; not there before the result, as there."""
        return self._outcome_if_ready("_success").ok

    @property
    def _value(self) -> Any:
        """For programs that look at results without raising what they raise: that is the value then, as there."""
        return self._outcome_if_ready("_value").value

    def _outcome_if_ready(self, name: str) -> Outcome:
        if not self.ready():
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r} yet")
        return self._take()

    # ---------------------------------------------------------------- callbacks

    def _one_done(self, _future: Future[Any]) -> None:
        if self._left > 1:
            with _left_lock:
                self._left -= 1
                if self._left:
                    return
        self._callbacks.arrived(self)

    def arrive(self) -> tuple[Callback | None, Outcome]:
        """Called by the callbacks' thread when all is done."""
        outcome = self._take()
        return (self._callback if outcome.ok else self._error_callback), outcome

    def was_called(self) -> None:
        """Called by the callbacks' thread: the result is ready."""
        assert self._called is not None
        self._callback = self._error_callback = None
        self._called.set()


class MapResult(AsyncResult, stdlib.MapResult[Any]):
    """What :meth:`Pool.map_async` and :meth:`Pool.starmap_async` return: done when all is done.

    Parameters
    ----------
    futures, callbacks, callback, error_callback :
        As for :class:`AsyncResult`.
    length : int
        So many items there are.
    chunksize : int
        So many of them make one task: if more than one, the results of the tasks are lists, to be joined.
    bar : Bar, optional
        Shows their progress.
    """

    def __init__(
        self,
        futures: list[Future[Any]],
        callbacks: Callbacks,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
        *,
        length: int,
        chunksize: int,
        bar: Bar | None = None,
    ) -> None:
        self._length = length
        self._chunksize = chunksize
        self._bar = bar
        super().__init__(futures, callbacks, callback, error_callback)

    def _collect(self, futures: list[Future[Any]]) -> Outcome:
        values: list[Any] = []
        add = values.extend if self._chunksize > 1 else values.append
        failed: Outcome | None = None
        for future in futures:
            if failed is not None:
                is_done(future, None)  # all are waited for, but the first failure is what counts
                continue
            outcome = outcome_of(future, self._callbacks)
            if outcome.ok:
                add(outcome.value)
            else:
                failed = outcome
        if self._bar is not None:
            self._bar.finish()
        return failed or Outcome(True, values)

    # ---------------------------------------------------------------- what is private in multiprocessing, and read

    @property
    def _number_left(self) -> int:
        """So many chunks are not done: there is no other way to draw a bar for ``map_async``."""
        return sum(not future.done() for future in self._futures)

    @property
    def _success(self) -> bool:
        """For programs that ask whether anything has failed so far, as there."""
        if self.ready():
            return self._take().ok
        return not any(map(_has_failed, self._futures))

    @property
    def _value(self) -> Any:
        """For programs that look at what is there so far: a list with None for what is not, as there."""
        futures = self._futures
        if self.ready():
            return self._take().value
        values = [None] * self._length
        for start, future in zip(range(0, self._length, self._chunksize), futures, strict=False):
            if future.done() and not _has_failed(future):
                result = future.result()
                part = result if self._chunksize > 1 else [result]
                values[start : start + len(part)] = part
        return values


def _has_failed(future: Future[Any]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)
