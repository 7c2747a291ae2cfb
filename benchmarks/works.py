"""What is measured. To add a work: a `Work` in `WORKS`.

A work's `prepare` makes the input of one repetition outside of the clock, `body` is timed, `check`
looks at its result outside of the clock again. Unless the notes say otherwise, the workers were
started and a few repetitions have run before the clock starts: the steady state is measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from . import tasks
from .contenders import Contender

KB, MB = 1 << 10, 10**6


class Unavailable(Exception):
    """This work needs something that is not installed."""


def _nothing():
    return None


def _accept(data, result):
    pass


@dataclass(frozen=True)
class Work:
    """One thing to measure.

    Parameters
    ----------
    name : str
        For the command line.
    title : str
        For the table.
    body : callable
        ``body(contender, data, items)``: what is timed.
    prepare : callable
        ``prepare()``: the input of one repetition. Called anew for each.
    check : callable
        ``check(data, result)``: raises AssertionError unless the answer is right.
    notes : str
        What is and is not in the figure.
    items : int
        Number of tasks that `body` makes, where it makes many.
    pilot : int
        A contender that would need too long for `items` runs fewer, but at least this many, and
        the figure is scaled.
    per_item : bool
        Show the time of one task instead of all.
    kind : str
        "steady": repetitions after a warm-up. "cold": one repetition in a fresh pool. "start": one
        repetition, and starting the pool is part of it. "memory": one repetition in a fresh pool,
        not timed; the figure is the growth of the tree's memory in bytes.
    repetitions : int
        At most so many.
    rounds : int
        At most so many, where the figure hardly varies.
    quick : bool
        Part of a quick run.
    """

    name: str
    title: str
    body: Callable[[Contender, Any, int], Any]
    prepare: Callable[[], Any] = _nothing
    check: Callable[[Any, Any], None] = _accept
    notes: str = ""
    items: int = 1
    pilot: int = 1
    per_item: bool = False
    kind: str = "steady"
    repetitions: int = 2000
    rounds: int = 1000
    quick: bool = True

    @property
    def unit(self) -> str:
        return "bytes" if self.kind == "memory" else "seconds"


# Inputs.

_numbers = count(1)
_base: dict[int, np.ndarray] = {}


def filled(nbytes: int) -> Callable[[], np.ndarray]:
    """One array of float64."""
    return lambda: np.random.default_rng(0).random(nbytes // 8)


def fresh(nbytes: int) -> Callable[[], np.ndarray]:
    """Arrays of float64 that nobody has seen: newly allocated, filled, each one different."""

    def prepare():
        if nbytes not in _base:
            _base[nbytes] = filled(nbytes)()
        return _base[nbytes] + next(_numbers)

    return prepare


def rows():
    number = next(_numbers)
    return [{"id": i, "name": f"row {i}", "value": number + i} for i in range(100_000)]


def frame(nbytes: int):
    def prepare():
        try:
            from pandas import DataFrame
        except ModuleNotFoundError:
            raise Unavailable("pandas is not installed") from None
        columns = fresh(nbytes)().reshape(10, -1)
        return DataFrame({f"column{i}": column for i, column in enumerate(columns)})

    return prepare


# Bodies.


def one_task(task):
    return lambda contender, data, _: contender.call(task, data)


def same_array_list(contender, array, items):
    return contender.map(tasks.total, [contender.put(array)] * items)


def same_array_generator(contender, array, items):
    shared = contender.put(array)
    return contender.map(tasks.total, (shared for _ in range(items)))


def chain(contender, array, items):
    return items, contender.chain(tasks.increment, array, items)


def result(nbytes: int, read):
    def body(contender, number, _):
        array = contender.call(tasks.produce, nbytes, number)
        return array[0], read(array)

    return body


class Slices:
    """The result that is sliced is made outside of the clock, so `prepare` needs the contender."""

    def __init__(self, nbytes):
        self.nbytes = nbytes

    def __call__(self, contender, whole, items):
        return contender.map(tasks.total, np.split(whole, items))

    def prepare_with(self, contender):
        return contender.call(tasks.produce, self.nbytes, next(_numbers))


# Checks.


def equals(task):
    """The task gives the same here; arrays may be summed in another order."""

    def check(data, result):
        expected = task(data)
        for value in result if isinstance(result, list) else [result]:
            assert np.isclose(value, expected, rtol=1e-9), f"wrong answer: {value}, not {expected}"

    return check


def check_result(number, result):
    assert result[0] == number, f"stale answer: {result[0]}, not {number}"


def check_chain(data, result):
    items, array = result
    assert np.allclose(array[::1000], data[::1000] + items), "wrong answer"


def check_partial(data, result):
    assert result == data[: len(result)].tolist(), "wrong answer"


def check_slices(whole, result):
    assert np.isclose(sum(result), whole.sum(), rtol=1e-9), "wrong answer"


def check_write(data, result):
    # `data` is what the caller still has: the task's writes must not show in it.
    assert np.isclose(result, data[0] + data[-1] + 2), "wrong answer, or the caller's array changed"


WORKS = {
    work.name: work
    for work in (
        Work(
            "start",
            "import, start, first result",
            lambda contender, *_: contender.call(tasks.noop),
            kind="start",
            notes="A fresh interpreter that has imported numpy; importing the package counts, its "
            "byte code exists.",
        ),
        Work(
            "latency",
            "one no-op task: submit, wait",
            lambda contender, *_: contender.call(tasks.noop),
        ),
        Work(
            "tiny",
            "10,000 no-op tasks, each",
            lambda contender, _, items: contender.map_singly(tasks.noop, range(items)),
            items=10_000,
            pilot=1000,
            per_item=True,
            notes="map with chunksize 1 (joblib: batch_size=1); time per task.",
        ),
        Work(
            "arg-64kb",
            "64 KB argument, fresh",
            one_task(tasks.touch),
            fresh(64 * KB),
            equals(tasks.touch),
            repetitions=500,
            notes="The task reads an element of each page.",
        ),
        Work(
            "arg-1mb",
            "1 MB argument, fresh",
            one_task(tasks.touch),
            fresh(MB),
            equals(tasks.touch),
            repetitions=300,
            notes="The task reads an element of each page.",
        ),
        Work(
            "result-1mb",
            "1 MB result",
            result(MB, tasks.touch),
            lambda: next(_numbers),
            check_result,
            repetitions=300,
            notes="The caller reads an element of each page. The worker keeps the array and "
            "changes one element each time.",
        ),
        Work(
            "arg-100mb",
            "100 MB argument, fresh, summed",
            one_task(tasks.total),
            fresh(100 * MB),
            equals(tasks.total),
        ),
        Work(
            "arg-100mb-first",
            "100 MB argument, the first ever",
            one_task(tasks.total),
            fresh(100 * MB),
            equals(tasks.total),
            kind="cold",
            quick=False,
            notes="The workers are started, but nothing large was passed before.",
        ),
        Work(
            "result-100mb",
            "100 MB result, summed",
            result(100 * MB, tasks.total),
            lambda: next(_numbers),
            check_result,
            notes="Summed by the caller. The worker keeps the array and changes one element "
            "each time.",
        ),
        Work(
            "same-list",
            "one 100 MB array to 40 tasks, list",
            same_array_list,
            fresh(100 * MB),
            equals(tasks.total),
            items=40,
            pilot=2,
            notes="Each task sums the array. A fresh array each repetition.",
        ),
        Work(
            "same-generator",
            "the same from a generator",
            same_array_generator,
            fresh(100 * MB),
            equals(tasks.total),
            items=40,
            pilot=2,
            quick=False,
        ),
        Work(
            "chain",
            "chain of 8 tasks, 64 MB in and out",
            chain,
            fresh(64 * MB),
            check_chain,
            items=8,
            pilot=2,
            notes="array + 1, eight times. Values go through the caller, but 'Ray + put' passes "
            "references.",
        ),
        Work(
            "slices",
            "64 slices of a 128 MB result",
            Slices(128 * MB),
            check=check_slices,
            items=64,
            pilot=64,
            notes="Getting the result (a fresh one each repetition) is outside of the clock; "
            "passing its 64 slices on and summing them is timed.",
        ),
        Work(
            "partial",
            "partial with a 32 MB array, 500 items",
            lambda contender, data, items: contender.map(
                contender.bind(tasks.partial_total, data), range(items)
            ),
            fresh(32 * MB),
            check_partial,
            items=500,
            pilot=4,
            notes="A fresh array each repetition; each item reads one element.",
        ),
        Work(
            "write",
            "task writes into its 32 MB argument",
            one_task(tasks.increment_in_place),
            fresh(32 * MB),
            check_write,
            notes="array += 1 in the task; the caller's array must not change.",
        ),
        Work(
            "dicts",
            "100,000 small dicts in, a number out",
            one_task(tasks.count_rows),
            rows,
            equals(tasks.count_rows),
        ),
        Work(
            "frame",
            "80 MB DataFrame argument, summed",
            one_task(tasks.frame_total),
            frame(80 * MB),
            equals(tasks.frame_total),
            quick=False,
        ),
        Work(
            "memory",
            "peak memory, one 200 MB array to 8 tasks",
            same_array_list,
            filled(200 * MB),
            equals(tasks.total),
            items=8,
            kind="memory",
            rounds=1,
            quick=False,
            notes="Of all processes together, shared pages once, beyond what they held "
            "before; the caller's own array, made before, does not count.",
        ),
    )
}
