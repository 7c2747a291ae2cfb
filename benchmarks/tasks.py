"""The functions that run in the workers, in a module that every contender can import."""

import time

import numpy as np

_kept = {}
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


def element(array, item):
    """One element of a big array that is bound to the function."""
    return float(array[item])


def produce(nbytes, number):
    """Return an array that this worker keeps and of which only one element changes.

    Kept, because allocating 100 MB would cost more than a good pool needs to deliver them.
    """
    array = _kept.get(nbytes)
    if array is None:
        array = _kept[nbytes] = np.arange(nbytes // 8, dtype=np.float64)
    array[0] = number
    return array


def create(nbytes, number):
    """Return a new array, as most functions do."""
    return np.full(nbytes // 8, number, dtype=np.float64)


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


# For contenders that know better ways.


def keep(value):
    """Run as the initializer of a worker: keep what all tasks need."""
    _kept["value"] = value


def with_kept(fn, item):
    """``fn(what keep() was given, item)``."""
    return fn(_kept["value"], item)


def on_part(fn, whole, part, count):
    """Run ``fn`` on one of so many equal parts of an array."""
    size = len(whole) // count
    return fn(whole[part * size : (part + 1) * size])
