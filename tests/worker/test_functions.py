"""Functions that are kept from one call to the next: nobody can tell, but by the time it takes."""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Iterator
from functools import partial
from typing import Any

import bound_tasks as tasks
import numpy as np
import pytest
from executor_tasks import SOON, warm_executor
from store.link import dump, make_store
from support import wait_until

import shmpool
from shmpool.memory.dirty import AlwaysDirty
from shmpool.store.peer import Peer
from shmpool.wire.messages import Call, Notice
from shmpool.worker.chunks import Chunk
from shmpool.worker.functions import Function, Functions, _Watched

SIZE = 30_000


# As the worker sees it, without a worker.


class Calls:
    """A store that gets calls from itself: as if it were the parent's and the worker's at once."""

    def __init__(self) -> None:
        self.store = make_store()
        self.parent = Peer(upstream=True)
        self.functions = Functions(self.store, self.parent)
        self.payloads: list[Any] = []
        self.serials = itertools.count(10)

    def pack(self, fn: Any) -> Any:
        payload = dump(self.store, fn)
        self.payloads.append(payload)
        return payload

    def begin(self, payload: Any, serial: int = 1, *, readonly: bool = False) -> Function:
        call = Call(0, payload.data, b"", readonly, serial=serial)
        self.functions.expect(call)
        return self.functions.receive(call)

    def run(self, payload: Any, *args: Any, **options: Any) -> tuple[int, Any]:
        """A call: which object the function was, and what it returned."""
        function = self.begin(payload, **options)
        fn = self.functions.load(function)
        result = copy.deepcopy(fn(*args))  # a worker has sent it away by now
        which = id(fn)
        del fn
        self.functions.done(function, ())
        return which, result

    def keeps(self, fn: Any, *args: Any, **options: Any) -> bool:
        """Is a function kept after its second call?"""
        payload = self.pack(fn)
        options = {"serial": next(self.serials), **options}
        self.run(payload, *args, **options)
        assert not self.functions.keeps_one, "there may be no other call"
        self.run(payload, *args, **options)
        return self.functions.keeps_one


@pytest.fixture
def calls() -> Iterator[Calls]:
    calls = Calls()
    yield calls
    tasks.forget()
    calls.functions.forget()
    for payload in calls.payloads:
        payload.release()
    assert calls.store.stats().holders["views"] == 0
    calls.store.verify()


def numbers() -> np.ndarray:
    return np.arange(SIZE, dtype=float)


@pytest.mark.parametrize(
    "fn",
    [
        partial(tasks.sum_of, numbers()),
        partial(tasks.sum_of, numbers(), 1, "a", None, (1.5, b"b", numbers())),
        partial(tasks.sum_of, np.ones(10)),
        partial(tasks.sum_of, np.zeros(0)),
        partial(tasks.sum_of, np.asfortranarray(numbers().reshape(100, -1))),
        partial(tasks.sum_of, numbers(), 1, named=numbers()),
        partial(np.dot, numbers()),
        partial(np.add, numbers()),
        partial(operator.mul, numbers()),
        partial(tasks.sum_of, numbers(), operator.add, np.float64),
        partial(pow, 2),
    ],
    ids=lambda fn: f"{fn.func.__name__}-{len(fn.args)}",
)
def test_a_function_bound_to_arrays_and_numbers_is_kept_while_its_calls_follow_each_other(
    calls, fn
):
    payload = calls.pack(fn)
    _, expected = calls.run(payload, 2)
    second, _ = calls.run(payload, 2)
    for _ in range(3):
        which, result = calls.run(payload, 2)
        assert which == second, "it was unpickled again"
        assert np.array_equal(result, expected)
        del result
    del expected


def test_so_is_that_of_a_chunk(calls):
    assert calls.keeps(Chunk(partial(tasks.sum_of, numbers())), 1, 2, 3)


def test_so_is_one_bound_to_a_ref(calls):
    ref = shmpool.put(numbers(), store=calls.store)
    assert calls.keeps(partial(operator.is_, ref), 2)


def test_and_one_whose_arrays_are_read_only(calls):
    assert calls.keeps(partial(tasks.sum_of, numbers()), 2, readonly=True)


class Sum:
    def __init__(self) -> None:
        self.array = numbers()

    def __call__(self, number: int) -> float:
        return self.array.sum() + number


class Partial(partial):
    pass


@pytest.mark.parametrize(
    "fn",
    [
        Sum(),
        Sum().__call__,
        lambda number: number,
        Partial(tasks.sum_of, numbers()),
        partial(Sum(), 1),
        partial([].append),
        partial(tasks.look, numbers(), [1]),
        partial(tasks.look, numbers(), {"a": 1}, named=1),
        partial(tasks.look, numbers(), ([],)),
        partial(tasks.look, numbers(), partial(tasks.sum_of, 1)),
        partial(tasks.look, np.array([1, 2], dtype=object)),
        partial(tasks.look, np.ma.masked_array(numbers())),
    ],
    ids=lambda fn: f"{type(fn).__name__}",
)
def test_one_bound_to_anything_else_is_not(calls, fn):
    args = () if isinstance(fn, partial) and isinstance(fn.func, Sum) else (2,)
    assert not calls.keeps(fn, *args)


def test_nor_one_that_comes_once_or_with_another_number(calls):
    payload = calls.pack(partial(tasks.sum_of, numbers()))
    for _ in range(3):
        calls.run(payload, serial=0)
        assert not calls.functions.keeps_one
    for serial in (1, 2, 3, 1):
        calls.run(payload, serial=serial)
        assert not calls.functions.keeps_one


@pytest.mark.parametrize("deed", [name for name in tasks.DEEDS if name not in ("read", "fail")])
def test_nor_one_of_which_a_call_has_kept_or_changed_something(calls, deed):
    payload = calls.pack(partial(tasks.do, numbers().reshape(100, -1), np.ones(5)))
    seen = [calls.run(payload, "read")[1] for _ in range(3)]
    assert calls.functions.keeps_one
    if deed == "write_to_what_was_kept":
        assert calls.run(payload, "keep")[1] == seen[0]
    assert calls.run(payload, deed)[1] == seen[0]
    if deed == "write_to_what_was_kept":
        assert not tasks.kept
    else:
        assert not calls.functions.keeps_one
    for _ in range(3):
        assert calls.run(payload, "read")[1] == seen[0]


def test_nor_where_nobody_can_tell_whether_it_was_written_to(calls):
    calls.store._detector = AlwaysDirty()
    assert not calls.keeps(partial(tasks.sum_of, numbers()))
    assert calls.keeps(partial(tasks.sum_of, numbers()), readonly=True)


def test_nor_while_a_call_has_the_same_array_as_an_argument(calls):
    payload = calls.pack(partial(tasks.sum_of, numbers()))
    for arguments in ([], payload.blocks):
        for _ in range(2):
            function = calls.begin(payload)
            calls.functions.load(function)
            given_up = calls.functions.done(function, arguments)
    assert given_up == payload.blocks and not calls.functions.keeps_one


@pytest.mark.parametrize(
    "message", [Notice(None), Call(1, b"", b"", serial=2), Call(1, b"", b"", True, serial=10)]
)
def test_it_is_let_go_of_before_anything_else_is_done(calls, message):
    assert calls.keeps(partial(tasks.sum_of, numbers()))
    calls.functions.expect(Call(1, b"", b"", serial=10))
    assert calls.functions.keeps_one
    calls.functions.expect(message)
    assert not calls.functions.keeps_one
    assert calls.store.stats().holders["views"] == 0


def test_a_result_that_is_a_part_of_it_is_no_reason_to_unpickle_it_again(calls):
    payload = calls.pack(partial(tasks.corner, numbers().reshape(100, -1)))
    seen = {calls.run(payload, 10)[0] for _ in range(5)}
    assert calls.functions.keeps_one and len(seen) <= 2


# As a user sees it.


@pytest.fixture(scope="module", params=["fork", "spawn"])
def executor(request: pytest.FixtureRequest) -> Iterator[shmpool.ShmExecutor]:
    with warm_executor(request.param, workers=2) as executor:
        yield executor


def test_each_task_gets_what_was_bound_whatever_the_others_have_done_to_it(executor, rng):
    for _ in range(3):
        array = np.full((100, 300), rng.random())
        bound = (np.full(7, 2.0), [1], 3) if rng.random() < 0.5 else (np.full(7, 2.0), 3)
        fn = partial(tasks.do, array, *bound, named="n")
        deeds = [
            *map(
                str,
                rng.choice(["read"] * 10 + [deed for deed in tasks.DEEDS if deed != "fail"], 150),
            )
        ]
        expected = tasks.look(array, *bound, None, named="n")
        for chunksize in (1, 2):
            if chunksize == 1:
                results = executor.map(fn, deeds)
                assert [*results] == [expected] * len(deeds)
            else:
                # Calls of one chunk have one function, as with the standard library's executor: so they only read.
                assert [*executor.map(fn, ["read"] * 40, chunksize=2)] == [expected] * 40
        assert [*executor.map(partial(tasks.do, np.zeros(3)), ["write_to_what_was_kept"] * 20)]


def test_a_task_that_raises_leaves_the_next_what_was_bound(executor):
    fn = partial(tasks.do, np.ones(SIZE))
    futures = [*executor.map(fn, ["read"] * 5)]
    results = executor.map(fn, ["read", "read", "fail"] * 3)
    assert next(results) == next(results) == futures[0]
    with pytest.raises(KeyError, match="on purpose"):
        next(results)
    assert [*executor.map(fn, ["read"] * 5)] == futures


def test_blocks_that_are_used_again_show_what_is_in_them_now(executor, rng):
    """The parent frees a function's blocks without a word, while workers may keep it; the next lies where it was."""
    for number in range(60):
        size = int(rng.choice([SIZE, 2 * SIZE]))
        count = int(rng.integers(1, 12))
        fn = partial(tasks.sum_of, np.full(size, float(number)))
        assert [*executor.map(fn, range(count))] == [number * size] * count
        if rng.random() < 0.3:
            array = np.full(size, 0.5)
            assert executor.submit(tasks.sum_of, array).result(SOON) == size / 2


def test_nothing_is_held_when_the_calls_are_through():
    with shmpool.ShmExecutor(2) as executor:
        array = np.ones(SIZE)
        assert [*executor.map(partial(tasks.sum_of, array), range(50))] == [SIZE] * 50
        del array
        wait_until(lambda: executor.stats().store.blocks == 0, 60, "the blocks to be free")


def test_what_is_not_known_well_enough_is_not_watched(calls):
    """Arrays outside of the store are only compared if they are small; and what has a strange name has none."""
    large = np.ones(SIZE)
    assert _Watched.of(partial(tasks.sum_of, large), calls.store) is None
    assert _Watched.of(partial(tasks.sum_of, large[:9]), calls.store) is not None

    class Odd:
        __call__ = tasks.sum_of

        def __getattribute__(self, name):
            pytest.fail("code of the user's was run")

    assert _Watched.of(partial(Odd(), large[:9]), calls.store) is None
    assert _Watched.of(partial(tasks.sum_of, large[:9], Odd()), calls.store) is None
    assert _Watched.of(partial(lambda array, _: array, large[:9]), calls.store) is None
