"""Copying and comparing large memory: without the interpreter lock, and by two threads where there are two processors.

One processor does not use all of the memory's bandwidth: 100 MB are copied in 7.5 ms by one thread, in 5.4 ms by two.
More threads would take processors from the workers, for less.  The other thread is started for one piece of work, which
takes 50 us, and is not to be seen by ``threading``: nothing has to end it, and no fork finds it idle.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import sys
from collections.abc import Callable

import numpy as np

from shmpool.interrupts import whole
from shmpool.memory.segment import PAGE, Bytes

__all__ = ["copy", "same"]

#: In bytes. Below, a second thread is not worth its start.
_LARGE = 16 << 20

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memcmp.restype = ctypes.c_int


def copy(target: Bytes, source: Bytes) -> None:
    """Copy bytes to as many others."""

    def piece(start: int, stop: int) -> None:
        np.copyto(target[start:stop], source[start:stop])

    if source.nbytes < _LARGE:
        np.copyto(target, source)
    else:
        _in_two(piece, source.nbytes)


def same(one: Bytes, other: Bytes) -> bool:
    """Compare two arrays of equal length."""
    differ = False

    def piece(start: int, stop: int) -> None:
        nonlocal differ
        for first in range(start, stop, _LARGE):
            length = min(_LARGE, stop - first)
            if differ or _memcmp(one.ctypes.data + first, other.ctypes.data + first, length):
                differ = True
                return

    if one.nbytes < _LARGE:
        piece(0, one.nbytes)
    else:
        _in_two(piece, one.nbytes)
    return not differ


def _in_two(work: Callable[[int, int], None], nbytes: int) -> None:
    """Have ``work(start, stop)`` done for all bytes.  ``work`` does not raise."""
    middle = nbytes // 2 // PAGE * PAGE
    has_ended = False
    ended = _thread.allocate_lock()

    def rest() -> None:
        nonlocal has_ended
        try:
            work(middle, nbytes)
        finally:
            has_ended = True
            ended.release()

    # A thread that is started while the interpreter ends would never run, up to Python 3.11.
    if len(os.sched_getaffinity(0)) < 2 or sys.is_finalizing():
        work(0, nbytes)
        return
    with whole:
        ended.acquire()
        try:
            _thread.start_new_thread(rest, ())
        except RuntimeError:  # no more threads
            work(0, nbytes)
            return
        interruption: BaseException | None = None
        try:
            work(0, middle)
        finally:
            # The other thread must be through before anything else happens to the memory, whatever is raised here.
            while not has_ended:
                try:
                    ended.acquire()
                except BaseException as error:
                    interruption = error
        if interruption is not None:
            raise interruption
