"""Fresh processes with a time limit, of which nothing is left behind."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .memory import Sampler, Unsampled, descendants

ROOT = Path(__file__).resolve().parent.parent
GRACE = 10.0  # seconds to close after the answer
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def answer_of(module: str, spec: dict, timeout: float, *, sample_memory: bool = False) -> dict:
    """What ``python -m module SPEC FILE`` writes into FILE, as JSON.

    Parameters
    ----------
    module : str
    spec : dict
    timeout : float
        Seconds after which the process is ended, and all below it.
    sample_memory : bool
        Answer "sampled" (three moments) with "samples" (memory of the process tree, in bytes): how
        much it grew, and "peak", how much it was at most.
    """
    with (
        _orphans_ended(),
        # Ray and dask leave much in it. A short name, since the path of a socket has 107 characters.
        tempfile.TemporaryDirectory(prefix="b-", ignore_cleanup_errors=True) as folder,
        open(Path(folder, "stderr"), "w+", errors="replace") as stderr,
    ):
        file = Path(folder, "answer.json")
        process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(spec), str(file)],
            cwd=ROOT,
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C ends the race, which then ends this
        )
        sampler = Sampler(process.pid) if sample_memory else None
        try:
            _wait(process, file, timeout)
        finally:
            if sampler:
                sampler.stop()
            _end(process)
        if not file.exists():
            stderr.seek(0)
            return _no_answer(process.returncode, stderr.read(), timeout)
        answer = json.loads(file.read_text())
    if sampler and "sampled" in answer:
        before, start, stop = answer.pop("sampled")
        try:
            answer["samples"] = [sampler.growth(before, start, stop)]
            answer["peak"] = sampler.peak(start, stop)
        except Unsampled as error:
            return {"status": "error", "error": str(error)}
    return answer


def _no_answer(code: int, stderr: str, timeout: float) -> dict:
    if code == -signal.SIGKILL:
        return {"status": f"> {timeout:.0f} s", "error": "took too long", "traceback": stderr}
    lines = stderr.strip().splitlines() or [""]
    return {
        "status": "error",
        "error": f"ended with {code}: {lines[-1]}"[:200],
        "traceback": stderr,
    }


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


@contextlib.contextmanager
def _orphans_ended() -> Iterator[None]:
    """End what a contender leaves running, so that it does not disturb the next one."""
    before = set(descendants(os.getpid()))
    _adopt_orphans(True)
    try:
        yield
        for _ in range(10):  # the children of whom is killed come to light
            left = set(descendants(os.getpid())) - before
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
            if not left:
                break
    finally:
        _adopt_orphans(False)


def _adopt_orphans(yes: bool) -> None:
    """Make descendants whose parents have ended this process's children (Linux), or no longer."""
    with contextlib.suppress(AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0)


def _environment(folder: str) -> dict[str, str]:
    """This one's, but workers find the benchmarks, and modules are compiled once, not each time."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "TMPDIR": folder, "RAY_TMPDIR": folder}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment
