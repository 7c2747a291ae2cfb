"""The bell that wakes the dispatcher up, from any thread, a finalizer or a signal handler."""

from __future__ import annotations

import os
import threading

from shmpool.interrupts import whole

__all__ = ["WakeUp"]


class WakeUp:
    """An ``eventfd`` that may be closed while others ring it.

    Attributes
    ----------
    fd : int
        Readable when somebody has rung; negative while it is closed.
    """

    __slots__ = ("_lock", "_pid", "fd")

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the closing; nobody waits for it but who closes
        self._pid = os.getpid()
        self.fd = -1

    def open(self) -> None:
        """From now on it can be rung.

        Raises
        ------
        OSError
            Out of descriptors.
        """
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def ring(self) -> None:
        """Make the dispatcher look around.  Waits for nothing, and does nothing in a forked child."""
        # Whoever holds this lock is ringing, too, or has closed it.
        with whole:
            if self._lock.acquire(blocking=False):
                try:
                    if self.fd >= 0 and os.getpid() == self._pid:
                        os.eventfd_write(self.fd, 1)
                finally:
                    self._lock.release()

    def clear(self) -> None:
        """It has been heard."""
        os.eventfd_read(self.fd)

    def close(self) -> None:
        """Nobody listens any more."""
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
            self.fd = -1
