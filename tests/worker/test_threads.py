"""BLAS and OpenMP in workers: capped with every start method, whenever they are loaded; the user's own word counts."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from executor_tasks import METHODS, PYTHON, SOON, run, run_script, write_script
from support import TIMEUNIT

import shmpool
from shmpool.config import Config
from shmpool.worker import threads
from shmpool.worker.threads import Herald, threads_each, variables

threadpoolctl = pytest.importorskip("threadpoolctl")

VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
OTHERS = ("GOTO_NUM_THREADS", "SHMPOOL_WORKER_THREADS", "LOKY_MAX_CPU_COUNT")
CORES = len(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES + OTHERS:
        monkeypatch.delenv(name, raising=False)


# What workers are told.


@pytest.mark.parametrize(
    ("max_workers", "limit", "expected"),
    [(1, None, CORES), (CORES, None, 1), (10 * CORES, None, 1), (CORES, 3, 3), (1, 0, None)],
)
def test_the_cores_are_divided_among_the_workers(
    max_workers: int, limit: int | None, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", str(CORES))
    assert threads_each(max_workers, limit) == expected


def test_cores_that_may_not_be_used_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert threads_each(1) == 1


@pytest.mark.parametrize(
    ("text", "expected"), [("", None), ("off", 0), ("Off", 0), ("0", 0), (" 4 ", 4)]
)
def test_the_environment_sets_the_cap(
    text: str, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHMPOOL_WORKER_THREADS", text)
    assert Config.from_env().worker_threads == expected


@pytest.mark.parametrize("text", ["many", "-1", "1.5"])
def test_a_cap_that_makes_no_sense_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMPOOL_WORKER_THREADS", text)
    with pytest.raises(ValueError, match=f"SHMPOOL_WORKER_THREADS must be .* not '{text}'"):
        Config.from_env()


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (None, {*VARIABLES}),
        ("OMP_NUM_THREADS", {"NUMBA_NUM_THREADS"}),  # the others would read it
        ("GOTO_NUM_THREADS", {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"}),
        ("MKL_NUM_THREADS", {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"}),
        ("NUMBA_NUM_THREADS", {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}),
    ],
)
def test_no_variable_contradicts_the_users(
    said: str | None, left: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if said:
        monkeypatch.setenv(said, "7")
    assert variables(3) == dict.fromkeys(left, "3")
    assert variables(None) == {}


def test_a_herald_needs_nothing_that_must_be_found_first() -> None:
    herald = Herald("it's me", {"NEW": 'x"y', "OLD": "theirs"})
    script = (
        "import os, pickle, signal, sys; name = pickle.load(sys.stdin.buffer);"
        "print([type(name).__name__, name, os.environ['NEW'], os.environ['OLD'], 'shmpool' in sys.modules,"
        " signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], input=pickle.dumps(herald), env={"OLD": "mine"},
        stdout=subprocess.PIPE, check=True, timeout=60 * TIMEUNIT,
    )  # fmt: skip
    assert done.stdout.decode().strip() == str(["str", "it's me", 'x"y', "mine", False, True])


# What workers do.


def look(*modules: str) -> dict[str, Any]:
    """A task that loads libraries, and tells what it has then."""
    for module in modules:
        importlib.import_module(module)
    np.ones((300, 300)) @ np.ones((300, 300))  # with more than one thread, OpenBLAS starts them now
    threads: dict[str, list[int]] = {}
    for library in threadpoolctl.threadpool_info():
        threads.setdefault(library["internal_api"], []).append(library["num_threads"])
    return {
        "pid": os.getpid(),
        "running": len(os.listdir("/proc/self/task")),
        "set": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        **threads,
    }


def seen(method: str, workers: int = 2, **options: Any) -> dict[str, Any]:
    with shmpool.ShmExecutor(workers, mp_context=method, **options) as executor:
        return executor.submit(look).result(SOON)


def test_workers_times_threads_is_no_more_than_the_cores(start_method: str) -> None:
    before = look()
    threads = max(1, CORES // 2)
    worker = seen(start_method)
    assert {*worker["openblas"]} == {threads}
    assert worker["set"] == dict.fromkeys(variables(threads), str(threads))
    after = look()
    for what in ("openblas", "set"):
        assert after[what] == before[what], "this process was not to be touched"


def test_it_can_be_switched_off(start_method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMPOOL_WORKER_THREADS", "off")
    worker = seen(start_method)
    assert {*worker["openblas"]} == {*look()["openblas"]}
    assert worker["set"] == {}


def test_a_forked_worker_does_not_start_the_threads_that_it_shall_not_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHMPOOL_WORKER_THREADS", "1")
    assert seen("fork")["running"] == 1


def nested() -> dict[str, Any]:
    return seen("fork", workers=1)


def test_a_worker_can_have_an_executor_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMPOOL_WORKER_THREADS", "1")
    with shmpool.ShmExecutor(1, mp_context="fork") as executor:
        worker = executor.submit(nested).result(SOON)
    assert {*worker["openblas"]} == {1}


def test_a_replacement_is_capped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMPOOL_WORKER_THREADS", "1")
    with shmpool.ShmExecutor(1, mp_context="fork") as executor:
        first = executor.submit(look).result(SOON)
        with pytest.raises(shmpool.WorkerDiedError):
            executor.submit(os._exit, 1).result(SOON)
        second = executor.submit(look).result(SOON)
    assert second["pid"] != first["pid"]
    assert {*second["openblas"]} == {1}


@pytest.mark.skipif(CORES < 2, reason="one core: there is nothing to lower")
class TestTheUser:
    """What the user set stays, in whichever way it was set."""

    def test_a_lower_number_around_the_executor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SHMPOOL_WORKER_THREADS", "2")
        assert {*seen("fork")["openblas"]} == {2}
        with threadpoolctl.threadpool_limits(1):
            assert {*seen("fork")["openblas"]} == {1}

    def test_an_initializer(self, start_method: str) -> None:
        worker = seen(
            start_method, workers=CORES, initializer=threadpoolctl.threadpool_limits, initargs=(2,)
        )
        assert {*worker["openblas"]} == {2}

    def test_a_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
        assert {*seen("fork", workers=CORES)["openblas"]} == {2}


# Programs: libraries that are loaded later, and an environment that is there from the start.

SCRIPT = """
    import json, os, sys
    import numpy  # here: spawned processes import it with __main__, before anything of shmpool
    from test_threads import look
    import shmpool

    if __name__ == "__main__":
        with shmpool.ShmExecutor(1, mp_context=sys.argv[1]) as executor:
            tasks = [executor.submit(look, name) for name in sys.argv[2:]]
            print(json.dumps([task.result() for task in tasks]))
"""
SCIPY, OPENMP = "scipy.linalg", "sklearn.utils._openmp_helpers"


def run_program(folder: Path, method: str, *modules: str, **environment: str) -> Any:
    command = (*PYTHON, str(write_script(folder, SCRIPT)), method, *modules)
    done = run(*command, **{"PYTHONPATH": os.pathsep.join(sys.path)} | environment)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.parametrize("method", METHODS)
def test_libraries_that_are_loaded_later(method: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    one, both = run_program(tmp_path, method, SCIPY, OPENMP, SHMPOOL_WORKER_THREADS="1")
    assert one["openblas"] == [1, 1]  # numpy's and scipy's
    assert one["running"] == 1, "a library started threads, and was told afterwards not to use them"
    assert both["openmp"] == [1]


@pytest.mark.skipif(CORES < 2, reason="one core: there is nothing to lower")
@pytest.mark.parametrize("method", METHODS)
def test_the_users_environment(method: str, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    said = {"OPENBLAS_NUM_THREADS": "2"}
    (worker,) = run_program(tmp_path, method, SCIPY, SHMPOOL_WORKER_THREADS="1", **said)
    assert worker["openblas"] == [2, 2]
    assert worker["set"] == dict.fromkeys(VARIABLES, "1") | said


@pytest.mark.parametrize(
    "path", ["/nowhere/libopenblas.so", "libc.so.6"], ids=["unloaded", "another kind"]
)
def test_a_library_that_cannot_be_limited_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_loaded", lambda: [("openblas", path)])
    assert threads.lower_libraries(1) == []
    with shmpool.ShmExecutor(1, "fork") as executor:
        assert executor.submit(abs, -1).result(SOON) == 1


FINALIZER = """
from shmpool import ShmExecutor
from shmpool.worker.launch import Launcher

class Garbage:
    def __del__(self):
        print(other.submit(abs, -5).result(60))

original = Launcher._start_template

def start_template(launcher):  # when the first workers have been forked, and libraries are lowered
    Launcher._start_template = original
    Garbage()
    return original(launcher)

if __name__ == "__main__":
    Launcher._start_template = start_template
    with ShmExecutor(1, "fork") as other, ShmExecutor(1, "fork") as executor:
        print(executor.submit(abs, -1).result(60))
"""


def test_a_finalizer_may_start_an_executor_while_another_one_starts(tmp_path: Path) -> None:
    assert run_script(tmp_path, FINALIZER, "fork") == "5\n1\n"


@pytest.mark.parametrize("running", [False, True])
def test_numbas_number_of_threads_stays_if_numba_has_started_them(
    monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    """It raises when the variable has changed by the next time that it compiles something."""
    numba = types.SimpleNamespace(_is_initialized=running)
    monkeypatch.setitem(sys.modules, "numba.np.ufunc.parallel", numba)
    for name in VARIABLES:
        monkeypatch.setenv(name, "before")
        monkeypatch.delenv(name)
    threads.start_capped(2)
    found = {name: os.environ.pop(name, None) for name in VARIABLES}
    expected = dict.fromkeys(VARIABLES, "2")
    assert found == (expected | {"NUMBA_NUM_THREADS": None} if running else expected)
