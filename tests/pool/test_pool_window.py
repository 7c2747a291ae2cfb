"""How far imap may read ahead: in number, in bytes, and who is told."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
from executor_tasks import SOON

from shmpool.pool.window import BYTES_AHEAD, MOST_PER_WORKER, Window

WORKERS = 4
LEAST, MOST = WORKERS + 1, WORKERS * MOST_PER_WORKER


@dataclass
class Traffic:
    copied: int = 0
    shared: int = 0


@pytest.fixture
def traffic() -> Traffic:
    return Traffic(copied=1 << 40)  # of what was there before


@pytest.fixture
def window(traffic: Traffic) -> Window:
    return Window(traffic, WORKERS)


def fill(window: Window, traffic: Traffic, nbytes: int = 0) -> int:
    """Submit tasks with so many bytes each while there is room; how many were they?"""
    number = 0
    while window.has_room():
        window.enter()
        traffic.copied += nbytes
        number += 1
        assert number <= MOST
    return number


def finish(window: Window, traffic: Traffic, number: int, nbytes: int = 0) -> None:
    for _ in range(number):
        traffic.shared += nbytes
        window.one_done()


def take(window: Window, number: int) -> None:
    for _ in range(number):
        window.one_taken()


def test_it_begins_with_one_task_for_each_worker_and_one_more(
    window: Window, traffic: Traffic
) -> None:
    assert fill(window, traffic) == LEAST


def test_it_grows_with_what_is_done_up_to_a_number(window: Window, traffic: Traffic) -> None:
    total = fill(window, traffic)
    for _ in range(20):
        finish(window, traffic, LEAST)
        total += fill(window, traffic)
    assert total == min(21 * LEAST, MOST)
    finish(window, traffic, MOST)
    assert total + fill(window, traffic) == MOST
    assert not window.may_grow
    take(window, 7)
    assert fill(window, traffic) == 7


def test_large_arguments_bound_it_to_the_least(window: Window, traffic: Traffic) -> None:
    assert fill(window, traffic, BYTES_AHEAD) == LEAST
    for _ in range(10):
        finish(window, traffic, 1, BYTES_AHEAD)
        assert fill(window, traffic, BYTES_AHEAD) == 0
        take(window, 1)
        assert fill(window, traffic, BYTES_AHEAD) == 1


def test_middling_ones_bound_it_to_the_bytes(window: Window, traffic: Traffic) -> None:
    nbytes = BYTES_AHEAD // 40
    under_way = most = 0
    for _ in range(1000):
        under_way += fill(window, traffic, nbytes)
        most = max(most, under_way)
        finish(window, traffic, 1)
        take(window, 1)
        under_way -= 1
    assert LEAST < most <= 41


def test_large_results_bound_it_as_soon_as_they_are_there(window: Window, traffic: Traffic) -> None:
    total = fill(window, traffic)
    finish(window, traffic, total, BYTES_AHEAD)
    assert fill(window, traffic) == 0
    take(window, total)
    # What carried too much together is not submitted at once again.
    assert fill(window, traffic) == LEAST


def test_what_was_moved_before_does_not_count(window: Window, traffic: Traffic) -> None:
    fill(window, traffic, BYTES_AHEAD)
    finish(window, traffic, LEAST)
    take(window, LEAST)
    assert fill(window, traffic) == LEAST
    finish(window, traffic, LEAST)
    assert fill(window, traffic) > 0


def test_limits_can_be_removed(window: Window, traffic: Traffic) -> None:
    fill(window, traffic, BYTES_AHEAD)
    window.remove_limits()
    for _ in range(2 * MOST):
        assert window.has_room()
        window.enter()


def wait_in_thread(window: Window) -> threading.Thread:
    thread = threading.Thread(target=window.wait_for_news, daemon=True)
    thread.start()
    thread.join(0.02)
    assert thread.is_alive()
    return thread


@pytest.mark.parametrize("news", ["one_taken", "one_done", "remove_limits", "forget", "close"])
def test_whoever_waits_hears_the_news(window: Window, traffic: Traffic, news: str) -> None:
    fill(window, traffic)
    thread = wait_in_thread(window)
    getattr(window, news)()
    thread.join(SOON)
    assert not thread.is_alive()


def test_nobody_waits_for_what_has_happened_already(window: Window, traffic: Traffic) -> None:
    fill(window, traffic)
    window.one_taken()
    window.wait_for_news()
    for change in (window.forget, window.close):
        fill(window, traffic)
        change()
        window.wait_for_news()


def test_small_tasks_are_read_in_batches(window: Window, traffic: Traffic) -> None:
    fill(window, traffic)
    finish(window, traffic, MOST)
    fill(window, traffic)
    thread = wait_in_thread(window)
    take(window, (MOST - LEAST) // 4)
    thread.join(0.02)
    assert thread.is_alive()
    take(window, 1)
    thread.join(SOON)
    assert not thread.is_alive()


def test_large_results_bound_it_also_where_they_are_taken_by_the_dozen(
    window: Window, traffic: Traffic
) -> None:
    """Those begun after all have been taken carry nothing yet."""
    nbytes = BYTES_AHEAD // (2 * LEAST)
    for _ in range(20):
        number = fill(window, traffic)
        assert number <= 2 * LEAST + 1
        finish(window, traffic, number, nbytes)
        number += fill(window, traffic)
        take(window, number)
