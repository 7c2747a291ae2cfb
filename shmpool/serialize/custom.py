"""One idea: a class that cannot be pickled travels as something that can, by two functions of the user's.

``serializer(obj)`` gives a state that can be pickled; ``deserializer(state)`` makes an object of it on the other
side.  Both stay in one table, class by class.

Rules
-----
* The deserialiser is part of the payload: whoever receives an object needs no registration, whatever the start
  method.  An importable deserialiser is pickled by its name, any other (a lambda, a closure, a function of
  ``__main__``) by value, which takes a cloudpickle pickler around it.
* Exact classes only, as with :mod:`copyreg`: an instance of a subclass is not concerned.  A base's deserialiser would
  give back an instance of the base, without the subclass's own attributes and without a word.
* The table is replaced, never changed: whoever took it from :func:`registered` has a consistent view, without a lock.

Guarantees
----------
* Registering again replaces; deregistering what is not registered does nothing.
* Pickle's memo works as ever: an object that occurs twice in one payload is serialised once and stays one object.
  Large buffers inside the state travel as they do anywhere else.
* A forked child has the table of its parent, also if another thread was registering at that moment.
"""

from __future__ import annotations

import os
import pickle
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

__all__ = [
    "Reducer",
    "adopt",
    "deregister_serializer",
    "has_custom",
    "reduce_custom",
    "register_serializer",
    "registered",
]

T = TypeVar("T")

# The C pickler (3.11 to 3.13, tried one by one) has built-in ways for these and never looks at a dispatch table;
# cloudpickle's reducer_override takes functions and classes, of any metaclass, before the table is asked.
_BUILT_IN_WAYS: frozenset[type] = frozenset(
    {
        type(None), bool, int, float, str, bytes, bytearray, pickle.PickleBuffer,
        list, tuple, dict, set, frozenset, types.FunctionType,
    }
)  # fmt: skip


class Reducer:
    """How the instances of one class travel: what pickle calls a reduction function.

    Parameters
    ----------
    cls : type
        The class, for what is said when something fails.
    serializer, deserializer : callable
        As given to :func:`register_serializer`.
    """

    __slots__ = ("cls", "deserializer", "serializer")

    def __init__(
        self, cls: type, serializer: Callable[[Any], Any], deserializer: Callable[[Any], Any]
    ) -> None:
        self.cls = cls
        self.serializer = serializer
        self.deserializer = deserializer

    def __call__(self, obj: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Reduce one instance: what pickle calls."""
        try:
            state = self.serializer(obj)
        except Exception as error:
            error.add_note(f"raised by the serializer registered for {self.cls.__qualname__}")
            raise
        return _rebuild, (self.deserializer, state)

    def __repr__(self) -> str:
        return f"Reducer({self.cls!r}, {self.serializer!r}, {self.deserializer!r})"


_reducers: dict[type, Reducer] = {}
_lock = threading.Lock()  # held by writers only, around the replacement of _reducers


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    # The thread that held the lock does not exist in the child.
    os.register_at_fork(after_in_child=_new_lock)


def register_serializer(
    cls: type[T], *, serializer: Callable[[T], Any], deserializer: Callable[[Any], T]
) -> None:
    """Teach instances of a class to travel between processes.

    Registered functions come before the class's own ``__reduce__`` and ``__getstate__``, and before :mod:`copyreg`.

    Parameters
    ----------
    cls : type
        The class.  Exactly this one: register subclasses on their own.
    serializer : callable
        ``serializer(obj)`` gives the state that travels: anything that can be pickled, large arrays included (they
        go through shared memory).  It must not contain `obj` itself.
    deserializer : callable
        ``deserializer(state)`` makes an object of it in the receiving process.  It travels with the payload, so
        workers need no registration; a lambda or a closure will do.

    Raises
    ------
    TypeError
        `cls` is no class, or one that pickle handles by itself (``dict``, ``str``, functions, classes, ...) without
        ever asking; or a function is not callable.

    See Also
    --------
    deregister_serializer : The opposite.
    shmpool.inspect_serializability : Which object is in the way.

    Notes
    -----
    Where only one object is concerned, a small class around it, with a ``__reduce__`` of its own, does without
    registration.

    What a worker sends back is serialised in the worker: under any start method other than fork, an instance of
    `cls` in a result needs the registration there too, for example in the executor's `initializer` or in a module
    that the worker imports.

    Examples
    --------
    >>> import sqlite3
    >>> class Database:
    ...     def __init__(self, path):
    ...         self.path, self.connection = path, sqlite3.connect(path)
    >>> register_serializer(Database, serializer=lambda db: db.path, deserializer=Database)
    >>> deregister_serializer(Database)
    """
    if not isinstance(cls, type):
        raise TypeError(f"cls must be a class, not {cls!r}")
    if cls in _BUILT_IN_WAYS or issubclass(cls, type):
        raise TypeError(
            f"a serializer for {cls!r} would never be called: pickle handles this type by itself; "
            "register a class of your own that wraps it"
        )
    for role, function in (("serializer", serializer), ("deserializer", deserializer)):
        if not callable(function):
            raise TypeError(f"{role} must be callable with one argument, not {function!r}")
    _replace(cls, Reducer(cls, serializer, deserializer))


def deregister_serializer(cls: type) -> None:
    """Forget what :func:`register_serializer` was told about a class.

    Parameters
    ----------
    cls : type
        The class; no error if it is not registered.

    Raises
    ------
    TypeError
        `cls` is no class.
    """
    if not isinstance(cls, type):
        raise TypeError(f"cls must be a class, not {cls!r}")
    _replace(cls, None)


def registered() -> dict[type, Reducer]:
    """The table of reduction functions, by class, fit for a pickler's ``dispatch_table``.

    Returns
    -------
    dict
        Not to be changed; a later registration makes a new one and leaves this one as it is.
    """
    return _reducers


def adopt(reducers: Iterable[Reducer]) -> None:
    """Take over registrations of another process, ``registered().values()`` there; those made here come first."""
    global _reducers
    with _lock:
        _reducers = {**{reducer.cls: reducer for reducer in reducers}, **_reducers}


def has_custom() -> bool:
    """Whether any class is registered, at the price of one look."""
    return bool(_reducers)


def reduce_custom(obj: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The reduction of one object whose class is registered, as ``__reduce__`` would return it.

    Raises
    ------
    KeyError
        Its class is not registered.
    """
    return _reducers[type(obj)](obj)


def _replace(cls: type, reducer: Reducer | None) -> None:
    global _reducers
    with _lock:
        table = dict(_reducers)
        if reducer is None:
            table.pop(cls, None)
        else:
            table[cls] = reducer
        _reducers = table


def _rebuild(deserializer: Callable[[Any], Any], state: Any) -> Any:
    # Runs in the receiving process, named in every payload of a registered class.
    try:
        return deserializer(state)
    except Exception as error:
        name = getattr(deserializer, "__qualname__", type(deserializer).__qualname__)
        error.add_note(f"raised by the deserializer {name}, registered with register_serializer")
        raise
