"""Short versions of the scenarios that break things on purpose, and what their long versions have found.

``python -m tests.soak --help`` for more.  A failure names the seed: ``SHMPOOL_TEST_SEED`` repeats it, as far as
threads and processes can be repeated.
"""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import CancelledError, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from executor_tasks import PYTHON, SOON, environment, run_script, write_script
from soak import kill, parent, steady, threads
from soak.report import Report
from support import TIMEUNIT, is_gone, started, wait_until

from shmpool import ObjectRef, ObjectStore, ShmExecutor, TaskTimeoutError, WorkerDiedError

pytestmark = pytest.mark.slow


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The report of a failure says how to get the same again."""
    number = int(os.environ.get("SHMPOOL_TEST_SEED") or secrets.randbits(32))
    request.node.add_report_section("setup", "seed", f"SHMPOOL_TEST_SEED={number}")
    return number


def check(report: Report) -> None:
    assert not report.violations, str(report)


def test_workers_killed_at_random_cost_nothing_but_their_tasks(start_method, seed):
    report = kill.run(start_method, kills=25 if start_method == "fork" else 4, seed=seed)
    check(report)
    assert report.figures["kills"] >= 4
    assert report.figures["results"]


def test_sixteen_threads_use_and_end_an_executor_at_random(seed):
    report = threads.run(seed=seed, seconds=60, rounds=3)
    check(report)
    assert report.figures["results"]


def test_programs_can_be_left_while_threads_use_an_executor(seed):
    check(threads.leave_programs(seed=seed, seconds=60, times=4))


def test_programs_that_die_at_random_leave_nothing(seed):
    # Other tests run as well: how fast exactly workers die is for the long version to say.
    check(parent.run(seed=seed, seconds=60, deaths=8, within=10 * TIMEUNIT))


def test_an_executor_is_after_many_tasks_as_it_was_before(seed):
    check(steady.run(tiny=20_000, large=300, seed=seed))


# What they have found.


class Node:
    """Can refer to itself, and so be garbage that is found at any line of anybody's code."""


@pytest.fixture
def frozen():
    """The collector looks only through what a test makes itself, and so can be asked often."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # as it was, see conftest.py


@contextlib.contextmanager
def garbage_collected_after(allocations):
    """Garbage that is made now is found so many allocations later, and from then on as often."""
    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(allocations)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def test_first_workers_that_cannot_be_started_are_an_error_and_no_hang(tmp_path):
    script = """
        import os, resource
        from shmpool import ShmExecutor

        executor = ShmExecutor(4, "fork")
        descriptors = len(os.listdir("/proc/self/fd"))
        for more in range(8, 40, 4):  # from the first worker to the template
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors + more, 4096))
            executor = ShmExecutor(4, "fork")
            try:
                executor.submit(abs, -1).result(30)
            except OSError as error:
                print(error.strerror)
            executor.shutdown()
            resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))
    """
    assert "Too many open files" in run_script(tmp_path, script)


def test_a_map_that_becomes_garbage_inside_of_the_executor_is_given_up(frozen):
    with ShmExecutor(2, "fork") as executor, garbage_collected_after(1):
        for i in range(100):
            node = Node()
            node.itself = node
            node.results = executor.map(np.add, [np.ones(10_000)] * 20, range(20))
            next(node.results)
            del node
            assert executor.submit(abs, -i).result(SOON) == i


class Finalizer:
    """Garbage that calls shmpool when it is found."""

    def __init__(self, deed, outcomes):
        self.itself = self
        self.deed = deed
        self.outcomes = outcomes

    def __del__(self):
        try:
            self.deed()
            self.outcomes["done"] += 1
        except RuntimeError as error:
            self.outcomes[str(error)] += 1


def test_finalizers_that_put_while_the_end_of_a_view_is_booked_do_not_hang(frozen):
    outcomes: Counter[str] = Counter()
    store = ObjectStore()
    with ShmExecutor(1, "fork", store=store) as executor:  # while one uses it, freed memory is kept
        executor.submit(abs, -1).result(SOON)
        for after in range(1, 30):
            view = executor.put(np.ones(20_000)).get()
            with garbage_collected_after(after):
                Finalizer(partial(executor.put, np.ones(20_000)), outcomes)
                del view
            gc.collect()
    assert outcomes["done"]


def test_a_task_is_sent_although_somebody_holds_the_condition_of_its_future():
    """A finalizer or a signal handler that runs under it may need the executor."""
    with ShmExecutor(1, "fork", nap, (0.2,)) as executor:
        future = executor.submit(nap, 0.1)
        with future._condition:
            wait_until(lambda: future._state == "RUNNING", 60, "the task to be sent")
            other = executor.submit(abs, -1)
        assert other.result(SOON) == 1


def test_who_waits_for_a_cancelled_task_need_not_wait_for_its_turn():
    with ShmExecutor(1, "fork") as executor:
        running = executor.submit(nap, 1000.0)
        wait_until(running.running, 60, "the task to be sent")
        futures = [executor.submit(nap, 0.1) for _ in range(500)]  # more than are sent ahead
        waiter = threading.Thread(target=wait, args=([futures[-1]], SOON))
        waiter.start()
        wait_until(lambda: futures[-1]._waiters, 60, "somebody to wait")
        assert futures[-1].cancel()
        waiter.join(SOON / 2)
        assert not waiter.is_alive()
        assert not running.done()
        executor.kill_workers()


DEEDS = {
    "submit": lambda executor, future: executor.submit(abs, -1),
    "cancel": lambda executor, future: future.cancel(),
    "cancel_running": lambda executor, future: executor.cancel_running(future),
    "put": lambda executor, future: executor.put(np.ones(20_000)),
    "stats": lambda executor, future: executor.stats(),
    "shutdown": lambda executor, future: executor.shutdown(),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_finalizers_that_call_the_executor_do_not_hang_it(deed, frozen):
    outcomes: Counter[str] = Counter()
    executor = ShmExecutor(2, "fork", store=ObjectStore())
    array = np.ones(20_000)
    for after in range(1, 100):
        if not executor.is_usable:  # a finalizer has shut it down
            executor.shutdown()
            executor = ShmExecutor(2, "fork", store=ObjectStore())
        executor.submit(np.add, array, 1).result(SOON)
        target = executor.submit(np.add, array, after)
        with garbage_collected_after(after):
            Finalizer(partial(DEEDS[deed], executor, target), outcomes)
            with contextlib.suppress(CancelledError, RuntimeError):
                assert executor.submit(np.add, array, after).result(SOON)[0] == 1 + after
        gc.collect()
        # Another thread may have come by it, and be at it: then this collects nothing, and waits for nobody.
        wait_until(lambda: outcomes.total() == after, 60, "the finalizer")  # noqa: B023
    executor.shutdown()
    inside = "an object's finalizer (or a signal handler) called shmpool while this thread was inside of it"
    assert outcomes.keys() <= {"done", inside}
    assert outcomes["done"]


class OnPurposeError(Exception):
    pass


def fail(number):
    time.sleep(0.05)
    raise OnPurposeError(number)


def test_what_a_task_raised_and_the_executor_need_no_collector_to_go():
    gc.collect()
    gc.disable()
    try:
        executor = ShmExecutor(1, "fork")
        gone = []
        for results in (
            executor.map(fail, [1]),
            executor.map(fail, [1, 2], buffersize=1),
            executor.map_unordered(fail, [1, 2], buffersize=1),
            iter(executor.submit(fail, 1).result, None),
        ):
            try:
                next(results)
            except OnPurposeError as error:
                gone.append(weakref.ref(error))
            del results
        gone.append(weakref.ref(executor))
        driver = executor._driver
        del executor
        assert [ref() for ref in gone] == [None] * 5
        driver._lifetime.thread.join(SOON)  # it shuts down when nobody can use it any more
        assert not driver._lifetime.thread.is_alive()
    finally:
        gc.enable()


SIGNALS = """
    import signal, sys, time
    from shmpool import ShmExecutor

    def nap(seconds):
        time.sleep(seconds)
        return seconds

    def shut_down(*_):
        executor.shutdown()

    def wait_for_another(*_):
        assert executor.submit(nap, 0.1).result() == 0.1

    def cancel(*_):
        executor.cancel_running(future)

    if __name__ == "__main__":
        with ShmExecutor(int(sys.argv[2]), "fork") as executor:
            assert executor.submit(abs, -1).result() == 1
            signal.signal(signal.SIGALRM, globals()[sys.argv[1]])
            seconds = 1000 if sys.argv[1] == "cancel" else 0.6
            future = executor.submit(nap, seconds)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            try:
                assert future.result() == seconds
            except BaseException as error:
                print(type(error).__name__)
"""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("deed", ["shut_down", "wait_for_another", "cancel"])
def test_a_signal_handler_may_use_the_executor_that_the_program_waits_for(deed, workers, tmp_path):
    said = run_script(tmp_path, SIGNALS, deed, str(workers))
    assert said == ("CancelledError\n" if deed == "cancel" else "")


def test_a_callback_may_cancel_what_was_answered_together_with_its_task():
    with ShmExecutor(1, "fork") as executor:
        list(executor.map(abs, range(500)))  # so that many answers come at once
        for _ in range(50):
            futures = [executor.submit(abs, -i) for i in range(20)]
            futures[0].add_done_callback(lambda _, other=futures[1]: executor.cancel_running(other))
            with contextlib.suppress(CancelledError):
                futures[1].result(SOON)
            assert futures[-1].result(SOON) == 19


def exit_from_here(_future):
    sys.exit("from a callback")


def test_a_callback_that_exits_costs_no_other_result(caplog):
    with ShmExecutor(1, "fork") as executor:
        list(executor.map(abs, range(500)))  # so that many answers come at once
        for _ in range(20):
            futures = [executor.submit(abs, -i) for i in range(20)]
            with contextlib.suppress(SystemExit):  # where this thread reads the answers
                futures[0].add_done_callback(exit_from_here)
                futures[-1].result(SOON)
            for i, future in enumerate(futures):
                with contextlib.suppress(SystemExit):
                    assert future.result(SOON) == i
    caplog.clear()  # the tracebacks hold all of this


@pytest.mark.parametrize("how", ["cancel", "cancel_running"])
def test_a_callback_that_exits_when_its_task_is_cancelled_keeps_nobody_waiting(how):
    with ShmExecutor(1, "fork") as executor:
        running = executor.submit(nap, 1000.0)
        future = running if how == "cancel_running" else executor.submit(nap, 0.5)
        wait_until(future.running, 60, "the task to be sent")
        future.add_done_callback(exit_from_here)
        waiter = threading.Thread(target=wait, args=([future], SOON))
        waiter.start()
        wait_until(lambda: future._waiters, 60, "somebody to wait")
        with pytest.raises(SystemExit):
            executor.cancel_running(future) if how == "cancel_running" else future.cancel()
        waiter.join(SOON / 2)
        assert not waiter.is_alive()
        executor.kill_workers()


@pytest.mark.parametrize("how", ["shutdown", "kill_workers"])
def test_a_callback_that_exits_does_not_keep_the_others_from_being_cancelled(how):
    executor = ShmExecutor(1, "fork")
    futures = [executor.submit(nap, 0.2 if i == 0 else 5.0) for i in range(50)]
    futures[-5].add_done_callback(exit_from_here)
    with pytest.raises(SystemExit):
        executor.shutdown(cancel_futures=True) if how == "shutdown" else executor.kill_workers()
    assert all(future.cancelled() for future in futures[-10:])
    if how == "kill_workers":
        assert all(future.exception(SOON) for future in futures if not future.cancelled())
    else:
        for future in futures:
            future.cancel() or executor.cancel_running(future)
    executor.shutdown()


def leave_slowly(array):
    """A thread keeps this worker for a while beyond its last task."""
    threading.Thread(target=time.sleep, args=(1.5,)).start()
    return array + 1


def test_idleness_while_workers_leave_is_no_mistake(monkeypatch, caplog):
    monkeypatch.setenv("SHMPOOL_WARM_SECONDS", "0.2")
    executor = ShmExecutor(1, "fork", store=ObjectStore())
    result = executor.submit(leave_slowly, np.ones(100_000)).result(SOON)
    executor.shutdown(wait=False)
    wait_until(lambda: executor._driver._machine.stopped, 60, "the end to begin")
    del result  # something to tell the worker that is leaving
    executor.shutdown()
    assert not caplog.records
    assert not executor._broken


def nap(seconds):
    time.sleep(seconds)
    return seconds


def test_a_time_limit_that_is_met_at_the_last_moment_costs_no_other_task():
    with ShmExecutor(2, "fork") as executor:
        limited = executor.options(timeout=0.01)
        futures = []
        for _ in range(300):
            futures.append(limited.submit(nap, 0.0097))
            futures += [executor.submit(nap, 0.0005) for _ in range(3)]
        outcomes = Counter(type(future.exception(SOON)) for future in futures)
    # Which of the limited ones are in time is up to the machine; of the others, all are.
    assert outcomes.keys() <= {type(None), TaskTimeoutError}, outcomes
    assert outcomes[type(None)] >= 900


def test_cancelling_what_has_just_ended_costs_no_other_task():
    with ShmExecutor(2, "fork") as executor:
        others = []
        for _ in range(150):
            future = executor.submit(nap, 0.003)
            others += [executor.submit(nap, 0.003) for _ in range(4)]
            nap(0.0029)
            executor.cancel_running(future)
            assert [other.exception(SOON) for other in others[-4:]] == [None] * 4


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_death_of_the_process_that_forks_workers_does_not_break_the_pool():
    with ShmExecutor(2, "fork") as executor:
        assert executor.submit(abs, -1).result(SOON) == 1
        for _ in range(2):
            os.kill(executor._launcher._template._process.pid, signal.SIGKILL)
            for _ in range(3):
                assert isinstance(executor.submit(be_killed).exception(SOON), WorkerDiedError)
                assert executor.submit(abs, -1).result(SOON) == 1


SLOW_TO_START = """
    import os, sys, time
    from pathlib import Path

    if __name__ != "__main__":  # a worker reads the script before anything of shmpool runs in it
        Path(sys.argv[-1], str(os.getpid())).touch()
        time.sleep(1000)

    from shmpool import ShmExecutor

    if __name__ == "__main__":
        ShmExecutor(1, "spawn").submit(abs, -1).result()
"""


def test_a_worker_that_is_still_starting_dies_with_its_parent(tmp_path):
    folder = tmp_path / "started"
    folder.mkdir()
    script = write_script(tmp_path, SLOW_TO_START)
    with started(*PYTHON, str(script), str(folder), env=environment()) as parent:
        wait_until(lambda: os.listdir(folder), SOON, "a worker to begin to start")
        parent.kill()
        (worker,) = map(int, os.listdir(folder))
        wait_until(lambda: is_gone(worker), 60, "the worker to be gone")


def ignore_terminate(folder):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(folder, str(os.getpid())).touch()
    wait_until(lambda: len(os.listdir(folder)) > 2, 60, "the pool to have been ended")


def test_workers_that_ignore_the_signal_to_end_leave_after_their_task(tmp_path):
    executor = ShmExecutor(2, "fork")
    futures = [executor.submit(ignore_terminate, str(tmp_path)) for _ in range(2)]
    wait_until(lambda: len(os.listdir(tmp_path)) == 2, 60, "the tasks to begin")
    executor.terminate_workers()
    (tmp_path / "ended").touch()
    executor.shutdown()
    assert all(isinstance(future.exception(SOON), BrokenProcessPool) for future in futures)


@pytest.mark.parametrize("chunksize", [1, 3])
def test_refs_arrive_as_their_values_whatever_the_chunks_are(chunksize):
    with ShmExecutor(2, "fork") as executor:
        refs = [executor.put(np.full(10_000, i)) for i in range(5)]
        results = list(executor.map(np.add, refs, range(5), chunksize=chunksize))
        assert [int(result[0]) for result in results] == [0, 2, 4, 6, 8]
        assert isinstance(refs[0], ObjectRef)


def test_who_waits_while_reading_answers_for_others_goes_on_leading_then():
    """A finalizer may wait for a task, also one that runs where this thread is reading another worker's answers."""
    with ShmExecutor(2, "fork") as executor:
        list(executor.map(nap, [0.2, 0.2]))
        answers = executor._driver._answers
        take = answers._take

        def interrupted(*received):
            answers._take = take
            assert executor.submit(abs, -2).result(SOON) == 2
            return take(*received)

        answers._take = interrupted
        assert executor.submit(nap, 0.05).result(SOON) == 0.05
        assert [future.result(SOON) for future in [executor.submit(abs, -i) for i in range(50)]]


def test_who_is_interrupted_on_the_way_to_waiting_is_told_when_its_task_is_done():
    with ShmExecutor(2, "fork") as executor:
        list(executor.map(nap, [0.2, 0.2]))
        leading = executor._driver._leading
        start = leading._start
        outer = executor.submit(nap, 0.1)

        def interrupted(number):
            leading._start = start
            lead = start(number)
            if lead is not None:
                driver_lock = executor._driver._lock
                driver_lock.release()  # as just after it
                try:
                    assert executor.submit(abs, -2).result(SOON) == 2
                    wait_until(
                        lambda: outer._state == "FINISHED", 60, "the dispatcher to read the answer"
                    )
                finally:
                    driver_lock.acquire()
            return lead

        leading._start = interrupted
        assert outer.result(SOON) == 0.1


TEMPLATE_DIES = """
    import multiprocessing, os, signal, sys
    from pathlib import Path
    from shmpool import ShmExecutor

    def die_once():
        if multiprocessing.current_process().name == "shmpool-template" and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def be_killed():
        os.kill(os.getpid(), signal.SIGKILL)

    if __name__ == "__main__":
        flag = Path(sys.argv[1])
        os.register_at_fork(after_in_parent=die_once)
        with ShmExecutor(1, "fork") as executor:
            executor.submit(abs, -1).result()
            print(type(executor.submit(be_killed).exception(30)).__name__)
            print([executor.submit(abs, -i).result(30) for i in range(20)] == list(range(20)))
"""


def test_the_death_of_the_template_after_it_has_forked_leaves_one_worker_on_a_channel(tmp_path):
    assert run_script(tmp_path, TEMPLATE_DIES, str(tmp_path / "flag")) == "WorkerDiedError\nTrue\n"
