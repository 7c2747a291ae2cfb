"""Rounds of measurements, each in a fresh process with a time limit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .memory import Sampler, descendants
from .works import WORKS

ROOT = Path(__file__).resolve().parent.parent
GRACE = 10.0  # seconds to close after the answer


@dataclass(frozen=True)
class Options:
    """What is run, and how long.

    Parameters
    ----------
    works, contenders : tuple of str
        Names. The contender "limit" is measured as well, unless `limit` is False.
    workers : int
        Worker processes.
    rounds : int
        Measurements of each work by each contender.
    start_method : str
        For contenders that let one choose.
    budget : float
        Seconds of repetitions in a measurement.
    patience : float
        Seconds that one repetition may take before a contender runs fewer items.
    warm_ups : int
        Repetitions before the clock starts.
    timeout : float
        Seconds after which a measurement is given up.
    """

    works: tuple[str, ...]
    contenders: tuple[str, ...]
    workers: int = 2
    rounds: int = 3
    start_method: str = "fork"
    budget: float = 1.0
    patience: float = 2.5
    warm_ups: int = 3
    timeout: float = 60.0


def run(options: Options) -> Iterator[tuple[str, str, dict]]:
    """Yield (work, contender, answer) as they come; the contenders take turns in being first."""
    hopeless = set()
    if "start" in options.works:
        for contender in options.contenders:
            measure("start", contender, options)  # not counted: byte code and files are cached now
    for number in range(options.rounds):
        turn = number % len(options.contenders)
        order = options.contenders[turn:] + options.contenders[:turn]
        for work in options.works:
            for contender in order if number < WORKS[work].rounds else ():
                if (work, contender) in hopeless:  # it would only cost time again
                    continue
                answer = measure(work, contender, options)
                if "samples" not in answer:
                    hopeless.add((work, contender))
                yield work, contender, answer


def measure(work: str, contender: str, options: Options) -> dict:
    """One measurement in a fresh process: its samples, or a status and an error."""
    spec = {
        "work": work,
        "contender": contender,
        "workers": options.workers,
        "start_method": options.start_method,
        "budget": options.budget,
        "patience": options.patience,
        "warm_ups": options.warm_ups,
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "answer.json")
        with open(Path(folder, "stderr"), "w+", errors="replace") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.measure", json.dumps(spec), str(file)],
                cwd=ROOT,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
            sampler = Sampler(process.pid) if WORKS[work].kind == "memory" else None
            try:
                _wait(process, file, options.timeout)
            finally:
                if sampler:
                    sampler.stop()
                _end(process)
            if not file.exists():
                return _no_answer(process.returncode, stderr, options)
        answer = json.loads(file.read_text())
    if sampler and "sampled" in answer:
        answer["samples"] = [sampler.growth(*answer.pop("sampled"))]
    return answer


def _no_answer(code: int, stderr, options: Options) -> dict:
    if code == -signal.SIGKILL:
        return {"status": f"> {options.timeout:.0f} s", "error": "took too long"}
    stderr.seek(0)
    lines = stderr.read().strip().splitlines() or [""]
    return {"status": "error", "error": f"ended with {code}: {lines[-1]}"[:200]}


def _wait(process: subprocess.Popen, file: Path, timeout: float) -> None:
    """Until it has ended, or has not answered in time, or has answered and does not end."""
    deadline = time.monotonic() + timeout
    while process.poll() is None and not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE if file.exists() else 0)


def _end(process: subprocess.Popen) -> None:
    """Kill the process and its descendants, if it still runs."""
    if process.poll() is None:
        for pid in reversed(descendants(process.pid)):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _environment() -> dict[str, str]:
    """This one's, but workers find the benchmarks, and modules are compiled once, not each time."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment
