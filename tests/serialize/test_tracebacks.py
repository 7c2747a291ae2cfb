"""The text of a worker's traceback is found whatever the exception is made of, and none of its code runs."""

from __future__ import annotations

import collections
import datetime as dt
import pickle
from concurrent.futures.process import _ExceptionWithTraceback
from typing import Any

import numpy as np
import pytest

import shmpool
from shmpool.serialize.mainmodule import MainModule
from shmpool.serialize.pickling import EXCEPTION, Pickling
from shmpool.serialize.tracebacks import traceback_in


class Unmade(Exception):
    """Whoever makes it again fails: it is given no second argument."""

    def __init__(self, one: object, two: object) -> None:
        super().__init__("what was said")
        self.parts = one, two


class Loud:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("this was called",)


def packed(error: BaseException) -> tuple[bytes, list[memoryview]]:
    try:
        raise error  # noqa: TRY301
    except BaseException as raised:
        envelope = _ExceptionWithTraceback(raised, raised.__traceback__)
    pickling = Pickling(MainModule.nothing(), lambda view: view.nbytes >= 1000)
    stream, buffers = pickling.dumps(envelope, EXCEPTION)
    return b"".join(stream), buffers


@pytest.mark.parametrize(
    "part",
    [
        Loud(),
        [1, {2: Loud()}, {3}, frozenset([4])],
        np.arange(1000.0),
        "x" * 100_000,
        "x" * 3_000_000,  # lent to the stream
        b"x" * 100_000,
        dt.datetime(2020, 1, 1, tzinfo=dt.UTC),
        collections.OrderedDict(a=collections.Counter("abc")),
        collections.deque([1, 2]),
        lambda number: number + 1,
        shmpool.WorkerDiedError,
    ],
    ids=lambda part: type(part).__name__,
)
def test_it_is_found_whatever_is_in_the_exception(part):
    text = traceback_in(*packed(Unmade(part, part)))
    assert "in packed" in text
    assert text.rstrip('\n"').endswith("Unmade: what was said")


def test_there_is_none_in_anything_else():
    assert traceback_in(pickle.dumps([1, 2]), []) == ""
    assert traceback_in(b"what is no pickle", []) == ""


def test_the_error_that_a_future_has_shows_what_the_task_has_raised():
    with shmpool.ShmExecutor(1) as executor:
        error = executor.submit(_raise).exception(60)
        assert isinstance(error, TypeError)
        assert "missing 1 required positional argument" in str(error)
        (note,) = error.__notes__
        assert "in _raise" in note
        assert note.endswith("Unmade: what was said")
        assert executor.submit(abs, -1).result(60) == 1


def _raise() -> None:
    raise Unmade(1, 2)
