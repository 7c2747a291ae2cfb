"""Scenario ``kill``: workers are killed and stopped at random while tasks pass arrays in every way that there is.

A run is made of rounds.  Each has an executor of its own, with random settings, and a random end: all is waited for,
or cancelled, or the workers are ended, or the executor is dropped.  After each round nothing may be left, and the
store's books, recounted after every change anyway, must say so.
"""

from __future__ import annotations

import contextlib
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from support import Holdings

from shmpool import ObjectStore, ShmExecutor

from . import tasks
from .chaos import Chaos
from .leftovers import check_nothing_is_left, note_first_and_last, take_stock
from .load import Circumstances, Load, check_sums
from .processes import send_signal
from .report import Report
from .tasks import Numbers
from .watchdog import Hang, Watchdog, state_of

METHODS = ("fork", "forkserver", "spawn", "loky")
ENDINGS = ("wait", "cancel", "kill", "terminate", "drop", "stopped")
#: Seconds from one kill or stop to the next: what starts a fresh interpreter for each worker is slow.
PAUSES = {"fork": 0.03, "forkserver": 0.15, "spawn": 0.25, "loky": 0.3}


@dataclass(frozen=True)
class Plan:
    """What a round is like."""

    number: int
    method: str
    ending: str
    kills: int
    template: bool  # kill the process that forks workers, too
    overlap: bool  # go on killing while the executor ends

    @classmethod
    def make(cls, number: int, method: str, kills: int, rng: random.Random) -> Plan:
        return cls(
            number=number,
            method=method,
            ending=rng.choice(ENDINGS),
            kills=kills,
            template=method == "fork" and rng.random() < 0.2,
            overlap=rng.random() < 0.5,
        )


def run(method: str, *, kills: int, seed: int, seconds: float = 1e9, fatal: bool = False) -> Report:
    """Until so many workers were killed, or so many seconds are over.

    Parameters
    ----------
    method : str
        How workers are started.
    kills : int
    seed : int
    seconds : float
    fatal : bool
        End this process if it hangs and nothing helps.
    """
    report = Report(f"kill, {method}", seed)
    total: Counter[str] = Counter()
    begin = time.monotonic()
    temporary = Path(tempfile.gettempdir())
    before = Holdings.now(temporary)
    first = {}
    number = total["hangs"] = 0
    while total["kills"] < kills and time.monotonic() - begin < seconds and not report.violations:
        rng = random.Random(f"{seed} {method} {number}")
        plan = Plan.make(number, method, min(kills - total["kills"], rng.randint(5, 60)), rng)
        try:
            _round(plan, rng, report, total, begin + seconds, fatal)
        except Hang as hang:
            total["hangs"] += 1
            report.violated(str(hang))
        check_nothing_is_left(str(plan), before, temporary, report)
        if report.violations:
            report.violated(f"that was in {plan}")
        total["rounds"] += 1
        first = first or take_stock(temporary)
        number += 1
    check_sums(total, report)
    report.figures = {name: total[name] for name in sorted(total)}
    note_first_and_last(first, temporary, report)
    report.figures["seconds"] = round(time.monotonic() - begin, 1)
    return report


def _round(
    plan: Plan, rng: random.Random, report: Report, total: Counter[str], until: float, fatal: bool
) -> None:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        store = ObjectStore()
        numbers = Numbers(rng.randrange(100), 30_000)
        executor = ShmExecutor(
            rng.randint(1, 4), plan.method, tasks.prepare,
            (str(folder), rng.choice((0.0, 0.01)), numbers.array(), numbers), store=store,
            max_tasks_per_child=rng.choice((None, None, 30 if plan.method == "fork" else 200)),
            idle_timeout=rng.choice((None, None, 0.5)), mmap_mode=rng.choice("ccr"),
        )  # fmt: skip
        circumstances = Circumstances()
        driver = executor._driver
        watchdog = stack.enter_context(
            Watchdog(folder, fatal=fatal, about=lambda: f"{plan}\n{state_of(driver)}")
        )
        load = Load(
            executor, store, rng, report, circumstances, watchdog, dear=plan.method != "fork"
        )
        chaos = Chaos(
            executor._processes, folder, random.Random(rng.random()), circumstances,
            pause=PAUSES[plan.method], most=plan.kills, template=_template(executor) if plan.template else None,
        )  # fmt: skip
        stack.callback(chaos.end)
        with chaos:
            while not chaos.done and not report.violations and time.monotonic() < until:
                load.step()
                watchdog.check()
            if not plan.overlap:
                chaos.end()
            _end(plan.ending, executor, load, circumstances, rng)
            del executor
            load.settle_all()
        watchdog.check()
        load.held.clear()
        if driver._lifetime.thread is not None:
            driver._lifetime.thread.join()  # what a map has given up may still have run
        if driver._foreman.table.tasks:
            report.violated(f"the driver has forgotten {len(driver._foreman.table.tasks)} tasks")
        total["tasks run again"] += driver.counts.retried
        total.update(load.tally)
        total.update(chaos.tally)
        del load
        store.verify()


def _template(executor: ShmExecutor) -> int:
    """The process from which workers are forked later."""
    executor.submit(tasks.minus, 1).result()  # it is there with the first of them
    process = executor._launcher._template._process
    return process.pid


def _end(
    how: str,
    executor: ShmExecutor,
    load: Load,
    circumstances: Circumstances,
    rng: random.Random,
) -> None:
    """End the executor, in one of the ways that there are."""
    load.end_hanging()
    if how == "wait":
        load.settle_all()
    elif how == "stopped":
        _shut_down_with_a_stopped_worker(executor, rng)
    elif how in ("kill", "terminate"):
        circumstances.ending = True
        {"kill": executor.kill_workers, "terminate": executor.terminate_workers}[how]()
    if how == "cancel":
        for sent in load.under_way:
            sent.cancelled = True
        executor.shutdown(wait=False, cancel_futures=True)
    if how == "drop":
        load.executor = None
        return
    load.executor = None
    executor.shutdown(wait=rng.random() < 0.7)


def _shut_down_with_a_stopped_worker(executor: ShmExecutor, rng: random.Random) -> None:
    """It waits for the worker, and ends when that goes on."""
    workers = list(executor._processes)
    victim = rng.choice(workers) if workers else None
    if victim is not None:
        send_signal(victim, signal.SIGSTOP)
    thread = threading.Thread(target=executor.shutdown)
    thread.start()
    time.sleep(rng.random() * 0.05)
    if victim is not None:
        send_signal(victim, signal.SIGCONT)
    thread.join()
