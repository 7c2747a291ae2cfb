"""A watchdog: where nothing moves for too long, it says where everybody stands, and ends the hang."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from support import TIMEUNIT

from shmpool.dispatch.driver import Driver

from .processes import catches, command, continue_all, descendants, send_signal, status

#: Seconds without any progress after which something hangs.
PATIENCE = 60 * TIMEUNIT
#: What asks a worker that called :func:`soak.tasks.listen` for its tracebacks.
ASK = signal.SIGUSR1


class Hang(Exception):
    """Nothing moved; the message says where everybody stood."""


class Watchdog:
    """Watches over a ``with`` block that calls :meth:`beat` whenever there is progress.

    When there is none for :data:`PATIENCE` seconds, all stacks are written down, of this process and of the workers.
    Then all child processes are killed, which ends most hangs: :meth:`check` raises.  What does not end even so is
    ended with this process, if ``fatal``; under pytest the tests' own watchdog does that.

    Parameters
    ----------
    folder : Path
        Where workers write their stacks to.
    fatal : bool
        End this process in the end.
    about : callable
        Says what is going on.
    """

    def __init__(
        self, folder: Path, *, fatal: bool = False, about: Callable[[], str] = lambda: ""
    ) -> None:
        self._folder = folder
        self._about = about
        self._fatal = fatal
        self._last = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.stacks: str | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.check()

    def beat(self) -> None:
        """There is progress."""
        self._last = time.monotonic()

    def check(self) -> None:
        """Raise Hang if there was none."""
        if self.stacks is not None:
            raise Hang(self.stacks)

    def _watch(self) -> None:
        while not self._stop.wait(PATIENCE / 20):
            if time.monotonic() - self._last < PATIENCE:
                continue
            self.stacks = (
                f"nothing moved for {PATIENCE:g} s\n{self._about()}\n{all_stacks(self._folder)}"
            )
            if self._fatal:
                print(self.stacks, file=sys.__stderr__, flush=True)
            for pid in descendants(os.getpid()):
                send_signal(pid, signal.SIGKILL)
            if not self._stop.wait(PATIENCE / 2) and self._fatal:
                print("it hangs all the same; giving up", file=sys.__stderr__, flush=True)
                os._exit(70)
            return


def state_of(driver: Driver) -> str:
    """What a driver and its machine believe, read without their lock."""
    foreman = driver._foreman
    machine, fleet = foreman.machine, foreman.fleet
    names = (
        "closing",
        "stopped",
        "broken",
        "_sent",
        "_idle",
        "_room",
        "_pending",
        "_timed",
        "_retries",
    )
    lines = [f"machine: {', '.join(f'{name}={getattr(machine, name)!r}' for name in names)}"]
    lines += [
        f"worker {number}: {', '.join(f'{name}={getattr(worker, name)!r}' for name in worker.__slots__)}"
        for number, worker in list(machine._workers.items())
    ]
    if fleet is not None:
        lines += [
            f"fleet: {number}: pid {handle.pid}, {status(handle.pid).get('State', 'gone')}, "
            f"leading={handle.leading}, armed={handle.armed}, ready={handle.ready}, "
            f"problem={handle.end.problem}, reader locked={handle.reader.locked()}"
            for number, handle in [*fleet.workers.items(), *fleet.leaving.items()]
        ]
    lines += [
        f"task {number}: {task.function.name}, {task.future!r}, started={task.started}, "
        f"handle={task.handle and task.handle.number}, doom={task.doom!r}"
        for number, task in list(foreman.table.tasks.items())
    ]
    return "\n".join(lines)


def all_stacks(folder: Path) -> str:
    """Where all threads of this process and of its descendants are."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        parts = [f"this process, {os.getpid()}:\n{file.read()}"]
    family = descendants(os.getpid())
    states = {pid: status(pid).get("State", "gone") for pid in family}
    continue_all(family)
    for pid in family:
        if catches(pid, ASK):
            send_signal(pid, ASK)
    time.sleep(1)  # whoever does not answer by then cannot
    for pid in family:
        file_of_pid = folder / f"{pid}.stacks"
        text = file_of_pid.read_text() if file_of_pid.exists() else "(does not say)"
        parts.append(f"process {pid}, {states[pid]}, {command(pid)}:\n{text}")
    return "\n".join(parts)
