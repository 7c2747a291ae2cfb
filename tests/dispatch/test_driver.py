"""A mistake of the dispatcher's own: nobody waits for ever because of it."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
from executor_tasks import SOON
from support import wait_until

from shmpool import BrokenPoolError, ShmExecutor


def begin_and_wait_for(file: str) -> None:
    Path(file + ".begun").touch()
    wait_until(lambda: os.path.exists(file), 60, "a file that never comes")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_when_the_dispatcher_fails_all_tasks_fail_and_the_log_says_why(
    method: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def mistaken(*_: object) -> None:
        raise LookupError("a mistake in the dispatcher")

    file = str(tmp_path / "go")
    heard: list[Future[None]] = []
    with (
        ShmExecutor(1, mp_context=method) as executor,
        caplog.at_level(logging.ERROR, "shmpool"),
    ):
        futures = [executor.submit(begin_and_wait_for, file) for _ in range(20)]
        wait_until(lambda: os.path.exists(file + ".begun"), 60, "the first task to begin")
        for future in futures:
            future.add_done_callback(heard.append)
        leader = threading.Thread(target=futures[0].exception, args=(SOON,))
        leader.start()
        wait_until(lambda: executor._driver._leading._leads, 60, "a thread to wait for the answer")
        (pid,) = executor._processes

        monkeypatch.setattr(executor._driver._rounds, "_seconds_to_wait", mistaken)
        executor._driver.wake()
        for future in futures:
            error = future.exception(SOON)
            assert isinstance(error, BrokenPoolError), repr(error)
            assert "the dispatcher failed; see the log" in str(error)
        leader.join(SOON)
        assert not leader.is_alive()
        wait_until(lambda: len(heard) == len(futures), 60, "the callbacks")
        with pytest.raises(BrokenPoolError, match="the dispatcher failed"):
            executor.submit(abs, -1)
    assert "a mistake in the dispatcher" in caplog.text
    caplog.clear()  # its frames hold the worker
    assert not os.path.exists(f"/proc/{pid}"), "a zombie"
