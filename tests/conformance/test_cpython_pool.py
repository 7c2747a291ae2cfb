"""CPython's own tests of ``multiprocessing.Pool``, run against ``shmpool.Pool`` under fork, forkserver and spawn.

They come from the running interpreter's ``test`` package; where that lacks them, this module is skipped. What is left
out stands in ``differences.py``, by name; how they are pointed at another pool, in ``pools.py``.

``SHMPOOL_CONFORMANCE_POOL=multiprocessing.pool.Pool`` runs the same tests against the standard library's pool and
leaves none out: the test of the harness itself.
"""

from __future__ import annotations

import multiprocessing.pool
import unittest
from collections.abc import Callable, Iterator

import pytest
from executor_tasks import warm_up

from shmpool import ShmExecutor

from . import differences, harness, pools

pytestmark = pytest.mark.conformance

# The least number of tests that must be left to run under each start method: of the 35 in Python 3.13, 33 are.
FLOOR = 30

try:
    FOUND = pools.find_test_cases()
except harness.TestsAbsent as error:
    pytest.skip(str(error), allow_module_level=True)

from test import support  # noqa: E402  (the interpreter's; there is one, as FOUND shows)

POOL = pools.load_pool()
IS_THE_STANDARD_LIBRARYS = POOL is multiprocessing.pool.Pool
TEST_CASES = {name: test_case for name, (_, test_case) in FOUND.items()}
START_METHODS = {test_case: method for method, test_case in FOUND.values()}

# This is what pytest collects.
globals().update(TEST_CASES)


@pytest.fixture(autouse=True, scope="class")
def asked(request: pytest.FixtureRequest) -> Iterator[Callable[[], int]]:
    """Runs CPython's test cases with the other pool, from before their `setUpClass`, which makes one.

    Returns what tells how many pools were asked for.
    """
    if request.cls is None:
        yield lambda: 0
        return
    support.environment_altered = False
    if not IS_THE_STANDARD_LIBRARYS:
        # What the store of the test case's pool opens once is then not the doing of the test that comes first.
        with ShmExecutor(1) as executor:
            warm_up(executor, 1)
    with pools.redirected(POOL, request.cls, START_METHODS[request.cls]) as count_asked:
        yield count_asked
    _check_that_nothing_is_left()


@pytest.fixture(autouse=True)
def watch(request: pytest.FixtureRequest, asked: Callable[[], int]) -> Iterator[None]:
    """Skips the tests that the table names; fails those that used no pool, or left something behind."""
    if request.cls is None:
        yield
        return
    test = request.node.originalname
    difference = differences.find(request.cls, test, table=differences.OF_POOLS)
    if difference is not None and not IS_THE_STANDARD_LIBRARYS:
        pytest.skip(str(difference))
    attributes = set(vars(request.instance))
    yield
    # The managers that the test case made live as long as it, and pytest keeps it for a while.
    for name in vars(request.instance).keys() - attributes:
        delattr(request.instance, name)
    if not (hasattr(request.cls, "pool") or test in pools.IN_OTHER_PROCESSES):
        assert asked() > 0, f"no {POOL.__name__} was made, so the test tested something else"
    _check_that_nothing_is_left()


def _check_that_nothing_is_left() -> None:
    # CPython waits for threads and reaps children, but what it finds only sets a flag, for `regrtest` to look at.
    assert not support.environment_altered, (
        "threads or processes were left behind: see the warnings on stderr"
    )


def _find_tests() -> list[tuple[type[unittest.TestCase], str]]:
    """All tests there are, those that are left out included."""
    names = unittest.TestLoader().getTestCaseNames
    return [(test_case, test) for test_case in TEST_CASES.values() for test in names(test_case)]


@pytest.mark.parametrize(
    "key", [key for key, entry in differences.OF_POOLS.items() if entry.is_expected()]
)
def test_every_test_that_is_left_out_exists(key: str) -> None:
    alone = {key: differences.OF_POOLS[key]}
    assert any(differences.find(*test, table=alone) for test in _find_tests()), (
        f"this Python's test package has no {key}"
    )


@pytest.mark.parametrize("start_method", harness.START_METHODS)
@pytest.mark.parametrize("name", pools.TESTS)
def test_every_test_case_was_found(name: str, start_method: str) -> None:
    test_case = TEST_CASES[f"{name}_{start_method}"]
    found = unittest.TestLoader().getTestCaseNames(test_case)
    assert found and set(found) >= set(pools.TESTS[name] or ())


@pytest.mark.parametrize("start_method", harness.START_METHODS)
def test_enough_tests_are_left_to_run(start_method: str) -> None:
    left = [
        test
        for test_case, test in _find_tests()
        if START_METHODS[test_case] == start_method
        and differences.find(test_case, test, table=differences.OF_POOLS) is None
        and not harness.is_skipped_by_cpython(test_case, test)
    ]
    assert len(left) >= FLOOR, f"of CPython's tests only {len(left)} are left: {left}"
