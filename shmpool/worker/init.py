"""The initializer and its arguments, on their way to a worker.

Under fork they are simply inherited, whatever they are.  Otherwise they are pickled while the process is being
started, like the arguments of a ``multiprocessing.Process``: only then may locks and queues of multiprocessing travel.
They go through the store like any payload, so that a large array in ``initargs`` is one copy for all workers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from shmpool.errors import SerializationError
from shmpool.memory.segment import Mode
from shmpool.serialize import custom
from shmpool.serialize.pickling import INITIALIZER, Pickling, loads
from shmpool.store.payload import PLAIN
from shmpool.store.peer import Peer
from shmpool.store.store import ObjectStore, Payload

__all__ = ["Initializer"]

_log = logging.getLogger("shmpool")


class Initializer:
    """What a worker runs before its first task.

    Parameters
    ----------
    function : callable or None
    arguments : tuple
    store : ObjectStore
    pickling : Pickling

    Attributes
    ----------
    payload : Payload or None
        Made by pickling this; the worker may look at its blocks for as long as it lives.
    """

    __slots__ = ("_arguments", "_function", "_pickling", "_store", "payload")

    def __init__(
        self,
        function: Callable[..., object] | None,
        arguments: tuple[Any, ...],
        store: ObjectStore,
        pickling: Pickling,
    ) -> None:
        self._function = function
        self._arguments = arguments
        self._store = store
        self._pickling = pickling
        self.payload: Payload | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        serializers = self._serializers()
        if self._function is None and not serializers:
            return Travelled, (None,)
        everything = (serializers, self._function, self._arguments)
        self.payload = self._store.dump(everything, self._pickling, INITIALIZER)
        return Travelled, (bytes(self.payload.data),)

    def _serializers(self) -> list[bytes]:
        """The custom serializers, each pickled by itself: one that cannot be is no reason for the pool to fail."""
        found = []
        for serializer in custom.registered().values():
            try:
                stream, _ = self._pickling.dumps(serializer, INITIALIZER)
            except SerializationError:
                continue
            found.append(b"".join(stream))
        return found

    #: See :class:`Travelled`.
    needs_arenas = False

    def run(self, store: ObjectStore, origin: Peer, mode: Mode) -> None:
        """Run it, in the worker.  Raises what it raises.  See :meth:`Travelled.run` for what is not needed here."""
        del store, origin, mode
        if self._function is not None:
            self._function(*self._arguments)


class Travelled:
    """An :class:`Initializer` that came through a pipe, to be unpickled once the worker has its store."""

    __slots__ = ("_data", "needs_arenas")

    def __init__(self, data: bytes | None) -> None:
        self._data = data
        #: Its arrays lie in arenas, which the parent hands over in a message of its own.
        self.needs_arenas = data is not None and data[0] != PLAIN

    def run(self, store: ObjectStore, origin: Peer, mode: Mode) -> None:
        """Run it.  Raises what it raises."""
        if self._data is None:
            return
        payload = store.receive(self._data, origin)
        try:
            serializers, function, arguments = store.load(payload, mode)
        finally:
            payload.release()
        for serializer in serializers:
            try:
                custom.adopt([loads(serializer, [])])
            except Exception:  # whatever a module of the user's raises when it is imported
                _log.debug("a custom serializer could not be taken over", exc_info=True)
        if function is not None:
            function(*arguments)
