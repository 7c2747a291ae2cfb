"""The futures that an executor returns: light, and read by whoever waits for them.

**Light.**  A ``concurrent.futures.Future`` carries a condition variable and two lists, six objects in all, which most
futures of a large ``map`` never need: nobody waits for them, since they are done when they are looked at.  Here these
are made when somebody first asks for the condition, and without it a future changes its state under one lock of the
module.  All of the base's code takes the condition before it touches waiters or callbacks, so what is without a
condition has neither.

**Begun and cancelled without waiting.**  User code may run under a future's condition, in a finalizer or a signal
handler, and call the executor.  So whoever holds a lock of the executor's does not wait for a condition: what is
pending changes its state under the lock of the module, also where there is a condition, and who cancels a future
tells those that wait for it.

**Read by whoever waits.**  The thread that waits for a result reads the worker's answer itself, if it can: that saves
waking another thread, a third of the time.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures._base import (
    CANCELLED,
    CANCELLED_AND_NOTIFIED,
    FINISHED,
    PENDING,
    RUNNING,
)
from typing import Any, Protocol

from shmpool.interrupts import HeardCondition, whole

__all__ = ["TaskFuture"]

#: Guards the state of futures that have no condition, and of those that are pending. Nothing is allocated under it, so
#: that no garbage collection, and with it no finalizer, runs there; reentrant for signal handlers.
_lock = threading.RLock()


class Dispatcher(Protocol):
    """What a future asks of the driver that has its task."""

    pid: int

    def lead(self, number: int, future: TaskFuture, timeout: float | None) -> None: ...
    def look(self) -> None: ...
    def take_back(self, number: int) -> bool: ...


class TaskFuture(Future[Any]):
    """A future of a task.

    Attributes
    ----------
    driver : weak reference to the driver, or None
        Not yet submitted if None.
    number : int
        What the driver calls the task.
    """

    driver: weakref.ref[Any] | None = None  # to a Dispatcher
    number: int = -1

    # What the base's __init__ sets: a future begins with no attributes of its own.
    _state: str = PENDING
    _result: Any = None
    _exception: BaseException | None = None
    _waiters: Any = ()
    _done_callbacks: Any = ()
    _made: HeardCondition | None = None

    def __init__(self) -> None:
        pass

    @property
    def _condition(self) -> HeardCondition:  # type: ignore[override]  # nobody sets it: __init__ does not
        if self._made is None:
            condition = HeardCondition()
            waiters: list[Any] = []
            callbacks: list[Callable[[Any], Any]] = []
            with _lock:
                if self._made is None:
                    self._waiters, self._done_callbacks = waiters, callbacks
                    self._made = condition
            self._look()
        assert self._made is not None
        return self._made

    # ---------------------------------------------------------------- light

    def set_running_or_notify_cancel(self) -> bool:
        """As ``Future.set_running_or_notify_cancel``, but waits for nobody, and may be called again when cancelled."""
        with _lock:
            if self._state == PENDING:
                self._state = RUNNING
                return True
        if self.cancelled():
            return False
        return super().set_running_or_notify_cancel()  # raises: it was begun before

    def set_result(self, result: Any) -> None:
        """As ``Future.set_result``."""
        with _lock:
            if self._made is None and self._state == RUNNING:
                self._result = result
                self._state = FINISHED
                return
        super().set_result(result)

    # States only go forward, and the result is there before the state says so: to look takes no lock.

    def done(self) -> bool:
        """As ``Future.done``."""
        if self._state == RUNNING:
            self._look()
        return self.is_settled

    @property
    def is_settled(self) -> bool:
        """Is it done?  Asked by the driver, which takes no interest in that."""
        return self._state not in (RUNNING, PENDING)

    def cancelled(self) -> bool:
        """As ``Future.cancelled``."""
        return self._state in (CANCELLED, CANCELLED_AND_NOTIFIED)

    def running(self) -> bool:
        """As ``Future.running``."""
        if self._state == RUNNING:
            self._look()
        return self._state == RUNNING

    def result(self, timeout: float | None = None) -> Any:
        """As ``Future.result``."""
        if self._state == FINISHED and self._exception is None:
            return self._result
        try:
            with whole:
                return super().result(self._seconds_left(timeout))
        finally:
            del self  # breaks a cycle with the exception's traceback

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As ``Future.exception``."""
        if self._state == FINISHED:
            return self._exception
        with whole:
            return super().exception(self._seconds_left(timeout))

    def cancel(self) -> bool:
        """As ``Future.cancel``; a task that was sent ahead to a busy worker counts as not begun."""
        if self._state == FINISHED:
            return False
        with whole:
            if self._state == PENDING:
                self._cancel_if(PENDING)
            if self.cancelled():
                return True
            driver = self._own_driver()
            if driver is not None and self._state == RUNNING and driver.take_back(self.number):
                self.cancel_running()
                return True
            return False

    def cancel_running(self) -> None:
        """Be cancelled although running, unless done."""
        with whole:
            self._cancel_if(RUNNING)

    def _cancel_if(self, state: str) -> None:
        """Be cancelled if in this state."""
        with self._condition:
            with _lock:
                if self._state != state:
                    return
                self._state = CANCELLED
            self._condition.notify_all()
            super().set_running_or_notify_cancel()  # tell who waits for it in another way; a callback may raise
        self._invoke_callbacks()  # type: ignore[attr-defined]  # unknown to typeshed

    # ---------------------------------------------------------------- read by whoever waits

    def _look(self) -> None:
        """Somebody is interested who does not wait in :meth:`result`: have the answer read when it comes.

        Called with locks held, which the driver's own must not be taken under.
        """
        driver = None if self.driver is None else self.driver()
        if driver is not None:
            driver.look()

    def _seconds_left(self, timeout: float | None) -> float | None:
        """Lead, and tell how long is left to wait."""
        if self._state != RUNNING:
            return timeout
        driver = self._own_driver()
        if driver is None:
            return timeout
        if timeout is None:
            driver.lead(self.number, self, None)
            return None
        deadline = time.monotonic() + timeout
        if timeout > 0:
            driver.lead(self.number, self, timeout)
        return deadline - time.monotonic()

    def _own_driver(self) -> Dispatcher | None:
        """The driver, if it is alive and this process's own."""
        driver: Dispatcher | None = None if self.driver is None else self.driver()
        return driver if driver is not None and driver.pid == os.getpid() else None


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # another thread may have held it


os.register_at_fork(after_in_child=_after_fork_in_child)
