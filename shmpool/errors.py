"""Every exception that shmpool raises on purpose.

::

    ShmPoolError
    +-- WorkerDiedError        (also concurrent.futures.process.BrokenProcessPool)
    +-- BrokenPoolError        (also concurrent.futures.process.BrokenProcessPool)
    +-- StoreFullError         (also MemoryError)
    +-- SerializationError     (also pickle.PicklingError)
    +-- TaskTimeoutError       (also TimeoutError)
    +-- RefError               (also LookupError)
    +-- WireError              (also ConnectionError)

Each is also the standard library's type for the same misfortune, so that ``except`` clauses written for
``concurrent.futures`` or ``multiprocessing`` keep working.  Each carries its data as attributes; ``__str__`` makes the
sentence, and the sentence says what to do.  All of them survive pickling.
"""

from __future__ import annotations

import pickle
import signal
from concurrent.futures.process import BrokenProcessPool
from typing import Any, ClassVar

__all__ = [
    "BrokenPoolError",
    "RefError",
    "SerializationError",
    "ShmPoolError",
    "StoreFullError",
    "TaskTimeoutError",
    "WireError",
    "WorkerDiedError",
]


def _rebuild(cls: type[ShmPoolError], args: tuple[Any, ...], state: dict[str, Any]) -> ShmPoolError:
    error = cls(**{name: state[name] for name in cls._fields}) if cls._fields else cls(*args)
    error.__dict__.update(state)
    return error


class ShmPoolError(Exception):
    """Base of all errors of shmpool."""

    #: Parameters of ``__init__``, which are attributes as well.
    _fields: ClassVar[tuple[str, ...]] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        # The subclasses take keyword arguments, which BaseException's own reduction would drop.
        return _rebuild, (type(self), self.args, self.__dict__)


def describe_exit(exitcode: int | None) -> str:
    """Say how a process ended, from its exit code in ``multiprocessing``'s convention (negative: a signal)."""
    if exitcode is None:
        return "for an unknown reason"
    if exitcode >= 0:
        return f"with exit code {exitcode}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    return f"by {name}"


class WorkerDiedError(ShmPoolError, BrokenProcessPool):
    """The worker that ran this task died.  Other tasks are not affected, and the worker is replaced.

    Attributes
    ----------
    pid : int
        Process id of the dead worker.
    exitcode : int or None
        Its exit code; negative for a signal, as in ``multiprocessing.Process.exitcode``.
    task : str
        What it was running.
    problem : str or None
        Why it was ended, if shmpool did that: something between it and this process went wrong.
    """

    _fields = ("pid", "exitcode", "task", "problem")

    def __init__(
        self, *, pid: int, exitcode: int | None, task: str, problem: str | None = None
    ) -> None:
        super().__init__(pid, exitcode, task, problem)
        self.pid = pid
        self.exitcode = exitcode
        self.task = task
        self.problem = problem

    def __str__(self) -> str:
        if self.problem is not None:
            return (
                f"worker {self.pid} was ended while it ran {self.task}: {self.problem}. Only this task is lost; the "
                "pool goes on."
            )
        hint = ""
        if self.exitcode == -signal.SIGKILL:
            hint = (
                " The system kills processes that way when memory runs out (see the kernel log); fewer workers or "
                "smaller tasks need less."
            )
        elif self.exitcode in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT):
            hint = " That is a crash in compiled code; PYTHONFAULTHANDLER=1 shows where."
        return (
            f"worker {self.pid} died {describe_exit(self.exitcode)} while it ran {self.task}.{hint} "
            "Only this task is lost; the pool goes on."
        )


class BrokenPoolError(ShmPoolError, BrokenProcessPool):
    """The pool cannot run anything: its workers end before they are ready, or it was killed.

    Attributes
    ----------
    reason : str
        What happened.
    """

    _fields = ("reason",)

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class StoreFullError(ShmPoolError, MemoryError):
    """Neither memory nor the spill folder has room for a block.

    Attributes
    ----------
    requested, used, capacity : int
        Sizes in bytes.
    detail : str
        Which limit was met.
    """

    _fields = ("requested", "used", "capacity", "detail")

    def __init__(self, *, requested: int, used: int, capacity: int, detail: str) -> None:
        super().__init__(requested, used, capacity, detail)
        self.requested = requested
        self.used = used
        self.capacity = capacity
        self.detail = detail

    def __str__(self) -> str:
        return (
            f"no room for {self.requested:,} bytes in the object store: {self.used:,} of {self.capacity:,} bytes are "
            f"in use, and {self.detail}. Drop results and refs that are no longer needed, submit fewer tasks at a "
            "time (map's buffersize), or give ObjectStore a larger capacity or a spill_dir with room."
        )


class SerializationError(ShmPoolError, pickle.PicklingError):
    """An object cannot be pickled.

    Attributes
    ----------
    what : str
        Which object: the function, an argument, the result.
    culprit : str or None
        The path to the part that cannot be pickled, as Python would write it.
    reason : str
        What the pickler said.
    """

    _fields = ("what", "culprit", "reason")

    def __init__(self, *, what: str, culprit: str | None, reason: str) -> None:
        super().__init__(what, culprit, reason)
        self.what = what
        self.culprit = culprit
        self.reason = reason

    def __str__(self) -> str:
        where = f" The culprit is {self.culprit}." if self.culprit else ""
        return (
            f"cannot pickle {self.what}: {self.reason}.{where} shmpool.inspect_serializability(obj) shows all that "
            "is in the way; shmpool.register_serializer can teach a class to travel."
        )


class TaskTimeoutError(ShmPoolError, TimeoutError):
    """A task ran longer than its ``timeout`` and was ended.

    Attributes
    ----------
    task : str
        What was running.
    timeout : float
        The limit in seconds.
    """

    _fields = ("task", "timeout")

    def __init__(self, *, task: str, timeout: float) -> None:
        super().__init__(task, timeout)
        self.task = task
        self.timeout = timeout

    def __str__(self) -> str:
        return f"{self.task} ran longer than its timeout of {self.timeout:g} s; its worker was replaced"


class RefError(ShmPoolError, LookupError):
    """An ``ObjectRef``, or an array that all processes share, cannot be used here: it is of another store."""


class WireError(ShmPoolError, ConnectionError):
    """A message that breaks the protocol between parent and worker."""
