"""Progress bars: what they count, when they end, and that they leave no trace."""

from __future__ import annotations

import gc
import io
import itertools
import logging
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from executor_tasks import SOON, run_script
from support import wait_until

import shmpool
from shmpool.progress import Bar, WatchedResults, bar_options, total_of

tqdm = pytest.importorskip("tqdm")


class Screen(io.StringIO):
    """What a bar is drawn on."""

    @property
    def lines(self) -> list[str]:
        """What is to be seen of each line; the last has not ended, or is empty."""
        return [line.rpartition("\r")[2].strip() for line in self.getvalue().split("\n")]

    @property
    def ended(self) -> list[str]:
        """Each line's count and total, of lines that have ended."""
        return [line.partition(" [")[0].rpartition("| ")[2] for line in self.lines[:-1]]


@pytest.fixture
def screen() -> Screen:
    return Screen()


def make_bar(
    screen: Screen, number: int | None = None, /, *, open_ended: bool = False, **more: Any
) -> Bar:
    options = bar_options({"file": screen, "mininterval": 0, **more})
    assert options is not None
    return Bar(options, number, open_ended=open_ended)


def futures(number: int) -> list[Future[Any]]:
    made: list[Future[Any]] = [Future() for _ in range(number)]
    for future in made:
        future.set_running_or_notify_cancel()
    return made


# What users say.


@pytest.mark.parametrize(
    ("progress", "options"),
    [
        (None, None),
        (False, None),
        (True, {}),
        ("resizing", {"desc": "resizing"}),
        ({}, {}),
        ({"leave": False}, {"leave": False}),
    ],
)
def test_options(progress: Any, options: Any) -> None:
    assert bar_options(progress) == options


@pytest.mark.parametrize("progress", [1, 0, [], 2.5])
def test_what_is_no_option(progress: Any) -> None:
    with pytest.raises(TypeError, match="progress must be True, a description or a dict"):
        bar_options(progress)


def test_without_tqdm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert bar_options(False) is None
    with pytest.raises(ImportError, match=r"pip install 'shmpool\[progress\]'"):
        bar_options(True)


def test_what_tqdm_does_not_know_is_an_error(screen: Screen) -> None:
    with pytest.raises(KeyError, match="colr"):
        make_bar(screen, 3, colr="red")


class Unasked:
    def __len__(self) -> int:
        raise RuntimeError("this is dear")


@pytest.mark.parametrize(
    ("iterables", "total"),
    [
        ((), None),
        (([1, 2, 3],), 3),
        (([1, 2, 3], "ab"), 2),
        ((iter([1, 2]),), 2),
        ((itertools.count(), [1, 2]), 2),
        ((itertools.repeat(1), itertools.repeat(1, 4)), 4),
        (((i for i in "abc"),), None),
        ((Unasked(),), None),
        (([],), 0),
    ],
)
def test_totals(iterables: Any, total: int | None) -> None:
    assert total_of(iterables) == total


# What is counted.


def test_items_are_counted_when_they_are_finished_or_fail(screen: Screen) -> None:
    bar = make_bar(screen, 10)
    one, two, three = futures(3)
    for future, items in ((one, 4), (two, 4), (three, 2)):
        bar.watch(future, items)
    bar.no_more()
    assert "0/10" in screen.lines[-1]
    one.set_result(None)
    assert "4/10" in screen.lines[-1]
    two.set_exception(ValueError())
    assert "8/10" in screen.lines[-1]
    three.set_result(None)
    assert screen.ended == ["10/10"]


def test_what_is_cancelled_is_never_finished(screen: Screen) -> None:
    bar = make_bar(screen, 3)
    made: list[Future[Any]] = [Future() for _ in range(3)]
    for future in made:
        bar.watch(future)
    bar.no_more()
    made[0].cancel()
    for future in made[1:]:
        future.set_result(None)
    assert screen.ended == ["2/3"]


def test_a_future_that_ctrl_c_kept_from_being_watched_is_cancelled(screen: Screen) -> None:
    future: Future[None] = Future()

    def press(_args: tuple[Any, ...]) -> int:
        raise KeyboardInterrupt

    def submit(_args: tuple[Any, ...]) -> Future[None]:
        return future

    bar = make_bar(screen, 1)
    with pytest.raises(KeyboardInterrupt):
        bar.watching(submit, press)(())
    assert future.cancelled()
    bar.close()


def test_what_was_done_before_counts(screen: Screen) -> None:
    bar = make_bar(screen, 1)
    (future,) = futures(1)
    future.set_result(None)
    bar.watch(future)
    bar.no_more()
    assert screen.ended == ["1/1"]


def test_the_total_grows_with_what_comes(screen: Screen) -> None:
    bar = make_bar(screen, 0)
    made = futures(3)
    for future in made:
        bar.watch(future)
        future.set_result(None)
        assert screen.ended == [], "more may come"
    bar.no_more()
    assert screen.ended == ["3/3"]


def test_in_a_notebook_the_widget_has_the_total_as_well(screen: Screen) -> None:
    """It has a number of its own; what tqdm's has, without a notebook."""
    bar = make_bar(screen)
    first, *others = futures(4)
    bar.watch(first)
    number = types.SimpleNamespace(max=1)
    bar._shown.container = types.SimpleNamespace(children=[None, number, None])
    for future in others:
        bar.watch(future)
    for future in (first, *others):
        future.set_result(None)
    bar.no_more()
    assert number.max == 4


def test_what_the_program_writes_by_way_of_tqdm_stands_above_the_bar(screen: Screen) -> None:
    bar = make_bar(screen, 2)
    first, second = futures(2)
    bar.watch(first)
    bar.watch(second)
    first.set_result(None)
    before = screen.getvalue().count("1/2")
    assert before
    tqdm.tqdm.write("half of it", file=screen)
    assert "half of it" in screen.lines
    assert screen.getvalue().count("1/2") > before, "the bar is not drawn anew"
    second.set_result(None)
    bar.no_more()
    assert screen.ended[-1] == "2/2"


def test_a_total_that_was_too_large_is_corrected(screen: Screen) -> None:
    bar = make_bar(screen, 100)
    (future,) = futures(1)
    bar.watch(future)
    bar.no_more()
    future.set_result(None)
    assert screen.ended == ["1/1"]


def test_an_unknown_total_is_known_when_no_more_comes(screen: Screen) -> None:
    bar = make_bar(screen)
    one, two = futures(2)
    bar.watch(one)
    bar.watch(two)
    one.set_result(None)
    assert screen.lines[-1].startswith("1it")
    bar.no_more()
    two.set_result(None)
    assert screen.ended == ["2/2"]


def test_nothing_to_do(screen: Screen) -> None:
    make_bar(screen, 0).no_more()
    assert screen.ended == ["0it"]


def test_the_users_arguments_reach_tqdm(screen: Screen) -> None:
    bar = make_bar(screen, 2, desc="sieving", unit="prime", initial=5, total=7)
    for future in (made := futures(2)):
        bar.watch(future)
    for future in made:
        future.set_result(None)
    bar.no_more()
    assert screen.ended == ["7/7"]
    assert screen.lines[0].startswith("sieving: 100%") and "prime/s" in screen.lines[0]


def test_a_disabled_bar(screen: Screen) -> None:
    bar = make_bar(screen, 2, disable=True)
    (future,) = futures(1)
    bar.watch(future)
    future.set_result(None)
    bar.no_more()
    assert screen.getvalue() == ""


def test_many_threads(screen: Screen) -> None:
    number = 2000
    bar = make_bar(screen, number)
    made = futures(number)
    for future in made:
        bar.watch(future)
    bar.no_more()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda future: future.set_result(None), made))
    assert screen.ended == [f"{number}/{number}"]


# Open-ended bars: for submit().


def test_an_open_ended_bar_ends_when_all_is_done_and_goes_on_in_a_new_line(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shmpool.progress._LINGER", 0)
    bar = make_bar(screen, open_ended=True)
    assert screen.getvalue() == "", "there is nothing to show yet"
    one, two, three = futures(3)
    bar.watch(one)
    bar.watch(two)
    one.set_result(None)
    assert "1/2" in screen.lines[-1] and screen.ended == []
    two.set_result(None)
    assert screen.ended == ["2/2"]
    bar.watch(three)
    three.set_result(None)
    assert screen.ended == ["2/2", "3/3"]


def test_quick_tasks_do_not_begin_a_line_each(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shmpool.progress._LINGER", 1000)
    bar = make_bar(screen, 0, open_ended=True)
    for future in futures(5):
        bar.watch(future)
        future.set_result(None)
    assert screen.ended == [] and "5/5" in screen.lines[-1]
    bar.no_more()
    assert screen.ended == ["5/5"]


def test_what_is_done_is_seen_at_once_when_there_is_nothing_more_to_do(screen: Screen) -> None:
    bar = make_bar(screen, 0, open_ended=True, mininterval=1000)
    made = futures(5)
    for future in made:
        bar.watch(future)
    for future in made:
        assert "0/5" not in screen.lines[-1] and "5/5" not in screen.lines[-1]
        future.set_result(None)
    assert "5/5" in screen.lines[-1]


def test_when_no_more_comes_an_open_ended_bar_waits_for_the_rest(screen: Screen) -> None:
    bar = make_bar(screen, 0, open_ended=True)
    (future,) = futures(1)
    bar.watch(future)
    bar.no_more()
    assert screen.ended == []
    future.set_result(None)
    assert screen.ended == ["1/1"]


def test_an_open_ended_bar_waits_for_the_total_that_it_was_promised(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shmpool.progress._LINGER", 0)
    bar = make_bar(screen, 0, open_ended=True, total=2)
    assert "0/2" in screen.lines[-1]
    for future, ended in zip(futures(2), ([], ["2/2"]), strict=True):
        bar.watch(future)
        future.set_result(None)
        assert screen.ended == ended


def test_a_bar_that_is_dropped_ends_its_line(screen: Screen) -> None:
    bar = make_bar(screen, 0, open_ended=True, total=100)
    (future,) = futures(1)
    bar.watch(future)
    future.set_result(None)
    assert screen.ended == []
    del bar, future
    assert screen.ended == ["1/100"]


# Results.


def results_of(bar: Bar, made: list[Future[Any]]) -> WatchedResults[Any]:
    for future in made:
        bar.watch(future)
    bar.no_more()
    return WatchedResults((future.result(SOON) for future in made), bar)


def test_results_pass(screen: Screen) -> None:
    made = futures(3)
    results = results_of(make_bar(screen, 3), made)
    for number, future in enumerate(made):
        future.set_result(number)
    assert list(results) == [0, 1, 2]
    assert screen.ended == ["3/3"]


def test_the_last_result_does_not_come_before_the_bar_is_full(screen: Screen) -> None:
    """Who waits for a result may have it before the callbacks are called."""
    bar = make_bar(screen, 2)
    for future in futures(2):
        bar.watch(future)
    bar.no_more()
    assert list(WatchedResults(iter("ab"), bar)) == ["a", "b"]
    assert screen.ended == ["2/2"]


def test_an_exception_ends_the_bar(screen: Screen) -> None:
    made = futures(4)
    results = results_of(make_bar(screen, 4), made)
    made[0].set_result(0)
    made[1].set_exception(ZeroDivisionError())
    assert next(results) == 0
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert screen.ended == ["2/4"]
    made[2].set_result(2)
    assert screen.ended == ["2/4"], "it is over"
    with pytest.raises(StopIteration):
        next(results)


@pytest.mark.parametrize("how", ["dropped", "closed"])
def test_whoever_has_seen_enough_ends_the_bar(screen: Screen, how: str) -> None:
    made = futures(3)
    results = results_of(make_bar(screen, 3), made)
    made[0].set_result(0)
    for _ in results:
        break
    assert screen.ended == []
    if how == "closed":
        results.close()
        assert next(results, None) is None
    del results
    assert screen.ended == ["1/3"]
    made[1].set_result(1)
    assert screen.ended == ["1/3"]


def test_who_wants_only_the_tasks_sees_their_progress(screen: Screen) -> None:
    made = futures(2)
    results = results_of(make_bar(screen, 2), made)
    del results
    gc.collect()
    for future in made:
        assert screen.ended == []
        future.set_result(None)
    assert screen.ended == ["2/2"]


def test_to_drop_results_waits_for_no_lock(screen: Screen) -> None:
    """As finalizers run anywhere: another thread may be drawing, and wait for what this one has."""
    bar = make_bar(screen, 3)
    made = futures(3)
    results = results_of(bar, made)
    made[0].set_result(0)
    next(results)
    drawing, go_on = threading.Event(), threading.Event()

    def draw() -> None:
        with bar._lock:
            drawing.set()
            go_on.wait(SOON)

    thread = threading.Thread(target=draw)
    thread.start()
    assert drawing.wait(SOON)
    del results
    assert screen.ended == []
    go_on.set()
    thread.join()
    made[1].set_result(1)
    assert screen.ended == ["2/3"]


# Executors.


def square(number: int) -> int:
    return number * number


def test_an_executor(screen: Screen, start_method: str) -> None:
    bar = make_bar(screen, 20)
    with shmpool.ShmExecutor(2, mp_context=start_method) as executor:
        submit = bar.watching(executor.submit)
        made = [submit(square, number) for number in range(20)]
        bar.no_more()
        assert [future.result(SOON) for future in made] == [n * n for n in range(20)]
    assert screen.ended == ["20/20"]


def test_a_future_may_stand_for_many_items(screen: Screen) -> None:
    bar = make_bar(screen, 6)
    with ThreadPoolExecutor(2) as executor:
        submit = bar.watching(executor.submit, items_of=lambda fn, items: len(items))
        for items in ("abc", "de", "f"):
            submit(len, items)
        bar.no_more()
    assert screen.ended == ["6/6"]


# No trace.


class Broken(Screen):
    """A screen that raises once something was finished."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error: BaseException | None = error

    def write(self, text: str) -> int:
        if "1/" in text and self.error is not None:
            error, self.error = self.error, None
            raise error
        return super().write(text)


def test_a_bar_that_cannot_be_drawn_fails_nothing(caplog: pytest.LogCaptureFixture) -> None:
    screen = Broken(RuntimeError("no colours left"))
    made = futures(3)
    results = results_of(make_bar(screen, 3), made)
    with caplog.at_level(logging.WARNING, "shmpool"):
        for number, future in enumerate(made):
            future.set_result(number)
        assert list(results) == [0, 1, 2]
    (record,) = caplog.records
    assert record.name == "shmpool" and "no colours left" in str(record.exc_info)


def test_an_interrupt_while_drawing_does_not_keep_tqdms_lock() -> None:
    screen = Broken(KeyboardInterrupt())
    bar = make_bar(screen, 2)
    one, two = futures(2)
    bar.watch(one)
    bar.watch(two)
    with pytest.raises(KeyboardInterrupt):
        bar._advance(1)
    thread = threading.Thread(target=two.set_result, args=(None,), daemon=True)
    thread.start()
    thread.join(SOON)
    assert not thread.is_alive()
    bar.close()
    assert screen.ended == ["2/2"]


@pytest.fixture
def drawing(screen: Screen) -> Iterator[Callable[[], None]]:
    """A bar that another thread draws all the time."""
    bar = make_bar(screen)
    stop = threading.Event()
    (future,) = futures(1)
    future.set_result(None)

    def draw() -> None:
        while not stop.is_set():
            bar.watch(future)
            screen.truncate(0)

    thread = threading.Thread(target=draw)
    thread.start()
    yield bar.close
    stop.set()
    thread.join()
    bar.close()


def test_a_child_that_is_forked_while_a_bar_is_drawn(drawing: Callable[[], None]) -> None:
    lock = tqdm.std.TqdmDefaultWriteLock.th_lock
    for _ in range(30):
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)  # a child that is stuck ends all the same
            drawing()
            os._exit(0 if lock.acquire(timeout=30) else 1)
        assert exit_code(pid) == 0


def exit_code(pid: int) -> int:
    ended: list[int] = []

    def has_ended() -> bool:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended.append(os.waitstatus_to_exitcode(status))
        return bool(ended)

    wait_until(has_ended, 60, "a child")
    return ended[0]


def test_a_child_does_not_draw_its_parents_bars(screen: Screen, tmp_path: Path) -> None:
    with open(tmp_path / "screen", "w+", encoding="utf-8") as file:
        made = futures(2)
        options = bar_options({"file": file, "mininterval": 0})
        assert options is not None
        results = results_of(Bar(options, 2), made)
        made[0].set_result(0)
        next(results)
        file.flush()
        before = (tmp_path / "screen").read_text()
        pid = os.fork()
        if pid == 0:
            del results, made
            gc.collect()
            file.flush()
            os._exit(0)
        assert exit_code(pid) == 0
        assert (tmp_path / "screen").read_text() == before
        results.close()


def test_no_thread_no_semaphore_no_start_method(tmp_path: Path) -> None:
    out = run_script(
        tmp_path,
        """
        import io, multiprocessing, threading
        import shmpool, tqdm.std
        from shmpool.progress import Bar, bar_options

        if __name__ == "__main__":
            screen = io.StringIO()
            with shmpool.ShmExecutor(2, mp_context="fork") as executor:
                bar = Bar(bar_options({"file": screen}), 0)
                submit = bar.watching(executor.submit)
                for number in range(10):
                    submit(abs, number)
                bar.no_more()
            assert "10/10" in screen.getvalue()
            print([thread.name for thread in threading.enumerate()])
            print(hasattr(tqdm.std.TqdmDefaultWriteLock, "mp_lock"))
            multiprocessing.set_start_method("spawn")  # a semaphore would have settled it

            # The program's own bars share a lock with ours.
            own = tqdm.tqdm(total=1, file=screen)
            assert Bar(bar_options({"file": screen}), 1)._shown._lock is own._lock
        """,
    )
    assert out.splitlines() == ["['MainThread']", "False"]


def test_a_bar_that_is_there_until_the_program_ends(tmp_path: Path) -> None:
    run_script(
        tmp_path,
        """
        import io, shmpool

        if __name__ == "__main__":
            with shmpool.ShmExecutor(1, mp_context="fork") as executor:
                view = executor.options(progress={"file": io.StringIO(), "total": 2})
                view.submit(abs, 1).result()
        """,
    )
