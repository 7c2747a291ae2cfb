"""The parent's side of a worker: start it, know when it has ended, and why.

A process is started by a context of multiprocessing or loky; its end of the channel travels as any descriptor does
while a process is being started.  Under fork, processes to replace others come from a template (see
:mod:`shmpool.worker.template`), since this process may have threads by then.

Every channel end of this process is on a list, so that a forked child, worker or not, can close its copies: otherwise
a worker would not notice the death of this process for as long as that child lives.
"""

from __future__ import annotations

import contextlib
import multiprocessing.process
import os
import select
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from typing import Any, Protocol

from shmpool.config import LONGEST_POLL
from shmpool.store.peer import Peer
from shmpool.store.store import Payload
from shmpool.wire.channel import ParentEnd, WorkerEnd, have_die_with, make_channel
from shmpool.worker.init import Initializer
from shmpool.worker.interrupts import held_back
from shmpool.worker.main import Settings, main
from shmpool.worker.threads import Herald, lower_libraries, variables

__all__ = ["ProcessLike", "WorkerHandle", "start_worker"]


class ProcessLike(Protocol):
    """What is used of a ``multiprocessing.Process``."""

    @property
    def pid(self) -> int | None: ...  # noqa: D102  # documented there, as are all of these
    @property
    def exitcode(self) -> int | None: ...  # noqa: D102
    @property
    def sentinel(self) -> int: ...  # noqa: D102
    def is_alive(self) -> bool: ...  # noqa: D102
    def join(self, timeout: float | None = None) -> None: ...  # noqa: D102


class TravellingEnd:
    """A worker's channel end, on its way into the process that is being started."""

    def __init__(self, end: WorkerEnd) -> None:
        self.end = end

    def __reduce__(self) -> tuple[Any, ...]:
        calls, answers, lifeline = self.end.parts()
        return _arrive, tuple(DupFd(fd) for fd in (calls.fileno(), answers.fileno(), lifeline))


class _Arrived:
    def __init__(self, end: WorkerEnd) -> None:
        self.end = end


def _arrive(calls: Any, answers: Any, lifeline: Any) -> _Arrived:
    return _Arrived(end_from_fds(calls.detach(), answers.detach(), lifeline.detach()))


def end_from_fds(calls: int, answers: int, lifeline: int) -> WorkerEnd:
    """A worker's channel end from its descriptors."""
    for fd in (calls, answers, lifeline):
        os.set_inheritable(fd, False)
    return WorkerEnd(socket.socket(fileno=calls), socket.socket(fileno=answers), lifeline)


def _run(travelled: TravellingEnd | _Arrived, initializer: Initializer, settings: Settings) -> None:
    if isinstance(travelled, _Arrived):  # else it is forked, and inherits what was done
        lower_libraries(settings.threads)
    main(travelled.end, initializer, settings)


class WorkerHandle:
    """A worker, as its parent sees it.

    Attributes
    ----------
    number : int
        What the state machine calls it.
    process : ProcessLike
    end : ParentEnd
    peer : Peer
    exited : int
        A descriptor that becomes readable when the process has ended: unlike multiprocessing's sentinel (a pipe), it
        does so also while children that the worker forked are alive.
    armed : bool
        The dispatcher waits for its answers.
    ready : bool
        It has started and run its initializer.
    leading : int or None
        The task that a thread waits for which reads this worker's answers meanwhile.
    introduced : list of int
        Arenas that came with the initializer's arguments, known when the worker is ready.
    reader : threading.Lock
        Held by the thread that reads the worker's answers.
    lent : Payload or None
        The initializer's arguments, held for as long as the worker lives.
    """

    __slots__ = (
        "_own_pidfd",
        "_poller",
        "armed",
        "end",
        "exited",
        "introduced",
        "leading",
        "lent",
        "number",
        "peer",
        "pid",
        "process",
        "reader",
        "ready",
    )

    def __init__(self, process: ProcessLike, end: ParentEnd, lent: Payload | None) -> None:
        self.process = process
        self.end = end
        self.peer = Peer(upstream=False)
        self.lent = lent
        self.reader = threading.Lock()
        self._poller: select.poll | None = None
        self.number = -1
        self.armed = True
        self.ready = False
        self.leading: int | None = None
        self.introduced: list[int] = []
        assert process.pid is not None
        self.pid = process.pid
        try:
            self.exited = os.pidfd_open(self.pid)
            self._own_pidfd = True
        except (OSError, AttributeError):
            # An old kernel, or the process has been reaped already.
            self.exited = process.sentinel
            self._own_pidfd = False

    def wait(self, seconds: float | None, bell: int, spin: float = 0.0) -> bool:
        """Wait for an answer, at most so long or a day, until the bell rings or the worker has ended; is there one?

        ``spin``: for so many seconds ask again and again, so that this thread need not be woken.
        """
        if self._poller is None:
            self._poller = select.poll()
            for fd in (self.end.answers.fileno(), self.exited, bell):
                self._poller.register(fd, select.POLLIN)
        poll = self._poller.poll
        found: list[tuple[int, int]] = []
        if spin:
            until = time.monotonic() + (spin if seconds is None else min(spin, seconds))
            while not (found := poll(0)) and time.monotonic() < until:
                pass  # each time, other threads may have the interpreter
        if not found:
            found = poll(None if seconds is None else 1000 * min(seconds, LONGEST_POLL))
        ready = dict(found)
        return self.exited not in ready and self.end.answers.fileno() in ready

    def leave(self) -> None:
        """Let another thread :meth:`wait`, although this one does so still, interrupted by a signal handler."""
        self._poller = None

    def signal(self, number: int) -> None:
        """Send a signal, if the process has not ended."""
        with contextlib.suppress(ProcessLookupError):
            if self._own_pidfd:
                signal.pidfd_send_signal(self.exited, number)
            elif self.process.is_alive():
                os.kill(self.pid, number)

    def close(self) -> None:
        """Close the channel and the rest; the worker, if it is alive, dies."""
        settle_end(self.process)
        self.end.close()
        forget_when_forked(self.end)
        if self._own_pidfd:
            os.close(self.exited)
            self._own_pidfd = False
        if self.lent is not None:
            self.lent.release()


Starter = Callable[[WorkerEnd], tuple[ProcessLike, Payload | None]]


#: So often a worker's start is tried again.
_MOST_CHANNELS = 5


def start_worker(starter: Starter) -> WorkerHandle:
    """Make a channel and start a worker at its other end.

    Parameters
    ----------
    starter : callable
        Starts a process that runs :func:`shmpool.worker.main.main` on the end it is given.

    Raises
    ------
    OSError
        Out of descriptors or processes.
    Exception
        What pickling the initializer raises.
    """
    left = _MOST_CHANNELS
    while True:
        left -= 1
        end, worker_end = make_channel()
        guard_when_forked(end)
        try:
            process, lent = starter(worker_end)
            with contextlib.suppress(ProcessLookupError):
                have_die_with(process.pid or 0, worker_end.lifeline)
        except BaseException as error:
            end.close()  # whoever may have got the other end ends
            forget_when_forked(end)
            if not left or not isinstance(error, ChannelSpentError):
                raise
        else:
            return WorkerHandle(process, end, lent)
        finally:
            worker_end.close()


class ChannelSpentError(Exception):
    """The worker was not started, or nobody knows: with another channel it is to be tried again."""

    def __str__(self) -> str:
        return "the template process, which forks workers, is killed again and again"


def context_starter(context: Any, initializer: Initializer, settings: Settings) -> Starter:
    """Start processes through a context of multiprocessing or loky."""
    method: str = context.get_start_method(allow_none=False)

    def start(end: WorkerEnd) -> tuple[ProcessLike, Payload | None]:
        process: BaseProcess = context.Process(
            target=_run, args=(TravellingEnd(end), initializer, settings)
        )
        if method != "fork":
            process.name = Herald(process.name, variables(settings.threads))
        try:
            with held_back(method):
                process.start()
        except BaseException:
            if initializer.payload is not None:
                initializer.payload.release()
            raise
        forget_as_child_when_forked(process)
        lent, initializer.payload = initializer.payload, None
        return process, lent

    return start


class _Guarded(Protocol):
    def close_when_forked(self) -> None: ...


_guarded: weakref.WeakSet[_Guarded] = weakref.WeakSet()


def guard_when_forked(item: _Guarded) -> None:
    """Have ``item``'s descriptors closed in whatever this process forks."""
    _guarded.add(item)


def forget_when_forked(item: _Guarded) -> None:
    """``item`` has been closed."""
    _guarded.discard(item)


def settle_end(process: Any) -> None:
    """Have a process that was joined count as ended, although nobody can know any more how.

    So it is where SIGCHLD is ignored, as some supervisors have it, or where a handler of the user's waits for whatever
    has ended.  multiprocessing then takes the process for one that runs, for ever: it stays among
    ``active_children()``, and cannot be closed.
    """
    popen = getattr(process, "_popen", None)
    if popen is not None and process.exitcode is None:
        popen.returncode = _UNKNOWN
        process.join()


#: As forkserver's children have it.
_UNKNOWN = 255

_children: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


def forget_as_child_when_forked(process: BaseProcess) -> None:
    """Have multiprocessing not wait for ``process`` at the end of whatever this process forks."""
    _children.add(process)


def _after_fork_in_child() -> None:
    multiprocessing.process._children.difference_update(_children)  # type: ignore[attr-defined]  # unknown to typeshed
    _children.clear()
    for item in list(_guarded):
        item.close_when_forked()
    _guarded.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
