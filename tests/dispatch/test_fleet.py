"""What is to be said to a worker, and cannot be said now."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from executor_tasks import SOON
from support import wait_until

from shmpool import ObjectStore, ShmExecutor
from shmpool.config import Config
from shmpool.dispatch import fleet
from shmpool.dispatch.fleet import Fleet
from shmpool.dispatch.task import Task
from shmpool.wire.channel import MAX_FDS
from shmpool.wire.messages import Notice, encode
from shmpool.worker.process import WorkerHandle


def ones(number: int) -> np.ndarray:
    return np.ones(number)


def total(arrays: list[np.ndarray]) -> float:
    return float(sum(array.sum() for array in arrays))


def test_a_task_with_arrays_of_more_arenas_than_a_message_can_introduce(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert MAX_FDS == 253, "what the kernel allows"
    monkeypatch.setattr(fleet, "MAX_FDS", 3)
    with ShmExecutor(2, "fork", max_tasks_per_child=1) as executor:
        arrays = list(executor.map(ones, [20_000] * 10))  # each made by another worker
        assert len({id(a.base) for a in arrays}) == 10
        for _ in range(2):
            assert executor.submit(total, arrays).result(SOON) == 200_000
        assert executor.stats().workers_died == 0
        del arrays


def wait_for(file: str) -> None:
    Path(file + ".begun").touch()
    wait_until(lambda: os.path.exists(file), 60, "the file")


def test_a_worker_whose_socket_is_full_is_told_later_what_it_need_not_keep(tmp_path: Path) -> None:
    file = str(tmp_path / "go")
    store = ObjectStore(config=Config.from_env()._replace(warm_seconds=10_000))
    with ShmExecutor(1, "fork", store=store) as executor:
        result = executor.submit(ones, 100_000).result(SOON)
        resident = store.stats().resident_in_workers
        busy = executor.submit(wait_for, file)
        wait_until(lambda: os.path.exists(file + ".begun"), 60, "the task to begin")
        driver, fleet = executor._driver, executor._driver._fleet
        (handle,) = fleet.workers.values()
        with driver._lock:
            while handle.end.send(encode(Notice(None))):
                pass
        assert result.sum() == 100_000
        del result
        to_tell = wait_until(lambda: list(handle.peer.to_free), 60, "the end of the result")
        with driver._lock:
            fleet.tell_idle()
        assert handle.peer.to_free == to_tell
        Path(file).touch()
        busy.result(SOON)

        def told() -> bool:
            with driver._lock:
                fleet.tell_idle()
            return not handle.peer.to_free

        wait_until(told, 60, "room in the socket")
        assert executor.submit(ones, 100_000).result(SOON).sum() == 100_000
        assert store.stats().resident_in_workers == resident, "it was told, and does not use it"


def lengths(*arguments: bytes | np.ndarray) -> list[int]:
    return [len(argument) for argument in arguments]


@pytest.mark.parametrize("with_array", [False, True])
def test_tasks_that_do_not_fit_in_the_socket_are_sent_later(
    tmp_path: Path, with_array: bool
) -> None:
    file = str(tmp_path / "go")
    more = (np.ones(100_000),) if with_array else ()
    with ShmExecutor(1, "fork") as executor:
        list(executor.map(abs, range(3000)))  # quick ones, so that many are sent ahead
        busy = executor.submit(wait_for, file)
        wait_until(lambda: os.path.exists(file + ".begun"), 60, "the task to begin")
        futures = [executor.submit(lengths, bytes(60_000 + i), *more) for i in range(30)]
        Path(file).touch()
        busy.result(SOON)
        for i, future in enumerate(futures):
            assert future.result(SOON) == [60_000 + i, *map(len, more)]


def element(array: np.ndarray, index: int) -> float:
    return float(array[index])


def test_tasks_with_blocks_that_the_worker_can_read_go_many_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    singly: list[int] = []
    send = Fleet._send_with_extras

    def counted(self: Fleet, handle: WorkerHandle, number: int, task: Task, room: int) -> bool:
        singly.append(number)
        return send(self, handle, number, task, room)

    monkeypatch.setattr(Fleet, "_send_with_extras", counted)
    array = np.arange(100_000.0)
    with ShmExecutor(1, "fork") as executor:
        assert list(executor.map(partial(element, array), range(500))) == list(range(500))
        assert 1 <= len(singly) < 50, "only until the worker has the arena"
        assert executor.stats().bytes_copied == array.nbytes
