"""Where Ctrl-C is held back, where it is heard, and that nothing of that stays.

SIGINT is sent by ``signal.raise_signal``, which has it handled before the next line.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from functools import partial

import pytest
from executor_tasks import SOON
from support import wait_until

from shmpool import ShmExecutor, interrupts
from shmpool.dispatch.driver import Driver
from shmpool.dispatch.future import TaskFuture
from shmpool.dispatch.task import Task
from shmpool.interrupts import HeardCondition, JoinableThread, WholeLock, heard, whole


@pytest.fixture(autouse=True)
def the_handler_is_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before
    assert interrupts._depth == 0
    assert interrupts._outside is None
    assert not interrupts._noted


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_a_section_comes_to_its_end_first():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with whole:
            press()
            done.append(1)
        done.append(2)
    assert done == [1]


def test_a_section_inside_of_another_does_not_end_it():
    done = []
    with pytest.raises(KeyboardInterrupt), whole:
        with whole:
            press()
        done.append(1)
    assert done == [1]


def test_a_lock_is_let_go_of_before_ctrl_c_raises():
    lock = WholeLock()
    with pytest.raises(KeyboardInterrupt), lock:
        press()
        assert lock.is_owned()
    assert not lock.is_owned()
    assert lock.acquire()
    press()
    with pytest.raises(KeyboardInterrupt):
        lock.release()
    assert not lock.is_owned()


def test_a_lock_that_is_not_there_holds_nothing_back():
    lock = WholeLock()
    thread = threading.Thread(target=lock.acquire)
    thread.start()
    thread.join()
    assert not lock.acquire(blocking=False)
    assert interrupts._depth == 0


def test_where_ctrl_c_is_heard_it_raises_at_once_and_what_follows_is_whole_again():
    done = []
    with pytest.raises(KeyboardInterrupt), whole:
        try:
            with heard():
                press()
                done.append(1)
        finally:
            press()  # the second
            done.append(2)
    assert done == [2]


def test_what_came_before_is_heard_first():
    done = []
    with pytest.raises(KeyboardInterrupt), whole:
        press()
        with heard():
            done.append(1)
    assert not done


def test_sections_where_ctrl_c_is_heard_are_sections():
    done = []
    with pytest.raises(KeyboardInterrupt), whole, heard():
        with whole:
            with heard():
                pass
            press()
            done.append(1)
        done.append(2)
    assert done == [1]


def test_who_waits_for_long_and_presses_again_is_heard(monkeypatch):
    monkeypatch.setattr(interrupts, "_PATIENCE", 0)
    done = []
    with pytest.raises(KeyboardInterrupt), whole:
        press()
        done.append(1)
        press()
        done.append(2)
    assert done == [1]


def test_a_handler_of_the_users_is_called_afterwards_and_stays():
    called = []
    before = signal.signal(signal.SIGINT, lambda number, frame: called.append((number, frame)))
    try:
        with whole:
            press()
            press()
            assert not called
            with heard():
                assert len(called) == 1
                press()
                assert len(called) == 2
            press()
            assert len(called) == 2
        assert len(called) == 3
        assert all(number == signal.SIGINT and frame is not None for number, frame in called)
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_that_are_ignored_stay_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with whole:
            press()
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_are_not_concerned():
    seen = []

    def look() -> None:
        with whole, WholeLock(), heard():
            seen.append(interrupts._depth)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [0]


def test_a_forked_child_has_the_users_handler():
    with whole:
        press()
        pid = os.fork()
        if not pid:
            ok = signal.getsignal(signal.SIGINT) is signal.default_int_handler
            os._exit(not (ok and interrupts._depth == 0 and not interrupts._noted))
        interrupts._noted = 0.0
    assert os.waitpid(pid, 0)[1] == 0


def test_a_wait_that_ctrl_c_ended_leaves_the_condition_as_it_was():
    condition = HeardCondition()
    timer = threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt), condition:
        condition.wait(60)
    timer.join()
    assert condition.acquire(blocking=False)
    condition.release()


def test_futures_that_are_taken_together_are_let_go_of_together():
    # concurrent.futures.wait acquires one after the other, and releases none if that is cut short.
    taken = []

    class Pressing(TaskFuture):
        @property
        def _condition(self) -> HeardCondition:
            taken.append(self)
            if len(taken) == 2:
                press()
            return super()._condition

    futures = [Pressing() for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        wait(futures, timeout=0)
    assert len(taken) > 3
    assert not any(future._condition._is_owned() for future in futures)


def _note(path: str, _item: int) -> None:
    with open(path, "ab") as file:
        file.write(b".")


def _wait_for(path: str) -> None:
    wait_until(lambda: os.path.exists(path), SOON, "the file that lets this task end")


@pytest.mark.parametrize("items", [range(100), {*range(100)}], ids=["together", "one by one"])
@pytest.mark.parametrize("results_of", ["map", "map_unordered"])
@pytest.mark.parametrize(
    ("owner", "method"), [(Driver, "submit"), (TaskFuture, "add_done_callback")]
)
def test_a_map_that_ctrl_c_ended_leaves_no_task_that_runs(
    tmp_path, monkeypatch, items, results_of, owner, method
):
    if method == "add_done_callback" and results_of == "map":
        pytest.skip("map adds no callbacks")
    ran, go = str(tmp_path / "ran"), tmp_path / "go"
    taken_on: list[Task] = []
    real, take_on = getattr(owner, method), Driver.submit

    def submit(driver: Driver, tasks: Sequence[Task]) -> None:
        take_on(driver, tasks)
        taken_on.extend(tasks)
        if real is take_on and len(taken_on) > 20:
            press()

    def add_done_callback(future: TaskFuture, done: Callable[..., None]) -> None:
        real(future, done)
        if len(taken_on) > 20:
            press()

    with ShmExecutor(1) as executor:
        blocker = executor.submit(_wait_for, str(go))
        try:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(Driver, "submit", submit)
                if real is not take_on:
                    patch.setattr(TaskFuture, "add_done_callback", add_done_callback)
                getattr(executor, results_of)(partial(_note, ran), items)
        finally:
            go.touch()
        blocker.result(SOON)
        assert all(task.future.cancelled() for task in taken_on)
    assert 20 < len(taken_on) < 100
    assert not os.path.exists(ran)


def test_a_thread_is_not_over_because_ctrl_c_ended_the_waiting_for_it():
    go = threading.Event()
    thread = JoinableThread(lambda: go.wait(60), "waits")
    thread.start()
    timer = threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        thread.join()
    timer.join()
    assert thread.is_alive()
    thread.join(0.01)
    assert thread.is_alive()
    go.set()
    thread.join()
    assert not thread.is_alive()


def test_in_a_subinterpreter_which_gets_no_signals_sections_are_just_code():
    try:
        interpreters = importlib.import_module("_xxsubinterpreters")
    except ModuleNotFoundError:  # from Python 3.13 on
        interpreters = importlib.import_module("_interpreters")
    number = interpreters.create()
    try:
        failed = interpreters.run_string(
            number,
            f"import sys; sys.path[:] = {sys.path!r}\n"
            "from shmpool.interrupts import WholeLock, whole\n"
            "lock = WholeLock()\n"
            "with whole, lock: pass\n",
        )
        assert failed is None, failed
    finally:
        interpreters.destroy(number)
