"""Who waits for a worker's answers: the dispatcher, a thread that *leads*, or for some milliseconds nobody.

::

                 a first task, quietly                      a thread begins to lead
    dispatcher ------------------------> nobody, a timer ------------------------------> that thread
        ^                                   |                                                |
        |<-- some milliseconds, a look, ----'                                                |
        |    a second task                                                                   |
        '<-------------------------------- it has stopped, and there are tasks left ---------'

Most who submit one task wait for it next.  If the dispatcher waits as well, it wakes up first, and both fight for the
interpreter lock.  So the first task of an idle worker has nobody who waits for its answer at first.

Everything is guarded by the driver's lock, which the caller holds, but for what is said to be safe without.
"""

from __future__ import annotations

import os
import select
from collections.abc import Collection

from shmpool.dispatch.fleet import Fleet
from shmpool.dispatch.timer import Timer
from shmpool.interrupts import WholeLock
from shmpool.worker.process import WorkerHandle

__all__ = ["Attention"]

#: For so many seconds nobody may wait for the answer to a task that was sent to an idle worker.
_UNWATCHED = 0.005


class Attention:
    """Has each worker's answers waited for by the right one.

    Parameters
    ----------
    lock : WholeLock
        The driver's.

    Attributes
    ----------
    bell : int
        Readable once for each leading thread that should stop waiting.
    """

    def __init__(self, lock: WholeLock) -> None:
        self._lock = lock
        self._fleet: Fleet | None = None
        # Have a task, and nobody waits for their answers until the timer says so.
        self._unwatched: set[WorkerHandle] = set()
        self._timer: Timer | None = None
        self.bell = -1

    def open(self, fleet: Fleet) -> None:
        """The workers are about to be started.

        Raises
        ------
        OSError
            Out of descriptors; to be closed all the same.
        """
        assert self._lock.is_owned()
        self._fleet = fleet
        self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        self._timer = Timer(_UNWATCHED)
        fleet.poller.register(self._timer.fd, select.EPOLLIN)

    def close(self) -> None:
        """All workers are gone, and so is who led.  Needs no lock."""
        bell, self.bell = self.bell, -1
        if bell >= 0:
            os.close(bell)
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.close()

    # ---------------------------------------------------------------- the dispatcher, or nobody

    def expect(self, handle: WorkerHandle, *, quietly: bool) -> None:
        """A worker is about to get tasks; ``quietly``: the first, from somebody who is likely to lead."""
        if handle.leading is not None:
            return  # whoever leads has the dispatcher wait in the end
        assert self._fleet is not None
        if quietly:
            assert self._timer is not None
            self._fleet.disarm(handle)
            self._unwatched.add(handle)
            self._timer.start()
        else:
            self._fleet.arm(handle)
            self._unwatched.discard(handle)

    @property
    def is_missing(self) -> bool:
        """Is there a worker whose answers nobody waits for?  Safe without the lock."""
        return bool(self._unwatched)

    def complete(self) -> None:
        """Have the dispatcher wait for all answers that nobody waits for."""
        assert self._lock.is_owned()
        assert self._fleet is not None
        for handle in self._unwatched:
            self._fleet.arm(handle)
        self._unwatched.clear()

    def notice(self, fd: int) -> None:
        """The dispatcher has found this to be readable, which may be the timer.  Needs no lock."""
        if self._timer is not None and fd == self._timer.fd:
            self._timer.clear()

    def lost(self, handle: WorkerHandle) -> None:
        """A worker is no more."""
        self._unwatched.discard(handle)

    # ---------------------------------------------------------------- a thread that leads

    def begin_leading(self, handle: WorkerHandle, number: int) -> None:
        """The caller waits for the answer to task ``number``; it holds ``handle.reader``."""
        assert self._lock.is_owned()
        assert self._fleet is not None
        handle.leading = number
        self._fleet.disarm(handle)
        self._unwatched.discard(handle)

    def end_leading(self, handle: WorkerHandle, *, has_tasks: bool) -> bool:
        """Leave a worker to the dispatcher again, if it has tasks; True if the task in question was taken back."""
        assert self._lock.is_owned()
        assert self._fleet is not None
        moved, handle.leading = handle.leading is None, None
        if moved:
            self.obey_bell()
        if has_tasks:
            self._fleet.arm(handle)
        handle.reader.release()
        return moved

    def moved(self, handle: WorkerHandle, numbers: Collection[int]) -> None:
        """These tasks were taken back from a worker: who leads for one of them is to wait elsewhere."""
        if handle.leading in numbers:
            handle.leading = None
            self.ring_bell()

    def ring_bell(self) -> None:
        """Have one leading thread stop waiting: of all that hear it, the one that finds that it is meant."""
        assert self._lock.is_owned()
        os.eventfd_write(self.bell, 1)

    def obey_bell(self) -> None:
        """It was this thread that was meant, and it has stopped."""
        assert self._lock.is_owned()
        if self.bell >= 0:  # else all is over
            os.eventfd_read(self.bell)
