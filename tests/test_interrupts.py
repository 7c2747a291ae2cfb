"""Where Ctrl-C is held back, where it is heard, and that nothing of that stays.

SIGINT is sent by ``signal.raise_signal``, which has it handled before the next line.
"""

from __future__ import annotations

import _thread
import gc
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from functools import partial
from typing import Any, Self

import numpy as np
import pytest
from executor_tasks import SOON
from support import wait_until

from shmpool import BrokenPoolError, ObjectStore, ShmExecutor, interrupts, put
from shmpool import executor as executor_module
from shmpool.dispatch import driver as driver_module
from shmpool.dispatch.driver import Driver
from shmpool.dispatch.foreman import Foreman
from shmpool.dispatch.future import TaskFuture
from shmpool.dispatch.task import Task
from shmpool.interrupts import HeardCondition, JoinableThread, WholeLock, hear, heard, whole


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


def test_between_two_steps_a_handler_that_does_not_raise_is_called_and_the_section_goes_on():
    called = []
    before = signal.signal(signal.SIGINT, lambda *_: called.append(interrupts._depth))
    try:
        with whole:
            hear()
            press()
            assert not called
            hear()
            assert called == [1], "for the handler it is a section still"
            hear()
            press()
        assert len(called) == 2
    finally:
        signal.signal(signal.SIGINT, before)


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


def test_who_waits_for_a_lock_in_vain_and_presses_again_is_heard(monkeypatch):
    monkeypatch.setattr(interrupts, "_PATIENCE", 0)
    lock = WholeLock()

    def wait_in_vain() -> None:
        press()
        press()
        raise AssertionError("the second is heard")

    lock._take = wait_in_vain
    with pytest.raises(KeyboardInterrupt), lock:
        raise AssertionError("another has it")
    assert interrupts._depth == 0
    assert lock.acquire(blocking=False)
    lock.release()


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


class _Pressing(int):
    # To look it up presses without a line in between, and so without Ctrl-C being noticed here.
    now = property(_thread.interrupt_main)


_PACKAGE = os.path.dirname(interrupts.__file__)


class _PressLater:
    """Press after so many bytecodes of the package's (but for the module that is about that)."""

    def __init__(self, left: int) -> None:
        self.left = left
        self._pressing = _Pressing(signal.SIGINT)

    def __enter__(self) -> Self:
        self._before = sys.gettrace()  # that of a debugger, or of who measures what is run
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: Any, event: str, _arg: object) -> Any:
        if event == "call":
            file = frame.f_code.co_filename
            if not file.startswith(_PACKAGE) or file == interrupts.__file__:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            self.left -= 1
            if not self.left:
                sys.settrace(None)
                _ = self._pressing.now
        return self._trace


def _first(array: np.ndarray) -> float:
    return float(array[0])


MAPS = {
    "list": lambda executor, arrays: executor.map(_first, arrays),
    "generator": lambda executor, arrays: executor.map(_first, iter(arrays)),
    "list, unordered": lambda executor, arrays: executor.map_unordered(_first, arrays),
    "generator, unordered": lambda executor, arrays: executor.map_unordered(_first, iter(arrays)),
    "chunks": lambda executor, arrays: executor.map(_first, arrays, chunksize=2),
    "buffersize": lambda executor, arrays: executor.map(_first, arrays, buffersize=4),
    "numbers": lambda executor, _: executor.map(abs, range(40)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPS)
def test_wherever_ctrl_c_ends_a_map_no_task_runs_and_no_block_is_left(
    tmp_path, monkeypatch, rng, name
):
    taken_on: list[Task] = []
    take_on = Foreman.take_on
    most = 10**9
    left = most

    def noted(foreman: Foreman, tasks: Sequence[Task], driver: Any) -> Any:
        nonlocal left
        left = pressing.left
        taken_on.extend(tasks)
        return take_on(foreman, tasks, driver)

    def forget() -> None:
        for task in taken_on:
            assert task.future.cancel()
        taken_on.clear()
        gc.collect()
        wait_until(lambda: not executor._store.live_blocks(), SOON, "no blocks")

    go = tmp_path / "go"
    with ShmExecutor(1) as executor:
        blocker = executor.submit(_wait_for, str(go))
        monkeypatch.setattr(Foreman, "take_on", noted)
        try:
            for _ in range(2):  # the first time more is done than later
                with _PressLater(most) as pressing:
                    MAPS[name](executor, [np.full(20_000, float(i)) for i in range(4)])
                forget()
            until = (most - left) * 9 // 10  # afterwards whoever called it may have the results
            for moment in rng.integers(1, until, 40):
                # Anew, so that they are copied; and held, since what a finalizer raises is lost.
                arrays = [np.full(20_000, float(i)) for i in range(4)]
                with pytest.raises(KeyboardInterrupt), _PressLater(moment) as pressing:
                    MAPS[name](executor, arrays)
                assert all(task.future.cancelled() for task in taken_on), moment
                del arrays
                forget()
        finally:
            go.touch()
            monkeypatch.undo()
        blocker.result(SOON)
        assert executor.submit(abs, -1).result(SOON) == 1


def test_futures_that_failed_are_told_so_although_ctrl_c_came_just_then(monkeypatch):
    take_on, settle = Foreman.take_on, driver_module.settle

    def take_on_and_break(foreman: Foreman, tasks: Sequence[Task], ref: Any) -> Any:
        return take_on(foreman, tasks, ref) + foreman.break_pool("as if no worker could be started")

    def press_and_settle(failures: Any) -> None:
        if failures:
            press()
        settle(failures)

    with ShmExecutor(1) as executor:
        futures = [executor.submit(signal.pause) for _ in range(3)]
        monkeypatch.setattr(Foreman, "take_on", take_on_and_break)
        monkeypatch.setattr(driver_module, "settle", press_and_settle)
        with pytest.raises(KeyboardInterrupt):
            executor.submit(abs, 1)
        for future in futures:
            with pytest.raises(BrokenPoolError, match="as if no worker"):
                future.result(SOON)


def test_ctrl_c_is_heard_in_a_callback_of_a_future_that_fails(monkeypatch):
    take_on = Foreman.take_on
    called, gone_on = [], []

    def take_on_and_break(foreman: Foreman, tasks: Sequence[Task], ref: Any) -> Any:
        return take_on(foreman, tasks, ref) + foreman.break_pool("as if no worker could be started")

    def callback(future: Any) -> None:
        called.append(future)
        press()
        gone_on.append(future)

    with ShmExecutor(1) as executor:
        futures = [executor.submit(signal.pause) for _ in range(3)]
        futures[1].add_done_callback(callback)
        monkeypatch.setattr(Foreman, "take_on", take_on_and_break)
        with pytest.raises(KeyboardInterrupt):
            executor.submit(abs, 1)
        assert called == [futures[1]] and not gone_on
        for future in futures:
            assert isinstance(future.exception(SOON), BrokenPoolError)


def test_ctrl_c_is_heard_between_the_arrays_of_an_argument(monkeypatch):
    written = []
    write = ObjectStore._write

    def press_at_the_second(*args: Any) -> None:
        write(*args)
        written.append(args)
        if len(written) == 2:
            press()

    arrays = [np.ones(1 << 20) for _ in range(4)]
    with ShmExecutor(1) as executor:
        monkeypatch.setattr(ObjectStore, "_write", press_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            executor.submit(len, arrays)
        assert len(written) == 2
        written.clear()
        del arrays
        gc.collect()
        assert not executor._store.live_blocks()


def test_ctrl_c_after_the_last_array_of_an_object_leaves_no_block(monkeypatch):
    dump = ObjectStore._dump
    made = []

    def press_at_the_end(*args: Any) -> Any:
        payload = dump(*args)
        made.extend(payload.blocks)
        press()
        return payload

    store = ObjectStore()
    monkeypatch.setattr(ObjectStore, "_dump", press_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        put(np.ones(1 << 17), store=store)
    assert made and not store.live_blocks()


def test_ctrl_c_is_heard_between_the_arrays_that_are_looked_for(monkeypatch):
    looked = []
    find = ObjectStore._find

    def press_at_the_second(*args: Any) -> Any:
        found = find(*args)
        looked.append(found)
        if len(looked) == 2:
            press()
        return found

    arrays = [np.ones(1 << 17) for _ in range(4)]
    with ShmExecutor(1) as executor:
        assert executor.submit(len, arrays).result(SOON) == 4
        store = executor._store
        before = {key: hold.count for key, hold in store._holds.items()}
        monkeypatch.setattr(ObjectStore, "_find", press_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            executor.submit(len, arrays)
        assert len(looked) == 2 and looked[1] is not None
        assert {key: hold.count for key, hold in store._holds.items()} == before


@pytest.mark.parametrize("made", ["Task", "Function"])
def test_ctrl_c_between_what_is_pickled_and_who_has_it_lets_go_of_it(monkeypatch, made):
    def pressed(*_: object, **__: object) -> None:
        press()

    array = np.ones(1 << 17)
    with ShmExecutor(1) as executor:
        monkeypatch.setattr(executor_module, made, pressed)
        # Its frames hold the payload, which has blocks until it is told that nobody wants them.
        with pytest.raises(KeyboardInterrupt) as caught:
            if made == "Task":
                executor.submit(len, array)
            else:
                executor.submit(partial(np.add, array), 1)
        del array
        gc.collect()
        assert not executor._store.live_blocks()
        assert caught.tb is not None


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
