"""What the workers of the scenarios run.

All arrays hold consecutive numbers, so that what must be in one is told by where it begins and how long it is.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

import shmpool

ASK = signal.SIGUSR1


class Numbers(NamedTuple):
    """What is in an array: ``count`` numbers from ``first`` on."""

    first: int
    count: int

    def array(self) -> Any:
        return np.arange(self.first, self.first + self.count, dtype=np.float64)

    def plus(self, number: int) -> Numbers:
        return Numbers(self.first + number, self.count)

    def between(self, start: int, stop: int) -> Numbers:
        return Numbers(self.first + start, stop - start)

    def wrong(self, array: Any) -> str | None:
        """What is wrong with an array that should hold these numbers."""
        if not isinstance(array, np.ndarray) or array.shape != (self.count,):
            return f"should be an array of {self.count} numbers, is {array!r:.200}"
        wrong = np.flatnonzero(array != self.array())
        if not len(wrong):
            return None
        at = int(wrong[0])
        return f"item {at} of {self.count} is {array[at]}, not {self.first + at}; {len(wrong)} are wrong"


class Expected(Exception):
    """A task fails, as it should, with an array aboard."""

    def __init__(self, array: Any) -> None:
        super().__init__(array)
        self.array = array


# Workers.


def listen(folder: str) -> None:
    """Say where all threads of this process are when it is asked to (see ``watchdog.py``)."""
    file = open(Path(folder, f"{os.getpid()}.stacks"), "w")  # noqa: SIM115  # for the life of this process
    faulthandler.register(ASK, file, all_threads=True)


def prepare(folder: str, seconds: float, array: Any, numbers: Numbers) -> None:
    """The initializer of all workers: leaves a file that says that this worker has come so far."""
    listen(folder)
    time.sleep(seconds)  # a good time to be killed
    assert numbers.wrong(array) is None, numbers.wrong(array)
    Path(folder, f"{os.getpid()}.started").touch()


# Tasks.

_kept: list[Any] = []


def minus(number: int) -> int:
    return -number


def shifted(array: Any, by: int) -> Any:
    return array + by


def overwritten(array: Any, by: int) -> Any:
    """The argument itself, changed in place."""
    array += by
    return array


def same(array: Any) -> Any:
    """What came goes back as it is."""
    return array


def piece(array: Any, start: int, stop: int) -> Any:
    return array[start:stop]


def two(one: Any, other: Any, by: int) -> tuple[Any, Any, Any]:
    """Something that came, something new, and a part of something that came."""
    return one, other + by, one[: len(one) // 2]


def kept(array: Any) -> Any:
    """Keeps its argument, and gives back what an earlier task kept."""
    _kept.append(array)
    if len(_kept) > 3:
        del _kept[:2]
    return float(array[0]), len(array)


def dropped() -> int:
    number = len(_kept)
    _kept.clear()
    return number


def from_box(box: dict[str, Any], by: int) -> tuple[Any, Any]:
    """A ref inside a container arrives as a ref, and goes back as one."""
    array = box["ref"].get("c")
    array += by
    return box["ref"], array


def put(numbers: Numbers) -> Any:
    """A ref to an object of this worker's store."""
    return shmpool.put(numbers.array())


def write(shared: Any, start: int, stop: int) -> tuple[int, int]:
    """Write into memory that all processes share."""
    shared[start:stop] = np.arange(start, stop)
    return start, stop


def text(length: int) -> str:
    """A result whose pickle is large, and no array."""
    return "x" * length


def items(number: int) -> list[int]:
    """A result that is pickled item by item."""
    return list(range(number))


def slow(array: Any, seconds: float) -> Any:
    time.sleep(seconds)
    return array


def failing(array: Any) -> NoReturn:
    raise Expected(array)


def hanging(array: Any) -> NoReturn:
    """Never ends by itself."""
    while True:
        time.sleep(60)
