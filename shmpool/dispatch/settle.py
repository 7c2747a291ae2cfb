"""Settle futures.  All of it can run the user's code, callbacks above all: no lock may be held."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import Any

from shmpool.dispatch.task import Task
from shmpool.errors import StoreFullError, WorkerDiedError
from shmpool.interrupts import heard
from shmpool.worker.process import WorkerHandle

__all__ = ["Failures", "death", "each", "lack", "resolve", "settle", "without_frames"]

_log = logging.getLogger("shmpool")

#: Tasks that failed, for whoever holds no lock to settle.
Failures = list[tuple[Task, BaseException]]


def death(handle: WorkerHandle, task: Task, exitcode: int | None) -> WorkerDiedError:
    """What a task fails with whose worker is dead, or as good as that."""
    return WorkerDiedError(
        pid=handle.pid, exitcode=exitcode, task=task.function.name, problem=handle.end.problem
    )


def lack(error: Exception) -> Callable[[], Exception] | None:
    """What makes the error that a task fails with if no worker could be started, since there is no room for one now.

    None if the reason was another, which time will not mend.
    """
    if isinstance(error, StoreFullError):
        detail = f"a worker cannot be started without room for its initializer: {error.detail}"
        return partial(
            StoreFullError, requested=error.requested, used=error.used, capacity=error.capacity, detail=detail
        )  # fmt: skip
    if isinstance(error, OSError):
        told = f"no worker could be started: {error.strerror or error}"
        return partial(OSError, error.errno, told) if error.errno else partial(OSError, told)
    return None


def without_frames(error: BaseException) -> BaseException:
    """An exception for a future: its frames as text, or they and all that is in them would live as long as it does."""
    from concurrent.futures.process import _RemoteTraceback

    text = "".join(traceback.format_exception(error))
    remote: Any = _RemoteTraceback  # typeshed has it take a traceback; it takes the text of one
    error.__cause__, error.__context__ = remote(f'\n"""\n{text}"""'), None
    return error.with_traceback(None)


def resolve(future: Future[Any], ok: bool, value: Any) -> None:
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


def settle(failures: Failures) -> None:
    """Give failed tasks their exceptions.  Runs callbacks: no lock may be held."""
    each(_settle_one, failures)


def _settle_one(task: Task, error: BaseException) -> None:
    task.arguments.release()
    try:
        with heard():  # callbacks may take any time
            resolve(task.future, False, error)
    finally:
        if not task.future.is_settled:  # Ctrl-C has come before it was
            resolve(task.future, False, error)


def each(function: Callable[..., None], items: Iterable[tuple[Any, ...]]) -> None:
    """Call a function with each item, whatever it raises; the first exception is raised in the end."""
    first: BaseException | None = None
    for item in items:
        try:
            function(*item)
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first
