"""A stream of everything that is bad, mixed at random, through one executor: each fails as it should, and nothing else.

What is bad alone, at each moment and with each start method, is tried by ``test_crash_matrix.py`` and
``test_semantics.py``; here it comes in any order, with honest tasks in between that must not notice. At the end of the
file: what is larger than 32 bits can count.
"""

from __future__ import annotations

import fcntl
import gc
import os
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import bad_input_tasks as bad
import numpy as np
import psutil
import pytest
from executor_tasks import SOON

from shmpool import SerializationError, ShmExecutor, WorkerDiedError

GIB = 1 << 30
EXPECTED = {
    bad.complain: (LookupError,),
    bad.leave: (SystemExit,),
    bad.interrupt: (KeyboardInterrupt,),
    bad.close_generator: (GeneratorExit,),
    bad.recurse: (RecursionError,),
}


def test_what_is_raised_by_pickling_and_cannot_be_pickled_either_costs_no_worker() -> None:
    with ShmExecutor(1, "fork") as executor:
        pid = executor.submit(os.getpid).result(SOON)
        future = executor.submit(bad.give, bad.WhenPickled, bad.complain_with_a_lock)
        with pytest.raises(SerializationError, match=r"exception\.args\[0\] \(a '_thread\.lock'\)"):
            future.result(SOON)
        assert executor.submit(os.getpid).result(SOON) == pid


@dataclass
class Kind:
    """Something bad, and what may come of it: errors, or a result that is equal."""

    submit: Callable[[ShmExecutor], Future[Any]]
    errors: tuple[type[BaseException], ...] = ()
    results: tuple[Any, ...] = ()


def kinds() -> dict[str, Kind]:
    found: dict[str, Kind] = {}
    for deed in bad.RAISING:
        name, errors = deed.__name__, EXPECTED[deed]
        packed = (*errors, SerializationError)
        found[f"{name} in a task"] = Kind(lambda ex, d=deed: ex.submit(bad.do, d), errors)
        found[f"{name} when an argument arrives"] = Kind(
            lambda ex, d=deed: ex.submit(bad.take, bad.WhenUnpickled(d)), errors
        )
        found[f"{name} when a result arrives"] = Kind(
            lambda ex, d=deed: ex.submit(bad.give, bad.WhenUnpickled, d), errors
        )
        found[f"{name} when a result is pickled"] = Kind(
            lambda ex, d=deed: ex.submit(bad.give, bad.WhenPickled, d), packed
        )
    for deed in (bad.complain, bad.recurse):  # what exits or interrupts, the caller gets
        found[f"{deed.__name__} when an argument is pickled"] = Kind(
            lambda ex, d=deed: ex.submit(bad.take, bad.WhenPickled(d)),
            (*EXPECTED[deed], SerializationError),
        )
    for deed in bad.DEADLY:
        name, errors = deed.__name__, (WorkerDiedError,)
        found[f"{name} in a task"] = Kind(lambda ex, d=deed: ex.submit(bad.do, d), errors)
        found[f"{name} when an argument arrives"] = Kind(
            lambda ex, d=deed: ex.submit(bad.take, bad.WhenUnpickled(d)), errors
        )
        found[f"{name} when a result is pickled"] = Kind(
            lambda ex, d=deed: ex.submit(bad.give, bad.WhenPickled, d), errors
        )
    for name in bad.REDUCTIONS:
        # Whatever it is, something says so: the pickler, at once or in the worker, or the unpickler.
        found[f"an argument reduced to {name}"] = Kind(
            lambda ex, n=name: ex.submit(bad.take, bad.give_reduced(n)), (Exception,)
        )
        found[f"a result reduced to {name}"] = Kind(
            lambda ex, n=name: ex.submit(bad.give_reduced, n), (Exception,)
        )
    for name in bad.ERRORS:
        found[f"raises {name}"] = Kind(lambda ex, n=name: ex.submit(bad.fail, n), (BaseException,))
    return found


KINDS = kinds()


def settle(name: str, future: Future[Any]) -> None:
    kind = KINDS[name]
    error = future.exception(SOON)
    assert error is not None, f"{name}: it gave {future.result()!r}"
    assert isinstance(error, BaseException), f"{name}: {error!r} cannot be raised"
    assert isinstance(error, kind.errors), f"{name}: {type(error)}"
    if WorkerDiedError not in kind.errors:
        assert not isinstance(error, WorkerDiedError), f"{name}: {error}"
    # The frames of a traceback hold what could not be sent.
    traceback.clear_frames(error.__traceback__)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_each_fails_by_itself_and_costs_no_worker_that_it_does_not_kill(method: str) -> None:
    with ShmExecutor(1, method) as executor:
        pids = {executor.submit(os.getpid).result(SOON)}
        for name, kind in KINDS.items():
            settle(name, kind.submit(executor))
            pid = executor.submit(os.getpid).result(SOON)
            assert (pid in pids) == (WorkerDiedError not in kind.errors), name
            pids.add(pid)
    gc.collect()


def test_all_of_it_in_any_order_with_honest_tasks_in_between(rng: np.random.Generator) -> None:
    array = np.arange(50_000.0)
    names = list(KINDS)
    with ShmExecutor(2, "fork") as executor:
        sent: list[tuple[str | int, Future[Any]]] = []
        for i in range(250):
            if rng.random() < 0.5:
                sent.append((i, executor.submit(np.add, array, i)))
            else:
                name = names[rng.integers(len(names))]
                sent.append((name, KINDS[name].submit(executor)))
            while len(sent) > 30:
                check(*sent.pop(int(rng.integers(len(sent)))), array)
        while sent:
            check(*sent.pop(), array)
        assert list(executor.map(abs, range(-50, 0))) == list(range(50, 0, -1))
    gc.collect()


def check(what: str | int, future: Future[Any], array: np.ndarray) -> None:
    if isinstance(what, str):
        settle(what, future)
    else:
        assert np.array_equal(future.result(SOON), array + what), "an honest task has suffered"


def test_a_result_that_can_be_neither_pickled_nor_shown_fails_its_task_only() -> None:
    with ShmExecutor(1, "fork") as executor:
        pid = executor.submit(os.getpid).result(SOON)
        error = executor.submit(bad.give, bad.Mute).exception(SOON)
        assert isinstance(error, SerializationError) and "bad_input_tasks.Mute" in str(error)
        assert "bad_input_tasks.Mute object at" in vars(error)["value"]
        assert executor.submit(os.getpid).result(SOON) == pid


@pytest.mark.parametrize("name", sorted(bad.ERRORS))
def test_what_was_raised_is_told_however_odd(name: str) -> None:
    """The text of the worker's traceback arrives, also where the exception itself does not."""
    with ShmExecutor(1, "fork") as executor:
        error = executor.submit(bad.fail, name).exception(SOON)
    assert error is not None
    told = "".join(traceback.format_exception(error))
    assert "in fail" in told, told
    traceback.clear_frames(error.__traceback__)


def test_ends_of_iterators_and_generators_end_nobody_elses() -> None:
    """An exception that means something to the code which waits for the result."""
    with ShmExecutor(1, "fork") as executor:

        def results() -> Iterator[Any]:
            yield executor.submit(abs, -1).result(SOON)
            yield executor.submit(bad.fail, "the end of an iterator").result(SOON)

        found = results()
        assert next(found) == 1
        with pytest.raises(RuntimeError, match="raised StopIteration"):  # and not a silent end
            next(found)
        with pytest.raises(GeneratorExit):
            executor.submit(bad.fail, "the end of a generator").result(SOON)


# ---------------------------------------------------------------- more than 32 bits


@pytest.fixture
def much_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One at a time, of all test processes, and only where there is memory for it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / "much-memory.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if psutil.virtual_memory().available < 16 * GIB:
            pytest.skip("less than 16 GiB of memory are free")
        yield
        gc.collect()


@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not os.environ.get("SHMPOOL_TEST_LARGE"), reason="takes a minute; SHMPOOL_TEST_LARGE=1 runs it"
)
@pytest.mark.parametrize("make", [bad.make_bytes, bad.make_text])
def test_bytes_and_text_of_more_than_2_gib(much_memory: None, make: Callable[[int], Any]) -> None:
    number = 2 * GIB + 5
    with ShmExecutor(1, "fork") as executor:
        value = make(number)
        expected = bad.size_and_ends(value)
        future = executor.submit(bad.size_and_ends, value)
        del value
        assert future.result(20 * SOON) == expected
        del future
        back = executor.submit(make, number).result(20 * SOON)
        assert bad.size_and_ends(back) == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_array_of_more_than_4_gib(much_memory: None) -> None:
    number = 4 * GIB + 5
    with ShmExecutor(1, "fork") as executor:
        array = np.zeros(number, np.uint8)  # never written to: the system has no pages for it
        array[0], array[-1] = 1, 2
        assert executor.submit(bad.size_and_ends, array).result(20 * SOON) == (number, 1, 2)
        ref = executor.put(array)  # found again
        assert executor.stats().bytes_copied == number
        del array
        part = ref.get()[3 * GIB :]
        assert executor.submit(bad.size_and_ends, part).result(20 * SOON) == (GIB + 5, 0, 2)
        assert executor.stats().bytes_copied == number


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_result_of_more_than_4_gib(much_memory: None) -> None:
    number = 4 * GIB + 5
    with ShmExecutor(1, "fork") as executor:
        array = executor.submit(bad.fill_in, number).result(20 * SOON)
        assert bad.size_and_ends(array) == (number, 1, 2)
        array[1] = 3
        assert executor.submit(bad.size_and_ends, array[1:]).result(20 * SOON) == (number - 1, 3, 2)
        del array
