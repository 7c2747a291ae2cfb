"""The classes that stand in for the standard library's while shmpool is installed.

What :func:`~shmpool.integrations.install.install` shows under the names ``multiprocessing.pool.Pool`` and
``concurrent.futures.ProcessPoolExecutor`` are not shmpool's classes themselves, since more is asked of a name that a
whole program knows:

* ``isinstance`` and ``issubclass`` are true for all that they were true for before: for pools made by code that kept
  the old class, and for ``ThreadPool``, which is a ``Pool`` to the standard library (dask asks that).  The other way
  round, code that kept the old class finds that what is made now is an instance of it.
* A subclass that overrides private parts of the standard library's class (joblib and torch have one each, with queues
  of their own) works with the standard library's class only: it gets that one as its base.
* Importing a name is no reason to import numpy: the program may be about to set ``OMP_NUM_THREADS``, which numpy's
  libraries read when they are loaded.  So shmpool's class becomes a base of its stand-in when the first object is made,
  or the first subclass.
"""

from __future__ import annotations

import concurrent.futures.process
import multiprocessing.pool
from abc import ABCMeta
from collections import Counter
from functools import wraps
from importlib import import_module
from typing import Any, ClassVar

__all__ = ["Pool", "ProcessPoolExecutor", "opened"]

#: How many there were so far in this process, by the names of the classes.
opened: Counter[str] = Counter()


class _StandIn(metaclass=ABCMeta):
    """Base of the classes below.

    Attributes
    ----------
    _standard : type
        The standard library's class that this one stands in for.
    _ours : tuple of str
        Module and name of shmpool's class, which does the work.
    """

    _standard: ClassVar[type]
    _ours: ClassVar[tuple[str, str]]

    def __init_subclass__(
        cls, *, standard: type | None = None, ours: tuple[str, str] | None = None, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if standard is not None and ours is not None:
            cls._standard = standard
            cls._ours = ours
            return
        stand_in = _stand_in_of(cls)
        if _overrides_internals(cls, stand_in):
            cls.__bases__ = tuple(
                stand_in._standard if base is stand_in else base for base in cls.__bases__
            )
        else:
            stand_in._become_ours()

    @classmethod
    def _become_ours(cls) -> None:
        """Have shmpool's class among the bases from now on."""
        module, name = cls._ours
        ours: type = getattr(import_module(module), name)
        if ours not in cls.__bases__:
            cls.__bases__ = (_StandIn, ours, cls._standard)

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:
        if not _is_stand_in(cls):
            return NotImplemented
        homes = [(base.__module__, base.__qualname__) for base in other.__mro__]
        return issubclass(other, cls._standard) or cls._ours in homes or NotImplemented


def _is_stand_in(cls: type) -> bool:
    return "_standard" in vars(cls)


def _stand_in_of(cls: type[_StandIn]) -> type[_StandIn]:
    return next(base for base in cls.__mro__ if _is_stand_in(base))


def _overrides_internals(cls: type, stand_in: type[_StandIn]) -> bool:
    """Does a class derived from a stand-in define what is private in the standard library's class?"""
    # Process is public by its name only.
    internals = {
        name
        for name in vars(stand_in._standard)
        if name == "Process" or (name.startswith("_") and not name.endswith("__"))
    }
    own = cls.__mro__[: cls.__mro__.index(stand_in)]
    return any(internals & vars(base).keys() for base in own)


class Pool(
    _StandIn,
    multiprocessing.pool.Pool,
    standard=multiprocessing.pool.Pool,
    ours=("shmpool.pool.pool", "Pool"),
):
    """:class:`shmpool.Pool` in the place of :class:`multiprocessing.pool.Pool`."""

    @wraps(multiprocessing.pool.Pool.__init__)  # type: ignore[misc]  # its signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        Pool._become_ours()
        super().__init__(*args, **kwargs)
        opened["Pool"] += 1

    def __del__(self) -> None:
        # Else shmpool's class could not be loaded, and there is nothing to warn of.
        if hasattr(self, "_state"):
            super().__del__()


class ProcessPoolExecutor(
    _StandIn,
    concurrent.futures.process.ProcessPoolExecutor,
    standard=concurrent.futures.process.ProcessPoolExecutor,
    ours=("shmpool.executor", "ShmExecutor"),
):
    """:class:`shmpool.ShmExecutor` in the place of :class:`concurrent.futures.ProcessPoolExecutor`."""

    @wraps(concurrent.futures.process.ProcessPoolExecutor.__init__)  # type: ignore[misc]  # its signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        ProcessPoolExecutor._become_ours()
        super().__init__(*args, **kwargs)
        opened["ProcessPoolExecutor"] += 1
