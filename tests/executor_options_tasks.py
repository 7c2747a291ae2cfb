"""Tasks of tests/test_executor_options.py, importable by workers of every start method."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def spin(seconds: float) -> float:
    """Compute, and hold the interpreter lock as a C extension may, for so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(10_000))
    return seconds


def mark_and_hang(folder: str) -> None:
    """Leave a file that says which worker runs this, and never end."""
    Path(folder, str(os.getpid())).touch()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(60)


def die_at_first(folder: str, times: int, value: object) -> object:
    """Kill the worker the first so many times, then return the value."""
    for i in range(times):
        try:
            Path(folder, str(i)).touch(exist_ok=False)
        except FileExistsError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def fail_and_count(folder: str) -> None:
    """Raise, and leave a file for each time."""
    Path(folder, f"{os.getpid()}-{time.monotonic_ns()}").touch()
    raise ValueError("always")
