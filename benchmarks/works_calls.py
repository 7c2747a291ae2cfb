"""What is measured: calls and maps with functions and arrays."""

import numpy as np

from . import tasks
from .inputs import KB, MB, filled, frame, fresh, number, produced, rows
from .work import Reach, Work

# Bodies.


def one_task(task):
    return lambda contender, data, _: contender.call(task, data)


def result(task, nbytes: int, read):
    def body(contender, start, _):
        array = contender.call(task, nbytes, start)
        return array[0], read(array)

    return body


def same_array(contender, array, items):
    return contender.map_same(tasks.total, array, items)


def same_array_generated(contender, array, items):
    return contender.map_same_generated(tasks.total, array, items)


def bound(contender, array, items):
    return contender.map_bound(tasks.element, array, range(items))


def chain(contender, array, items):
    return items, contender.chain(tasks.increment, array, items)


def parts(contender, made, items):
    return contender.map_parts(tasks.total, made[1], items)


# Checks.


def equals(task):
    """The task gives the same here; arrays may be summed in another order."""

    def check(data, result):
        expected = task(data)
        for value in result if isinstance(result, list) else [result]:
            assert np.isclose(value, expected, rtol=1e-9), f"wrong answer: {value}, not {expected}"

    return check


def check_result(start, result):
    assert result[0] == start, f"stale answer: {result[0]}, not {start}"


def check_chain(data, result):
    items, array = result
    assert np.allclose(array[::1000], data[::1000] + items), "wrong answer"


def check_bound(data, result):
    assert result == data[: len(result)].tolist(), "wrong answer"


def check_parts(nbytes):
    size = nbytes // 8

    def check(made, result):
        expected = size * (size - 1) // 2 + made[0]  # 0 + 1 + 2 ..., of which the first is replaced
        assert sum(result) == expected, f"wrong or stale answer: {sum(result)}, not {expected}"

    return check


def check_write(data, result):
    # `data` is what the caller still has: the task's writes must not show in it.
    assert np.isclose(result, data[0] + data[-1] + 2), "wrong answer, or the caller's array changed"


CALLS = (
    Work(
        "memcpy",
        "memcpy of 100 MB",
        lambda limit, array, _: limit.copy(array.view(np.uint8)),
        fresh(100 * MB),
        contenders=("limit",),
        notes="np.copyto onto memory that was written before.",
    ),
    Work(
        "ping",
        "socketpair ping-pong of 1 byte",
        lambda limit, *_: limit.ping(1),
        contenders=("limit",),
        notes="Between two processes that do nothing else.",
    ),
    Work(
        "start",
        "import, start, first result",
        lambda contender, *_: contender.call(tasks.noop),
        kind="start",
        reach=(Reach(0.5, "ppe"),),
        notes="A fresh interpreter that has imported numpy; importing the package counts, its "
        "byte code exists.",
    ),
    Work(
        "latency",
        "one no-op task: submit, wait",
        lambda contender, *_: contender.call(tasks.noop),
        reach=(Reach(1.5, "pool"),),
    ),
    Work(
        "tiny",
        "10,000 no-op tasks, each",
        lambda contender, _, items: contender.map_singly(tasks.noop, range(items)),
        items=10_000,
        pilot=1000,
        per_item=True,
        reach=(Reach(1.2, "pool"),),
        notes="map with chunksize 1 (joblib: batch_size=1); time per task.",
    ),
    Work(
        "arg-64kb",
        "64 KB argument, fresh",
        one_task(tasks.touch),
        fresh(64 * KB),
        equals(tasks.touch),
        repetitions=500,
        reach=(Reach(1.2),),
        notes="The task reads an element of each page.",
    ),
    Work(
        "arg-1mb",
        "1 MB argument, fresh",
        one_task(tasks.touch),
        fresh(MB),
        equals(tasks.touch),
        repetitions=300,
        reach=(Reach(12),),
        notes="The task reads an element of each page.",
    ),
    Work(
        "result-1mb",
        "1 MB result",
        result(tasks.produce, MB, tasks.touch),
        number,
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
        reach=(Reach(6, "joblib"), Reach(20, "pool")),
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
        result(tasks.produce, 100 * MB, tasks.total),
        number,
        check_result,
        reach=(Reach(10),),
        notes="Summed by the caller. The worker keeps the array and changes one element each time.",
    ),
    Work(
        "result-100mb-new",
        "100 MB result, made by the task, summed",
        result(tasks.create, 100 * MB, tasks.total),
        number,
        check_result,
        quick=False,
        notes="np.full in the worker, which asks the system for new memory each time, is part of it.",
    ),
    Work(
        "same-list",
        "one 100 MB array to 40 tasks, list",
        same_array,
        fresh(100 * MB),
        equals(tasks.total),
        items=40,
        pilot=2,
        reach=(Reach(4),),
        notes="Each task sums the array. A fresh array each repetition.",
    ),
    Work(
        "same-generator",
        "the same from a generator",
        same_array_generated,
        fresh(100 * MB),
        equals(tasks.total),
        items=40,
        pilot=2,
        reach=(Reach(),),
        quick=False,
        notes="shmpool compares the array each time; others that send it once would deliver it "
        "stale if it changed. References (Ray, dask) are made before.",
    ),
    Work(
        "chain",
        "chain of 8 tasks, 64 MB in and out",
        chain,
        fresh(64 * MB),
        check_chain,
        items=8,
        pilot=2,
        reach=(Reach(7),),
        notes="array + 1, eight times. Values go through the caller, except where there are references.",
    ),
    Work(
        "slices",
        "64 slices of a 128 MB result",
        parts,
        produced(128 * MB),
        check_parts(128 * MB),
        items=64,
        pilot=64,
        reach=(Reach(6),),
        notes="Getting the result (a fresh one each repetition) is outside of the clock; "
        "passing its 64 slices on and summing them is timed. Where there are references, tasks "
        "get the whole and sum their part.",
    ),
    Work(
        "partial",
        "partial with a 32 MB array, 500 items",
        bound,
        fresh(32 * MB),
        check_bound,
        items=500,
        pilot=4,
        reach=(Reach(3),),
        notes="A fresh array each repetition; each item reads one element.",
    ),
    Work(
        "write",
        "task writes into its 32 MB argument",
        one_task(tasks.increment_in_place),
        fresh(32 * MB),
        check_write,
        reach=(Reach(4),),
        notes="array += 1 in the task; the caller's array must not change.",
    ),
    Work(
        "dicts",
        "100,000 small dicts in, a number out",
        one_task(tasks.count_rows),
        rows,
        equals(tasks.count_rows),
        reach=(Reach(),),
    ),
    Work(
        "frame",
        "80 MB DataFrame argument, summed",
        one_task(tasks.frame_total),
        frame(80 * MB),
        equals(tasks.frame_total),
        reach=(Reach(8),),
        quick=False,
    ),
    Work(
        "memory",
        "peak memory, one 200 MB array to 8 tasks",
        same_array,
        lambda _contender: filled(200 * MB),
        equals(tasks.total),
        items=8,
        kind="growth",
        reach=(Reach(at_most=1.05 * 200 * MB),),
        quick=False,
        notes="Of all processes together, shared pages once, beyond what they held "
        "before; the caller's own array, made before, does not count.",
    ),
)
