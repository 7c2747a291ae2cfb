"""The functions that run in the workers, in a module that every contender can import."""

import time

import numpy as np

_kept: dict[tuple[int, int], np.ndarray] = {}
PAGE = 4096 // 8  # float64 elements in a page of memory


def noop(*_):
    """Nothing, for what remains is the pool's own cost."""


def nap(seconds):
    """Keep a worker busy, so that its siblings start too."""
    time.sleep(seconds)


def touch(array):
    """Read one element of every page: lazily mapped memory has to be there."""
    return float(array[::PAGE].sum())


def total(array, *_):
    """Read everything."""
    return float(array.sum())


def partial_total(array, item):
    """For functools.partial: a big bound array, of which each item needs a little."""
    return float(array[item])


def produce(nbytes, number):
    """Return an array that this worker keeps and of which only one element changes.

    Kept, because allocating 100 MB would cost more than a good pool needs to deliver them.
    """
    array = _kept.get((nbytes, 0))
    if array is None:
        array = _kept[nbytes, 0] = np.arange(nbytes // 8, dtype=np.float64)
    array[0] = number
    return array


def increment(array):
    """Take an array and return another of the same size."""
    return array + 1


def increment_in_place(array):
    """Write into the argument, as code does that was written for multiprocessing."""
    array += 1
    return float(array[0] + array[-1])


def count_rows(rows):
    """100,000 dictionaries in, one number out."""
    return sum(row["value"] for row in rows)


def frame_total(frame):
    """Read a whole DataFrame."""
    return float(frame.to_numpy(copy=False).sum())
