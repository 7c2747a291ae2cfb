"""Where the time of a task goes: `python -m benchmarks.stages arg-1mb partial`

    python -m benchmarks.stages arg-100mb        # a work of `python -m benchmarks`, by shmpool
    python -m benchmarks.stages --seconds 10 ... # the more repetitions, the less noise

A profiler that looks at every call would be most of what it sees, where the whole takes 30 us. This
one times some twenty functions, the stages of a task's way, in the parent and in the workers, each
without those of them that it calls: half a microsecond a stage. What is left is "the rest": the
Python code in between.

The figures are medians over repetitions of the work, so they do not add up to the median of the
whole. Workers run beside the parent and each other; what they do is inside of the parent's
"waits for answers", or does not count.
"""

import argparse
import functools
import importlib
import mmap
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from . import tasks
from .contenders import make
from .measure import Spec, _Race
from .report import markdown, quantity
from .works import WORKS

#: What stages are called, and the functions that they are: module, and name in it.
PARENT = {
    "pickles the arguments": ["serialize.pickling:Pickling.dumps"],
    "looks what is in the store": ["store.store:ObjectStore.plan"],
    "compares with what is there": ["memory.bulk:same"],
    "allocates": ["store.store:ObjectStore._allocate"],
    "makes pages, writes fresh ones": ["store.arena:OwnArena.populate"],
    "copies": ["memory.bulk:copy"],
    "writes the payload down": ["store.store:ObjectStore._pack"],
    "decides who gets the task": ["dispatch.driver:Driver.submit"],
    "sends the call": [
        "wire.channel:ParentEnd.send",
        "wire.channel:ParentEnd.send_many",
    ],
    "waits for answers": ["worker.process:WorkerHandle.wait"],
    "receives answers": ["wire.channel:ParentEnd.receive"],
    "enters answers": ["dispatch.answers:Answers._take"],
    "unpickles results, settles futures": ["dispatch.answers:Answers.deliver"],
    "lets go of blocks": ["store.books:Books.let_go", "store.books:Books._settle"],
}
WORKER = {
    "waits for a call, receives it": ["worker.main:_Worker._next"],
    "unpickles the function": ["worker.functions:Functions.load"],
    "maps and unpickles arguments": ["store.store:ObjectStore.load"],
    "the task": ["worker.main:_Worker._run"],
    "pickles the result": ["worker.main:_Worker._pack"],
    "looks whether the function changed": ["worker.functions:Functions.done"],
    "lets go of the arguments": ["store.books:Books._settle", "store.books:Books.let_go"],
    "what it keeps, for the parent": ["worker.main:_Worker._extras"],
    "sends the answer": ["wire.channel:WorkerEnd.send"],
    "answers, the rest": ["worker.main:_Worker._answer"],
}
REST = "the rest"
#: So many workers may there be.
SLOTS = 64


class Stages:
    """Sums of the nanoseconds spent in each stage, by all workers and the parent, in memory that they share.

    Only of the parent's main thread: that is the one whose time is measured.
    """

    def __init__(self) -> None:
        self.names = [("parent", name) for name in (*PARENT, REST)]
        self.names += [("worker", name) for name in WORKER]
        shared = mmap.mmap(-1, SLOTS * len(self.names) * 8)
        self._sums = np.frombuffer(shared, np.int64).reshape(SLOTS, len(self.names))
        self._parent = os.getpid()
        self._inside: list[
            list[int]
        ] = []  # of each stage under way, the time that others took in it

    def so_far(self) -> np.ndarray:
        """Nanoseconds by stage, of all processes."""
        return self._sums.sum(axis=0)

    def watch(self) -> None:
        """Replace the functions by such as are timed: in this process, and in all that it forks."""
        for side, stages in (("parent", PARENT), ("worker", WORKER)):
            for name, functions in stages.items():
                for function in functions:
                    module_name, _, path = function.partition(":")
                    holder: Any = importlib.import_module(f"shmpool.{module_name}")
                    *outer, last = path.split(".")
                    for part in outer:
                        holder = getattr(holder, part)
                    setattr(holder, last, self.timed(getattr(holder, last), side, name))

    def timed(self, function: Callable[..., Any], side: str, name: str) -> Callable[..., Any]:
        """The function, its time added to a stage, if it is called on that side."""
        stage = self.names.index((side, name))
        inside, clock, get_ident = self._inside, time.perf_counter_ns, threading.get_ident
        main = threading.main_thread().ident

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            pid = os.getpid()
            if (pid == self._parent) is (side == "worker") or get_ident() != main:
                return function(*args, **kwargs)
            inner = [0]
            inside.append(inner)
            begin = clock()
            try:
                return function(*args, **kwargs)
            finally:
                took = clock() - begin
                inside.pop()
                if inside:
                    inside[-1][0] += took
                self._sums[pid % SLOTS, stage] += took - inner[0]

        return timed


def profile(work_name: str, seconds: float, workers: int) -> str:
    """A table of a work's stages, slowest first."""
    work = WORKS[work_name]
    stages = Stages()
    stages.watch()
    contender = make("shmpool", workers, "fork")
    contender.open()
    contender.map(tasks.nap, [0.05] * workers * 2)
    race = _Race(work, contender, Spec(work_name, "shmpool", workers))
    rest = stages.names.index(("parent", REST))
    body = stages.timed(work.body, "parent", REST)
    for _ in range(3):
        race.repeat(work.items)
    whole, parts = [], []
    until = time.monotonic() + seconds
    while len(whole) < 3 or time.monotonic() < until:
        data = work.prepare(contender)
        before, start = stages.so_far(), time.perf_counter()
        result = body(contender, data, work.items)
        whole.append(time.perf_counter() - start)
        parts.append((stages.so_far() - before) / 1e9)
        work.check(data, result)
    contender.close()
    medians = np.median(parts, axis=0)
    assert medians[rest] > 0
    total = statistics.median(whole)
    rows = [["where", "stage", "time", "of the whole"]]
    for side in ("parent", "worker"):
        mine = [
            (seconds, name)
            for seconds, (where, name) in zip(medians, stages.names, strict=True)
            if where == side and seconds >= 0.0005 * total
        ]
        rows += [
            [side, name, quantity(seconds, "seconds"), f"{seconds / total:.1%}"]
            for seconds, name in sorted(mine, reverse=True)
        ]
    rows.append(["", "whole", quantity(total, "seconds"), f"of {len(whole)} repetitions"])
    return f"{work.title}\n\n{markdown(rows, left=(0, 1))}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages")
    steady = [
        name for name, work in WORKS.items() if work.kind == "steady" and work.is_for("shmpool")
    ]
    parser.add_argument("works", nargs="+", choices=steady, metavar="WORK", help=", ".join(steady))
    parser.add_argument("--seconds", type=float, default=5.0, help="for each work")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if len(args.works) == 1:
        print(profile(args.works[0], args.seconds, args.workers))
        return
    options = [f"--seconds={args.seconds}", f"--workers={args.workers}"]
    for name in args.works:  # the functions of a process are replaced once
        command = [sys.executable, "-m", "benchmarks.stages", name, *options]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
