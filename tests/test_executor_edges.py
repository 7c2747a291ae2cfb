"""What seldom happens to an executor: interrupted in the middle of a map, out of descriptors, seldom used names."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from executor_tasks import METHODS, SOON, run_script
from support import wait_until
from test_limits import descriptors_left

import shmpool
from shmpool import (
    ObjectStore,
    Pool,
    SerializationError,
    ShmExecutor,
    WorkerDiedError,
    get_reusable_executor,
)
from shmpool.config import Config
from shmpool.memory import segment


def total_soon(array: np.ndarray) -> float:
    time.sleep(0.05)  # so that who waits for it really waits
    return float(array.sum())


def hang(_number: int) -> None:
    signal.pause()


def begin_and_hang(file: str) -> None:
    Path(file).touch()
    signal.pause()


def items_and_ctrl_c() -> Iterator[int]:
    yield from range(5)
    raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["map", "map_unordered"])
def test_ctrl_c_while_the_calls_of_a_map_are_read_cancels_those_before(method: str) -> None:
    with ShmExecutor(1, "fork") as executor:
        with pytest.raises(KeyboardInterrupt):
            getattr(executor, method)(hang, items_and_ctrl_c())
        # The one that runs, and what was sent to its worker.
        wait_until(
            lambda: len(executor._driver._foreman.table.tasks) <= 2, 60, "the others to be gone"
        )
        executor.kill_workers()


class Presses:
    """Ctrl-C comes to the worker while it unpickles this."""

    def __reduce__(self) -> tuple[object, ...]:
        return signal.raise_signal, (signal.SIGINT,)


def test_ctrl_c_just_before_a_task_begins_ends_it() -> None:
    with ShmExecutor(1, "fork") as executor:
        error = executor.submit(repr, Presses()).exception(SOON)
        assert isinstance(error, KeyboardInterrupt), repr(error)
        assert executor.submit(abs, -1).result(SOON) == 1
        assert executor.stats().workers_died == 0


def raise_at_ctrl_c() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return os.getpid()


def test_ctrl_c_between_tasks_ends_a_worker_that_has_a_handler_of_a_tasks_without_a_word(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with ShmExecutor(1, "fork") as executor:
        pid = executor.submit(raise_at_ctrl_c).result(SOON)
        process = executor._processes[pid]
        os.kill(pid, signal.SIGINT)
        wait_until(lambda: pid not in executor._processes, 60, "the worker to end")
        assert process.exitcode == 0
        assert executor.submit(abs, -1).result(SOON) == 1
    assert "KeyboardInterrupt" not in capfd.readouterr().err


@pytest.mark.parametrize("buffersize", [None, 2])
def test_an_iterable_that_raises_ends_the_bar_of_its_map(buffersize: int | None) -> None:
    pytest.importorskip("tqdm")
    screen = io.StringIO()

    def broken() -> Iterator[int]:
        yield 1
        raise LookupError("of the iterable")

    with ShmExecutor(1, "fork") as executor:
        with pytest.raises(LookupError, match="of the iterable"):
            list(
                executor.options(progress={"file": screen}).map(
                    abs, broken(), buffersize=buffersize
                )
            )
        assert executor.submit(abs, -1).result(SOON) == 1
    assert screen.getvalue().endswith("\n")


def test_a_function_that_cannot_be_pickled_fails_each_call_of_a_map() -> None:
    lock = threading.Lock()
    with ShmExecutor(1, "fork") as executor:
        results = executor.map(lambda number: (lock, number), [1, 2, 3])
        with pytest.raises(SerializationError, match="lock"):
            next(results)
        assert executor.submit(abs, -1).result(SOON) == 1


def test_a_future_that_runs_can_not_be_begun_again() -> None:
    with ShmExecutor(1, "fork") as executor:
        future: Future[None] = executor.submit(hang, 1)
        wait_until(future.running, 60, "the task to begin")
        with pytest.raises(RuntimeError, match="unexpected state"):
            future.set_running_or_notify_cancel()
        executor.kill_workers()


def test_an_executor_says_what_it_is() -> None:
    with ShmExecutor(3, "fork") as executor:
        assert "at most 3 workers by fork" in repr(executor)


def test_workers_that_are_replaced_after_some_tasks_are_spawned_by_default() -> None:
    with ShmExecutor(1, max_tasks_per_child=1) as executor:
        assert "by spawn" in repr(executor)


def test_get_takes_one_ref_many_or_nothing_else() -> None:
    one, two = shmpool.put(np.ones(2)), shmpool.put("text")
    assert shmpool.get(one).sum() == 2
    assert shmpool.get([two, two]) == ["text", "text"]
    for wrong in (1, [one, 1], "ref"):
        with pytest.raises(TypeError, match="takes an ObjectRef or a list of them"):
            shmpool.get(wrong)  # type: ignore[call-overload]


def test_a_reusable_executor_that_is_broken_is_made_anew_with_as_many_workers() -> None:
    first = get_reusable_executor(3, context="fork")
    first.kill_workers()
    second = get_reusable_executor(reuse=True, context="fork")
    try:
        assert second is not first
        assert second._max_workers == 3
        assert second.submit(abs, -1).result(SOON) == 1
    finally:
        second.shutdown()


def test_where_the_system_does_not_tell_no_huge_pages_are_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nothing_there(_path: str) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(segment, "open", nothing_there, raising=False)  # a kernel without them
    assert segment.may_be_huge.__wrapped__() is False


# Descriptors end anywhere in the start of a worker. (More of this is in test_limits.py.)


@pytest.mark.leaks(
    "multiprocessing keeps its first pipe when it cannot have the second", "descriptors"
)
def test_where_the_process_that_replaces_workers_cannot_be_forked_all_is_tried_again_later() -> (
    None
):
    left, failed = 22, 0
    while failed < 3:  # from the last that is started, backwards
        left -= 1
        with ShmExecutor(1, "fork") as executor:
            with descriptors_left(left):
                error = None
                try:
                    assert executor.submit(abs, -1).result(SOON) == 1
                except OSError as refused:
                    error = refused
                    assert error.errno == errno.EMFILE
            failed += error is not None
            assert executor.submit(abs, -2).result(SOON) == 2


def test_an_array_for_an_initializer_is_let_go_of_where_no_worker_can_be_spawned() -> None:
    store = ObjectStore()
    array = np.ones(100_000)
    with ShmExecutor(1, "spawn", initializer=len, initargs=(array,), store=store) as executor:
        held = executor.put(np.zeros(1000_000))  # so that there is memory with room
        failed = 0
        for left in range(4, 40):
            with descriptors_left(left):
                error = executor.submit(abs, -1).exception(SOON)
            if error is None:
                break
            failed += 1
        assert failed
        assert executor.submit(abs, -2).result(SOON) == 2
        del held
    assert store.stats().blocks == 0


def allow_no_more_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def test_a_worker_that_may_open_nothing_any_more_says_so_and_is_replaced() -> None:
    array = np.ones(100_000)
    with ShmExecutor(1, "fork", store=ObjectStore()) as executor:
        executor.submit(allow_no_more_descriptors).result(SOON)
        error = executor.submit(len, array).exception(SOON)  # comes with a descriptor of its memory
        assert isinstance(error, WorkerDiedError)
        assert "descriptors that came with a task were lost" in str(error)
        assert executor.submit(len, array).result(SOON) == 100_000


AT_EXIT = """
    import atexit
    from shmpool import ShmExecutor

    def use_it():
        for executor in (used, unused):
            try:
                executor.submit(abs, -1)
            except RuntimeError as error:
                print(error)

    if __name__ == "__main__":
        used, unused = ShmExecutor(1, "fork"), ShmExecutor(1, "fork")
        used.submit(abs, -1).result()
        atexit.register(use_it)
"""


def test_an_exit_handler_is_told_that_it_is_too_late(tmp_path: Path) -> None:
    said = run_script(tmp_path, AT_EXIT)
    assert said.splitlines() == [
        "cannot schedule new futures after shutdown",
        "cannot schedule new futures after interpreter shutdown",
    ]


# ---------------------------------------------------------------- what a program has set


@pytest.fixture
def sockets_time_out() -> Iterator[None]:
    """The program has said that a socket that is made is to give up after some time."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.1)
    yield
    socket.setdefaulttimeout(before)


@pytest.mark.parametrize("method", METHODS)
def test_a_default_timeout_of_sockets_is_not_that_of_workers(
    sockets_time_out: None, method: str
) -> None:
    with ShmExecutor(2, method, initializer=socket.setdefaulttimeout, initargs=(0.1,)) as executor:
        assert list(executor.map(total_soon, [np.ones(100_000), np.ones(200_000)])) == [1e5, 2e5]
        pids = set(executor._processes)
        executor.submit(time.sleep, 0.5).result(
            SOON
        )  # one is busy, the other is idle, longer than that
        assert list(executor.map(total_soon, [np.ones(100_000), np.ones(200_000)])) == [1e5, 2e5]
        assert set(executor._processes) == pids


def test_a_default_timeout_of_sockets_is_not_that_of_who_takes_tasks_back(
    sockets_time_out: None,
) -> None:
    with ShmExecutor(1, "fork", max_tasks_per_child=1) as executor:
        for _ in range(2):  # the second worker is the template's
            assert executor.submit(total_soon, np.ones(100_000)).result(SOON) == 1e5
    with ShmExecutor(1, "fork") as executor:
        slow = executor.submit(time.sleep, 0.5)
        waiting = [executor.submit(abs, -1) for _ in range(3)]
        assert all(future.cancel() for future in reversed(waiting))
        assert slow.result(SOON) is None
        assert executor.submit(abs, -1).result(SOON) == 1


def test_a_map_with_a_buffersize_keeps_no_argument_alive() -> None:
    made: list[weakref.ref[np.ndarray]] = []

    def arrays() -> Iterator[np.ndarray]:
        for number in range(10):
            array = np.full(100, float(number))
            made.append(weakref.ref(array))
            yield array
            del array

    with ShmExecutor(1, "fork") as executor:
        results = executor.map(np.sum, arrays(), buffersize=2)
        for number, result in enumerate(results):
            assert result == 100 * number
            # One is in the tuple that zip() uses again.
            assert sum(ref() is not None for ref in made) <= 1


# ---------------------------------------------------------------- long times


@pytest.mark.parametrize("seconds", [3e6, 1e9, threading.TIMEOUT_MAX])
def test_who_is_ready_to_wait_for_years_may_do_so(seconds: float) -> None:
    store = ObjectStore(config=Config.from_env()._replace(warm_seconds=seconds))
    with ShmExecutor(1, "fork", store=store, idle_timeout=seconds) as executor:
        assert executor.submit(total_soon, np.ones(100_000)).result(seconds) == 100_000
        assert executor.submit(total_soon, np.ones(3)).exception(seconds) is None
        assert list(executor.map(abs, [-1, 2], timeout=seconds)) == [1, 2]
        assert list(executor.map_unordered(abs, [-1], timeout=seconds)) == [1]
        limited = executor.options(timeout=seconds)
        assert limited.submit(total_soon, np.ones(3)).result(SOON) == 3
        (process,) = executor._processes.values()
        assert executor.stats().workers_died == 0
    process.join(seconds)
    with Pool(1, context="fork") as pool:
        assert pool.apply_async(total_soon, (np.ones(3),)).get(seconds) == 3
        assert pool.imap(abs, [-1]).next(seconds) == 1
        pool.close()
        pool.join()


def test_a_process_of_the_template_may_be_waited_for_for_years(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    with ShmExecutor(1, "fork", max_tasks_per_child=1) as executor:
        executor.submit(abs, 1).result(SOON)
        future = executor.submit(begin_and_hang, str(begun))
        wait_until(begun.exists, 60, "the task to begin")  # before, it would go to another worker
        process = executor._processes[max(executor._processes)]
        thread = threading.Thread(target=process.join, args=(1e9,))
        thread.start()
        process.kill()
        thread.join()
        assert process.exitcode == -signal.SIGKILL
        assert isinstance(future.exception(SOON), WorkerDiedError)
