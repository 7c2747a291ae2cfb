"""Load: tasks of every kind, random, each with what must come of it.

A :class:`Load` submits, waits, cancels, holds results, hands them on, writes into them, and settles each task exactly
once: it gave the right result, failed for a reason that there was, or was cancelled by somebody.  Everything else is
a violation.  The array that a task is given may be fresh, a result that is held, a part of one, or a ref.
"""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass, field
from typing import Any

from support import TIMEUNIT

import shmpool
from shmpool import (
    BrokenPoolError,
    ObjectRef,
    ObjectStore,
    ShmExecutor,
    TaskTimeoutError,
    WorkerDiedError,
)
from shmpool.errors import describe_exit

from . import tasks
from .report import Report
from .tasks import Numbers
from .watchdog import PATIENCE, Hang, Watchdog

#: What a task's result has in it: arrays or refs, and the numbers that must be in each.
Found = Iterable[tuple[Any, Numbers]]

#: Numbers of items (8 bytes each): inline, in a shared block, in a block of its own.
SIZES = (10, 5_000, 12_000, 60_000, 200_000)


@dataclass
class Sent:
    """A task that was submitted."""

    future: Future[Any]
    kind: str
    find: Callable[[Any], Found]
    timed: bool = False
    hangs: bool = False
    fails: bool = False
    cancelled: bool = False  # somebody has asked for it


@dataclass
class Circumstances:
    """Why tasks may fail, for all loads on one executor.

    Attributes
    ----------
    killed : set of int
        Workers that were sent SIGKILL on purpose, by pid.
    exitcodes : set of int
        What these may be said to have ended with.
    ending : bool
        The pool is being ended with its workers: what is under way may fail.
    any_may_end : bool
        Whoever uses the executor may shut it down.
    blamed : set of int
        Workers whose death has failed a task.  Each may fail one.
    """

    killed: set[int] = field(default_factory=set)
    exitcodes: set[int] = field(default_factory=lambda: {-signal.SIGKILL})
    ending: bool = False
    any_may_end: bool = False
    blamed: set[int] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def objection(self, error: WorkerDiedError) -> str | None:
        """What is wrong with the death of a worker as the reason for a task's failure."""
        with self.lock:
            again = error.pid in self.blamed
            self.blamed.add(error.pid)
        if again:
            return "the death of one worker failed two tasks"
        if self.ending:
            return None
        if error.pid not in self.killed:
            return f"a task failed with a worker that nobody had killed: {error!r}"
        if error.exitcode not in self.exitcodes or error.problem is not None:
            return f"a worker that was killed is said to have ended otherwise: {error!r}"
        return None


def names_its_cause(error: BaseException, kind: str) -> bool:
    """Does the sentence of an error say what happened, to which task, in which worker?"""
    if isinstance(error, CancelledError):
        return True  # the type says it all; the standard library's has no text
    if isinstance(error, WorkerDiedError):
        how = f"died {describe_exit(error.exitcode)}" if error.problem is None else error.problem
        needed = [kind, f"worker {error.pid}", how]
    elif isinstance(error, TaskTimeoutError):
        needed = [kind, f"timeout of {error.timeout:g} s"]
    else:
        needed = ["workers of this pool were terminated"]
    return all(words in str(error) for words in needed)


class Load:
    """Uses an executor at random, from one thread.

    Parameters
    ----------
    executor : ShmExecutor
    store : ObjectStore
        The executor's.
    rng : random.Random
    report : Report
    circumstances : Circumstances
    watchdog : Watchdog
    dear : bool
        Workers are slow to start: few tasks that cost one.
    limit : int
        So many tasks are under way at the most, bursts of tiny ones aside.
    """

    def __init__(
        self,
        executor: ShmExecutor,
        store: ObjectStore,
        rng: random.Random,
        report: Report,
        circumstances: Circumstances,
        watchdog: Watchdog,
        *,
        dear: bool = False,
        limit: int = 24,
    ) -> None:
        self.executor: ShmExecutor | None = executor
        self.rng = rng
        self.tally: Counter[str] = Counter()
        self.under_way: list[Sent] = []
        self.held: list[tuple[Any, Numbers]] = []
        self._store = store
        self._report = report
        self._circumstances = circumstances
        self._watchdog = watchdog
        self._limit = limit
        self._longest = (
            0.2 if dear else 0.02
        )  # seconds of a slow task: workers are to be busy when they are killed
        self._shared = shmpool.zeros(50_000, store=store)
        self._kinds: dict[Callable[[], Iterator[Sent]], int] = {
            self._plain: 8, self._overwritten: 4, self._forwarded: 4, self._piece: 4, self._two: 4,
            self._kept: 3, self._box: 4, self._put: 3, self._write: 3, self._text: 2, self._burst: 2,
            self._slow: 3, self._failing: 2, self._hanging: 1,
        }  # fmt: skip
        if dear:
            self._kinds = {kind: 4 * weight for kind, weight in self._kinds.items()}
            self._kinds[self._hanging] = 1

    # ---------------------------------------------------------------- what it does

    def step(self) -> None:
        """Do something.

        Raises
        ------
        RuntimeError
            The executor takes no more tasks.
        """
        roll = self.rng.random()
        if any(sent.hangs for sent in self.under_way):
            self.end_hanging()  # before this thread waits for anything else: it may be behind that
        elif len(self.under_way) >= self._limit or (self.under_way and roll < 0.40):
            self.settle_one()
        elif roll < 0.80:
            (kind,) = self.rng.choices(list(self._kinds), list(self._kinds.values()))
            for sent in kind():
                self.under_way.append(sent)
                self.tally["submitted"] += 1
        elif roll < 0.86:
            self.cancel_one()
        elif roll < 0.92:
            self.scribble()
        elif roll < 0.95:
            self.map()
        elif roll < 0.98:
            del self.held[: self.rng.randint(1, 4)]
        elif self.under_way:
            wait(self.futures(), self.rng.random() * 0.01, FIRST_COMPLETED)

    def futures(self) -> list[Future[Any]]:
        return [sent.future for sent in self.under_way]

    def settle_one(self) -> None:
        """Wait for one of the tasks under way, or take one that is done."""
        done = [sent for sent in self.under_way if sent.future.done()]
        sent = self.rng.choice(done if done and self.rng.random() < 0.7 else self.under_way)
        self.under_way.remove(sent)
        self.settle(sent)

    def settle_all(self) -> None:
        while self.under_way:
            self.settle(self.under_way.pop(0))

    def end_hanging(self) -> None:
        """Nobody else would."""
        for sent in [sent for sent in self.under_way if sent.hangs]:
            self.under_way.remove(sent)
            self.settle(sent)

    def cancel_one(self) -> None:
        if not self.under_way:
            return
        sent = self.rng.choice(self.under_way)
        if self.rng.random() < 0.8:
            self.cancel(sent)
        else:
            self._cancel_running(sent)

    def cancel(self, sent: Sent) -> None:
        sent.cancelled = True
        with contextlib.suppress(SystemExit):  # of a callback
            sent.future.cancel()

    def _cancel_running(self, sent: Sent) -> None:
        assert self.executor is not None
        sent.cancelled = True
        with contextlib.suppress(SystemExit):
            self.executor.cancel_running(sent.future)

    def scribble(self) -> None:
        """Write into a result that is held: nobody else may see it."""
        if not self.held:
            return
        at = self.rng.randrange(len(self.held))
        array, numbers = self.held[at]
        if array.flags.writeable:
            array += 3
            self.held[at] = array, numbers.plus(3)

    def map(self) -> None:
        """Map, to the end or not."""
        array, numbers = self._operand()
        executor = self._options()
        count = self.rng.randint(1, 30)
        how = {"chunksize": self.rng.choice((1, 1, 4)), "buffersize": self.rng.choice((None, 5))}
        results = executor.map(tasks.shifted, [array] * count, range(count), **how)
        if self.rng.random() < 0.3:
            del array
        self.tally["maps"] += 1
        until = count if self.rng.random() < 0.7 else self.rng.randint(0, count)
        try:
            for by in range(until):
                self._check("map", next(results), numbers.plus(by))
                self._watchdog.beat()
        except (WorkerDiedError, TaskTimeoutError, BrokenPoolError, CancelledError) as error:
            self._judge(
                "shifted", error, timed=executor._limits.timeout is not None, cancelled=False
            )
            self.tally["maps that failed"] += 1
        finally:
            del results  # gives up the rest

    # ---------------------------------------------------------------- kinds of tasks

    def _operand(self) -> tuple[Any, Numbers]:
        """What a task is given."""
        rng, roll = self.rng, self.rng.random()
        if roll < 0.5 and self.held:
            array, numbers = rng.choice(self.held)
            if roll < 0.2:
                start = rng.randrange(numbers.count)
                stop = rng.randint(start + 1, numbers.count)
                return array[start:stop], numbers.between(start, stop)
            return array, numbers
        numbers = Numbers(rng.randrange(1000), rng.choice(SIZES))
        if roll > 0.8:
            assert self.executor is not None
            return self.executor.put(numbers.array()), numbers
        return numbers.array(), numbers

    def _options(self, **given: Any) -> ShmExecutor:
        assert self.executor is not None
        if self.rng.random() < 0.3:
            given.setdefault("retries", self.rng.randint(1, 3))
        if self.rng.random() < 0.2:
            given.setdefault("timeout", 20 * TIMEUNIT)  # never comes, unless a worker stays stopped
        if self.rng.random() < 0.2:
            given.setdefault("mmap_mode", "r")
        return self.executor.options(**given) if given else self.executor

    def _sent(
        self,
        executor: ShmExecutor,
        find: Callable[[Any], Found],
        fn: Callable[..., Any],
        *args: Any,
        **how: Any,
    ) -> Sent:
        future = executor.submit(fn, *args)
        return Sent(future, fn.__name__, find, executor._limits.timeout is not None, **how)

    def _plain(self) -> Iterator[Sent]:
        array, numbers = self._operand()
        by = self.rng.randrange(10)
        yield self._sent(
            self._options(), lambda got: [(got, numbers.plus(by))], tasks.shifted, array, by
        )

    def _overwritten(self) -> Iterator[Sent]:
        array, numbers = self._operand()
        yield self._sent(
            self._options(mmap_mode="c"), lambda got: [(got, numbers.plus(7))],
            tasks.overwritten, array, 7,
        )  # fmt: skip
        if not isinstance(array, ObjectRef):  # what the task did is not seen here
            self._check("an argument that was overwritten", array, numbers)

    def _forwarded(self) -> Iterator[Sent]:
        array, numbers = self._operand()
        yield self._sent(self._options(), lambda got: [(got, numbers)], tasks.same, array)

    def _piece(self) -> Iterator[Sent]:
        array, numbers = self._operand()
        start = self.rng.randrange(numbers.count)
        stop = self.rng.randint(start + 1, numbers.count)
        part = numbers.between(start, stop)
        yield self._sent(
            self._options(), lambda got: [(got, part)], tasks.piece, array, start, stop
        )

    def _two(self) -> Iterator[Sent]:
        one, its = self._operand()
        other, others = self._operand()

        def find(got: Any) -> Found:
            half = its.between(0, its.count // 2)
            return zip(got, (its, others.plus(2), half), strict=True)

        yield self._sent(self._options(), find, tasks.two, one, other, 2)

    def _kept(self) -> Iterator[Sent]:
        array, numbers = self._operand()

        def find(got: Any) -> Found:
            assert got == (numbers.first, numbers.count), (got, numbers)
            return ()

        yield self._sent(self._options(), find, tasks.kept, array)
        if self.rng.random() < 0.3:
            yield self._sent(self._options(), lambda got: (), tasks.dropped)

    def _box(self) -> Iterator[Sent]:
        assert self.executor is not None
        numbers = Numbers(self.rng.randrange(1000), self.rng.choice(SIZES))
        box = {"ref": self.executor.put(numbers.array())}
        yield self._sent(
            self._options(), lambda got: zip(got, (numbers, numbers.plus(1)), strict=True),
            tasks.from_box, box, 1,
        )  # fmt: skip

    def _put(self) -> Iterator[Sent]:
        numbers = Numbers(self.rng.randrange(1000), self.rng.choice(SIZES))
        yield self._sent(self._options(), lambda got: [(got, numbers)], tasks.put, numbers)

    def _write(self) -> Iterator[Sent]:
        start = self.rng.randrange(len(self._shared))
        stop = self.rng.randint(start + 1, len(self._shared))
        shared = self._shared

        def find(got: Any) -> Found:
            assert got == (start, stop)
            return [(shared[start:stop], Numbers(start, stop - start))]

        yield self._sent(self._options(), find, tasks.write, shared, start, stop)

    def _text(self) -> Iterator[Sent]:
        number = self.rng.choice((50_000, 500_000))
        fn = self.rng.choice((tasks.text, tasks.items))

        def find(got: Any) -> Found:
            assert got == fn(number), f"{fn.__name__} went wrong"
            return ()

        yield self._sent(self._options(), find, fn, number)

    def _burst(self) -> Iterator[Sent]:
        executor = self._options()
        for number in range(self.rng.randint(20, 100)):
            yield self._sent(executor, _is(-number), tasks.minus, number)

    def _slow(self) -> Iterator[Sent]:
        array, numbers = self._operand()
        seconds = self.rng.random() * self._longest
        yield self._sent(self._options(), lambda got: [(got, numbers)], tasks.slow, array, seconds)

    def _failing(self) -> Iterator[Sent]:
        array, numbers = self._operand()
        find: Callable[[Any], Found] = lambda error: [(error.array, numbers)]  # noqa: E731
        yield self._sent(self._options(), find, tasks.failing, array, fails=True)

    def _hanging(self) -> Iterator[Sent]:
        array, _ = self._operand()
        limit = {"timeout": self.rng.choice((0.02, 0.1))} if self.rng.random() < 0.7 else {}
        sent = self._sent(self._options(**limit), lambda got: (), tasks.hanging, array)
        sent.hangs = not limit
        yield sent

    # ---------------------------------------------------------------- what came of it

    def settle(self, sent: Sent) -> None:
        """Wait for a task, and look at what came of it."""
        if sent.hangs and self.executor is not None:
            self._cancel_running(sent)
        try:
            error = sent.future.exception(2 * PATIENCE)
        except CancelledError as cancelled:
            error = cancelled
        except TimeoutError:
            raise Hang(f"a future of {sent.kind} is not resolved: {sent.future!r}") from None
        self._watchdog.beat()
        if error is None and not sent.fails:
            self.tally["results"] += 1
            self._look_at(sent, sent.future.result())
        elif isinstance(error, tasks.Expected) and sent.fails:
            self.tally["exceptions of tasks"] += 1
            self._look_at(sent, error)
        elif error is None:
            self._report.violated(f"{sent.kind} gave a result, although it raises")
        else:
            why = self._judge(sent.kind, error, timed=sent.timed, cancelled=sent.cancelled)
            self.tally[why] += 1

    def _judge(self, kind: str, error: BaseException, *, timed: bool, cancelled: bool) -> str:
        """What kind of failure is it, and was there a reason for it?"""
        problem = None
        if isinstance(error, CancelledError):
            why = "cancelled"
            if not cancelled and not self._circumstances.ending:
                problem = "a task was cancelled that nobody had cancelled"
        elif isinstance(error, WorkerDiedError):
            why = "lost with their worker"
            problem = self._circumstances.objection(error)
        elif isinstance(error, TaskTimeoutError) and timed:
            why = "timed out"
        elif isinstance(error, BrokenPoolError) and self._circumstances.ending:
            why = "lost with the pool"
        else:
            why = "other errors"
            problem = "".join(traceback.format_exception(error))
        if not problem and not names_its_cause(error, kind):
            problem = f"this error does not name its cause: {error!r}"
        if problem:
            self._report.violated(f"{kind}: {problem}")
        return why

    def _look_at(self, sent: Sent, result: Any) -> None:
        try:
            for array, numbers in sent.find(result):
                got = array.get("c") if isinstance(array, ObjectRef) else array
                self._check(sent.kind, got, numbers)
                if numbers.count and self.rng.random() < 0.5 and sent.kind != "write":
                    self.held.append((got, numbers))
        except AssertionError as error:
            self._report.violated(f"{sent.kind} gave a wrong result: {error!r:.300}")
        if len(self.held) > 16:
            del self.held[: self.rng.randint(1, 10)]

    def _check(self, what: str, array: Any, numbers: Numbers) -> None:
        wrong = numbers.wrong(array)
        if wrong:
            self._report.violated(f"{what}: {wrong}")


def _is(wanted: Any) -> Callable[[Any], Found]:
    def find(got: Any) -> Found:
        assert got == wanted, (got, wanted)
        return ()

    return find


#: What may become of a task that neither gave a result nor was cancelled.
ERRORS = (
    "exceptions of tasks",
    "lost with their worker",
    "lost with the pool",
    "timed out",
    "other errors",
)


def check_sums(total: Counter[str], report: Report) -> None:
    """Each task must have ended in one way."""
    total["errors"] = sum(total[name] for name in ERRORS)
    ended = total["results"] + total["errors"] + total["cancelled"]
    if total["submitted"] != ended:
        report.violated(f"{total['submitted']} tasks were submitted, and {ended} have ended")
