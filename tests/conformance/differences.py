"""The standard library's tests that say nothing about shmpool, each by name and with its reason.

Rules of this table:

* Every test that is not run stands here. Nothing else in this folder skips a test; what CPython's own
  decorators and ``skipTest`` calls skip (Windows only, "Incompatible with the fork start method", ...) they
  skip here as they do there.
* A key is ``Class.test``, where ``Class`` is any class on the test case's inheritance chain: the mixin that
  CPython writes the test in (``ExecutorDeadlockTest``) means all start methods, the class made from it
  (``ProcessPoolForkExecutorDeadlockTest``) means one. A bare ``test`` means wherever that name occurs.
* An entry holds for the Python versions it names, and there the test must exist: ``test_cpython.py`` checks
  it, so that the table cannot outlive what it speaks of.
* What a test left out was about, and shmpool promises too, is tested by ``test_in_their_place.py`` or by the crash
  matrix.
* The table is for shmpool. The standard library's own executor, run through the same harness, skips nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Group(Enum):
    """Why a test is left out."""

    PRIVATE = "only probes CPython's private machinery"
    PURPOSE = "contradicts a difference made on purpose"


@dataclass(frozen=True)
class Difference:
    """One test that is left out.

    Parameters
    ----------
    group
        Which of the two kinds of reason this is.
    reason
        What in the test does not apply to shmpool.
    since, before
        The Python versions, ``since <= version < before``, whose ``test`` package has the test. `None`: no
        bound. Where CPython added the test in a patch release, the minor version after it is the one to name.
    """

    group: Group
    reason: str
    since: tuple[int, int] | None = None
    before: tuple[int, int] | None = None

    def is_expected(self, version: tuple[int, int] = sys.version_info[:2]) -> bool:
        """Whether this interpreter's ``test`` package must have the test."""
        return (self.since is None or version >= self.since) and (
            self.before is None or version < self.before
        )

    def __str__(self) -> str:
        return f"{self.group.value}: {self.reason}"


def _private(reason: str, **versions: tuple[int, int]) -> Difference:
    return Difference(Group.PRIVATE, reason, **versions)


def _purpose(reason: str, **versions: tuple[int, int]) -> Difference:
    return Difference(Group.PURPOSE, reason, **versions)


_MANAGER_THREAD = "joins executor._executor_manager_thread"
_CALL_QUEUE = "joins executor._executor_manager_thread and executor._call_queue"
_FORCE_SHUTDOWN = "calls or replaces executor._force_shutdown"
_NOT_BROKEN = "a dead worker fails the task it was running and is replaced; the pool is not broken"
_UNPICKLABLE = "its tasks cannot be pickled: CPython has started workers by then, shmpool has not"
_NOT_BEGUN = "expects tasks to finish that no worker has begun; all of them can be cancelled while the workers start"
_UNPICKLE = (
    "expects BrokenProcessPool; what unpickling an argument or a result raises reaches its own future, and the "
    "pool goes on (tests/test_crash_matrix.py)"
)

DIFFERENCES: dict[str, Difference] = {
    # -- only CPython's private machinery ----------------------------------------------------
    "ProcessPoolShutdownTest.test_del_shutdown": _private(_CALL_QUEUE),
    "ProcessPoolShutdownTest.test_shutdown_no_wait": _private(_CALL_QUEUE),
    "ExecutorDeadlockTest.test_shutdown_deadlock_pickle": _private(_MANAGER_THREAD),
    "ExecutorDeadlockTest.test_gh105829_should_not_deadlock_if_wakeup_pipe_full": _private(
        "replaces _ExecutorManagerThread.run and _ThreadWakeup", since=(3, 12)
    ),
    "ProcessPoolExecutorTest.test_python_finalization_error": _private(
        "lets the first thread start and no second: CPython's queue feeder, which shmpool does not have",
        since=(3, 13),
    ),
    "ProcessPoolExecutorTest.test_terminate_workers": _private(_FORCE_SHUTDOWN, since=(3, 14)),
    "ProcessPoolExecutorTest.test_kill_workers": _private(_FORCE_SHUTDOWN, since=(3, 14)),
    "ProcessPoolExecutorTest.test_force_shutdown_workers_invalid_op": _private(
        _FORCE_SHUTDOWN, since=(3, 14)
    ),
    "ProcessPoolShutdownTest.test_shutdown_gh_132969_case_1": _private(
        _MANAGER_THREAD, since=(3, 15)
    ),
    "ProcessPoolShutdownTest.test_shutdown_gh_132969_case_2": _private(
        _MANAGER_THREAD, since=(3, 15)
    ),
    # -- differences made on purpose --------------------------------------------------------
    "ProcessPoolExecutorTest.test_killed_child": _purpose(_NOT_BROKEN),
    "ProcessPoolForkProcessPoolExecutorTest.test_max_tasks_per_child": _purpose(
        "expects ValueError under fork; shmpool's workers are replaced from a process without threads"
    ),
    "ProcessPoolForkserverProcessPoolExecutorTest.test_saturation": _purpose(_UNPICKLABLE),
    "ProcessPoolSpawnProcessPoolExecutorTest.test_saturation": _purpose(_UNPICKLABLE),
    "ProcessPoolForkserverProcessPoolShutdownTest.test_processes_terminate": _purpose(_UNPICKLABLE),
    "ProcessPoolSpawnProcessPoolShutdownTest.test_processes_terminate": _purpose(_UNPICKLABLE),
    "ProcessPoolForkProcessPoolShutdownTest.test_cancel_futures": _purpose(_NOT_BEGUN),
    "ProcessPoolForkserverProcessPoolShutdownTest.test_cancel_futures": _purpose(_NOT_BEGUN),
    "ProcessPoolSpawnProcessPoolShutdownTest.test_cancel_futures": _purpose(_NOT_BEGUN),
    "ExecutorDeadlockTest.test_error_at_task_unpickle": _purpose(_UNPICKLE),
    "ExecutorDeadlockTest.test_exit_at_task_unpickle": _purpose(_UNPICKLE),
    "ExecutorDeadlockTest.test_error_during_result_unpickle_in_result_handler": _purpose(_UNPICKLE),
    "ExecutorDeadlockTest.test_exit_during_result_unpickle_in_result_handler": _purpose(_UNPICKLE),
}


#: Of the tests of ``multiprocessing.Pool``.
OF_POOLS: dict[str, Difference] = {
    "TestPoolNotLeakOnFailure.test_release_unused_processes": _private(
        "its context makes objects that are no processes: they have no pid (test_pools_in_their_place.py has real ones)"
    ),
    "_TestPoolWorkerErrors.test_unpickleable_result": _purpose(
        "expects that a lambda cannot be returned; lambdas travel (test_pools_in_their_place.py returns what does not)"
    ),
}


def find(
    test_case: type, name: str, *, table: Mapping[str, Difference] = DIFFERENCES
) -> Difference | None:
    """The entry that keeps ``test_case.name`` from being run, if there is one."""
    keys = (name, *(f"{base.__name__}.{name}" for base in test_case.__mro__))
    return next((table[key] for key in keys if key in table), None)
