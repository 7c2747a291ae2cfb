"""What tests in ``differences.py`` are about, where shmpool promises it too, without CPython's private names."""

from __future__ import annotations

import gc
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from support import TIMEUNIT, wait_until

from shmpool import ShmExecutor

MOST = 4


def wait_for(gate: Path) -> None:
    while not gate.exists():
        time.sleep(0.005)


class CannotBePickled:
    def __reduce__(self) -> NoReturn:
        raise pickle.PicklingError("on purpose")


def let_go_and_collect(executors: list[ShmExecutor]) -> None:
    executors.clear()
    gc.collect()


def shut_down_without_waiting(executors: list[ShmExecutor]) -> None:
    executors.pop().shutdown(wait=False)


def test_there_are_as_many_workers_as_tasks_up_to_the_maximum(
    start_method: str, tmp_path: Path
) -> None:
    """``test_saturation`` and ``test_processes_terminate``, with tasks that every start method can send."""
    with ShmExecutor(MOST, mp_context=start_method) as executor:
        tasks = [executor.submit(wait_for, tmp_path / "gate") for _ in range(MOST - 1)]
        # fork must start them all before there are threads.
        expected = MOST if start_method == "fork" else MOST - 1
        assert len(executor._processes) == expected
        tasks += [executor.submit(wait_for, tmp_path / "gate") for _ in range(15 * MOST)]
        assert len(executor._processes) == MOST
        processes = list(executor._processes.values())
        (tmp_path / "gate").touch()
    assert all(task.done() for task in tasks)
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize("leave", [let_go_and_collect, shut_down_without_waiting])
def test_tasks_are_finished_and_workers_end_when_nobody_waits(
    start_method: str, leave: Callable[[list[ShmExecutor]], None]
) -> None:
    """``test_del_shutdown`` and ``test_shutdown_no_wait``."""
    executors = [ShmExecutor(MOST, mp_context=start_method)]
    results = executors[0].map(abs, range(-5, 5))
    processes = list(executors[0]._processes.values())
    leave(executors)
    assert list(results) == [5, 4, 3, 2, 1, 0, 1, 2, 3, 4]
    wait_until(
        lambda: not any(process.is_alive() for process in processes), 60, "the workers to end"
    )


def test_tasks_that_have_begun_are_finished_when_the_others_are_cancelled(
    start_method: str, tmp_path: Path
) -> None:
    """``test_cancel_futures``, when the workers are there."""
    with ShmExecutor(MOST, mp_context=start_method) as executor:
        begun = [executor.submit(wait_for, tmp_path / "gate") for _ in range(MOST)]
        wait_until(lambda: all(task.running() for task in begun), 60, "the tasks to begin")
        others = [executor.submit(abs, -1) for _ in range(10 * MOST)]
        executor.shutdown(wait=False, cancel_futures=True)
        (tmp_path / "gate").touch()
    assert [task.result(timeout=0) for task in begun] == [None] * MOST
    # Some were sent ahead to the busy workers: too late to cancel them.
    assert {task.result(timeout=0) for task in others if not task.cancelled()} <= {1}
    assert sum(task.cancelled() for task in others) >= 5 * MOST


def test_all_tasks_can_be_cancelled_before_the_first_worker_is_ready(start_method: str) -> None:
    """``test_cancel_futures``, when the workers are still starting."""
    with ShmExecutor(MOST, mp_context=start_method) as executor:
        tasks = [executor.submit(abs, -1) for _ in range(10 * MOST)]
        executor.shutdown(cancel_futures=True)
    assert all(task.cancelled() or task.result(timeout=0) == 1 for task in tasks)


def test_shutdown_after_a_task_that_cannot_be_pickled_does_not_hang(start_method: str) -> None:
    """``test_shutdown_deadlock_pickle``."""
    with ShmExecutor(2, mp_context=start_method) as executor:
        assert executor.submit(abs, -42).result(timeout=60 * TIMEUNIT) == 42
        task = executor.submit(id, CannotBePickled())
        executor.shutdown(wait=False)
        assert isinstance(task.exception(timeout=60 * TIMEUNIT), pickle.PicklingError)
