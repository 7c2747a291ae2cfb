"""Reductions for what pickle would copy through bytes, or does not know at all: out of band instead.

Arrays
------
numpy hands out the memory of most arrays itself.  Here is the rest:

* Read-only arrays.  Pickle marks a read-only buffer in the stream, and the array that comes back cannot be written
  to.  ``ProcessPoolExecutor`` (protocol 4) copies, and gives a writable one; so the buffer given here is a writable
  one over the same memory.  Nobody writes to it: it is read, and what the receiver has is its own.
* datetime64, structured and other dtypes for which numpy exports no buffer (of fields of theirs it may not): as bytes.
* Arrays that are not contiguous are made so, which is one copy in place of several.
* Subclasses of ``ndarray``: numpy pickles them in band.  They get back what plain pickle gives them: an instance made
  by ``ndarray.__new__``, ``__array_finalize__(None)`` called; nothing of their ``__dict__``.  Those with a reduction
  of their own keep it.  A dispatch table matches exact classes, so each class has to be found first:
  :func:`learn`.
* Masked arrays: data and mask as two arrays.

Others
------
A file is an error, as it is for pickle: cloudpickle would send its contents as a ``StringIO``.

``array.array`` is copied once on the way out and once on the way in, ``memoryview`` not on the way in.  A memoryview
whose format neither ``memoryview.cast`` nor numpy can make again is an error where it is sent.
"""

from __future__ import annotations

import array
import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

__all__ = [
    "REDUCTIONS", "Reduction", "Window", "is_contiguous", "learn", "learned", "replacing_arrays", "window",
]  # fmt: skip

Reduction = Callable[[Any], Any]


class Window:
    """Writable memory over something, for numpy to look through.

    Attributes
    ----------
    owner : object
        Whose memory it is; kept alive.
    made_of : ndarray or None
        The memory is that of a copy, in C order, of this array, which is not contiguous.
    """

    __slots__ = ("__array_interface__", "made_of", "owner")

    def __init__(
        self, owner: object, address: int, nbytes: int, made_of: np.ndarray | None = None
    ) -> None:
        self.owner = owner
        self.made_of = made_of
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }


def window(
    owner: object, address: int, nbytes: int, made_of: np.ndarray | None = None
) -> pickle.PickleBuffer:
    """A writable buffer of bytes at an address.  What the receiver makes of it will be writable.

    The ``obj`` of a memoryview of it is an array whose ``base`` is a :class:`Window`.
    """
    memory: Any = np.asarray(Window(owner, address, nbytes, made_of))
    return pickle.PickleBuffer(memory)


# ---- arrays ----------------------------------------------------------------------------------------------------------

#: Kinds of dtypes of which numpy exports a buffer.
_EXPORTED = frozenset("biufcSU")


class _Replacing(threading.local):
    by: Callable[[np.ndarray], Any] | None = None


_replacing = _Replacing()


@contextmanager
def replacing_arrays(by: Callable[[np.ndarray], Any]) -> Iterator[None]:
    """While this thread pickles, have other things travel in the place of arrays, wherever these are met.

    Parameters
    ----------
    by : callable
        Given an ndarray or memmap (no other subclass): itself, another ndarray, or something that has a ``__reduce__``.
        It is not asked about arrays for which the user has registered a serializer.
    """
    outer = _replacing.by
    _replacing.by = by
    try:
        yield
    finally:
        _replacing.by = outer


def _reduce_ndarray(a: np.ndarray) -> Any:
    by = _replacing.by
    if by is not None:
        instead = by(a)
        if type(instead) is not np.ndarray:
            return instead.__reduce__()
        a = instead
    flags = a.flags
    if flags.forc and flags.writeable and a.dtype.kind in _EXPORTED:
        return a.__reduce_ex__(5)
    return _reduce_unusual(a)


def _reduce_unusual(a: np.ndarray) -> Any:
    dtype = a.dtype
    if dtype.hasobject:
        # As numpy does; but without the name of numpy's function, which is for learn() to look for.
        return np.ndarray, ((0,), "b"), a.__reduce_ex__(5)[2]
    if not a.nbytes:
        return a.__reduce_ex__(5)
    return _make_ndarray, _parts(a)


def _parts(a: np.ndarray) -> tuple[pickle.PickleBuffer, np.dtype, tuple[int, ...], tuple[int, ...]]:
    """Memory, dtype, shape, strides: of a copy if the array is not contiguous."""
    made_of = None
    if not is_contiguous(a):
        made_of, a = a, a.copy("C")
    memory = window(a, a.__array_interface__["data"][0], a.nbytes, made_of)
    return memory, a.dtype, a.shape, a.strides


def is_contiguous(a: np.ndarray) -> bool:
    """Are the items of an array side by side, in whatever order of its axes?"""
    if a.flags.forc:
        return True
    order = sorted(range(a.ndim), key=a.strides.__getitem__, reverse=True)
    return a.transpose(order).flags.c_contiguous


def _make_ndarray(
    buffer: Any, dtype: np.dtype, shape: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray:
    # frombuffer holds on to the buffer; ndarray's own constructor only to what is behind it.
    return np.ndarray(shape, dtype, np.frombuffer(buffer, np.uint8), 0, strides)


# ---- subclasses ------------------------------------------------------------------------------------------------------


def _reduce_subclass(a: np.ndarray) -> Any:
    plain = np.ndarray.view(a, np.ndarray)
    if plain.dtype.hasobject or not plain.nbytes:
        return a.__reduce_ex__(5)
    return _make_subclass, (type(a), *_parts(plain))


def _make_subclass(
    cls: type, buffer: Any, dtype: np.dtype, shape: tuple[int, ...], strides: tuple[int, ...]
) -> Any:
    return np.ndarray.__new__(cls, shape, dtype, np.frombuffer(buffer, np.uint8), 0, strides)


def _reduce_memmap(a: Any) -> Any:
    by = _replacing.by
    if by is not None:
        instead = by(a)
        if instead is not a:
            return _reduce_ndarray(instead) if type(instead) is np.ndarray else instead.__reduce__()
    return _reduce_subclass(a)


def _reduce_masked(a: Any) -> Any:
    return _make_masked, (a._data, a._mask, a._fill_value, a._hardmask)


def _make_masked(data: Any, mask: Any, fill_value: Any, hard: bool) -> Any:
    from numpy import ma

    if mask is ma.nomask:
        # As plain pickle does: programs that index the mask of what they have received work.
        mask = np.zeros(data.shape, ma.make_mask_descr(data.dtype))
    made: Any = ma.MaskedArray(data, mask, copy=False, keep_mask=False, hard_mask=hard)
    made._fill_value = fill_value
    return made


# Replaced, never changed, like the table of custom serializers.
_learned: dict[type, Reduction] = {}
#: Where the stream has this, there is a subclass that numpy (``_reconstruct``, ``_mareconstruct``) has pickled in band.
MARK = b"reconstruct"


def learned() -> dict[type, Reduction]:
    """The subclasses of ``ndarray`` that were met so far.  Not to be changed."""
    return _learned


def learn() -> bool:
    """Look for subclasses of ``ndarray`` that have no reduction of their own; True if there are new ones.

    A class is never forgotten.  So it is only called when a large stream shows that there is need.
    """
    global _learned
    found: dict[type, Reduction] = {}
    masked = getattr(sys.modules.get("numpy.ma"), "MaskedArray", None)
    if masked is not None:
        found[masked] = _reduce_masked
    pending: list[type] = [np.ndarray]
    while pending:
        below: list[type] = type.__subclasses__(pending.pop())
        for cls in below:
            pending.append(cls)
            if cls not in REDUCTIONS and _is_reduced_by_numpy(cls):
                found[cls] = _reduce_subclass
    if found.keys() <= _learned.keys():
        return False
    _learned = {**_learned, **found}
    return True


def _is_reduced_by_numpy(cls: Any) -> bool:
    plain: Any = np.ndarray
    return all(
        getattr(cls, name) is getattr(plain, name)
        for name in ("__reduce__", "__reduce_ex__", "__setstate__")
    )


# ---- the standard library's buffers ----------------------------------------------------------------------------------


def _reduce_array(obj: array.array[Any]) -> tuple[Any, ...]:
    if obj.typecode in "uw" or not obj:
        return obj.__reduce_ex__(5)  # type: ignore[return-value]
    return _make_array, (obj.typecode, pickle.PickleBuffer(obj))


def _make_array(typecode: str, data: Any) -> array.array[Any]:
    made = array.array(typecode)
    made.frombytes(data)
    return made


def _reduce_memoryview(obj: memoryview) -> tuple[Any, ...]:
    if obj.nbytes and obj.format in _CASTS:
        data = pickle.PickleBuffer(obj) if obj.c_contiguous else obj.tobytes()
        return _make_memoryview, (data, obj.format, obj.shape)
    try:
        with_format: Any = np.asarray(obj)
        again = memoryview(with_format)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise TypeError(f"cannot pickle a memoryview of format {obj.format!r}: {error}") from error
    if (again.format, again.shape) != (obj.format, obj.shape):
        raise TypeError(
            f"cannot pickle a memoryview of format {obj.format!r} and shape {obj.shape}"
        )
    return (memoryview if not obj.readonly else _make_readonly), (with_format,)


#: The formats that ``memoryview.cast`` knows.
_CASTS = frozenset([*"cbB?hHiIlLqQfdnNP"])


def _make_memoryview(data: Any, format: str, shape: tuple[int, ...]) -> memoryview:  # noqa: A002  # memoryview's word
    return memoryview(data).cast("B").cast(format, shape)  # type: ignore[call-overload, no-any-return]


def _make_readonly(a: Any) -> memoryview:
    return memoryview(a).toreadonly()


def _reduce_file(obj: Any) -> Any:
    for name in ("stdout", "stderr"):
        if obj is getattr(sys, name):
            return getattr, (sys, name)
    raise TypeError(f"cannot pickle {type(obj).__qualname__!r} object")


#: For a pickler's dispatch table.
REDUCTIONS: dict[type, Reduction] = {
    np.ndarray: _reduce_ndarray,
    np.matrix: _reduce_subclass,
    np.memmap: _reduce_memmap,
    np.recarray: _reduce_subclass,
    array.array: _reduce_array,
    memoryview: _reduce_memoryview,
    io.TextIOWrapper: _reduce_file,
}
