"""Workers that die, tasks that are ended, and the options that have to do with it: nobody waits for ever."""

from __future__ import annotations

import functools
import itertools
import signal
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pool_tasks as tasks
import pytest
from executor_tasks import SOON
from pool_tasks import METHODS
from support import wait_until

import shmpool
from shmpool.pool import Pool
from shmpool.pool.results import AsyncResult


@pytest.fixture(params=METHODS)
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    with Pool(2, context=request.param) as pool:
        yield pool
    pool.join()


def test_a_dead_worker_fails_its_own_task_and_is_replaced(pool: Pool) -> None:
    for number, call in enumerate(
        [
            lambda: pool.apply(tasks.die),
            lambda: pool.apply_async(tasks.die).get(SOON),
            lambda: pool.map(tasks.die, [0], 1),
            lambda: pool.starmap(tasks.die, [(0,)] * 2, 2),
            lambda: next(pool.imap(tasks.die, [0])),
            lambda: next(pool.imap_unordered(tasks.die, iter([0, 0]), 2)),
        ],
        start=1,
    ):
        with pytest.raises(shmpool.WorkerDiedError) as caught:
            call()
        assert caught.value.exitcode == -signal.SIGKILL
        assert "die" in caught.value.task
        assert pool.executor.stats().workers_died == number
    assert pool.map(tasks.square, range(4)) == [0, 1, 4, 9]
    wait_until(lambda: len(pool._pool) == 2, SOON, "the replacements")
    assert all(worker.is_alive() for worker in pool._pool)


def test_other_tasks_of_a_map_are_done_when_one_worker_dies(pool: Pool, tmp_path: Path) -> None:
    def run(x: int) -> int:
        return tasks.touch(str(tmp_path), tasks.die_at(x, 5))

    with pytest.raises(shmpool.WorkerDiedError):
        pool.map(run, range(20), 1)
    assert len(list(tmp_path.iterdir())) == 19
    results = pool.imap(functools.partial(tasks.die_at, bad=1), itertools.count())
    assert next(results) == 0
    with pytest.raises(shmpool.WorkerDiedError):
        next(results)
    assert [next(results), next(results)] == [2, 3]


def test_options_give_the_same_pool_with_other_options(pool: Pool) -> None:
    array = np.ones(1 << 15)
    workers = pool._pool
    readonly = pool.options(mmap_mode="r", retries=1)
    assert isinstance(readonly, Pool)
    assert readonly._pool == workers
    for chunksize in (1, 2):
        assert readonly.map(lambda a: a.flags.writeable, [array] * 2, chunksize) == [False] * 2
        assert pool.map(lambda a: a.flags.writeable, [array] * 2, chunksize) == [True] * 2
    assert not readonly.apply(tasks.identity, (array,)).flags.writeable


@pytest.mark.parametrize("chunksize", [1, 2])
def test_retries_run_a_task_again_when_its_worker_died(
    pool: Pool, tmp_path: Path, chunksize: int
) -> None:
    def die_once(x: int) -> int:
        if x == 3 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            tasks.die()
        return x

    assert pool.options(retries=1).map(die_once, range(6), chunksize) == list(range(6))
    assert (tmp_path / "died").exists()


def test_a_task_that_takes_too_long_is_ended(pool: Pool, tmp_path: Path) -> None:
    run = functools.partial(tasks.wait_for_at, str(tmp_path), slow=1)
    with pytest.raises(shmpool.TaskTimeoutError):
        pool.options(timeout=0.1).map_async(run, range(4), 1).get(SOON)
    assert pool.map(tasks.square, range(4)) == [0, 1, 4, 9]


@pytest.mark.parametrize("method", METHODS)
def test_an_initializer_that_raises_breaks_the_pool(method: str) -> None:
    with Pool(2, tasks.fail, ("at once",), context=method) as pool:
        for call in (
            lambda: pool.map(tasks.square, range(10)),
            lambda: pool.apply(tasks.square, (1,)),
            lambda: next(pool.imap(tasks.square, [1])),
            lambda: next(pool.imap_unordered(tasks.square, iter([1]))),
            lambda: pool.apply_async(tasks.square, (1,)).get(SOON),
        ):
            with pytest.raises(shmpool.BrokenPoolError, match="at once"):
                call()
        seen: list[BaseException] = []
        result = pool.map_async(tasks.square, [1], error_callback=seen.append)
        result.wait(SOON)
        assert isinstance(seen[0], shmpool.BrokenPoolError)
        assert not result.successful()
    pool.join()


@pytest.mark.parametrize(
    ("method", "chunksize"),
    [("fork", 1), ("fork", 2), ("forkserver", 1), ("spawn", 2), ("loky", 1)],
)
def test_maxtasksperchild_counts_tasks_of_which_a_chunk_is_one(method: str, chunksize: int) -> None:
    with Pool(1, maxtasksperchild=2, context=method) as pool:
        pids = pool.map(tasks.pid, range(6 * chunksize), chunksize)
        assert [len(list(same)) for _, same in itertools.groupby(pids)] == [2 * chunksize] * 3
        assert len(set(pids)) == 3
        (next_one,) = pool._pool
        assert next_one.pid not in pids
    pool.join()


def test_a_cancelled_task_raises_where_it_is_waited_for(pool: Pool, tmp_path: Path) -> None:
    running = pool.executor.submit(tasks.wait_for, str(tmp_path))
    result = AsyncResult([running], pool._check_running().callbacks)
    wait_until(lambda: list(tmp_path.iterdir()), SOON, "the task to begin")
    assert pool.executor.cancel_running(running)
    with pytest.raises(CancelledError):
        result.get(SOON)
    assert pool.map(tasks.square, range(4)) == [0, 1, 4, 9]
