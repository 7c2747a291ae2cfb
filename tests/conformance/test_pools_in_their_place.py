"""What tests of ``multiprocessing.Pool`` in ``differences.py`` are about, where shmpool promises it too."""

from __future__ import annotations

import multiprocessing
from multiprocessing.pool import MaybeEncodingError
from typing import Any

import pytest
from support import TIMEUNIT

from shmpool.pool import Pool

SOON = 60 * TIMEUNIT


def generator() -> Any:
    """What cannot travel at all; a lambda can."""
    return (i for i in range(3))


@pytest.fixture(params=["fork", "forkserver", "spawn"])
def method(request: pytest.FixtureRequest) -> str:
    """The start methods that CPython's tests are run under."""
    return str(request.param)


def test_results_that_cannot_be_pickled_cost_no_workers(method: str) -> None:
    """``test_unpickleable_result``."""
    pool = Pool(2, context=method)
    workers = pool._pool
    for _ in range(20):
        seen: list[BaseException] = []
        result = pool.apply_async(generator, error_callback=seen.append)
        with pytest.raises(MaybeEncodingError) as caught:
            result.get(SOON)
        assert seen == [caught.value]
        assert "generator" in caught.value.value
        assert "TypeError" in caught.value.exc
    assert pool._pool == workers
    pool.close()
    pool.join()


class LimitedContext:
    """A context that has no more processes after some."""

    def __init__(self, method: str, limit: int) -> None:
        self._context: Any = multiprocessing.get_context(method)
        self._limit = limit
        self.made: list[Any] = []

    def Process(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802  # multiprocessing's name
        if len(self.made) == self._limit:
            raise OSError("no more processes")
        self.made.append(self._context.Process(*args, **kwargs))
        return self.made[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


@pytest.mark.parametrize("limit", [0, 3])
def test_processes_are_not_left_when_one_cannot_be_started(method: str, limit: int) -> None:
    """``test_release_unused_processes``."""
    context = LimitedContext(method, limit)
    with pytest.raises(OSError, match="no more processes"):
        Pool(5, context=context)
    assert len(context.made) == limit
    assert not any(process.is_alive() for process in context.made)
