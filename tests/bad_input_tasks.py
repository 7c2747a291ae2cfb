"""Objects that misbehave when they are pickled or unpickled, tasks that end in odd ways. Workers import this module."""

from __future__ import annotations

import asyncio
import concurrent.futures
import faulthandler
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np

# Deeds, to be done at some moment.


def complain() -> NoReturn:
    raise LookupError("on purpose")


def leave() -> NoReturn:
    sys.exit(3)


def interrupt() -> NoReturn:
    raise KeyboardInterrupt


def close_generator() -> NoReturn:
    raise GeneratorExit


def recurse() -> NoReturn:
    recurse()


class Locked(BaseException):
    """An exception that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__(threading.Lock())


def complain_with_a_lock() -> NoReturn:
    raise Locked


def vanish() -> NoReturn:
    os._exit(3)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def crash() -> None:
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler._sigsegv()


RAISING: tuple[Callable[[], object], ...] = (complain, leave, interrupt, close_generator, recurse)
DEADLY: tuple[Callable[[], object], ...] = (vanish, be_killed, crash)


class WhenUnpickled:
    """Does its deed in ``__setstate__``."""

    def __init__(self, deed: Callable[[], object]) -> None:
        self.deed = deed
        self.array = np.ones(20_000)

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["deed"]()


class WhenPickled:
    """Does its deed in ``__getstate__``, in this process or in a worker."""

    def __init__(self, deed: Callable[[], object]) -> None:
        self.deed = deed

    def __getstate__(self) -> object:
        self.deed()
        return {}


class Reduces:
    """Is reduced to whatever it is told."""

    def __init__(self, make: Callable[[Reduces], Any]) -> None:
        self._make = make

    def __reduce__(self) -> Any:
        return self._make(self)


def _failing_items() -> Iterator[int]:
    yield 1
    raise LookupError("in the middle")


#: What no ``__reduce__`` may return, and what pickle finds out only later.
REDUCTIONS: dict[str, Callable[[Reduces], Any]] = {
    "a name that is not there": lambda _: "no_such_name",
    "nothing": lambda _: None,
    "too short": lambda _: (list,),
    "too long": lambda _: (list, (), None, None, None, None, None),
    "no callable": lambda _: (5, ()),
    "no arguments": lambda _: (list, None),
    "a lock": lambda _: (list, (threading.Lock(),)),
    "items that fail": lambda _: (list, (), None, _failing_items()),
    "items that are none": lambda _: (list, (), None, 5),
    "a state that fits nothing": lambda _: (object, (), {"a": 1}),
    "a call that fails": lambda _: (int, ("no number",)),
    "another of its kind": lambda it: (list, ([Reduces(it._make)],)),  # and so on
    "itself": lambda it: (list, ([it],)),
}


class Mute:
    """Can be neither pickled nor shown."""

    def __reduce__(self) -> NoReturn:
        complain()

    def __repr__(self) -> str:
        complain()


def give_reduced(name: str) -> Reduces:
    return Reduces(REDUCTIONS[name])


def give(make: Callable[..., Any], *args: Any) -> Any:
    return make(*args)


def do(deed: Callable[[], object]) -> None:
    deed()


def take(*_: Any) -> str:
    return "taken"


# Exceptions.


class Unspeakable(Exception):
    """Cannot even be printed."""

    def __str__(self) -> str:
        raise LookupError("no text")

    __repr__ = __str__


class TakesTwo(Exception):
    """Cannot be unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one)


class HoldsALock(Exception):
    def __init__(self) -> None:
        super().__init__("it holds a lock")
        self.lock = threading.Lock()


class BecomesText(Exception):
    def __reduce__(self) -> Any:
        return str, ("no exception",)


class DoesWhenUnpickled(Exception):
    def __init__(self, deed: Callable[[], object]) -> None:
        super().__init__("bad")
        self.deed = deed

    def __reduce__(self) -> Any:
        return self.deed, ()


def _cycle() -> Exception:
    error = ValueError("outer")
    error.__cause__ = KeyError("inner")
    error.__cause__.__cause__ = error
    return error


#: What a task may raise, by name.
ERRORS: dict[str, Callable[[], BaseException]] = {
    "an exit": lambda: SystemExit(5),
    "an exit with an object": lambda: SystemExit({"a": np.ones(20_000)}),
    "an interrupt": KeyboardInterrupt,
    "the end of a generator": GeneratorExit,
    "the end of an iterator": lambda: StopIteration("value"),
    "a cancellation": concurrent.futures.CancelledError,
    "a cancellation of asyncio's": asyncio.CancelledError,
    "a lack of memory": MemoryError,
    "a group": lambda: BaseExceptionGroup("group", [SystemExit(1), ValueError("x")]),
    "one that cannot be printed": Unspeakable,
    "one that cannot be unpickled": lambda: TakesTwo(1, 2),
    "one that cannot be pickled": HoldsALock,
    "one that becomes something else": BecomesText,
    "one that raises when it arrives": lambda: DoesWhenUnpickled(complain),
    "one that exits when it arrives": lambda: DoesWhenUnpickled(leave),
    "one that recurses when it arrives": lambda: DoesWhenUnpickled(recurse),
    "one with a large array": lambda: ValueError(np.ones(200_000)),
    "one that is its own cause": _cycle,
}


def fail(name: str) -> None:
    raise ERRORS[name]()  # noqa: RSE102  # not all of them are classes


# Sizes.


def size_and_ends(value: Any) -> tuple[int, Any, Any]:
    """What a task sees of something very large."""
    return len(value), value[0], value[-1]


def make_bytes(number: int) -> bytes:
    return b"a" * (number - 1) + b"z"


def make_text(number: int) -> str:
    return "a" * (number - 1) + "z"


def fill_in(number: int) -> Any:
    """A very large array that costs few pages of the worker's own, beside those of the store."""
    import shmpool

    array = shmpool.zeros(number, np.uint8)
    array[0], array[-1] = 1, 2
    return array
