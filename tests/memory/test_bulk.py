"""Large copies and comparisons, in one thread and in two."""

from __future__ import annotations

import _thread
import os
import sys
import threading

import numpy as np
import pytest

from shmpool.memory import bulk

SMALL, LARGE = 5000, 3 * bulk._LARGE + 4097


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The threads that were started."""
    seen: list[object] = []
    start = _thread.start_new_thread

    def count(*args):
        seen.append(args)
        return start(*args)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(_thread, "start_new_thread", count)
    return seen


def counted(nbytes: int) -> np.ndarray:
    return np.resize(np.arange(251, dtype=np.uint8), nbytes)


@pytest.mark.parametrize(("nbytes", "threads"), [(0, 0), (1, 0), (SMALL, 0), (LARGE, 1)])
def test_all_is_copied_and_nothing_else(started, nbytes, threads):
    source, target = counted(nbytes), np.full(nbytes + 10, 255, np.uint8)
    bulk.copy(target[5 : nbytes + 5], source)
    assert np.array_equal(target[5 : nbytes + 5], source)
    assert (target[:5] == 255).all()
    assert (target[nbytes + 5 :] == 255).all()
    assert len(started) == threads


@pytest.mark.parametrize(("nbytes", "threads"), [(SMALL, 0), (LARGE, 1)])
@pytest.mark.parametrize("where", [0, 0.3, 0.499, 0.501, 0.9, 1])
def test_one_byte_makes_a_difference_wherever_it_is(started, nbytes, threads, where):
    one = counted(nbytes)
    other = one.copy()
    assert bulk.same(one, other)
    other[int(where * (nbytes - 1))] ^= 1
    assert not bulk.same(one, other)
    assert len(started) == 2 * threads


def test_nothing_is_like_nothing():
    assert bulk.same(counted(0), counted(0))


def test_on_one_processor_one_thread_does_it(started, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    source, target = counted(LARGE), np.zeros(LARGE, np.uint8)
    bulk.copy(target, source)
    assert bulk.same(target, source)
    assert not started


def test_so_it_does_while_the_interpreter_ends(started, monkeypatch):
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    source, target = counted(LARGE), np.zeros(LARGE, np.uint8)
    bulk.copy(target, source)
    assert bulk.same(target, source)
    assert not started


def test_so_it_does_where_the_system_has_no_more_threads(started, monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    source, target = counted(LARGE), np.zeros(LARGE, np.uint8)
    bulk.copy(target, source)
    assert bulk.same(target, source)


def test_what_is_raised_meanwhile_waits_for_the_other_thread(started):
    """Else it would go on in memory that may be another block by then."""
    done = []
    go = _thread.allocate_lock()
    go.acquire()

    def work(start, stop):
        if start == 0:
            go.release()
            raise KeyboardInterrupt
        with go:
            done.append((start, stop))

    with pytest.raises(KeyboardInterrupt):
        bulk._in_two(work, LARGE)
    assert done == [(LARGE // 2 // 4096 * 4096, LARGE)]


def test_an_interruption_waits_for_the_other_thread(started, monkeypatch):
    """Else it would write to memory that is somebody else's by then."""
    allocate, start = _thread.allocate_lock, _thread.start_new_thread
    interrupted = threading.Event()

    class Lock:
        def __init__(self):
            self.lock, self.taken = allocate(), 0
            self.release = self.lock.release

        def acquire(self):
            self.taken += 1
            if self.taken == 2:
                interrupted.set()
                raise KeyboardInterrupt
            return self.lock.acquire()

    def begin_when_interrupted(function, args):
        return start(lambda: (interrupted.wait(), function(*args)), ())

    monkeypatch.setattr(_thread, "allocate_lock", Lock)
    monkeypatch.setattr(_thread, "start_new_thread", begin_when_interrupted)
    source, target = counted(LARGE), np.zeros(LARGE, np.uint8)
    with pytest.raises(KeyboardInterrupt):
        bulk.copy(target, source)
    assert np.array_equal(target, source)
