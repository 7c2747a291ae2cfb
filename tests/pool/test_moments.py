"""Moments between two lines, which threads and signals rarely meet: made here without either."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing import TimeoutError as PoolTimeoutError
from types import SimpleNamespace
from typing import Any

import pytest

from shmpool.pool.arrivals import InOrder
from shmpool.pool.imap import _wait_for_room
from shmpool.pool.outcomes import Outcome, outcome_of


class Pool:
    terminated = False


class Interrupted(Future[Any]):
    """Ctrl-C comes while somebody waits for it, and so does what ends it."""

    def __init__(self, end: Callable[[Future[Any]], object]) -> None:
        super().__init__()
        self._end = end

    def result(self, timeout: float | None = None) -> Any:
        self._end(self)
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "end",
    [
        lambda future: None,
        lambda future: future.cancel(),
        lambda future: future.set_result(1),
        lambda future: future.set_exception(ValueError("of the task")),
        lambda future: future.set_exception(KeyboardInterrupt("of the task")),
    ],
    ids=["nothing", "cancelled", "returned", "raised", "interrupted too"],
)
def test_who_is_interrupted_while_a_task_ends_is_interrupted(
    end: Callable[[Future[Any]], object],
) -> None:
    future = Interrupted(end)
    with pytest.raises(KeyboardInterrupt) as caught:
        outcome_of(future, Pool())
    assert not caught.value.args, "the task's own"


def test_who_is_interrupted_while_taking_a_result_can_take_it_again() -> None:
    results = InOrder(Pool())
    results.add(Interrupted(lambda future: None))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            results.take()


class Contended(deque[Any]):
    """Another thread takes what is in it as soon as somebody has looked whether there is anything."""

    def __bool__(self) -> bool:
        there = len(self) > 0
        self.clear()
        return there


def test_what_another_thread_takes_first_is_waited_for_no_more() -> None:
    results = InOrder(Pool())
    late: Future[int] = Future()
    results.add(late)
    for _ in range(2):
        with pytest.raises(PoolTimeoutError):
            results.take(0)
    results._overdue = Contended(results._overdue)
    with pytest.raises(PoolTimeoutError):
        results.take(0)
    following: Future[int] = Future()
    following.set_result(2)
    results.add(following)
    assert results.take(0) == Outcome(True, 2)


def test_a_reader_that_goes_while_its_thread_looks_for_room_has_none() -> None:
    """It closes the window as it goes, but that was looked at before."""
    window: Any = SimpleNamespace(is_open=True, is_forgotten=True, has_room=lambda: False)
    gone: Any = lambda: None  # noqa: E731  # as its weak reference
    assert not _wait_for_room(window, gone)
