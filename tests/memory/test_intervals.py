"""The interval set against a Python set of integers, and its edge cases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shmpool.memory.intervals import IntervalSet

LOW, HIGH = -20, 60
POINTS = st.integers(LOW, HIGH)


def runs(integers: set[int]) -> list[tuple[int, int]]:
    """Return the maximal half-open intervals that a set of integers consists of."""
    starts = sorted(i for i in integers if i - 1 not in integers)
    stops = sorted(i + 1 for i in integers if i + 1 not in integers)
    return list(zip(starts, stops, strict=True))


class IntervalSetAgainstModel(RuleBasedStateMachine):
    """Every answer must be what a set of integers gives."""

    def __init__(self) -> None:
        super().__init__()
        self.intervals = IntervalSet()
        self.model: set[int] = set()

    @rule(a=POINTS, b=POINTS)
    def add(self, a: int, b: int) -> None:
        start, stop = sorted((a, b))
        self.intervals.add(start, stop)
        self.model |= set(range(start, stop))

    @rule(a=POINTS, b=POINTS)
    def remove(self, a: int, b: int) -> None:
        start, stop = sorted((a, b))
        self.intervals.remove(start, stop)
        self.model -= set(range(start, stop))

    @rule(a=POINTS, b=POINTS)
    def ask(self, a: int, b: int) -> None:
        start, stop = sorted((a, b))
        asked = set(range(start, stop))
        assert self.intervals.missing(start, stop) == runs(asked - self.model)
        assert self.intervals.overlap(start, stop) == runs(asked & self.model)

    @rule()
    def clear(self) -> None:
        self.intervals.clear()
        self.model.clear()

    @invariant()
    def agrees(self) -> None:
        assert list(self.intervals) == runs(self.model)
        assert len(self.intervals) == len(runs(self.model))
        assert self.intervals.total == len(self.model)
        assert {i for i in range(LOW - 1, HIGH + 1) if i in self.intervals} == self.model


IntervalSetAgainstModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestIntervalSetAgainstModel = IntervalSetAgainstModel.TestCase


def filled(*intervals: tuple[int, int]) -> IntervalSet:
    result = IntervalSet()
    for start, stop in intervals:
        result.add(start, stop)
    return result


def test_intervals_that_touch_become_one() -> None:
    assert list(filled((0, 10), (20, 30), (10, 20))) == [(0, 30)]


def test_intervals_with_a_gap_of_one_stay_apart() -> None:
    assert list(filled((0, 10), (11, 20))) == [(0, 10), (11, 20)]


def test_one_interval_can_swallow_many() -> None:
    intervals = filled(*((n, n + 1) for n in range(0, 100, 2)))
    assert (len(intervals), intervals.total) == (50, 50)
    intervals.add(-5, 200)
    assert list(intervals) == [(-5, 200)]
    assert intervals.total == 205


def test_adding_what_is_there_changes_nothing() -> None:
    intervals = filled((0, 10))
    intervals.add(2, 5)
    intervals.add(0, 10)
    assert list(intervals) == [(0, 10)]
    assert intervals.total == 10


def test_removing_from_the_middle_leaves_both_ends() -> None:
    intervals = filled((0, 10))
    intervals.remove(3, 5)
    assert list(intervals) == [(0, 3), (5, 10)]
    assert intervals.total == 8


def test_gaps_and_parts_are_cut_to_what_was_asked() -> None:
    intervals = filled((0, 10), (20, 30))
    assert intervals.missing(5, 25) == [(10, 20)]
    assert intervals.overlap(5, 25) == [(5, 10), (20, 25)]
    assert intervals.missing(-5, 40) == [(-5, 0), (10, 20), (30, 40)]
    assert intervals.missing(2, 8) == []
    assert intervals.overlap(12, 18) == []


def test_an_empty_interval_is_legal_and_does_nothing() -> None:
    intervals = filled((0, 10))
    intervals.add(20, 20)
    intervals.remove(5, 5)
    assert intervals.missing(50, 50) == intervals.overlap(5, 5) == []
    assert list(intervals) == [(0, 10)]


@pytest.mark.parametrize(
    "method", [IntervalSet.add, IntervalSet.remove, IntervalSet.missing, IntervalSet.overlap]
)
def test_an_interval_that_stops_before_it_starts_is_refused(
    method: Callable[[IntervalSet, int, int], object],
) -> None:
    intervals = filled((0, 10))
    with pytest.raises(ValueError, match=r"\[7, 3\)"):
        method(intervals, 7, 3)
    assert list(intervals) == [(0, 10)]


def test_a_set_says_how_large_it_is() -> None:
    assert repr(filled((0, 10), (20, 25))) == "<IntervalSet: 2 intervals, total 15>"


def test_the_set_may_change_under_the_one_who_iterates() -> None:
    intervals = filled((0, 10), (20, 30))
    for start, stop in intervals:
        intervals.remove(start, stop)
    assert intervals.total == len(intervals) == 0
