"""Why bytes go the way they go, by the type of what had them, and what to do about it.

Knowledge about libraries, in one table.  It decides nothing: that an object went into the stream has been seen.
"""

from __future__ import annotations

import array
import types
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from shmpool.serialize.reductions import is_contiguous
from shmpool.serialize.words import type_name

__all__ = [
    "SHARED",
    "TOGETHER",
    "TOO_DEEP",
    "Why",
    "is_telling",
    "under_limit",
    "why_copied",
    "why_in_stream",
]


class Why(NamedTuple):
    """A reason, and what to do about it; the latter is empty if there is nothing to be done."""

    reason: str
    advice: str = ""


SHARED = Why("in the store already: travels by reference")
COPIED = Why(
    "not in the store yet: written once, read without a copy",
    "shmpool.asarray(it) is a copy in the store; shmpool.empty, and results of tasks, are there from the start",
)

_STRIDED = Why(
    "not contiguous: made contiguous, and written once",
    "send the array that it is a view of, to be sliced in the task, if that is sent anyway",
)

TOGETHER = Why("the rest of the pickle stream: types, names, small parts")
TOO_DEEP = Why("nested too deeply to look inside", "flatten it")

_AS_ARRAY = "numpy.frombuffer(it, numpy.uint8) is an array over the same memory, which travels through the store"
_CONTAINERS = (list, tuple, set, frozenset, dict)
# Libraries whose objects pickle as streams of their own, and what of theirs does better.
_OWN_STREAM = {
    "polars": "to_arrow() travels through the store; polars.from_arrow() makes it again, mostly without a copy",
}


def under_limit(limit: int) -> Why:
    """Why a buffer rides in the message."""
    return Why(f"under the inline limit of {limit:,} bytes: rides in the message")


def why_copied(obj: Any) -> Why:
    """Why the memory of an object is written into the store."""
    if isinstance(obj, np.ndarray) and not is_contiguous(obj):
        return _STRIDED
    return COPIED


def is_telling(obj: Any) -> bool:
    """Is there something to say of this object that is not said of what made it?"""
    return isinstance(obj, np.ndarray | array.array | memoryview) or _is_pickle(obj)


def why_in_stream(obj: Any) -> Why:
    """Why an object's bytes went into the pickle stream."""
    kind = type(obj)
    if isinstance(obj, np.ndarray):
        return _why_array(obj)
    if _is_pickle(obj):
        return Why(
            "a pickle stream of its own, in which no buffer can travel apart",
            "return the object itself from __reduce__ or __getstate__, not the pickled bytes of it",
        )
    if kind in (bytes, bytearray):
        return Why(f"{kind.__name__} pickles in band", _AS_ARRAY)
    if kind is str:
        return Why(
            "str pickles in band",
            "as bytes (it.encode()) under a numpy.frombuffer it travels through the store",
        )
    if kind in (array.array, memoryview):
        return Why(
            f"this {kind.__name__} pickles in band",
            "numpy.ascontiguousarray(it) travels through the store",
        )
    if kind in _CONTAINERS:
        return _why_container(obj)
    if kind is types.FunctionType or issubclass(kind, type) or kind is types.ModuleType:
        what = (
            "function"
            if kind is types.FunctionType
            else "module"
            if kind is types.ModuleType
            else "class"
        )
        return Why(
            f"a {what} that travels by value",
            "in a module that workers can import it travels by name",
        )
    library = str(kind.__module__).partition(".")[0]
    if library in _OWN_STREAM:
        return Why(f"{library} pickles it as a stream of its own", _OWN_STREAM[library])
    return Why(
        "the class pickles in band",
        "what its __reduce__ or __getstate__ gives should be contiguous arrays; shmpool.register_serializer can say so",
    )


def _why_array(obj: Any) -> Why:
    kind, dtype = type(obj), obj.dtype
    if dtype.hasobject:
        if dtype.kind == "T":
            return Why(
                "variable-width strings have no buffer", "astype('U') or astype('S') has one"
            )
        return Why(
            "object dtype, no buffer: its elements are pickled one by one",
            "a dtype of numbers or of fixed-width strings ('U') has one; in pandas: 'category', 'string[pyarrow]'",
        )
    if kind is not np.ndarray:
        return Why(
            f"{type_name(obj)}, a subclass of numpy.ndarray, has a reduction of its own, in band",
            "numpy.asarray(it), the same memory, travels through the store; its view(cls) in the task is one again",
        )
    return Why("numpy pickles it in band")


def _why_container(obj: Any) -> Why:
    values = obj.values() if type(obj) is dict else obj
    return Why(
        f"what is in a {type(obj).__name__} is pickled object by object",
        "numbers travel better as a numpy array" if any(map(_is_number, islice(values, 3))) else "",
    )


def _is_number(obj: Any) -> bool:
    return type(obj) in (int, float, complex)


def _is_pickle(obj: Any) -> bool:
    return (
        type(obj) is bytes
        and len(obj) > 16
        and obj[0] == 0x80
        and 2 <= obj[1] <= 5
        and obj.endswith(b".")
    )
