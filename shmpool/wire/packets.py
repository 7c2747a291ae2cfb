"""Many packets in one system call: ``sendmmsg``, which Python's socket module does not have.

A system call for each tiny task costs more than all else that is done for it, mostly since the interpreter lock changes
hands around each.  Packets stay packets: the receiver reads them, and the sender takes them back, one by one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import sys

import numpy as np

__all__ = ["Packets"]

#: So many packets a call; the rest waits for the next.
_MOST = 64


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    """``struct msghdr``."""

    _fields_ = (
        ("name", ctypes.c_void_p), ("name_length", ctypes.c_uint32), ("iovecs", ctypes.c_void_p),
        ("n_iovecs", ctypes.c_size_t), ("control", ctypes.c_void_p), ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )  # fmt: skip


class _Message(ctypes.Structure):
    """``struct mmsghdr``."""

    _fields_ = (("header", _Header), ("sent", ctypes.c_uint))


#: None where the structures above are not the system's: they are those of 64-bit systems.
_sendmmsg = ctypes.CDLL(None, use_errno=True).sendmmsg if sys.maxsize > 1 << 32 else None
if _sendmmsg is not None:
    _sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)
    _sendmmsg.restype = ctypes.c_int
_FLAGS = int(socket.MSG_DONTWAIT | getattr(socket, "MSG_NOSIGNAL", 0))


class Packets:
    """Sends packets through one socket, and has the memory that the system call wants."""

    __slots__ = ("_iovecs", "_messages", "_table")

    def __init__(self) -> None:
        iovecs = (_Iovec * _MOST)()
        messages = (_Message * _MOST)()
        for i in range(_MOST):
            header = messages[i].header
            header.iovecs = ctypes.addressof(iovecs) + i * ctypes.sizeof(_Iovec)
            header.n_iovecs = 1
        self._iovecs, self._messages = iovecs, messages
        # The same memory, as addresses and lengths.
        self._table = np.frombuffer(memoryview(iovecs).cast("B"), np.uintp).reshape(_MOST, 2)

    def send(self, target: socket.socket, packets: list[bytes]) -> int:
        """Send the first packets, as far as there is room, and not all if they are many; how many were sent.

        Raises
        ------
        OSError
            The first cannot be sent.
        """
        if _sendmmsg is None:
            target.send(packets[0])
            return 1
        packets = packets[:_MOST]
        joined = b"".join(packets)
        table = self._table[: len(packets)]
        table[:, 1] = lengths = np.fromiter(map(len, packets), np.uintp, len(packets))
        np.cumsum(lengths[:-1], out=table[1:, 0])
        table[0, 0] = 0
        table[:, 0] += _address(joined)
        sent: int = _sendmmsg(target.fileno(), self._messages, len(packets), _FLAGS)
        if sent < 0:
            number = ctypes.get_errno()
            if number == errno.EAGAIN:
                return 0
            raise OSError(number, os.strerror(number))
        return sent


def _address(data: bytes) -> int:
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
