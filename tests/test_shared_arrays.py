"""Arrays that all processes write to: to pass and return them costs nothing, in bytes, and all see all writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from executor_tasks import METHODS, SOON, warm_executor
from support import TIMEUNIT, wait_until

import shmpool
from shmpool import ShmExecutor

N = 50_000  # of float64: 400 kB
#: Numbers of items: one small enough to ride in a message, if it were not shared, and a large one.
SIZES = [10, N]
#: Of a message: what says where arrays are, and who asks whom to do what.
FEW = 1000


class Counted(NamedTuple):
    copied: int
    shared: int
    inline: int


@pytest.fixture(scope="module", params=METHODS)
def executor(request: pytest.FixtureRequest, temporary_folder: object) -> Iterator[ShmExecutor]:
    with warm_executor(request.param, workers=2) as executor:
        # Arenas for shared arrays, on both sides.
        both_see(executor, shmpool.zeros(2, store=executor._store))
        for future in [executor.submit(make_at_the_same_time, i) for i in range(2)]:
            assert future.result(SOON)[0] >= 0
        yield executor


@pytest.fixture(params=SIZES)
def array(executor: ShmExecutor, request: pytest.FixtureRequest) -> Any:
    return shmpool.empty(request.param, store=executor._store)


def counted(executor: ShmExecutor, fn: Callable[..., Any], *args: Any) -> tuple[Any, Counted]:
    before, store_before = executor.stats(), executor.stats().store
    result = executor.submit(fn, *args).result(SOON)
    after = executor.stats()
    assert after.store.bytes_copied == store_before.bytes_copied, "the parent never copies here"
    return result, Counted(
        after.bytes_copied - before.bytes_copied,
        after.bytes_shared - before.bytes_shared,
        after.bytes_inline - before.bytes_inline,
    )


# Tasks.


def nothing(array: Any) -> None:
    pass


def fill(array: Any, value: float) -> Any:
    array[...] = value
    return array


def add(array: Any, index: int, value: float) -> float:
    array[index] += value
    return float(array.sum())


def make(n: int, value: float) -> Any:
    return fill(shmpool.empty(n), value)


def make_at_the_same_time(value: int) -> Any:
    return fill(shmpool.zeros(4), value)


def fill_half(array: Any, value: float) -> Any:
    half = array[array.size // 2 :]
    half[...] = value
    return half


def signal_and_wait(array: Any, mine: int, other: int) -> bool:
    array[mine] = 1
    wait_until(lambda: array[other] == 1, 30 * TIMEUNIT, "the other task's write")
    return True


def both_see(executor: ShmExecutor, array: Any) -> None:
    array[...] = 0
    futures = [executor.submit(signal_and_wait, array, i, 1 - i) for i in range(2)]
    assert [future.result(SOON) for future in futures] == [True, True]


# Bytes.


def test_to_pass_one_costs_nothing(executor: ShmExecutor, array: Any) -> None:
    _, bytes_ = counted(executor, nothing, array)
    assert (bytes_.copied, bytes_.shared) == (0, array.nbytes)
    assert bytes_.inline < FEW


def test_a_task_that_fills_one_and_returns_it_copies_nothing(
    executor: ShmExecutor, array: Any
) -> None:
    array[...] = 1
    for value in (5.0, 6.0):
        back, bytes_ = counted(executor, fill, array, value)
        assert (bytes_.copied, bytes_.shared) == (0, 2 * array.nbytes), "there and back"
        assert bytes_.inline < FEW
        assert (array == value).all() and (back == value).all()
        back[0] = -1
        assert array[0] == -1, "what comes back is the same memory"


@pytest.mark.parametrize("n", SIZES)
def test_a_task_that_makes_one_and_returns_it_copies_nothing(executor: ShmExecutor, n: int) -> None:
    made, bytes_ = counted(executor, make, n, 7.0)
    assert (bytes_.copied, bytes_.shared) == (0, made.nbytes)
    assert bytes_.inline < FEW
    assert (made == 7).all() and made.shape == (n,) and made.flags.writeable
    # It is one for all others as well.
    back, bytes_ = counted(executor, fill, made, 8.0)
    assert (bytes_.copied, bytes_.shared) == (0, 2 * made.nbytes)
    assert (made == 8).all()
    back[0] = -1
    assert made[0] == -1


def test_slices_and_reshaped_views_copy_nothing(executor: ShmExecutor, array: Any) -> None:
    array[...] = 1
    back, bytes_ = counted(executor, fill_half, array, 2.0)
    assert (bytes_.copied, bytes_.shared) == (0, array.nbytes + back.nbytes)
    assert array.sum() == 1.5 * array.size
    back[...] = 3
    assert array.sum() == 2 * array.size
    for view in (array[1:5], array.reshape(2, -1), array.reshape(2, -1).T):
        _, bytes_ = counted(executor, fill, view, 4.0)
        assert (bytes_.copied, bytes_.shared) == (0, 2 * view.nbytes)
        assert (view == 4).all()
    assert (array == 4).all()


def test_it_is_nowhere_copied_on_the_way_through_many_tasks(executor: ShmExecutor) -> None:
    array = shmpool.zeros(N, store=executor._store)
    before = executor.stats()
    results = list(executor.map(fill_half, [array] * 20, range(20), timeout=SOON))
    futures = [executor.submit(add, array, i, 1.0) for i in range(20)]
    assert len({result.ctypes.data for result in results}) == 1
    assert all(future.result(SOON) > 0 for future in futures)
    assert (array[:20] == 1).all()
    after = executor.stats()
    assert after.bytes_copied == before.bytes_copied
    assert after.bytes_shared - before.bytes_shared == (20 + 10 + 20) * array.nbytes


# Writes.


def test_tasks_that_run_at_the_same_time_see_what_each_other_writes(
    executor: ShmExecutor, array: Any
) -> None:
    both_see(executor, array)
    assert (array[:2] == 1).all(), "and so does the parent"


def test_a_task_sees_what_the_parent_writes_while_it_runs(
    executor: ShmExecutor, array: Any
) -> None:
    array[...] = 0
    future = executor.submit(signal_and_wait, array, 0, 1)
    wait_until(lambda: array[0] == 1, SOON, "the task's write")
    array[1] = 1
    assert future.result(SOON)


def test_later_tasks_see_what_earlier_ones_and_the_parent_wrote(
    executor: ShmExecutor, array: Any
) -> None:
    array[...] = 0
    for i in range(6):
        array[9] += 1
        assert executor.submit(add, array, i, 1.0).result(SOON) == 2 * (i + 1)
    assert array.sum() == 12


def test_what_a_task_made_is_seen_by_all_after_that(executor: ShmExecutor) -> None:
    made = executor.submit(make, N, 0.0).result(SOON)
    both_see(executor, made)
    assert made[:2].tolist() == [1, 1]
