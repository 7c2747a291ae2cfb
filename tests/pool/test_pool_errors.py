"""What goes wrong in a task, or on its way: the standard library's errors, and never a hang."""

from __future__ import annotations

import functools
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pool_tasks as tasks
import pytest
from executor_tasks import SOON
from pool_tasks import METHODS, Unpicklable, warm_pool

import shmpool
from shmpool.pool import EncodingError, Pool


@pytest.fixture(scope="module", params=METHODS)
def pool(request: pytest.FixtureRequest, temporary_folder: object) -> Iterator[Pool]:
    with warm_pool(request.param) as pool:
        yield pool


def by_apply(pool: Pool, fn: Callable[..., Any], arg: Any = 0) -> Any:
    return pool.apply(fn, (arg,))


def by_apply_async(pool: Pool, fn: Callable[..., Any], arg: Any = 0) -> Any:
    return pool.apply_async(fn, (arg,)).get(SOON)


def by_map(pool: Pool, fn: Callable[..., Any], arg: Any = 0) -> Any:
    return pool.map(fn, [arg], 1)[0]


def by_map_in_chunks(pool: Pool, fn: Callable[..., Any], arg: Any = 0) -> Any:
    return pool.map_async(fn, [arg, arg], 2).get(SOON)[0]


def by_starmap(pool: Pool, fn: Callable[..., Any], arg: Any = 0) -> Any:
    return pool.starmap(fn, [(arg,)] * 4, 2)[0]


def by_imap(pool: Pool, fn: Callable[..., Any], arg: Any = 0) -> Any:
    return next(pool.imap(fn, [arg]))


def by_imap_in_chunks(pool: Pool, fn: Callable[..., Any], arg: Any = 0) -> Any:
    return next(pool.imap(fn, iter([arg, arg]), 2))


def by_imap_unordered(pool: Pool, fn: Callable[..., Any], arg: Any = 0) -> Any:
    return next(pool.imap_unordered(fn, iter([arg])))


WAYS = [
    by_apply, by_apply_async, by_map, by_map_in_chunks, by_starmap, by_imap, by_imap_in_chunks, by_imap_unordered,
]  # fmt: skip
every_way = pytest.mark.parametrize("call", WAYS)
Call = Callable[..., Any]


@every_way
def test_what_a_task_raises_has_a_remote_traceback_as_its_cause(pool: Pool, call: Call) -> None:
    with pytest.raises(KeyError) as caught:
        call(pool, tasks.fail, "key")
    assert caught.value.args == ("key",)
    cause = caught.value.__cause__
    assert type(cause) is multiprocessing.pool.RemoteTraceback
    assert "raise KeyError(x)" in cause.tb
    assert "raise KeyError(x)" in "".join(traceback.format_exception(caught.value))
    assert call(pool, tasks.square, 3) == 9


@every_way
def test_a_result_that_cannot_be_pickled_is_a_maybe_encoding_error(pool: Pool, call: Call) -> None:
    with pytest.raises(multiprocessing.pool.MaybeEncodingError) as caught:
        call(pool, tasks.return_unpicklable)
    error = caught.value
    assert isinstance(error, EncodingError)
    assert isinstance(error, shmpool.SerializationError)
    assert "<an unpicklable>" in error.value
    assert error.exc == "RuntimeError('on purpose')"
    assert str(error).startswith(f"Error sending result: '{error.value}'. Reason: '{error.exc}'")
    assert error.what == "the result" and "on purpose" in error.reason
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.value, again.culprit) == (str(error), error.value, error.culprit)


@every_way
def test_an_exception_that_cannot_be_pickled_is_a_maybe_encoding_error(
    pool: Pool, call: Call
) -> None:
    with pytest.raises(EncodingError) as caught:
        call(pool, tasks.raise_unpicklable)
    assert caught.value.value == "UnpicklableError('too odd')"
    assert caught.value.what == "the exception"
    assert "raise UnpicklableError" in "".join(traceback.format_exception(caught.value))


@every_way
@pytest.mark.parametrize("kind", [RuntimeError, TypeError, pickle.PicklingError])
def test_an_argument_that_cannot_be_pickled_raises_what_the_pickler_raised(
    pool: Pool, call: Call, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="on purpose") as caught:
        call(pool, tasks.identity, {"deep": [Unpicklable(kind)]})
    (note,) = caught.value.__notes__
    assert "['deep'][0]" in note and "inspect_serializability" in note


def test_a_function_that_cannot_be_pickled_says_so_once(pool: Pool) -> None:
    bound = functools.partial(tasks.add, Unpicklable())
    with pytest.raises(RuntimeError, match="on purpose") as caught:
        pool.map(bound, range(20), 1)
    assert len(caught.value.__notes__) == 1


@every_way
def test_a_pool_cannot_be_sent(pool: Pool, call: Call) -> None:
    with pytest.raises(NotImplementedError, match="pool objects cannot be passed"):
        call(pool, tasks.identity, pool)
    with pytest.raises(NotImplementedError, match="pool objects cannot be passed"):
        pickle.dumps(pool)


@every_way
def test_an_exit_in_a_task_is_no_end_of_the_worker(pool: Pool, call: Call) -> None:
    workers = pool._pool
    with pytest.raises(SystemExit):
        call(pool, exit, 3)
    assert pool._pool == workers


@pytest.mark.parametrize("chunksize", [1, 2])
def test_map_waits_for_all_tasks_and_raises_the_first_error(
    pool: Pool, tmp_path: Path, chunksize: int
) -> None:
    def run(x: int) -> int:
        tasks.touch(str(tmp_path), x)
        return tasks.fail_at(x, x - x % 3)  # 0, 3, 6, ... fail

    with pytest.raises(KeyError) as caught:
        pool.map(run, range(12), chunksize)
    assert caught.value.args == (0,)
    expected = range(12) if chunksize == 1 else [0, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == list(expected)


class Broken:
    """An iterable that raises at some point, and lies about its length."""

    def __init__(self, good: int) -> None:
        self._good = good

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[int]:
        yield from range(self._good)
        raise LookupError("no more")


@pytest.mark.parametrize("chunksize", [1, 3])
@pytest.mark.parametrize("good", [0, 4])
def test_what_the_iterable_raises_is_raised_as_it_is(pool: Pool, good: int, chunksize: int) -> None:
    for method in (pool.map, pool.starmap):
        for iterable in (iter(Broken(good)), Broken(good)):
            with pytest.raises(LookupError, match="no more") as caught:
                method(tasks.square, ((i,) for i in iterable), chunksize)
            assert caught.value.__cause__ is None
    with pytest.raises(LookupError, match="no more"):
        pool.map_async(tasks.square, Broken(good), chunksize).get(SOON)
    results = pool.imap(tasks.square, Broken(good), chunksize)
    for i in range(good - good % chunksize):
        assert next(results) == i * i
    with pytest.raises(LookupError, match="no more"):
        next(results)
    assert list(results) == []
    found = []
    unordered = pool.imap_unordered(tasks.square, Broken(good), chunksize)
    with pytest.raises(LookupError, match="no more"):
        found.extend(unordered)
    assert set(found) <= {0, 1, 4, 9}


def test_what_is_no_iterable_is_a_type_error(pool: Pool) -> None:
    for method in (pool.map, pool.starmap):
        with pytest.raises(TypeError):
            method(tasks.square, 5)  # type: ignore[arg-type]
    for method in (pool.imap, pool.imap_unordered):
        with pytest.raises(TypeError):
            next(method(tasks.square, 5))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        pool.apply(5)  # type: ignore[arg-type]


def test_after_an_error_imap_goes_on(pool: Pool) -> None:
    fn = functools.partial(tasks.fail_at, bad=2)
    results = pool.imap(fn, range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError):
        next(results)
    assert list(results) == [3, 4]


def stop_at_three(i: int) -> int:
    if i == 3:
        raise StopIteration
    return i


@pytest.mark.parametrize("chunksize", [1, 5])
def test_a_task_that_raises_stop_iteration_does_not_shorten_the_results(chunksize: int) -> None:
    with Pool(1) as pool:
        with pytest.raises((StopIteration, RuntimeError), match=r"3|^$"):
            pool.map(stop_at_three, range(10), chunksize)
        assert pool.map(stop_at_three, range(3), chunksize) == [0, 1, 2]
