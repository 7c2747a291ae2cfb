"""What a work is, and what shmpool is to reach in it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from .contenders import BOUNDS, CONTENDERS, Contender


class Unavailable(Exception):
    """This work needs something that is not installed."""


@dataclass(frozen=True)
class Reach:
    """What shmpool is to reach: so many times better than another in the same run, or a figure.

    Parameters
    ----------
    factor : float
        1.5: at least 1.5 times as fast, or 1.5 times less memory; 0.5: at most twice as much.
    than : str
        The contender that it is measured against. Empty: the best of all others.
    at_most : float, optional
        Instead: the figure itself is at most this, in the work's unit.
    """

    factor: float = 1.0
    than: str = ""
    at_most: float | None = None

    def is_reached(self, ours: float, other: float | None) -> bool | None:
        """None: there is nothing to compare with."""
        if self.at_most is not None:
            return ours <= self.at_most
        return None if other is None else other / ours >= self.factor


@dataclass(frozen=True)
class Work:
    """One thing to measure.

    A work's `prepare` makes the input of one repetition outside of the clock, `body` is timed,
    `check` looks at its result outside of the clock again. Unless the notes say otherwise, the
    workers were started and a few repetitions have run before the clock starts: the steady state.

    Parameters
    ----------
    name : str
        For the command line.
    title : str
        For the table.
    body : callable
        ``body(contender, data, items)``: what is timed.
    prepare : callable
        ``prepare(contender)``: the input of one repetition. Called anew for each.
    check : callable
        ``check(data, result)``: raises AssertionError unless the answer is right. What it returns
        must be the same for all contenders.
    reach : tuple of Reach
        All of it.
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
        repetition, and starting the pool is part of it. Not timed, one repetition in a fresh pool,
        bytes: "growth" of the memory of the tree of processes, once the workers have been started;
        "peak", all its memory, whoever needs it.
    contenders : tuple of str or None
        The only ones that run it. None: all.
    ours : str
        The contender that stands for shmpool.
    repetitions : int
        At most so many.
    quick : bool
        Part of a quick run.
    """

    name: str
    title: str
    body: Callable[[Contender, Any, int], Any]
    prepare: Callable[[Contender], Any] = lambda _: None
    check: Callable[[Any, Any], Any] = lambda _data, _result: None
    reach: tuple[Reach, ...] = ()
    notes: str = ""
    items: int = 1
    pilot: int = 1
    per_item: bool = False
    kind: Literal["steady", "cold", "start", "growth", "peak"] = "steady"
    contenders: tuple[str, ...] | None = None
    ours: str = "shmpool"
    repetitions: int = 2000
    quick: bool = True

    @property
    def is_memory(self) -> bool:
        return self.kind in ("growth", "peak")

    @property
    def unit(self) -> Literal["bytes", "seconds"]:
        return "bytes" if self.is_memory else "seconds"

    def is_for(self, name: str) -> bool:
        """Does this contender run it?"""
        if self.contenders is not None:
            return name in self.contenders
        if name in BOUNDS:
            return self.kind != "growth"  # there is no pool whose memory could grow
        works = CONTENDERS[name].works
        return works is None or self.name in works
