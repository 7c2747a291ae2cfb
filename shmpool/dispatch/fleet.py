"""The fleet: the workers that an executor has, and what is said to them.

The driver's lock guards all of it; the caller holds it.  Nothing here runs user code, except that to start a worker
can pickle the initializer.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from shmpool.config import LONGEST_POLL
from shmpool.dispatch.task import Task
from shmpool.store.blocks import Block
from shmpool.store.store import ObjectStore
from shmpool.wire import messages
from shmpool.wire.channel import MAX_FDS
from shmpool.wire.messages import Call, Extras, Notice
from shmpool.worker.process import ProcessLike, Starter, WorkerHandle, start_worker

__all__ = ["Fleet", "Source"]

#: A message to a worker names at most so many freed blocks, so that it fits in a packet.
_MOST_FREED = 1000


class Source(NamedTuple):
    """What the dispatcher waits for: a worker's answers, or its end."""

    worker: int
    handle: WorkerHandle
    is_exit: bool


class Fleet:
    """Workers by number, and the one thing to wait on for all of them.

    Parameters
    ----------
    store : ObjectStore

    Attributes
    ----------
    workers : dict of int to WorkerHandle
    leaving : dict of int to WorkerHandle
        Retired, and not yet ended.
    processes : dict of int to process
        Of the workers, by pid.
    poller : select.epoll
    starter : callable
        Starts processes.
    """

    def __init__(self, store: ObjectStore, processes: dict[int, ProcessLike]) -> None:
        self._store = store
        self._sources: dict[int, Source] = {}  # by descriptor
        self.workers: dict[int, WorkerHandle] = {}
        self.leaving: dict[int, WorkerHandle] = {}
        self.processes = processes
        self.poller = select.epoll()
        self.starter: Starter | None = None

    def __iter__(self) -> Iterator[WorkerHandle]:
        yield from self.workers.values()
        yield from self.leaving.values()

    def __bool__(self) -> bool:
        return bool(self.workers or self.leaving)

    def wait(self, seconds: float | None) -> list[Source | int]:
        """Wait until something happens, at most so long or a day; what it was, a bare descriptor if not a worker's."""
        if seconds is not None:
            seconds = min(seconds, LONGEST_POLL)
        return [self._sources.get(fd, fd) for fd, _ in self.poller.poll(seconds)]

    def is_current(self, source: Source) -> bool:
        """Is it still waited for?  Something that happened at the same time may have ended it."""
        handle = source.handle
        fd = handle.exited if source.is_exit else handle.end.answers.fileno()
        return self._sources.get(fd) is source

    # ---------------------------------------------------------------- a worker's life

    def start(self, worker: int) -> None:
        """Start a process as worker ``worker``.

        Raises
        ------
        Exception
            What starting the process, or pickling the initializer, raised; there is no such worker then.
        """
        assert self.starter is not None
        handle = start_worker(self.starter)
        handle.number = worker
        try:
            self._enter(worker, handle)
        except BaseException:
            # It has begun, and would wait for ever for what it was to be told.
            handle.signal(signal.SIGKILL)
            handle.process.join()
            self.remove(worker, handle)
            raise

    def _enter(self, worker: int, handle: WorkerHandle) -> None:
        """Have a worker that has just been started, and give it the arenas of its initializer's arguments."""
        self.workers[worker] = handle
        self.processes[handle.pid] = handle.process
        self._store.add_peer(handle.peer)
        for fd, is_exit in ((handle.end.answers.fileno(), False), (handle.exited, True)):
            self.poller.register(fd, select.EPOLLIN)
            self._sources[fd] = Source(worker, handle, is_exit)
        if handle.lent is not None and handle.lent.blocks:
            extras = Extras()
            with _introduced(self._store, handle, handle.lent.blocks, extras) as fds:
                handle.end.send(messages.encode(Notice(extras)), fds)
            handle.introduced = [arena[0] for arena in extras.arenas]

    def ready(self, handle: WorkerHandle) -> None:
        """A worker has started, and so has the arenas of its initializer's arguments."""
        handle.ready = True
        handle.peer.knows.update(handle.introduced)

    def retire(self, worker: int) -> None:
        """Let a worker end; it does not count any more."""
        handle = self.workers.pop(worker)
        self.leaving[worker] = handle
        self.processes.pop(handle.pid, None)
        handle.end.end_of_calls()

    def stop(self) -> None:
        """Let all workers end."""
        for handle in self.workers.values():
            handle.end.end_of_calls()

    def signal(self, number: int) -> None:
        """Send a signal to all workers."""
        for handle in self:
            handle.signal(number)

    def remove(self, worker: int, handle: WorkerHandle) -> None:
        """A worker is no more."""
        self.stop_reading(handle)
        self._forget(handle.exited)
        self.workers.pop(worker, None)
        self.leaving.pop(worker, None)
        self.processes.pop(handle.pid, None)
        self._store.lost_peer(handle.peer)
        handle.close()

    def bury(self) -> None:
        """Wait for the end of all workers, which were killed; nobody else will, and they would stay zombies."""
        for worker, handle in [*self.workers.items(), *self.leaving.items()]:
            handle.process.join()
            self.remove(worker, handle)

    def disarm(self, handle: WorkerHandle) -> None:
        """Do not wait for a worker's answers: another thread does, or nobody for now."""
        if handle.armed and handle.end.answers.fileno() in self._sources:
            self.poller.modify(handle.end.answers.fileno(), 0)
            handle.armed = False

    def arm(self, handle: WorkerHandle) -> None:
        """Wait for a worker's answers again."""
        if not handle.armed and handle.end.answers.fileno() in self._sources:
            self.poller.modify(handle.end.answers.fileno(), select.EPOLLIN)
            handle.armed = True

    def stop_reading(self, handle: WorkerHandle) -> None:
        """Nothing more will come from a worker."""
        self._forget(handle.end.answers.fileno())

    def _forget(self, fd: int) -> None:
        if self._sources.pop(fd, None) is not None:
            self.poller.unregister(fd)

    def close(self) -> None:
        """All workers are gone."""
        self.poller.close()

    # ---------------------------------------------------------------- what is said to a worker

    def send(self, worker: int, batch: list[tuple[int, Task]]) -> tuple[int, Exception | None]:
        """Send tasks to a worker, as far as its socket has room.

        Returns
        -------
        int
            How many were sent, the first ones.
        Exception or None
            Why the next cannot be sent, now or later; None if there is no next, or no room for it now.
        """
        handle = self.workers[worker]
        peer = handle.peer
        room = self._store.room_for(peer)
        sent = 0
        while sent < len(batch):
            if peer.to_free or peer.to_forget:
                plain: list[bytes] = []
            else:
                plain = _plain_calls(batch[sent:] if sent else batch, handle, room)
            try:
                if plain:
                    went = handle.end.send_many(plain)
                    sent += went
                    if went < len(plain):
                        return sent, None
                else:
                    if not self._send_with_extras(handle, *batch[sent], room):
                        return sent, None
                    sent += 1
            except Exception as error:
                return sent, error.with_traceback(None)  # its frames hold those of whoever submits
        return sent, None

    def _send_with_extras(self, handle: WorkerHandle, number: int, task: Task, room: int) -> bool:
        """Send a task with what else is to be said; False if the socket is full."""
        task.handle = handle
        extras = self._news(handle)
        introduced: list[int] = []
        sent = False
        try:
            with _introduced(self._store, handle, task.blocks, extras) as fds:
                introduced += [arena[0] for arena in extras.arenas]
                while len(fds) > MAX_FDS:  # the results of as many workers, say, in one list
                    first = Notice(Extras(extras.arenas[:MAX_FDS]))
                    if not handle.end.send(messages.encode(first), fds[:MAX_FDS]):
                        return False  # what has been sent of it will be sent again
                    del fds[:MAX_FDS], extras.arenas[:MAX_FDS]
                call = Call(
                    number, task.function.payload.data, task.arguments.data, task.limits.readonly, room, extras,
                    task.function.serial,
                )  # fmt: skip
                sent = handle.end.send(messages.encode(call), fds)
        finally:
            if sent:
                task.introduced = introduced
            else:
                self._unsaid(handle, extras)
        return sent

    def take_back(self, worker: int, most: int = 1 << 30) -> list[int]:
        """Tasks that a worker has not read; what else their messages said is to be said again."""
        handle = self.workers[worker]
        numbers: list[int] = []
        while len(numbers) < most:
            data = handle.end.take_back()
            if data is None:
                break
            message = messages.decode(data)
            assert isinstance(message, Call | Notice)
            if message.extras is not None:
                self._unsaid(handle, message.extras)
            if isinstance(message, Call):
                numbers.append(message.task)
        return numbers

    def tell_idle(self) -> None:
        """After some idle time: tell workers what they need not keep, although there is no call to say it with."""
        for handle in self.workers.values():
            extras = self._news(handle)
            if extras:
                notice = Notice(extras, self._store.room_for(handle.peer))
                sent = False
                with contextlib.suppress(OSError):  # it is about to end
                    sent = handle.end.send(messages.encode(notice))
                if not sent:
                    self._unsaid(handle, extras)

    def _news(self, handle: WorkerHandle) -> Extras:
        freed, forgotten = self._store.take_frees(handle.peer, _MOST_FREED)
        return Extras(freed=freed, forgotten=forgotten)

    def _unsaid(self, handle: WorkerHandle, extras: Extras) -> None:
        self._store.untake_frees(handle.peer, extras.freed, extras.forgotten)


def _plain_calls(batch: list[tuple[int, Task]], handle: WorkerHandle, room: int) -> list[bytes]:
    """The messages of the first tasks, up to one with an arena that the worker may not know."""
    knows = handle.peer.knows
    plain = []
    for number, task in batch:
        if task.blocks and not all(block.arena in knows for block in task.blocks):
            break
        task.handle = handle
        function = task.function
        data = function.payload.data, task.arguments.data
        plain.append(
            messages.encode_call(number, *data, task.limits.readonly, room, function.serial)
        )
    return plain


@contextlib.contextmanager
def _introduced(
    store: ObjectStore, handle: WorkerHandle, blocks: Iterable[Block], extras: Extras
) -> Iterator[list[int]]:
    """Descriptors of the arenas that a worker may not know, for one message; the arenas are entered into its extras."""
    arenas = store.introduce(handle.peer, blocks)
    extras.arenas += [info for info, _ in arenas]
    try:
        yield [fd for _, fd in arenas]
    finally:
        for _, fd in arenas:
            os.close(fd)
