"""A task: what was submitted, until its future has a result."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures._base import PENDING
from typing import Any

from shmpool.store.blocks import Block
from shmpool.store.store import Payload
from shmpool.worker.process import WorkerHandle

__all__ = ["Function", "Task", "TaskFuture"]


class Function:
    """A pickled function, shared by the tasks of one call."""

    __slots__ = ("counted", "name", "payload")

    def __init__(self, payload: Payload, name: str) -> None:
        self.payload = payload
        self.name = name
        self.counted = False  # in the executor's figures

    def __del__(self) -> None:
        # The last of the tasks is gone. Finalizers wait for no lock: the blocks are queued.
        self.payload.release_later()


class TaskFuture(Future[Any]):
    """A future whose waiter reads the answer itself, if it can: that saves waking another thread, a third of the time.

    Attributes
    ----------
    lead : callable or None
        Called with the future and the seconds left by a thread that is about to wait; returns when it cannot help.
    """

    lead: Callable[[TaskFuture, float | None], None] | None = None
    #: Called without arguments; True if the task was taken back, since its worker had not begun it.
    take_back: Callable[[], bool] | None = None

    def cancel(self) -> bool:
        """As ``Future.cancel``; a task that was sent ahead to a busy worker counts as not begun."""
        if super().cancel():
            return True
        if self.running() and self.take_back is not None and self.take_back():
            with self._condition:
                self._state = PENDING
            super().cancel()
            self.set_running_or_notify_cancel()  # tell who waits for it
            return True
        return False

    def result(self, timeout: float | None = None) -> Any:
        """As ``Future.result``."""
        return super().result(self._seconds_left(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As ``Future.exception``."""
        return super().exception(self._seconds_left(timeout))

    def _seconds_left(self, timeout: float | None) -> float | None:
        """Lead, and tell how long is left to wait."""
        lead = self.lead
        if lead is None or not self.running():
            return timeout
        if timeout is None:
            lead(self, None)
            return None
        deadline = time.monotonic() + timeout
        if timeout > 0:
            lead(self, timeout)
        return deadline - time.monotonic()


class Task:
    """One call of a function.

    Attributes
    ----------
    future : concurrent.futures.Future
    function : Function
    arguments : Payload
        The pickled (args, kwargs).
    blocks : list of Block
        Those of the function and of the arguments; held until the task is settled.
    readonly : bool
        How they are mapped in the worker.
    started : bool
        The future is running, from its user's point of view: the task was sent to a worker.
    handle : WorkerHandle or None
        The worker that it was sent to.
    introduced : list of int
        Arenas whose descriptors went with it: the worker knows them when it has answered.
    """

    __slots__ = (
        "arguments", "blocks", "function", "future", "handle", "introduced", "readonly", "started",
    )  # fmt: skip

    def __init__(self, function: Function, arguments: Payload, readonly: bool) -> None:
        self.future = TaskFuture()
        self.function = function
        self.arguments = arguments
        self.blocks: list[Block] = function.payload.blocks + arguments.blocks
        self.readonly = readonly
        self.started = False
        self.handle: WorkerHandle | None = None
        self.introduced: list[int] = []
