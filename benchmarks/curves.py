"""Costs as something grows, each curve in a process of its own: `python -m benchmarks.curves SPEC FILE`.

SPEC is JSON: curve, contender, workers, start_method, most (of what grows). FILE receives JSON:
points, each what grew to how much and the seconds; or status, error and traceback.
"""

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from . import tasks
from .contenders import NotInstalled, make
from .inputs import fresh_array

BUDGET = 0.3  # seconds of repetitions of one point
SMALL_ARRAY = 76_000  # bytes: just large enough for the store


@dataclass(frozen=True)
class Curve:
    """How a cost depends on something.

    Parameters
    ----------
    title : str
    x : str
        What grows.
    points : tuple of int
    measure : callable
        ``measure(contender, workers, start_method, points)``: yields seconds, a point each.
    linear : float
        The exponent of the cost if all the work is proportional to what grows: 1, or 0 where the
        cost is that of one more.
    contenders : tuple of str
        Who is measured.
    memory : int
        Bytes that a point needs, per unit of x.
    beside : str
        The curve that stands beside it: nothing can grow more slowly than that.
    """

    title: str
    x: str
    points: tuple[int, ...]
    measure: Callable[[str, int, str, tuple[int, ...]], Iterator[float]]
    linear: float = 1.0
    contenders: tuple[str, ...] = ("shmpool", "ppe", "pool")
    memory: int = 0
    beside: str = ""


def powers(first: int, last: int, steps: tuple[int, ...] = (1,)) -> tuple[int, ...]:
    """10**first to 10**last, each times each of `steps`."""
    return (*(10**power * step for power in range(first, last) for step in steps), 10**last)


def many_workers(name: str, _: int, start_method: str, points: tuple[int, ...]) -> Iterator[float]:
    for workers in points:
        contender = make(name, workers, start_method)
        contender.open()
        contender.map(tasks.nap, [0.05] * workers)
        yield median_of(lambda contender=contender: contender.map_singly(tasks.noop, range(10_000)))
        contender.close()


def many_tasks(
    name: str, workers: int, start_method: str, points: tuple[int, ...]
) -> Iterator[float]:
    contender = opened(name, workers, start_method)
    for count in points:
        yield median_of(lambda count=count: contender.map_singly(tasks.noop, range(count)))
    contender.close()


def large_arguments(
    name: str, workers: int, start_method: str, points: tuple[int, ...]
) -> Iterator[float]:
    contender = opened(name, workers, start_method)
    for nbytes in points:
        yield median_of(
            lambda array: contender.call(tasks.touch, array),
            lambda nbytes=nbytes: fresh_array(nbytes),
        )
    contender.close()


def large_results(
    name: str, workers: int, start_method: str, points: tuple[int, ...]
) -> Iterator[float]:
    contender = opened(name, workers, start_method)
    for nbytes in points:
        yield median_of(lambda nbytes=nbytes: tasks.touch(contender.call(tasks.produce, nbytes, 1)))
    contender.close()


def memcpy(_: str, workers: int, start_method: str, points: tuple[int, ...]) -> Iterator[float]:
    """Of the same bytes, onto warm memory."""
    limit = opened("limit", workers, start_method)
    for nbytes in points:
        array = fresh_array(nbytes).view(np.uint8)
        yield median_of(lambda array=array: limit.copy(array))
        limit.warm.clear()
    limit.close()


def live_results(
    name: str, workers: int, start_method: str, points: tuple[int, ...]
) -> Iterator[float]:
    """One more task with an array in and an array out, beside so many results that are kept."""
    contender = opened(name, workers, start_method)
    live: list[np.ndarray] = []
    for count in points:
        live += contender.map(increment_small, range(count - len(live)))
        yield median_of(
            lambda array: contender.call(tasks.increment, array), lambda: fresh_array(SMALL_ARRAY)
        )
    contender.close()


def increment_small(number: int) -> np.ndarray:
    return np.full(SMALL_ARRAY // 8, number, np.float64)


def live_objects(make_object: Callable[[int], object]):
    """One more put, and letting go of it, beside so many objects that are kept in the store."""

    def measure(_name: str, _workers: int, _method: str, points: tuple[int, ...]):
        import shmpool

        live: list[object] = []

        def put_and_drop() -> None:
            for number in range(100):
                shmpool.put(objects[number])

        for count in points:
            live += [shmpool.put(make_object(number)) for number in range(count - len(live))]
            objects = [make_object(number) for number in range(100)]
            yield median_of(put_and_drop) / 100

    return measure


def opened(name: str, workers: int, start_method: str):
    contender = make(name, workers, start_method)
    contender.open()
    contender.map(tasks.nap, [0.05] * workers * 2)
    return contender


def median_of(body: Callable[..., object], prepare: Callable[[], object] | None = None) -> float:
    """Seconds of one repetition, after one that is not counted."""
    samples: list[float] = []
    begin = time.perf_counter()
    for number in range(1000):
        arguments = (prepare(),) if prepare else ()
        start = time.perf_counter()
        body(*arguments)
        if number:
            samples.append(time.perf_counter() - start)
        if len(samples) >= 3 and time.perf_counter() - begin > BUDGET:
            break
    return statistics.median(samples)


CURVES = {
    "workers": Curve("10,000 tiny tasks", "workers", (1, 2, 4, 8, 16, 32, 64), many_workers),
    "tasks": Curve("tiny tasks, all of them", "tasks", powers(0, 4, (1, 3)), many_tasks),
    "arguments": Curve(
        "a fresh argument",
        "bytes",
        powers(3, 9, (1, 3)),
        large_arguments,
        memory=8,
        beside="memcpy",
    ),
    "results": Curve(
        "a result", "bytes", powers(3, 9, (1, 3)), large_results, memory=8, beside="memcpy"
    ),
    "memcpy": Curve(
        "memcpy", "bytes", powers(3, 9, (1, 3)), memcpy, contenders=("limit",), memory=4
    ),
    "live-results": Curve(
        "76 KB in and out, others alive",
        "live results",
        powers(1, 5, (1, 3)),
        live_results,
        linear=0,
        contenders=("shmpool", "ppe"),
        memory=80_000,
    ),
    "live-arrays": Curve(
        "put and drop 76 KB, others alive",
        "live arrays",
        powers(1, 5, (1, 3)),
        live_objects(lambda number: np.full(SMALL_ARRAY, number % 251, np.uint8)),
        linear=0,
        contenders=("shmpool",),
        memory=80_000,
    ),
    "live-objects": Curve(
        "put and drop a dict, others alive",
        "live objects",
        powers(1, 5, (1, 3)),
        live_objects(lambda number: {"number": number, "name": "x" * 20}),
        linear=0,
        contenders=("shmpool",),
    ),
}


def points_of(curve: Curve, most: float) -> tuple[int, ...]:
    """Those that fit into memory, and are not more than `most` of the highest."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") * 0.6
    return tuple(
        point
        for point in curve.points
        if point <= max(most * curve.points[-1], curve.points[2]) and point * curve.memory <= memory
    )


def main() -> None:
    spec = json.loads(sys.argv[1])
    curve = CURVES[spec["curve"]]
    points = points_of(curve, spec["most"])
    answer: dict = {"status": "ok", "points": []}
    try:
        seconds = curve.measure(spec["contender"], spec["workers"], spec["start_method"], points)
        answer["points"] += zip(points, seconds, strict=True)
    except NotInstalled as error:
        answer = {"status": "not installed", "error": str(error)}
    except BaseException as error:
        answer = {
            "status": "error",
            "error": f"{type(error).__name__}: {error}"[:200],
            "traceback": traceback.format_exc(),
        }
    with open(sys.argv[2] + ".part", "w") as file:
        json.dump(answer, file)
    os.rename(file.name, sys.argv[2])


if __name__ == "__main__":
    main()
