"""A pytest plugin for joblib's own tests: what they ask of "loky" is asked of shmpool.

``SHMPOOL_JOBLIB_REPORT`` names the file that gets the outcome of each test, as JSON.
"""

from __future__ import annotations

import faulthandler
import json
import os
from collections.abc import Generator

import joblib.parallel
import pytest

import shmpool
from shmpool.integrations.joblib import ShmpoolBackend

shmpool.register_joblib_backend()
joblib.parallel.BACKENDS["loky"] = ShmpoolBackend

_outcomes: dict[str, str] = {}
_stderr = os.dup(2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    del item
    faulthandler.dump_traceback_later(180, exit=True, file=_stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.rpartition("::")[2]
    if report.when == "call" or report.outcome != "passed":
        _outcomes[name] = report.outcome


def pytest_sessionfinish() -> None:
    with open(os.environ["SHMPOOL_JOBLIB_REPORT"], "w") as file:
        json.dump(_outcomes, file)
