"""AsyncResult, MapResult and callbacks: ready, wait, get, in which order, and what is kept alive."""

from __future__ import annotations

import functools
import gc
import logging
import multiprocessing
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pool_tasks as tasks
import pytest
from executor_tasks import SOON
from pool_tasks import warm_pool
from support import wait_until

import shmpool
from shmpool.pool import Pool


@pytest.fixture(scope="module")
def pool(temporary_folder: object) -> Iterator[Pool]:
    with warm_pool("fork") as pool:
        yield pool


@pytest.fixture
def single() -> Iterator[Pool]:
    """A pool with one worker: tasks are done in the order in which they were asked for."""
    with Pool(1, context="fork") as pool:
        yield pool
    pool.join()


KINDS = ["apply_async", "map_async", "starmap_async", "with callbacks"]


def start(pool: Pool, kind: str, fn: Any, arg: Any) -> Any:
    if kind == "apply_async":
        return pool.apply_async(fn, (arg,))
    if kind == "map_async":
        return pool.map_async(fn, [arg, arg])
    if kind == "starmap_async":
        return pool.starmap_async(fn, [(arg,)] * 5, 5)
    return pool.apply_async(fn, (arg,), callback=lambda _: None, error_callback=lambda _: None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_is_ready_when_it_is_there(pool: Pool, kind: str, tmp_path: Path) -> None:
    result = start(pool, kind, functools.partial(tasks.wait_for, str(tmp_path)), 7)
    assert not result.ready()
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    for seconds in (0, -1, 0.01):
        assert result.wait(seconds) is None
        with pytest.raises(multiprocessing.TimeoutError):
            result.get(timeout=seconds)
    (tmp_path / "open").touch()
    result.wait(SOON)
    assert result.ready()
    assert result.successful()
    value = result.get(0)
    assert value in (7, [7, 7], [7] * 5)
    assert result.get() is value


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_that_failed_is_ready_and_raises_each_time(pool: Pool, kind: str) -> None:
    result = start(pool, kind, tasks.fail, "key")
    for _ in range(2):
        with pytest.raises(KeyError) as caught:
            result.get(SOON)
    result.wait()
    assert result.ready()
    assert not result.successful()
    assert type(caught.value.__cause__) is multiprocessing.pool.RemoteTraceback


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_threads_may_wait_for_a_result(pool: Pool, kind: str, tmp_path: Path) -> None:
    result = start(pool, kind, functools.partial(tasks.wait_for, str(tmp_path)), 7)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(result.get(SOON))) for _ in range(8)]
    for thread in threads:
        thread.start()
    (tmp_path / "open").touch()
    for thread in threads:
        thread.join(SOON)
    assert found == [result.get()] * 8


def test_a_timeout_of_a_task_is_no_timeout_of_get(pool: Pool) -> None:
    def too_late() -> NoReturn:
        raise TimeoutError("my own")

    for result in (pool.apply_async(too_late), pool.apply_async(too_late, callback=print)):
        with pytest.raises(TimeoutError, match="my own"):
            result.get(SOON)


# Callbacks.


def test_callbacks_get_the_value_or_the_error(pool: Pool) -> None:
    values: list[Any] = []
    errors: list[Any] = []
    both = {"callback": values.append, "error_callback": errors.append}
    pool.apply_async(tasks.square, (3,), **both).wait()
    pool.map_async(tasks.square, range(4), 1, **both).wait()
    pool.starmap_async(tasks.add, [(1, 2), (3, 4)], 2, **both).wait()
    assert (values, errors) == ([9, [0, 1, 4, 9], [3, 7]], [])
    pool.apply_async(tasks.fail, (3,), **both).wait()
    pool.map_async(functools.partial(tasks.fail_at, bad=2), range(4), 1, **both).wait()
    assert [error.args for error in errors] == [(3,), (2,)]
    assert type(errors[0].__cause__) is multiprocessing.pool.RemoteTraceback
    pool.apply_async(tasks.identity, (tasks.Unpicklable(TypeError),), **both).wait()
    assert type(errors[2]) is TypeError
    assert len(values) == 3


def test_a_missing_callback_is_not_missed(pool: Pool) -> None:
    seen: list[Any] = []
    assert pool.apply_async(tasks.square, (3,), error_callback=seen.append).get(SOON) == 9
    with pytest.raises(KeyError):
        pool.apply_async(tasks.fail, (3,), callback=seen.append).get(SOON)
    assert seen == []


def test_an_empty_map_calls_nothing_back(pool: Pool) -> None:
    """As in the standard library."""
    seen: list[Any] = []
    assert pool.map_async(tasks.square, [], callback=seen.append).get() == []
    assert seen == []


def test_callbacks_come_in_the_order_of_the_results_one_at_a_time(single: Pool) -> None:
    seen: list[tuple[int, bool]] = []
    threads: set[int] = set()
    busy = threading.Lock()

    def callback(value: int) -> None:
        alone = busy.acquire(blocking=False)
        seen.append((value, alone))
        threads.add(threading.get_ident())
        busy.release()

    results = [single.apply_async(tasks.square, (i,), callback=callback) for i in range(200)]
    results[-1].wait()  # reads answers in this thread
    for result in results:
        assert result.ready()
    assert seen == [(i * i, True) for i in range(200)]
    assert len(threads) == 1 and threads != {threading.get_ident()}


@pytest.mark.parametrize("elsewhere", [True, False])
def test_finalizers_may_ask_for_callbacks_while_their_thread_starts(
    monkeypatch: pytest.MonkeyPatch, *, elsewhere: bool
) -> None:
    """Those that run in a lock of threading's, which the start waits for; and those in the thread that starts it."""
    seen: list[int] = []
    results: list[Any] = []
    start = threading.Thread.start

    def ask() -> None:
        results.append(pool.apply_async(tasks.square, (3,), callback=seen.append))

    def interrupted(thread: threading.Thread) -> None:
        if thread.name != "shmpool-callbacks" or results:
            start(thread)
            return
        other = threading.Thread(target=ask, daemon=True)
        start(other)
        other.join(SOON / 10)
        assert not other.is_alive()
        if not elsewhere:
            ask()
        start(thread)

    with Pool(1, context="fork") as pool:
        assert pool.apply(tasks.square, (2,)) == 4
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        ask()
        assert [result.get(SOON) for result in results] == [9] * len(results)
        assert seen == [9] * len(results) == [9] * (2 if elsewhere else 3)
        pool.close()
        pool.join()


def test_a_thread_for_callbacks_that_cannot_be_started_is_an_error_and_may_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, single: Pool
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    seen: list[int] = []
    single.apply(tasks.square, (2,))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            single.apply_async(tasks.square, (3,), callback=seen.append)
    assert single.apply_async(tasks.square, (4,), callback=seen.append).get(SOON) == 16
    assert seen == [16]
    single.close()
    single.join()


def test_a_callback_has_returned_when_the_result_is_ready(pool: Pool) -> None:
    go_on = threading.Event()
    result = pool.apply_async(tasks.square, (3,), callback=lambda _: go_on.wait(SOON))
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(0.05)
    assert not result.ready()
    go_on.set()
    assert result.get(SOON) == 9


def test_a_callback_that_raises_is_logged_and_stops_nothing(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    def callback(value: int) -> None:
        if value == 0:
            raise LookupError("in the callback")
        if value == 1:
            raise SystemExit

    with caplog.at_level(logging.ERROR, "shmpool"):
        results = [pool.apply_async(tasks.square, (i,), callback=callback) for i in range(4)]
        assert [result.get(SOON) for result in results] == [0, 1, 4, 9]
    assert [record.message for record in caplog.records] == ["a callback of a pool raised"] * 2
    assert "in the callback" in caplog.text


def test_a_callback_may_use_the_pool_and_wait(pool: Pool) -> None:
    """With multiprocessing, this waits for ever."""
    seen: list[Any] = []

    def callback(value: int) -> None:
        if value < 1000:
            inner = pool.apply_async(tasks.square, (value,), callback=seen.append)
            seen.append((value, inner.get(SOON), pool.map(tasks.square, [value] * 3)))

    outer = pool.apply_async(tasks.square, (5,), callback=callback)
    assert outer.get(SOON) == 25
    assert seen[0] == (25, 625, [625] * 3)
    wait_until(lambda: seen[1:] == [625], SOON, "the inner callback")


def test_close_and_join_wait_for_callbacks() -> None:
    pool = Pool(2, context="fork")
    seen: list[int] = []

    def callback(value: int) -> None:
        time.sleep(0.001)
        seen.append(value)

    for i in range(50):
        pool.apply_async(tasks.square, (i,), callback=callback)
    pool.close()
    pool.join()
    assert sorted(seen) == [i * i for i in range(50)]


def test_a_callback_may_end_the_pool(tmp_path: Path) -> None:
    for end in (Pool.close, Pool.terminate):
        pool = Pool(2, context="fork")
        ended = threading.Event()

        def callback(_: Any, end: Any = end, pool: Pool = pool, ended: Any = ended) -> None:
            end(pool)
            pool.join()
            ended.set()

        result = pool.apply_async(tasks.square, (3,), callback=callback)
        assert ended.wait(SOON)
        pool.join()
        assert result.get(SOON) == 9
        del callback


def test_after_terminate_nothing_is_called_back(tmp_path: Path) -> None:
    seen: list[Any] = []
    both = {"callback": seen.append, "error_callback": seen.append}
    with Pool(2, context="fork") as pool:
        fn = functools.partial(tasks.wait_for, str(tmp_path))
        results = [pool.apply_async(fn, **both) for _ in range(4)]
        results.append(pool.map_async(fn, range(10), **both))
    pool.join()
    for result in results:
        with pytest.raises(shmpool.BrokenPoolError, match="terminated"):
            result.get(SOON)
        assert result.ready() and not result.successful()
    assert seen == []


# What is kept alive.


@pytest.fixture
def without_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("callback", [None, lambda _: None])
@pytest.mark.parametrize("kind", ["apply_async", "map_async"])
def test_a_result_keeps_its_value_and_lets_go_of_it(
    pool: Pool, kind: str, callback: Any, without_gc: None
) -> None:
    def ones(_: int) -> Any:
        return np.ones(1 << 14)

    if kind == "apply_async":
        result: Any = pool.apply_async(ones, (1,), callback=callback)
    else:
        result = pool.map_async(ones, [1, 2], 1, callback=callback)
    value = result.get(SOON)
    arrays = [weakref.ref(array) for array in ([value] if kind == "apply_async" else value)]
    del value
    assert all(array() is not None for array in arrays)
    gone = weakref.ref(result)
    del result
    # The thread of the callbacks may be about to let go of it.
    wait_until(lambda: gone() is None, SOON, "the result to go")
    assert not any(array() is not None for array in arrays)


@pytest.mark.parametrize("callback", [None, lambda _: None])
def test_an_error_keeps_nothing_alive(pool: Pool, callback: Any, without_gc: None) -> None:
    class Marker:
        pass

    def caller() -> weakref.ref[Marker]:
        marker = Marker()  # in a frame that the traceback goes through
        with pytest.raises(KeyError):
            pool.apply(tasks.fail, (1,))
        with pytest.raises(KeyError):
            pool.map(tasks.fail, [1, 2])
        with pytest.raises(KeyError):
            next(pool.imap(tasks.fail, [1, 2]))
        result = pool.apply_async(tasks.fail, (1,), callback=callback, error_callback=callback)
        result.wait(SOON)
        return weakref.ref(marker)

    assert caller()() is None
