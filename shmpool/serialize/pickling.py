"""Objects to pickle streams with out-of-band buffers, and back.

Two picklers, the second only where the first cannot or must not:

1. the standard library's (1 us for a small tuple), with a dispatch table: reductions of multiprocessing for sockets
   and connections, ours for buffers that pickle copies needlessly, the user's custom serializers;
2. cloudpickle's (11 us) for what has no importable name: lambdas, closures, and what is defined in ``__main__`` unless
   the receiver is known to have the very same thing (see :mod:`shmpool.serialize.mainmodule`).  A stream that mentions
   ``__main__`` is found by looking for that name in the bytes: a false alarm costs only time.

A stream comes in pieces: the pickler hands on large ``bytes`` and ``bytearray`` as they are, so that they are copied
once, into the store.

Guarantees: the object is not changed; buffers are views of the object's own memory (nothing is copied); an object
that cannot be pickled raises :class:`SerializationError` and nothing else, RecursionError included.
"""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar, NamedTuple

from shmpool.errors import SerializationError
from shmpool.serialize import custom
from shmpool.serialize.mainmodule import MainModule
from shmpool.serialize.reductions import REDUCTIONS

__all__ = [
    "ARGUMENTS", "EXCEPTION", "FUNCTION", "INITIALIZER", "OBJECT", "RESULT", "Dumped", "Pickling", "What", "loads",
]  # fmt: skip

PROTOCOL = 5
#: What is being pickled, for error messages: a noun, and the name that a path into it begins with.
FUNCTION = ("the function", "fn")
ARGUMENTS = ("the arguments", "")  # a pair (args, kwargs), each with its own name
RESULT = ("the result", "result")
EXCEPTION = ("the exception", "exception")
INITIALIZER = ("initializer and initargs", "(initializer, initargs)")
OBJECT = ("the object", "obj")
What = tuple[str, str]

#: Tells whether a buffer (contiguous, as a view of bytes) is to travel out of band.
Wanted = Callable[[memoryview], bool]


class Dumped(NamedTuple):
    """A pickle stream, in pieces to be joined, and the buffers that it refers to, in order."""

    stream: list[bytes | memoryview]
    buffers: list[memoryview]


class _Pieces(list[Any]):
    """A file for a pickler to write to: keeps what it is given, without a copy."""

    __slots__ = ()
    write = list.append


class Pickling:
    """How this process pickles for one kind of receiver.

    Parameters
    ----------
    main : MainModule
        What the receiver has in its ``__main__``.
    wanted : callable
        Which buffers travel out of band.
    """

    __slots__ = ("_wanted", "main")

    def __init__(self, main: MainModule, wanted: Wanted) -> None:
        self.main = main
        self._wanted = wanted

    def dumps(self, obj: object, what: What) -> Dumped:
        """Pickle ``obj``; ``what`` says what it is, in an error.

        Raises
        ------
        SerializationError
            It cannot be pickled; the message names the path to the culprit.
        """
        buffers: list[memoryview] = []

        def in_band(buffer: pickle.PickleBuffer) -> bool:
            view = buffer.raw()
            if self._wanted(view):
                buffers.append(view)
                return False
            return True

        _refresh_table()
        stream = _Pieces()
        try:
            _Pickler(stream, PROTOCOL, buffer_callback=in_band).dump(obj)
        except (
            Exception
        ):  # whatever a class's __reduce__ raises: cloudpickle may do better, or says why not
            pass
        else:
            # A function or class of __main__ itself, which the receiver has, is the usual case.
            if not any(b"__main__" in piece for piece in stream) or self.main.has(obj):
                return Dumped(stream, buffers)
        buffers.clear()
        stream = _Pieces()
        try:
            _cloud_pickler()(stream, self.main, in_band, _Pickler.dispatch_table).dump(obj)
        except Exception as error:
            raise self._explained(obj, what, error) from error
        return Dumped(stream, buffers)

    def _explained(self, obj: object, what: What, error: Exception) -> SerializationError:
        from shmpool.serialize.inspect import culprit_path  # only when something went wrong

        noun, name = what
        if what is EXCEPTION:
            obj = getattr(obj, "exc", obj)  # out of the standard library's envelope
        roots = [(name, obj)] if name else zip(("args", "kwargs"), obj, strict=True)  # type: ignore[call-overload]
        culprits = (culprit_path(root, name, self._try) for name, root in roots)
        culprit = next(filter(None, culprits), None)
        return SerializationError(
            what=noun, culprit=culprit, reason=f"{type(error).__name__}: {error}"
        )

    def _try(self, obj: object) -> object:
        _cloud_pickler()(_Nowhere(), self.main, lambda _: False, _Pickler.dispatch_table).dump(obj)
        return None


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, data: object) -> None:
        pass


class _Pickler(pickle.Pickler):
    dispatch_table: ClassVar[dict[type, Callable[[Any], Any]]]  # type: ignore[misc]  # of all instances


def _cloud_pickler() -> type[Any]:
    from shmpool.serialize.byvalue import (
        CloudPickler,
    )  # most programs need no cloudpickle, and it is slow to import

    return CloudPickler


_made_from: tuple[object, ...] = ()


def _refresh_table() -> None:
    """Make the dispatch table anew if what it is made from has changed.

    It must be a plain dict (the pickler is slow with anything else), and a private table replaces copyreg's.
    """
    global _made_from
    registered = custom.registered()
    extra = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    source = (registered, len(copyreg.dispatch_table), len(extra))
    if source != _made_from or registered is not _made_from[0]:
        _Pickler.dispatch_table = {**copyreg.dispatch_table, **extra, **REDUCTIONS, **registered}
        _made_from = source


def loads(stream: bytes | bytearray | memoryview, buffers: Sequence[memoryview]) -> Any:
    """The object again.  Raises whatever the object's own code raises."""
    return pickle.loads(stream, buffers=buffers)
