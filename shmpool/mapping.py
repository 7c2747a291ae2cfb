"""One call of ``map``: calls in, results out, in order or as they come.

The futures are the only thing that a finished call's generator holds, and no name holds a future, and so its result,
while the caller looks at the result: memory is free as soon as the caller lets go of it.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from shmpool.interrupts import heard, whole

__all__ = ["and_then", "chunked", "ordered", "unordered"]

T = TypeVar("T")
#: The arguments of one call.
Args = tuple[Any, ...]
#: Makes futures of calls, in order; closed before its end, it cancels those that it has not yielded (and maybe others).
SubmitAll = Callable[[Iterator[Args]], Generator[Future[Any], None, None]]
#: What becomes of the iterator over results before the user gets it.
Shown = Callable[[Iterator[Any]], Iterator[Any]]


def ordered(
    submit: SubmitAll,
    calls: Iterator[Args],
    buffersize: int | None,
    deadline: float | None,
    shown: Shown,
) -> Iterator[Any]:
    """Submit calls, and yield their results in order.

    Parameters
    ----------
    submit : callable
        Given the arguments of calls, submits them, and returns their futures.
    calls : iterator of tuple
    buffersize : int or None
        At most so many calls are submitted whose results were not taken; None: all of them, now.
    deadline : float or None
        By ``time.monotonic``; TimeoutError when a result is not there by then.
    shown : callable
        Given the iterator over results, returns what this is to return.
    """
    futures: deque[Future[Any]] = deque()
    first = submit(itertools.islice(calls, buffersize))
    try:
        with whole, heard():  # once, not for each: that would take a microsecond
            futures.extend(first)
        # Without a buffersize the generator must hold nothing but the futures: then the executor may go before it.
        more = None if buffersize is None else submit(calls)
        return shown(_in_order(futures, more, deadline))
    except KeyboardInterrupt:
        _cancel(first, futures)
        raise


def _in_order(
    futures: deque[Future[Any]], more: Iterator[Future[Any]] | None, deadline: float | None
) -> Iterator[Any]:
    try:
        while futures:
            if more is not None:
                futures.extend(itertools.islice(more, 1))
            yield _next_result(futures, deadline)
    finally:
        for future in futures:
            future.cancel()


def _next_result(futures: deque[Future[T]], deadline: float | None) -> T:
    """The result of the first; whatever comes of that, the future is taken off, and is done or cancelled."""
    future = futures[0]
    try:
        try:
            return future.result(None if deadline is None else deadline - time.monotonic())
        finally:
            future.cancel()
            futures.popleft()  # now: Ctrl-C may come before, and then the caller cancels it
    finally:
        del future  # breaks a cycle with the exception's traceback


def unordered(
    submit: SubmitAll,
    calls: Iterator[Args],
    buffersize: int | None,
    deadline: float | None,
    shown: Shown,
) -> Iterator[Any]:
    """Submit calls, and yield their results as they come; parameters as for :func:`ordered`."""
    done: SimpleQueue[Future[Any]] = SimpleQueue()
    futures: set[Future[Any]] = set()
    first = submit(itertools.islice(calls, buffersize))
    try:
        with whole, heard():
            _enter(first, futures, done)
        more = None if buffersize is None else submit(calls)
        return shown(_as_they_come(futures, done, more, deadline))
    except KeyboardInterrupt:
        _cancel(first, futures)
        raise


def _enter(
    new: Iterable[Future[Any]], futures: set[Future[Any]], done: SimpleQueue[Future[Any]]
) -> None:
    for future in new:
        futures.add(future)
        future.add_done_callback(done.put)


def _as_they_come(
    futures: set[Future[Any]],
    done: SimpleQueue[Future[Any]],
    more: Iterator[Future[Any]] | None,
    deadline: float | None,
) -> Iterator[Any]:
    try:
        while futures:
            yield _next_done(futures, done, more, deadline)
    finally:
        for future in futures:
            future.cancel()


def _next_done(
    futures: set[Future[Any]],
    done: SimpleQueue[Future[Any]],
    more: Iterator[Future[Any]] | None,
    deadline: float | None,
) -> Any:
    try:
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        future = done.get(timeout=seconds)
    except Empty:
        raise TimeoutError from None
    try:
        futures.discard(future)
        if more is not None:
            _enter(itertools.islice(more, 1), futures, done)
        return future.result()
    finally:
        del future  # breaks a cycle with the exception's traceback


def _cancel(unfinished: Generator[Future[Any], None, None], futures: Iterable[Future[Any]]) -> None:
    unfinished.close()
    for future in futures:
        future.cancel()


def chunked(calls: Iterator[Args], size: int) -> Iterator[Args]:
    """So many calls at a time, each time as the arguments of a :class:`~shmpool.worker.chunks.StarChunk`."""
    while chunk := tuple(itertools.islice(calls, size)):
        yield chunk


def and_then(calls: Iterator[Args], done: Callable[[], object]) -> Iterator[Args]:
    """The calls; ``done`` is called when there are no more."""
    yield from calls
    done()
