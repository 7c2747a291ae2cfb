"""What a bad object does to a pool: crash, exit or raise, pickled or unpickled, as argument or as result.

The matrix is CPython's (``test_deadlock.py`` of its ``test_concurrent_futures``); what is promised here is
more. Exactly the future of the bad task fails; the tasks before and behind it, which ride in the same
messages to the same worker, give their results; and the pool works afterwards. Arguments are unpickled and
results pickled in the worker: any deed is tried there. Arguments are pickled and results unpickled in this
process: a crash there is the end of the program in any library, so only exceptions are tried.
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import resource
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pytest
from support import START_METHODS, TIMEUNIT

from shmpool import SerializationError, ShmExecutor, WorkerDiedError

#: Large enough to go through the store.
LARGE = np.arange(1 << 18, dtype=np.float64)


# The deeds. They must be importable by name: pickles refer to them.


class DeedError(Exception):
    """What `raise_error` raises."""


def raise_error() -> NoReturn:
    raise DeedError("on purpose")


def exit_by_exception() -> NoReturn:
    sys.exit(3)


def exit_at_once() -> NoReturn:
    os._exit(3)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def crash() -> None:
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler._sigsegv()


#: Deeds that end the process, and the exit code it then has.
DEADLY = {be_killed: -signal.SIGKILL, crash: -signal.SIGSEGV, exit_at_once: 3}
#: Deeds that raise, and what.
RAISING = {raise_error: DeedError, exit_by_exception: SystemExit}


# The moments: what to submit so that the deed is done then.


@dataclass
class Bad:
    """Does its deed while it is pickled, or while it is unpickled."""

    deed: Callable[[], object]
    when: str

    def __reduce__(self) -> tuple[Any, ...]:
        if self.when == "pickled":
            self.deed()
        return self.deed, ()


def take(*args: Any) -> None:
    """A task that gets as far as this when its arguments could be unpickled."""


def give(deed: Callable[[], object], when: str, *others: Any) -> tuple[Any, ...]:
    return Bad(deed, when), *others


def do(deed: Callable[[], object], *others: Any) -> None:
    deed()


MOMENTS: dict[str, Callable[..., Future[Any]]] = {
    "argument pickled": lambda submit, deed, *more: submit(take, Bad(deed, "pickled"), *more),
    "argument unpickled": lambda submit, deed, *more: submit(take, Bad(deed, "unpickled"), *more),
    "running": lambda submit, deed, *more: submit(do, deed, *more),
    "result pickled": lambda submit, deed, *more: submit(give, deed, "pickled", *more),
    "result unpickled": lambda submit, deed, *more: submit(give, deed, "unpickled", *more),
}
#: Those in which the deed is done in the worker; the other two are done in this process.
IN_THE_WORKER = ("argument unpickled", "running", "result pickled")


def wait_for_error(future: Future[Any]) -> BaseException | None:
    return future.exception(timeout=60 * TIMEUNIT)


def check_neighbours(neighbours: list[Future[int]]) -> None:
    """Of ``submit(abs, -0), submit(abs, -1), ...``."""
    results = [future.result(timeout=60 * TIMEUNIT) for future in neighbours]
    assert results == list(range(len(neighbours))), "the tasks beside the bad one went wrong"


def run_among_neighbours(
    executor: ShmExecutor, moment: str, deed: Callable[[], object]
) -> BaseException | None:
    """How the bad task ended; checks the tasks before it, behind it and after it."""
    before = [executor.submit(abs, -i) for i in range(10)]
    bad = MOMENTS[moment](executor.submit, deed)
    behind = [executor.submit(abs, -i) for i in range(10)]
    error = wait_for_error(bad)
    check_neighbours(before)
    check_neighbours(behind)
    after = list(executor.map(abs, range(-5, 0), chunksize=2))
    assert after == [5, 4, 3, 2, 1], "the pool no longer works"
    return error


@pytest.mark.parametrize(
    ("start_method", "deed", "moment"),
    [
        (method, deed, moment)
        for method, deed, moment in itertools.product(START_METHODS, DEADLY, IN_THE_WORKER)
        if method == "fork" or deed is be_killed or moment == "running"
    ],
)
def test_death_of_a_worker_fails_its_task_only(
    start_method: str, deed: Callable[[], object], moment: str
) -> None:
    with ShmExecutor(1, mp_context=start_method) as executor:
        pid = executor.submit(os.getpid).result(timeout=60 * TIMEUNIT)
        error = run_among_neighbours(executor, moment, deed)
        successor = executor.submit(os.getpid).result(timeout=60 * TIMEUNIT)
    assert isinstance(error, WorkerDiedError), repr(error)
    assert isinstance(error, BrokenProcessPool), "existing except clauses miss it"
    assert (error.pid, error.exitcode) == (pid, DEADLY[deed])
    assert str(pid) in str(error)
    assert successor != pid, "the dead worker was not replaced"


def test_exception_fails_its_task_only(start_method: str) -> None:
    with ShmExecutor(1, mp_context=start_method) as executor:
        pid = executor.submit(os.getpid).result(timeout=60 * TIMEUNIT)
        for deed, moment in itertools.product(RAISING, MOMENTS):
            if (deed, moment) == (exit_by_exception, "argument pickled"):
                continue  # it is the caller of `submit` that is asked to exit: see below
            error = run_among_neighbours(executor, moment, deed)
            expected = (RAISING[deed], SerializationError)
            assert isinstance(error, expected), (deed, moment, repr(error))
            now = executor.submit(os.getpid).result(timeout=60 * TIMEUNIT)
            assert now == pid, (deed, moment, "no worker had to die")


def test_exit_while_an_argument_is_pickled_reaches_the_caller(start_method: str) -> None:
    """As it does where any other function of the caller's says ``sys.exit()``, or is interrupted."""
    with ShmExecutor(1, mp_context=start_method) as executor:
        before = [executor.submit(abs, -i) for i in range(10)]
        with pytest.raises(SystemExit):
            executor.submit(take, Bad(exit_by_exception, "pickled"))
        assert executor.submit(abs, -1).result(timeout=60 * TIMEUNIT) == 1
        check_neighbours(before)


@pytest.mark.parametrize("moment", IN_THE_WORKER)
def test_blocks_that_a_killed_worker_held_are_released(start_method: str, moment: str) -> None:
    """That nothing is left is what the watch on every test looks at; here large arrays ride along."""
    with ShmExecutor(1, mp_context=start_method) as executor:
        kept = executor.submit(np.negative, LARGE).result(timeout=60 * TIMEUNIT)
        error = wait_for_error(MOMENTS[moment](executor.submit, be_killed, LARGE, kept))
        assert isinstance(error, WorkerDiedError), repr(error)
        again = executor.submit(np.negative, kept).result(timeout=60 * TIMEUNIT)
        assert np.array_equal(again, LARGE)
    assert np.array_equal(kept, -LARGE), "an array died with the worker that made it"


def test_workers_that_die_at_the_same_time_fail_one_task_each(start_method: str) -> None:
    with ShmExecutor(3, mp_context=start_method) as executor:
        bad, good = [], []
        for i in range(6):
            bad.append(executor.submit(do, be_killed))
            good += [executor.submit(abs, -3 * i - j) for j in range(3)]
        errors = [wait_for_error(future) for future in bad]
        assert {type(error) for error in errors} == {WorkerDiedError}
        assert len({error.pid for error in errors}) == 6, "a worker cannot die twice"
        check_neighbours(good)
        assert executor.submit(abs, -1).result(timeout=60 * TIMEUNIT) == 1


@pytest.mark.parametrize("moment", IN_THE_WORKER)
def test_shutdown_waits_for_the_replacement_of_a_worker_that_dies_meanwhile(
    start_method: str, moment: str
) -> None:
    with ShmExecutor(1, mp_context=start_method) as executor:
        bad = MOMENTS[moment](executor.submit, be_killed)
        behind = [executor.submit(abs, -i) for i in range(10)]
    assert isinstance(wait_for_error(bad), WorkerDiedError)
    check_neighbours(behind)
