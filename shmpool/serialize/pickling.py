"""Objects to pickle streams with out-of-band buffers, and back.

A call with plain arrays, and an array as a result, have a way of their own (see :mod:`shmpool.serialize.bare`).  For
the rest there are two picklers, the second only where the first cannot or must not:

1. the standard library's (1 us for a small tuple), with a dispatch table: reductions of multiprocessing for sockets
   and connections, ours for buffers that pickle copies needlessly, the user's custom serializers.  A subclass of
   ``ndarray`` enters the table when a large stream shows it, which is then made again;
2. cloudpickle's (11 us) for what has no importable name: lambdas, closures, and what is defined in ``__main__`` unless
   the receiver is known to have the very same thing (see :mod:`shmpool.serialize.mainmodule`).  A stream that mentions
   ``__main__`` is found by looking for that name in the bytes: a false alarm costs only time.

What may be unpickled only once (sockets, connections) is refused where a stream is for several tasks (see
:mod:`shmpool.serialize.handover`).

A stream comes in pieces: the pickler hands on large ``bytes`` and ``bytearray`` as they are, so that they are copied
once, into the store.  Large strings are lent as buffers (:mod:`shmpool.serialize.text`).

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

import numpy as np

from shmpool.config import pickle_debug
from shmpool.errors import RefError, SerializationError
from shmpool.serialize import custom, handover, reductions
from shmpool.serialize.arrow import pandas_arrays, reductions_for_pandas
from shmpool.serialize.bare import BARE, dump_bare, load_bare
from shmpool.serialize.handover import AGAIN, NOWHERE, ONCE, Mark, Use
from shmpool.serialize.mainmodule import MainModule
from shmpool.serialize.tensors import reductions_for_torch
from shmpool.serialize.text import MARK, LargeText, Pieces, lending, load_lent

__all__ = [
    "ARGUMENTS", "ARGUMENTS_AGAIN", "EXCEPTION", "FUNCTION", "FUNCTION_AGAIN", "INITIALIZER", "OBJECT", "PUT",
    "RESULT", "Dumped", "Pickling", "What", "dispatch_table", "loads",
]  # fmt: skip

PROTOCOL = 5
#: STACK_GLOBAL MEMOIZE STOP: a stream that ends so is a look-up by name, and nothing else.
FOUND_BY_NAME = b"\x93\x94."
#: Pickle collects small parts up to this size.
FRAME = 64 * 1024
#: Streams shorter than this are not worth a second look.
LARGE = 16 * 1024


class What(NamedTuple):
    """What is being pickled: a noun and the name that a path into it begins with, for errors; and for which use."""

    noun: str
    name: str
    use: Use = ONCE


FUNCTION = What("the function", "fn")
ARGUMENTS = What("the arguments", "")  # a pair (args, kwargs), each with its own name
#: The same for several tasks, or for one that may be run several times.
FUNCTION_AGAIN = FUNCTION._replace(use=AGAIN)
ARGUMENTS_AGAIN = ARGUMENTS._replace(use=AGAIN)
RESULT = What("the result", "result")
EXCEPTION = What("the exception", "exception")
INITIALIZER = What("initializer and initargs", "(initializer, initargs)")
PUT = What("the object", "obj", AGAIN)
#: Nobody is going to unpickle it.
OBJECT = What("the object", "obj", NOWHERE)

#: Tells whether a buffer (contiguous, as a view of bytes) is to travel out of band.
Wanted = Callable[[memoryview], bool]


class Dumped(NamedTuple):
    """A pickle stream, in pieces to be joined, and the buffers that it refers to, in order."""

    stream: list[bytes | memoryview]
    buffers: list[memoryview]


class Pickling:
    """How this process pickles for one kind of receiver.

    Parameters
    ----------
    main : MainModule
        What the receiver has in its ``__main__``.
    wanted : callable
        Which buffers travel out of band.  Raises RefError for one that cannot travel.
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
        buffers: list[memoryview] = []
        # Unless the user has another way for arrays.
        table = _table()
        if table[np.ndarray] is reductions.REDUCTIONS[np.ndarray]:
            try:
                stream = dump_bare(obj, self._aside(buffers), LARGE, table)
            except RefError:
                stream = None  # the other way says where it is
            if stream is not None:
                return Dumped([stream], buffers)
        since = handover.mark()
        dumped = self._dumps(obj, what, since)
        if _mentions(dumped.stream, reductions.MARK) and reductions.learn():
            handover.disinherit(since)
            dumped = self._dumps(obj, what, since)
        return dumped

    def _dumps(self, obj: object, what: What, since: Mark) -> Dumped:
        try:
            return self._pickled(obj, what, since, Pieces(), lambda pickler: pickler)
        except LargeText:
            return self._pickled(obj, what, since, _Patient([MARK]), lending)

    def _pickled(
        self,
        obj: object,
        what: What,
        since: Mark,
        stream: Pieces,
        variant: Callable[[type[Any]], type[Any]],
    ) -> Dumped:
        buffers: list[memoryview] = []
        in_band = self._aside(buffers)
        table, use = _table(), what.use
        kind = _Pickler
        if use is not ONCE:
            kind, table = _pickler_for(use, table)
        before = len(stream)
        if not _is_of_main(obj):
            pickler = variant(kind)(stream, PROTOCOL, buffer_callback=in_band)
            try:
                _dump(pickler, obj, use, since)
            except (
                Exception
            ):  # whatever a class's __reduce__ raises: cloudpickle may do better, or says why not
                pass
            else:
                # A function or class of __main__ itself, which the receiver has, is the usual case.
                if not any(
                    type(piece) is bytes and b"__main__" in piece for piece in stream
                ) or self.main.has(obj):
                    return Dumped(stream, buffers)
                handover.withdraw(pickler, since)
        buffers.clear()
        del stream[before:]
        try:
            pickler = variant(self._pickler())(stream, self.main, in_band, table)
            _dump(pickler, obj, use, since)
        except Exception as error:
            # Pieces may be views of files, of the pickler written in Python, that garbage collection closes.
            del stream[before:]
            raise self._explained(obj, what, error) from error
        return Dumped(stream, buffers)

    def _aside(self, buffers: list[memoryview]) -> Callable[[pickle.PickleBuffer], bool]:
        """For a pickler: does a buffer go in band?  Those that do not are added to ``buffers``."""
        wanted = self._wanted

        def in_band(buffer: pickle.PickleBuffer) -> bool:
            view = buffer.raw()
            if wanted(view):
                buffers.append(view)
                return False
            return True

        return in_band

    def _explained(self, obj: object, what: What, error: Exception) -> SerializationError:
        from shmpool.serialize.byvalue import CloudPickler
        from shmpool.serialize.inspect import culprit_path  # only when something went wrong
        from shmpool.serialize.words import text_of

        noun, name, use = what
        table = dispatch_table(use)

        def pickler(file: Any) -> CloudPickler:
            return CloudPickler(file, self.main, self._aside([]), table)

        if what is EXCEPTION:
            obj = getattr(obj, "exc", obj)  # out of the standard library's envelope
        roots = [(name, obj)] if name else zip(("args", "kwargs"), obj, strict=True)  # type: ignore[call-overload]
        culprits = (culprit_path(root, name, pickler=pickler) for name, root in roots)
        culprit = next(filter(None, culprits), None)
        reason = ": ".join(filter(None, (type(error).__name__, text_of(error))))
        return SerializationError(what=noun, culprit=culprit, reason=reason)

    def _pickler(self) -> type[Any]:
        """The second pickler: most programs need none, and cloudpickle is slow to import."""
        if self._debug:
            from shmpool.serialize.debugging import DebugPickler

            return DebugPickler
        from shmpool.serialize.byvalue import CloudPickler

        return CloudPickler


class _Patient(Pieces):
    """Takes large strings as well: those that cannot be lent."""

    __slots__ = ()

    def write(self, piece: bytes | pickle.PickleBuffer) -> None:
        self.append(piece.raw() if isinstance(piece, pickle.PickleBuffer) else piece)


def _is_of_main(obj: Any) -> bool:
    """Is this, or one of the arguments in (args, kwargs), an instance of a class of ``__main__``?

    Its stream will say so, and then is not good: user code that runs while it is made need not run twice.
    """
    if type(obj) is tuple and len(obj) == 2 and type(obj[0]) is tuple:
        return any(type(arg).__module__ == "__main__" for arg in obj[0])
    return type(obj).__module__ == "__main__"


_Table = dict[type, Callable[[Any], Any]]


class _Pickler(pickle.Pickler):
    dispatch_table: ClassVar[_Table]  # type: ignore[misc]  # of all instances


class _AgainPickler(_Pickler):
    """The same for what is unpickled again."""


def _pickler_for(use: Use, table: _Table) -> tuple[type[_Pickler], _Table]:
    """The first pickler for a stream that is not unpickled once, and its dispatch table."""
    if use is AGAIN:
        return _AgainPickler, _AgainPickler.dispatch_table
    table = {**table, **handover.standing_in(table, use)}
    return type("_NowherePickler", (_Pickler,), {"dispatch_table": table}), table


def _dump(pickler: Any, obj: object, use: Use, since: Mark) -> None:
    """Pickle; a stream that is given up leaves no descriptor that waits for somebody to come for it."""
    try:
        pickler.dump(obj)
    except BaseException:
        handover.withdraw(pickler, since)
        raise
    if use is AGAIN and handover.withdraw(pickler, since):
        raise handover.refused("descriptor")


def dispatch_table(use: Use = NOWHERE) -> _Table:
    """The reduction functions by class, for a pickler whose stream nobody will read.

    Parameters
    ----------
    use : {"once", "again", "nowhere"}
        What the stream would be for: ``"again"`` refuses what is handed over once.
    """
    table = _table()
    return {**table, **handover.standing_in(table, use)}


_made_from: tuple[Any, Any, int, int, Any] = (None, None, 0, 0, None)


def _table() -> _Table:
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
        table = _Pickler.dispatch_table
        _AgainPickler.dispatch_table = {**table, **handover.refusing(table)}
        _made_from = made
    return _Pickler.dispatch_table


def _mentions(stream: list[bytes | memoryview], mark: bytes) -> bool:
    """Is the stream large, and says this?  Data that the pickler handed on apart is not searched."""
    if len(stream) == 1 and len(stream[0]) < LARGE:
        return False
    return any(mark in piece for piece in stream if type(piece) is bytes and len(piece) < 2 * FRAME)


#: What streams begin with that are no plain pickles; to compare a number costs less than to compare a slice.
_BARE, _MARK = BARE[0], MARK[0]


def loads(stream: bytes | bytearray | memoryview, buffers: Sequence[memoryview]) -> Any:
    """The object again.  Raises whatever the object's own code raises."""
    first = stream[0] if stream else None
    if first == _BARE:
        return load_bare(stream, buffers)
    if first == _MARK:
        return load_lent(stream, buffers)
    return pickle.loads(stream, buffers=buffers)
