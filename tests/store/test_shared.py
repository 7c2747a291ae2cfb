"""Arrays that all processes write to: what cannot be one is refused."""

from __future__ import annotations

import gc
import traceback

import numpy as np
import pytest
from executor_tasks import SOON
from link import MIB, make_store

import shmpool
from shmpool.errors import RefError, SerializationError, StoreFullError


def test_python_objects_cannot_be_shared():
    with pytest.raises(ValueError, match="object holds Python objects"):
        shmpool.empty(3, object)
    with pytest.raises(ValueError, match="holds Python objects"):
        shmpool.asarray([{}, None])


@pytest.mark.parametrize("shape", [-1, (2, -3), (-1, 0)])
def test_a_negative_shape_is_refused_as_numpy_refuses_it(shape):
    with pytest.raises(ValueError, match="negative dimensions are not allowed"):
        np.empty(shape)
    with pytest.raises(ValueError, match="negative dimensions are not allowed"):
        shmpool.zeros(shape)


def test_an_array_for_which_there_is_no_room_is_refused_with_the_sizes():
    store = make_store(8 * MIB)
    with pytest.raises(StoreFullError) as caught:
        shmpool.empty(16 * MIB, np.uint8, store=store)
    assert (caught.value.requested, caught.value.capacity) == (16 * MIB, 8 * MIB)
    assert shmpool.empty(MIB, np.uint8, store=store).size == MIB


def test_what_is_shared_already_is_the_same_array():
    store = make_store()
    array = shmpool.asarray(np.arange(1000), store=store)
    assert shmpool.asarray(array, store=store) is array
    assert shmpool.asarray(array[::2], store=store).tolist() == list(range(0, 1000, 2))


# ---------------------------------------------------------------- with two stores


def add_one(array, *rest):
    array += 1
    return float(array.sum())


def nested(thing):
    thing["a"][0] += 1


@pytest.fixture
def executors():
    own = shmpool.ObjectStore(64 * MIB)
    with (
        shmpool.ShmExecutor(1, "fork") as default,
        shmpool.ShmExecutor(1, "fork", store=own) as executor,
    ):
        yield default, executor, own


@pytest.mark.parametrize("size", [1, 100, 2000, 200_000])
def test_an_array_is_shared_with_an_executor_that_uses_its_store_and_refused_by_another(
    executors, size
):
    default, executor, own = executors
    here, there = shmpool.zeros(size), shmpool.zeros(size, store=own)
    assert default.submit(add_one, here).result(SOON) == size == here.sum()
    assert executor.submit(add_one, there).result(SOON) == size == there.sum()
    for one, wrong in ((default, there), (executor, here)):
        with pytest.raises(SerializationError, match=r"make it with store=.*args\[0\]") as caught:
            one.submit(add_one, wrong).result(SOON)
        assert isinstance(caught.value.__cause__, RefError)
        traceback.clear_frames(caught.value.__traceback__)
        with pytest.raises(
            SerializationError, match=r"args\[0\]\['a'\] \(a 'numpy.ndarray'\)"
        ) as caught:
            one.submit(nested, {"b": np.zeros(3), "a": wrong[:]}).result(SOON)
        traceback.clear_frames(caught.value.__traceback__)
        with pytest.raises(SerializationError, match=r"another.*obj"):
            one.put([wrong])
        assert one.submit(add_one, wrong.copy()).result(SOON) == 2 * size
    assert here.sum() == there.sum() == size, "nobody has written to it"
    del here, there, wrong, caught
    gc.collect()


def test_asarray_makes_an_array_of_one_store_one_of_another(executors):
    default, executor, own = executors
    here = shmpool.asarray(np.ones(100))
    there = shmpool.asarray(here, store=own)
    assert there is not here and shmpool.asarray(there, store=own) is there
    assert executor.submit(add_one, there).result(SOON) == 200 == there.sum()
    assert default.submit(add_one, here).result(SOON) == 200 == here.sum()


def test_an_empty_array_belongs_to_no_store(executors):
    _, executor, _ = executors
    keep = shmpool.zeros(5)
    assert executor.submit(add_one, shmpool.zeros(0), keep.size).result(SOON) == 0
    assert executor.submit(add_one, [memoryview(b"")][0], keep.size).exception(SOON)
