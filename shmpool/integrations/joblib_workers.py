"""The workers that Parallel calls share: one executor for the whole process, leased to the calls that run.

Calls that want the same workers get the same executor, one after the other or at the same time (in threads), so that
workers stay warm.  A call that wants others (another initializer, other limits for threads) gets a new one, and the old
one goes when the last call that has leased it has ended: ``shmpool.get_reusable_executor`` would end it under that
call, and a library that calls joblib must not end the program's own reusable executor either.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

from joblib import Parallel

from shmpool.executor import ShmExecutor
from shmpool.lokys import loky_context_module

__all__ = ["Lease", "Wishes", "lease", "shutdown_workers"]


class Wishes(NamedTuple):
    """What a call wants its workers to be; with other wishes come other workers.

    Attributes
    ----------
    environment : dict of str to str
        Variables that are set before a worker's Python starts.
    idle_timeout : float or None
        Seconds after which workers leave that have nothing to do.
    initializer : callable
    initargs : tuple
    """

    environment: dict[str, str]
    idle_timeout: float | None
    initializer: Callable[..., object]
    initargs: tuple[Any, ...]

    def same(self, other: Wishes) -> bool:
        """Would the same workers do?"""
        try:
            return bool(self == other)
        except Exception:
            return False  # different arrays among initargs: their comparison has no truth value


class _Shared:
    """An executor, and how many calls have leased it."""

    def __init__(self, n_jobs: int, wishes: Wishes) -> None:
        self.wishes = wishes
        self.leases = 0
        self.executor = ShmExecutor(
            n_jobs,
            _Context(wishes.environment),
            wishes.initializer,
            wishes.initargs,
            idle_timeout=wishes.idle_timeout,
        )

    def suits(self, wishes: Wishes) -> bool:
        return self.executor.is_usable and self.wishes.same(wishes)

    def resize(self, n_jobs: int) -> None:
        """Have ``n_jobs`` workers; more, if calls are under way that want more."""
        executor = self.executor
        if n_jobs > executor._max_workers or (not self.leases and n_jobs < executor._max_workers):
            executor._resize(n_jobs)


class Lease:
    """The right to use an executor, until it is released or forgotten."""

    def __init__(self, shared: _Shared) -> None:
        self._shared: _Shared | None = shared
        self.executor = shared.executor
        shared.leases += 1

    def release(self) -> None:
        """Give it back; the executor ends if nobody else has it, and nobody will."""
        with _lock:
            shared, self._shared = self._shared, None
            if shared is None:
                return
            shared.leases -= 1
            if not shared.leases and shared not in _warm:
                shared.executor.shutdown(wait=False)

    def __del__(self) -> None:
        self.release()


_LokyContext: Any = loky_context_module().LokyContext


class _Context(_LokyContext):  # type: ignore[misc]  # loky has no types
    """loky's context, with environment variables for the processes that it starts."""

    def __init__(self, environment: dict[str, str]) -> None:
        super().__init__()
        self._environment = environment

    def Process(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802  # a context's name for it
        return _LokyContext.Process(*args, env=self._environment, **kwargs)


# Guards _warm and the counts of leases; taken again where a lease is forgotten meanwhile.
_lock = threading.RLock()
#: What the next call can have. One, but for calls that may not share it, see below.
_warm: list[_Shared] = []


def lease(n_jobs: int, wishes: Wishes) -> Lease:
    """Lease an executor of ``n_jobs`` workers as wished."""
    with _lock:
        for shared in [*_warm]:
            if not shared.suits(wishes):
                _forget(shared)
        for shared in _warm:
            # Inside of another call's iterator of tasks this thread holds that call's lock. The one thread that
            # delivers the results of its executor may be waiting for the lock, and would never come to ours.
            if not (shared.leases and _is_inside_an_iterator()):
                shared.resize(n_jobs)
                return Lease(shared)
        shared = _Shared(n_jobs, wishes)
        _warm.append(shared)
        return Lease(shared)


def shutdown_workers(wait: bool = True) -> None:
    """End the workers that Parallel calls have left warm; the next call starts new ones.

    Parameters
    ----------
    wait : bool
        Return only when they have ended.

    Notes
    -----
    Calls under way keep theirs until they are done.
    """
    with _lock:
        ending = [shared.executor for shared in [*_warm] if _forget(shared)]
    if wait:
        for executor in ending:
            executor.shutdown(wait=True)


def _forget(shared: _Shared) -> bool:
    """No call gets it any more; True if none has it, so that it ends."""
    _warm.remove(shared)
    if shared.leases:
        return False
    shared.executor.shutdown(wait=False)
    return True


def _is_inside_an_iterator() -> bool:
    """Does this thread run the iterator of tasks that another Parallel call is being given?"""
    inside = Parallel.dispatch_one_batch.__code__
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is inside:
            return True
        frame = frame.f_back
    return False


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()
    _warm.clear()  # the workers are the parent's


os.register_at_fork(after_in_child=_after_fork_in_child)
