"""A program that dies: what scenario ``parent`` runs.  Settings come as JSON in the first argument.

``method``: how workers are started.  ``work``: what they do meanwhile.  ``death``: how this process ends, unless it is
killed from outside.  ``after``: seconds from when the work has begun until then.
"""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from shmpool import ObjectStore, ShmExecutor

from .processes import helpers
from .watchdog import PATIENCE

WORKERS = 2
#: Of those works that would never end by themselves, so that a program can wait for them where it has to.
SHORT = 0.3


def note_child(folder: str, pid: int | None) -> None:
    Path(folder, f"{pid}.child").touch()


def begun(folder: str) -> None:
    Path(folder, f"{os.getpid()}-{time.monotonic_ns()}.begun").touch()


# What workers do. Each says that it has begun.


def sleep(folder: str, seconds: float, *_: Any) -> None:
    begun(folder)
    time.sleep(seconds)


def hold_the_lock(folder: str, seconds: float, *_: Any) -> None:
    """In compiled code, with the interpreter lock: no Python code can run in this process."""
    begun(folder)
    ctypes.PyDLL(None).usleep(int(min(seconds, 4000) * 1e6))


def ignore_signals(folder: str, seconds: float, *_: Any) -> None:
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    sleep(folder, seconds)


def stop_itself(folder: str, seconds: float, *_: Any) -> None:
    begun(folder)
    if seconds > 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def start_a_program(folder: str, seconds: float, *_: Any) -> None:
    child = subprocess.Popen(["sleep", str(seconds)], close_fds=False)
    note_child(folder, child.pid)
    begun(folder)
    child.wait()


def start_a_process(folder: str, seconds: float, array: Any) -> None:
    """It inherits all that this worker has."""
    child = multiprocessing.get_context("fork").Process(
        target=_child, args=(folder, seconds, array)
    )
    child.start()
    note_child(folder, child.pid)
    begun(folder)
    child.join()


def _child(folder: str, seconds: float, array: Any) -> None:
    time.sleep(seconds)


def use_an_executor(folder: str, seconds: float, array: Any) -> None:
    """Its workers must die with this one."""
    with ShmExecutor(1, "fork") as executor:
        executor.submit(sleep, folder, seconds, array).result()


def start_threads(folder: str, seconds: float, *_: Any) -> None:
    for _ in range(3):
        threading.Thread(target=time.sleep, args=(seconds,)).start()
    sleep(folder, seconds)


def write_and_hold(folder: str, seconds: float, array: Any) -> Any:
    array[:] = 1
    own = np.ones(1_000_000)
    sleep(folder, seconds)
    return array, own


def give_large_results(folder: str, seconds: float, array: Any) -> Any:
    begun(folder)
    return np.ones(500_000), array, "x" * 1_000_000


WORKS: dict[str, Callable[..., Any]] = {
    fn.__name__: fn
    for fn in (
        sleep, hold_the_lock, ignore_signals, stop_itself, start_a_program, start_a_process, use_an_executor,
        start_threads, write_and_hold, give_large_results,
    )
}  # fmt: skip


# How this process ends.


def raise_an_error() -> None:
    raise ValueError("on purpose")


def exit_in_a_thread() -> None:
    """Which ends that thread only; then this one comes to its end."""
    thread = threading.Thread(target=sys.exit, args=(3,))
    thread.start()
    thread.join()


def crash() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler._sigsegv()  # type: ignore[attr-defined]  # made for tests


def abort() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.abort()


#: Deaths at which Python code still runs: they wait for the tasks, as concurrent.futures does.
GRACEFUL: dict[str, Callable[[], object]] = {
    "exception": raise_an_error,
    "sys.exit": lambda: sys.exit(3),
    "sys.exit in a thread": exit_in_a_thread,
}
SUDDEN: dict[str, Callable[[], object]] = {
    "os._exit": lambda: os._exit(3),
    "crash": crash,
    "abort": abort,
    "SIGKILL": lambda: time.sleep(1000),  # from outside
    "SIGTERM": lambda: time.sleep(1000),
}


def main(settings: dict[str, Any]) -> None:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    folder, work, death = settings["folder"], settings["work"], settings["death"]
    spill = Path(folder).parent / "spilled"
    spill.mkdir()
    seconds = SHORT if death in GRACEFUL else 1000.0
    store = ObjectStore(capacity="40 MB", spill_dir=str(spill))  # some of it is spilled
    executor = ShmExecutor(
        WORKERS, settings["method"], sleep if work == "initializer" else None,
        (folder, seconds) if work == "initializer" else (), store=store,
    )  # fmt: skip
    held = [executor.put(np.ones(2_000_000)) for _ in range(4)]
    fn = WORKS.get(work, write_and_hold)
    ender = threading.Thread(
        target=_say_when_busy, args=(folder, work, settings["after"], death, executor)
    )
    ender.daemon = True
    ender.start()
    rng = random.Random(settings["seed"])
    results = []
    for number in itertools.count():
        array = held[number % 4] if number % 3 else np.ones(300_000)
        results.append(executor.submit(fn, folder, seconds, array))
        del results[: -rng.randint(4, 8)]
        if number >= WORKERS - 1 and work not in ("give_large_results", "load"):
            break
        if _begun.is_set() and death in GRACEFUL:
            break
        if number > 20:
            results[0].result()
    _begun.wait()
    {**GRACEFUL, **SUDDEN}[death]()


_begun = threading.Event()


def _say_when_busy(folder: str, work: str, after: float, death: str, executor: Any) -> None:
    """Say so when the workers are at work, and end this process from this thread where it can be."""
    wanted = 0 if work in ("starting", "load") else 1 if work == "initializer" else WORKERS
    while len(list(Path(folder).glob("*.begun"))) < wanted:
        time.sleep(0.002)
    time.sleep(after)
    print("busy", *helpers(os.getpid()), flush=True)
    if death in ("os._exit", "crash", "abort"):
        SUDDEN[death]()
    _begun.set()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
