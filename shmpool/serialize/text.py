"""Large strings: one copy on the way out, one on the way in.

The pickler encodes a string into bytes, which then are copied into the store.  A string of ASCII characters is its own
encoding, so it can be lent to the pickler as a buffer.  No pickler asks how to reduce a ``str``: so this is done where
it is cheap to find one, in a result, in an object that is put, and among the arguments of a call; strings deeper inside
of something take two copies.
"""

from __future__ import annotations

import ctypes
from typing import Any

from shmpool.serialize.reductions import window

__all__ = ["lend_text"]

#: In characters. Below, a second copy costs less than looking.
_LARGE = 1 << 20

_utf8 = ctypes.pythonapi.PyUnicode_AsUTF8AndSize
_utf8.argtypes = [ctypes.py_object, ctypes.POINTER(ctypes.c_ssize_t)]
_utf8.restype = ctypes.c_void_p


class _Lent:
    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __reduce__(self) -> tuple[Any, ...]:
        # For a string of ASCII characters this is the address of the string's own memory.
        address = _utf8(self._text, None)
        return _decode, (window(self._text, address, len(self._text)),)


def _decode(data: Any) -> str:
    return str(data, "ascii")


def lend_text(obj: Any) -> Any:
    """``obj``, a pair (args, kwargs) or anything else, with what stands for large strings in their places."""
    if _is_large(obj):
        return _Lent(obj)
    if type(obj) is tuple and len(obj) == 2:
        args, kwargs = obj
        if type(args) is tuple and type(kwargs) is dict:
            large = {id(value): value for value in (*args, *kwargs.values()) if _is_large(value)}
            if large:
                lent = {key: _Lent(text) for key, text in large.items()}
                args = tuple(lent.get(id(value), value) for value in args)
                kwargs = {name: lent.get(id(value), value) for name, value in kwargs.items()}
                return args, kwargs
    return obj


def _is_large(obj: Any) -> bool:
    return type(obj) is str and len(obj) >= _LARGE and obj.isascii()
