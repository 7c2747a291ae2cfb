"""The channel between a parent and one worker: who holds which end, how bytes and descriptors go through.

Two socket pairs and a pipe::

    parent                                  worker
    calls  ---- SOCK_SEQPACKET pair ------> calls       one packet a message; the parent keeps a copy of the
                                                        receiving end, and so can take back what is unread
    answers <--- SOCK_STREAM pair --------- answers     length-prefixed; many answers come in one read
    lifeline --- pipe --------------------> lifeline    never carries data: when its writing end closes, because
                                                        the parent is gone, the kernel kills the worker

The kernel is the arbiter of who has a call: a packet is read exactly once, by the worker or by the parent.  That makes
it safe to send calls ahead of need: none is stuck behind a long one, and none that a dead worker had not read is lost.

Descriptors ride with the first byte of their message (SCM_RIGHTS) and so are here when it is; a message says itself
how many are its own.  Sending and receiving may be done by two threads, but neither by two at once.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
from collections import deque

from shmpool.config import LONGEST_POLL
from shmpool.errors import WireError
from shmpool.wire.packets import Packets

__all__ = [
    "MAX_FDS",
    "MAX_PACKET",
    "ParentEnd",
    "WorkerEnd",
    "die_with",
    "have_die_with",
    "make_channel",
]

#: What is before an answer: its length, twice, so that something else that has got into the stream is not taken for the
#: beginning of an answer, and the rest of it waited for.
_FRAME = struct.Struct("<II")
_MARK = 0x6C6F6F70
_BUFFER = 256 * 1024
#: No answer is that long: larger ones travel through the store.
_MAX_ANSWER = 1 << 28
#: A packet must fit into the socket's buffer (212,992 bytes by default) together with the kernel's bookkeeping.
MAX_PACKET = 204 * 1024
# As numbers: operations on the enumeration's members take a microsecond each.
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
_AT_ONCE = _CLOEXEC | int(socket.MSG_DONTWAIT)
_DESCRIPTORS_LOST = int(socket.MSG_CTRUNC)
_CUT_SHORT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
#: The kernel passes at most 253 descriptors with a message (SCM_MAX_FD).
MAX_FDS = 253
_FD_SPACE = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
_F_SETSIG = getattr(fcntl, "F_SETSIG", 10)  # Linux's number


def have_die_with(pid: int, lifeline: int) -> None:
    """Make the kernel kill a process when the other end of the pipe ``lifeline``, which it holds, closes.

    What is set here belongs to the pipe, not to this process's descriptor of it: so a parent can do it for a child that
    is still starting, which may take a second.  :func:`die_with` does it once more: the parent may not come to it.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, pid)
    fcntl.fcntl(lifeline, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def die_with(lifeline: int) -> None:
    """From now on the kernel kills this process when the other end of the pipe ``lifeline`` closes.

    That happens whatever this process is doing, also in compiled code that does not return: the pipe's hang-up is
    delivered as a signal (O_ASYNC), and the signal is SIGKILL.  A parent-death signal (PR_SET_PDEATHSIG) would not do:
    it also comes when only the thread that started this process ends.
    """
    have_die_with(os.getpid(), lifeline)
    poller = select.poll()
    poller.register(lifeline, select.POLLHUP)
    if poller.poll(0):
        os.kill(os.getpid(), signal.SIGKILL)  # it closed before the kernel was asked to watch


class Descriptors:
    """Descriptors that have arrived, in order, until the messages that they came with ask for them."""

    __slots__ = ("_fds",)

    def __init__(self) -> None:
        self._fds: deque[int] = deque()

    def arrive(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        """Take in what ``recvmsg`` returned."""
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds.extend(fds)

    def take(self, count: int) -> list[int]:
        """The next ``count``; the caller closes them.

        Raises
        ------
        WireError
            Fewer have arrived.
        """
        if count > len(self._fds):
            raise WireError(
                f"a message that comes with {count} descriptors, of which {len(self._fds)} have arrived"
            )
        return [self._fds.popleft() for _ in range(count)]

    def __len__(self) -> int:
        return len(self._fds)

    def close(self) -> None:
        """Close those that nobody asked for."""
        while self._fds:
            os.close(self._fds.popleft())


class ParentEnd:
    """What the parent holds of a channel.

    Parameters
    ----------
    calls, unread, answers : socket.socket
        Send calls; take back calls; receive answers.
    lifeline : int
        The end that keeps the worker alive.

    Attributes
    ----------
    problem : str or None
        Something that came was wrong: what comes after it means nothing, and must not be read.
    """

    __slots__ = (
        "__weakref__",
        "_buffer",
        "_calls",
        "_filled",
        "_lifeline",
        "_packets",
        "_parsed",
        "_unread",
        "answers",
        "descriptors",
        "problem",
    )

    def __init__(
        self, calls: socket.socket, unread: socket.socket, answers: socket.socket, lifeline: int
    ) -> None:
        self._calls = calls
        self._unread = unread
        self.answers = answers
        self._lifeline = lifeline
        self.descriptors = Descriptors()
        self._packets: Packets | None = None
        self.problem: str | None = None
        self._buffer = bytearray(_BUFFER)
        self._filled = 0  # bytes in the buffer
        self._parsed = 0  # ... of which these have been returned as messages
        unread.settimeout(None)  # whatever socket.setdefaulttimeout says
        calls.setblocking(False)
        answers.setblocking(False)

    def send(self, data: bytes, fds: list[int] | None = None) -> bool:
        """Send a message now; False if the socket is full.

        Raises
        ------
        OSError
            The worker is gone (EPIPE, ECONNRESET), or the message does not fit (EMSGSIZE).
        """
        try:
            if fds:
                socket.send_fds(self._calls, [data], fds)
            else:
                self._calls.send(data)
        except BlockingIOError:
            return False
        return True

    def send_many(self, packets: list[bytes]) -> int:
        """Send messages now, without descriptors; how many there was room for.

        Raises
        ------
        OSError
            As :meth:`send`, of the first one.
        """
        sent = 0
        while len(packets) - sent > 1:
            if self._packets is None:
                self._packets = Packets()
            try:
                now = self._packets.send(self._calls, packets[sent:] if sent else packets)
            except BlockingIOError:
                return sent
            except OSError:
                break  # send() knows what it means
            if not now:
                return sent
            sent += now
        try:
            return sent + self.send(packets[sent]) if sent < len(packets) else sent
        except OSError:
            if sent:
                return sent  # else nobody would know of them; the next call says what is wrong
            raise

    def take_back(self) -> bytes | None:
        """The oldest message that the worker has not read, or None.  Its descriptors are dropped."""
        try:
            # Without a place for them the kernel drops the descriptors: none is open here for a moment, as recvmsg()
            # would have them, to be inherited by a program that another thread starts.
            return self._unread.recv(MAX_PACKET, socket.MSG_DONTWAIT) or None
        except (BlockingIOError, ConnectionError):
            return None

    def receive(self) -> tuple[list[memoryview], int | None]:
        """Read once.

        Returns
        -------
        list of memoryview
            The messages that are complete, valid until the next call.
        int or None
            How many bytes were read; 0: no more will come; None: no more are there for now.

        Raises
        ------
        WireError
            What came is no message.  If messages came before it they are returned, and it is ``problem``.
        """
        if self._parsed == self._filled and self.descriptors:
            raise WireError(f"{len(self.descriptors)} descriptors that no message speaks of")
        self._make_room()
        space = memoryview(self._buffer)[self._filled :]
        try:
            got, ancillary, flags, _ = self.answers.recvmsg_into([space], _FD_SPACE, _CLOEXEC)
        except BlockingIOError:
            return [], None
        if ancillary:
            self.descriptors.arrive(ancillary)
        if flags & _DESCRIPTORS_LOST:
            raise WireError(
                "descriptors that came with its answer were lost: this process may open no more of them (RLIMIT_NOFILE)"
            )
        if len(self.descriptors) > MAX_FDS:
            raise WireError(f"{len(self.descriptors)} descriptors with one message")
        self._filled += got
        messages = self._messages()
        if self.problem is not None and not messages:
            raise WireError(self.problem)
        return messages, got

    def _make_room(self) -> None:
        """Move what is left of the last read to the front of the buffer; make that larger for a long message."""
        rest = self._buffer[self._parsed : self._filled]
        needed = _BUFFER
        if len(rest) >= _FRAME.size:
            needed = max(needed, _FRAME.size + _FRAME.unpack_from(rest)[0])
        if needed != len(self._buffer):
            self._buffer = bytearray(needed)
        self._buffer[: len(rest)] = rest
        self._filled, self._parsed = len(rest), 0

    def _messages(self) -> list[memoryview]:
        view = memoryview(self._buffer)
        messages = []
        at, end = self._parsed, self._filled
        while end - at >= _FRAME.size:
            length, check = _FRAME.unpack_from(view, at)
            if length ^ _MARK != check or length > _MAX_ANSWER:
                self.problem = f"a message that claims {length} bytes"
                break
            stop = at + _FRAME.size + length
            if stop > end:
                break
            messages.append(view[at + _FRAME.size : stop])
            at = stop
        self._parsed = at
        return messages

    def end_of_calls(self) -> None:
        """Let the worker finish what was sent, and then end."""
        with contextlib.suppress(OSError):  # it is gone already
            self._calls.shutdown(socket.SHUT_WR)

    def close_when_forked(self) -> None:
        """In a child of this process: close the copies."""
        self.close()

    def close(self) -> None:
        """Close all; the worker, if alive, dies.  May be called twice."""
        self._calls.close()
        self._unread.close()
        self.answers.close()
        self.descriptors.close()
        lifeline, self._lifeline = self._lifeline, -1  # first: another thread may be about to fork
        if lifeline >= 0:
            os.close(lifeline)


class WorkerEnd:
    """What a worker holds of a channel.

    Parameters
    ----------
    calls, answers : socket.socket
        Receive calls; send answers.
    lifeline : int
        Hangs up when the parent is gone.
    """

    __slots__ = ("_answers", "_buffer", "_poller", "calls", "descriptors", "lifeline")

    def __init__(self, calls: socket.socket, answers: socket.socket, lifeline: int) -> None:
        self.calls = calls
        self._answers = answers
        for one in (calls, answers):
            one.settimeout(None)  # whatever socket.setdefaulttimeout says
        self.lifeline = lifeline
        self.descriptors = Descriptors()
        self._buffer: bytearray | None = None
        self._poller: select.poll | None = None

    def wait(self, seconds: float | None) -> bool:
        """Wait at most so long or a day for a message or the end of messages; is there one?  None: do not ask."""
        if seconds is None:
            return True
        if self._poller is None:
            self._poller = select.poll()
            self._poller.register(self.calls, select.POLLIN)
        return bool(self._poller.poll(1000 * min(seconds, LONGEST_POLL) + 1))

    def wait_for_end(self, seconds: float) -> None:
        """Wait at most so long for the end of messages, whether there are any or not."""
        poller = select.poll()
        poller.register(self.calls, select.POLLRDHUP)
        poller.poll(seconds * 1000)

    def receive(self, *, wait: bool = True) -> memoryview | None:
        """The next message; its bytes are valid until the next call.  None: no more will come.

        Raises
        ------
        BlockingIOError
            None is there, and it is not to be waited for.
        WireError
            A message that was too long was cut short, or its descriptors were lost.
        """
        if self._buffer is None:
            self._buffer = bytearray(MAX_PACKET)
        got, ancillary, flags, _ = self.calls.recvmsg_into(
            [self._buffer], _FD_SPACE, _CLOEXEC if wait else _AT_ONCE
        )
        if ancillary:
            self.descriptors.arrive(ancillary)
        if flags & _DESCRIPTORS_LOST:
            raise WireError(
                "descriptors that came with a task were lost: its worker may open no more of them (RLIMIT_NOFILE)"
            )
        if flags & _CUT_SHORT:
            raise WireError(f"a message was cut short at {got} bytes")
        return memoryview(self._buffer)[:got] if got else None

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        """Send a message, waiting for room.

        Raises
        ------
        OSError
            The parent is gone.
        """
        framed = _FRAME.pack(len(data), len(data) ^ _MARK) + data
        sent = 0
        if fds:
            sent = socket.send_fds(self._answers, [framed], fds)
        if sent < len(framed):
            self._answers.sendall(memoryview(framed)[sent:] if sent else framed)

    def close(self) -> None:
        """Close all.  May be called twice."""
        self.calls.close()
        self._answers.close()
        self.descriptors.close()
        lifeline, self.lifeline = self.lifeline, -1
        if lifeline >= 0:
            os.close(lifeline)

    def parts(self) -> tuple[socket.socket, socket.socket, int]:
        """What the end is made of, to hand it to another process."""
        return self.calls, self._answers, self.lifeline


def make_channel() -> tuple[ParentEnd, WorkerEnd]:
    """A new channel: the parent's end, and the end to give to a worker."""
    made: list[socket.socket] = []
    try:
        calls, worker_calls = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made += calls, worker_calls
        answers, worker_answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        made += answers, worker_answers
        unread = worker_calls.dup()
        made.append(unread)
        lifeline, parent_lifeline = os.pipe()
    except BaseException:
        for one in made:
            one.close()
        raise
    return ParentEnd(calls, unread, answers, parent_lifeline), WorkerEnd(
        worker_calls, worker_answers, lifeline
    )
