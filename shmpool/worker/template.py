"""Under fork: a process that stays as the program was when the pool was made, and forks workers on request.

By the time a worker has to be replaced, the parent has threads (the dispatcher, and whatever else): to fork it then can
deadlock the child in a lock that another thread held, and the child would see the program as it is then.  The template
is forked together with the first workers.  It has one thread, runs nothing of the user's, and forks a worker each time
it is asked: so replacements are the same as the first workers were.

A request is the worker's number with four descriptors: the worker's end of a channel, and a pipe through which the
template reports the worker's exit code, since only it can wait for the worker.  The reply is the worker's pid and name.
The template ends when its socket closes, and is killed with its parent like a worker.

Programs ask a worker who it is, and choose a device by that (``current_process()._identity[0] % devices``, or the
number in its name).  So workers are numbered, and named, as if the parent had forked them, and their
``parent_process()`` is that one.
"""

from __future__ import annotations

import contextlib
import multiprocessing.process
import os
import select
import signal
import socket
import struct
import threading
import time
from multiprocessing import connection
from typing import Any

from shmpool.config import LONGEST_POLL
from shmpool.errors import BrokenPoolError
from shmpool.store.store import Payload
from shmpool.wire.channel import WorkerEnd, die_with
from shmpool.worker.init import Initializer
from shmpool.worker.interrupts import held_back
from shmpool.worker.main import Settings, main
from shmpool.worker.process import (
    end_from_fds,
    forget_as_child_when_forked,
    forget_when_forked,
    guard_when_forked,
    settle_end,
)
from shmpool.worker.threads import lower_libraries

__all__ = ["Template"]

_NUMBER = struct.Struct("<q")
_PID = struct.Struct("<i")
_EXITCODE = struct.Struct("<i")
#: How a reply begins, and how long it may be.
_FORKED, _FAILED = b"+", b"-"
_LONGEST = 1024


class Template:
    """The parent's side.

    Parameters
    ----------
    context : multiprocessing context
        Whose start method is fork.
    initializer : Initializer
    settings : Settings
    """

    def __init__(self, context: Any, initializer: Initializer, settings: Settings) -> None:
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for one in (self._socket, other):
            one.settimeout(None)  # whatever socket.setdefaulttimeout says
        lifeline, self._lifeline = os.pipe()
        guard_when_forked(self)
        try:
            self._process = context.Process(
                target=_serve,
                args=(context, other, lifeline, initializer, settings),
                name="shmpool-template",
            )
            with held_back("fork"):
                self._process.start()
            forget_as_child_when_forked(self._process)
            # The template is nobody's worker: its number goes to the first that it forks, so that none is left out.
            self._number: int | None = self._process._identity[-1]
        except BaseException:
            self._close_descriptors()
            raise
        finally:
            other.close()
            os.close(lifeline)

    def start(self, end: WorkerEnd) -> tuple[TemplateChild, Payload | None]:
        """Have a worker forked.  Starts workers as :func:`shmpool.worker.process.context_starter`'s result does.

        Raises
        ------
        OSError
            The system gives no more processes.
        BrokenPoolError
            The template is gone.
        """
        status, status_out = os.pipe()
        try:
            calls, answers, lifeline = end.parts()
            socket.send_fds(
                self._socket,
                [_NUMBER.pack(self._next_number())],
                [calls.fileno(), answers.fileno(), lifeline, status_out],
            )
            reply = self._socket.recv(_LONGEST)
        except ConnectionError:
            reply = b""
        except BaseException:
            os.close(status)
            raise
        finally:
            os.close(status_out)
        what, said = reply[:1], reply[1:]
        if what == _FORKED:
            (pid,) = _PID.unpack_from(said)
            return TemplateChild(pid, said[_PID.size :].decode(errors="replace"), status), None
        os.close(status)
        if not what:
            raise BrokenPoolError("the template process, which forks workers, is gone")
        number, _, why = said.decode(errors="replace").partition(" ")
        raise OSError(int(number), f"the template process could not fork a worker: {why}")

    def _next_number(self) -> int:
        """The number of the next process that this one starts; it counts as started."""
        number, self._number = self._number, None
        if number is None:
            number = next(multiprocessing.process._process_counter)  # type: ignore[attr-defined]  # unknown to typeshed
        return number

    def close(self) -> None:
        """End the template process; its workers must have ended before."""
        self._close_descriptors()
        self._process.kill()  # whatever a signal handler of the user's may have made of it
        self._process.join()
        settle_end(self._process)
        self._process.close()  # its descriptors, although the executor may be kept

    def close_when_forked(self) -> None:
        """In a child of this process: close the copies."""
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        self._socket.close()
        lifeline, self._lifeline = self._lifeline, -1  # first: another thread may be about to fork
        if lifeline >= 0:
            os.close(lifeline)
        forget_when_forked(self)


class TemplateChild:
    """A worker forked by the template, with the methods of a ``multiprocessing.Process`` that one uses on a worker."""

    daemon = False

    def __init__(self, pid: int, name: str, status: int) -> None:
        self.pid = pid
        self.name = name
        self.sentinel = status
        self._exitcode: int | None = None
        self._lock = threading.Lock()  # guards the reading of the status

    def __repr__(self) -> str:
        state = "started" if self.exitcode is None else f"stopped exitcode={self.exitcode}"
        return f"<{type(self).__name__} name={self.name!r} pid={self.pid} {state}>"

    @property
    def ident(self) -> int:
        return self.pid

    @property
    def exitcode(self) -> int | None:
        self.join(0)
        return self._exitcode

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end, at most ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._exitcode is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            poller = select.poll()
            with self._lock:
                if self.sentinel < 0:
                    return
                poller.register(self.sentinel, select.POLLIN)
            ready = poller.poll(None if left is None else 1000 * min(left, LONGEST_POLL))
            if ready:
                self._read_status()
            elif left == 0:
                return

    def _read_status(self) -> None:
        with self._lock:
            if self.sentinel >= 0 and self._exitcode is None:
                data = os.read(self.sentinel, _EXITCODE.size)
                # Nothing: the template died before it could wait for the worker. 255 as forkserver's children.
                self._exitcode = _EXITCODE.unpack(data)[0] if len(data) == _EXITCODE.size else 255
                # The sentinel stays open, as multiprocessing's does: somebody may be waiting on it.

    def _signal(self, number: int) -> None:
        if self.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """Let go of the status pipe."""
        with self._lock:
            # First: another thread may be about to fork.
            sentinel, self.sentinel = self.sentinel, -1
            if sentinel >= 0:
                os.close(sentinel)

    def __del__(self) -> None:
        if self.sentinel >= 0 and os is not None:  # at interpreter exit modules are emptied
            os.close(self.sentinel)


class _Status:
    """In a worker: its copy of the pipe that tells of its end.

    Should the template be killed, the pipe hangs up when the worker ends: unless processes that its tasks have forked
    hold it open, which may stay.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        guard_when_forked(self)

    def close_when_forked(self) -> None:
        """In a child of the worker: close the copy."""
        os.close(self._fd)


def _exit_descriptor(process: Any) -> int:
    """A new descriptor that becomes readable when a process has ended."""
    try:
        return os.pidfd_open(process.pid)
    except (OSError, AttributeError):  # an old kernel: later, if the worker has children
        return os.dup(process.sentinel)


def _give_number(process: Any, number: int) -> None:
    """Have a process, not yet started by the template, look as if the template's parent had made it."""
    own = ":".join(map(str, process._identity))
    process._identity = (*multiprocessing.current_process()._identity[:-1], number)
    if process.name.endswith(own):
        process.name = process.name.removesuffix(own) + ":".join(map(str, process._identity))


def _serve(
    context: Any,
    requests: socket.socket,
    lifeline: int,
    initializer: Initializer,
    settings: Settings,
) -> None:
    """The template's side: fork on request, report exit codes.

    SIGINT stays blocked as it was when this was forked, until a worker unblocks it.  SIGCHLD has its default effect,
    which is none: exit codes would be lost if it were ignored, or if a handler of the user's waited for children.
    """
    die_with(lifeline)
    parent = multiprocessing.parent_process()
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    on_child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    lowered = False
    children: dict[int, tuple[Any, int]] = {}  # by what tells of their end: process, status pipe

    def forked(channel: list[int], status: int) -> None:
        kept = _Status(status)  # for as long as the worker runs
        requests.close()
        for fd in (lifeline, *children, *(status for _, status in children.values())):
            os.close(fd)
        signal.signal(signal.SIGINT, on_interrupt)
        if on_child is not None:  # else it is no handler of Python's, which cannot be set from here
            signal.signal(signal.SIGCHLD, on_child)
        multiprocessing.process._parent_process = parent  # type: ignore[attr-defined]  # unknown to typeshed
        main(end_from_fds(*channel), initializer, settings)
        del kept

    while True:
        for ready in connection.wait([requests, *children]):
            if isinstance(ready, int):
                process, status = children.pop(ready)
                process.join()
                os.close(ready)
                with contextlib.suppress(OSError):  # nobody may want to know any more
                    os.write(status, _EXITCODE.pack(process.exitcode))
                os.close(status)
                continue
            request, fds, _, _ = socket.recv_fds(requests, _NUMBER.size, 4, socket.MSG_CMSG_CLOEXEC)
            if len(fds) < 4:
                return  # closed
            if not lowered:  # only now: what this starts in OpenBLAS ends with the fork
                lower_libraries(settings.threads)
                lowered = True
            *channel, status = fds
            process = context.Process(target=forked, args=(channel, status))
            _give_number(process, *_NUMBER.unpack(request))
            try:
                process.start()
                children[_exit_descriptor(process)] = process, status
            except OSError as error:
                why = f"{error.errno or 0} {error.strerror or error}"
                requests.send(_FAILED + why.encode()[: _LONGEST - 1])
                os.close(status)
            else:
                said = _FORKED + _PID.pack(process.pid) + process.name.encode()
                requests.send(said[:_LONGEST])
            for fd in channel:
                os.close(fd)
