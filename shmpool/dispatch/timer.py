"""A timer to wait for together with other descriptors: a ``timerfd``, which Python has from 3.13 on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time

__all__ = ["Timer"]

_CLOCK_MONOTONIC = 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.timerfd_settime.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class Timer:
    """Becomes readable at the latest a fixed time after it was last started.

    Parameters
    ----------
    seconds : float
        Less than one.

    Attributes
    ----------
    fd : int

    Raises
    ------
    OSError
        Out of descriptors.
    """

    __slots__ = ("_due", "_seconds", "_spec", "fd")

    def __init__(self, seconds: float) -> None:
        # The flags of timerfd_create are those of open.
        self.fd: int = _libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._spec = _Itimerspec(_Timespec(0, 0), _Timespec(0, int(seconds * 1e9)))
        self._seconds = seconds
        self._due = 0.0

    def start(self) -> None:
        """Have it become readable, if that is not about to happen: to set a timer takes 10 us on a virtual machine."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + self._seconds
        _libc.timerfd_settime(self.fd, 0, ctypes.addressof(self._spec), None)

    def clear(self) -> None:
        """It has been noticed."""
        with contextlib.suppress(BlockingIOError):  # it was set again meanwhile
            os.read(self.fd, 8)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)
        self.fd = -1
