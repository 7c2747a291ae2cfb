"""Rounds of measurements."""

from collections.abc import Iterator
from dataclasses import dataclass

from . import processes
from .works import WORKS


@dataclass(frozen=True)
class Options:
    """What is run, and how long.

    Parameters
    ----------
    works, contenders : tuple of str
        Names; of contenders, "limit" and "inline" too.
    workers : int
        Worker processes.
    rounds : int
        Measurements of each work by each contender.
    start_method : str
        For contenders that let one choose.
    budget : float
        Seconds of repetitions in a measurement.
    patience : float
        Seconds that one repetition may take before a contender runs fewer items.
    warm_ups : int
        Repetitions before the clock starts.
    limit : float
        Seconds after which a measurement begins no more repetitions. After three times as many
        (starting and the first repetition may take long) it is given up.
    """

    works: tuple[str, ...]
    contenders: tuple[str, ...]
    workers: int = 2
    rounds: int = 5
    start_method: str = "fork"
    budget: float = 1.0
    patience: float = 2.5
    warm_ups: int = 3
    limit: float = 20.0


def run(options: Options) -> Iterator[tuple[int, str, str, dict]]:
    """Yield (round, work, contender, answer) as they come; all take turns in being first."""
    hopeless = set()
    if "start" in options.works:
        for contender in options.contenders:
            if WORKS["start"].is_for(contender):
                measure("start", contender, options)  # not counted: byte code and files are cached
    for number in range(options.rounds):
        turn = number % len(options.contenders)
        order = options.contenders[turn:] + options.contenders[:turn]
        for work in options.works:
            for contender in order:
                # Who has failed would only cost time again.
                if (work, contender) in hopeless or not WORKS[work].is_for(contender):
                    continue
                answer = measure(work, contender, options)
                if answer["status"] != "ok":
                    hopeless.add((work, contender))
                yield number, work, contender, answer


def measure(work: str, contender: str, options: Options) -> dict:
    """One measurement in a fresh process: its samples, or a status and an error."""
    spec = {
        "work": work,
        "contender": contender,
        "workers": options.workers,
        "start_method": options.start_method,
        "budget": options.budget,
        "patience": options.patience,
        "warm_ups": options.warm_ups,
        "limit": options.limit,
    }
    answer = processes.answer_of(
        "benchmarks.measure", spec, 3 * options.limit, sample_memory=WORKS[work].is_memory
    )
    if WORKS[work].kind == "peak" and "peak" in answer:
        answer["samples"] = [answer["peak"]]
    return answer
