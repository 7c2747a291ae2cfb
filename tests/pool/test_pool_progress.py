"""Progress bars of what a pool does."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pool_tasks as tasks
import pytest
from executor_tasks import SOON
from support import wait_until

from shmpool.pool import Pool

pytest.importorskip("tqdm")


class Screen(io.StringIO):
    """What bars are drawn on."""

    @property
    def ended(self) -> list[str]:
        """Each line's count and total, of lines that have ended."""
        lines = [line.rpartition("\r")[2] for line in self.getvalue().split("\n")]
        return [line.partition(" [")[0].rpartition("| ")[2].strip() for line in lines[:-1]]


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture
def pool(screen: Screen) -> Iterator[Pool]:
    """A view of a pool that shows its progress."""
    with Pool(2, context="fork") as pool:
        yield pool.options(progress={"file": screen, "mininterval": 0})
    pool.join()


PAIRS = [(i, i) for i in range(20)]
WAYS: dict[str, Callable[[Pool], Any]] = {
    "map": lambda pool: pool.map(tasks.square, range(20), 1),
    "map in chunks": lambda pool: pool.map(tasks.square, range(20), 3),
    "map of an iterator": lambda pool: pool.map(tasks.square, (i for i in range(20))),
    "map_async": lambda pool: pool.map_async(tasks.square, range(20)).get(SOON),
    "starmap": lambda pool: pool.starmap(tasks.add, PAIRS, 3),
    "starmap_async": lambda pool: pool.starmap_async(tasks.add, PAIRS, callback=len).get(SOON),
    "imap": lambda pool: list(pool.imap(tasks.square, range(20))),
    "imap in chunks": lambda pool: list(pool.imap(tasks.square, list(range(20)), 3)),
    "imap_unordered": lambda pool: list(pool.imap_unordered(tasks.square, range(20), 3)),
}


@pytest.mark.parametrize("way", WAYS)
def test_items_are_counted_and_the_bar_is_complete_when_the_results_are_there(
    pool: Pool, screen: Screen, way: str
) -> None:
    assert len(WAYS[way](pool)) == 20
    assert screen.ended == ["20/20"]


def test_an_iterable_of_unknown_length_has_its_total_at_the_end(pool: Pool, screen: Screen) -> None:
    assert len(list(pool.imap(tasks.square, (i for i in range(700))))) == 700
    assert screen.ended == ["700/700"]


def test_what_fails_is_finished_too(pool: Pool, screen: Screen) -> None:
    with pytest.raises(KeyError):
        pool.map(tasks.fail, range(10), 1)
    assert screen.ended == ["10/10"]


def test_a_break_ends_the_bar(pool: Pool, screen: Screen) -> None:
    for value in pool.imap(tasks.square, range(1000)):
        if value > 50:
            break
    wait_until(lambda: screen.ended, SOON, "the bar to end")
    (seen,) = screen.ended
    assert seen.endswith("/1000") and int(seen.split("/")[0]) < 1000


def test_results_that_are_never_asked_for_are_shown(pool: Pool, screen: Screen) -> None:
    pool.imap_unordered(tasks.square, range(500))
    wait_until(lambda: screen.ended == ["500/500"], SOON, "the bar to end")


def test_single_calls_share_a_bar(pool: Pool, screen: Screen) -> None:
    results = [pool.apply_async(tasks.square, (i,)) for i in range(10)]
    assert [result.get(SOON) for result in results] == [i * i for i in range(10)]
    del results
    wait_until(lambda: "10/10" in screen.getvalue(), SOON, "the bar to show all")


def test_terminate_ends_bars(pool: Pool, screen: Screen) -> None:
    results = pool.imap(tasks.square, iter(range(100_000)))
    next(results)
    pool.terminate()
    wait_until(lambda: screen.ended, SOON, "the bar to end")
    del results
