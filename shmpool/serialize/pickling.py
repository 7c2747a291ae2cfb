"""Objects to pickle streams with out-of-band buffers, and back.

Three ways, tried in this order, each only where the one before cannot or must not:

1. plain :func:`pickle.dumps` (0.2 us for a small tuple);
2. a pickler with a dispatch table: the user's custom serializers, and the reductions that multiprocessing has for
   sockets and connections.  Taken when there is something that plain pickle would do worse;
3. cloudpickle's pickler (11 us) for what has no importable name: lambdas, closures, and what is defined in
   ``__main__`` unless the receiver is known to have the very same thing (see :mod:`shmpool.serialize.mainmodule`).

What the second and third way must see is found by looking for names in the first way's bytes: a false alarm costs only
time.  The second and third are one pickler.

Guarantees: the object is not changed; buffers are views of the object's own memory (nothing is copied); an object
that cannot be pickled raises :class:`SerializationError` and nothing else, RecursionError included.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import ChainMap
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import cloudpickle

from shmpool.errors import SerializationError
from shmpool.serialize import custom
from shmpool.serialize.inspect import culprit_path
from shmpool.serialize.mainmodule import MainModule

__all__ = [
    "ARGUMENTS", "EXCEPTION", "FUNCTION", "INITIALIZER", "OBJECT", "RESULT", "Dumped", "Pickling", "What", "loads",
]  # fmt: skip

PROTOCOL = 5
#: A plain pickle that mentions these must be made again with more care. (A connection of multiprocessing would be
#: pickled as the number of its descriptor.)
_SUSPICIOUS = (b"__main__", b"multiprocessing")
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
    """A pickle stream and the buffers that it refers to, in order."""

    stream: bytes | memoryview
    buffers: list[memoryview]


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

        stream: bytes | memoryview
        if not custom.has_custom() and "torch" not in sys.modules:
            try:
                stream = pickle.dumps(obj, PROTOCOL, buffer_callback=in_band)
            except Exception:  # whatever a class's __reduce__ raises: cloudpickle may do better, or says why not
                pass
            else:
                # A function or class of __main__ itself, which the receiver has, is the usual case.
                if not any(name in stream for name in _SUSPICIOUS) or self.main.has(obj):
                    return Dumped(stream, buffers)
            buffers.clear()
        try:
            sink = io.BytesIO()
            pickler = _CloudPickler(sink, self.main, in_band, _dispatch_table())
            pickler.dump(obj)
            stream = sink.getbuffer()
        except Exception as error:
            raise self._explained(obj, what, error) from error
        return Dumped(stream, buffers)

    def _explained(self, obj: object, what: What, error: Exception) -> SerializationError:
        noun, name = what
        roots = [(name, obj)] if name else zip(("args", "kwargs"), obj, strict=True)  # type: ignore[call-overload]
        culprits = (culprit_path(root, name, self._try) for name, root in roots)
        culprit = next(filter(None, culprits), None)
        return SerializationError(what=noun, culprit=culprit, reason=f"{type(error).__name__}: {error}")

    def _try(self, obj: object) -> object:
        pickler = _CloudPickler(io.BytesIO(), self.main, lambda _: False, _dispatch_table())
        pickler.dump(obj)
        return None


class _MainByReference:
    """Pickler mixin: what the receiver's ``__main__`` has goes by name, the rest as cloudpickle decides."""

    _main: MainModule

    def reducer_override(self, obj: Any) -> Any:
        if self._main.has(obj):
            return NotImplemented  # the pickler then writes module and qualified name
        return super().reducer_override(obj)  # type: ignore[misc]  # cloudpickle's


class _CloudPickler(_MainByReference, cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle is untyped
    def __init__(
        self,
        file: io.BytesIO,
        main: MainModule,
        in_band: Callable[[pickle.PickleBuffer], bool],
        table: dict[type, Callable[[Any], Any]],
    ) -> None:
        # Before __init__: the C pickler looks for a dispatch table only there.
        self.dispatch_table = ChainMap(table, cloudpickle.Pickler.dispatch_table)
        super().__init__(file, PROTOCOL, in_band)
        self._main = main


def _dispatch_table() -> dict[type, Callable[[Any], Any]]:
    """Reductions beside pickle's own: multiprocessing's, then the user's."""
    table: dict[type, Callable[[Any], Any]] = dict(ForkingPickler._extra_reducers)  # type: ignore[attr-defined]
    table.update(custom.registered())
    return table


def loads(stream: bytes | bytearray | memoryview, buffers: Sequence[memoryview]) -> Any:
    """The object again.  Raises whatever the object's own code raises."""
    return pickle.loads(stream, buffers=buffers)
