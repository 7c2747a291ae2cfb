"""Python semantics of what is sent: identity, cycles, what cannot travel, and ways to make it travel after all."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import semantics_tasks as tasks
from executor_tasks import SOON, identity, warm_executor, warm_up

import shmpool
from shmpool import Pool, SerializationError, ShmExecutor

SIZE = 20_000
NBYTES = 8 * SIZE


@pytest.fixture(scope="module", params=["fork", "spawn"])
def executor(request: pytest.FixtureRequest) -> Iterator[ShmExecutor]:
    with warm_executor(request.param, workers=1) as executor:
        yield executor


def copied(executor: ShmExecutor) -> int:
    return executor.stats().bytes_copied


# Identity.


def test_what_is_one_object_inside_an_object_stays_one(executor):
    array, text = np.arange(SIZE), {"any": "object"}
    one, back = executor.submit(tasks.are_one, [array, array]).result(SOON)
    assert one and back[0] is back[1]
    one, back = executor.submit(tasks.are_one, (text, text)).result(SOON)
    assert one and back[0] is back[1]


def test_a_list_of_one_array_99_times_is_one_array_and_one_copy(executor):
    before = copied(executor)
    one, back = executor.submit(tasks.are_one, [np.zeros(SIZE)] * 99).result(SOON)
    assert one and len(back) == 99 and len(set(map(id, back))) == 1
    assert copied(executor) - before == NBYTES
    executor.submit(tasks.are_one, back).result(SOON)
    assert copied(executor) - before == NBYTES, "nothing more when it goes again"


def test_what_is_written_through_one_name_is_seen_through_the_other(executor):
    view = np.zeros(SIZE)
    back = executor.submit(identity, {"a": view, "b": [view]}).result(SOON)
    back["a"][7] = 1
    assert back["b"][0][7] == 1 and view[7] == 0


@pytest.mark.parametrize("size", [3, SIZE])
def test_an_object_that_contains_itself(executor, size):
    back = executor.submit(tasks.make_loop, size).result(SOON)
    again = executor.submit(identity, back).result(SOON)
    for loop in (back, again):
        assert loop[1]["loop"] is loop
        np.testing.assert_array_equal(loop[0], np.arange(size))
    executor.submit(gc.collect).result(SOON)  # the worker's own goes with its garbage


def test_an_object_whose_attribute_is_the_object(executor):
    model = tasks.Guarded.__new__(tasks.Guarded)
    model.me, model.values = model, np.arange(SIZE)
    back = executor.submit(identity, model).result(SOON)
    assert back.me is back and back.values[-1] == SIZE - 1
    executor.submit(gc.collect).result(SOON)


@pytest.mark.parametrize("mode", ["args", "kwargs"])
def test_a_put_object_is_decoded_once_in_a_task(executor, mode):
    ref = executor.put(tasks.Counted())
    before = executor.submit(tasks.decoded).result(SOON)
    if mode == "args":
        assert executor.submit(tasks.are_the_same, ref, ref).result(SOON)
    else:
        assert executor.submit(tasks.are_the_same, ref, x=ref, y=ref).result(SOON)
    assert executor.submit(tasks.decoded).result(SOON) == before + 1


MAPS: dict[str, Callable[[ShmExecutor, Pool, Any], list[Any]]] = {
    "executor.map": lambda ex, _, ref: list(
        ex.map(tasks.are_the_same, [ref] * 4, [ref] * 4, chunksize=4)
    ),
    "executor.map_unordered": lambda ex, _, ref: list(
        ex.map_unordered(tasks.are_the_same, [ref] * 4, [ref] * 4, chunksize=4)
    ),
    "Pool.map": lambda _, pool, ref: pool.map(tasks.are_the_same, [ref] * 4, 4),
    "Pool.imap": lambda _, pool, ref: list(pool.imap(tasks.are_the_same, [ref] * 4, 4)),
    "Pool.starmap": lambda _, pool, ref: pool.starmap(tasks.are_the_same, [(ref, ref)] * 4, 4),
    "Pool.starmap of fresh tuples": lambda _, pool, ref: pool.starmap(
        tasks.are_the_same, [tasks.Pairing(ref)] * 4, 4
    ),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(1, context="fork") as pool:
        warm_up(pool.executor, 1)
        yield pool
        pool.close()
        pool.join()


@pytest.mark.parametrize("way", MAPS)
def test_a_put_object_is_decoded_once_in_a_chunk(executor, pool, way):
    ref = (pool.executor if way.startswith("Pool") else executor).put(tasks.Counted())
    one = pool.executor if way.startswith("Pool") else executor
    before = one.submit(tasks.decoded).result(SOON)
    assert MAPS[way](executor, pool, ref) == [True] * 4
    assert one.submit(tasks.decoded).result(SOON) == before + 1
    assert one.submit(tasks.counted_alive).result(SOON) == 0, "nothing keeps it after the chunk"


def test_what_a_call_writes_into_a_ref_s_value_the_later_ones_of_its_chunk_see_and_no_other(
    executor,
):
    ref = executor.put(np.zeros(SIZE))
    for one in (ref, np.zeros(SIZE)):
        counts = list(executor.map(tasks.count_up, [one] * 6, chunksize=3))
        assert counts == [1, 2, 3, 1, 2, 3]


# What cannot travel.


def test_what_is_nested_too_deeply_is_an_error_that_says_so_and_the_pool_goes_on(executor):
    nested = r"nested deeper|[Rr]ecursion"
    with pytest.raises(SerializationError, match=nested):
        executor.submit(identity, tasks.make_nested(100_000)).result(SOON)
    with pytest.raises(SerializationError, match=nested):
        executor.submit(tasks.make_nested, 100_000).result(SOON)
    assert executor.submit(identity, 5).result(SOON) == 5
    depth = len(repr(executor.submit(tasks.make_nested, 50).result(SOON))) // 2
    assert depth == 51


@pytest.mark.parametrize("what", tasks.UNSENDABLE)
def test_what_cannot_travel_is_named_on_the_way_there_and_back(executor, what):
    bad = tasks.UNSENDABLE[what]()
    with pytest.raises(SerializationError) as caught:
        executor.submit(identity, {"ok": 1, "bad": [bad]}).result(SOON)
    assert "args[0]['bad'][0]" in str(caught.value)
    if hasattr(bad, "close"):
        bad.close()
    with pytest.raises(SerializationError) as caught:
        executor.submit(tasks.make, what).result(SOON)
    assert "result['bad'][0]" in str(caught.value)
    assert executor.submit(identity, 5).result(SOON) == 5
    # The frames of the traceback hold what could not be sent, and more.
    traceback.clear_frames(caught.value.__traceback__)
    del bad, caught
    gc.collect()


# What travels once.


@pytest.fixture(params=tasks.HANDED_OVER)
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    here, there = tasks.HANDED_OVER[request.param]()
    with here, there:
        yield here, there
    resource_sharer.stop()


def test_a_socket_in_the_arguments_of_one_task_arrives(executor, ends):
    here, there = ends
    assert executor.submit(tasks.say, there, 1).result(SOON) == 1
    assert executor.submit(partial(tasks.say, there), 2).result(SOON) == 2
    assert list(executor.map(tasks.say, [there] * 4, range(4), chunksize=2)) == [0, 1, 2, 3]
    assert os.read(here.fileno(), 10) == bytes([1, 2, 0, 1, 2, 3])


def test_a_socket_that_would_arrive_several_times_is_named(executor, ends):
    _, there = ends
    for chunksize, path in ((1, r"fn\.args\[0\]"), (2, r"fn\.fn\.args\[0\]")):
        with pytest.raises(SerializationError, match=path) as caught:
            list(executor.map(partial(tasks.say, there), range(3), chunksize=chunksize))
        traceback.clear_frames(caught.value.__traceback__)
    with pytest.raises(SerializationError, match=r"obj\['end'\]") as caught:
        executor.put({"end": there})
    retrying = executor.options(retries=1)
    with pytest.raises(SerializationError, match=r"task without retries.*args\[0\]"):
        retrying.submit(tasks.say, there, 1).result(SOON)
    with pytest.raises(SerializationError, match=r"fn\.args\[0\]"):
        retrying.submit(partial(tasks.say, there), 1).result(SOON)
    assert executor.submit(identity, 5).result(SOON) == 5


# Ways to make it travel.


@pytest.fixture
def registered() -> Iterator[None]:
    tasks.register()
    yield
    tasks.deregister()


def test_registered_classes_travel_as_arguments_whatever_the_workers_know(executor, registered):
    with_lock = tasks.Guarded(np.zeros(SIZE))
    before = copied(executor)
    assert executor.submit(_answer, tasks.Database(":memory:")).result(SOON) == 42
    assert executor.submit(_sum, with_lock).result(SOON) == 0
    assert copied(executor) - before == NBYTES, "the array in the state goes through the store"


def _answer(database):
    return database.answer()


def _sum(guarded):
    with guarded.lock:
        return float(guarded.values.sum())


def test_registered_classes_travel_as_results_under_every_start_method(
    start_method, registered, tmp_path
):
    # Forked workers have the registrations of their parent; others are told by the initializer.
    initializer = None if start_method == "fork" else tasks.register
    path = str(tmp_path / "database")
    with ShmExecutor(1, mp_context=start_method, initializer=initializer) as executor:
        answer, database = executor.submit(tasks.ask, tasks.Database(path)).result(SOON)
        assert (answer, database.path, database.answer()) == (42, path, 42)
        guarded = executor.submit(tasks.hold, tasks.Guarded(np.zeros(SIZE))).result(SOON)
        with guarded.lock:
            assert guarded.values.sum() == SIZE
        before = copied(executor)
        executor.submit(_sum, guarded).result(SOON)
        assert copied(executor) == before, "nothing is copied when it goes again"


def test_spawned_workers_know_what_was_registered_before_they_started(registered):
    with ShmExecutor(1, mp_context="spawn") as executor:
        answer, database = executor.submit(tasks.ask, tasks.Database(":memory:")).result(SOON)
        assert (answer, database.answer()) == (42, 42)


def test_what_is_no_more_registered_does_not_travel(executor):
    with pytest.raises(SerializationError, match=r"args\[0\].lock"):
        executor.submit(_sum, tasks.Guarded(np.zeros(3))).result(SOON)


def test_a_reduction_of_the_user_s_own_is_used_and_its_arrays_are_not_copied_again(executor):
    before = copied(executor)
    back = executor.submit(identity, tasks.Reduced(np.ones(SIZE))).result(SOON)
    assert type(back) is tasks.Reduced and back.lock.acquire(blocking=False)
    assert executor.submit(tasks.total, back).result(SOON) == SIZE
    assert copied(executor) - before == NBYTES


def test_a_helper_class_makes_one_object_travel(executor):
    database = tasks.Database(":memory:")
    with pytest.raises(SerializationError, match="connection"):
        executor.submit(_answer, database).result(SOON)
    assert executor.submit(_answer, tasks.AsPath(database)).result(SOON) == 42


# Exceptions.


def test_an_exception_keeps_what_it_carries(executor):
    with pytest.raises(tasks.Explained, match="the text") as caught:
        executor.submit(tasks.fail, tasks.Explained("the text", array=np.ones(SIZE))).result(SOON)
    assert caught.value.array.sum() == SIZE and caught.value.array.flags.writeable
    assert "in fail" in str(caught.value.__cause__)


def test_notes_and_groups_of_exceptions_travel(executor):
    error = ValueError("inner")
    error.add_note("a note")
    with pytest.raises(ExceptionGroup) as caught:
        executor.submit(tasks.fail, ExceptionGroup("outer", [error, KeyError(3)])).result(SOON)
    inner, other = caught.value.exceptions
    assert (str(inner), inner.__notes__, other.args) == ("inner", ["a note"], (3,))


def test_the_place_where_it_is_explained_is_public(tmp_path: Path):
    explanation = shmpool.explain({"a": np.zeros(SIZE)}, quiet=True)
    assert isinstance(explanation, shmpool.Explanation)
    assert isinstance(explanation.parts[0], shmpool.Part)
    assert explanation.bytes_copied == NBYTES
