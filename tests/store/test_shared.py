"""Arrays that all processes write to: what cannot be one is refused."""

from __future__ import annotations

import numpy as np
import pytest
from link import MIB, make_store

import shmpool
from shmpool.errors import StoreFullError


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
