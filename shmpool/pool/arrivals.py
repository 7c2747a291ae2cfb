"""The results of ``imap`` on their way to the user: in order, or as they come.

They know nothing of the pool, and any number of threads may take them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from multiprocessing import TimeoutError as PoolTimeoutError
from queue import Empty, SimpleQueue
from typing import Any

from shmpool.pool.outcomes import Fate, Outcome, is_done, outcome_of
from shmpool.progress import Bar

__all__ = ["InOrder", "Unordered"]


class _End:
    """Stands behind the last result."""


_END = _End()


class _Shown:
    """Results with a progress bar.

    Parameters
    ----------
    fate : Fate
        Of the pool.
    bar : Bar or None
        Shows what is done.
    """

    def __init__(self, fate: Fate, bar: Bar | None) -> None:
        self._fate = fate
        self._bar = bar

    def no_more(self) -> None:
        """All tasks are under way."""
        if self._bar is not None:
            self._bar.no_more()

    def all_taken(self) -> None:
        """So all is done."""
        if self._bar is not None:
            self._bar.finish()

    def forget(self) -> None:
        """Nobody wants to see more.  Safe in finalizers."""
        if self._bar is not None:
            self._bar.abandon()


class InOrder(_Shown):
    """The results of ``imap``: futures in order, or outcomes."""

    def __init__(self, fate: Fate, bar: Bar | None = None) -> None:
        super().__init__(fate, bar)
        self._queue: SimpleQueue[Future[Any] | Outcome | _End] = SimpleQueue()
        # Taken from the queue, but the waiting ended before they were done.
        self._overdue: deque[Future[Any]] = deque()

    def add(self, future: Future[Any]) -> None:
        """One more task is under way."""
        self._queue.put(future)

    def end(self, error: BaseException | None = None) -> None:
        """There are no more; the last is an error."""
        self.no_more()
        if error is not None:
            self._queue.put(Outcome(False, error))
        self._queue.put(_END)

    def take(self, timeout: float | None = None) -> Outcome | None:
        """The next; None at the end.

        Raises
        ------
        multiprocessing.TimeoutError
            It was not there in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        item = (self._overdue and _popped(self._overdue)) or _get(self._queue, timeout)
        if type(item) is Outcome:
            return item
        if item is _END:
            self._queue.put(_END)  # for whoever asks again
            return None
        if deadline is not None and not is_done(item, deadline):
            self._overdue.append(item)
            raise PoolTimeoutError
        try:
            return outcome_of(item, self._fate)
        except BaseException:  # Ctrl-C, or another signal handler
            self._overdue.append(item)
            raise
        finally:
            del item  # breaks a cycle with the exception's traceback

    def cancel(self) -> None:
        """Cancel the tasks that have not begun; the results are of no interest any more."""
        for item in [*self._overdue, *_drained(self._queue)]:
            if isinstance(item, Future):
                item.cancel()
        self._queue.put(_END)


class Unordered(_Shown):
    """The results of ``imap_unordered``: outcomes, as they come."""

    def __init__(self, fate: Fate, bar: Bar | None = None) -> None:
        super().__init__(fate, bar)
        self._queue: SimpleQueue[Outcome | _End] = SimpleQueue()
        self._lock = threading.Lock()  # guards the next two
        self._under_way: set[Future[Any]] = set()
        self._is_ending = False

    def add(self, future: Future[Any]) -> None:
        """One more task is under way."""
        with self._lock:
            self._under_way.add(future)
        future.add_done_callback(self._arrived)

    def _arrived(self, future: Future[Any]) -> None:
        # Not the future itself: its callback refers to this queue, and both would live on together.
        self._queue.put(outcome_of(future, self._fate))
        with self._lock:
            self._under_way.discard(future)
            is_last = self._is_ending and not self._under_way
        if is_last:
            self._queue.put(_END)

    def end(self, error: BaseException | None = None) -> None:
        """There are no more; one is an error."""
        self.no_more()
        if error is not None:
            self._queue.put(Outcome(False, error))
        with self._lock:
            self._is_ending = True
            is_last = not self._under_way
        if is_last:
            self._queue.put(_END)

    def take(self, timeout: float | None = None) -> Outcome | None:
        """The next; None at the end.  As of :class:`InOrder`."""
        item = _get(self._queue, timeout)
        if item is _END:
            self._queue.put(_END)  # for whoever asks again
            return None
        return item  # type: ignore[no-any-return]

    def cancel(self) -> None:
        """Cancel the tasks that have not begun; the results are of no interest any more."""
        with self._lock:
            futures = list(self._under_way)
        for future in futures:
            future.cancel()
        _drained(self._queue)
        self._queue.put(_END)


def _popped(items: deque[Future[Any]]) -> Future[Any] | None:
    try:
        return items.popleft()
    except IndexError:  # another thread was faster
        return None


def _get(queue: SimpleQueue[Any], timeout: float | None) -> Any:
    if timeout is None:
        return queue.get()
    try:
        return queue.get(timeout=max(0.0, timeout))
    except Empty:
        raise PoolTimeoutError from None


def _drained(queue: SimpleQueue[Any]) -> list[Any]:
    items = []
    while True:
        try:
            items.append(queue.get_nowait())
        except Empty:
            return items
