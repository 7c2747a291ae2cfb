"""The reusable executor: one for the whole process, there whenever somebody asks for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from shmpool.executor import ShmExecutor

__all__ = ["get_reusable_executor"]

_lock = (
    threading.RLock()
)  # guards _current; taken again where starting an executor runs user code that asks for it


class _Asked(NamedTuple):
    """What an executor was made with; another wish needs another executor."""

    context: Any
    timeout: float | None
    initializer: Callable[..., object] | None
    initargs: tuple[Any, ...]
    mmap_mode: str


class _Current(NamedTuple):
    executor: ShmExecutor
    asked: _Asked
    pid: int


_current: _Current | None = None


def get_reusable_executor(
    max_workers: int | None = None,
    context: Any = None,
    timeout: float | None = 10,
    kill_workers: bool = False,
    reuse: bool | Literal["auto"] = "auto",
    *,
    initializer: Callable[..., object] | None = None,
    initargs: tuple[Any, ...] = (),
    mmap_mode: Literal["c", "r"] = "c",
) -> ShmExecutor:
    """The process-wide executor: the one that is there, if it suits and works, or a new one.

    Works as loky's function of this name.  Workers stay warm from call to call, and leave when they have had nothing to
    do for ``timeout`` seconds.

    Parameters
    ----------
    max_workers : int, optional
        Number of processes.  Another number than before resizes the executor.  Default: as many as there are, or the
        number of CPUs that this process may use.
    context : context or {"loky", "fork", "forkserver", "spawn"}, optional
        How processes are started.  Default: "loky", under which scripts need no ``if __name__ == "__main__"``.
    timeout : float or None
        Seconds after which idle workers leave; None: they stay.
    kill_workers : bool
        If a new executor is needed: end the old one's workers at once, instead of when their tasks are done.
    reuse : bool or "auto"
        "auto": a new executor if one of the other arguments has changed.  True: the executor that is
        there whatever the arguments are, unless it is broken or shut down.  False: a new one.
    initializer, initargs
        As for :class:`~shmpool.ShmExecutor`.
    mmap_mode : {"c", "r"}
        As for :class:`~shmpool.ShmExecutor`.

    Raises
    ------
    ValueError, TypeError
        An argument makes no sense.
    """
    global _current
    if max_workers is not None and max_workers <= 0:
        raise ValueError(f"max_workers must be greater than 0, got {max_workers}")
    asked = _Asked(context or "loky", timeout, initializer, initargs, mmap_mode)
    with _lock:
        current = _current
        if current is not None and current.pid == os.getpid():
            executor = current.executor
            if executor.is_usable and (
                reuse is True or (reuse == "auto" and _same(asked, current.asked))
            ):
                if max_workers is not None and max_workers != executor._max_workers:
                    executor._resize(max_workers)
                return executor
            if max_workers is None and reuse is True:
                max_workers = executor._max_workers
            _current = None
            if kill_workers:
                executor.kill_workers()
            executor.shutdown(wait=True)
        executor = ShmExecutor(
            max_workers, asked.context, initializer, initargs, mmap_mode=mmap_mode, idle_timeout=timeout
        )  # fmt: skip
        _current = _Current(executor, asked, os.getpid())
        return executor


def _same(one: _Asked, other: _Asked) -> bool:
    try:
        return bool(one == other)
    except Exception:
        return False  # arrays among initargs have no truth value, and other classes their own ideas


def _after_fork_in_child() -> None:
    global _current, _lock
    _current = None  # its workers are the parent's
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)
