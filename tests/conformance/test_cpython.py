"""CPython's own tests of process pools, run against ``shmpool.ShmExecutor`` under fork, forkserver and spawn.

They come from the running interpreter's ``test`` package; where that lacks them, this module is skipped. What
is left out stands in ``differences.py``, by name; how they are pointed at another executor, in
``harness.py``.

``SHMPOOL_CONFORMANCE_EXECUTOR=concurrent.futures.ProcessPoolExecutor`` runs the same tests against the
standard library's executor and leaves none out: the test of the harness itself.
"""

from __future__ import annotations

import concurrent.futures
import unittest
from collections.abc import Iterator

import pytest

from . import differences, harness

pytestmark = pytest.mark.conformance

# The least number of tests that must be left to run under each start method: of the 63 in Python 3.13 at least
# 50 are, of the 57 in the one file of older versions 45.
FLOOR = 42

try:
    MODULES = harness.load_modules()
except harness.TestsAbsent as error:
    pytest.skip(str(error), allow_module_level=True)

from test import support  # noqa: E402  (the interpreter's; there is one, as MODULES shows)

EXECUTOR = harness.load_executor()
IS_THE_STANDARD_LIBRARYS = EXECUTOR is concurrent.futures.ProcessPoolExecutor
TEST_CASES = harness.find_test_cases(MODULES)

# This is what pytest collects.
globals().update(TEST_CASES)


@pytest.fixture(autouse=True)
def redirect_to_the_executor_under_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs each of CPython's tests with the other executor, and fails those that leave something behind.

    CPython's `tearDown` waits for threads and reaps children, but what it finds only sets a flag, for
    `regrtest` to look at.
    """
    if request.cls is None:
        yield
        return
    test = request.node.originalname
    difference = differences.find(request.cls, test)
    if difference is not None and not IS_THE_STANDARD_LIBRARYS:
        pytest.skip(str(difference))
    support.environment_altered = False
    attributes = set(vars(request.instance))
    with harness.redirected(MODULES, EXECUTOR, request.cls, test) as count_made:
        yield
    # The queues and contexts that the test case made live as long as it, and pytest keeps it for a while.
    for name in vars(request.instance).keys() - attributes:
        delattr(request.instance, name)
    if not harness.is_skipped_by_cpython(request.cls, test):
        assert count_made() > 0, (
            f"no {EXECUTOR.__name__} was made, so the test tested something else"
        )
    assert not support.environment_altered, (
        "threads or processes were left behind: see the warnings on stderr"
    )


def _find_tests() -> list[tuple[type[unittest.TestCase], str]]:
    """All tests there are, those that are left out included."""
    names = unittest.TestLoader().getTestCaseNames
    return [(test_case, test) for test_case in TEST_CASES.values() for test in names(test_case)]


@pytest.mark.parametrize(
    "key", [key for key, entry in differences.DIFFERENCES.items() if entry.is_expected()]
)
def test_every_test_that_is_left_out_exists(key: str) -> None:
    alone = {key: differences.DIFFERENCES[key]}
    assert any(differences.find(*test, table=alone) for test in _find_tests()), (
        f"this Python's test package has no {key}"
    )


@pytest.mark.parametrize("start_method", harness.START_METHODS)
def test_enough_tests_are_left_to_run(start_method: str) -> None:
    left = [
        test
        for test_case, test in _find_tests()
        if harness.find_start_method(test_case, test) == start_method
        and differences.find(test_case, test) is None
        and not harness.is_skipped_by_cpython(test_case, test)
    ]
    assert len(left) >= FLOOR, f"of CPython's tests only {len(left)} are left: {left}"
