"""apply, map, starmap, imap and imap_unordered: the same results as the built-in functions, under each start method."""

from __future__ import annotations

import functools
import itertools
import multiprocessing.pool
from collections.abc import Iterator
from typing import Any

import numpy as np
import pool_tasks as tasks
import pytest
from executor_tasks import SOON
from pool_tasks import METHODS, warm_pool

from shmpool.pool import Pool


@pytest.fixture(scope="module", params=METHODS)
def pool(request: pytest.FixtureRequest, temporary_folder: object) -> Iterator[Pool]:
    with warm_pool(request.param) as pool:
        yield pool


def test_apply_passes_arguments_of_any_kind(pool: Pool) -> None:
    assert pool.apply(tasks.arguments) == ((), {})
    assert pool.apply(tasks.arguments, [1, 2], {"fn": 3, "self": 4}) == (
        (1, 2),
        {"fn": 3, "self": 4},
    )
    assert pool.apply(tasks.arguments, iter("ab")) == (("a", "b"), {})
    assert pool.apply_async(tasks.arguments, (1,), {"b": 2}).get(SOON) == ((1,), {"b": 2})


@pytest.mark.parametrize("chunksize", [None, 1, 3, 1000])
def test_map_gives_what_the_builtin_gives(pool: Pool, chunksize: int | None) -> None:
    numbers = range(50)
    expected = list(map(tasks.square, numbers))
    for iterable in (numbers, list(numbers), set(numbers), iter(numbers), np.arange(50)):
        assert pool.map(tasks.square, iterable, chunksize) == expected
    assert pool.map_async(tasks.square, numbers, chunksize).get(SOON) == expected
    for empty in ([], iter([])):
        assert pool.map(tasks.square, empty, chunksize) == []


@pytest.mark.parametrize("chunksize", [None, 1, 3])
def test_starmap_gives_what_itertools_gives(pool: Pool, chunksize: int | None) -> None:
    pairs = [(i, -2 * i) for i in range(20)]
    expected = list(itertools.starmap(tasks.add, pairs))
    assert pool.starmap(tasks.add, pairs, chunksize) == expected
    assert pool.starmap(tasks.add, map(list, pairs), chunksize) == expected
    assert pool.starmap_async(tasks.add, pairs, chunksize).get(SOON) == expected
    assert pool.starmap(tasks.add, [], chunksize) == []
    with pytest.raises(TypeError):
        pool.starmap(tasks.add, [(1, 2), 3, (4, 5)], chunksize)


@pytest.mark.parametrize("chunksize", [1, 7, 1000])
@pytest.mark.parametrize("method", ["imap", "imap_unordered"])
def test_imap_gives_what_the_builtin_gives(pool: Pool, method: str, chunksize: int) -> None:
    imap = getattr(pool, method)
    sort = sorted if method == "imap_unordered" else list
    expected = list(map(tasks.square, range(500)))
    for iterable in (range(500), iter(range(500)), dict.fromkeys(range(500))):
        assert sort(imap(tasks.square, iterable, chunksize)) == expected
    assert list(imap(tasks.square, [], chunksize)) == []


@pytest.mark.parametrize(
    "name", ["map", "map_async", "starmap", "starmap_async", "imap", "imap_unordered"]
)
@pytest.mark.parametrize("chunksize", [0, -1])
def test_a_chunksize_that_makes_no_sense_is_refused(pool: Pool, name: str, chunksize: int) -> None:
    with pytest.raises(ValueError, match="Chunksize must be 1"):
        getattr(pool, name)(tasks.square, [1, 2], chunksize)


def test_chunks_are_as_large_as_the_standard_librarys(pool: Pool) -> None:
    """How many tasks are made of so many items: counted by the executor, as the standard library's formula has it."""
    for items in (1, 7, 8, 9, 16, 17, 50):
        before = pool.executor.stats().tasks_submitted
        pool.map(tasks.square, range(items))
        size = -(-items // (2 * 4))
        assert pool.executor.stats().tasks_submitted - before == -(-items // size)


def test_lambdas_closures_partials_and_methods_work(pool: Pool) -> None:
    offset = 10
    assert pool.map(lambda x: x + offset, range(5)) == list(range(10, 15))
    assert pool.apply(functools.partial(tasks.add, 1), (2,)) == 3
    assert pool.map("abc".count, ["a", "d"]) == [1, 0]
    assert list(pool.imap(lambda x: x + offset, range(3), 2)) == [10, 11, 12]
    assert pool.apply(lambda: lambda: 42)() == 42


def test_arrays_are_private_on_both_sides(pool: Pool) -> None:
    array = np.ones(1 << 17)

    def scribble(a: Any) -> Any:
        a[...] += 1
        return a

    first, second = pool.map(scribble, [array, array], 1)
    assert array[0] == 1 and first[0] == second[0] == 2
    first[0] = 7
    assert second[0] == 2
    copied = pool.executor.stats().bytes_copied
    assert [a[-1] for a in pool.imap(scribble, [array] * 4)] == [2] * 4
    # Arguments were in the store already, results are written by the workers.
    assert pool.executor.stats().bytes_copied - copied == 4 * array.nbytes


@pytest.mark.parametrize("chunksize", [1, 2])
def test_refs_arrive_as_their_values_whatever_the_chunks(pool: Pool, chunksize: int) -> None:
    refs = [pool.executor.put(np.full(1 << 14, float(i))) for i in range(3)]
    assert pool.map(np.sum, refs, chunksize) == [0, 1 << 14, 2 << 14]
    assert list(pool.imap(np.sum, refs, chunksize)) == [0, 1 << 14, 2 << 14]

    def shifted(a: Any, b: float) -> Any:
        a[0] = b  # writable, as the pool's mmap_mode has it
        return float(a[0] + a[-1])

    assert pool.starmap(shifted, [(ref, 1) for ref in refs], chunksize) == [1, 2, 3]
    assert pool.apply(np.sum, (refs[2],)) == 2 << 14


def test_it_is_a_pool_of_the_standard_librarys(pool: Pool) -> None:
    assert isinstance(pool, multiprocessing.pool.Pool)
    assert isinstance(pool.apply_async(tasks.pid), multiprocessing.pool.ApplyResult)
    assert isinstance(pool.apply_async(tasks.pid), multiprocessing.pool.AsyncResult)
    assert isinstance(pool.map_async(tasks.pid, [1]), multiprocessing.pool.MapResult)
    assert isinstance(pool.imap(tasks.pid, [1]), multiprocessing.pool.IMapIterator)
    unordered = pool.imap_unordered(tasks.pid, [1])
    assert isinstance(unordered, multiprocessing.pool.IMapUnorderedIterator)


def test_workers_are_called_as_the_standard_librarys(pool: Pool) -> None:
    def name() -> str:
        return multiprocessing.current_process().name

    assert "PoolWorker-" in pool.apply(name)
