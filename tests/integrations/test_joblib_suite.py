"""joblib's own tests of ``Parallel``, with shmpool in the place of loky: some minutes.

They run where ``SHMPOOL_TEST_JOBLIB_SUITE`` is set, under the joblib that is installed.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import TIMEUNIT

import shmpool

pytest.importorskip("joblib")

#: Tests of joblib's that shmpool fails on purpose: pattern of their names, and why.
DIFFERENCES = {
    "test_backend_context_manager[*-loky]": "asks for the class LokyBackend",
    "test_nested_parallelism_limit[*-loky]": "asks for the class LokyBackend",
    "test_error_capture[loky]": "looks at LokyBackend's attribute _workers",
    "test_auto_memmap_on_arrays_from_generator[loky]": "asks for temporary files",
    "test_memmapping_leaks[loky]": "asks for temporary files",
    "test_multiple_generator_call_separated_gc[*-loky-True]": (
        "asks for the error that loky raises where two calls cannot share its workers; here they can"
    ),
    "test_nested_parallel_warnings[threading-loky-True]": (
        "asks for the warning that loky has no workers for calls below threads; here they have"
    ),
    "test_nested_parallel_warnings[multiprocessing-loky-True]": (
        "asks for a warning that calls in workers of multiprocessing are sequential"
    ),
    "test_nested_loop[back_compat_backend-shmpool]": "names shmpool where it is not registered",
}


@pytest.mark.skipif(
    importlib.util.find_spec("joblib.test") is None, reason="this joblib has come without its tests"
)
@pytest.mark.skipif(
    not os.environ.get("SHMPOOL_TEST_JOBLIB_SUITE"), reason="SHMPOOL_TEST_JOBLIB_SUITE is not set"
)
@pytest.mark.timeout(1200)
def test_joblibs_own_tests_pass_but_for_listed_differences(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    here = Path(__file__).parent
    paths = [str(here), str(Path(shmpool.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "joblib_suite_plugin", "-W", "ignore"),
        *("-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(tmp_path)),
        *("--basetemp", str(tmp_path / "inner")),
        *(
            "--pyargs",
            "joblib.test.test_parallel",
            "-k",
            "loky or shmpool",
        ),
    ]
    done = subprocess.run(
        command,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "SHMPOOL_JOBLIB_REPORT": str(report),
        },
        cwd=tmp_path, capture_output=True, text=True, timeout=1100 * TIMEUNIT, check=False,
    )  # fmt: skip
    assert report.exists(), done.stdout + done.stderr
    outcomes = json.loads(report.read_text())
    assert sum(outcome == "passed" for outcome in outcomes.values()) > 100
    failed = {name for name, outcome in outcomes.items() if outcome == "failed"}
    listed = {name for name in outcomes for pattern in DIFFERENCES if _matches(name, pattern)}
    assert not failed - listed, f"{sorted(failed - listed)}\n{done.stdout}"
    unneeded = [p for p in DIFFERENCES if not any(_matches(name, p) for name in failed)]
    assert not unneeded, f"these pass: {unneeded}"


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))
