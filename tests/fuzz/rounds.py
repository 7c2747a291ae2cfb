"""Rounds: a misdeed in one task, honest tasks all around it, and a look at what has become of each."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from support import TIMEUNIT

from shmpool import ObjectStore, ShmExecutor
from shmpool.config import Config

from .misdeeds import FATAL, commit

#: Seconds in which a task must be settled, whatever its neighbours do.
SOON = 60 * TIMEUNIT
#: Numbers of items: inline, in a block of its own.
SIZES = (100, 20_000, 200_000)


def add(array: np.ndarray, number: int) -> np.ndarray:
    """The honest task."""
    array += number
    return array


@dataclass
class Tally:
    """What became of the tasks in which a misdeed was committed.

    Attributes
    ----------
    fates : Counter of str
        Results, or names of errors.
    deaths : int
        Workers that ended.
    """

    fates: Counter[str] = field(default_factory=Counter)
    deaths: int = 0


class Rounds:
    """Rounds on one executor.

    Parameters
    ----------
    executor : ShmExecutor
    """

    def __init__(self, executor: ShmExecutor) -> None:
        self.executor = executor
        self.tally = Tally()
        # Whatever a worker does, it may take down with it what it runs next: then that is run again.
        self._honest = executor.options(retries=100)
        self._kept: list[tuple[Any, float]] = []

    def play(self, name: str, seed: int) -> None:
        """One round.

        Raises
        ------
        AssertionError
            Somebody else than the task that committed it has suffered.
        """
        rng = random.Random(seed)
        executor = self.executor
        workers = set(executor._processes)
        honest = [self._submit(rng) for _ in range(rng.randint(2, 6))]
        mine = np.ones(rng.choice(SIZES[1:]))
        bad = executor.submit(commit, name, seed, mine, *(array for array, _ in self._kept[-2:]))
        honest += [self._submit(rng) for _ in range(rng.randint(2, 6))]
        fate = self._fate(bad)
        self.tally.fates[fate] += 1
        assert name not in FATAL or fate == "WorkerDiedError", f"it came to {fate}"
        for future, expected in honest:
            array = future.result(SOON)
            assert (array == expected).all(), "an honest task got a wrong result"
            self._kept.append((array, expected))
        assert self._honest.submit(abs, -seed).result(SOON) == seed, "the pool has stopped working"
        for array, expected in self._kept:
            assert (array == expected).all(), "a result that was there has changed"
        assert (mine == 1).all(), "an argument has changed"
        self.tally.deaths += len(workers - set(executor._processes))
        del self._kept[: -rng.randint(0, 4) or None]

    def _submit(self, rng: random.Random) -> tuple[Any, float]:
        number = rng.randrange(1000)
        if self._kept and rng.random() < 0.4:
            array, value = rng.choice(self._kept)
        else:
            array, value = np.zeros(rng.choice(SIZES)), 0.0
        return self._honest.submit(add, array, number), value + number

    def _fate(self, future: Any) -> str:
        error = future.exception(SOON)
        if error is not None:
            assert isinstance(error, BaseException), "nobody can raise that"
            return type(error).__name__
        value = future.result()
        for array in value if isinstance(value, list) else [value]:
            if isinstance(array, np.ndarray):
                array.sum()  # it must be there to be read
        return type(value).__name__


class _Complaints(logging.Handler):
    """What is logged: one line for each worker that is killed."""

    def __init__(self) -> None:
        super().__init__()
        self.pids: list[object] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert record.args
        self.pids.append(record.args[0])


@contextmanager
def rounds(method: str, workers: int = 2, **options: Any) -> Iterator[Rounds]:
    """Rounds on an executor with a store of its own, whose books must be empty in the end."""
    store = ObjectStore(config=Config.from_env())
    log, complaints = logging.getLogger("shmpool"), _Complaints()
    log.addHandler(complaints)
    log.propagate = False
    try:
        with ShmExecutor(workers, method, store=store, **options) as executor:
            played = Rounds(executor)
            try:
                yield played
            except BaseException:
                executor.kill_workers()  # else it waits for the task that will never end
                raise
            del played._kept[:]
    finally:
        log.removeHandler(complaints)
        log.propagate = True
    assert len(set(complaints.pids)) == len(complaints.pids), "two complaints about one worker"
    store.verify()
    stats = store.stats()
    assert (stats.blocks, stats.used) == (0, 0), f"blocks were left: {stats}"


__all__ = ["Rounds", "Tally", "rounds"]
