"""A batch of tasks, in the worker: each task has its own of the arrays that several of them are given.

joblib pickles a batch as one object, so what is one array in all of its tasks arrives as one, and what a task wrote
into it the next would see.  How many tasks make a batch is a matter of how long they take, so results would depend
on that.

* **An array in the store** is lent to one task after the other, as it is, for as long as none has written to it and
  none has kept it (in its result, say).  Otherwise the next gets another private view of the same bytes: a few
  microseconds, and the page faults.
* **A file that was mapped for reading** is mapped again, copy-on-write.
* **Any other array** is copied for each task: those are small.
* **Arrays that all tasks are to write to** (files mapped for that, ``mmap_mode="r+"``), and read-only ones, are left
  alone.

Arrays are found where they are an argument, or an item of one, up to three containers deep and in containers of up to
100 items.  Within one task, what is one array stays one.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from shmpool.integrations.joblib_arrays import (
    ARRAYS,
    CONTAINERS,
    DEPTH,
    MOST_ITEMS,
    Array,
    mapped_again,
    mapped_file,
)
from shmpool.memory.dirty import page_faults
from shmpool.store.current import get_store

__all__ = ["OwnArrays"]

_WORTH_A_LOOK = ARRAYS | CONTAINERS
_NO_KWARGS: dict[str, Any] = {}

Task = tuple[Any, tuple[Any, ...], dict[str, Any]]


class OwnArrays:
    """Runs the tasks of a batch.

    Parameters
    ----------
    tasks : list of tuple
        Functions, their arguments and keyword arguments.
    """

    def __init__(self, tasks: list[Task]) -> None:
        self._tasks: list[Task | None] = [*tasks]
        #: By their ids, the arrays that are in more than one task.
        self._common: dict[int, _Common] = {}
        if len(tasks) > 1:
            self._find_common(tasks)

    def items(self) -> list[Task]:
        """Tasks to be run in place of the given ones, once each and in this order."""
        if not self._common:
            return self._tasks  # type: ignore[return-value]  # none was taken
        return [(self._run, (index,), _NO_KWARGS) for index in range(len(self._tasks))]

    def _run(self, index: int) -> Any:
        task = self._tasks[index]
        assert task is not None
        self._tasks[index] = None
        function, args, kwargs = task
        memo: dict[int, Any] = {}
        args = self._own(args, memo, DEPTH)
        if kwargs:
            kwargs = self._own(kwargs, memo, DEPTH)
        del task, memo
        return function(*args, **kwargs)  # with whose end the arrays are gone that it has not kept

    def _find_common(self, tasks: list[Task]) -> None:
        first: dict[int, int] = {}  # in which task an array was met
        for number, (_, args, kwargs) in enumerate(tasks):
            for value in args:
                if type(value) in _WORTH_A_LOOK:
                    self._look(value, number, first, DEPTH - 1)
            for value in kwargs.values():
                if type(value) in _WORTH_A_LOOK:
                    self._look(value, number, first, DEPTH - 1)

    def _look(self, value: Any, number: int, first: dict[int, int], depth: int) -> None:
        cls = type(value)
        if cls in ARRAYS:
            key = id(value)
            if first.setdefault(key, number) != number and key not in self._common:
                self._common[key] = _Common(value)
        elif depth and len(value) <= MOST_ITEMS:
            for item in value.values() if cls is dict else value:
                if type(item) in _WORTH_A_LOOK:
                    self._look(item, number, first, depth - 1)

    def _own(self, value: Any, memo: dict[int, Any], depth: int) -> Any:
        """``value``, with arrays that this task does not share with others; the very same if there are none."""
        cls = type(value)
        key = id(value)
        if key in memo:
            return memo[key]
        if cls in ARRAYS:
            common = self._common.get(key)
            if common is None:
                return value
            memo[key] = own = common.own()
            return own
        if not depth or len(value) > MOST_ITEMS:
            return value
        new: list[Any] | None = None
        for index, item in enumerate(value.values() if cls is dict else value):
            if type(item) in _WORTH_A_LOOK:
                other = self._own(item, memo, depth - 1)
                if other is not item:
                    if new is None:
                        new = list(value.values() if cls is dict else value)
                    new[index] = other
        if new is not None:
            value = dict(zip(value, new, strict=True)) if cls is dict else cls(new)
        memo[key] = value
        return value


class _Common:
    """An array that several tasks are given."""

    def __init__(self, array: Array) -> None:
        self._array = array
        self._memory = _memory_in_store(array)
        file = mapped_file(array)
        self._is_private_file = file is not None and file.mode == "c" and array.flags.writeable
        self._is_for_all = not self._is_private_file and (
            not array.flags.writeable
            or file is not None
            or (self._memory is not None and get_store().is_shared(self._memory))
        )
        #: What takers' arrays are made of, and how many references it has when none of them is left.
        self._lent: Array | None = None
        self._references = 0
        self._faults = -1  # when it was lent to the last of them

    def own(self) -> Array:
        """The array for the next task."""
        array, memory = self._array, self._memory
        if self._is_for_all:
            return array
        if self._is_private_file:
            return mapped_again(array)
        if memory is None:
            return array.copy("K")
        if self._lent is None:
            self._lend(memory)
        elif sys.getrefcount(self._lent) > self._references or self._is_written(memory):
            self._memory = memory = get_store().view_again(memory)
            self._lend(memory)
        again: Array = np.ndarray(array.shape, array.dtype, self._lent, 0, array.strides)
        return again if type(array) is np.ndarray else again.view(type(array))

    def _lend(self, memory: Array) -> None:
        self._lent = np.asarray(_Lent(memory))
        self._references = sys.getrefcount(self._lent)
        self._faults = page_faults()

    def _is_written(self, memory: Array) -> bool:
        # Nobody writes for the first time into copy-on-write memory without a page fault.
        faults = page_faults()
        if faults >= 0 and faults == self._faults:
            return False
        self._faults = faults
        return not get_store().located(memoryview(memory))  # type: ignore[arg-type]  # unknown to mypy


class _Lent:
    """Something to make an array of that all arrays and buffers made from that will hold, and thus count.

    (An array that is a view of another keeps not that one, but what is behind it, if that is an array as well.)
    """

    __slots__ = ("__array_interface__", "_memory")

    def __init__(self, memory: Array) -> None:
        self._memory = memory
        self.__array_interface__ = memory.__array_interface__


def _memory_in_store(array: Array) -> Array | None:
    """The bytes of an array that lies in the store, in one piece; else None."""
    if not array.nbytes or array.dtype.hasobject:
        return None
    memory = np.asarray(array).ravel("K").view(np.uint8)
    if not np.may_share_memory(memory, array) or not get_store().is_view(memory):
        return None
    return memory
