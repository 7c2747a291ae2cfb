"""Classes and tasks of test_semantics.py.  Workers import this module, so it imports nothing that is heavy."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sqlite3
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

import shmpool

# Tasks.


def are_one(items: Any) -> tuple[bool, Any]:
    """Whether all items are the same object, as the task sees it; and the items."""
    return len({id(item) for item in items}) == 1, items


def are_the_same(*args: Any, **kwargs: Any) -> bool:
    return len({id(value) for value in (*args, *kwargs.values())}) == 1


def make_loop(size: int) -> Any:
    loop: list[Any] = [np.arange(size)]
    loop.append({"loop": loop})
    return loop


def make_nested(depth: int) -> Any:
    thing: list[Any] = []
    for _ in range(depth):
        thing = [thing]
    return thing


def make(what: str) -> Any:
    """Something that cannot travel."""
    return {"ok": 1, "bad": [UNSENDABLE[what]()]}


UNSENDABLE = {
    "lock": threading.Lock,
    "condition": threading.Condition,
    "thread-local": threading.local,
    "file": lambda: open(os.devnull),  # noqa: SIM115  # the test closes it
    "generator": lambda: (i for i in range(3)),
    "connection": lambda: sqlite3.connect(":memory:"),
    "frame": sys._getframe,
}


def say(end: Any, number: int) -> int:
    """Send a number, as one byte, through a socket or a connection."""
    os.write(end.fileno(), bytes([number]))
    return number


def _connections() -> tuple[Any, Any]:
    return multiprocessing.Pipe()


#: Two ends of something that travels, but is handed over once.
HANDED_OVER = {"socket": socket.socketpair, "connection": _connections}


def decoded() -> int:
    return Counted.times


def counted_alive() -> int:
    return len(Counted.alive)


def count_up(array: Any) -> float:
    array += 1
    return float(array[0])


def ask(database: Any) -> tuple[int, Any]:
    """The answer of one that was sent, and another one."""
    return database.answer(), Database(database.path)


def hold(guarded: Any) -> Any:
    with guarded.lock:
        guarded.values += 1
        return Guarded(guarded.values)


def total(obj: Any) -> float:
    return float(obj.array.sum())


def fail(error: BaseException) -> None:
    raise error


# Classes.


class Database:
    """Holds an open connection."""

    def __init__(self, path: str) -> None:
        self.path = path
        # A result may be unpickled in another thread than the one that looks at it.
        self.connection = sqlite3.connect(path, check_same_thread=False)

    def answer(self) -> int:
        return int(self.connection.execute("select 42").fetchone()[0])

    def __del__(self) -> None:
        self.connection.close()


class Guarded:
    """Holds a lock beside an array."""

    def __init__(self, values: Any) -> None:
        self.values = values
        self.lock = threading.Lock()


def register() -> None:
    shmpool.register_serializer(Database, serializer=lambda db: db.path, deserializer=Database)
    shmpool.register_serializer(Guarded, serializer=lambda g: g.values, deserializer=Guarded)


def deregister() -> None:
    shmpool.deregister_serializer(Database)
    shmpool.deregister_serializer(Guarded)


class Reduced:
    """Has a reduction of its own."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.lock = threading.Lock()

    def __reduce__(self) -> Any:
        return Reduced, (self.array,)


class AsPath:
    """Helps one database to travel: what arrives is a database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def __reduce__(self) -> Any:
        return Database, (self.database.path,)


class Counted:
    """Counts how often one is unpickled in this process."""

    times = 0
    alive: ClassVar[weakref.WeakSet[Counted]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.array = np.ones(20_000)

    def __setstate__(self, state: dict[str, Any]) -> None:
        Counted.times += 1
        Counted.alive.add(self)
        self.__dict__.update(state)


class Pairing:
    """An iterable of a thing, twice."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __iter__(self) -> Iterator[Any]:
        return iter((self.thing, self.thing))


class Explained(Exception):
    """Has attributes beside its arguments."""

    def __init__(self, text: str, *, array: Any) -> None:
        super().__init__(text)
        self.array = array

    def __reduce__(self) -> Any:
        return _explained, (str(self), self.array)


def _explained(text: str, array: Any) -> Explained:
    return Explained(text, array=array)
