"""What joblib does with arrays, beyond what the store does with all of them.

* **Arrays over mapped files** (``np.memmap``, ``joblib.load(..., mmap_mode=...)``, and arrays made from them) travel by
  the file's name, in tasks and in results: a file larger than memory is not copied, and what a task writes into a
  file that was mapped for writing is in the file.  One that was mapped for reading arrives copy-on-write, like any
  other array.
* **``mmap_mode="r+"``**: arrays of more than ``max_nbytes`` are copied once a call, into memory that all tasks write
  to.  Otherwise each task has its own.

In tasks they are found wherever they are: attributes, functions that they are bound to, closures.  In results, where
they are the result, or an item of it, up to three containers deep; elsewhere they are arrays like any other.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from shmpool.store.shared import asarray

__all__ = [
    "ARRAYS", "CONTAINERS", "DEPTH", "MOST_ITEMS", "Array", "SharedCopies", "by_file", "file_array", "mapped_again",
    "mapped_file",
]  # fmt: skip

#: How deep to look into containers, and up to how many items: a list of a million numbers is none of arrays.
DEPTH = 3
MOST_ITEMS = 100

ARRAYS = frozenset({np.ndarray, np.memmap})
CONTAINERS = frozenset({list, tuple, dict})
_WORTH_A_LOOK = ARRAYS | CONTAINERS

Array = np.ndarray[Any, Any]
Replace = Callable[[Array], Any]


def _replaced(value: Any, replace: Replace, depth: int) -> Any:
    """``value`` with arrays replaced; the very same object if there is nothing to replace."""
    cls = type(value)
    if cls in ARRAYS:
        return replace(value)
    if cls not in CONTAINERS or not depth or len(value) > MOST_ITEMS:
        return value
    items = value.values() if cls is dict else value
    new = None
    for index, item in enumerate(items):
        if type(item) in _WORTH_A_LOOK:
            other = _replaced(item, replace, depth - 1)
            if other is not item:
                new = list(items) if new is None else new
                new[index] = other
    if new is None:
        return value
    return dict(zip(value, new, strict=True)) if cls is dict else cls(new)


# ---- arrays over mapped files ----------------------------------------------------------------------------------------


def by_file(results: list[Any]) -> list[Any]:
    """A list of results in which arrays over mapped files travel by the file's name."""
    return [_replaced(result, file_array, DEPTH) for result in results]


def file_array(array: Array, mode_of_read_only: Literal["r", "c"] = "c") -> Array | FileArray:
    """What travels in place of ``array``: itself, unless it lies in a file that the receiver can map.

    Parameters
    ----------
    array : ndarray
    mode_of_read_only : {"r", "c"}
        How the receiver maps what is not to be written to the file.
    """
    if array.base is None:
        return array
    file = mapped_file(array)
    # mode "c": the file does not have what was written into the array
    if file is None or file.filename is None or file.mode == "c" or not array.nbytes:
        return array
    part = _part(array, file, file.filename)
    try:
        if os.stat(part.path).st_size < part.offset + part.nbytes:
            return array
    except OSError:
        return array  # deleted since it was mapped
    part.mode = mode_of_read_only if file.mode == "r" or not array.flags.writeable else "r+"
    return part


def mapped_again(array: Array) -> Array:
    """Another array over the same part of a mapped file, copy-on-write."""
    file = mapped_file(array)
    assert file is not None
    assert file.filename is not None
    function, args = _part(array, file, file.filename).__reduce__()
    made: Array = function(*args)
    return made


def _part(array: Array, file: np.memmap[Any, Any], name: str | os.PathLike[str]) -> FileArray:
    first, last = _byte_bounds(array)
    offset = file.offset + first - _address(file)
    return FileArray(os.fspath(name), offset, last - first, array)


class FileArray:
    """Travels in place of an array, and arrives as an array over the same part of the same file."""

    __slots__ = ("_array", "mode", "nbytes", "offset", "path")

    def __init__(self, path: str, offset: int, nbytes: int, array: Array) -> None:
        self.path = path
        self.mode: Literal["r", "c", "r+"] = "c"
        self.offset = offset
        self.nbytes = nbytes
        self._array = array

    def __reduce__(self) -> tuple[Any, ...]:
        array = self._array
        flags = array.flags
        if isinstance(array, np.memmap) and flags.forc:
            # What the receiver gets knows its file's name, mode and offset.
            order = "C" if flags.c_contiguous else "F"
            return np.memmap, (self.path, array.dtype, self.mode, self.offset, array.shape, order)
        start = _address(array) - _byte_bounds(array)[0]
        layout = array.dtype, array.shape, array.strides, start
        return _map_part, (
            *(self.path, self.mode, self.offset, self.nbytes),
            *layout,
            type(array),
        )


def _map_part(
    path: str,
    mode: Literal["r", "c", "r+"],
    offset: int,
    nbytes: int,
    dtype: np.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    start: int,
    cls: type[Array],
) -> Array:
    memory: Array = np.memmap(path, np.uint8, mode, offset, (nbytes,))
    array: Array = np.ndarray(shape, dtype, memory, start, strides)
    return array.view(cls)


def mapped_file(array: Array) -> np.memmap[Any, Any] | None:
    """The array that maps the file that ``array`` is a part of."""
    base: Any = array
    while isinstance(base, np.ndarray):
        owner: Any = base.base
        if isinstance(owner, mmap.mmap):
            return base if isinstance(base, np.memmap) else None
        base = owner
    return None


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _byte_bounds(array: Array) -> tuple[int, int]:
    """The address of an array's first byte in memory, and the one after its last."""
    first = last = _address(array)
    for length, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            first += (length - 1) * stride
        else:
            last += (length - 1) * stride
    return first, last + array.itemsize


# ---- mmap_mode="r+" --------------------------------------------------------------------------------------------------


class SharedCopies:
    """Arrays that all tasks of a call write to: one copy each, for as long as the array lives.

    Parameters
    ----------
    more_than : int
        Only arrays of more bytes are shared.
    """

    def __init__(self, more_than: int) -> None:
        self._more_than = more_than
        self._copies: dict[int, tuple[weakref.ref[Array], Array]] = {}

    def copy_of(self, array: Array) -> Array:
        """The copy of ``array`` that travels in its place; itself, if it is not to be shared."""
        if array.nbytes <= self._more_than or array.dtype.hasobject:
            return array
        key = id(array)
        known = self._copies.get(key)
        if known is not None and known[0]() is array:
            return known[1]
        copy = asarray(array)
        copies = self._copies
        copies[key] = weakref.ref(array, lambda _: copies.pop(key, None)), copy
        return copy
