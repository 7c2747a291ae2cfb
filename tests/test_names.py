"""What objects say about themselves, and seldom used ways to write things."""

from __future__ import annotations

import pytest

import shmpool
from shmpool import cli
from shmpool.memory.allocator import Allocator
from shmpool.memory.intervals import IntervalSet
from shmpool.wire.messages import Extras


def test_the_package_lists_what_it_loads_when_it_is_asked_for() -> None:
    names = dir(shmpool)
    assert set(shmpool.__all__) <= set(names)
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (2_500_000, "2.5 MB"),
        (7 * 10**15, "7e+03 TB"),
    ],
)
def test_sizes_in_the_report(number: int, text: str) -> None:
    assert cli._size(number) == text


def test_extras_show_what_they_say() -> None:
    assert repr(Extras()) == "Extras()"
    assert (
        repr(Extras(freed=[(1, 2, 3)], forgotten=[4])) == "Extras(forgotten=[4], freed=[(1, 2, 3)])"
    )


def test_ranges_of_memory_show_how_much_they_are() -> None:
    intervals = IntervalSet()
    intervals.add(2, 5)
    intervals.add(7, 8)
    assert repr(intervals) == "<IntervalSet: 2 intervals, total 4>"
    allocator = Allocator(1 << 20, 4096)
    assert "0 blocks, 0 of 1048576 bytes used, largest free 1048576" in repr(allocator)
