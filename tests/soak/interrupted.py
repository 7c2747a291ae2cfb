"""A program that is about to be interrupted.  Settings come as JSON in the first argument.

``method``: how workers are started; ``work``: what it does, for some seconds if nothing happens; ``seed``; ``folder``.
It knows nothing of Ctrl-C.  It says ``ready`` when all is imported that it imports itself.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import numpy as np

import shmpool

from . import tasks

#: The seconds that it goes on for, and that its longest tasks take.
LIFE, LONG = 1.5, 2.0


def rounds() -> Iterator[int]:
    """For as long as it lives."""
    end = time.monotonic() + LIFE
    return itertools.takewhile(lambda _: time.monotonic() < end, itertools.count())


def executor(method: str, rng: random.Random) -> shmpool.ShmExecutor:
    return shmpool.ShmExecutor(rng.randint(1, 3), method)


def submit(method: str, rng: random.Random) -> None:
    with executor(method, rng) as ex:
        for i in rounds():
            assert ex.submit(tasks.minus, i).result() == -i


def submit_many(method: str, rng: random.Random) -> None:
    with executor(method, rng) as ex:
        for _ in rounds():
            waiting = [ex.submit(tasks.minus, i) for i in range(rng.randint(1, 300))]
            futures.wait(waiting)
            for future in futures.as_completed(waiting):
                future.result()


def map_many(method: str, rng: random.Random) -> None:
    with executor(method, rng) as ex:
        for _ in rounds():
            n = rng.randint(1, 3000)
            assert sum(ex.map(tasks.minus, range(n), chunksize=rng.choice((1, 7)))) <= 0


def arrays(method: str, rng: random.Random) -> None:
    with executor(method, rng) as ex:
        kept: list[Any] = []
        for _ in rounds():
            sent = [np.ones(rng.choice((10, 50_000, 300_000))) for _ in range(5)]
            kept = list(ex.map(np.negative, sent + kept[:2]))


def executors(method: str, rng: random.Random) -> None:
    for _ in rounds():
        ex = executor(method, rng)
        waiting = [ex.submit(tasks.minus, i) for i in range(rng.randint(0, 4))]
        ex.shutdown(wait=rng.random() < 0.7, cancel_futures=rng.random() < 0.3)
        del waiting


def replaced(method: str, rng: random.Random) -> None:
    with shmpool.ShmExecutor(2, method, max_tasks_per_child=1) as ex:
        for _ in rounds():
            list(ex.map(tasks.minus, range(4)))


def long_tasks(method: str, rng: random.Random) -> None:
    with executor(method, rng) as ex:
        list(ex.map(time.sleep, [LONG * rng.random() for _ in range(6)]))


def left_running(method: str, rng: random.Random) -> None:
    ex = executor(method, rng)
    for _ in range(3):
        ex.submit(time.sleep, LONG * rng.random())
    _kept.append(ex)


def pool_map(method: str, rng: random.Random) -> None:
    with shmpool.Pool(2, context=method) as pool:
        for i in rounds():
            assert sum(pool.map(tasks.minus, range(1000), rng.choice((None, 1)))) < 0
            pool.apply_async(tasks.minus, (i,), callback=_kept.append).get()


def pool_imap(method: str, rng: random.Random) -> None:
    with shmpool.Pool(2, context=method) as pool:
        for _ in rounds():
            take = rng.choice((pool.imap, pool.imap_unordered))
            for _ in itertools.islice(take(tasks.minus, iter(range(2000))), rng.randint(1, 2000)):
                pass


def pools(method: str, rng: random.Random) -> None:
    for _ in rounds():
        pool = shmpool.Pool(2, context=method)
        result = pool.map_async(tasks.minus, range(10))
        if rng.random() < 0.5:
            pool.close()
            pool.join()
            result.get()
        else:
            pool.terminate()


_kept: list[Any] = []
WORK: dict[str, Callable[[str, random.Random], None]] = {
    function.__name__: function
    for function in (
        submit, submit_many, map_many, arrays, executors, replaced, long_tasks, left_running,
        pool_map, pool_imap, pools,
    )
}  # fmt: skip


def main(settings: dict[str, Any]) -> None:
    faulthandler.register(signal.SIGUSR1)
    work = WORK[settings["work"]]
    _ = shmpool.ShmExecutor, shmpool.Pool  # imported when they are first asked for
    print("ready", flush=True)
    work(settings["method"], random.Random(settings["seed"]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
