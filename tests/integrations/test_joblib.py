"""The joblib backend: the whole contract of a backend, as loky's keeps it, and what shmpool promises beyond."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import joblib_tasks as tasks
import numpy as np
import pytest
from joblib_tasks import both_workers, parallel, registered
from support import TIMEUNIT, is_gone, wait_until

import shmpool
from shmpool.executor import total_stats
from shmpool.integrations import joblib as integration
from shmpool.integrations import joblib_workers
from shmpool.integrations.joblib import TerminatedWorkerError, shutdown_workers

joblib = pytest.importorskip("joblib")

from joblib import Parallel, delayed, parallel_config  # noqa: E402  # after the skip
from joblib.externals.loky.process_executor import (  # noqa: E402
    TerminatedWorkerError as LokyWorkerError,
)
from joblib.parallel import BatchedCalls  # noqa: E402

pytestmark = pytest.mark.slow

ME = os.getpid()
JOBLIB = tuple(int(part) for part in joblib.__version__.split(".")[:2])


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    with registered():
        yield


def tasks_submitted() -> int:
    return total_stats().tasks_submitted


# ---- choosing it -----------------------------------------------------------------------------------------------------


def test_it_is_chosen_by_name() -> None:
    assert parallel()(delayed(tasks.square)(i) for i in range(5)) == [0, 1, 4, 9, 16]
    with parallel_config(backend="shmpool", n_jobs=2):
        pids = Parallel()(delayed(tasks.pid)() for _ in range(5))
    assert ME not in pids


def test_it_can_be_the_default() -> None:
    shmpool.register_joblib_backend(make_default=True)
    call = Parallel(n_jobs=2)
    call([delayed(tasks.square)(2)])
    assert tasks.describe(call) == ("ShmpoolBackend", 0)


def test_n_jobs_means_what_it_means_for_loky(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = integration.ShmpoolBackend(nesting_level=0)
    loky = joblib.parallel.BACKENDS["loky"](nesting_level=0)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")
    for n_jobs in (1, 2, 7, -1, -2, -3, -9, None):
        assert backend.effective_n_jobs(n_jobs) == loky.effective_n_jobs(n_jobs), n_jobs
    with pytest.raises(ValueError, match="n_jobs == 0 in Parallel has no meaning"):
        parallel(0)([delayed(tasks.square)(2)])
    with parallel_config(backend="shmpool"):
        assert joblib.effective_n_jobs(-1) == joblib.cpu_count()


def test_there_are_as_many_workers_as_jobs(tmp_path: Path) -> None:
    for n_jobs in (3, 2):
        folder = tmp_path / str(n_jobs)
        folder.mkdir()
        pids = parallel(n_jobs, pre_dispatch="all", batch_size=1)(
            delayed(tasks.meet)(str(folder), str(i), n_jobs) for i in range(n_jobs)
        )
        assert len(set(pids)) == n_jobs
        wait_until(lambda: _workers_alive() == n_jobs, 60, f"{n_jobs} workers")  # noqa: B023


def _workers_alive() -> int:
    return sum(len(shared.executor._processes) for shared in joblib_workers._warm)


def test_one_job_is_run_in_this_process_and_none_is_started() -> None:
    call = parallel(1)
    assert call(delayed(tasks.pid)() for _ in range(3)) == [ME] * 3
    assert tasks.describe(call) == ("SequentialBackend", 0)
    assert _workers_alive() == 0


def test_joblib_multiprocessing_0_switches_processes_off(tmp_path: Path) -> None:
    out = run_program(
        tmp_path,
        """
        import os, joblib, shmpool
        shmpool.register_joblib_backend()
        with joblib.parallel_config(backend="shmpool", n_jobs=2):
            print(joblib.Parallel()(joblib.delayed(os.getpid)() for i in range(2)) == [os.getpid()] * 2)
        """,
        JOBLIB_MULTIPROCESSING="0",
    )
    assert out == "True\n"


# ---- batches, and how results come -----------------------------------------------------------------------------------


def test_small_tasks_are_sent_in_growing_batches(capfd: pytest.CaptureFixture[str]) -> None:
    before = tasks_submitted()
    call = parallel(verbose=10)
    assert call(delayed(tasks.square)(i) for i in range(2000)) == [i * i for i in range(2000)]
    assert tasks_submitted() - before < 200
    assert "Setting batch_size=2." in capfd.readouterr().err


@pytest.mark.parametrize(("batch_size", "batches"), [(1, 40), (10, 4)])
def test_a_batch_size_is_kept_to(batch_size: int, batches: int) -> None:
    before = tasks_submitted()
    call = parallel(batch_size=batch_size, pre_dispatch="all")
    assert call(delayed(tasks.square)(i) for i in range(40)) == [i * i for i in range(40)]
    assert tasks_submitted() - before == batches


@pytest.mark.parametrize(
    ("pre_dispatch", "taken"), [(1, 1), ("2*n_jobs", 4), ("1.5*n_jobs", 3), ("all", 9)]
)
def test_so_many_tasks_are_taken_in_advance(
    pre_dispatch: str | int, taken: int, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    seen = []

    def produce() -> Iterator[Any]:
        for i in range(9):
            seen.append(i)
            yield delayed(tasks.wait_for)(str(gate), i)

    results = parallel(batch_size=1, pre_dispatch=pre_dispatch, return_as="generator")(produce())
    assert len(seen) == taken
    gate.touch()
    assert list(results) == list(range(9))


def test_results_come_as_a_generator_in_order(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    work = [delayed(tasks.identity)("early"), delayed(tasks.wait_for)(str(gate), "late")]
    results = parallel(batch_size=1, return_as="generator")(work)
    assert next(results) == "early"
    gate.touch()
    assert list(results) == ["late"]


@pytest.mark.skipif(JOBLIB < (1, 4), reason="generator_unordered came with joblib 1.4")
def test_results_come_as_a_generator_in_the_order_of_their_ends(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    work = [delayed(tasks.wait_for)(str(gate), "late"), delayed(tasks.identity)("early")]
    results = parallel(batch_size=1, return_as="generator_unordered")(work)
    assert next(results) == "early"
    gate.touch()
    assert list(results) == ["late"]


def test_nothing_to_do_is_no_results() -> None:
    assert parallel()([]) == []


def test_progress_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    parallel(verbose=11)(delayed(tasks.square)(i) for i in range(4))
    printed = capfd.readouterr().err
    assert "Using backend ShmpoolBackend with 2 concurrent workers." in printed
    assert re.search(r"Done +4 out of +4 \| elapsed: .* finished", printed)


def test_an_iterator_of_tasks_may_make_parallel_calls_itself() -> None:
    # Under loky this ends in a deadlock: of joblib's lock, and the one thread that delivers results.
    def produce() -> Iterator[Any]:
        for i in range(20):
            yield delayed(sum)(parallel()(delayed(tasks.square)(j) for j in range(i)))

    assert parallel()(produce()) == [sum(j * j for j in range(i)) for i in range(20)]
    assert _workers_alive() <= 4


@pytest.fixture
def in_a_call() -> Iterator[integration.ShmpoolBackend]:
    """A backend that joblib has begun a call with."""
    backend = integration.ShmpoolBackend(nesting_level=0)
    assert backend.configure(n_jobs=2) == 2
    try:
        backend.start_call()
        yield backend
    finally:
        backend.terminate()


def _result_of(
    backend: integration.ShmpoolBackend, submit: Callable[..., object], batch: Any
) -> list[Any]:
    came: queue.SimpleQueue[Any] = queue.SimpleQueue()
    submit(batch, came.put)
    return backend.retrieve_result_callback(came.get(timeout=60 * TIMEUNIT))


def test_a_batch_is_submitted_under_the_name_that_joblib_had_before_1_5(
    in_a_call: integration.ShmpoolBackend,
) -> None:
    batch = BatchedCalls([(tasks.square, (3,), {})], in_a_call.get_nested_backend())
    assert _result_of(in_a_call, in_a_call.apply_async, batch) == [9]
    batch = BatchedCalls([(tasks.Locked().lock, (), {})], (None, 1))
    with pytest.raises(pickle.PicklingError, match="Could not pickle the task to send it"):
        _result_of(in_a_call, in_a_call.apply_async, batch)


def test_a_batch_may_be_whatever_can_be_called(in_a_call: integration.ShmpoolBackend) -> None:
    """joblib's are lists of calls; to have a name in errors is all that they need to be for."""
    with pytest.raises(pickle.PicklingError, match="cannot pickle tasks: "):
        _result_of(in_a_call, in_a_call.submit, partial(list, [tasks.Locked().lock]))


def test_a_batch_for_which_there_are_no_workers_any_more_has_an_error(
    in_a_call: integration.ShmpoolBackend,
) -> None:
    """joblib submits it where nobody would see what is raised."""
    assert in_a_call._call is not None
    in_a_call._call.executor.kill_workers()
    batch = BatchedCalls([(tasks.square, (3,), {})], ("sequential", 1))
    with pytest.raises(RuntimeError, match="after shutdown"):
        _result_of(in_a_call, in_a_call.submit, batch)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_an_error_comes_with_the_workers_traceback() -> None:
    with pytest.raises(ValueError, match="task 1") as caught:
        parallel()(delayed(tasks.sleep_or_raise)(i) for i in (1, 1))
    assert 'raise ValueError("task 1")' in str(caught.value.__cause__)


def test_an_error_ends_the_other_tasks_and_the_next_call_has_all_workers(tmp_path: Path) -> None:
    both_workers(parallel(batch_size=1), tmp_path / "before")
    with pytest.raises(ValueError, match="task 1"):
        parallel(batch_size=1)(delayed(tasks.sleep_or_raise)(i) for i in range(10))
    assert len(both_workers(parallel(batch_size=1), tmp_path / "after")) == 2


def test_an_error_in_one_call_leaves_the_calls_of_other_threads_alone(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    results: list[Any] = []

    def other() -> None:
        results.extend(
            parallel(4, batch_size=1)([delayed(tasks.wait_for)(str(gate), i) for i in range(2)])
        )

    thread = threading.Thread(target=other)
    thread.start()
    try:
        with pytest.raises(ValueError, match="task 1"):
            parallel(4, batch_size=1)(delayed(tasks.sleep_or_raise)(i) for i in (0, 1))
    finally:
        gate.touch()
        thread.join()
    assert results == [0, 1]


@pytest.mark.skipif(JOBLIB < (1, 4), reason="joblib 1.3 forgets errors of iterators")
def test_an_error_of_the_iterator_of_tasks_is_raised() -> None:
    def produce() -> Iterator[Any]:
        for i in range(20):
            if i == 15:
                raise LookupError("no more tasks")
            yield delayed(tasks.square)(i)

    with pytest.raises(LookupError, match="no more tasks"):
        parallel()(produce())


@pytest.mark.parametrize("task", [tasks.interrupt_parent, tasks.raise_interrupt])
def test_ctrl_c_ends_the_call_and_the_next_one_has_all_workers(task: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        parallel(batch_size=1)(delayed(task)(i) for i in range(10))
    assert len(both_workers(parallel(batch_size=1), tmp_path / "after")) == 2


def test_workers_that_ctrl_c_reaches_as_well_stay(tmp_path: Path) -> None:
    call = parallel(batch_size=1)
    before = both_workers(call, tmp_path / "before")

    def interrupt_all() -> None:
        for number in (ME, *before):
            os.kill(number, signal.SIGINT)

    folder = tmp_path / "under way"
    folder.mkdir()
    sleeping = [delayed(_touch_and_sleep)(str(folder), i) for i in range(2)]
    watcher = threading.Thread(
        target=lambda: (
            wait_until(lambda: len(os.listdir(folder)) == 2, 60, "two tasks under way"),
            interrupt_all(),
        )
    )
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        call(sleeping)
    watcher.join()
    assert both_workers(call, tmp_path / "after") == before


@pytest.fixture
def pickled_slowly() -> Iterator[type[tasks.PickledSlowly]]:
    tasks.PickledSlowly.begun.clear()
    tasks.PickledSlowly.may_end.clear()
    yield tasks.PickledSlowly
    tasks.PickledSlowly.may_end.set()


def _third_is_slow_to_pickle() -> Iterator[Any]:
    yield delayed(tasks.identity)(0)
    yield delayed(tasks.identity)(1)
    yield delayed(tasks.sleep)(tasks.PickledSlowly())


def test_a_task_that_is_being_pickled_when_ctrl_c_comes_does_not_go_on(
    pickled_slowly: type[tasks.PickledSlowly], tmp_path: Path
) -> None:
    def interrupt() -> None:
        assert pickled_slowly.begun.wait(60 * TIMEUNIT)
        os.kill(ME, signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        parallel(batch_size=1, pre_dispatch=2)(_third_is_slow_to_pickle())
    watcher.join()
    pickled_slowly.may_end.set()
    assert len(both_workers(parallel(batch_size=1), tmp_path / "after")) == 2


@pytest.mark.parametrize("managed", [False, True])
def test_a_task_that_is_being_pickled_when_its_generator_is_closed_does_not_go_on(
    managed: bool, pickled_slowly: type[tasks.PickledSlowly], tmp_path: Path
) -> None:
    # In a context the next call is the same object's, and has the same backend.
    call = parallel(batch_size=1, pre_dispatch=2, return_as="generator")
    with call if managed else contextlib.nullcontext():
        results = call(_third_is_slow_to_pickle())
        assert pickled_slowly.begun.wait(60 * TIMEUNIT)
        with pytest.warns(UserWarning, match="tasks which were still being processed"):
            results.close()
        pickled_slowly.may_end.set()
        assert len(both_workers(call, tmp_path / "after")) == 2


def _touch_and_sleep(folder: str, number: int) -> None:
    Path(folder, str(number)).touch()
    tasks.sleep(None)


def test_a_timeout_ends_the_call_and_the_next_one_has_all_workers(tmp_path: Path) -> None:
    with pytest.raises((TimeoutError, multiprocessing.TimeoutError)):
        parallel(batch_size=1, timeout=0.1)(delayed(tasks.sleep)(i) for i in range(10))
    assert len(both_workers(parallel(batch_size=1), tmp_path / "after")) == 2
    assert parallel(timeout=60 * TIMEUNIT)([delayed(tasks.square)(3)]) == [9]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGTERM"])
def test_a_dead_worker_is_an_error_that_names_the_signal(name: str, tmp_path: Path) -> None:
    work = [delayed(tasks.die)(i, getattr(signal, name)) for i in range(4)]
    with pytest.raises(LokyWorkerError, match=f"unexpectedly terminated.* by {name} ") as caught:
        parallel(batch_size=1)(work)
    error = caught.value
    assert isinstance(error, TerminatedWorkerError | shmpool.WorkerDiedError | BrokenProcessPool)
    assert (error.exitcode, error.task) == (-getattr(signal, name), "die")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert len(both_workers(parallel(batch_size=1), tmp_path / "after")) == 2


@pytest.mark.parametrize(
    ("work", "culprit"),
    [
        (delayed(tasks.identity), r"args\[0\]\.lock"),
        (lambda locked: delayed(tasks.identity)(value=[locked]), r"kwargs\['value'\]\[0\]\.lock"),
        (lambda locked: delayed(locked.lock.acquire)(), "fn"),
    ],
)
def test_what_cannot_be_pickled_is_said_in_joblibs_words(work: Any, culprit: str) -> None:
    tasks_ = [delayed(tasks.identity)(1), work(tasks.Locked())]
    with pytest.raises(
        pickle.PicklingError, match="Could not pickle the task to send it to the workers"
    ) as caught:
        parallel(batch_size=2)(tasks_)
    assert re.search(f"The culprit is {culprit}", str(caught.value))
    assert parallel()([delayed(tasks.square)(3)]) == [9]


def test_a_result_that_cannot_be_pickled_is_an_error() -> None:
    with pytest.raises(pickle.PicklingError, match="cannot pickle the result"):
        parallel()([delayed(tasks.Locked)()])


# ---- workers ---------------------------------------------------------------------------------------------------------


def test_hundreds_of_short_calls_use_the_same_workers() -> None:
    pids = {pid for _ in range(300) for pid in parallel()(delayed(tasks.pid)() for _ in range(2))}
    assert len(pids) <= 2


def test_workers_stay_warm_between_calls_of_a_context(tmp_path: Path) -> None:
    with parallel(batch_size=1) as call:
        first = both_workers(call, tmp_path / "first")
        with pytest.raises(ValueError, match="task 1"):
            call([delayed(tasks.sleep_or_raise)(1)])
        assert both_workers(call, tmp_path / "second") == first
    assert both_workers(parallel(batch_size=1), tmp_path / "third") == first


def test_calls_in_threads_share_the_workers() -> None:
    results: dict[int, list[Any]] = {}

    def work(number: int) -> None:
        results[number] = [
            parallel()(delayed(pow)(number, i) for i in range(10)) for _ in range(10)
        ]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [[number**i for i in range(10)]] * 10 for number in range(4)}
    assert _workers_alive() <= 2


def test_calls_inside_of_another_whose_results_are_still_coming() -> None:
    with parallel_config(backend="shmpool", n_jobs=2):
        outer = Parallel(return_as="generator")(delayed(tasks.square)(i) for i in range(20))
        sums = [sum(Parallel()(delayed(tasks.square)(j) for j in range(i % 5))) for i in outer]
    assert sums == [sum(j * j for j in range(i * i % 5)) for i in range(20)]


def test_a_generator_that_is_dropped_ends_its_tasks(tmp_path: Path) -> None:
    results = parallel(batch_size=1, return_as="generator")(
        delayed(tasks.identity if i == 0 else tasks.sleep)(i) for i in range(10)
    )
    assert next(results) == 0
    with pytest.warns(UserWarning, match="tasks which were still being processed"):
        results.close()
    assert len(both_workers(parallel(batch_size=1), tmp_path / "after")) == 2


def test_an_initializer_is_run_and_other_workers_come_only_with_another() -> None:
    def ask(**options: Any) -> set[tuple[int, Any]]:
        return set(parallel(**options)(delayed(tasks.told)() for _ in range(10)))

    options = {"initializer": tasks.tell, "initargs": ("one",)}
    first = {answer for _ in range(5) for answer in ask(**options)}
    assert {value for _, value in first} == {"one"}
    assert len(_pids_of(first)) <= 2
    other = ask(initializer=tasks.tell, initargs=("two",))
    assert {value for _, value in other} == {"two"}
    assert not _pids_of(other) & _pids_of(first)
    assert {value for _, value in ask()} == {"nothing"}


def _pids_of(answers: set[tuple[int, Any]]) -> set[int]:
    return {number for number, _ in answers}


def test_arrays_may_be_told_to_an_initializer_in_parallel_config() -> None:
    def ask(array: Any) -> list[tuple[int, Any]]:
        with parallel_config(
            backend="shmpool", n_jobs=2, initializer=tasks.tell, initargs=(array,)
        ):
            return Parallel(pre_dispatch="all")([delayed(tasks.told)()])

    array = np.arange(300_000.0)
    ((first, told),) = ask(array)
    assert np.array_equal(told, array)
    ((again, _),) = ask(array)
    assert len(_pids_of(ask(array)) | {first, again}) <= 2
    ((_, told),) = ask(array + 1)  # which cannot be compared to the other by a mere ==
    assert np.array_equal(told, array + 1)


@pytest.mark.skipif(JOBLIB < (1, 5), reason="Parallel(**backend_options) came with joblib 1.5")
def test_options_of_the_backend_may_be_given_to_parallel() -> None:
    options = {"initializer": tasks.tell, "initargs": ("by Parallel",), "idle_worker_timeout": 9}
    ((_, told),) = Parallel(n_jobs=2, backend="shmpool", **options)([delayed(tasks.told)()])
    assert told == "by Parallel"


def test_an_initializer_that_raises_is_an_error_and_the_next_call_works() -> None:
    with pytest.raises(LokyWorkerError, match="this initializer refuses") as caught:
        parallel(initializer=tasks.refuse)([delayed(tasks.square)(1)])
    assert isinstance(caught.value, shmpool.BrokenPoolError)
    assert parallel()([delayed(tasks.square)(3)]) == [9]


def test_an_initializer_that_raises_once_does_not_break_a_context(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    options = {"initializer": tasks.refuse_unless, "initargs": (str(gate),)}
    with parallel_config(backend="shmpool", n_jobs=2, **options), Parallel() as call:
        for _ in range(2):
            with pytest.raises(LokyWorkerError, match="refuses for now"):
                call([delayed(tasks.square)(1)])
        gate.touch()
        assert call([delayed(tasks.square)(3)]) == [9]


def test_idle_workers_leave_and_come_back() -> None:
    call = parallel(idle_worker_timeout=0.2)
    call(delayed(tasks.square)(i) for i in range(4))
    wait_until(lambda: _workers_alive() == 0, 60, "idle workers to leave")
    assert call(delayed(tasks.square)(i) for i in range(4)) == [0, 1, 4, 9]


def test_workers_can_be_shut_down() -> None:
    (before,) = parallel()([delayed(tasks.pid)()])
    shutdown_workers()
    assert not os.path.exists(f"/proc/{before}")
    assert parallel()([delayed(tasks.pid)()]) != [before]


# ---- threads in workers ----------------------------------------------------------------------------------------------

LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def test_threads_of_libraries_are_limited_as_by_loky(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "8")
    cpus = joblib.cpu_count()
    (found,) = parallel()([delayed(tasks.environment)()])
    assert {found[name] for name in LIMITS} == {str(max(1, cpus // 2))}
    assert found["ENABLE_IPC"] == "1"


def test_limits_that_the_user_has_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    (found,) = parallel()([delayed(tasks.environment)()])
    assert found["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("number", [1, 2])
def test_inner_max_num_threads_wins(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("threadpoolctl")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with parallel_config(backend="shmpool", inner_max_num_threads=number, n_jobs=2):
        (found,) = Parallel()([delayed(tasks.environment)()])
        (threads,) = Parallel()([delayed(tasks.threads_of_blas)()])
    assert {found[name] for name in LIMITS} == {str(number)}
    assert threads == {min(number, os.cpu_count() or 1)}


# ---- calls inside of calls -------------------------------------------------------------------------------------------


def test_calls_in_tasks_use_threads_and_calls_in_those_none() -> None:
    ((described, places, inner, warned),) = parallel()([delayed(tasks.nested)(1)])
    assert described == ("ThreadingBackend", 1)
    (worker,) = {number for number, _ in places}
    assert worker != ME and {is_main for _, is_main in places} == {False}
    ((described, places, _, more_warned),) = inner
    assert described == ("SequentialBackend", 2)
    assert {number for number, _ in places} == {worker}
    assert warned == more_warned == []


def test_a_call_in_a_task_that_names_the_backend_has_workers_of_its_own() -> None:
    for worker, pids, warned in parallel()(delayed(tasks.nested_explicitly)(2) for _ in range(2)):
        assert not pids & {worker, ME} and warned == []


def test_a_call_in_a_task_that_names_multiprocessing_is_sequential() -> None:
    # Of functions of __main__ its workers would know nothing.
    work = [delayed(tasks.nested_explicitly)(n_jobs, "multiprocessing") for n_jobs in (1, 2)]
    for n_jobs, (worker, pids, warned) in enumerate(parallel()(work), 1):
        assert pids == {worker}
        assert len(warned) == n_jobs - 1
        assert all("cannot be nested, below shmpool" in warning for warning in warned)


def test_a_call_in_a_thread_of_a_worker_has_none_and_does_not_warn() -> None:
    work = [delayed(tasks.nested_explicitly)(2) for _ in range(2)]
    ((worker, answers),) = parallel()([delayed(_in_threads)(work)])
    for inner_worker, pids, warned in answers:
        assert (inner_worker, pids, warned) == (worker, {worker}, [])


def _in_threads(work: list[Any]) -> tuple[int, list[Any]]:
    return os.getpid(), Parallel(n_jobs=2, backend="threading")(work)


def test_a_call_below_threads_of_this_process_has_workers() -> None:
    work = [delayed(tasks.nested_explicitly)(2) for _ in range(3)]
    for _, pids, warned in Parallel(n_jobs=2, backend="threading")(work):
        assert ME not in pids and warned == []


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_call_in_a_worker_of_multiprocessing_is_sequential(method: str) -> None:
    parallel()(
        [delayed(tasks.square)(1)]
    )  # a forked child inherits an executor that it must not use
    with multiprocessing.get_context(method).Pool(1) as pool:
        worker, squares, pids = pool.apply(tasks.squares_in_child, (5,))
    assert (squares, pids) == ([0, 1, 4, 9, 16], {worker})


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_call_in_a_worker_of_concurrent_futures_has_workers(method: str) -> None:
    parallel()([delayed(tasks.square)(1)])
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        worker, squares, pids = executor.submit(tasks.squares_in_child, 5).result(60 * TIMEUNIT)
    assert squares == [0, 1, 4, 9, 16] and not pids & {worker, ME}
    assert parallel()([delayed(tasks.square)(3)]) == [9]


def test_a_call_in_a_worker_of_shmpool_has_workers() -> None:
    with shmpool.ShmExecutor(1) as executor:
        worker, squares, pids = executor.submit(tasks.squares_in_child, 5).result(60 * TIMEUNIT)
    assert squares == [0, 1, 4, 9, 16] and not pids & {worker, ME}


# ---- programs --------------------------------------------------------------------------------------------------------


def run_program(folder: Path, text: str, **environment: str) -> str:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(text))
    path = os.pathsep.join(
        [str(Path(shmpool.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True, text=True, timeout=120 * TIMEUNIT, check=False,
        env={**os.environ, "PYTHONPATH": path.strip(os.pathsep), **environment},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    out = run_program(
        tmp_path,
        """
        import joblib, shmpool

        shmpool.register_joblib_backend()
        print("once")
        FACTOR = 3

        class Scaled:
            def __init__(self, value):
                self.value = value * FACTOR

        def scale(value):
            return Scaled(value)

        with joblib.parallel_config(backend="shmpool", n_jobs=2):
            call = joblib.Parallel()
            print([scaled.value for scaled in call(joblib.delayed(scale)(i) for i in range(4))])
            print(call(joblib.delayed(lambda x: x + FACTOR)(i) for i in range(4)))
            left = joblib.Parallel(return_as="generator")(joblib.delayed(scale)(i) for i in range(40))
            print(isinstance(next(left), Scaled))
            list(left)
        """,
    )
    assert out == "once\n[0, 3, 6, 9]\n[3, 4, 5, 6]\nTrue\n"


def test_a_program_ends_at_once_though_workers_are_idle(tmp_path: Path) -> None:
    out = run_program(
        tmp_path,
        """
        import os, joblib, shmpool
        shmpool.register_joblib_backend(make_default=True)
        print(*joblib.Parallel(n_jobs=2)(joblib.delayed(os.getpid)() for i in range(2)))
        """,
    )
    for number in out.split():
        wait_until(lambda: is_gone(int(number)), 60, f"the end of {number}")  # noqa: B023


def test_joblibs_own_backend_goes_on_working_beside_it(tmp_path: Path) -> None:
    # The import of a second loky takes joblib's start method away from it: then this prints tracebacks.
    out = run_program(
        tmp_path,
        """
        import joblib, numpy, shmpool

        shmpool.register_joblib_backend()
        with shmpool.ShmExecutor(1, mp_context="loky") as executor:
            print(executor.submit(abs, -1).result())
        array = numpy.ones(1 << 18)
        for backend in ("loky", "shmpool", "loky"):
            call = joblib.Parallel(n_jobs=2, backend=backend)
            print(sum(call(joblib.delayed(numpy.sum)(array) for i in range(10))))
        """,
    )
    assert out.split() == ["1", *["2621440.0"] * 3]


def test_without_joblib_the_error_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "joblib.py").write_text(
        "raise ModuleNotFoundError('No module named joblib', name='joblib')"
    )
    out = run_program(
        tmp_path,
        """
        import shmpool
        try:
            shmpool.register_joblib_backend()
        except ImportError as error:
            print(error)
        """,
    )
    assert "pip install 'shmpool[joblib]'" in out


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_arguments_are_freed_as_each_task_ends() -> None:
    most = 0

    def produce() -> Iterator[Any]:
        nonlocal most
        for i in range(60):
            most = max(most, shmpool.store.live_blocks())
            yield delayed(tasks.first_and_sum)(np.full(1 << 17, i, dtype=float))

    results = parallel(batch_size=1)(produce())
    assert results == [(i, i * float(1 << 17)) for i in range(60)]
    assert most < 20  # of 60


def test_results_are_freed_as_they_are_taken() -> None:
    gc.collect()
    gc.disable()  # they must not need it
    try:
        before = shmpool.store.live_blocks()
        results = parallel(batch_size=1, return_as="generator")(
            delayed(tasks.ones)(1 << 17) for _ in range(20)
        )
        for taken, array in enumerate(results):
            assert array.sum() == 1 << 17
            # joblib has up to two that it has handed out already.
            assert shmpool.store.live_blocks() - before <= 20 - taken + 2
        del array
        assert shmpool.store.live_blocks() - before <= 2
    finally:
        gc.enable()


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parallel()(delayed(tasks.first_and_sum)(np.ones(1 << 18)) for _ in range(20))


def test_workers_that_are_ended_in_the_middle_of_a_call_finish_it() -> None:
    results = parallel(batch_size=1, pre_dispatch=2, return_as="generator")(
        delayed(tasks.square)(i) for i in range(300)
    )
    assert next(results) == 0
    shutdown_workers()
    assert list(results) == [i * i for i in range(1, 300)]
    assert parallel()(delayed(tasks.square)(i) for i in range(4)) == [0, 1, 4, 9]


def test_a_batch_that_comes_after_the_end_of_its_call_is_cancelled() -> None:
    """joblib may submit one more, from the thread of a callback."""
    backend = integration.ShmpoolBackend(nesting_level=0)
    assert backend._submitted(None, BatchedCalls([], ("sequential", 1))).cancelled()
