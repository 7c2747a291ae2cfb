"""One measurement, in a process of its own: `python -m benchmarks.measure SPEC FILE`.

SPEC is a `Spec` as JSON. FILE receives JSON: either samples (and from how many items they are
scaled), or status, error and traceback.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from . import tasks
from .contenders import Contender, NotInstalled, make
from .work import Unavailable, Work
from .works import WORKS

SETTLE = 1.0  # seconds for which memory is sampled before it grows


@dataclass(frozen=True)
class Spec:
    """What is measured, and how long.

    Parameters
    ----------
    work, contender : str
    workers : int
        Worker processes.
    start_method : str
        For contenders that let one choose.
    budget : float
        Seconds of repetitions.
    patience : float
        Seconds that one repetition may take, else fewer items are run and the figure scaled.
    warm_ups : int
        Repetitions before the clock starts, unless they take too long.
    limit : float
        Seconds after which no repetition begins, except for the first.
    """

    work: str
    contender: str
    workers: int = 2
    start_method: str = "fork"
    budget: float = 1.0
    patience: float = 2.5
    warm_ups: int = 3
    limit: float = 20.0


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    contender = make(spec.contender, spec.workers, spec.start_method)
    answer = answer_of(WORKS[spec.work], contender, spec)
    with open(sys.argv[2] + ".part", "w") as file:  # before close, which may hang
        json.dump(answer, file)
    os.rename(file.name, sys.argv[2])
    if answer["status"] == "ok":
        contender.close()


def answer_of(work: Work, contender: Contender, spec: Spec) -> dict:
    """Measure; whatever goes wrong belongs into the table."""
    try:
        return {"status": "ok"} | _measure(work, contender, spec)
    except (NotInstalled, Unavailable) as error:
        return {"status": "not installed", "error": str(error)}
    except BaseException as error:
        text = traceback.format_exc()
        print(text, file=sys.stderr)
        error = getattr(error, "cause", None) or error  # what Ray wraps
        line = next(iter(str(error).strip().splitlines()), "")
        # Who gives tasks read-only arrays may say so; others have no excuse.
        status = "refused" if "read-only" in str(error) else "error"
        return {
            "status": status,
            "error": f"{type(error).__name__}: {line}"[:200],
            "traceback": text,
        }


def _measure(work: Work, contender: Contender, spec: Spec) -> dict:
    if work.kind == "start":
        start = time.perf_counter()
        contender.open()
        work.body(contender, None, 1)
        return {"samples": [time.perf_counter() - start]}

    if work.kind == "peak":
        return _measure_memory(work, contender, contender.open)
    contender.open()
    contender.map(tasks.nap, [0.05] * contender.workers * 2)  # all workers are up now
    if work.kind == "growth":
        return _measure_memory(work, contender)
    race = _Race(work, contender, spec)
    if work.kind == "cold":
        return {"samples": [race.repeat(1)], "value": race.value}
    samples, scaled = race.run()
    per = work.items if work.per_item else 1
    answer = {"samples": [sample / per for sample in samples], "value": race.value}
    return answer | ({"scaled": scaled} if scaled else {})


class _Race:
    """Repetitions of a work by a contender."""

    def __init__(self, work: Work, contender: Contender, spec: Spec):
        self.work = work
        self.contender = contender
        self.spec = spec
        self.begin = time.perf_counter()
        self.value = None  # what the checks returned

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.begin

    def run(self) -> tuple[list[float], int | None]:
        """Seconds of each repetition; and of how many items, if not all were affordable."""
        work, spec = self.work, self.spec
        if work.pilot < work.items:
            items, estimate = self._affordable()
            if items < work.items:
                return [estimate], items
        else:
            self._warm_up()
        samples: list[float] = []
        begin = time.perf_counter()
        while len(samples) < work.repetitions:
            samples.append(self.repeat(work.items))
            spent = time.perf_counter() - begin  # of which making the input may be the most
            enough = sum(samples) > spec.budget or spent > 2 * spec.budget
            if (len(samples) >= 3 and enough) or self.elapsed > spec.limit:
                break
        return samples, None

    def _warm_up(self) -> None:
        seconds = 0.0
        for _ in range(self.spec.warm_ups):
            if seconds < 3 * self.spec.budget and self.elapsed < self.spec.limit / 2:
                seconds += self.repeat(self.work.items)

    def _affordable(self) -> tuple[int, float]:
        """How many items a repetition may have, by trying more and more, and the seconds of all.

        What more of them would take is told from the difference between the last two tries: a call
        may cost something by itself, and then that must not be multiplied.
        """
        work, patience = self.work, self.spec.patience
        items = work.pilot
        self.repeat(items)  # warms up
        seconds = self.repeat(items)
        each, patience_now = seconds / items, 4 * patience  # one try cannot tell what an item takes
        while items < work.items:
            more = min(4 * items, work.items)
            too_long = seconds + each * (more - items) > patience_now
            if too_long or self.elapsed > self.spec.limit:
                return items, seconds + each * (work.items - items)
            fewer, before, items = items, seconds, more
            seconds = self.repeat(items)
            each, patience_now = max(0.0, seconds - before) / (items - fewer), patience
        return items, seconds

    def repeat(self, items: int) -> float:
        """Seconds of one repetition with so many items."""
        data = self.work.prepare(self.contender)
        start = time.perf_counter()
        result = self.work.body(self.contender, data, items)
        seconds = time.perf_counter() - start
        self.value = self.work.check(data, result)
        return seconds


def _measure_memory(
    work: Work, contender: Contender, begin: Callable[[], None] = lambda: None
) -> dict:
    data = work.prepare(contender)
    before = time.monotonic()
    time.sleep(SETTLE)
    start = time.monotonic()
    begin()
    result = work.body(contender, data, work.items)
    time.sleep(0.1)
    stop = time.monotonic()
    return {"samples": [], "sampled": [before, start, stop], "value": work.check(data, result)}


if __name__ == "__main__":
    main()
