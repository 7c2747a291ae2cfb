"""Real programs, as they are, by python and by ``python -m shmpool run``: the results are equal, to the last digit.

The programs are in the folder ``programs``; ``--report`` shows that they went through shmpool.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from support import TIMEUNIT

import shmpool

pytestmark = pytest.mark.slow

PROGRAMS = Path(__file__).with_name("programs")
ROOT = str(Path(shmpool.__file__).parent.parent)


class Report(NamedTuple):
    pools: int
    executors: int
    tasks: int
    memory: str  # what went through shared memory


def run(*command: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, *command],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ROOT},
        timeout=150 * TIMEUNIT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def run_both(program: str, *args: str) -> tuple[str, Report]:
    """Run a program by python and by shmpool; the output, which is the same, and shmpool's report."""
    path = str(PROGRAMS / program)
    out, plain_errors = run(path, *args)
    out_too, errors = run("-m", "shmpool", "run", "--report", path, *args)
    assert out_too == out
    found = re.search(
        r"^shmpool: (\d+) pools?, (\d+) executors?, (\d+) tasks?\nshmpool: (.*)\nshmpool: .*\n\Z",
        errors,
        re.MULTILINE,
    )
    assert found, errors
    assert "Warning" not in errors or "Warning" in plain_errors, errors
    pools, executors, tasks, memory = found.groups()
    return out, Report(int(pools), int(executors), int(tasks), memory)


def went_through_memory(report: Report) -> bool:
    return "B went through shared memory" in report.memory


def test_differential_evolution_and_brute() -> None:
    pytest.importorskip("scipy.optimize")
    out, report = run_both("differential_evolution.py")
    assert out.count("\n") == 3
    assert report.pools == 3 and report.tasks > 10
    # The measured data, 400 kB, is passed in each call, and written once for each of two pools.
    assert re.search(": 800 kB copied into it once, [0-9.]+ MB that were there", report.memory)


def test_quad_vec() -> None:
    pytest.importorskip("scipy.integrate")
    out, report = run_both("quad_vec.py")
    assert out.endswith("True\n")
    assert report.pools == 1 and went_through_memory(report)


def test_process_map() -> None:
    pytest.importorskip("tqdm")
    _, report = run_both("process_map.py")
    assert report.executors == 1 and report.tasks == 4 and went_through_memory(report)


def test_emcee() -> None:
    pytest.importorskip("emcee")
    out, report = run_both("sampling.py")
    assert out.startswith("(10, 8, 2)")
    assert report.pools == 1 and went_through_memory(report)


def test_a_dataframe_in_parts() -> None:
    pytest.importorskip("pandas")
    out, report = run_both("dataframe.py")
    assert "True True" in out
    assert report.pools == 1 and went_through_memory(report)


def test_image_filters() -> None:
    pytest.importorskip("skimage")
    out, report = run_both("filters.py")
    assert out.startswith("(512, 512)")
    assert report.pools == 1 and went_through_memory(report)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_pools_in_processes_that_the_program_starts(method: str) -> None:
    out, report = run_both("nested.py", method)
    assert f"0 {method} []" in out
    assert report.pools == 1 and report.executors == 1 and went_through_memory(report)


# Libraries whose pools become shmpool's: how many.
REPLACED = {"dask": "1 pool, 1 executor", "torch": "1 pool, 0 executors"}
# Libraries that have their own, which must not notice anything.
UNTOUCHED = ("joblib", "sklearn", "pebble", "mpire")


@pytest.mark.parametrize("library", [*REPLACED, *UNTOUCHED])
def test_libraries_that_start_processes(library: str) -> None:
    pytest.importorskip(library)
    path = str(PROGRAMS / "libraries.py")
    out, _ = run(path, library)
    out_too, errors = run("-m", "shmpool", "run", "--report", path, library)
    assert out_too == out
    assert f"shmpool: {REPLACED.get(library, 'no pool of')}" in errors
