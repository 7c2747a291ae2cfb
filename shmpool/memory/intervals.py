"""A set of integers, kept as disjoint half-open intervals: which pages of an arena are populated.

Rules
    The intervals ``[start, stop)`` are kept sorted, disjoint and apart: two that touch are merged
    into one, so the representation of a set is unique. They lie in two parallel lists, of starts
    and of stops, so that every question is two bisections and every change one slice assignment. An
    interval given with ``start == stop`` is empty, and legal everywhere.

Guarantees
    A call either completes or raises before it changes anything. Answers are lists of their own,
    sorted, and do not change with the set.

Assumptions
    Not thread safe: the caller holds a lock. Integers only, of any size or sign; their unit (bytes,
    pages) is the caller's.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

__all__ = ["IntervalSet"]


class IntervalSet:
    """A set of integers, added and removed by interval. Starts empty."""

    __slots__ = ("_starts", "_stops", "_total")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._total = 0

    def add(self, start: int, stop: int) -> None:
        """Put every integer of ``[start, stop)`` into the set.

        Raises
        ------
        ValueError
            If `stop` is less than `start`.
        """
        if start >= stop:
            _check(start, stop)
            return
        starts, stops = self._starts, self._stops
        # [first, last) are the intervals that overlap the new one or touch it: merged into one.
        first = bisect_left(stops, start)
        last = bisect_right(starts, stop, first)
        if first < last:
            start = min(start, starts[first])
            stop = max(stop, stops[last - 1])
            if last - first == 1:
                self._total -= stops[first] - starts[first]
                self._total += stop - start
                starts[first] = start
                stops[first] = stop
                return
            self._total -= sum(stops[first:last]) - sum(starts[first:last])
        starts[first:last] = [start]
        stops[first:last] = [stop]
        self._total += stop - start

    def remove(self, start: int, stop: int) -> None:
        """Take every integer of ``[start, stop)`` out of the set; those not in it are no error.

        Raises
        ------
        ValueError
            If `stop` is less than `start`.
        """
        if start >= stop:
            _check(start, stop)
            return
        starts, stops = self._starts, self._stops
        # [first, last) are the intervals that overlap it; touching is not enough here.
        first = bisect_right(stops, start)
        last = bisect_left(starts, stop, first)
        if first == last:
            return
        self._total -= sum(stops[first:last]) - sum(starts[first:last])
        new_starts: list[int] = []
        new_stops: list[int] = []
        if starts[first] < start:
            new_starts.append(starts[first])
            new_stops.append(start)
        if stops[last - 1] > stop:
            new_starts.append(stop)
            new_stops.append(stops[last - 1])
        starts[first:last] = new_starts
        stops[first:last] = new_stops
        self._total += sum(new_stops) - sum(new_starts)

    def overlap(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the parts of ``[start, stop)`` that are in the set.

        Raises
        ------
        ValueError
            If `stop` is less than `start`.
        """
        if start >= stop:
            _check(start, stop)
            return []
        starts, stops = self._starts, self._stops
        first = bisect_right(stops, start)
        last = bisect_left(starts, stop, first)
        return [
            (max(start, starts[index]), min(stop, stops[index])) for index in range(first, last)
        ]

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the parts of ``[start, stop)`` that are not in the set: the gaps.

        Raises
        ------
        ValueError
            If `stop` is less than `start`.
        """
        if start >= stop:
            _check(start, stop)
            return []
        starts, stops = self._starts, self._stops
        first = bisect_right(stops, start)
        count = len(starts)
        gaps: list[tuple[int, int]] = []
        while start < stop:
            if first == count or starts[first] >= stop:
                gaps.append((start, stop))
                break
            if start < starts[first]:
                gaps.append((start, starts[first]))
            start = stops[first]
            first += 1
        return gaps

    @property
    def total(self) -> int:
        """How many integers are in the set; kept up to date, so it costs nothing to ask."""
        return self._total

    def clear(self) -> None:
        """Empty the set."""
        self._starts.clear()
        self._stops.clear()
        self._total = 0

    def __contains__(self, item: int) -> bool:
        """Tell whether one integer is in the set."""
        index = bisect_right(self._starts, item) - 1
        return index >= 0 and item < self._stops[index]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Iterate over the intervals as ``(start, stop)``, rising.

        They are those at the time of the call: the set may be changed while iterating.
        """
        return iter(list(zip(self._starts, self._stops, strict=True)))

    def __len__(self) -> int:
        """Return the number of intervals (`total` has the number of integers)."""
        return len(self._starts)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self)} intervals, total {self._total}>"


def _check(start: int, stop: int) -> None:
    """Raise unless the interval, known not to have any length, is empty."""
    if start > stop:
        raise ValueError(f"an interval cannot stop before it starts: [{start}, {stop})")
