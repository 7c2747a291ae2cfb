"""Death: of a worker, which takes its own task only; of the parent, which leaves nothing; of a pool, on purpose."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import itertools
import os
import re
import resource
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import executor_tasks as tasks
import numpy as np
import pytest
from executor_tasks import PYTHON, SOON, environment, run_script, write_script
from support import is_gone, started, wait_until

from shmpool import ObjectStore, ShmExecutor, WorkerDiedError
from shmpool.config import Config


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def crash() -> None:
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler._sigsegv()


def leave() -> None:
    os._exit(7)


DEADLY = {be_killed: -signal.SIGKILL, crash: -signal.SIGSEGV, leave: 7}


def blocked(folder: str) -> None:
    """Says that it runs, and then does until it is killed."""
    Path(folder, str(os.getpid())).touch()
    signal.pause()


def pids_in(folder: Path, number: int) -> list[int]:
    """Of the tasks that say so in a folder, once there are so many."""
    wait_until(lambda: len(os.listdir(folder)) == number, 60, f"{number} tasks to run")
    return [int(name) for name in os.listdir(folder)]


# Of a worker.


@pytest.mark.parametrize("deed", DEADLY)
def test_death_of_a_worker_fails_only_the_task_that_it_ran(
    start_method: str, deed: Callable[[], None]
) -> None:
    array = np.arange(100_000.0)
    with ShmExecutor(2, mp_context=start_method) as executor:
        list(executor.map(abs, range(200), timeout=SOON))  # so that many are sent ahead
        before = [executor.submit(tasks.ends, array) for _ in range(20)]
        bad = executor.submit(deed)
        behind = [executor.submit(tasks.ends, array) for _ in range(40)]
        error = bad.exception(SOON)
        assert {future.result(SOON) for future in before + behind} == {(0, 99_999)}
        assert executor.stats().workers_died == 1
    assert isinstance(error, WorkerDiedError)
    assert isinstance(error, BrokenProcessPool)
    assert error.exitcode == DEADLY[deed]
    assert error.task == deed.__name__
    assert str(error.pid) in str(error)
    assert deed.__name__ in str(error)


def test_tasks_sent_ahead_to_a_worker_that_is_killed_run_elsewhere(
    start_method: str, tmp_path: Path
) -> None:
    with ShmExecutor(1, mp_context=start_method) as executor:
        list(executor.map(abs, range(500), timeout=SOON))
        bad = executor.submit(blocked, str(tmp_path))
        ahead = [executor.submit(tasks.identity, np.full(10_000, i)) for i in range(60)]
        (pid,) = pids_in(tmp_path, 1)
        os.kill(pid, signal.SIGKILL)
        assert isinstance(bad.exception(SOON), WorkerDiedError)
        assert [int(future.result(SOON)[0]) for future in ahead] == list(range(60))


def test_worker_killed_while_idle_fails_nothing(start_method: str) -> None:
    with ShmExecutor(2, mp_context=start_method) as executor:
        tasks.warm_up(executor, 2)
        for _ in range(2):
            victims = list(executor._processes)
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            # A task that is sent to a worker on the brink of death may be read by it, and so be lost with it.
            wait_until(
                lambda dead=set(victims): not dead & set(executor._processes),
                60,
                "the deaths to be noticed",
            )
            assert list(executor.map(abs, range(20), timeout=SOON)) == list(range(20))


@pytest.mark.parametrize("kills", [30])
def test_many_deaths_in_a_row_under_load_fail_one_task_each(start_method: str, kills: int) -> None:
    if start_method != "fork":
        kills //= 4  # each costs a fresh interpreter's imports
    array = np.arange(20_000.0)
    with ShmExecutor(2, mp_context=start_method) as executor:
        good: list[Future[Any]] = []
        bad: list[Future[Any]] = []
        for i in range(kills):
            good += [executor.submit(np.add, array, i) for _ in range(5)]
            bad.append(executor.submit(leave if i % 2 else be_killed))
        good += [executor.submit(np.add, array, i) for i in range(5)]
        errors = [future.exception(SOON) for future in bad]
        results = [future.result(SOON) for future in good]
        assert executor.submit(abs, -1).result(SOON) == 1
    assert {type(error) for error in errors} == {WorkerDiedError}
    assert len({error.pid for error in errors}) == kills
    expected = [*itertools.chain.from_iterable([i] * 5 for i in range(kills)), *range(5)]
    assert [result[0] for result in results] == expected
    assert all(result[-1] == 19_999 + result[0] for result in results)


def test_kills_from_outside_at_any_moment_fail_at_most_one_task_each(
    start_method: str, rng: np.random.Generator
) -> None:
    if start_method in ("forkserver", "loky"):
        pytest.skip("each replacement imports all anew, for nothing new")
    kills = 15 if start_method == "fork" else 4
    array = np.arange(20_000.0)
    with ShmExecutor(2, mp_context=start_method) as executor:
        futures = [executor.submit(np.add, array, i) for i in range(100)]
        for i in range(kills):
            futures += [executor.submit(np.add, array, i) for _ in range(20)]
            for future in rng.choice(np.array(futures[-20:], object), 2):
                with contextlib.suppress(WorkerDiedError):
                    future.result(SOON)
            for pid in list(executor._processes)[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        errors = [error for future in futures if (error := future.exception(SOON))]
    assert {type(error) for error in errors} <= {WorkerDiedError}
    assert len(errors) <= kills
    assert len({error.pid for error in errors}) == len(errors), "a death failed two tasks"


def test_worker_that_dies_holding_blocks_lets_go_of_them(start_method: str, tmp_path: Path) -> None:
    with ShmExecutor(1, mp_context=start_method) as executor:
        ref = executor.put(np.arange(100_000.0))
        future = executor.submit(lambda array, folder: (array, blocked(folder)), ref, str(tmp_path))
        (pid,) = pids_in(tmp_path, 1)
        os.kill(pid, signal.SIGKILL)
        assert isinstance(future.exception(SOON), WorkerDiedError)
        assert executor.submit(tasks.ends, ref).result(SOON) == (0, 99_999)
        del ref, future
        wait_until(lambda: executor.stats().store.blocks == 0, 60, "the blocks to be free")


def test_what_a_worker_had_answered_before_it_died_is_read_to_the_end(tmp_path: Path) -> None:
    held, go = threading.Event(), threading.Event()
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()

    def hold(_: object) -> None:
        held.set()
        assert go.wait(SOON)

    store = ObjectStore(config=Config.from_env()._replace(prefetch_min=10))  # all are sent ahead
    with ShmExecutor(1, mp_context="fork", store=store) as executor:
        first, _ = [executor.submit(tasks.meet, str(folder), "task", 2) for folder in folders]
        first.add_done_callback(hold)
        large = executor.submit(tasks.count, 100_000)  # with a descriptor: one read ends with it
        small = executor.submit(abs, -1)
        deadly = executor.submit(leave)
        (pid,) = executor._processes
        (folders[0] / "test").touch()
        assert held.wait(SOON)
        # The dispatcher reads nothing now.
        (folders[1] / "test").touch()
        wait_until(lambda: is_gone(pid), 60, "the worker to be gone")
        go.set()
        wait_until(deadly.done, 60, "the dispatcher to see it")
        assert isinstance(deadly.exception(), WorkerDiedError)
        assert small.result(SOON) == 1
        assert large.result(SOON).sum() == sum(range(100_000))


def test_without_descriptors_of_processes_workers_are_watched_and_ended_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_here(_pid: int, _flags: int = 0) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "pidfd_open", not_here)  # Linux before 5.3
    with ShmExecutor(2, mp_context="spawn") as executor:
        assert isinstance(executor.submit(leave).exception(SOON), WorkerDiedError)
        future = executor.submit(blocked, str(tmp_path))
        (pid,) = pids_in(tmp_path, 1)
        assert executor.cancel_running(future)
        wait_until(lambda: is_gone(pid), 60, "the worker to be gone")
        assert list(executor.map(abs, range(-20, 0), timeout=SOON)) == list(range(20, 0, -1))


TEMPLATE = """
    import os, signal, sys, threading
    import numpy as np
    from shmpool import ShmExecutor, WorkerDiedError

    setting = "as of the pool's creation"
    big = np.zeros(3_000_000)

    def look():
        return os.getpid(), setting, big.sum(), threading.active_count()

    def leave():
        os._exit(1)

    with ShmExecutor(1, mp_context="fork") as executor:
        first = executor.submit(look).result()
        setting = "changed"
        big[:] = 1
        for _ in range(3):
            assert isinstance(executor.submit(leave).exception(), WorkerDiedError)
            later = executor.submit(look).result()
            assert later[0] != first[0]
            assert later[1:] == first[1:] == ("as of the pool's creation", 0, 1), (first, later)
"""


def test_forked_replacement_sees_the_program_as_it_was_when_the_pool_was_made(
    tmp_path: Path,
) -> None:
    # The program is started such that a fork of a process with threads would be an error.
    run_script(tmp_path, TEMPLATE)


# Of the parent.

ORPHANS = """
    import ctypes, os, sys, time
    from pathlib import Path
    import numpy as np
    from shmpool import ShmExecutor

    def sleep(folder):
        Path(folder, str(os.getpid())).touch()
        time.sleep(1000)

    def compute(folder):
        Path(folder, str(os.getpid())).touch()
        sum(range(10**12))

    def compiled(folder):
        Path(folder, str(os.getpid())).touch()
        ctypes.PyDLL(None).sleep(1000)  # with the interpreter lock held: no Python code can run

    def keep(folder, array):
        Path(folder, str(os.getpid())).touch()
        array[:] = 1
        time.sleep(1000)

    if __name__ == "__main__":
        method, what, folder = sys.argv[1:]
        executor = ShmExecutor(2, mp_context=method)
        if what == "idle":
            executor.submit(np.ones, 100_000).result()
            for pid in executor._processes:
                Path(folder, str(pid)).touch()
        else:
            for _ in range(2):
                executor.submit(globals()[what], folder, *([np.zeros(1_000_000)] if what == "keep" else []))
        print("running", flush=True)
        time.sleep(1000)
"""


def children_of(pid: int) -> set[int]:
    found: set[int] = set()
    unseen = [pid]
    while unseen:
        for task in Path(f"/proc/{unseen.pop()}/task").glob("*/children"):
            children = [int(child) for child in task.read_text().split()]
            found.update(children)
            unseen += children
    return found


@pytest.mark.parametrize("what", ["idle", "sleep", "compute", "compiled", "keep"])
def test_nothing_is_left_after_the_parents_death(
    start_method: str, what: str, tmp_path: Path
) -> None:
    if what in ("idle", "keep") and start_method not in ("fork", "spawn"):
        pytest.skip("workers are started otherwise, but die the same death")
    folder = tmp_path / "running"
    folder.mkdir()
    names = set(os.listdir("/dev/shm"))
    script = write_script(tmp_path, ORPHANS)
    with started(
        *PYTHON, str(script), start_method, what, str(folder),
        stdout=subprocess.PIPE, env=environment(TMPDIR=str(tmp_path)),
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"running\n"
        busy = set(pids_in(folder, 1 if what == "idle" and start_method != "fork" else 2))
        family = children_of(parent.pid)
        assert busy <= family | {0}, "workers are descendants of their program"
        parent.kill()
        wait_until(lambda: all(map(is_gone, family)), 60, "the workers to be gone")
    ours = [n for n in set(os.listdir("/dev/shm")) - names if re.search(rf"\b{parent.pid}\b", n)]
    assert not ours


# On purpose.


@pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
def test_ending_the_workers_fails_what_runs_and_starts_nothing_new(
    start_method: str, how: str, tmp_path: Path
) -> None:
    executor = ShmExecutor(2, mp_context=start_method)
    list(executor.map(abs, range(500), timeout=SOON))  # so that many are sent ahead
    running = [executor.submit(blocked, str(tmp_path)) for _ in range(2)]
    pids = pids_in(tmp_path, 2)
    ahead = [executor.submit(os.getpid) for _ in range(50)]
    getattr(executor, how)()
    done, _ = wait(running + ahead, SOON)
    assert len(done) == 52, "a future is never resolved"
    for future in running:
        error = future.exception()
        assert isinstance(error, BrokenProcessPool)
        if isinstance(error, WorkerDiedError):
            assert error.pid in pids
            signals = {"terminate_workers": signal.SIGTERM, "kill_workers": signal.SIGKILL}
            assert error.exitcode == -signals[how]
    for future in ahead:
        assert future.cancelled() or isinstance(future.exception(), BrokenProcessPool), (
            "a new worker was started to run it"
        )
    with pytest.raises(RuntimeError):
        executor.submit(abs, 1)
    executor.shutdown()
    assert not executor._processes


@pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
def test_ending_the_workers_of_an_executor_that_has_none_shuts_it_down(how: str) -> None:
    executor = ShmExecutor(2, mp_context="fork")
    getattr(executor, how)()
    with pytest.raises(RuntimeError):
        executor.submit(abs, 1)
    executor.shutdown()


def test_ending_the_workers_from_another_thread_while_tasks_are_submitted() -> None:
    executor = ShmExecutor(2, mp_context="fork")
    futures: list[Future[int]] = []
    submitted = threading.Event()

    def submit() -> None:
        with contextlib.suppress(RuntimeError, BrokenProcessPool):
            for i in itertools.count():
                futures.append(executor.submit(abs, -i))
                if i == 200:
                    submitted.set()

    thread = threading.Thread(target=submit)
    thread.start()
    assert submitted.wait(SOON)
    executor.kill_workers()
    thread.join(SOON)
    assert not thread.is_alive()
    executor.shutdown()
    assert len(wait(futures, SOON).not_done) == 0
