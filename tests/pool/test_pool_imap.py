"""imap and imap_unordered: what is read when and by whom, how far ahead, and what becomes of what nobody takes."""

from __future__ import annotations

import functools
import gc
import itertools
import multiprocessing
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pool_tasks as tasks
import psutil
import pytest
from executor_tasks import SOON
from pool_tasks import Steps, settled
from support import wait_until

import shmpool
from shmpool.pool import Pool
from shmpool.pool.window import MOST_PER_WORKER

WORKERS = 2
MOST = WORKERS * MOST_PER_WORKER


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(WORKERS, context="fork") as pool:
        yield pool
    pool.join()


both = pytest.mark.parametrize("name", ["imap", "imap_unordered"])


def number_of_readers() -> int:
    return sum(thread.name == "shmpool-imap" for thread in threading.enumerate())


# How far ahead.


@both
def test_an_infinite_iterable_is_read_a_bounded_number_ahead(pool: Pool, name: str) -> None:
    steps = Steps()
    results = getattr(pool, name)(tasks.square, steps)
    for taken in range(1, 1000):
        value = next(results)
        assert name == "imap_unordered" or value == (taken - 1) ** 2
        assert steps.read <= taken + MOST
    del results


@both
@pytest.mark.parametrize("chunksize", [1, 3])
def test_without_a_consumer_reading_stops_at_the_bound(
    pool: Pool, name: str, chunksize: int
) -> None:
    steps = Steps()
    results = getattr(pool, name)(tasks.square, steps, chunksize)
    next(results)  # with chunks, the first of three
    wait_until(lambda: steps.read >= MOST * chunksize, SOON, "the window to be full")
    assert settled(lambda: steps.read) <= (MOST + 1) * chunksize
    del results


@both
def test_large_results_are_bounded_before_they_are_taken(
    pool: Pool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shmpool.pool.window.BYTES_AHEAD", 4 << 20)
    steps = Steps()
    results = getattr(pool, name)(lambda _: np.ones(1 << 17), steps)  # 1 MB each
    assert next(results).all()
    # Some are under way when the first is there, and a few more are begun until they are.
    assert settled(lambda: steps.read) <= 12
    for _ in range(20):
        next(results)
    assert settled(lambda: steps.read) <= 21 + 8
    del results


@both
def test_memory_stays_bounded_however_many_large_arrays_come(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 arrays of 8 MB in, and as many out: 1.6 GB, of which the processes together never have more than a part."""
    monkeypatch.setattr("shmpool.pool.window.BYTES_AHEAD", 32 << 20)
    store = shmpool.ObjectStore(config=shmpool.config.Config(warm_bytes=32 << 20))
    read, most = 0, 0

    def arrays() -> Iterator[Any]:
        nonlocal read
        for read in range(1, 101):
            yield np.full(1 << 20, float(read))

    with Pool(WORKERS, context="fork", store=store) as pool:
        before = memory_taken()
        for i, result in enumerate(getattr(pool, name)(lambda a: a + 1, arrays())):
            assert name == "imap_unordered" or result[-1] == i + 2
            if i % 20 == 0:
                settled(lambda: read)  # as far as it goes while nobody takes results
                most = max(most, memory_taken() - before)
    pool.join()
    assert read == 100
    assert most < 250e6


def memory_taken() -> int:
    """By this process and its children, each page once."""
    this = psutil.Process()
    processes = [this, *this.children(recursive=True)]
    return sum(process.memory_full_info().pss for process in processes)


# Who reads, and when.


@both
def test_an_iterable_that_blocks_holds_up_no_result(pool: Pool, name: str) -> None:
    steps = Steps()
    results = getattr(pool, name)(tasks.square, steps)
    found = [next(results)]
    steps.block()
    already = settled(lambda: steps.read)
    found += [next(results) for _ in range(already - 1)]
    assert sorted(found) == [i * i for i in range(already)]
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(timeout=0.05)
    steps.go_on()
    assert next(results) == already**2 or name == "imap_unordered"
    del results


@both
def test_an_iterable_may_wait_for_the_results(pool: Pool, name: str) -> None:
    """A crawler: what comes out goes in again."""
    to_do: queue.Queue[int | None] = queue.Queue()
    to_do.put(1)
    found = []
    for number in getattr(pool, name)(tasks.identity, iter(to_do.get, None)):
        found.append(number)
        if number < 64:
            to_do.put(2 * number)
            to_do.put(2 * number + 1)
        if len(found) == 127:
            to_do.put(None)
    assert sorted(found) == list(range(1, 128))


@both
def test_a_list_that_fits_needs_no_thread(pool: Pool, name: str) -> None:
    for iterable in ([1, 2, 3], (1, 2, 3), range(1, 4)):
        results = getattr(pool, name)(tasks.square, iterable)
        assert number_of_readers() == 0
        assert sorted(results) == [1, 4, 9]
    assert sorted(getattr(pool, name)(tasks.square, list(range(1000)))) == [
        i * i for i in range(1000)
    ]
    wait_until(lambda: number_of_readers() == 0, SOON, "the reader to end")


def test_the_iterable_lets_go_of_what_was_read(pool: Pool) -> None:
    gone = []

    def arrays() -> Iterator[Any]:
        for _ in range(10):
            array = np.ones(1 << 15)
            gone.append(weakref.ref(array))
            yield array
            del array

    for chunksize in (1, 2):
        gone.clear()
        results = pool.imap(np.sum, arrays(), chunksize)
        assert next(results) == 1 << 15
        assert list(results) == [1 << 15] * 9
        assert not any(array() is not None for array in gone)


# Taking results.


def test_results_come_in_order_also_if_the_first_takes_long(pool: Pool, tmp_path: Path) -> None:
    fn = functools.partial(tasks.wait_for_at, str(tmp_path), slow=0)
    results = pool.imap(fn, range(20))
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(timeout=0.05)  # type: ignore[attr-defined]
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(timeout=0)  # type: ignore[attr-defined]
    (tmp_path / "open").touch()
    assert results.next(timeout=SOON) == 0  # type: ignore[attr-defined]
    assert list(results) == list(range(1, 20))
    with pytest.raises(StopIteration):
        results.next(timeout=SOON)  # type: ignore[attr-defined]


@pytest.mark.parametrize("chunksize", [1, 2])
def test_unordered_results_do_not_wait_for_one_that_takes_long(
    pool: Pool, tmp_path: Path, chunksize: int
) -> None:
    fn = functools.partial(tasks.wait_for_at, str(tmp_path), slow=0)
    results = pool.imap_unordered(fn, range(20), chunksize)
    found = [next(results) for _ in range(20 - chunksize)]
    assert sorted(found) == list(range(chunksize, 20))
    (tmp_path / "open").touch()
    assert sorted(results) == list(range(chunksize))


@both
def test_threads_may_share_an_iterator(pool: Pool, name: str) -> None:
    results = getattr(pool, name)(tasks.square, iter(range(500)))
    found: list[list[int]] = [[] for _ in range(4)]
    threads = [threading.Thread(target=part.extend, args=(results,)) for part in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    assert sorted(itertools.chain(*found)) == [i * i for i in range(500)]


@both
def test_many_may_be_under_way_at_once(pool: Pool, name: str) -> None:
    imap = getattr(pool, name)
    several = [imap(tasks.square, iter(range(200))) for _ in range(5)]
    found = [sorted(results) for results in reversed(several)]
    assert found == [[i * i for i in range(200)]] * 5


def test_imap_of_imap_of_imap(pool: Pool) -> None:
    once = pool.imap(tasks.square, range(300))
    twice = pool.imap(tasks.square, once, 7)
    assert sorted(pool.imap_unordered(tasks.square, twice)) == [i**8 for i in range(300)]


# What nobody takes.


@both
def test_after_a_break_nothing_more_is_read_and_tasks_that_have_not_begun_are_cancelled(
    pool: Pool, name: str, tmp_path: Path
) -> None:
    closed = threading.Event()

    def numbers() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.set()

    fn = functools.partial(tasks.wait_for, str(tmp_path))
    results = getattr(pool, name)(fn, numbers())
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(timeout=0.01)
    del results
    assert closed.wait(SOON)
    begun = wait_until(lambda: sorted(tmp_path.iterdir()), SOON, "a task")
    # To use the pool again is the opportunity to cancel.
    others = [pool.apply_async(tasks.square, (i,)) for i in range(4)]
    (tmp_path / "open").touch()
    assert [other.get(SOON) for other in others] == [0, 1, 4, 9]
    assert len(begun) <= len(list(tmp_path.glob("here-*"))) <= WORKERS


@both
@pytest.mark.parametrize("make", [iter, list])
def test_results_that_are_never_asked_for_are_computed_all_the_same(
    pool: Pool, name: str, make: Callable[..., Any], tmp_path: Path
) -> None:
    """As in the standard library: ``pool.imap(fn, items)`` for what ``fn`` does."""
    fn = functools.partial(tasks.touch, str(tmp_path))
    getattr(pool, name)(fn, make(range(3 * MOST)))
    wait_until(lambda: len(os.listdir(tmp_path)) == 3 * MOST, SOON, "all tasks")


@both
def test_results_that_are_never_asked_for_do_not_pile_up(
    pool: Pool, name: str, tmp_path: Path
) -> None:
    steps = Steps()
    getattr(pool, name)(functools.partial(tasks.wait_for, str(tmp_path)), steps)
    assert settled(lambda: steps.read) <= MOST
    (tmp_path / "open").touch()
    wait_until(lambda: steps.read > 5 * MOST, SOON, "more to be read")


@both
@pytest.mark.parametrize("chunksize", [1, 3])
@pytest.mark.parametrize("when", ["kept", "dropped"])
def test_join_reads_to_the_end(name: str, chunksize: int, when: str, tmp_path: Path) -> None:
    pool = Pool(WORKERS, context="fork")
    fn = functools.partial(tasks.touch, str(tmp_path))
    results = getattr(pool, name)(fn, iter(range(700)), chunksize)
    if when == "dropped":
        del results
    pool.close()
    with pytest.raises(ValueError, match="not running"):
        pool.imap(fn, [1])
    pool.join()
    assert len(os.listdir(tmp_path)) == 700
    if when == "kept":
        assert sorted(results) == list(range(700))


@both
def test_after_close_an_iterator_goes_on(name: str) -> None:
    pool = Pool(WORKERS, context="fork")
    results = getattr(pool, name)(tasks.square, iter(range(700)))
    assert next(results) in {0, 1, 4, 9}
    pool.close()
    assert len(list(results)) == 699
    pool.join()


class Slow:
    """Takes its time to be pickled, in the thread that calls."""

    def __init__(self, is_begun: threading.Event, may_go: threading.Event) -> None:
        self.events = is_begun, may_go

    def __reduce__(self) -> tuple[object, ...]:
        self.events[0].set()
        assert self.events[1].wait(SOON)
        return int, (-1,)


@both
@pytest.mark.parametrize("when", ["reads at once", "starts a thread", "cannot start a thread"])
def test_join_waits_for_an_imap_that_another_thread_has_just_begun(
    name: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(WORKERS, context="fork")
    is_begun, may_go, is_joining = (threading.Event() for _ in range(3))
    start = threading.Thread.start

    def held_up(thread: threading.Thread) -> None:
        if thread.name == "shmpool-imap":
            is_begun.set()
            assert may_go.wait(SOON)
            if when == "cannot start a thread":
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", held_up)
    iterable: Any = iter(range(-200, 0))
    if when == "reads at once":
        iterable = [*range(-100, -1), Slow(is_begun, may_go)]
    found: list[int] = []
    problems: list[BaseException] = []

    def call() -> None:
        try:
            found.extend(getattr(pool, name)(abs, iterable))
        except RuntimeError as error:
            problems.append(error)

    def join() -> None:
        try:
            is_joining.set()
            pool.join()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=call), threading.Thread(target=join)]
    threads[0].start()
    assert is_begun.wait(SOON)
    pool.close()
    threads[1].start()
    assert is_joining.wait(SOON)
    threads[1].join(0.1)
    has_waited = threads[1].is_alive()
    may_go.set()
    for thread in threads:
        thread.join(SOON)
    assert has_waited, problems
    if when == "cannot start a thread":
        assert [str(error) for error in problems] == ["can't start new thread"], problems
    else:
        assert not problems
        assert sorted(found) == list(range(1, len(found) + 1))
        assert len(found) == (100 if when == "reads at once" else 200)


def test_join_in_the_thread_that_reads_does_not_wait_for_itself() -> None:
    """What runs while an argument is pickled, such as a finalizer, may end the pool that it finds."""

    class Ends:
        def __reduce__(self) -> tuple[object, ...]:
            pool.close()
            pool.join()
            return int, (-1,)

    pool = Pool(WORKERS, context="fork")
    with pytest.raises(RuntimeError, match="after shutdown"):
        list(pool.imap(abs, [Ends()]))
    pool.join()


def test_join_after_a_break_does_not_wait_for_the_rest() -> None:
    pool = Pool(WORKERS, context="fork")
    for value in pool.imap(tasks.square, itertools.count()):
        if value > 100:
            break
    pool.close()
    pool.join()


@both
def test_terminate_ends_an_iterator_whose_iterable_blocks(name: str) -> None:
    steps = Steps()
    pool = Pool(WORKERS, context="fork")
    results = getattr(pool, name)(tasks.square, steps)
    next(results)
    steps.block()
    count = settled(lambda: steps.read)
    pool.terminate()
    pool.join()
    found = []
    with pytest.raises(shmpool.BrokenPoolError, match="terminated"):
        found.extend(results)
    assert len(found) < count
    assert list(results) == []
    steps.go_on()
    wait_until(lambda: number_of_readers() == 0, SOON, "the reader to end")


def test_a_dropped_pool_ends_a_reader_whose_iterable_blocks() -> None:
    steps = Steps()
    steps.block()
    pool = Pool(WORKERS, context="fork")
    pool.imap(tasks.square, steps)
    workers = pool._pool
    assert number_of_readers() == 1
    gc.disable()
    try:
        with pytest.warns(ResourceWarning):
            del pool
        # It may never be heard of: nothing of the pool's is kept for it.
        wait_until(lambda: not any(w.is_alive() for w in workers), SOON, "the workers to end")
        assert number_of_readers() == 1
    finally:
        gc.enable()
    steps.go_on()
    wait_until(lambda: number_of_readers() == 0, SOON, "the reader to end")
    assert steps.read <= 1


def test_errors_of_a_reader_that_nobody_hears_are_no_end_of_the_pool(pool: Pool) -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise SystemExit

    results = pool.imap(tasks.square, broken())
    assert next(results) == 1
    with pytest.raises(SystemExit):
        next(results)
    pool.imap(tasks.square, broken())
    wait_until(lambda: number_of_readers() == 0, SOON, "the readers to end")
    assert pool.map(tasks.square, range(3)) == [0, 1, 4]


def test_time_is_not_lost_while_results_are_used(pool: Pool) -> None:
    """Tasks go on while the caller does something else."""
    results = pool.imap(tasks.square, iter(range(50)))
    next(results)
    wait_until(lambda: pool.executor.stats().tasks_done == 50, SOON, "all tasks")
    assert list(results) == [i * i for i in range(1, 50)]
