"""What is to be said to a worker, and cannot be said now."""

from __future__ import annotations

import errno
import multiprocessing
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Never

import numpy as np
import pytest
from executor_tasks import SOON
from support import wait_until

from shmpool import ObjectStore, ShmExecutor
from shmpool.config import Config
from shmpool.dispatch import fleet
from shmpool.dispatch.fleet import Fleet
from shmpool.dispatch.task import Task
from shmpool.wire.channel import MAX_FDS, ParentEnd
from shmpool.wire.messages import Notice, encode
from shmpool.worker.main import Settings
from shmpool.worker.process import WorkerHandle, context_starter, start_worker


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
        driver, fleet = executor._driver, executor._driver._foreman.fleet
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


def total_of(*arrays: np.ndarray) -> float:
    return total(list(arrays))


@pytest.mark.parametrize("room", [0, 1])
def test_arenas_for_which_the_socket_has_no_room_are_introduced_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """All of them are, also those for which there was room: the worker may meet one twice."""
    send = ParentEnd.send

    def send_and_make_room(end: ParentEnd, data: bytes, fds: list[int] | None = None) -> bool:
        sent = send(end, data, fds)
        if fds and not sent:
            end.take_back()  # as if the worker had read: what comes next could be sent
        return sent

    monkeypatch.setattr(ParentEnd, "send", send_and_make_room)
    monkeypatch.setattr(fleet, "MAX_FDS", 3)
    file, size = str(tmp_path / "go"), 1 << 20
    store = ObjectStore(config=Config.from_env()._replace(arena_min=size, arena_max=size))
    with ShmExecutor(1, "fork", store=store) as executor:
        busy = executor.submit(wait_for, file)
        wait_until(lambda: os.path.exists(file + ".begun"), 60, "the task to begin")
        driver = executor._driver
        (handle,) = driver._foreman.fleet.workers.values()
        with driver._lock:
            while handle.end.send(encode(Notice(None))):
                pass
            for _ in range(room):
                handle.end.take_back()
        refs = [executor.put(np.ones(100_000)) for _ in range(8)]  # one an arena
        future = executor.submit(total_of, *refs)
        assert driver._foreman.table.handle_of(future.number) is None, "it was sent"
        Path(file).touch()
        busy.result(SOON)
        assert future.result(SOON) == 800_000
        assert executor.stats().workers_died == 0


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


def begin(array: np.ndarray) -> None:
    """In a worker, as its initializer."""


def test_a_worker_that_cannot_be_given_its_initargs_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> Never:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    store = ObjectStore()
    with ShmExecutor(1, "spawn", begin, (np.ones(100_000),), store=store) as executor:
        with monkeypatch.context() as patch:
            patch.setattr(store, "introduce", fail)
            error = executor.submit(abs, -1).exception(SOON)
            assert isinstance(error, OSError) and error.errno == errno.EMFILE, repr(error)
            wait_until(lambda: not executor._processes, 60, "the end of the worker")
        assert executor.submit(abs, -1).result(SOON) == 1
        assert len(executor._processes) == 1
    assert store.stats().used == 0


def test_a_worker_that_is_told_to_end_before_it_is_given_its_initargs_does_not_begin() -> None:
    """It may come to hear that before the end of its parent kills it."""
    waits: Any = SimpleNamespace(needs_arenas=True, payload=None)
    settings = Settings(Config.from_env(), 1 << 20, spill_dir=False, huge_pages=False, mode="c")
    handle = start_worker(context_starter(multiprocessing.get_context("fork"), waits, settings))
    try:
        handle.end.end_of_calls()
        handle.process.join(SOON)
        assert handle.process.exitcode == 0
        assert handle.end.receive() == ([], 0), "it has said something"
    finally:
        handle.process.kill()
        handle.process.join()
        handle.close()
