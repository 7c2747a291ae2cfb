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
    "TICKET",
    "TOGETHER",
    "TOO_DEEP",
    "Why",
    "is_telling",
    "too_long",
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
    "not contiguous: made contiguous, and written",
    "send the array that it is a view of, to be sliced in the task, if that is sent anyway",
)
_STRIDED_BLOCK = Why(
    "not contiguous: made contiguous, and written",
    "send the table that it is a part of, to be sliced in the task, if that is sent anyway; it.copy() is contiguous",
)
_MADE = Why(
    "made when it is pickled, and written each time",
    "what __reduce__ or __getstate__ gives is found again in the store only if the object keeps it",
)
_ON_ARRIVAL = Why("not in the store yet: written, and copied on arrival")

TOGETHER = Why("the rest of the pickle stream: types, names, small parts")
TOO_DEEP = Why("nested too deeply to look inside", "flatten it")
TICKET = Why("the message: where in the store the pickle stream is")

_AS_ARRAY = "numpy.frombuffer(it, numpy.uint8) is an array over the same memory, which travels through the store"
_TEXT_AS_ARRAY = "as bytes (it.encode()) under a numpy.frombuffer it travels through the store"
_CONTAINERS = (list, tuple, set, frozenset, dict)
# Libraries whose objects pickle as streams of their own, and what of theirs does better.
_OWN_STREAM = {
    "polars": "to_arrow() travels through the store; polars.from_arrow() makes it again, mostly without a copy",
}


def under_limit(limit: int) -> Why:
    """Why a buffer rides in the message."""
    return Why(f"under the inline limit of {limit:,} bytes: rides in the message")


def too_long(why: Why, limit: int) -> Why:
    """The same of bytes that are no part of the message, since that would be too long."""
    return Why(
        f"{why.reason}; a message of more than {limit:,} bytes is copied into the store", why.advice
    )


def why_copied(obj: Any, giver: Any, *, is_made: bool) -> Why:
    """Why memory is written into the store.

    Parameters
    ----------
    obj : object
        Whose memory it is.
    giver : object
        What gave this object when it was reduced, if there is such a thing.
    is_made : bool
        Pickling has made that memory, and would make it again.
    """
    if type(obj) is str:
        return Why(_ON_ARRIVAL.reason, _TEXT_AS_ARRAY)
    if type(obj) is array.array:
        return Why(_ON_ARRIVAL.reason, _AS_ARRAY)
    if not is_made:
        return COPIED
    if isinstance(obj, np.ndarray) and not is_contiguous(obj):
        return _STRIDED
    # pandas makes the blocks of a table contiguous itself.
    values = getattr(giver, "values", None) if _library(giver) == "pandas" else None
    if isinstance(values, np.ndarray) and not is_contiguous(values):
        return _STRIDED_BLOCK
    return _MADE


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
            _TEXT_AS_ARRAY,
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
    library = _library(obj)
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
    return Why("its dtype, or what its registered serializer makes of it, is pickled in band")


def _why_container(obj: Any) -> Why:
    values = obj.values() if type(obj) is dict else obj
    return Why(
        f"what is in a {type(obj).__name__} is pickled object by object",
        "numbers travel better as a numpy array" if any(map(_is_number, islice(values, 3))) else "",
    )


def _library(obj: Any) -> str:
    return str(type(obj).__module__).partition(".")[0]


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
