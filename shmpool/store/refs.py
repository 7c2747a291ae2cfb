"""Object refs: objects put into the store once, to be read by many tasks.

A ref holds the object's blocks.  It travels by itself: inside whatever shmpool pickles it is a few dozen bytes, and
the payload around it carries its blocks along.  The object goes when the last ref, and the last array made from it,
are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from shmpool.memory.segment import Mode
from shmpool.serialize.mainmodule import MainModule
from shmpool.serialize.pickling import PUT, Pickling
from shmpool.store.current import get_store
from shmpool.store.store import ObjectStore, Payload, travelling

__all__ = ["ObjectRef", "Values", "get", "put"]


class ObjectRef:
    """A reference to an object in the store.  Made by :func:`put`; compares by identity.

    As a top-level argument of a task it arrives as its value, decoded once in a task, however often it is there; inside
    a container it arrives as a ref.  A chunk of a ``map`` is one task: its calls are given one and the same value, and
    what one of them writes into it, the later ones see, as it is with an array that is an argument of all of them.
    """

    __slots__ = ("__weakref__", "_payload", "_store")

    def __init__(self, store: ObjectStore, payload: Payload) -> None:
        self._store = store
        self._payload = payload

    def get(self, mmap_mode: Mode = "r") -> Any:
        """The object.  Its large arrays are views of the store: nothing is copied.

        Parameters
        ----------
        mmap_mode : {"r", "c"}
            ``"r"`` (default): read-only arrays.  ``"c"``: writable ones; what is written is seen by nobody else, and
            not by the next ``get`` either.
        """
        if mmap_mode not in ("r", "c"):
            raise ValueError(f"mmap_mode must be 'r' or 'c', not {mmap_mode!r}")
        return self._store.load(self._payload, mmap_mode)

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self._store.carry(self._payload),)

    def __repr__(self) -> str:
        size = sum(block.size for block in self._payload.blocks) or len(self._payload.data)
        return f"<shmpool.ObjectRef of {size:,} bytes>"

    def __del__(self) -> None:
        # Finalizers wait for no lock: the blocks are queued.
        self._payload.release_later()


class Values:
    """The values of refs, each decoded once; anything else is its own value.

    Parameters
    ----------
    mode : {"c", "r"}
        How they are mapped.
    """

    __slots__ = ("_mode", "_values")

    def __init__(self, mode: Mode) -> None:
        self._mode = mode
        self._values: dict[ObjectRef, Any] = {}

    def of(self, arg: Any) -> Any:
        """What a task is given for this argument."""
        if type(arg) is not ObjectRef:
            return arg
        if arg not in self._values:
            self._values[arg] = arg.get(self._mode)
        return self._values[arg]


def _arrive(data: bytes) -> ObjectRef:
    store = travelling.store
    assert store is not None
    return ObjectRef(store, store.receive(data, None))


def put(obj: object, *, store: ObjectStore | None = None) -> ObjectRef:
    """Put an object into the store, once, for any number of tasks.

    Parameters
    ----------
    obj : object
        Anything that pickle or cloudpickle can carry.
    store : ObjectStore, optional
        Default: the process-wide one.

    Raises
    ------
    SerializationError
        It cannot be pickled, or handed over only once (a socket, a connection); the message names the culprit.
    StoreFullError
        There is no room.
    """
    store = store or get_store()
    # By value, whatever is of __main__: any worker may come to read it.
    pickling = Pickling(MainModule.nothing(), store.wanted)
    return ObjectRef(store, store.dump(obj, pickling, PUT))


@overload
def get(refs: ObjectRef, mmap_mode: Mode = "r") -> Any: ...
@overload
def get(refs: Sequence[ObjectRef], mmap_mode: Mode = "r") -> list[Any]: ...


def get(refs: ObjectRef | Sequence[ObjectRef], mmap_mode: Mode = "r") -> Any:
    """The object of a ref, or the list of the objects of a list of refs; see :meth:`ObjectRef.get`."""
    if isinstance(refs, ObjectRef):
        return refs.get(mmap_mode)
    if isinstance(refs, list | tuple) and all(isinstance(ref, ObjectRef) for ref in refs):
        return [ref.get(mmap_mode) for ref in refs]
    raise TypeError(f"get() takes an ObjectRef or a list of them, not {refs!r}")
