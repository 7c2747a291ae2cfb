"""Names that are private in multiprocessing's pools and results, and read by widely copied recipes all the same."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import multiprocessing.pool
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pool_tasks as tasks
import pytest
from executor_tasks import SOON
from support import wait_until

from shmpool.pool import Pool
from shmpool.pool.process import WorkerContext


def make_standard(workers: int) -> Any:
    return multiprocessing.get_context("fork").Pool(workers)


def make_ours(workers: int) -> Any:
    return Pool(workers, context="fork")


@pytest.fixture(params=[make_standard, make_ours])
def pool(request: pytest.FixtureRequest) -> Iterator[Any]:
    make: Callable[[int], Any] = request.param
    with make(1) as pool:
        yield pool
    pool.join()


@pytest.fixture
def gate(tmp_path: Path) -> tuple[Any, Callable[[], None]]:
    """A task that ends when a gate is opened."""
    return functools.partial(tasks.wait_for, str(tmp_path)), (tmp_path / "open").touch


def test_how_much_of_a_map_is_left(pool: Any, gate: Any) -> None:
    wait, open_gate = gate
    result = pool.map_async(wait, range(9), 2)
    assert result._number_left == 5
    assert result._value == [None] * 9
    assert result._success
    open_gate()
    assert result.get(SOON) == list(range(9))
    assert result._number_left == 0
    assert result._value == list(range(9))
    assert result._success


def wait_if_large(wait: Any, x: int) -> int:
    if x == 3:
        raise LookupError
    return wait(x) if x > 3 else x


def test_what_is_there_of_a_map(pool: Any, gate: Any) -> None:
    wait, open_gate = gate
    result = pool.map_async(functools.partial(wait_if_large, wait), [0, 1, 2, 4], 1)
    wait_until(lambda: result._number_left == 1, SOON, "three results to be there")
    assert result._value == [0, 1, 2, None]
    assert result._success
    failed = pool.map_async(functools.partial(wait_if_large, wait), [3, 4], 1)
    open_gate()
    failed.wait(SOON)
    assert isinstance(failed._value, LookupError)
    assert not failed._success


def test_what_is_known_of_one_call(pool: Any, gate: Any) -> None:
    wait, open_gate = gate
    result, failed = pool.apply_async(wait, (5,)), pool.apply_async(tasks.fail, (1,))
    for name in ("_value", "_success"):
        assert not hasattr(result, name)
    open_gate()
    failed.wait(SOON)
    assert (result._success, result._value) == (True, 5)
    assert not failed._success and isinstance(failed._value, KeyError)


@pytest.mark.parametrize("callback", [None, str])
def test_how_much_is_under_way(pool: Any, gate: Any, callback: Any) -> None:
    wait, open_gate = gate
    assert len(pool._cache) == 0 and not pool._cache
    results = [pool.apply_async(wait, (i,), callback=callback) for i in range(5)]
    assert len(pool._cache) == 5
    assert not any(result.ready() for result in pool._cache.values())
    open_gate()
    wait_until(lambda: not pool._cache, SOON, "all to be done")
    assert all(result.ready() for result in results)
    assert [result.get() for result in results] == list(range(5))


def test_a_result_counts_until_its_callback_has_returned(pool: Any, gate: Any) -> None:
    wait, open_gate = gate
    seen: list[int] = []

    def look(_: object) -> None:
        seen.append(len(pool._cache))

    pool.map_async(wait, range(6), 2, callback=look)
    assert len(pool._cache) == 1
    open_gate()
    wait_until(lambda: not pool._cache, SOON, "all to be done")
    assert seen == [1]


def test_how_much_waits_for_a_worker(gate: Any) -> None:
    """That of the standard library hands on what its pipe has room for."""
    wait, open_gate = gate
    with make_ours(1) as pool:
        assert pool._taskqueue.qsize() == 0 and pool._taskqueue.empty()
        results = [pool.apply_async(wait, (i,)) for i in range(500)]
        wait_until(lambda: pool._taskqueue.qsize() < 500, SOON, "the worker to be sent some")
        assert pool._taskqueue.qsize() > 400 and not pool._taskqueue.empty()
        open_gate()
        assert sum(result.get(SOON) for result in results) == sum(range(500))
        assert pool._taskqueue.qsize() == 0
    pool.join()
    assert object.__new__(Pool)._taskqueue.qsize() == len(object.__new__(Pool)._cache) == 0


def test_the_state_may_be_set_as_code_does_that_wants_no_more_tasks() -> None:
    with Pool(1, context="fork") as pool:
        pool._state = multiprocessing.pool.CLOSE
        with pytest.raises(ValueError, match="Pool not running"):
            pool.apply(abs, (-1,))
        pool._state = multiprocessing.pool.RUN
        assert pool.apply(abs, (-1,)) == 1
    pool.join()


def test_the_workers_context_can_be_copied() -> None:
    again = copy.copy(WorkerContext(multiprocessing.get_context("fork")))
    assert again.get_start_method() == "fork"
    assert again.Process(target=abs).name.startswith("ForkPoolWorker")
