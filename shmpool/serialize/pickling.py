"""Objects to pickle streams with out-of-band buffers, and back.

Two picklers, the second only where the first cannot or must not:

1. the standard library's (1 us for a small tuple), with a dispatch table: reductions of multiprocessing for sockets
   and connections, ours for buffers that pickle copies needlessly, the user's custom serializers.  A subclass of
   ``ndarray`` enters the table when a large stream shows it, which is then made again;
2. cloudpickle's (11 us) for what has no importable name: lambdas, closures, and what is defined in ``__main__`` unless
   the receiver is known to have the very same thing (see :mod:`shmpool.serialize.mainmodule`).  A stream that mentions
   ``__main__`` is found by looking for that name in the bytes: a false alarm costs only time.

A stream comes in pieces: the pickler hands on large ``bytes`` and ``bytearray`` as they are, so that they are copied
once, into the store.

Guarantees: the object is not changed; buffers are views of the object's own memory (nothing is copied); an object
that cannot be pickled raises :class:`SerializationError` and nothing else, RecursionError included.

With ``SHMPOOL_PICKLE_DEBUG=1`` the second is the pickler written in Python: the traceback of what went wrong (the
cause of the SerializationError) then shows the way through the object.
"""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar, NamedTuple

from shmpool.config import pickle_debug
from shmpool.errors import SerializationError
from shmpool.serialize import custom, reductions
from shmpool.serialize.arrow import pandas_arrays, reductions_for_pandas
from shmpool.serialize.mainmodule import MainModule
from shmpool.serialize.tensors import reductions_for_torch

__all__ = [
    "ARGUMENTS", "EXCEPTION", "FUNCTION", "INITIALIZER", "OBJECT", "RESULT", "Dumped", "Pickling", "What",
    "dispatch_table", "loads",
]  # fmt: skip

PROTOCOL = 5
#: STACK_GLOBAL MEMOIZE STOP: a stream that ends so is a look-up by name, and nothing else.
FOUND_BY_NAME = b"\x93\x94."
#: Pickle collects small parts up to this size.
FRAME = 64 * 1024
#: Streams shorter than this are not worth a second look.
LARGE = 16 * 1024
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

    __slots__ = ("_debug", "_wanted", "main")

    def __init__(self, main: MainModule, wanted: Wanted) -> None:
        self.main = main
        self._wanted = wanted
        self._debug = pickle_debug()

    def dumps(self, obj: object, what: What) -> Dumped:
        """Pickle ``obj``; ``what`` says what it is, in an error.

        Raises
        ------
        SerializationError
            It cannot be pickled; the message names the path to the culprit.
        """
        dumped = self._dumps(obj, what)
        if _mentions(dumped.stream, reductions.MARK) and reductions.learn():
            dumped = self._dumps(obj, what)
        return dumped

    def _dumps(self, obj: object, what: What) -> Dumped:
        buffers: list[memoryview] = []

        def in_band(buffer: pickle.PickleBuffer) -> bool:
            view = buffer.raw()
            if self._wanted(view):
                buffers.append(view)
                return False
            return True

        table = dispatch_table()
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
            self._pickler()(stream, self.main, in_band, table).dump(obj)
        except Exception as error:
            raise self._explained(obj, what, error) from error
        return Dumped(stream, buffers)

    def _explained(self, obj: object, what: What, error: Exception) -> SerializationError:
        from shmpool.serialize.byvalue import CloudPickler
        from shmpool.serialize.inspect import culprit_path  # only when something went wrong

        def pickler(file: Any) -> CloudPickler:
            return CloudPickler(file, self.main, lambda _: False, dispatch_table())

        noun, name = what
        if what is EXCEPTION:
            obj = getattr(obj, "exc", obj)  # out of the standard library's envelope
        roots = [(name, obj)] if name else zip(("args", "kwargs"), obj, strict=True)  # type: ignore[call-overload]
        culprits = (culprit_path(root, name, pickler=pickler) for name, root in roots)
        culprit = next(filter(None, culprits), None)
        return SerializationError(
            what=noun, culprit=culprit, reason=f"{type(error).__name__}: {error}"
        )

    def _pickler(self) -> type[Any]:
        """The second pickler: most programs need none, and cloudpickle is slow to import."""
        if self._debug:
            from shmpool.serialize.debugging import DebugPickler

            return DebugPickler
        from shmpool.serialize.byvalue import CloudPickler

        return CloudPickler


class _Pickler(pickle.Pickler):
    dispatch_table: ClassVar[dict[type, Callable[[Any], Any]]]  # type: ignore[misc]  # of all instances


_made_from: tuple[Any, Any, int, int, Any] = (None, None, 0, 0, None)


def dispatch_table() -> dict[type, Callable[[Any], Any]]:
    """The reduction functions by class, later ones first: registered by the user, ours, multiprocessing's, copyreg's.

    Made anew if what it is made from has changed.  It must be a plain dict (the pickler is slow with anything else),
    and a private table replaces copyreg's.  Not to be changed.
    """
    global _made_from
    registered, learned = custom.registered(), reductions.learned()
    extra = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    made = _made_from
    if not (
        made[0] is registered
        and made[1] is learned
        and made[2] == len(copyreg.dispatch_table)
        and made[3] == len(extra)
        and made[4] is pandas_arrays()
    ):
        made = registered, learned, len(copyreg.dispatch_table), len(extra), pandas_arrays()
        _Pickler.dispatch_table = {
            **learned, **copyreg.dispatch_table, **extra,
            **reductions.REDUCTIONS, **reductions_for_torch(extra), **reductions_for_pandas(), **registered,
        }  # fmt: skip
        _made_from = made
    return _Pickler.dispatch_table


def _mentions(stream: list[bytes | memoryview], mark: bytes) -> bool:
    """Is the stream large, and says this?  Data that the pickler handed on apart is not searched."""
    if len(stream) == 1 and len(stream[0]) < LARGE:
        return False
    return any(mark in piece for piece in stream if type(piece) is bytes and len(piece) < 2 * FRAME)


def loads(stream: bytes | bytearray | memoryview, buffers: Sequence[memoryview]) -> Any:
    """The object again.  Raises whatever the object's own code raises."""
    return pickle.loads(stream, buffers=buffers)
