"""What the tests of the pool share: tasks, warm pools, a gate for generators.

Workers import this module to find its tasks, so it imports nothing that is heavy.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import executor_tasks
from executor_tasks import SOON
from support import wait_until

import shmpool
from shmpool.pool import Pool

METHODS = executor_tasks.METHODS


@contextlib.contextmanager
def warm_pool(method: str, workers: int = 2, **options: Any) -> Iterator[Pool]:
    """A pool for a whole module; a test that uses it adds nothing that stays."""
    with Pool(workers, context=method, store=shmpool.ObjectStore(), **options) as pool:
        executor_tasks.warm_up(pool.executor, workers)
        yield pool
    pool.join()


# Tasks.


def identity(value: Any) -> Any:
    return value


def square(x: int) -> int:
    return x * x


def add(a: int, b: int = 0) -> int:
    return a + b


def arguments(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def pid(_: Any = None) -> int:
    return os.getpid()


def fail(x: Any) -> NoReturn:
    raise KeyError(x)


def fail_at(x: int, bad: int) -> int:
    if x == bad:
        raise KeyError(x)
    return x


def die(_: Any = None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(x: int, bad: int) -> int:
    if x == bad:
        die()
    return x


def touch(path: str, x: int) -> int:
    """Leave a trace of having been run."""
    Path(path, str(x)).touch()
    return x


def wait_for(path: str, x: Any = None) -> Any:
    """Begin, and end when told to."""
    folder = Path(path)
    (folder / f"here-{os.getpid()}-{time.monotonic_ns()}").touch()
    wait_until((folder / "open").exists, 60, "the gate to open")
    return x


def wait_for_at(path: str, x: int, slow: int) -> int:
    return int(wait_for(path, x)) if x == slow else x


def generator(_: Any = None) -> Any:
    """Cannot be pickled, not even by value."""
    return (i for i in range(3))


class Unpicklable:
    def __init__(self, error: type[Exception] = RuntimeError) -> None:
        self._error = error

    def __reduce__(self) -> NoReturn:
        raise self._error("on purpose")

    def __repr__(self) -> str:
        return "<an unpicklable>"


def return_unpicklable(_: Any = None) -> Unpicklable:
    return Unpicklable()


class UnpicklableError(Exception):
    def __reduce__(self) -> NoReturn:
        raise RuntimeError("on purpose")


def raise_unpicklable(_: Any = None) -> NoReturn:
    raise UnpicklableError("too odd")


_kept: list[Any] = []


def keep(*given: Any) -> None:
    _kept.extend(given)


def look_at_kept(_: Any = None) -> int:
    array, lock = _kept
    with lock:
        return int(array[-1])


# Around them.


class Steps:
    """An iterable that says how far it was read, and can be made to wait."""

    def __init__(self, stop: int | None = None) -> None:
        self.read = 0
        self._stop = stop
        self._may_go_on = threading.Event()
        self._may_go_on.set()

    def block(self) -> None:
        self._may_go_on.clear()

    def go_on(self) -> None:
        self._may_go_on.set()

    def __iter__(self) -> Iterator[int]:
        while self._stop is None or self.read < self._stop:
            assert self._may_go_on.wait(SOON)
            self.read += 1
            yield self.read - 1


def settled(value: Callable[[], Any], *, rounds: int = 12) -> Any:
    """What ``value()`` is when it has not changed for half a second: for what must *not* go on."""
    last: Any = None
    same = 0

    def unchanged() -> bool:
        nonlocal last, same
        now = value()
        same = same + 1 if now == last else 0
        last = now
        return same >= rounds

    wait_until(unchanged, 60, lambda: f"it to come to rest; it is {last} by now")
    return last
