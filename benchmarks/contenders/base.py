"""The interface of a contender.

Adapters import their package in `start`, so that a missing one costs nobody else anything and so
that the time of the import counts where starting is measured. They do what the package's own
documentation does for such a job; where there is an expert's way too, it is a contender of its own.
"""

import functools
from typing import ClassVar


class NotInstalled(Exception):
    """The contender's package is not there."""


class Contender:
    """One way to run functions in other processes.

    Parameters
    ----------
    workers : int
        Number of worker processes.
    start_method : str
        Of multiprocessing ("fork", "spawn", "forkserver"), where the contender lets one choose.

    Attributes
    ----------
    name, title : str
        For the command line, and for tables.
    package : str
        What has to be installed.
    ours : bool
        Is it shmpool in some form?  Then it is nobody's peer.
    better_way_of : str
        The contender that this one is the expert's way to use, if it is.
    works : frozenset of str or None
        Where that differs: the only works that it runs. None: all.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    package: ClassVar[str] = ""
    ours: ClassVar[bool] = False
    better_way_of: ClassVar[str] = ""
    works: ClassVar[frozenset[str] | None] = None

    def __init__(self, workers: int, start_method: str):
        self.workers = workers
        self.start_method = start_method

    def open(self):
        """`start`, with a missing package told from other failures."""
        try:
            self.start()
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == self.package:
                raise NotInstalled(f"{self.package} is not installed") from None
            raise

    def start(self):
        raise NotImplementedError

    def close(self):
        raise NotImplementedError

    def call(self, fn, *args):
        """Run one task and wait for its result."""
        raise NotImplementedError

    def map(self, fn, items):
        """Run one task an item and return the list of results, in order."""
        raise NotImplementedError

    # What has a better way in some contenders.

    def map_singly(self, fn, items):
        """`map` where every item is a task of its own, also for those that would batch them."""
        return self.map(fn, items)

    def map_same(self, fn, value, count):
        """Run so many tasks on one value, from a list."""
        return self.map(fn, [value] * count)

    def map_same_generated(self, fn, value, count):
        """The same, but nobody can know that it is one value before it comes."""
        return self.map(fn, (value for _ in range(count)))

    def map_bound(self, fn, value, items):
        """Run ``fn(value, item)`` for each item."""
        return self.map(functools.partial(fn, value), items)

    def chain(self, fn, value, length):
        """Feed the result of each task to the next; return the last one's."""
        for _ in range(length):
            value = self.call(fn, value)
        return value

    def make(self, fn, *args):
        """Run a task whose result `map_parts` will use, and return that, or a reference to it."""
        return self.call(fn, *args)

    def map_parts(self, fn, whole, count):
        """Split what `make` returned into so many parts and run a task on each."""
        import numpy as np

        return self.map(fn, np.split(whole, count))

    def scikit_learn(self):
        """A context in which scikit-learn uses this contender."""
        raise NotImplementedError(f"{self.title} is no backend of joblib")
