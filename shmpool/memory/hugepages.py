"""Huge pages for shared memory, asked for range by range.

Distributions let nobody have transparent huge pages of shared memory (``shmem_enabled`` is ``never``), but since
Linux 6.1 a program may ask for some itself: ``MADV_COLLAPSE`` puts what lies in 2 MB of small pages into one huge one.
Done while there is only one small page, that costs next to nothing, 5 ms for 100 MB, and the memory need not be zeroed,
mapped and written page by page.  100 MB in fresh memory take 13 ms instead of 40; a mapping of them is read for the
first time in 4 ms instead of 14, and after that in 3.7 instead of 5.5, as fast as any array of numpy's.

It needs addresses that have the same place within 2 MB as what they map (see :class:`~shmpool.memory.segment.Mapping`).

Where free memory is in small pieces the kernel tidies up first, which can take 5 ms for 2 MB.  So what is slow, or
cannot be had, is left at that, and not tried again for a while.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import time

from shmpool.memory.segment import HUGE_PAGE, PAGE, Mapping, round_up

__all__ = ["WORTH_IT", "Collapser"]

#: In bytes. Smaller ranges have few whole huge pages in them.
WORTH_IT = 2 * HUGE_PAGE
#: Seconds for one huge page that are more than it will spare.  (On a virtual machine, whose memory may have to come
#: from the host at the first touch, it can take one or two; but so do small pages.)
_SLOW = 3e-3
#: So many slow ones in a row are enough.
_PATIENCE = 2
#: Seconds until the next try: doubled each time, and from the beginning after a success.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 64.0
_SETTING = "/sys/kernel/mm/transparent_hugepage/enabled"


class Collapser:
    """Makes huge pages, as long as the system gives them.  Safe in several threads: at worst one tries too often."""

    __slots__ = ("_pause", "_until")

    def __init__(self) -> None:
        self._pause = _FIRST_PAUSE
        self._until = 0.0 if _are_allowed() else float("inf")

    def may_be_had(self) -> bool:
        """Is it worth a try now?"""
        return not self._until or time.monotonic() >= self._until

    def make(self, mapping: Mapping, start: int, stop: int) -> None:
        """Have huge pages for what lies in ``[start, stop)`` of an "r+" mapping, of which no page exists yet.

        Whatever fails, the rest can be populated with small ones.
        """
        if not self.may_be_had():
            return
        slow = 0
        for at in range(round_up(start, HUGE_PAGE), stop - HUGE_PAGE + 1, HUGE_PAGE):
            began = time.thread_time()  # not what others take from this thread
            try:
                mapping.populate(at, at + PAGE)  # of nothing, nothing is made
                mapping.collapse(at, at + HUGE_PAGE)
            except OSError as error:
                # No such advice (an old kernel, or not for this memory); or no memory.
                self._until = float("inf") if error.errno == errno.EINVAL else self._later()
                return
            slow = slow + 1 if time.thread_time() - began > _SLOW else 0
            if slow == _PATIENCE:
                self._until = self._later()
                return
        self._until, self._pause = 0.0, _FIRST_PAUSE

    def _later(self) -> float:
        pause, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        return time.monotonic() + pause


def _are_allowed() -> bool:
    """Does the administrator let programs have transparent huge pages at all, and does this kernel know all of it?"""
    if sys.platform != "linux" or sys.maxsize < 1 << 32:
        return False
    # Since 6.1; but before 6.7 huge pages that are only read look as if they had been written to (memory/dirty.py).
    if tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) < (6, 7):
        return False
    try:
        with open(_SETTING) as setting:
            return "[never]" not in setting.read().split()
    except OSError:
        return False
