"""Functions that are bound to arrays in test_functions.py.  Workers import this module."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

#: What tasks have kept.
kept: list[Any] = []


def look(array: np.ndarray, *bound: Any, **named: Any) -> tuple[float, tuple[int, ...], bool, Any]:
    """What there is to see of what a function is bound to."""
    others = [value.sum() if isinstance(value, np.ndarray) else repr(value) for value in bound[:-1]]
    return float(array.sum()), array.shape, array.flags.writeable, (others, named)


def read(array: np.ndarray, *_: Any, **__: Any) -> Any:
    return look(array, *_, **__)


def write(array: np.ndarray, *_: Any, **__: Any) -> Any:
    seen = look(array, *_, **__)
    array[-1] = -1
    return seen


def write_to_others(array: np.ndarray, *bound: Any, **named: Any) -> Any:
    seen = look(array, *bound, **named)
    for value in bound:
        if isinstance(value, np.ndarray):
            value[:] = 99
        elif isinstance(value, list):
            value.append("more")
    return seen


def reshape(array: np.ndarray, *_: Any, **__: Any) -> Any:
    seen = look(array, *_, **__)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of numpy's, that a later one will refuse this
        array.shape = array.shape[::-1]
    return seen


def protect(array: np.ndarray, *_: Any, **__: Any) -> Any:
    seen = look(array, *_, **__)
    array.flags.writeable = False
    return seen


def keep(array: np.ndarray, *_: Any, **__: Any) -> Any:
    """Keep it for later, and write to it then."""
    kept.append(array)
    return look(array, *_, **__)


def keep_a_view(array: np.ndarray, *_: Any, **__: Any) -> Any:
    kept.append(array[1:])
    return look(array, *_, **__)


def keep_a_buffer(array: np.ndarray, *_: Any, **__: Any) -> Any:
    kept.append(memoryview(array))
    return look(array, *_, **__)


def keep_what_it_lies_in(array: np.ndarray, *_: Any, **__: Any) -> Any:
    kept.append(array.base)
    return look(array, *_, **__)


def keep_in_a_thread(array: np.ndarray, *_: Any, **__: Any) -> Any:
    """A thread that has it, until the next task says so, and then writes to it."""
    go_on = threading.Event()

    def later() -> None:
        go_on.wait()
        array[:] = 5

    thread = threading.Thread(target=later, daemon=True)
    kept.append((go_on, thread))
    thread.start()
    return look(array, *_, **__)


def write_to_what_was_kept(array: np.ndarray, *_: Any, **__: Any) -> Any:
    while kept:
        thing = kept.pop()
        if isinstance(thing, tuple):
            go_on, thread = thing
            go_on.set()
            thread.join()
        else:
            np.asarray(thing)[..., -1] = 3
    return look(array, *_, **__)


def fail(array: np.ndarray, *_: Any, **__: Any) -> Any:
    array[0] = 7
    raise KeyError("on purpose")


DEEDS: dict[str, Callable[..., Any]] = {
    deed.__name__: deed
    for deed in (
        read,
        write,
        write_to_others,
        reshape,
        protect,
        keep,
        keep_a_view,
        keep_a_buffer,
        keep_what_it_lies_in,
        keep_in_a_thread,
        write_to_what_was_kept,
        fail,
    )
}


def do(array: np.ndarray, *bound: Any, **named: Any) -> Any:
    """Do what the last argument, that of the call, says."""
    return DEEDS[bound[-1]](array, *bound, **named)


def forget() -> None:
    """Let go of all that tasks have kept."""
    while kept:
        thing = kept.pop()
        if isinstance(thing, tuple):
            thing[0].set()
            thing[1].join()


def sum_of(array: np.ndarray, *_: Any, **__: Any) -> float:
    return float(array.sum())


def corner(array: np.ndarray, rows: int) -> np.ndarray:
    return array[:rows]
