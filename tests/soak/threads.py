"""Scenario ``threads``: sixteen threads do everything that there is with one executor, until one of them ends it.

And a program that is left in the middle of all that.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, CancelledError, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from support import TIMEUNIT, Holdings

from shmpool import BrokenPoolError, ObjectStore, ShmExecutor

from . import tasks
from .kill import METHODS
from .leftovers import check_nothing_is_left, note_first_and_last, take_stock
from .load import Circumstances, Load, Sent, check_sums
from .programs import Program
from .report import Report
from .tasks import Numbers
from .watchdog import PATIENCE, Hang, Watchdog, state_of

THREADS = 16
ENDINGS = ("shutdown", "cancel", "callback", "threads", "kill", "terminate", "drop")


class Member(Load):
    """A load that meddles with those of other threads, and leaves callbacks and garbage that do, too."""

    def __init__(self, commons: deque[Sent], *given: object, **options: object) -> None:
        super().__init__(*given, **options)  # type: ignore[arg-type]
        self._commons = commons  # some tasks of all members

    def step(self) -> None:
        roll = self.rng.random()
        if self._circumstances.any_may_end and self.rng.random() < 0.1:
            self.end_hanging()  # nobody else would
            self._shut_down(wait=self.rng.random() < 0.5)
        elif roll < 0.80:
            super().step()
        elif roll < 0.86:
            self._meddle()
        elif roll < 0.92:
            self._call_back()
        elif roll < 0.96:
            self._leave_garbage()
        else:
            self._wait()
        if self.under_way and self.rng.random() < 0.2:
            self._commons.append(self.rng.choice(self.under_way))
            while len(self._commons) > 50:
                with contextlib.suppress(IndexError):
                    self._commons.popleft()

    def _shut_down(self, *, wait: bool) -> None:
        """Shut the executor down, if this is a time at which anybody may."""
        if self._circumstances.any_may_end:
            assert self.executor is not None
            with contextlib.suppress(SystemExit):  # of a callback of a task that is cancelled
                self.executor.shutdown(wait, cancel_futures=self._circumstances.ending)

    def _meddle(self) -> None:
        """Cancel somebody's task, or wait for it."""
        try:
            sent = self.rng.choice(self._commons)
        except IndexError:
            return
        if self.rng.random() < 0.5:
            self.cancel(sent)
        else:
            with contextlib.suppress(TimeoutError, CancelledError):
                sent.future.exception(self.rng.random() * 0.02)

    def _deed(self) -> Callable[[], object]:
        """What a callback or a finalizer does."""
        executor, rng = self.executor, self.rng
        assert executor is not None

        def raise_an_error() -> None:
            raise ValueError("on purpose")

        return rng.choice(
            (
                raise_an_error,
                lambda: sys.exit("on purpose"),
                lambda: time.sleep(0.01),
                gc.collect,
                executor.stats,
                lambda: executor.submit(tasks.minus, 1),
                lambda: executor.put(Numbers(1, 20_000).array()),
                lambda: executor.map(tasks.minus, range(10)),
                self._meddle,
                lambda: self._shut_down(wait=False),
            )
        )

    def _call_back(self) -> None:
        deed = self._deed()
        if not self.under_way:
            return
        with contextlib.suppress(SystemExit):  # where the task is done already
            self.rng.choice(self.under_way).future.add_done_callback(lambda _: deed())

    def _leave_garbage(self) -> None:
        assert self.executor is not None
        garbage = Garbage(self._deed())
        if self.rng.random() < 0.5:
            self.end_hanging()  # the results may be behind it
            results = garbage.results = self.executor.map(tasks.minus, range(50))
            with contextlib.suppress(CancelledError, BrokenProcessPool):  # it is just being ended
                next(results)

    def _wait(self) -> None:
        futures = self.futures()
        if self.rng.random() < 0.5:
            wait(futures, 0.02, self.rng.choice((ALL_COMPLETED, FIRST_COMPLETED)))
        else:
            with contextlib.suppress(TimeoutError):
                for _ in as_completed(futures, 0.02):
                    self._watchdog.beat()


class Garbage:
    """Found by the collector at some time, in some thread, at some line."""

    def __init__(self, deed: Callable[[], object]) -> None:
        self.itself = self
        self._deed = deed
        self.results: Iterator[int] | None = None

    def __del__(self) -> None:
        # The executor may have ended, or be interrupted just now.
        with contextlib.suppress(RuntimeError, ValueError, SystemExit):
            self._deed()


def run(*, seed: int, seconds: float, rounds: int = 10**9, fatal: bool = False) -> Report:
    """For so many seconds, or rounds.  Each round has an executor of its own."""
    report = Report("threads", seed)
    total: Counter[str] = Counter()
    temporary = Path(tempfile.gettempdir())
    before = Holdings.now(temporary)
    first = {}
    begin = time.monotonic()
    number = total["hangs"] = 0
    with contextlib.ExitStack() as stack:
        stack.callback(be_silent())
        while number < rounds and time.monotonic() - begin < seconds and not report.violations:
            rng = random.Random(f"{seed} threads {number}")
            method = rng.choice(METHODS) if rng.random() < 0.3 else "fork"
            ending = rng.choice(ENDINGS)
            collect = rng.choice((None, None, 1, 5, 50))
            what = f"round {number}: {method}, {ending}, gc threshold {collect}"
            with _collecting(collect):
                try:
                    _round(what, method, ending, rng, report, total, fatal)
                except Hang as hang:
                    total["hangs"] += 1
                    report.violated(str(hang))
            total[f"rounds ended by {ending}"] += 1
            total[f"rounds with a gc threshold of {collect or 'as usual'}"] += 1
            check_nothing_is_left(what, before, temporary, report)
            if report.violations:
                report.violated(f"that was in {what}")
            first = first or take_stock(temporary)
            number += 1
    total["rounds"] = number
    check_sums(total, report)
    report.figures = {name: total[name] for name in sorted(total)}
    note_first_and_last(first, temporary, report)
    report.figures["seconds"] = round(time.monotonic() - begin, 1)
    return report


def _round(
    what: str,
    method: str,
    ending: str,
    rng: random.Random,
    report: Report,
    total: Counter[str],
    fatal: bool,
) -> None:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        store = ObjectStore()
        numbers = Numbers(7, 20_000)
        initargs = (str(folder), 0.0, numbers.array(), numbers)
        executor = ShmExecutor(rng.randint(1, 3), method, tasks.prepare, initargs, store=store)
        circumstances = Circumstances()
        driver, leave = executor._driver, threading.Event()
        watchdog = stack.enter_context(
            Watchdog(folder, fatal=fatal, about=lambda: f"{what}\n{state_of(driver)}")
        )
        members = make_members(executor, store, rng, report, circumstances, watchdog, THREADS)
        threads = [
            threading.Thread(target=live, args=(member, report, leave)) for member in members
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.1 + rng.random())
        with contextlib.suppress(SystemExit):  # of a callback of a task that is cancelled
            _end(ending, executor, leave, circumstances, rng.random())
        del executor
        for thread in threads:
            thread.join()
        watchdog.check()
        for member in members:
            total.update(member.tally)
        del members, member, threads, thread
        gc.collect()
        if driver._lifetime.thread is not None:
            driver._lifetime.thread.join()
        if driver._foreman.table.tasks:
            report.violated(f"the driver has forgotten {len(driver._foreman.table.tasks)} tasks")
        store.verify()


def make_members(
    executor: ShmExecutor,
    store: ObjectStore,
    rng: random.Random,
    report: Report,
    circumstances: Circumstances,
    watchdog: Watchdog,
    number: int,
) -> list[Member]:
    commons: deque[Sent] = deque()
    return [
        Member(
            commons, executor, store, random.Random(rng.random()), report, circumstances, watchdog,
            limit=6,
        )
        for _ in range(number)
    ]  # fmt: skip


def live(member: Member, report: Report, leave: threading.Event) -> None:
    """What a thread does: as long as it can, then it waits for what it has begun."""
    try:
        try:
            while not leave.is_set():
                member.step()
        except RuntimeError as error:
            if not (isinstance(error, BrokenPoolError) or "cannot schedule new" in str(error)):
                raise
        member.end_hanging()
        if leave.is_set():
            member.executor = None
        member.settle_all()
        member.held.clear()
    except BaseException:
        report.violated(traceback.format_exc())


def _end(
    ending: str,
    executor: ShmExecutor,
    leave: threading.Event,
    circumstances: Circumstances,
    roll: float,
) -> None:
    """End an executor, in one of the ways that there are."""
    circumstances.ending = ending in ("cancel", "kill", "terminate") or (
        ending == "threads" and roll < 0.5
    )
    if ending == "shutdown":
        executor.shutdown(wait=roll < 0.5)
    elif ending == "cancel":
        executor.shutdown(wait=roll < 0.5, cancel_futures=True)
    elif ending == "callback":
        future = executor.submit(tasks.minus, 1)
        future.add_done_callback(lambda _: executor.shutdown(wait=roll < 0.5))
    elif ending == "threads":
        circumstances.any_may_end = True
    elif ending == "kill":
        executor.kill_workers()
    elif ending == "terminate":
        executor.terminate_workers()
    else:
        leave.set()


@contextlib.contextmanager
def _collecting(threshold: int | None) -> Iterator[None]:
    """Garbage is collected that often."""
    if threshold is None:
        yield
        return
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(threshold)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def leave_programs(
    *, seed: int, seconds: float, times: int = 10**9, methods: tuple[str, ...] = METHODS
) -> Report:
    """Programs that are left while their threads use an executor, one after the other."""
    from .leaving import EXIT_CODES

    report = Report("threads, at exit", seed)
    total: Counter[str] = Counter()
    begin = time.monotonic()
    number = 0
    while number < times and time.monotonic() - begin < seconds:
        rng = random.Random(f"{seed} leaving {number}")
        settings = {
            "seed": rng.randrange(1 << 30),
            "way": rng.choice(tuple(EXIT_CODES)),
            "daemons": rng.random() < 0.5,
            "after": rng.choice((0.0, 0.05, 0.5)) * rng.random(),
            "method": rng.choice(methods) if rng.random() < 0.3 else "fork",
        }
        with Program("leaving", settings) as program:
            said, _ = program.process.communicate(timeout=2 * PATIENCE)
            _, left = program.wait_until_gone(10 * TIMEUNIT, but=set())
            code, errors, files = program.process.returncode, program.errors(), program.files_left()
        wanted = EXIT_CODES[str(settings["way"])]
        clean = errors.count("Traceback") == (settings["way"] == "exception")
        if said or left or files or code != wanted or not clean:
            report.violated(
                f"{settings}: exit code {code}, left {left} {files}\n{said}{errors:.3000}"
            )
        total[f"left by {settings['way']}"] += 1
        number += 1
    report.figures = {name: total[name] for name in sorted(total)}
    report.figures["seconds"] = round(time.monotonic() - begin, 1)
    return report


class _OnPurpose(logging.Filter):
    """Leaves out what callbacks raise on purpose, or since the executor has ended."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, RuntimeError) and str(error) != "on purpose"


def be_silent() -> Callable[[], None]:
    """Leave it out of what concurrent.futures and shmpool log; returns what undoes that."""
    loggers = [logging.getLogger(name) for name in ("concurrent.futures", "shmpool")]
    quiet = _OnPurpose()
    for logger in loggers:
        logger.addFilter(quiet)

    def undo() -> None:
        for logger in loggers:
            logger.removeFilter(quiet)

    return undo
