"""What the works put in: arrays are filled, and new to everybody each time."""

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np

from . import tasks
from .contenders import Contender
from .work import Unavailable

KB, MB = 1 << 10, 10**6

_numbers = count(1)
_base: dict[int, np.ndarray] = {}


def number(_contender: Contender) -> int:
    """A number that was not there before."""
    return next(_numbers)


def filled(nbytes: int) -> np.ndarray:
    """An array of float64."""
    return np.random.default_rng(0).random(nbytes // 8)


def fresh_array(nbytes: int) -> np.ndarray:
    """An array of float64 that nobody has seen: newly allocated, filled, each one different."""
    if nbytes not in _base:
        _base[nbytes] = filled(nbytes)
    return _base[nbytes] + next(_numbers)


def fresh(nbytes: int) -> Callable[[Contender], np.ndarray]:
    return lambda _contender: fresh_array(nbytes)


def rows(_contender: Contender) -> list[dict]:
    start = next(_numbers)
    return [{"id": i, "name": f"row {i}", "value": start + i} for i in range(100_000)]


def frame(nbytes: int) -> Callable[[Contender], Any]:
    def prepare(_contender: Contender):
        try:
            from pandas import DataFrame
        except ModuleNotFoundError:
            raise Unavailable("pandas is not installed") from None
        columns = fresh_array(nbytes).reshape(10, -1)
        return DataFrame({f"column{i}": column for i, column in enumerate(columns)})

    return prepare


def produced(nbytes: int) -> Callable[[Contender], tuple[int, Any]]:
    """A worker's result, and the number in it."""

    def prepare(contender: Contender):
        start = next(_numbers)
        return start, contender.make(tasks.produce, nbytes, start)

    return prepare
