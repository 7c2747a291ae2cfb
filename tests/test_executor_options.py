"""options(), cancel_running(), map_unordered(), idle workers, and the reusable executor."""

from __future__ import annotations

import gc
import inspect
import io
import os
import signal
import threading
import time
import weakref
from concurrent.futures import CancelledError, as_completed, wait
from pathlib import Path

import numpy as np
import pytest
from executor_options_tasks import die_at_first, fail_and_count, mark_and_hang, spin
from executor_tasks import meet
from support import TIMEUNIT, wait_until

import shmpool
from shmpool import ShmExecutor, TaskTimeoutError, WorkerDiedError, get_reusable_executor
from shmpool.dispatch.answers import Answers
from shmpool.worker.process import WorkerHandle

SOON = 60 * TIMEUNIT


def marks(folder: Path) -> list[int]:
    return [int(file.name) for file in folder.iterdir()]


@pytest.fixture
def executor(start_method):
    with ShmExecutor(2, start_method) as executor:
        yield executor


# Timeouts.


def test_task_that_runs_too_long_is_ended_and_its_worker_replaced(executor, tmp_path):
    future = executor.options(timeout=0.3).submit(mark_and_hang, str(tmp_path))
    error = future.exception(SOON)
    assert isinstance(error, TaskTimeoutError) and isinstance(error, TimeoutError)
    assert error.timeout == 0.3 and error.task == "mark_and_hang"
    for pid in marks(
        tmp_path
    ):  # of one, but on a busy machine its time may be over before it comes to run
        wait_until(lambda pid=pid: pid not in executor._processes, SOON, "the worker to be gone")
    assert executor.submit(abs, -1).result(SOON) == 1
    stats = executor.stats()
    assert (stats.tasks_failed, stats.workers_died) == (1, 0)


def test_only_the_time_of_running_counts():
    with ShmExecutor(2, "fork") as executor:
        timed = executor.options(timeout=5.0 * TIMEUNIT)
        # Thirty times 0.4 s on two workers: the last have waited for longer than they may run.
        futures = [timed.submit(spin, 0.4 * TIMEUNIT) for _ in range(30)]
        assert [future.result(SOON) for future in futures] == [0.4 * TIMEUNIT] * 30


def test_others_on_the_same_worker_go_on(tmp_path):
    with ShmExecutor(1, "fork") as executor:
        timed = executor.options(timeout=0.3)
        hanging = timed.submit(mark_and_hang, str(tmp_path))
        array = np.arange(100_000.0)
        others = [executor.submit(np.add, array, i) for i in range(20)]
        assert isinstance(hanging.exception(SOON), TaskTimeoutError)
        for i, other in enumerate(others):
            assert np.array_equal(other.result(SOON), array + i)


def test_each_of_many_timeouts_is_kept(tmp_path):
    with ShmExecutor(2, "fork") as executor:
        short, long = executor.options(timeout=0.2), executor.options(timeout=SOON)
        futures = [short.submit(mark_and_hang, str(tmp_path)) for _ in range(6)]
        futures += [long.submit(abs, -i) for i in range(50)]
        errors = [future.exception(SOON) for future in futures]
        assert [type(error) for error in errors] == [TaskTimeoutError] * 6 + [type(None)] * 50
        assert len(marks(tmp_path)) <= 6


def test_a_worker_that_is_stopped_is_ended_as_well():
    with ShmExecutor(1, "fork") as executor:
        future = executor.options(timeout=0.5).submit(signal.raise_signal, signal.SIGSTOP)
        assert isinstance(future.exception(SOON), TaskTimeoutError)


def test_in_map_the_timeout_is_of_each_task(tmp_path):
    with ShmExecutor(2, "fork") as executor:
        results = executor.options(timeout=0.3).map(mark_and_hang, [str(tmp_path)] * 3)
        with pytest.raises(TaskTimeoutError):
            list(results)


# Retries.


def test_task_is_run_again_when_its_worker_died(executor, tmp_path):
    array = np.arange(50_000.0)
    future = executor.options(retries=2).submit(die_at_first, str(tmp_path), 2, array)
    assert np.array_equal(future.result(SOON), array)
    stats = executor.stats()
    assert (stats.tasks_retried, stats.tasks_failed, stats.workers_died) == (2, 0, 0)


def test_no_more_often_than_it_may(executor, tmp_path):
    future = executor.options(retries=1).submit(die_at_first, str(tmp_path), 2, 0)
    assert isinstance(future.exception(SOON), WorkerDiedError)
    assert len(list(tmp_path.iterdir())) == 2
    assert executor.stats().tasks_retried == 1


def test_what_raises_or_times_out_is_not_run_again(tmp_path):
    raising, hanging = tmp_path / "raising", tmp_path / "hanging"
    raising.mkdir()
    hanging.mkdir()
    with ShmExecutor(1, "fork") as executor:
        again = executor.options(retries=3)
        assert isinstance(again.submit(fail_and_count, str(raising)).exception(SOON), ValueError)
        both = again.options(timeout=0.3)
        assert isinstance(
            both.submit(mark_and_hang, str(hanging)).exception(SOON), TaskTimeoutError
        )
    assert len(list(raising.iterdir())) == 1
    assert len(marks(hanging)) <= 1  # none, if its time was over before it came to run


def test_retried_tasks_in_map_keep_their_order(tmp_path):
    folders = [tmp_path / str(i) for i in range(6)]
    for folder in folders:
        folder.mkdir()
    with ShmExecutor(2, "fork") as executor:
        again = executor.options(retries=1)
        times = [i % 2 for i in range(6)]
        assert list(again.map(die_at_first, map(str, folders), times, range(6))) == list(range(6))


# Other options.


def test_mmap_mode_is_of_the_view():
    array = np.zeros(100_000)
    with ShmExecutor(1, "fork") as executor:
        readonly = executor.options(mmap_mode="r")
        assert readonly.submit(lambda a: a.flags.writeable, array).result(SOON) is False
        assert executor.submit(lambda a: a.flags.writeable, array).result(SOON) is True
        assert not readonly.submit(np.ones, 100_000).result(SOON).flags.writeable
        assert executor.submit(np.ones, 100_000).result(SOON).flags.writeable


def test_what_is_not_given_stays():
    with ShmExecutor(1, "fork") as executor:
        view = executor.options(timeout=5, retries=2).options(mmap_mode="r").options(retries=0)
        assert view._options == type(view._options)(5, 0, "r", None)
        assert executor._options == type(view._options)(None, 0, "c", None)
        assert isinstance(view, ShmExecutor)


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout": 0}, {"timeout": -1}, {"timeout": "1"}, {"timeout": float("nan")}, {"timeout": True},
        {"retries": -1}, {"retries": 1.0}, {"retries": None}, {"retries": True}, {"mmap_mode": "w"},
        {"mmap_mode": None},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(wrong):
    with ShmExecutor(1, "fork") as executor:
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=name) as caught:
            executor.options(**wrong)
        assert repr(value) in str(caught.value)


def test_a_view_keeps_the_executor_and_goes_with_it():
    view = ShmExecutor(1, "fork").options(retries=1)
    gc.collect()
    assert view.submit(abs, -1).result(SOON) == 1
    view.shutdown()
    with pytest.raises(RuntimeError, match="shutdown"):
        view._whole.submit(abs, -1)


# cancel_running.


def test_a_running_task_is_cancelled(executor, tmp_path):
    future = executor.submit(mark_and_hang, str(tmp_path))
    wait_until(lambda: marks(tmp_path), SOON, "the task to begin")
    assert not future.cancel()
    assert executor.cancel_running(future) is True
    assert future.cancelled()
    with pytest.raises(CancelledError):
        future.result(0)
    assert wait([future], 0).done == {future}
    (pid,) = marks(tmp_path)
    wait_until(lambda: pid not in executor._processes, SOON, "the worker to be gone")
    assert executor.submit(abs, -1).result(SOON) == 1


def test_a_waiting_thread_is_told_of_the_cancellation(tmp_path):
    with ShmExecutor(1, "fork") as executor:
        future = executor.submit(mark_and_hang, str(tmp_path))
        seen: list[type[BaseException]] = []

        def look():
            try:
                future.result(SOON)
            except CancelledError as error:
                seen.append(type(error))

        thread = threading.Thread(target=look)
        thread.start()
        wait_until(lambda: marks(tmp_path), SOON, "the task to begin")
        assert executor.cancel_running(future)
        thread.join(SOON)
        assert seen == [CancelledError]


def test_cancelling_does_not_retry(tmp_path):
    with ShmExecutor(1, "fork") as executor:
        future = executor.options(retries=5).submit(mark_and_hang, str(tmp_path))
        wait_until(lambda: marks(tmp_path), SOON, "the task to begin")
        assert executor.cancel_running(future)
        assert executor.submit(abs, -1).result(SOON) == 1
    assert len(marks(tmp_path)) == 1


def test_cancelling_what_waits_or_is_done(tmp_path):
    with ShmExecutor(1, "fork") as executor:
        running = executor.submit(mark_and_hang, str(tmp_path))
        ahead, pending = (executor.submit(abs, -i) for i in range(2))
        wait_until(lambda: marks(tmp_path), SOON, "the task to begin")
        assert executor.cancel_running(ahead) and ahead.cancelled()
        assert executor.cancel_running(pending) and pending.cancelled()
        assert executor.cancel_running(running)
        done = executor.submit(abs, -3)
        assert done.result(SOON) == 3
        assert executor.cancel_running(done) is False
        failed = executor.submit(abs, threading.Lock())
        assert failed.exception(SOON) is not None
        assert executor.cancel_running(failed) is False
        assert executor.cancel_running(running) is True, "it is cancelled, by whomever"


@pytest.mark.parametrize("by_now", [False, True])
def test_a_running_task_is_ended_though_nobody_has_read_that_those_before_it_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, by_now: bool
) -> None:
    """Or another thread has, since it was looked for the task."""
    read = Answers.pass_on

    def read_after_another(answers: Answers, handle: WorkerHandle) -> bool:
        read(answers, handle)
        return read(answers, handle)

    held, go = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        held.set()
        go.wait(60 * TIMEUNIT)

    with ShmExecutor(2, "fork") as executor:
        list(executor.map(abs, range(100)))
        (tmp_path / "first").mkdir()
        executor.submit(meet, str(tmp_path / "first"), "task", 2).add_done_callback(hold)
        (tmp_path / "first" / "test").touch()
        assert held.wait(60 * TIMEUNIT)
        # The dispatcher reads nothing now. Of each worker's two tasks the second hangs.
        quick = [executor.submit(abs, -i) for i in range(2)]
        hanging = [executor.submit(mark_and_hang, str(tmp_path)) for _ in range(2)]
        wait_until(lambda: len(os.listdir(tmp_path)) == 3, 60, "both to hang")
        if by_now:
            monkeypatch.setattr(Answers, "pass_on", read_after_another)
        # One worker's answers may be what the dispatcher is busy with.
        ended = [executor.cancel_running(future) for future in hanging]
        assert any(ended)
        go.set()

        def all_ended() -> bool:
            return all(future.cancelled() or executor.cancel_running(future) for future in hanging)

        wait_until(all_ended, 60, "the other to end")
        assert [future.result(60 * TIMEUNIT) for future in quick] == [0, 1]


def test_futures_of_another_executor_are_refused(tmp_path):
    with ShmExecutor(1, "fork") as one, ShmExecutor(1, "fork") as other:
        future = other.submit(mark_and_hang, str(tmp_path))
        with pytest.raises(ValueError, match="is not of this executor"):
            one.cancel_running(future)
        assert other.options(retries=2).cancel_running(future)


def test_cancelling_many_at_once_from_many_threads(tmp_path):
    with ShmExecutor(2, "fork") as executor:
        futures = [executor.submit(mark_and_hang, str(tmp_path)) for _ in range(8)]
        threads = [threading.Thread(target=executor.cancel_running, args=(f,)) for f in futures * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        assert all(future.cancelled() for future in futures)
        assert list(executor.map(abs, range(-20, 0))) == list(range(20, 0, -1))


# map_unordered.


def test_results_come_as_they_are_ready(executor, tmp_path):
    first = tmp_path / "go"

    def slow_if_zero(i: int) -> int:
        while i == 0 and not first.exists():
            time.sleep(0.01)
        return i

    results = executor.map_unordered(slow_if_zero, range(5))
    assert sorted(next(results) for _ in range(4)) == [1, 2, 3, 4]
    first.touch()
    assert list(results) == [0]


@pytest.mark.parametrize("chunksize", [1, 3])
def test_unordered_gives_all_results(executor, chunksize):
    assert sorted(executor.map_unordered(pow, range(10), [2] * 10, chunksize=chunksize)) == [
        i * i for i in range(10)
    ]


def test_unordered_reads_no_more_than_it_may():
    read: list[int] = []

    def numbers():
        for i in range(1000):
            read.append(i)
            yield i

    with ShmExecutor(2, "fork") as executor:
        results = executor.map_unordered(abs, numbers(), buffersize=5)
        taken = [next(results) for _ in range(10)]
        assert len(taken) == len(set(taken)) == 10
        assert len(read) == 15
        results.close()


def test_unordered_times_out_and_raises_like_map(tmp_path):
    with ShmExecutor(2, "fork") as executor:
        results = executor.map_unordered(mark_and_hang, [str(tmp_path)], timeout=0.1)
        with pytest.raises(TimeoutError):
            next(results)
        results = executor.map_unordered(lambda i: 1 // i, [0, 0, 0])
        with pytest.raises(ZeroDivisionError):
            next(results)
        with pytest.raises(StopIteration):
            next(results)
        executor.kill_workers()


def test_unordered_holds_no_result_that_was_taken():
    with ShmExecutor(1, "fork") as executor:
        results = executor.map_unordered(np.full, [100_000] * 3, range(3))
        for array in results:
            gone = weakref.ref(array)
            del array
            # The dispatcher may not have returned yet from making the future known as done.
            wait_until(lambda gone=gone: gone() is None, SOON, "the result to be gone")


# Idle workers leave.


def test_idle_workers_leave_and_come_again(start_method):
    with ShmExecutor(2, start_method, idle_timeout=0.2) as executor:
        first = executor.submit(os.getpid).result(SOON)
        wait_until(lambda: not executor._processes, SOON, "the workers to leave")
        second = executor.submit(os.getpid).result(SOON)
        assert first != second
        wait_until(lambda: not executor._processes, SOON, "the workers to leave again")


def test_busy_workers_stay():
    with ShmExecutor(2, "fork", idle_timeout=0.05) as executor:
        assert executor.submit(spin, 0.8).result(SOON) == 0.8
        assert executor.stats().workers_died == 0


def test_results_outlive_the_worker_that_made_them():
    with ShmExecutor(1, "fork", idle_timeout=0.1) as executor:
        array = executor.submit(np.arange, 100_000).result(SOON)
        wait_until(lambda: not executor._processes, SOON, "the worker to leave")
        assert executor.submit(np.sum, array).result(SOON) == array.sum()


@pytest.mark.parametrize("wrong", [0, -1, "1"])
def test_an_idle_timeout_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="idle_timeout"):
        ShmExecutor(1, idle_timeout=wrong)


# The reusable executor.


@pytest.fixture
def reusable():
    """The function, and nothing left of the executor afterwards."""
    yield get_reusable_executor
    get_reusable_executor(reuse=True).shutdown()


def test_the_same_executor_for_the_same_wishes(reusable):
    executor = reusable(1, "fork")
    pid = executor.submit(os.getpid).result(SOON)
    assert reusable(1, "fork") is executor
    assert reusable(1, "fork").submit(os.getpid).result(SOON) == pid
    assert executor.stats().workers == 1


def test_other_wishes_another_executor(reusable):
    executor = reusable(1, "fork")
    assert reusable(1, "fork", reuse=False) is not executor
    other = reusable(1, "fork", mmap_mode="r")
    assert other is not executor and not executor.is_usable
    assert reusable(1, "spawn", reuse=True) is other
    third = reusable(1, "fork", initializer=int, initargs=(np.zeros(3),))
    assert third is not other
    assert reusable(1, "fork", initializer=int, initargs=(np.zeros(3),)) is not third


def test_another_number_of_workers_resizes(reusable):
    executor = reusable(1, "fork")
    executor.submit(abs, 1).result(SOON)
    assert reusable(3, "fork") is executor
    assert list(executor.map(spin, [0.05] * 6)) == [0.05] * 6
    assert len(executor._processes) == 3
    assert reusable(1, "fork") is executor
    wait_until(lambda: len(executor._processes) == 1, SOON, "two workers to leave")
    assert executor.submit(abs, -1).result(SOON) == 1


def test_a_broken_or_closed_executor_is_replaced(reusable):
    executor = reusable(1, "fork")
    executor.submit(abs, 1).result(SOON)
    executor.kill_workers()
    other = reusable(1, "fork")
    assert other is not executor and other.submit(abs, -1).result(SOON) == 1
    other.shutdown()
    assert reusable(1, "fork") is not other


def test_kill_workers_does_not_wait_for_tasks(reusable, tmp_path):
    executor = reusable(1, "fork")
    future = executor.submit(mark_and_hang, str(tmp_path))
    wait_until(lambda: marks(tmp_path), SOON, "the task to begin")
    assert reusable(2, "fork", reuse=False, kill_workers=True) is not executor
    assert future.exception(SOON) is not None


def test_by_default_workers_are_started_by_loky(reusable):
    executor = reusable(1)
    assert executor._mp_context.get_start_method() == "loky"
    assert executor.submit(lambda: os.getpid() + 0).result(SOON) != os.getpid()


def test_a_number_of_workers_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="max_workers must be greater than 0"):
        get_reusable_executor(0)


def test_total_stats_count_every_executor():
    from shmpool.executor import total_stats

    before = total_stats().tasks_done
    for _ in range(2):
        with shmpool.ShmExecutor(1, "fork") as executor:
            assert list(executor.map(abs, range(3))) == [0, 1, 2]
    with shmpool.ShmExecutor(1, "fork") as executor:
        executor.submit(abs, 1).result(SOON)
        assert total_stats().tasks_done - before == 7


# Progress.


def drawn(screen: io.StringIO) -> str:
    """The last thing to be seen of the last line."""
    return screen.getvalue().strip().rpartition("\r")[2].strip()


@pytest.mark.parametrize("how", ["map", "map_unordered"])
@pytest.mark.parametrize("arguments", [{}, {"chunksize": 4}, {"buffersize": 3}])
def test_a_bar_counts_items(how, arguments):
    pytest.importorskip("tqdm")
    screen = io.StringIO()
    with ShmExecutor(2, "fork") as executor:
        shown = executor.options(progress={"file": screen, "desc": "abs"})
        assert sorted(getattr(shown, how)(abs, range(-10, 0), **arguments)) == list(range(1, 11))
        assert "abs: 100%" in drawn(screen)
        assert "10/10" in drawn(screen)
        before = screen.getvalue()
        assert list(executor.map(abs, [-1])) == [1]
        assert screen.getvalue() == before


def test_a_bar_counts_what_is_submitted():
    pytest.importorskip("tqdm")
    screen = io.StringIO()
    with ShmExecutor(2, "fork") as executor:
        shown = executor.options(progress={"file": screen, "total": 5})
        futures = [shown.submit(abs, -i) for i in range(5)]
        assert sorted(future.result() for future in as_completed(futures)) == list(range(5))
        wait_until(lambda: "5/5" in drawn(screen), SOON, "the bar to be full")


def test_progress_that_makes_no_sense_is_refused():
    with ShmExecutor(1, "fork") as executor, pytest.raises(TypeError, match="progress must be"):
        executor.options(progress=3)


def test_the_signature_shows_what_is_not_given():
    assert "timeout: 'float | None' = <as it was>" in str(inspect.signature(ShmExecutor.options))
