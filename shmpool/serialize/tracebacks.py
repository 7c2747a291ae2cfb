"""The text of a worker's traceback, out of the pickle of an exception that cannot be unpickled.

That is common: an exception class whose ``__init__`` takes something else than what it passes on as ``args``.  Then
this text is all there is to say what went wrong in the task.  It is read without anything of the exception being made,
so that no code of its own runs: whatever the stream calls is replaced by something that does nothing.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, Self

from shmpool.serialize.text import Reader

__all__ = ["traceback_in"]

#: How the envelope of the standard library's executor, which holds the exception and the text, is unpickled.
_ENVELOPE = ("concurrent.futures.process", "_rebuild_exc")


class _Nothing:
    """Stands for any class, function or object in a stream."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __call__(self, *_args: Any, **_kwargs: Any) -> Self:
        return self

    __setstate__ = append = extend = add = __setitem__ = __call__


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _text if (module, name) == _ENVELOPE else _Nothing

    def persistent_load(self, lent: Any) -> Any:
        return lent  # a large string


def _text(_error: Any, text: str) -> str:
    return text


def traceback_in(stream: bytes | bytearray | memoryview, buffers: Sequence[memoryview]) -> str:
    """The traceback's text; empty if there is none to be found."""
    try:
        found = _Unpickler(Reader(stream), buffers=buffers).load()
    except Exception:
        return ""
    return found if isinstance(found, str) else ""
