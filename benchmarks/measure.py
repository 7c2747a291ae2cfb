"""One measurement, in a process of its own: `python -m benchmarks.measure SPEC FILE`.

SPEC is JSON: work, contender, workers, start_method, budget (seconds for the repetitions), patience
(seconds that one repetition may take, else fewer items are run and the figure scaled), warm_ups.
FILE receives JSON: either samples (and from how many items they are scaled), or status and error.
"""

import json
import os
import sys
import time
import traceback

import numpy as np

from . import tasks
from .contenders import Contender, NotInstalled, make
from .works import WORKS, Slices, Unavailable, Work

SETTLE = 0.3  # seconds for which memory is sampled before it grows


def main() -> None:
    spec = json.loads(sys.argv[1])
    contender = make(spec["contender"], spec["workers"], spec["start_method"])
    try:
        answer = _measure(WORKS[spec["work"]], contender, spec)
    except (NotInstalled, Unavailable) as error:
        answer = {"status": "not installed", "error": str(error)}
    except BaseException as error:  # whatever it is, it belongs into the table
        traceback.print_exc()
        error = getattr(error, "cause", None) or error  # what Ray wraps
        line = next(iter(str(error).strip().splitlines()), "")
        status = "refused" if _is_read_only(error) else "error"
        answer = {"status": status, "error": f"{type(error).__name__}: {line}"[:200]}
    with open(sys.argv[2] + ".part", "w") as file:  # before close, which may hang
        json.dump(answer, file)
    os.rename(file.name, sys.argv[2])
    if "samples" in answer:
        contender.close()


def _is_read_only(error: BaseException) -> bool:
    return "read-only" in str(error)


def _measure(work: Work, contender: Contender, spec: dict) -> dict:
    if work.kind == "start":
        start = time.perf_counter()
        contender.open()
        work.body(contender, None, 1)
        return {"samples": [time.perf_counter() - start]}

    contender.open()
    contender.map(tasks.nap, [0.05] * contender.workers * 2)  # all workers are up now
    if work.kind == "memory":
        return _measure_memory(work, contender)
    if work.kind == "cold":
        return {"samples": [_repeat_once(work, contender, 1)]}
    return _measure_steady(work, contender, spec)


def _measure_steady(work: Work, contender: Contender, spec: dict) -> dict:
    items = work.items
    if work.pilot < items:
        items, seconds = _affordable(work, contender, spec["patience"])
        if items < work.items:
            unit = items if work.per_item else items / work.items
            return {"samples": [seconds / unit], "scaled": items}
    else:
        seconds = 0.0
        for _ in range(spec["warm_ups"]):
            if seconds < 3 * spec["budget"]:
                seconds += _repeat_once(work, contender, items)
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < work.repetitions:
        samples.append(_repeat_once(work, contender, items))
        elapsed = time.perf_counter() - begin  # of which making the input may be the most
        if len(samples) >= 3 and (sum(samples) > spec["budget"] or elapsed > 2 * spec["budget"]):
            break
    return {"samples": [sample / (items if work.per_item else 1) for sample in samples]}


def _affordable(work: Work, contender: Contender, patience: float) -> tuple[int, float]:
    """How many items a repetition may have, found by trying more and more; and its seconds.

    Not by scaling the first try up, since the first items may cost more than all others.
    """
    items = work.pilot
    _repeat_once(work, contender, items)
    while True:
        seconds = _repeat_once(work, contender, items)
        if items == work.items:
            return items, seconds
        more = min(items * 4, work.items)
        if seconds * more / items > patience:
            return items, min(seconds, _repeat_once(work, contender, items))
        items = more


def _repeat_once(work: Work, contender: Contender, items: int) -> float:
    sliced = isinstance(work.body, Slices)
    data = work.body.prepare_with(contender) if sliced else work.prepare()
    start = time.perf_counter()
    result = work.body(contender, data, items)
    seconds = time.perf_counter() - start
    work.check(data, result)
    return seconds


def _measure_memory(work: Work, contender: Contender) -> dict:
    data = work.prepare()
    assert isinstance(data, np.ndarray)
    time.sleep(0.2)
    before = time.monotonic()
    time.sleep(SETTLE)
    start = time.monotonic()
    result = work.body(contender, data, work.items)
    time.sleep(0.1)
    stop = time.monotonic()
    work.check(data, result)
    return {"samples": [], "sampled": [before, start, stop]}


if __name__ == "__main__":
    main()
