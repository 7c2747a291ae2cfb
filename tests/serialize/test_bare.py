"""Calls with plain arrays, and arrays alone: as numpy's own pickles, only shorter."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import shmpool
from shmpool.serialize.bare import BARE, dump_bare
from shmpool.serialize.mainmodule import MainModule
from shmpool.serialize.pickling import ARGUMENTS, OBJECT, Pickling, loads

LETTERS = "?bBhHiIlLqQefdgFDG"


@pytest.fixture
def pickling() -> Pickling:
    """Where buffers of 1000 bytes and more travel out of band."""
    return Pickling(MainModule.nothing(), lambda view: view.nbytes >= 1000)


def is_bare(pickling: Pickling, obj: object) -> bool:
    return pickling.dumps(obj, OBJECT).stream[0][:1] == BARE


def there_and_back(pickling: Pickling, obj: object) -> object:
    stream, buffers = pickling.dumps(obj, OBJECT)
    # As in the store: memory of the receiver's own, which it may write to.
    return loads(b"".join(stream), [memoryview(bytearray(buffer)) for buffer in buffers])


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (500,), (3, 5), (2, 300, 4)])
def test_arrays_arrive_as_they_were(pickling, letter, shape):
    a = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(letter)
    assert is_bare(pickling, a)
    back = there_and_back(pickling, a)
    assert type(back) is np.ndarray
    assert back.dtype == a.dtype
    assert back.shape == a.shape
    assert np.array_equal(back, a)
    assert back.flags.writeable
    assert back.flags.c_contiguous


@pytest.mark.parametrize("letter", LETTERS)
def test_so_do_single_numbers(pickling, letter):
    number = np.ones(1, letter)[0]
    for obj in (number, ((1, number, np.arange(3), number), {})):
        assert is_bare(pickling, obj)
        back = there_and_back(pickling, obj)
        numbers = back[0][1::2] if isinstance(back, tuple) else [back]
        assert set(map(type, numbers)) == {type(number)} and set(numbers) == {number}


def test_so_do_calls_with_arrays_and_atoms(pickling):
    a, b = np.arange(3), np.linspace(0, 1, 1000).reshape(10, 100)
    call = (("__main__", a, None, b, 2.5, True, 1j, b"x"), {})
    assert is_bare(pickling, call)
    args, kwargs = there_and_back(pickling, call)
    assert kwargs == {}
    assert type(args) is tuple
    assert np.array_equal(args[1], a)
    assert np.array_equal(args[3], b)
    assert args[:1] + args[2:3] + args[4:] == call[0][:1] + call[0][2:3] + call[0][4:]


def test_large_buffers_are_not_copied(pickling):
    a = np.arange(1000.0)
    (_, buffers) = pickling.dumps(((a, 1), {}), ARGUMENTS)
    assert [np.shares_memory(np.frombuffer(buffer), a) for buffer in buffers] == [True]


def read_only() -> np.ndarray:
    a = np.arange(5)
    a.flags.writeable = False
    return a


class Subclass(np.ndarray):
    pass


@pytest.mark.parametrize(
    "obj",
    [
        np.arange(10)[::2],
        np.asfortranarray(np.ones((3, 4))),
        np.zeros((0, 3)),
        read_only(),
        np.arange(5).view(Subclass),
        np.arange(5).astype(">i8"),
        np.array(["a", "b"]),
        np.array([1, "a"], object),
        np.zeros(3, [("x", "i4"), ("y", "f8")]),
        np.zeros(3, np.dtype("f8", metadata={"unit": "m"})),
        np.zeros(3, "M8[s]"),
        np.datetime64("2020-01-01", "s"),
        np.str_("a"),
        np.zeros(1, [("x", "i4"), ("y", "f8")])[0],
        [np.arange(3)],
        ((np.arange(3), [1]), {}),
        ((np.arange(3),), {"k": 1}),
        (np.arange(3), {}),
        ((1, 2), {}),
    ],
    ids=range(19),
)
@pytest.mark.filterwarnings("ignore:.*metadata:UserWarning")
def test_all_else_goes_the_long_way(pickling, obj):
    assert not is_bare(pickling, obj)
    back = there_and_back(pickling, obj)
    assert type(back) is type(obj)
    assert pickle.dumps(back) == pickle.dumps(pickle.loads(pickle.dumps(obj, 5)))


def test_one_array_given_twice_arrives_as_one(pickling):
    a = np.arange(3)
    args, _ = there_and_back(pickling, ((a, 1, a), {}))
    assert args[0] is args[2]


def test_long_strings_are_left_to_the_pickler_that_does_not_copy_them():
    call = ((np.arange(3), "x" * 100), {})
    assert dump_bare(call, lambda _: True, 101, ())
    assert dump_bare(call, lambda _: True, 100, ()) is None


def test_a_serializer_of_the_users_for_arrays_comes_first(pickling):
    shmpool.register_serializer(
        np.ndarray, serializer=lambda a: a.tolist(), deserializer=lambda x: np.array(x) + 100
    )
    try:
        assert there_and_back(pickling, np.arange(3)).tolist() == [100, 101, 102]
    finally:
        shmpool.deregister_serializer(np.ndarray)
    assert there_and_back(pickling, np.arange(3)).tolist() == [0, 1, 2]


def test_so_does_one_for_numbers(pickling):
    shmpool.register_serializer(
        np.float64, serializer=lambda _: "a number", deserializer=lambda text: text
    )
    try:
        assert there_and_back(pickling, np.float64(1.5)) == "a number"
        assert there_and_back(pickling, ((np.float64(1.5), np.arange(3)), {}))[0][0] == "a number"
        assert is_bare(pickling, np.float32(1.5))
    finally:
        shmpool.deregister_serializer(np.float64)
