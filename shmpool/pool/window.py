"""How far ``imap`` reads ahead of who takes the results: in number and in bytes.

There is a thread that reads, and there are others that finish tasks, take results, drop iterators and close pools.  The
others only append and remove items of queues, and take no lock: so all that they do is safe in finalizers.
"""

from __future__ import annotations

from collections import deque
from queue import SimpleQueue
from typing import Protocol

__all__ = ["Traffic", "Window"]

#: So many tasks for each worker may be under way whose results were not taken, if they are small.  A worker is sent up
#: to 32 tiny tasks ahead (Config.prefetch_max); twice as many keep it busy while results are taken.
MOST_PER_WORKER = 64
#: ... and if they are large, as many as carry so many bytes of arguments and results, but at least one for each worker
#: and one more.  It is what the store keeps warm (Config.warm_bytes): more would be fresh memory, which is slow.
BYTES_AHEAD = 256 << 20


class Traffic(Protocol):
    """Figures of an executor, in bytes since it was made."""

    copied: int
    shared: int


class Window:
    """How far a reader may be ahead.

    What results carry is known when they are there.  So it begins with few tasks, and allows one more for each that is
    done, for as long as all together carry little.

    Parameters
    ----------
    traffic : Traffic
        The executor's.
    workers : int

    Attributes
    ----------
    is_open : bool
        More may be read.
    is_forgotten : bool
        Nobody will take the results: the reader has to.
    """

    def __init__(self, traffic: Traffic, workers: int) -> None:
        self._traffic = traffic
        self._least = self._allowed = workers + 1
        self._most = MOST_PER_WORKER * workers
        # The traffic before each task that is under way, oldest first. What came since the oldest is what they carry.
        self._marks: deque[int] = deque()
        # The traffic when each of the last few tasks was done: by as much as it rose from one to the next, the next
        # ones are expected to carry. The marks cannot tell where results are taken by the dozen: those begun then have
        # carried nothing yet.
        self._lately: deque[int] = deque([traffic.copied + traffic.shared], maxlen=9)
        self._news: SimpleQueue[None] = SimpleQueue()
        self._wake_below = (
            0  # the reader waits for fewer tasks to be under way; 0: it does not wait
        )
        self._is_limited = True
        self.is_open = True
        self.is_forgotten = False

    # ---------------------------------------------------------------- the reader

    def has_room(self) -> bool:
        """May one more task be submitted?"""
        under_way = len(self._marks)
        if under_way < self._least or not self._is_limited:
            return True
        if under_way >= self._allowed:
            return False
        if self._carried(under_way) >= BYTES_AHEAD:
            self._allowed = under_way
            return False
        return True

    def wait_for_news(self) -> None:
        """Wait until :meth:`has_room`, or an attribute, may have changed."""
        # Many small tasks are read in batches: to wake this thread up takes longer than they do.
        self._wake_below = self._allowed - (self._allowed - self._least) // 4
        if self.is_open and not self.is_forgotten and not self.has_room():
            self._news.get()
        self._wake_below = 0

    def enter(self) -> None:
        """One more task is about to be submitted."""
        self._marks.append(self._traffic.copied + self._traffic.shared)

    @property
    def may_grow(self) -> bool:
        """Is it worth while to tell of each task that it is done?"""
        return self._allowed < self._most

    # ---------------------------------------------------------------- the others

    def one_done(self, _future: object = None) -> None:
        """One more result is there."""
        self._lately.append(self._traffic.copied + self._traffic.shared)
        allowed = self._allowed
        if allowed < self._most and self._carried(allowed) < BYTES_AHEAD:
            self._allowed = allowed + 1
            self._tell_reader()

    def one_taken(self) -> None:
        """One more result was taken."""
        if self._marks:
            self._marks.popleft()
        if len(self._marks) < self._wake_below:
            self._tell_reader()

    def remove_limits(self) -> None:
        """Read on, whether results are taken or not."""
        self._is_limited = False
        self._news.put(None)

    def forget(self) -> None:
        """Nobody will take the results."""
        self.is_forgotten = True
        self._news.put(None)

    def close(self) -> None:
        """Read no more."""
        self.is_open = False
        self._news.put(None)

    def _tell_reader(self) -> None:
        if self._wake_below:
            self._news.put(None)

    def _carried(self, tasks: int) -> int:
        """Bytes of so many tasks: what came since the oldest that is under way, or what is to be expected of them."""
        lately = (self._lately[-1] - self._lately[0]) * tasks // max(1, len(self._lately) - 1)
        now = self._traffic.copied + self._traffic.shared
        try:
            return max(lately, now - self._marks[0])
        except IndexError:  # all were taken just now
            return lately
