"""The dispatcher's thread is started with no lock held: threading's own are taken, and what runs inside of those waits.

What a finalizer does that is found while a thread starts is done by functions that stand in threading's place.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from executor_tasks import SOON, run_script
from support import wait_until

from shmpool import ShmExecutor
from shmpool.errors import BrokenPoolError
from shmpool.interrupts import JoinableThread
from shmpool.store.books import INSIDE

#: A thread is inside of a lock of threading's, where it may find garbage, while another starts an executor.
IN_THREADINGS_LOCK = """
    import faulthandler, threading
    from shmpool import ShmExecutor
    from shmpool.interrupts import JoinableThread

    def announced(thread):
        starts.set()
        start(thread)

    def find_garbage():
        with threading._active_limbo_lock:
            holds.set()
            starts.wait()
            futures.append(executor.submit(abs, -2))

    if __name__ == "__main__":
        faulthandler.dump_traceback_later(30, exit=True)
        executor = ShmExecutor(2, "forkserver")
        start = JoinableThread.start
        holds, starts = threading.Event(), threading.Event()
        futures = []
        finder = threading.Thread(target=find_garbage)
        finder.start()
        holds.wait()
        JoinableThread.start = announced
        futures.append(executor.submit(abs, -1))
        finder.join()
        print(sorted(future.result() for future in futures))
        executor.shutdown()
"""


def test_a_finalizer_in_threadings_lock_may_submit_while_the_executor_starts(
    tmp_path: Path,
) -> None:
    assert run_script(tmp_path, IN_THREADINGS_LOCK) == "[1, 2]\n"


#: The new thread itself finds garbage, before whoever starts it is told that it runs.
IN_THE_NEW_THREAD = """
    import faulthandler, threading
    from shmpool import ShmExecutor
    from shmpool.interrupts import JoinableThread

    faulthandler.dump_traceback_later(30, exit=True)
    executor = ShmExecutor(2, "fork")
    bootstrap = JoinableThread._bootstrap
    futures = []

    def with_garbage(thread):
        futures.append(executor.submit(abs, -2))
        bootstrap(thread)

    JoinableThread._bootstrap = with_garbage
    futures.append(executor.submit(abs, -1))
    print(sorted(future.result() for future in futures))
    executor.shutdown()
"""


def test_a_finalizer_in_the_new_thread_may_submit(tmp_path: Path) -> None:
    assert run_script(tmp_path, IN_THE_NEW_THREAD) == "[1, 2]\n"


def before_start(monkeypatch: pytest.MonkeyPatch, deed: object) -> None:
    """Have something done once, when a dispatcher's thread is about to be started."""
    start = JoinableThread.start

    def interrupted(thread: JoinableThread) -> None:
        monkeypatch.setattr(JoinableThread, "start", start)
        deed()  # type: ignore[operator]
        start(thread)

    monkeypatch.setattr(JoinableThread, "start", interrupted)


def test_a_finalizer_in_the_thread_that_starts_the_executor_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor = ShmExecutor(1, "fork")

    def submit() -> None:
        with pytest.raises(RuntimeError, match=INSIDE.replace("(", r"\(").replace(")", r"\)")):
            executor.submit(abs, -2)  # and would then wait for a thread that waits for it

    before_start(monkeypatch, submit)
    assert executor.submit(abs, -1).result(SOON) == 1
    assert executor.submit(abs, -3).result(SOON) == 3
    executor.shutdown()


def test_a_finalizer_may_shut_down_what_its_thread_is_about_to_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor = ShmExecutor(1, "fork")
    before_start(monkeypatch, executor.shutdown)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, -1)
    executor.shutdown()


def test_another_thread_may_end_an_executor_that_is_about_to_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor = ShmExecutor(1, "fork")
    futures = []

    def other() -> None:
        futures.append(executor.submit(abs, -2))
        executor.shutdown(wait=False)
        threads.append(threading.Thread(target=executor.shutdown))
        threads[1].start()

    def run_other() -> None:
        threads.append(threading.Thread(target=other))
        threads[0].start()
        threads[0].join()

    threads: list[threading.Thread] = []
    before_start(monkeypatch, run_other)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, -1)
    assert futures[0].result(SOON) == 2
    threads[1].join()


def test_a_thread_that_cannot_be_started_is_an_error_and_may_be_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise RuntimeError("can't start new thread")

    executor = ShmExecutor(2, "fork")
    before_start(monkeypatch, fail)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        executor.submit(abs, -1)
    assert executor.submit(abs, -2).result(SOON) == 2
    executor.shutdown()


@pytest.mark.parametrize("runs", [True, False])
def test_a_signal_handler_that_raises_once_the_thread_is_there_leaves_one_dispatcher(
    monkeypatch: pytest.MonkeyPatch, *, runs: bool
) -> None:
    """If it has not begun, its start is given up, and it finds that out; who asks next starts another."""
    executor = ShmExecutor(1, "fork")
    driver = executor._driver
    start = JoinableThread.start
    started: list[JoinableThread] = []

    def interrupted(thread: JoinableThread) -> None:
        if started:
            start(thread)
            return
        started.append(thread)
        if not runs:
            driver._lock.acquire()
        start(thread)
        if runs:
            wait_until(lambda: driver._lifetime._starting is None, 60, "the dispatcher to begin")
        raise LookupError("in a signal handler")

    monkeypatch.setattr(JoinableThread, "start", interrupted)
    with pytest.raises(LookupError):
        executor.submit(abs, -1)
    if not runs:
        driver._lock.release()
    assert executor.submit(abs, -2).result(SOON) == 2
    assert (driver._lifetime.thread is started[0]) == runs
    executor.shutdown()
    started[0].join()


@pytest.mark.parametrize("shut_down", [False, True])
def test_what_others_have_submitted_fails_with_the_thread(
    monkeypatch: pytest.MonkeyPatch, *, shut_down: bool
) -> None:
    executor = ShmExecutor(2, "fork")
    futures = []

    def other() -> None:
        futures.extend(executor.submit(pow, 2, i) for i in range(100))
        if shut_down:
            executor.shutdown(wait=False)
            joins.start()

    joins = threading.Thread(target=executor.shutdown)

    def fail() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        raise RuntimeError("can't start new thread")

    before_start(monkeypatch, fail)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        executor.submit(abs, -1)
    for future in futures:
        assert isinstance(future.exception(SOON), BrokenPoolError)
    with pytest.raises(BrokenPoolError, match="can't start new thread"):
        executor.submit(abs, -1)
    executor.shutdown()
    if shut_down:
        joins.join()
