"""Reductions for the standard library's buffers, which pickle copies through bytes or does not know at all.

Out of band they are copied once on the way out, and not at all (memoryview) or once (array) on the way in.
"""

from __future__ import annotations

import array
import pickle
from collections.abc import Callable
from typing import Any

__all__ = ["REDUCTIONS"]


def _reduce_array(obj: array.array[Any]) -> tuple[Any, ...]:
    if type(obj) is not array.array or obj.typecode in "uw":
        return obj.__reduce_ex__(5)  # type: ignore[return-value]
    return _make_array, (obj.typecode, pickle.PickleBuffer(obj))


def _make_array(typecode: str, data: Any) -> array.array[Any]:
    made = array.array(typecode)
    made.frombytes(data)
    return made


def _reduce_memoryview(obj: memoryview) -> tuple[Any, ...]:
    if not obj.c_contiguous:
        return _make_memoryview, (obj.tobytes(), obj.format, obj.shape)
    return _make_memoryview, (pickle.PickleBuffer(obj), obj.format, obj.shape)


def _make_memoryview(data: Any, format: str, shape: tuple[int, ...]) -> memoryview:  # noqa: A002  # memoryview's word
    return memoryview(data).cast("B").cast(format, shape)  # type: ignore[call-overload, no-any-return]


#: For a pickler's dispatch table.
REDUCTIONS: dict[type, Callable[[Any], Any]] = {
    array.array: _reduce_array,
    memoryview: _reduce_memoryview,
}
