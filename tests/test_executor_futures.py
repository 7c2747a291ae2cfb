"""The contract of submit, map and shutdown: what code written for concurrent.futures relies on."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool, _RemoteTraceback
from pathlib import Path
from typing import Any, NoReturn

import executor_tasks as tasks
import numpy as np
import pytest
from executor_tasks import METHODS, PYTHON, SOON, meet, run, run_script, warm_executor, write_script
from loky.backend.context import get_context as get_loky_context
from support import wait_until

from shmpool import SerializationError, ShmExecutor


@pytest.fixture(scope="module", params=METHODS)
def executor(request: pytest.FixtureRequest, temporary_folder: object) -> Iterator[ShmExecutor]:
    with warm_executor(request.param) as executor:
        yield executor


def context_of(method: str) -> Any:
    return get_loky_context("loky") if method == "loky" else multiprocessing.get_context(method)


class Gate:
    """Tasks wait at it until it is opened here."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "open"
        self._here = folder / "here"
        self._here.mkdir()
        os.mkfifo(self._path)
        self._keeps_open = os.open(self._path, os.O_RDWR)

    def open(self) -> None:
        if self._keeps_open >= 0:
            os.write(self._keeps_open, bytes(1000))
            self._keeps_open = -1 - self._keeps_open

    def close(self) -> None:
        self.open()
        os.close(-1 - self._keeps_open)

    @property
    def task(self) -> Callable[..., int]:
        path, here = str(self._path), str(self._here)

        def wait_here(*_: Any) -> int:
            Path(here, f"{os.getpid()}-{time.monotonic_ns()}").touch()
            with open(path, "rb", buffering=0) as gate:
                gate.read(1)
            return os.getpid()

        return wait_here

    def wait_for(self, number: int) -> None:
        wait_until(lambda: len(os.listdir(self._here)) >= number, 60, f"{number} tasks at the gate")


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path)
    yield gate
    gate.close()


# map.


@pytest.mark.parametrize("buffersize", [None, 1, 5, 1000])
@pytest.mark.parametrize("chunksize", [1, 3, 1000])
def test_map_gives_what_the_builtin_gives(
    executor: ShmExecutor, chunksize: int, buffersize: int | None
) -> None:
    found = executor.map(
        divmod, range(50), itertools.count(3), chunksize=chunksize, buffersize=buffersize
    )
    assert list(found) == list(map(divmod, range(50), itertools.count(3)))
    assert list(executor.map(abs, [], chunksize=chunksize, buffersize=buffersize)) == []


def test_map_raises_where_the_task_did_and_gives_what_came_before(executor: ShmExecutor) -> None:
    results = executor.map(divmod, [5, 6, 7], [1, 2, 0])
    assert [next(results), next(results)] == [(5, 0), (3, 0)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_map_with_a_buffersize_reads_lazily(executor: ShmExecutor) -> None:
    read = 0

    def numbers() -> Iterator[int]:
        nonlocal read
        for read in itertools.count(1):
            yield -read

    results = executor.map(abs, numbers(), buffersize=4)
    assert read == 4
    for i in range(1, 30):
        assert next(results) == i
        assert read <= i + 4
    results.close()  # type: ignore[attr-defined]
    assert read <= 34


def test_map_without_a_buffersize_reads_all_at_once(executor: ShmExecutor) -> None:
    numbers = iter(range(100))
    results = executor.map(abs, numbers)
    assert next(numbers, None) is None
    assert list(results) == list(range(100))


def test_map_of_an_executor_that_nobody_else_holds_gives_all_results() -> None:
    results = ShmExecutor(1, mp_context="fork").map(abs, range(10))
    gc.collect()
    assert list(results) == list(range(10))


def test_map_times_out(executor: ShmExecutor, gate: Gate) -> None:
    results = executor.map(
        lambda i, task=gate.task: task() if i else "at once", [0, 1], timeout=0.3
    )
    found: list[object] = []
    with pytest.raises(TimeoutError):
        found.extend(results)
    gate.open()
    assert found in (["at once"], [])  # nothing, if it was not at once on a busy machine


def test_map_abandoned_early_cancels_what_has_not_begun(executor: ShmExecutor, gate: Gate) -> None:
    done = gate._here.parent / "done"
    done.mkdir()

    def task(i: int, wait: Callable[[], int] = gate.task, done: str = str(done)) -> int:
        if i:
            wait()
        Path(done, str(i)).touch()
        return i

    results = executor.map(task, range(200))
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    gate.open()
    assert executor.submit(abs, -1).result(SOON) == 1
    tasks.warm_up(executor, 2)  # both workers have come past whatever they were sent
    assert len(os.listdir(done)) < 100


# Exceptions.


class NeedsTwoError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(one)
        self.two = two


class LockedError(Exception):
    def __init__(self) -> None:
        super().__init__("it holds a lock")
        self.lock = threading.Lock()


def function_that_fails() -> NoReturn:
    raise LookupError("nothing there")


def fail_by(kind: str) -> None:
    if kind == "not unpickled":
        raise NeedsTwoError(1, 2)
    if kind == "not pickled":
        raise LockedError
    if kind == "exit":
        sys.exit(3)
    if kind == "interrupt":
        raise KeyboardInterrupt
    raise LookupError(kind)


def test_exception_has_the_traceback_of_the_worker_as_its_cause(executor: ShmExecutor) -> None:
    error = executor.submit(function_that_fails).exception(SOON)
    assert isinstance(error, LookupError)
    assert error.args == ("nothing there",)
    assert type(error.__cause__) is _RemoteTraceback
    assert "in function_that_fails" in error.__cause__.tb
    assert error.__cause__.tb in str(error.__cause__)


@pytest.mark.parametrize(
    ("kind", "types"),
    [
        ("not unpickled", (TypeError, SerializationError)),
        ("not pickled", (SerializationError,)),
        ("exit", (SystemExit,)),
        ("interrupt", (KeyboardInterrupt,)),
    ],
)
def test_whatever_a_task_raises_reaches_its_future_and_the_pool_goes_on(
    executor: ShmExecutor, kind: str, types: tuple[type[BaseException], ...]
) -> None:
    pids = set(executor._processes)
    error = executor.submit(fail_by, kind).exception(SOON)
    assert isinstance(error, types), repr(error)
    if kind == "not pickled":
        text = str(error) + "".join(getattr(error, "__notes__", []))
        assert "exception.lock" in text
        assert "it holds a lock" in text, "what was raised is lost"
    if kind == "exit":
        assert error.code == 3  # type: ignore[attr-defined]
    assert list(executor.map(abs, range(-5, 0), timeout=SOON)) == [5, 4, 3, 2, 1]
    assert set(executor._processes) == pids, "a worker was lost"


def test_error_holds_no_arguments_of_the_task_alive(executor: ShmExecutor) -> None:
    error = executor.submit(np.arange(100_000).reshape, (3, 3)).exception(SOON)
    assert isinstance(error, ValueError)
    assert executor.stats().store.blocks <= 1


# What cannot be pickled.


def test_function_that_cannot_be_pickled_fails_its_future_only(executor: ShmExecutor) -> None:
    lock = threading.Lock()
    error = executor.submit(lambda: lock).exception(SOON)
    assert isinstance(error, SerializationError)
    assert "fn" in str(error) and "lock" in str(error)
    assert executor.submit(abs, -1).result(SOON) == 1


def test_argument_that_cannot_be_pickled_fails_its_future_only(executor: ShmExecutor) -> None:
    config = {"model": {"locks": [1, threading.Lock()]}}
    for future, path in (
        (executor.submit(print, 1, config), "args[1]['model']['locks'][1]"),
        (executor.submit(print, end=config), "kwargs['end']['model']['locks'][1]"),
    ):
        error = future.exception(SOON)
        assert isinstance(error, SerializationError)
        assert path in str(error)
    results = executor.map(lambda x: x, [1, config, 3])
    assert next(results) == 1
    with pytest.raises(SerializationError):
        next(results)
    assert executor.submit(abs, -1).result(SOON) == 1


def test_result_that_cannot_be_pickled_fails_its_future_only(executor: ShmExecutor) -> None:
    error = executor.submit(lambda: {"a": [threading.Lock()]}).exception(SOON)
    assert isinstance(error, SerializationError)
    assert "result['a'][0]" in str(error)
    assert executor.submit(abs, -1).result(SOON) == 1


def test_what_is_too_deep_to_be_pickled_fails_its_future_only(executor: ShmExecutor) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    try:
        assert isinstance(executor.submit(len, deep).exception(SOON), SerializationError)
        assert executor.submit(abs, -1).result(SOON) == 1
    finally:
        while deep:  # or its end would be a recursion, too
            deep = deep.pop()


# shutdown, and cancelling.


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_submit_after_shutdown_raises(method: str) -> None:
    executor = ShmExecutor(1, mp_context=method)
    assert executor.submit(abs, -1).result(SOON) == 1
    executor.shutdown()
    executor.shutdown()
    for call in (lambda: executor.submit(abs, 1), lambda: executor.map(abs, [1])):
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            call()
    with pytest.raises(RuntimeError):
        ShmExecutor(1, mp_context=method).__exit__(None, None, None) or executor.submit(abs)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_shutdown_without_waiting_finishes_what_was_submitted(method: str) -> None:
    executor = ShmExecutor(2, mp_context=method)
    futures = [executor.submit(np.full, 20_000, i) for i in range(30)]
    executor.shutdown(wait=False)
    assert [future.result(SOON)[-1] for future in futures] == list(range(30))
    executor.shutdown()


def test_shutdown_can_cancel_what_has_not_begun(gate: Gate) -> None:
    executor = ShmExecutor(1, mp_context="fork")
    first = executor.submit(gate.task)
    gate.wait_for(1)
    futures = [executor.submit(abs, -i) for i in range(50)]
    executor.shutdown(wait=False, cancel_futures=True)
    gate.open()
    executor.shutdown()
    assert isinstance(first.result(SOON), int)
    assert all(future.done() for future in futures)
    assert sum(future.cancelled() for future in futures) >= 48
    assert wait(futures, 0).done == set(futures)


def test_shutdown_waits_for_cancelled_futures_to_be_settled_for_waiters(gate: Gate) -> None:
    executor = ShmExecutor(1, mp_context="fork")
    executor.submit(gate.task)
    gate.wait_for(1)
    futures = [executor.submit(abs, -i) for i in range(20)]
    settled: list[Future[int]] = []
    waiter = threading.Thread(target=lambda: settled.extend(as_completed(futures, SOON)))
    waiter.start()
    executor.shutdown(wait=False, cancel_futures=True)
    gate.open()
    waiter.join(SOON)
    assert set(settled) == set(futures)
    executor.shutdown()


def test_pending_future_can_be_cancelled_and_never_runs(executor: ShmExecutor, gate: Gate) -> None:
    ran = str(gate._here.parent / "ran")
    blocking = [executor.submit(gate.task) for _ in range(2)]
    gate.wait_for(2)
    futures = [executor.submit(os.mkdir, ran + str(i)) for i in range(150)]
    cancelled = [future for future in futures if future.cancel()]
    assert futures[-1] in cancelled
    assert len(cancelled) >= 150 - 2 * 33, "more than were sent ahead could not be cancelled"
    gate.open()
    wait([*blocking, *futures], SOON)
    assert executor.submit(abs, -1).result(SOON) == 1
    for i, future in enumerate(futures):
        assert os.path.exists(ran + str(i)) != (future in cancelled)


def test_wait_and_as_completed(executor: ShmExecutor, gate: Gate) -> None:
    slow = executor.submit(gate.task)
    quick = executor.submit(abs, -1)
    assert next(as_completed([slow, quick], SOON)) is quick
    done, not_done = wait([slow, quick], SOON, concurrent.futures.FIRST_COMPLETED)
    assert (done, not_done) == ({quick}, {slow})
    bad = executor.submit(fail_by, "first")
    done, not_done = wait([slow, bad], SOON, concurrent.futures.FIRST_EXCEPTION)
    assert (done, not_done) == ({bad}, {slow})
    gate.open()
    assert wait([slow], SOON).done == {slow}


# asyncio.


def test_works_with_asyncio(executor: ShmExecutor) -> None:
    async def main() -> Any:
        loop = asyncio.get_running_loop()
        array = await loop.run_in_executor(executor, np.arange, 20_000)
        wrapped = asyncio.wrap_future(executor.submit(np.sum, array))
        many = await asyncio.gather(*(loop.run_in_executor(executor, abs, -i) for i in range(50)))
        with pytest.raises(LookupError):
            await loop.run_in_executor(executor, function_that_fails)
        return await wrapped, many

    assert asyncio.run(main()) == (19_999 * 10_000, list(range(50)))


# Callbacks.


def test_callback_that_raises_is_logged_and_harms_nothing(
    executor: ShmExecutor, caplog: pytest.LogCaptureFixture, gate: Gate
) -> None:
    future = executor.submit(gate.task)
    future.add_done_callback(lambda _: function_that_fails())
    gate.open()
    future.result(SOON)
    assert executor.submit(abs, -1).result(SOON) == 1
    wait_until(lambda: "nothing there" in caplog.text, 60, "the log")


def test_callback_may_submit(executor: ShmExecutor) -> None:
    last: Future[int] = Future()

    def again(future: Future[int]) -> None:
        number = future.result()
        if number == 20:
            last.set_result(number)
        else:
            executor.submit(np.add, number, 1).add_done_callback(again)

    executor.submit(abs, 0).add_done_callback(again)
    assert last.result(SOON) == 20


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("wait_there", [True, False])
def test_callback_may_shut_down(method: str, wait_there: bool) -> None:
    executor = ShmExecutor(1, mp_context=method)
    ended = threading.Event()

    def end(_: object) -> None:
        executor.shutdown(wait=wait_there)
        ended.set()

    future = executor.submit(np.ones, 20_000)
    others = [executor.submit(abs, -i) for i in range(10)]
    future.add_done_callback(end)
    assert ended.wait(SOON)
    assert [other.result(SOON) for other in others] == list(range(10))
    executor.shutdown()


# Threads.


def test_eight_threads_may_submit(executor: ShmExecutor) -> None:
    found: dict[int, list[int]] = {}

    def work(number: int) -> None:
        array = np.full(10_000, number)
        futures = [executor.submit(np.add, array, i) for i in range(40)]
        found[number] = [int(future.result(SOON)[-1]) for future in futures]

    threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SOON)
    assert found == {100 * i: list(range(100 * i, 100 * i + 40)) for i in range(8)}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_eight_threads_may_be_the_first_to_submit(method: str) -> None:
    barrier = threading.Barrier(8)
    futures: list[Future[int]] = []

    with ShmExecutor(2, mp_context=method) as executor:

        def work() -> None:
            barrier.wait(SOON)
            futures.extend([executor.submit(abs, -1) for _ in range(5)])

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        assert [future.result(SOON) for future in futures] == [1] * 40
        assert len(executor._processes) <= 2


# The end of the executor, and of the program.


def test_executor_that_is_dropped_finishes_its_work_and_leaves_nothing(start_method: str) -> None:
    executor = ShmExecutor(1, mp_context=start_method)
    futures = [executor.submit(np.full, 20_000, i) for i in range(20)]
    processes = executor._processes
    del executor
    assert [int(future.result(SOON)[0]) for future in futures] == list(range(20))
    wait_until(lambda: not processes, 60, "the workers to end")
    # Descriptors, threads and blocks are what the watch on every test looks at.


PENDING = """
    import sys, time
    from pathlib import Path
    import numpy as np
    from shmpool import ShmExecutor

    def write(folder, i, array):
        time.sleep(0.01)
        Path(folder, str(i)).write_text(str(array.sum()))

    if __name__ == "__main__":
        method, how, folder = sys.argv[1:]
        executor = ShmExecutor(2, mp_context=method)
        for i in range(20):
            executor.submit(write, folder, i, np.full(20_000, i))
        if how == "dropped":
            del executor
        if how == "not waited for":
            executor.shutdown(wait=False)
        if how == "exception":
            raise LookupError("on purpose")
        if how == "exit":
            sys.exit(5)
"""


@pytest.mark.parametrize("how", ["kept", "dropped", "not waited for", "exception", "exit"])
def test_program_that_ends_with_work_pending_finishes_it(
    start_method: str, how: str, tmp_path: Path
) -> None:
    if how != "kept" and start_method not in (
        ("fork", "spawn") if how == "exception" else ("fork",)
    ):
        pytest.skip("how the workers are started makes no difference")
    results = tmp_path / "results"
    results.mkdir()
    script = write_script(tmp_path, PENDING)
    done = run(*PYTHON, str(script), start_method, how, str(results))
    assert done.returncode == {"exception": 1, "exit": 5}.get(how, 0), done.stderr
    if how == "exception":
        assert done.stderr.endswith("LookupError: on purpose\n")
        assert done.stderr.count("Traceback") == 1, done.stderr
    else:
        assert done.stderr == ""
    assert {path.name: float(path.read_text()) for path in results.iterdir()} == {
        str(i): 20_000 * i for i in range(20)
    }


AT_MODULE_LEVEL = """
    import sys
    from shmpool import ShmExecutor

    executor = ShmExecutor(2, mp_context=sys.argv[1])

    def double(x):
        return 2 * x

    if __name__ == "__main__":
        print(list(executor.map(double, range(5))))
"""


def test_executor_at_module_level_that_is_never_shut_down_harms_nothing(
    start_method: str, tmp_path: Path
) -> None:
    assert run_script(tmp_path, AT_MODULE_LEVEL, start_method) == "[0, 2, 4, 6, 8]\n"


# The initializer.


def set_up(*args: Any) -> None:
    import builtins

    builtins.__dict__.setdefault("set_up_with", []).append(args)


def set_up_with() -> list[Any]:
    import builtins

    return builtins.__dict__["set_up_with"]  # type: ignore[no-any-return]


def test_initializer_runs_once_in_each_worker_with_its_arguments(start_method: str) -> None:
    context = context_of(start_method)
    array = np.arange(100_000)
    queue, lock = context.Queue(), context.Lock()

    def use(i: int) -> tuple[int, int, int]:
        (call,) = set_up_with()
        function, big, lock, queue = call
        with lock:
            queue.put(function(i))
        big[0] += 1  # our own copy
        return os.getpid(), int(big[0]), int(big[-1])

    initargs = ((lambda x: 3 * x), array, lock, queue)
    with ShmExecutor(2, context, set_up, initargs) as executor:
        tasks.warm_up(executor, 2)
        results = list(executor.map(use, range(10), timeout=SOON))
    assert sorted(queue.get(timeout=SOON) for _ in range(10)) == list(range(0, 30, 3))
    assert {last for _, _, last in results} == {99_999}
    by_pid: dict[int, list[int]] = {}
    for pid, first, _ in results:
        by_pid.setdefault(pid, []).append(first)
    assert all(sorted(firsts) == list(range(1, len(firsts) + 1)) for firsts in by_pid.values())
    assert array[0] == 0
    queue.close()
    queue.join_thread()


def log_to(path: str) -> None:
    logging.getLogger("concurrent.futures").addHandler(logging.FileHandler(path))
    raise LookupError("no such setting")


def error_of_submit(executor: ShmExecutor, *call: Any) -> BaseException | None:
    """What the future raises, or submit itself, if the pool is known to be broken by then."""
    try:
        return executor.submit(*call).exception(2 * SOON)
    except BrokenProcessPool as error:
        return error


def test_initializer_that_fails_is_logged_and_breaks_the_pool_with_the_reason(
    start_method: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with ShmExecutor(1, mp_context=start_method, initializer=log_to, initargs=(str(log),)) as ex:
        assert not ex._broken
        for i in range(3):
            error = error_of_submit(ex, abs, -i)
            assert isinstance(error, BrokenProcessPool)
            assert "no such setting" in str(error)
        assert "no such setting" in str(ex._broken)
        with pytest.raises(BrokenProcessPool, match="initialize"):
            ex.submit(abs, 1)
    assert "Exception in initializer" in log.read_text()
    assert "no such setting" in log.read_text()


def test_initializer_that_ends_the_process_breaks_the_pool(start_method: str) -> None:
    with ShmExecutor(1, mp_context=start_method, initializer=os._exit, initargs=(3,)) as executor:
        assert isinstance(error_of_submit(executor, abs, -1), BrokenProcessPool)
        with pytest.raises(BrokenProcessPool):
            executor.submit(abs, 1)


@pytest.mark.parametrize("method", ["forkserver", "spawn", "loky"])
def test_initializer_that_cannot_be_pickled_is_said_to_be(method: str) -> None:
    lock = threading.Lock()
    with ShmExecutor(1, mp_context=method, initializer=set_up, initargs=({"a": lock},)) as ex:
        error: BaseException | None
        try:
            error = ex.submit(abs, -1).exception(SOON)
        except Exception as raised:
            error = raised
    assert isinstance(error, (BrokenProcessPool, SerializationError))
    assert "initargs" in str(error)
    assert "'a'" in str(error)


def test_a_forked_child_waits_in_vain_for_a_future_of_its_parents() -> None:
    with ShmExecutor(1, mp_context="fork") as executor:
        future = executor.submit(signal.pause)
        wait_until(future.running, 60, "the task to be sent")
        pid = os.fork()
        if not pid:
            code = 1
            try:
                future.result(0.01)
            except TimeoutError:
                code = 0
            finally:
                os._exit(code)
        _, code = os.waitpid(pid, 0)
        executor.kill_workers()
    assert code == 0


# The workers.


def test_worker_is_replaced_after_max_tasks_per_child(start_method: str) -> None:
    with ShmExecutor(1, mp_context=start_method, max_tasks_per_child=4) as executor:
        array = np.arange(20_000)
        results = list(executor.map(lambda a: (os.getpid(), a), [array] * 12, timeout=2 * SOON))
    pids = [pid for pid, _ in results]
    assert [len(list(group)) for _, group in itertools.groupby(pids)] == [4, 4, 4]
    assert all(np.array_equal(result, array) for _, result in results)


def test_fork_starts_all_workers_at_the_first_submit() -> None:
    with ShmExecutor(3, mp_context="fork") as executor:
        assert executor._processes == {}
        executor.submit(abs, 1)
        assert len(executor._processes) == 3


@pytest.mark.parametrize("method", ["forkserver", "spawn", "loky"])
def test_others_start_workers_on_demand_and_use_idle_ones_again(method: str, gate: Gate) -> None:
    with ShmExecutor(3, mp_context=method) as executor:
        for _ in range(5):
            executor.submit(abs, 1).result(SOON)
        assert len(executor._processes) == 1
        futures = [executor.submit(gate.task) for _ in range(2)]
        gate.wait_for(2)
        assert len(executor._processes) == 2
        gate.open()
        assert {future.result(SOON) for future in futures} == set(executor._processes)


def test_attributes_that_third_parties_read(start_method: str) -> None:
    context = context_of(start_method)
    executor = ShmExecutor(2, context)
    processes = executor._processes
    assert (executor._max_workers, executor._mp_context, executor._broken) == (2, context, False)
    with executor:
        pid = executor.submit(os.getpid).result(SOON)
        assert executor._processes is processes
        assert processes[pid].pid == pid
        assert processes[pid].is_alive()
        assert processes[pid].exitcode is None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: pid not in processes, 60, "the death to be noticed")
        assert executor.submit(os.getpid).result(SOON) in processes
        assert executor._processes is processes
    assert executor._processes is processes
    assert not processes


BAD_ARGUMENTS: list[dict[str, Any]] = [
    {"max_workers": 0},
    {"max_workers": -1},
    {"max_workers": "two"},
    {"max_workers": 1, "initializer": "no function"},
    {"max_workers": 1, "max_tasks_per_child": 0},
    {"max_workers": 1, "max_tasks_per_child": 1.5},
]


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS, ids="-".join)
def test_bad_arguments_are_refused_as_by_the_standard_library(arguments: dict[str, Any]) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011  # which one is the question
        ProcessPoolExecutor(**arguments)
    with pytest.raises(theirs.type) as ours:
        ShmExecutor(**arguments)
    assert str(ours.value) == str(theirs.value)


def test_bad_arguments_of_map_are_refused_as_by_the_standard_library(executor: ShmExecutor) -> None:
    with ProcessPoolExecutor(1) as standard, pytest.raises(ValueError) as theirs:  # noqa: PT011
        standard.map(abs, [1], chunksize=0)
    with pytest.raises(ValueError) as ours:  # noqa: PT011
        executor.map(abs, [1], chunksize=0)
    assert str(ours.value) == str(theirs.value)
    with pytest.raises(ValueError, match="buffersize must be None or > 0"):
        executor.map(abs, [1], buffersize=0)
    with pytest.raises(TypeError, match="buffersize must be an integer or None"):
        executor.map(abs, [1], buffersize="1")  # type: ignore[arg-type]


def test_submit_takes_any_keyword(executor: ShmExecutor) -> None:
    found = executor.submit(dict, self=1, fn=2, task=3, timeout=4).result(SOON)
    assert found == {"self": 1, "fn": 2, "task": 3, "timeout": 4}
    with pytest.raises(TypeError):
        executor.submit()  # type: ignore[call-arg]


def test_map_submits_the_calls_around_one_that_cannot_be_pickled(executor: ShmExecutor) -> None:
    before = executor.stats().tasks_submitted
    calls: list[Any] = [*range(50), threading.Lock(), np.ones(1 << 17), *range(50)]
    results = executor.map(type, calls)
    assert [next(results) for _ in range(50)] == [int] * 50
    with pytest.raises(SerializationError, match="lock"):
        next(results)
    assert executor.stats().tasks_submitted == before + 101
    results = executor.map_unordered(type, [*calls[:50], *calls[51:]])
    assert Counter(results) == {int: 100, np.ndarray: 1}


# Who runs when.


def test_tasks_that_wait_for_each_other_get_a_worker_each(
    start_method: str, tmp_path: Path
) -> None:
    with ShmExecutor(3, mp_context=start_method) as executor:
        first = [executor.submit(abs, -i) for i in range(1000)]
        for attempt in range(
            3
        ):  # the first time right behind a thousand tiny ones that are still waiting
            folder = tmp_path / str(attempt)
            folder.mkdir()
            meeting = [executor.submit(meet, str(folder), str(i), 3) for i in range(3)]
            assert len({future.result(SOON) for future in meeting}) == 3
        assert [future.result(SOON) for future in first] == list(range(1000))


def test_long_task_holds_up_none_of_the_tiny_ones_behind_it(
    executor: ShmExecutor, gate: Gate
) -> None:
    list(executor.map(abs, range(1000)))  # tiny ones are sent ahead by the dozen
    tiny = [executor.submit(abs, -i) for i in range(100)]
    long = executor.submit(gate.task)
    tiny += [executor.submit(abs, -i) for i in range(100, 300)]
    assert [future.result(SOON) for future in tiny] == list(range(300))
    assert not long.done()
    gate.open()
    long.result(SOON)


def test_task_that_was_sent_ahead_can_be_cancelled_and_its_neighbours_run(
    start_method: str, tmp_path: Path
) -> None:
    with ShmExecutor(1, mp_context=start_method) as executor:
        for future in [executor.submit(abs, -i) for i in range(1000)]:
            future.result(SOON)  # so short that many are sent ahead from now on
        blocker = executor.submit(tasks.meet, str(tmp_path), "task", 2)
        wait_until(lambda: os.listdir(tmp_path), 60, "the first task to begin")
        ahead = [executor.submit(os.getpid) for _ in range(20)]
        assert all(future.cancel() for future in ahead[::2])
        assert not blocker.cancel()
        assert all(future.cancelled() for future in ahead[::2])
        done, not_done = concurrent.futures.wait(ahead[::2], timeout=SOON)
        assert len(done) == 10 and not not_done
        (tmp_path / "test").touch()
        assert len({future.result(SOON) for future in ahead[1::2]}) == 1
        blocker.result(SOON)
