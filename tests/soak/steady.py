"""Scenario ``steady``: very many tasks through one executor.  Is it at the end as it was at the start?

Memory of this process and of the workers is fitted by a line over the tasks that went through, after a warm-up; its
slope must be nothing.  Descriptors must stay the same, and a task at the end take as long as one at the start.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from support import Holdings

from shmpool import ObjectStore, ShmExecutor

from . import tasks
from .leftovers import check_nothing_is_left
from .processes import resident
from .report import Report
from .tasks import Numbers
from .watchdog import Watchdog

#: Items of a large array: 1 MB.
LARGE = 125_000
#: Tasks are submitted so many at a time, then their results are taken.
BATCH = 1000
#: Share of the samples at the start that the fit leaves out.
WARM_UP = 0.2
#: Bytes by which a process's own memory may seem to grow over a whole run: pages that the allocator holds on to.
NOISE = 6_000_000


@dataclass
class Samples:
    """What was measured, in the order of time."""

    done: list[int] = field(default_factory=list)  # tasks so far
    own: dict[str, list[int]] = field(default_factory=dict)  # bytes, by process
    shared: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)  # seconds, medians

    def take(self, done: int, executor: ShmExecutor) -> None:
        gc.collect()
        self.done.append(done)
        shared = 0
        for name, pid in [
            ("parent", os.getpid()),
            *((f"worker {i}", pid) for i, pid in enumerate(sorted(executor._processes))),
        ]:
            own, its = resident(pid)
            self.own.setdefault(name, []).append(own)
            shared = max(shared, its)
        self.shared.append(shared)
        self.descriptors.append(len(os.listdir("/proc/self/fd")))
        self.latency.append(median_latency(executor))

    def growth(self, values: list[int]) -> tuple[float, float]:
        """Bytes that a process grows by in a task, and in the whole run, by a line through the samples."""
        first = int(len(self.done) * WARM_UP)
        done, rest = self.done[first:], values[first:]
        slope = float(np.polyfit(done, rest, 1)[0])
        return slope, slope * (done[-1] - done[0])


def median_latency(executor: ShmExecutor, times: int = 200) -> float:
    """Seconds from ``submit`` to the result of a tiny task."""
    took = []
    for number in range(times):
        begin = time.perf_counter()
        executor.submit(tasks.minus, number).result()
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


def run(
    *,
    tiny: int,
    large: int,
    seed: int,
    seconds: float = 1e9,
    workers: int = 2,
    method: str = "fork",
    fatal: bool = False,
) -> Report:
    """So many tiny tasks and so many large ones (1 MB in, 1 MB out), mixed, or until the time is over."""
    report = Report(f"steady, {method}", seed)
    temporary = Path(tempfile.gettempdir())
    before = Holdings.now(temporary)
    begin = time.monotonic()
    samples = Samples()
    rng = random.Random(seed)
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        Watchdog(Path(folder), fatal=fatal) as watchdog,
    ):
        for done in _work(folder, workers, method, tiny, large, rng, samples, report):
            watchdog.beat()
            report.figures["tasks"] = done
            if time.monotonic() - begin > seconds and len(samples.done) > 3:
                break
    report.figures["seconds"] = round(time.monotonic() - begin, 1)
    _judge(samples, report)
    check_nothing_is_left("steady", before, temporary, report)
    return report


def _work(
    folder: str,
    workers: int,
    method: str,
    tiny: int,
    large: int,
    rng: random.Random,
    samples: Samples,
    report: Report,
) -> Iterator[int]:
    """Do it; yields how many tasks are done, often."""
    rounds = max(25, (tiny + large) // 40_000)
    array = Numbers(0, LARGE).array()
    done = 0
    with ShmExecutor(workers, method, tasks.listen, (folder,), store=ObjectStore()) as executor:
        for number in range(rounds):
            tiny_left = _share(tiny, rounds, number)
            while tiny_left:
                now = min(BATCH, tiny_left)
                _tiny_tasks(executor, now, rng, report)
                tiny_left -= now
                done += now
                yield done
            for _ in range(_share(large, rounds, number)):
                _large_task(executor, array, rng, report)
                done += 1
                yield done
            samples.take(done, executor)


def _share(total: int, parts: int, number: int) -> int:
    """How many of ``total`` part ``number`` of ``parts`` has."""
    return total * (number + 1) // parts - total * number // parts


def _tiny_tasks(executor: ShmExecutor, number: int, rng: random.Random, report: Report) -> None:
    first = rng.randrange(1 << 40)
    if rng.random() < 0.5:
        results = executor.map(tasks.minus, range(first, first + number))
    else:
        futures = [executor.submit(tasks.minus, first + i) for i in range(number)]
        results = (future.result() for future in futures)
    if list(results) != [-first - i for i in range(number)]:
        report.violated("tiny tasks gave wrong results")


def _large_task(executor: ShmExecutor, array: Any, rng: random.Random, report: Report) -> None:
    by = rng.randrange(1000)
    array[0] = by  # so it is another array each time
    result = executor.submit(tasks.shifted, array, by).result()
    if result[0] != 2 * by or result[-1] != array[-1] + by or len(result) != len(array):
        report.violated("a large task gave a wrong result")


def _judge(samples: Samples, report: Report) -> None:
    figures = report.figures
    for name, values in samples.own.items():
        if len(values) < len(samples.done):
            report.violated(f"{name} has not been there all the time")
            continue
        slope, growth = samples.growth(values)
        figures[f"{name}: own memory at the end, MB"] = round(values[-1] / 1e6, 1)
        figures[f"{name}: growth, bytes a task"] = round(slope, 3)
        figures[f"{name}: growth in all, kB"] = round(growth / 1000)
        if growth > NOISE:
            report.violated(f"{name} grew by {growth:,.0f} bytes in {samples.done[-1]:,} tasks")
    figures["shared memory mapped at the end, MB"] = round(samples.shared[-1] / 1e6, 1)
    if samples.growth(samples.shared)[1] > NOISE:
        report.violated("the memory that is shared grew")
    figures["descriptors at the start, at the end"] = (
        f"{samples.descriptors[0]}, {samples.descriptors[-1]}"
    )
    half = len(samples.descriptors) // 2
    if max(samples.descriptors[half:]) > max(samples.descriptors[:half]):
        report.violated(f"descriptors became more: {samples.descriptors}")
    third = max(1, len(samples.latency) // 3)
    start, end = (
        statistics.median(part) * 1e6
        for part in (samples.latency[:third], samples.latency[-third:])
    )
    figures["latency in the first third, us"] = round(start, 1)
    figures["latency in the last third, us"] = round(end, 1)
    if end > 3 * start:  # the machine has other things to do as well
        report.violated(f"a task took {start:.0f} us at the start and {end:.0f} us at the end")
