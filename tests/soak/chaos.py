"""Chaos: a thread that kills and stops workers at random."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from .load import Circumstances
from .processes import is_alive, send_signal

#: So many pauses after it was about to be ready, a worker surely is.
GROWS_UP = 3
#: What a worker is said to have ended with when the process that could have known has ended before it.
UNKNOWN = 255


class Chaos:
    """Kills, stops and continues workers while a ``with`` block runs.

    Three workers in a row that die before they are ready break a pool, as they should: so no second one is killed young
    before another one, which has started since, has grown up.

    Parameters
    ----------
    workers : mapping of int
        The workers' pids, as they are at any time.
    folder : Path
        Where each worker leaves ``<pid>.started`` when it is about to be ready.
    rng : random.Random
    circumstances : Circumstances
        Where it is entered who was killed.
    pause : float
        Seconds from one deed to the next, on average.
    most : int
        So many kills at the most.
    template : int or None
        A process to be killed once as well, from which workers are forked.
    """

    def __init__(
        self,
        workers: Mapping[int, object],
        folder: Path,
        rng: random.Random,
        circumstances: Circumstances,
        *,
        pause: float,
        most: int,
        template: int | None = None,
    ) -> None:
        self._workers = workers
        self._folder = folder
        self._rng = rng
        self._circumstances = circumstances
        self._pause = pause
        self._most = most
        self._template = template
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos")
        self._stopped: dict[int, tuple[float, int]] = {}  # until when; a descriptor of the process
        self._killed_young: set[int] = set()
        self._last_young = 0.0  # when one was killed
        self.tally: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """No more of it.  May be called twice."""
        self._stop.set()
        self._thread.join()

    @property
    def done(self) -> bool:
        return self.tally["kills"] >= self._most

    def _run(self) -> None:
        deadline = 0.0
        while not self._stop.is_set():
            now = time.monotonic()
            if now >= deadline and not self.done:
                self._do_something(now)
                deadline = now + self._rng.expovariate(1 / self._pause)
            self._wake(now)
            awake = [until for until, _ in self._stopped.values()]
            until = min([deadline if not self.done else now + 0.1, *awake])
            self._stop.wait(max(0.0, until - time.monotonic()))
        self._wake(float("inf"))

    def _do_something(self, now: float) -> None:
        workers = list(self._workers)
        if not workers:
            return
        pid = self._rng.choice(workers)
        roll = self._rng.random()
        if self._template is not None and roll < 0.1:
            self._circumstances.exitcodes.add(UNKNOWN)
            send_signal(self._template, signal.SIGKILL)
            self._template = None
            self.tally["templates killed"] += 1
        elif roll < 0.65:
            self._kill(pid)
        elif pid not in self._stopped:
            with contextlib.suppress(ProcessLookupError):
                process = os.pidfd_open(pid)
                self._stopped[pid] = now + self._rng.random() * 0.06, process
                signal.pidfd_send_signal(process, signal.SIGSTOP)
                self.tally["stops"] += 1

    def _kill(self, pid: int) -> None:
        grown = self._grown_up()
        if pid not in grown:
            if self._last_young and all(since < self._last_young for since in grown.values()):
                return
            self._last_young = time.time()
            self._killed_young.add(pid)
            if not (self._folder / f"{pid}.started").exists():
                self.tally["killed before they had started"] += 1
        if pid not in self._workers or not is_alive(pid):
            return
        if pid not in self._circumstances.killed:
            self.tally["kills"] += 1
            self.tally["killed while stopped"] += pid in self._stopped
        self._circumstances.killed.add(pid)
        send_signal(pid, signal.SIGKILL)

    def _grown_up(self) -> dict[int, float]:
        """When workers started that are surely ready by now, or were: on a busy system it takes them a while."""
        young = time.time() - GROWS_UP * self._pause
        started = {int(file.stem): file.stat().st_mtime for file in self._folder.glob("*.started")}
        return {
            pid: since
            for pid, since in started.items()
            if since < young and pid not in self._killed_young
        }

    def _wake(self, now: float) -> None:
        # By descriptor: one that has been retired is no worker any more, and if its template was killed, no descendant.
        for pid, (until, process) in list(self._stopped.items()):
            if until <= now:
                del self._stopped[pid]
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGCONT)
                os.close(process)
