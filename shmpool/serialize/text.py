"""Large strings: lent to the pickler as buffers, so that they are copied once, into the store, and once out of it.

The pickler copies a string into its stream, and asks nobody how to reduce one.  It does ask for a *persistent id* of
every object that it meets, which is too slow for each pickle (a call per number and key).  So it is asked only if there
is a large string, which the pickler tells by what it writes: everything so far, up to the string's header, before it
copies the string.  :class:`Pieces` notices, and the object is pickled again with :class:`Lending`.

What is lent is the string's UTF-8 form, which for ASCII is the string's own memory.  Any other string is encoded by the
pickler anyway, and keeps that form for as long as it lives.
"""

from __future__ import annotations

import ctypes
import io
import pickle
from collections.abc import Sequence
from typing import Any

from shmpool.serialize.reductions import window

__all__ = ["MARK", "LargeText", "Lent", "Pieces", "lending", "load_lent"]

#: In characters. Below, a second copy costs less than pickling again.
LARGE = 1 << 20

#: What a stream with lent strings begins with, for :func:`load_lent`; others begin with pickle's PROTO.
MARK = b"L"

_BINUNICODE, _BINUNICODE8 = b"X"[0], b"\x8d"[0]

_utf8 = ctypes.pythonapi.PyUnicode_AsUTF8AndSize
_utf8.argtypes = [ctypes.py_object, ctypes.POINTER(ctypes.c_ssize_t)]
_utf8.restype = ctypes.c_void_p


class LargeText(BaseException):
    """A large string is about to be written.  Not an error, and nothing that a reduction may catch as one."""


class Pieces(list[Any]):
    """A file for a pickler to write to: keeps what it is given, without a copy, up to a large string."""

    __slots__ = ()

    def write(self, piece: bytes | pickle.PickleBuffer) -> None:
        """Take a piece of the stream, or a buffer that goes in band.

        Raises
        ------
        LargeText
            It ends with the header of a large string (or looks so, which costs only time).
        """
        if isinstance(piece, pickle.PickleBuffer):
            self.append(piece.raw())
            return
        self.append(piece)
        if len(piece) >= 5 and (
            (piece[-5] == _BINUNICODE and int.from_bytes(piece[-4:], "little") >= LARGE)
            or (len(piece) >= 9 and piece[-9] == _BINUNICODE8 and piece[-1] == 0)
        ):
            raise LargeText


class Lent:
    """What stands for a large string in a stream."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> tuple[Any, ...]:
        size = ctypes.c_ssize_t()
        address = _utf8(self.text, ctypes.byref(size))
        return _decode, (window(self.text, address, size.value),)


def _decode(data: Any) -> str:
    return str(data, "utf-8")


class _Lending:
    """A pickler that writes large strings as lent ones."""

    def persistent_id(self, obj: Any) -> Lent | None:
        """What stands for ``obj`` in the stream, if not itself."""
        if type(obj) is not str or len(obj) < LARGE or not _has_utf8(obj):
            return None
        # One stand-in for each string, so that what is one string arrives as one; it keeps the string alive meanwhile.
        lent: dict[int, Lent] = self.__dict__.setdefault("_lent", {})
        return lent.setdefault(id(obj), Lent(obj))


def lending(pickler: type[Any]) -> type[Any]:
    """A pickler class that lends large strings, made from one that does not; its streams begin with :data:`MARK`."""
    return type(f"Lending{pickler.__name__}", (_Lending, pickler), {})


def _has_utf8(text: str) -> bool:
    try:
        _utf8(text, None)
    except UnicodeEncodeError:
        return False  # lone surrogates: the pickler has a way to write them
    return True


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, lent: str) -> str:
        return lent


def load_lent(stream: bytes | bytearray | memoryview, buffers: Sequence[memoryview]) -> Any:
    """The object again, from a stream that begins with :data:`MARK`."""
    return _Unpickler(Reader(stream), buffers=buffers).load()


class Reader(io.RawIOBase):
    """A stream in memory as a file, of which large parts are copied straight to where they belong."""

    def __init__(self, stream: bytes | bytearray | memoryview) -> None:
        view = memoryview(stream)
        self._view = view[len(MARK) :] if view[: len(MARK)] == MARK else view

    def readinto(self, target: Any, /) -> int:
        n = min(len(target), len(self._view))
        target[:n] = self._view[:n]
        self._view = self._view[n:]
        return n
