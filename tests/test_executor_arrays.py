"""Arrays as arguments and results: they arrive equal, each side's is its own, and what can be shared is not copied."""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from typing import Any

import executor_tasks as tasks
import numpy as np
import numpy.typing as npt
import pytest
from executor_tasks import METHODS, SOON, warm_executor
from support import wait_until

import shmpool
from shmpool import ShmExecutor
from shmpool.memory import dirty

LIMIT = 72 * 1024  # below it, arrays ride in the message
CONFIGURATIONS = [(method, "memfd") for method in METHODS] + [("fork", "file"), ("spawn", "file")]


@pytest.fixture(scope="module", params=CONFIGURATIONS, ids="-".join)
def executor(request: pytest.FixtureRequest, temporary_folder: object) -> Iterator[ShmExecutor]:
    method, backend = request.param
    with warm_executor(method, backend=backend) as executor:
        yield executor


@pytest.fixture(scope="module", params=METHODS)
def readonly_executor(
    request: pytest.FixtureRequest, temporary_folder: object
) -> Iterator[ShmExecutor]:
    with warm_executor(request.param, mmap_mode="r", workers=1) as executor:
        yield executor


def run(executor: ShmExecutor, fn: Callable[..., Any], *args: Any) -> Any:
    return executor.submit(fn, *args).result(SOON)


def counted(nbytes: int, dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
    return np.arange(nbytes // np.dtype(dtype).itemsize).astype(dtype)


def read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.flags.writeable = False
    return array


def tagged(nbytes: int) -> tasks.Tagged:
    array = counted(nbytes).view(tasks.Tagged)
    array.tag = "it travels"
    return array


def unaligned(nbytes: int) -> npt.NDArray[Any]:
    return np.frombuffer(bytearray(nbytes + 8), np.float64, nbytes // 8, offset=1)


POINT = np.dtype([("x", "<f4"), ("id", "<u8"), ("name", "U3"), ("rest", "<i2", (2, 2))])

ARRAYS: dict[str, Callable[[], npt.NDArray[Any]]] = {
    "0-d": lambda: np.array(2.5),
    "empty": lambda: np.empty(0),
    "empty with dimensions": lambda: np.empty((3, 0, 5), np.int16),
    "a byte below the limit": lambda: counted(LIMIT - 1, np.uint8),
    "at the limit": lambda: counted(LIMIT),
    "above the limit": lambda: counted(LIMIT + 8),
    "1 MiB": lambda: counted(1 << 20),
    "odd size above 1 MiB": lambda: counted((1 << 20) + 4099, np.int8),
    "bool": lambda: counted(2 * LIMIT, np.int64) % 3 == 0,
    "float16": lambda: np.linspace(0, 1, LIMIT).astype(np.float16),
    "complex": lambda: counted(2 * LIMIT, np.complex128) * 1j,
    "long double": lambda: counted(2 * LIMIT, np.longdouble),
    "big endian": lambda: counted(2 * LIMIT, ">i4"),
    "structured": lambda: np.ones(4000, POINT),
    "structured, small": lambda: np.ones(2, POINT),
    "datetime64": lambda: np.datetime64("2020-01-01") + np.arange(20_000),
    "timedelta64": lambda: np.arange(20_000).astype("m8[ms]"),
    "text": lambda: np.array(["short", "longer"] * 10_000),
    "bytes": lambda: np.array([b"short", b"longer"] * 20_000),
    "F order": lambda: np.asfortranarray(counted(2 * LIMIT).reshape(128, -1)),
    "transposed": lambda: counted(4 * LIMIT).reshape(4, 32, -1).transpose(2, 0, 1),
    "strided": lambda: counted(4 * LIMIT)[::3],
    "columns": lambda: counted(4 * LIMIT).reshape(64, -1)[:, 5:-7],
    "negative strides": lambda: counted(2 * LIMIT).reshape(2, -1)[::-1, ::-1],
    "broadcast": lambda: np.broadcast_to(np.arange(64), (200, 64)),
    "unaligned": lambda: unaligned(2 * LIMIT),
    "object": lambda: np.array([None, "text", 3, [4, 5]], object),
    "masked": lambda: np.ma.masked_equal(counted(2 * LIMIT), 5),
    "record array": lambda: np.rec.array(np.ones(4000, POINT)),
    "subclass": lambda: tagged(2 * LIMIT),
    "read-only": lambda: read_only(counted(2 * LIMIT)),
    "read-only, small": lambda: read_only(counted(800)),
}


def assert_same(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> None:
    assert type(one) is type(other)
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert np.array_equal(one, other)
    if isinstance(one, np.ma.MaskedArray):
        assert np.array_equal(one.mask, other.mask)  # type: ignore[attr-defined]
    assert one.flags.writeable == other.flags.writeable
    assert one.flags.f_contiguous == other.flags.f_contiguous
    assert getattr(one, "tag", None) == getattr(other, "tag", None)


# Equal.


@pytest.mark.parametrize("kind", ARRAYS)
def test_array_arrives_in_the_task_and_comes_back_as_pickle_would_bring_it(
    executor: ShmExecutor, kind: str
) -> None:
    array = ARRAYS[kind]()
    # Protocol 5 keeps read-only arrays read-only; multiprocessing uses 4, with which all are writable.
    pickled = pickle.loads(pickle.dumps(array, 5 if array.flags.writeable else 4))
    _, there, back = run(executor, _describe, array)
    assert there == _describe(pickled)[1]
    assert_same(back, pickled)


def _describe(array: Any) -> tuple[int, tuple[Any, ...], Any]:
    import hashlib

    content = pickle.dumps(array.tolist() if array.size < 1000 else array.tobytes())
    flags = array.flags.writeable, array.flags.f_contiguous, array.flags.aligned
    kind = type(array).__name__, str(array.dtype), array.shape, getattr(array, "tag", None)
    return 0, (*kind, *flags, hashlib.sha1(content).hexdigest()), array


def test_many_small_arrays_that_are_packed_together_arrive_each_its_own(
    executor: ShmExecutor,
) -> None:
    arrays = [counted(LIMIT + 8 * i) + i for i in range(30)]  # 2 MB

    def scribble_in_every_second(arrays: list[Any]) -> list[Any]:
        for array in arrays[::2]:
            array[:] = -1
        return arrays

    back = run(executor, scribble_in_every_second, arrays)
    for i, (array, result) in enumerate(zip(arrays, back, strict=True)):
        assert np.array_equal(result, array if i % 2 else np.full_like(array, -1)), i
        assert array[1] == 1 + i, "the task wrote into the caller's array"
    back[1][:] = -2
    assert np.array_equal(back[3], arrays[3]), "neighbours in one block share memory"
    del back[:20]
    gc.collect()
    again = [run(executor, tasks.identity, result) for result in back]
    assert np.array_equal(again[1], arrays[21])


def test_ten_thousand_arrays_travel_in_one_list(executor: ShmExecutor) -> None:
    arrays = [np.full(50, i) for i in range(10_000)]
    back = run(executor, tasks.identity, arrays)
    assert np.array_equal(np.array(back), np.array(arrays))


def test_hundreds_of_shared_arrays_travel_in_one_list_again_and_again(
    executor: ShmExecutor,
) -> None:
    arrays = [np.full(LIMIT // 8, i) for i in range(300)]  # 20 MB, in the store
    once = run(executor, tasks.identity, arrays)
    copied = executor.stats().bytes_copied
    again = run(executor, tasks.identity, once)
    assert [array[0] for array in again] == [array[-1] for array in once] == list(range(300))
    assert executor.stats().bytes_copied - copied < LIMIT, "only the list itself needs copying"


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("ä" * 10_000_000, id="text"),
        pytest.param([["item", i, [float(i)]] for i in range(100_000)], id="nested lists"),
        pytest.param({f"key {i}": i for i in range(100_000)}, id="dictionary"),
        pytest.param(bytes(5_000_000), id="bytes"),
        pytest.param(bytearray(b"byte") * 1_000_000, id="bytearray"),
        pytest.param(bytes(LIMIT), id="bytes at the limit"),
        pytest.param(bytes(95_000), id="bytes that just fit into a message"),
        pytest.param(bytes(98_304), id="bytes that just do not"),
    ],
)
def test_large_object_that_is_no_array_arrives(executor: ShmExecutor, value: Any) -> None:
    back = run(executor, tasks.identity, value)
    assert type(back) is type(value)
    assert back == value
    if isinstance(back, bytearray):
        back[0] = 0
        assert value[0] == ord("b")


@pytest.mark.parametrize("nbytes", [50_000, 70_000, 80_000, 90_000, 97_000])
def test_large_function_and_large_argument_travel_together(
    executor: ShmExecutor, nbytes: int
) -> None:
    bound = bytes(nbytes)
    assert run(executor, lambda data: len(bound) + len(data), bytes(nbytes)) == 2 * nbytes


def test_many_arguments_just_below_the_limit_travel_together(executor: ShmExecutor) -> None:
    arrays = [counted(LIMIT - 8) + i for i in range(9)]
    sums = run(executor, lambda *arrays: [array.sum() for array in arrays], *arrays)
    assert sums == [array.sum() for array in arrays]


def test_pandas_data_frame_arrives_writable_and_private(executor: ShmExecutor) -> None:
    if executor._mp_context.get_start_method() not in ("fork", "spawn"):
        pytest.skip("each worker would import pandas, for nothing new")
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(
        {"a": np.arange(50_000), "b": np.arange(50_000) * 0.5, "c": ["x"] * 50_000}
    )

    def change(frame: Any) -> Any:
        frame.loc[0, "b"] = -1.0
        frame["d"] = frame["a"] * 2
        return frame

    expected = change(frame.copy())
    back = run(executor, change, frame)
    pd.testing.assert_frame_equal(back, expected)
    assert frame.loc[0, "b"] == 0.0
    back.loc[0, "a"] = 7
    assert run(executor, lambda frame: int(frame.loc[0, "a"]), back) == 7


# Private.


def test_what_a_task_writes_into_its_argument_is_seen_by_nobody_else(executor: ShmExecutor) -> None:
    array = counted(4 * LIMIT)
    ends = [0.0, float(array[-1])]
    futures = [executor.submit(tasks.ends_and_scribble, array) for _ in range(12)]
    assert [list(future.result(SOON)[1:]) for future in futures] == [ends] * 12
    assert [array[0], array[-1]] == ends
    # One after the other too: the second worker to get the block, and the same worker again.
    for _ in range(4):
        assert list(run(executor, tasks.ends_and_scribble, array)[1:]) == ends


def test_what_a_task_writes_into_a_forwarded_result_is_seen_by_nobody_else(
    executor: ShmExecutor,
) -> None:
    result = run(executor, tasks.count, LIMIT)
    for _ in range(6):
        assert run(executor, tasks.ends_and_scribble, result)[1:] == (0.0, LIMIT - 1.0)
    assert result[0] == 0.0


def test_what_the_caller_writes_into_a_result_is_seen_only_by_tasks_it_is_passed_to_later(
    executor: ShmExecutor,
) -> None:
    result = run(executor, tasks.count, LIMIT)
    before = executor.submit(tasks.ends, result)
    result[0] = -5
    after = executor.submit(tasks.ends, result)
    result[0] = -6
    assert before.result(SOON) == (0.0, LIMIT - 1.0)
    assert after.result(SOON) == (-5.0, LIMIT - 1.0)
    assert run(executor, tasks.ends, result[:100_000]) == (-6.0, LIMIT - 1.0)


def test_results_over_the_same_block_are_independent(executor: ShmExecutor) -> None:
    array = counted(4 * LIMIT)
    one, two = (run(executor, tasks.identity, array) for _ in range(2))
    one[:] = 1
    two[:] = 2
    assert (one.max(), two.min(), array[-1]) == (1, 2, array.size - 1)
    three = run(executor, tasks.identity, one)
    three[:] = 3
    del two
    four = run(executor, tasks.identity, array)
    assert (one.max(), three.min(), four[1]) == (1, 3, 1)


def test_changing_one_byte_of_a_result_is_noticed(executor: ShmExecutor) -> None:
    result = run(executor, tasks.count, 4 * LIMIT)  # 2 MB
    for index in (0, 511, 512, 100_000, result.size - 1):
        result.view(np.uint8)[8 * index + 7] ^= 1
        seen = run(executor, tasks.identity, result)
        assert np.array_equal(seen, result), index


def test_argument_that_a_task_keeps_is_not_changed_by_later_tasks(start_method: str) -> None:
    def keep(array: Any) -> None:
        import builtins

        builtins.kept = array  # type: ignore[attr-defined]
        array[0] = 42

    def look_at_kept() -> tuple[float, float]:
        import builtins

        return tasks.ends(builtins.kept)  # type: ignore[attr-defined]

    array = counted(4 * LIMIT)
    with ShmExecutor(1, mp_context=start_method) as executor:
        run(executor, keep, array)
        assert run(executor, tasks.ends_and_scribble, array)[1] == 0.0
        del array
        for _ in range(3):  # what was freed would be used again
            run(executor, tasks.ends_and_scribble, np.full(4 * LIMIT // 8, 9.0))
        assert run(executor, look_at_kept) == (42.0, 4 * LIMIT / 8 - 1)


def test_read_only_mode_gives_read_only_arrays_in_tasks_and_results(
    readonly_executor: ShmExecutor,
) -> None:
    array = counted(4 * LIMIT)
    writable, back = run(readonly_executor, lambda a: (a.flags.writeable, a), array)
    assert not writable
    assert not back.flags.writeable
    assert np.array_equal(back, array)
    nested = run(readonly_executor, lambda a: {"list": [a + 1]}, array)
    assert not nested["list"][0].flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        run(readonly_executor, tasks.ends_and_scribble, array)
    assert array.flags.writeable
    copied = readonly_executor.stats().bytes_copied
    assert run(readonly_executor, tasks.ends, back) == (0.0, array.size - 1)
    assert readonly_executor.stats().bytes_copied == copied


# Lifetime.


def test_results_outlive_the_executor(start_method: str, memory_backend: str) -> None:
    if memory_backend == "file" and start_method not in ("fork", "spawn"):
        pytest.skip("the backend does not know how workers are started")
    with ShmExecutor(1, mp_context=start_method) as executor:
        result = run(executor, tasks.count, LIMIT)
        part = run(executor, tasks.count, LIMIT)[100:-100]
    del executor
    gc.collect()
    assert np.array_equal(result, np.arange(LIMIT))
    assert np.array_equal(part, np.arange(100, LIMIT - 100))
    result[:] = 0
    with ShmExecutor(1, mp_context=start_method) as executor:
        assert run(executor, tasks.ends, result) == (0, 0)
        assert run(executor, tasks.ends, part) == (100, LIMIT - 101)


def test_results_outlive_a_worker_that_is_killed(start_method: str, memory_backend: str) -> None:
    if memory_backend == "file" and start_method not in ("fork", "spawn"):
        pytest.skip("the backend does not know how workers are started")
    with ShmExecutor(1, mp_context=start_method) as executor:
        untouched = run(executor, tasks.count, LIMIT)
        written = run(executor, tasks.count, LIMIT)
        written[0] = -1
        pid = run(executor, os.getpid)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: pid not in executor._processes, 60, "the worker's end to be noticed")
        assert np.array_equal(untouched, np.arange(LIMIT))
        # To the successor, which never met the dead one.
        assert run(executor, tasks.ends, untouched) == (0, LIMIT - 1)
        assert run(executor, tasks.ends, written) == (-1, LIMIT - 1)
        untouched[:] = 3
        assert run(executor, tasks.ends, untouched[5:-5]) == (3, 3)


# Not copied.


def test_result_passed_on_is_not_copied_nor_are_parts_of_it(executor: ShmExecutor) -> None:
    result = run(executor, tasks.count, 1 << 18)  # 2 MB
    cube = result.reshape(4, 64, -1)
    before = executor.stats()
    assert run(executor, tasks.ends, result) == (0, result.size - 1)
    assert run(executor, tasks.ends, result[1000:-1000]) == (1000, result.size - 1001)
    assert run(executor, tasks.ends, cube) == (0, result.size - 1)
    assert run(executor, tasks.ends, cube[1]) == (cube[1, 0, 0], cube[1, -1, -1])
    assert run(executor, tasks.ends, cube.T) == (0, result.size - 1)
    assert run(executor, tasks.ends, cube.transpose(1, 0, 2)[:, 0]) == (0, cube[0, -1, -1])
    assert run(executor, lambda a: a.dtype.str, result.view(np.int64)) == "<i8"
    assert run(executor, lambda d: d["x"][1].sum(), {"x": [0, result]}) == result.sum()
    both = run(executor, lambda a, b: a[0] + b[-1], result, result[: 1 << 17])
    assert both == (1 << 17) - 1
    after = executor.stats()
    assert after.bytes_copied == before.bytes_copied
    assert after.bytes_shared - before.bytes_shared > 7 * result.nbytes


def test_result_that_is_part_of_an_argument_is_not_copied(executor: ShmExecutor) -> None:
    result = run(executor, tasks.count, 1 << 18)
    copied = executor.stats().bytes_copied
    part = run(executor, lambda a: a[1000:-1000], result)
    assert np.array_equal(part, np.arange(1000, (1 << 18) - 1000))
    assert executor.stats().bytes_copied == copied


@pytest.mark.parametrize("chunksize", [1, 7])
@pytest.mark.parametrize("kind", ["list", "tuple", "repeat"])
def test_one_array_for_forty_tasks_is_written_once(
    executor: ShmExecutor, kind: str, chunksize: int
) -> None:
    array = counted(1 << 20)
    before = executor.stats().bytes_copied
    many = {
        "list": [array] * 40,
        "tuple": (array,) * 40,
        "repeat": itertools.repeat(array, 40),
    }[kind]
    ends = list(executor.map(tasks.ends, many, chunksize=chunksize, timeout=SOON))
    assert ends == [(0.0, array.size - 1.0)] * 40
    assert executor.stats().bytes_copied - before == array.nbytes


def test_one_array_submitted_again_and_again_is_written_once(executor: ShmExecutor) -> None:
    array = counted(1 << 20)
    before = executor.stats().bytes_copied
    for _ in range(5):
        run(executor, tasks.ends, array)
    assert executor.stats().bytes_copied - before == array.nbytes


def test_function_with_a_bound_array_is_written_once(executor: ShmExecutor) -> None:
    array = counted(1 << 20)
    before = executor.stats().store.bytes_copied
    results = list(executor.map(lambda i: array[i], range(40), timeout=SOON))
    assert results == list(range(40))
    assert executor.stats().store.bytes_copied - before == array.nbytes


# Never stale.


def test_changes_between_submits_are_always_seen(executor: ShmExecutor) -> None:
    array = np.zeros(LIMIT)
    futures = []
    for i in range(20):
        array[i] = array[-1] = i
        futures.append(executor.submit(lambda a: (a.sum(), a[-1]), array))
    expected = np.cumsum(np.arange(20)) + np.arange(20)
    assert [future.result(SOON) for future in futures] == [(s, i) for i, s in enumerate(expected)]


@pytest.mark.parametrize("buffersize", [None, 1, 3])
def test_generator_may_refill_one_buffer(executor: ShmExecutor, buffersize: int | None) -> None:
    buffer = np.zeros(LIMIT)

    def frames() -> Iterator[npt.NDArray[Any]]:
        for i in range(20):
            buffer[:] = i
            yield buffer

    ends = executor.map(tasks.ends, frames(), buffersize=buffersize, timeout=SOON)
    assert list(ends) == [(i, i) for i in range(20)]


def test_generator_may_refill_one_buffer_and_yield_slices_of_it(executor: ShmExecutor) -> None:
    buffer = np.zeros(LIMIT)

    def frames() -> Iterator[npt.NDArray[Any]]:
        for i in range(10):
            buffer[:] = i
            yield buffer[: LIMIT // 2]
            buffer[: LIMIT // 2] = -i
            yield buffer[LIMIT // 4 :]

    ends = list(executor.map(tasks.ends, frames(), timeout=SOON))
    assert ends == list(itertools.chain.from_iterable(((i, i), (-i, i)) for i in range(10)))


@pytest.mark.parametrize("kind", ["list", "repeat"])
def test_changes_while_a_lazy_map_goes_on_are_seen(executor: ShmExecutor, kind: str) -> None:
    array = np.zeros(LIMIT)
    many = [array] * 10 if kind == "list" else itertools.repeat(array, 10)
    seen = []
    for i, (first, _) in enumerate(
        executor.map(tasks.ends, many, buffersize=1, timeout=SOON), start=1
    ):
        seen.append(first)
        array[:] = i
    # With one task under way, the next one is submitted before its predecessor's result is handed out.
    assert seen == [0, *range(9)]


def test_a_new_array_at_the_address_of_an_old_one_is_not_mistaken_for_it(
    executor: ShmExecutor,
) -> None:
    for i in range(30):
        array = np.full(LIMIT, float(i))
        assert run(executor, tasks.ends, array) == (i, i)
        del array


# Aliasing.


def scribble_in_first(one: Any, *others: Any) -> list[tuple[float, float]]:
    one[...] = -1
    return [tasks.ends(other) for other in others]


@pytest.mark.parametrize("stored", [False, True], ids=["own array", "a result"])
def test_overlapping_views_do_not_alias_on_the_other_side(
    executor: ShmExecutor, stored: bool
) -> None:
    array = run(executor, tasks.count, LIMIT) if stored else np.arange(float(LIMIT))
    for _ in range(2):  # the second time the store has them all
        views = array[: LIMIT // 2], array[LIMIT // 4 :], array[:], array.reshape(2, -1)[0]
        last = LIMIT - 1.0
        assert run(executor, scribble_in_first, *views) == [
            (LIMIT / 4, last), (0, last), (0, LIMIT / 2 - 1),
        ]  # fmt: skip
    assert (array[0], array[-1]) == (0, LIMIT - 1)


@pytest.mark.parametrize("stored", [False, True], ids=["own array", "a result"])
def test_the_same_array_twice_in_one_call_is_one_array_as_with_pickle(
    executor: ShmExecutor, stored: bool
) -> None:
    array = run(executor, tasks.count, LIMIT) if stored else np.arange(float(LIMIT))
    assert run(executor, lambda a, b: a is b, array, array)
    assert run(executor, lambda pair: pair[0] is pair[1], [array, array])


def test_overlapping_views_in_a_result_do_not_alias_here(executor: ShmExecutor) -> None:
    def views(array: Any) -> tuple[Any, ...]:
        return array, array[:], array[: LIMIT // 2], array[LIMIT // 4 :]

    for argument in (np.arange(float(LIMIT)), run(executor, tasks.count, LIMIT)):
        whole, again, left, right = run(executor, views, argument)
        whole[:] = -1
        left[:] = -2
        assert (again[0], again[-1]) == (0, LIMIT - 1)
        assert (right[0], right[-1]) == (LIMIT / 4, LIMIT - 1)
        assert (argument[0], argument[-1]) == (0, LIMIT - 1)


# At random.


@pytest.mark.parametrize("detector", ["scan", "pagemap", "none", "faults"])
def test_random_tasks_give_what_plain_numpy_gives(
    start_method: str,
    memory_backend: str,
    detector: str,
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
) -> None:
    """Two hundred tasks that scribble, keep, slice and forward, against the same calls run here on pickled copies."""
    if (memory_backend, detector) != ("memfd", "scan") and start_method != "fork":
        pytest.skip("neither the backend nor the detector knows how workers are started")
    if detector == "faults":  # page faults are asked for first, as for very large arrays
        detector = "scan"
        monkeypatch.setattr("shmpool.store.leases._LARGE", 0)
    if why := dirty._why_not(detector) if detector != "none" else "":
        pytest.skip(f"this system has no such detector: {why}")
    monkeypatch.setenv("SHMPOOL_DIRTY_DETECTOR", detector)
    held: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []  # ours, and what it must equal
    under_way: list[tuple[Any, list[Any]]] = []

    def settle(most: int) -> None:
        while len(under_way) > most:
            future, expected = under_way.pop(int(rng.integers(len(under_way))))
            results = future.result(SOON)
            assert len(results) == len(expected)
            for result, wanted in zip(results, expected, strict=True):
                assert np.array_equal(result, wanted)
                if result.ndim and result.size and rng.random() < 0.6:
                    held.append((result, wanted))

    def move() -> None:
        if len(held) < 4 or rng.random() < 0.2:
            array = rng.integers(0, 100, int(rng.integers(1, 80_000))).astype(np.float64)
            held.append((array, array.copy()))
        while len(held) > 12:
            del held[int(rng.integers(len(held)))]
        for ours, model in held:
            assert np.array_equal(ours, model)
        chosen, copies = [], []
        for index in rng.integers(0, len(held), int(rng.integers(1, 4))):
            ours, model = held[index]
            start, stop = sorted(rng.integers(0, ours.size + 1, 2).tolist())
            if rng.random() < 0.5 or start == stop:
                start, stop = 0, ours.size
            chosen.append(ours[start:stop])
            copies.append(model[start:stop].copy())
        seed = int(rng.integers(1 << 30))
        under_way.append(
            (executor.submit(tasks.play, seed, chosen), copied(tasks.play(seed, copies)))
        )
        if rng.random() < 0.5:
            index = int(rng.integers(len(held)))
            at = int(rng.integers(held[index][0].size))
            for array in held[index]:
                array[at : at + 1000] = seed % 1000

    with ShmExecutor(2, mp_context=start_method) as executor:
        for _ in range(200 if memory_backend == "memfd" else 100):
            move()
            settle(6)
        settle(0)
    for ours, model in held:
        assert np.array_equal(ours, model), "a result changed when the executor had gone"
    del tasks._kept[:]


def copied(arrays: list[Any]) -> list[Any]:
    return [np.array(array) for array in arrays]


REFILLING = [tasks.FilledByGetstate, tasks.FilledByReduce, tasks.FilledBySerializer]


@pytest.fixture
def with_serializer() -> Iterator[None]:
    shmpool.register_serializer(
        tasks.FilledBySerializer,
        serializer=tasks.fill_in,
        deserializer=lambda state: tasks.FilledBySerializer(*state),
    )
    yield
    shmpool.deregister_serializer(tasks.FilledBySerializer)


@pytest.mark.usefixtures("with_serializer")
@pytest.mark.parametrize("kind", REFILLING)
@pytest.mark.parametrize("chunksize", [1, 3])
def test_what_is_filled_in_while_it_is_pickled_arrives_as_it_was(
    kind: type[Any], chunksize: int
) -> None:
    with ShmExecutor(1, "fork") as executor:
        if chunksize > 1:  # in one pickle, one array has one state
            items = [kind(i) for i in range(6)]
            seen = list(executor.map(tasks.value_and_ends, items, chunksize=chunksize))
            assert [value for value, _, _ in seen] == list(range(6))
            return
        items = [kind(i) for i in range(6)]
        assert list(executor.map(tasks.value_and_ends, items)) == [(i, i, i) for i in range(6)]
        mixed = [tasks.SCRATCH, kind(7), tasks.SCRATCH, kind(8), tasks.SCRATCH]
        ends = list(executor.map(tasks.ends_of_any, mixed))
        assert ends == [(5, 5), (7, 7), (7, 7), (8, 8), (8, 8)]


@pytest.mark.usefixtures("with_serializer")
@pytest.mark.parametrize("kind", REFILLING)
def test_a_pool_gets_what_is_filled_in_while_it_is_pickled(kind: type[Any]) -> None:
    with shmpool.Pool(1) as pool:
        items = [kind(i) for i in range(6)]
        assert pool.map(tasks.value_and_ends, items, 1) == [(i, i, i) for i in range(6)]
        assert list(pool.imap(tasks.value_and_ends, items)) == [(i, i, i) for i in range(6)]
        calls = [tasks.FilledByIter(i) for i in range(6)]
        assert pool.starmap(tasks.value_and_ends, calls, 1) == [(i, i, i) for i in range(6)]
