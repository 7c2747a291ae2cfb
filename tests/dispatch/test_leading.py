"""Who waits for a result asks again and again for a moment, where that is worth while, and else sleeps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from executor_tasks import SOON
from support import wait_until

import shmpool
from shmpool.config import Config
from shmpool.worker.process import WorkerHandle


@pytest.fixture
def spins(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how many seconds each wait for an answer was to ask again and again."""
    asked: list[float] = []
    wait = WorkerHandle.wait

    def noted(self: Any, seconds: float | None, bell: int, spin: float = 0.0) -> bool:
        asked.append(spin)
        return wait(self, seconds, bell, spin)

    monkeypatch.setattr(WorkerHandle, "wait", noted)
    return asked


def executor(seconds: float, cpus: int = 2) -> shmpool.ShmExecutor:
    store = shmpool.ObjectStore(config=Config(spin_seconds=seconds))
    executor = shmpool.ShmExecutor(1, store=store)
    executor._driver._leading._cpus = cpus
    return executor


def settle_on_short_tasks(executor: shmpool.ShmExecutor) -> None:
    """Until it is known that tasks are short, and some more."""
    for _ in range(150):
        assert executor.submit(abs, -1).result(SOON) == 1


def test_not_before_tasks_are_known_to_be_short(spins):
    with executor(0.002) as ex:
        assert ex.submit(abs, -1).result(SOON) == 1
        assert not any(spins)
        settle_on_short_tasks(ex)
        assert set(spins) == {0.0, 0.002}
        spins.clear()
        assert ex.submit(time.sleep, 0.1).result(SOON) is None
        assert ex.submit(time.sleep, 0.01).result(SOON) is None
        assert spins.pop() == 0.0, "they are no more"


def test_not_without_a_processor_to_spare(spins):
    with executor(0.002, cpus=1) as ex:
        settle_on_short_tasks(ex)
    assert spins and not any(spins)


def test_not_if_it_is_switched_off(spins):
    with executor(0.0) as ex:
        settle_on_short_tasks(ex)
    assert spins and not any(spins)


@pytest.fixture
def spinning() -> Iterator[shmpool.ShmExecutor]:
    """Asks for longer than a test takes."""
    with executor(10 * SOON) as ex:
        settle_on_short_tasks(ex)
        assert ex._driver._leading._spin()
        yield ex


def test_time_outs_hold_meanwhile(spinning):
    future = spinning.submit(time.sleep, 0.5)
    with pytest.raises(TimeoutError):
        future.result(0.05)
    assert future.result(SOON) is None


def test_other_threads_run_meanwhile(spinning):
    done = threading.Event()
    future = spinning.submit(time.sleep, 0.5)
    thread = threading.Thread(target=lambda: done.wait(SOON))
    thread.start()
    future.add_done_callback(lambda _: done.set())
    assert future.result(SOON) is None
    thread.join()


def test_ctrl_c_is_heard_meanwhile(spinning):
    future = spinning.submit(time.sleep, 0.5)
    timer = threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        future.result()
    timer.join()
    assert future.result(SOON) is None


def test_the_end_of_the_worker_is_seen_meanwhile(spinning):
    future = spinning.submit(time.sleep, 100)
    (pid,) = spinning._processes
    process = spinning._processes[pid]
    timer = threading.Timer(0.05, process.kill)
    timer.start()
    with pytest.raises(shmpool.WorkerDiedError):
        future.result(SOON)
    timer.join()
    wait_until(lambda: spinning.submit(abs, -2).result(SOON) == 2, 60, "the next worker")
