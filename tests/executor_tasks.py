"""What the tests of the executor share: tasks, warm executors, scripts run as a program of their own.

Workers import this module to find its tasks, so it imports nothing that is heavy.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from support import TIMEUNIT, wait_until

import shmpool
from shmpool.config import Config

METHODS = ("fork", "forkserver", "spawn", "loky")
#: Seconds that a future may take before the test fails (rather than hangs).
SOON = 60 * TIMEUNIT


# Executors.


def meet(folder: str, name: str, parties: int) -> int:
    """Return when ``parties`` tasks are in here at the same time; the pid."""
    Path(folder, name).touch()
    wait_until(lambda: len(os.listdir(folder)) >= parties, 60, f"{parties} tasks at a time")
    return os.getpid()


def _warm_up(folder: str, name: str, parties: int, array: Any, text: str) -> Any:
    meet(folder, name, parties)
    return array * 2, text


def warm_up(executor: shmpool.ShmExecutor, workers: int) -> None:
    """Have all workers started and all arenas made: a test that uses the executor then adds nothing that stays."""
    array, text = np.ones(1 << 17), "long" * 100_000
    with tempfile.TemporaryDirectory() as folder:
        futures = [
            executor.submit(_warm_up, folder, str(i), workers, array, text) for i in range(workers)
        ]
        # Arenas are mapped once for each way to look at them: to write, privately, and read-only for long streams.
        for future in futures:
            executor.submit(identity, (array, *future.result(SOON))).result(SOON)


@contextlib.contextmanager
def warm_executor(
    method: str, *, backend: str = "memfd", workers: int = 2, **options: Any
) -> Iterator[shmpool.ShmExecutor]:
    """An executor for a whole module."""
    config = Config.from_env()._replace(memory_backend=backend)
    store = shmpool.ObjectStore(config=config)
    with shmpool.ShmExecutor(workers, mp_context=method, store=store, **options) as executor:
        warm_up(executor, workers)
        yield executor


# Programs.

_ENVIRONMENT = {
    # Not development mode: what programs print is looked at.
    **{name: value for name, value in os.environ.items() if name != "PYTHONDEVMODE"},
    # The shmpool that is tested here, wherever it is.
    "PYTHONPATH": os.pathsep.join(
        [str(Path(shmpool.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    ).strip(os.pathsep),
}
#: A fork of a process that has threads is an error (Python 3.12 and later look).
PYTHON = (sys.executable, "-W", "error:This process:DeprecationWarning")


def environment(**more: str) -> dict[str, str]:
    """For a program in which shmpool can be imported."""
    return {**_ENVIRONMENT, **more}


def write_script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    return path


def run(*command: str, stdin: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; ``more`` are environment variables."""
    return subprocess.run(
        command, input=stdin, stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True, text=True, timeout=2 * SOON, env=environment(**more), check=False,
    )  # fmt: skip


def run_script(folder: Path, text: str, *args: str) -> str:
    """Run a script; it must end well, with nothing on stderr. Return what it printed."""
    done = run(*PYTHON, str(write_script(folder, text)), *args)
    assert (done.returncode, done.stderr) == (0, ""), (
        f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done.stdout


# Tasks.


def identity(value: Any) -> Any:
    return value


def look(array: Any) -> tuple[Any, ...]:
    """What a task sees of an array, told without an array."""
    return (
        type(array).__name__,
        str(array.dtype),
        array.shape,
        array.flags.writeable,
        array.tolist() if array.size < 100 else hash(array.tobytes()) if array.dtype != object else repr(array),
    )  # fmt: skip


def look_and_return(array: Any) -> tuple[tuple[Any, ...], Any]:
    return look(array), array


def ends_and_scribble(array: Any) -> tuple[int, float, float]:
    """Process, first and last item; then all of it is overwritten."""
    seen = os.getpid(), float(array[0]), float(array[-1])
    array[...] = -1
    return seen


def ends(array: Any) -> tuple[float, float]:
    return float(array.flat[0]), float(array.flat[-1])


def count(number: int) -> Any:
    """An array that goes through the store."""
    return np.arange(number, dtype=np.float64)


class Tagged(np.ndarray):
    """A subclass with an attribute that travels."""

    tag = "none"

    def __reduce__(self) -> Any:
        return _tagged, (np.asarray(self), self.tag)


def _tagged(array: Any, tag: str) -> Tagged:
    tagged = array.view(Tagged)
    tagged.tag = tag
    return tagged  # type: ignore[no-any-return]


_kept: list[Any] = []


def play(seed: int, arrays: list[Any]) -> list[Any]:
    """A move of the random game: scribble in what came, keep some of it, give some of it and something new back."""
    rng = np.random.default_rng(seed)
    if rng.random() < 0.5:
        del _kept[:]
    given: list[Any] = []
    for array in arrays:
        what = rng.integers(6)
        before = float(array.sum())
        if what in (0, 1):
            start = int(rng.integers(array.size))
            array[start : start + int(rng.integers(1, array.size + 1))] += 1 + seed % 7
        if what == 2:
            array[...] = seed
        if rng.random() < 0.3:
            given.append(array)
        if rng.random() < 0.3:
            start, stop = sorted(rng.integers(0, array.size + 1, 2).tolist())
            given.append(array[start:stop])
        if rng.random() < 0.2:
            given.append(np.full(int(rng.integers(1, 60_000)), before))
        if rng.random() < 0.3:
            _kept.append(array)
        given.append(np.float64(before))
    return given


# What runs code of the user's when it is pickled: that fills one array again and again.

SCRATCH = np.zeros(50_000)


class FilledByGetstate:
    def __init__(self, value: int) -> None:
        self.value = value

    def __getstate__(self) -> dict[str, Any]:
        SCRATCH[:] = self.value
        return {"value": self.value, "data": SCRATCH}


class FilledByReduce:
    def __init__(self, value: int, data: Any = None) -> None:
        self.value, self.data = value, data

    def __reduce__(self) -> Any:
        SCRATCH[:] = self.value
        return FilledByReduce, (self.value, SCRATCH)


class FilledBySerializer:
    def __init__(self, value: int, data: Any = None) -> None:
        self.value, self.data = value, data


def fill_in(item: FilledBySerializer) -> tuple[int, Any]:
    SCRATCH[:] = item.value
    return item.value, SCRATCH


class FilledByIter:
    def __init__(self, value: int) -> None:
        self.value = value

    def __iter__(self) -> Iterator[Any]:
        SCRATCH[:] = self.value
        return iter((self.value, SCRATCH))


def value_and_ends(item: Any, data: Any = None) -> tuple[int, float, float]:
    if data is not None:
        return item, float(data[0]), float(data[-1])
    return item.value, float(item.data[0]), float(item.data[-1])


def ends_of_any(item: Any) -> tuple[float, float]:
    data = item if isinstance(item, np.ndarray) else item.data
    return float(data[0]), float(data[-1])
