"""The functions of calls: unpickled for each of them, unless that would make the same again.

A task may change what it is given, and the next must not see it.  So each gets its own function, with all that is
bound to it.  But where that is a ``partial`` of a named function with arrays and numbers, what a task can have done to
it can be told: it has kept something of it (then there are more references), or written to an array (then its pages
tell).  If neither, the function is what unpickling it would make, and is kept for the next call, if that is the next
message.

The parent knows nothing of this.  It holds the function's blocks as long as there are calls of it under way, and when
there are none may use them for something else, without a word.  Nobody reads what is kept here until a call of the
same function comes, by the number that the parent gives to each function that it pickles; then the blocks have been
held all the time.  Whatever else comes, or when nothing comes, it is let go of first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np

from shmpool.memory.segment import Mode
from shmpool.serialize.atoms import ATOMS
from shmpool.serialize.pickling import FOUND_BY_NAME
from shmpool.store.blocks import Block
from shmpool.store.books import Payload
from shmpool.store.leases import Lease
from shmpool.store.peer import Peer
from shmpool.store.refs import ObjectRef
from shmpool.store.store import ObjectStore
from shmpool.wire.messages import Call, FromParent
from shmpool.worker.chunks import Chunk

__all__ = ["Function", "Functions"]

#: Types of what may be found by a name.
_NAMED = frozenset({FunctionType, BuiltinFunctionType, type, np.ufunc, type(np.sum)})
#: In bytes. Arrays that are not in the store, but came in the message, are copied and compared.
_SMALL = 1 << 17


class Function:
    """A call's function, on its way from the message to its end.

    Attributes
    ----------
    serial : int
        The parent's number for it; 0: it comes once.
    mode : {"c", "r"}
        How its arrays are mapped.
    payload : Payload
    fn : callable or None
        Unpickled, if it is yet.
    watched : Watched or None
        What a task could have changed; None: it is not known whether one has.
    """

    __slots__ = ("fn", "mode", "payload", "serial", "watched")

    def __init__(self, serial: int, mode: Mode, payload: Payload) -> None:
        self.serial = serial
        self.mode = mode
        self.payload = payload
        self.fn: Callable[..., Any] | None = None
        self.watched: _Watched | None = None


class Functions:
    """The functions of the calls to a worker, one after the other.

    Parameters
    ----------
    store : ObjectStore
    parent : Peer
        Who sends them.
    """

    __slots__ = ("_kept", "_last_serial", "_named", "_parent", "_store")

    def __init__(self, store: ObjectStore, parent: Peer) -> None:
        self._store = store
        self._parent = parent
        self._kept: Function | None = None
        self._last_serial = 0
        #: The last one that is found by name: nothing of it is in a call, and it is used as it is.
        self._named: Function | None = None

    @property
    def keeps_one(self) -> bool:
        """Is a function kept that is not to be kept for longer than until the next message?"""
        return self._kept is not None

    def expect(self, message: FromParent) -> None:
        """Before anything else is done about a message: keep a function for that only if it is a call of it."""
        kept = self._kept
        if kept is not None and not (
            isinstance(message, Call)
            and message.serial == kept.serial
            and message.readonly == (kept.mode == "r")
        ):
            self.forget()

    def receive(self, call: Call) -> Function:
        """The function of a call, its blocks held; not unpickled, unless it is the one that was kept.

        The call was expected (:meth:`expect`).

        Raises
        ------
        WireError
            It is no payload.
        """
        mode: Mode = "r" if call.readonly else "c"
        if self._kept is not None:
            return self._kept
        named = self._named
        if named is not None and named.mode == mode and named.payload.data == call.function:
            return named
        return Function(call.serial, mode, self._store.receive(call.function, self._parent))

    def load(self, function: Function) -> Callable[..., Any]:
        """Unpickle it, if need be.  One that is found by name (no state of its own) is looked up once."""
        if function.fn is not None:
            return function.fn
        data = function.payload.data
        fn: Callable[..., Any] = self._store.load(function.payload, function.mode)
        if not function.payload.blocks and bytes(data[-3:]) == FOUND_BY_NAME:
            function.payload.data = bytes(data)  # the message's buffer has others next
            function.fn = fn
            self._named = function
        elif function.serial and function.serial == self._last_serial:
            # Not for the first call of it: there may be no other.
            function.watched = _Watched.of(fn, self._store)
            if function.watched is not None:
                function.watched.begin()
                function.fn = fn
        self._last_serial = function.serial
        return fn

    def done(self, function: Function, arguments: Sequence[Block]) -> Sequence[Block]:
        """A call has ended, and its result is gone: keep the function or let go of it.

        Parameters
        ----------
        function : Function
        arguments : sequence of Block
            Of the call's arguments.

        Returns
        -------
        sequence of Block
            Those of the function, if it was let go of.
        """
        if function is self._named:
            return ()
        blocks = function.payload.blocks
        # If its blocks are the arguments', too: whether those are kept by the task could not be told.
        if (
            function.watched is not None
            and not (arguments and not {*arguments}.isdisjoint(blocks))
            and function.watched.is_unchanged()
        ):
            self._kept = function
            return ()
        self._kept = None
        function.fn = function.watched = None
        function.payload.release()
        return blocks

    def forget(self) -> None:
        """Keep no function any more."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.fn = kept.watched = None
            kept.payload.release()


class _Watched:
    """What a call of a function can have changed: how it was when nobody had called it.

    Parameters
    ----------
    arrays : list of ndarray
        All that are bound to it.
    refs : list of ObjectRef
    leases : list of Lease
        Of the arrays that are private views.
    small : list of ndarray
        The arrays whose contents are to be compared.
    store : ObjectStore
    """

    __slots__ = (
        "_arrays",
        "_bytes",
        "_counts",
        "_forms",
        "_leases",
        "_objects",
        "_small",
        "_store",
    )

    def __init__(
        self,
        arrays: list[np.ndarray],
        refs: list[ObjectRef],
        leases: list[Lease],
        small: list[np.ndarray],
        store: ObjectStore,
    ) -> None:
        self._store = store
        self._arrays = arrays
        self._leases = leases
        self._small = small
        self._bytes = [array.tobytes() for array in small]
        self._forms = [_form(array) for array in arrays]
        # A view of an array refers to it, or to what that is a view of itself.
        self._objects: list[object] = [*refs]
        for array in arrays:
            self._objects += _bases(array)
        self._counts: list[int] = []

    def begin(self) -> None:
        """Count the references; what has looked at them is gone."""
        self._counts = list(map(sys.getrefcount, self._objects))

    @classmethod
    def of(cls, fn: Callable[..., Any], store: ObjectStore) -> _Watched | None:
        """Of a function that has just been unpickled; None where something is bound to it that is not known here."""
        arrays: list[np.ndarray] = []
        refs: list[ObjectRef] = []
        leases: list[Lease] = []
        small: list[np.ndarray] = []
        for value in _bound(fn):
            kind = type(value)
            if kind is ObjectRef:
                refs.append(value)
            elif kind is not np.ndarray or value.dtype.hasobject:
                return None
            else:
                arrays.append(value)
                lease = store.lease_of(value)
                if lease is None:
                    if value.nbytes > _SMALL:
                        return None
                    small.append(value)
                elif lease.private:
                    leases.append(lease)
        return cls(arrays, refs, leases, small, store)

    def is_unchanged(self) -> bool:
        """Is all as it was?  What this says no to may be unchanged all the same."""
        for count, before in zip(map(sys.getrefcount, self._objects), self._counts, strict=True):
            if count != before:
                return False
        for array, form in zip(self._arrays, self._forms, strict=True):
            if _form(array) != form:
                return False
        for array, contents in zip(self._small, self._bytes, strict=True):
            if array.tobytes() != contents:
                return False
        return all(map(self._store.is_clean, self._leases))


def _bound(fn: Any) -> Iterator[Any]:
    """What is bound to a function that a call could change; or that is not known: then something else than an array."""
    while isinstance(fn, Chunk):
        fn = fn.fn
    if type(fn) is not partial or fn.__dict__ or not _is_named(fn.func):
        yield fn
    else:
        todo = [*fn.args, *fn.keywords.values()]
        for value in todo:
            kind = type(value)
            if kind is tuple:
                todo += value
            elif not (kind in ATOMS or _is_named(value)):
                yield value


def _is_named(value: Any) -> bool:
    """Is it what is found by its name, so that all of a process share it anyway?"""
    if type(value) not in _NAMED:
        return False  # to ask for its name could run code of the user's
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not (isinstance(module, str) and isinstance(name, str)):
        return False
    return module in sys.modules and vars(sys.modules[module]).get(name) is value


def _bases(array: np.ndarray) -> Iterator[object]:
    """The array and all that its memory comes from, as far as the mapping."""
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        yield base
        base = base.obj if isinstance(base, memoryview) else base.base


def _form(array: np.ndarray) -> tuple[Any, ...]:
    return array.dtype, array.shape, array.strides, array.flags.writeable
