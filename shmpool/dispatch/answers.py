"""Answers: read from a worker, told to the machine, and delivered to the futures.

::

    handle.reader:  channel --receive--> messages --decode--> | lock: foreman, machine, the next Sends
                                                              | store: take over the result's blocks
    no lock at all: unpickle --> futures, callbacks  <--------'

Whoever reads holds ``handle.reader``, so each worker's answers are read by one thread at a time, in order: the
dispatcher or one that leads.  What is read is told to the machine at once, before anything of it is delivered: the
user's code runs then, and the worker has its next task.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterable

from shmpool.dispatch.foreman import Foreman
from shmpool.dispatch.settle import Failures, death, each, resolve, settle, without_frames
from shmpool.dispatch.task import Task
from shmpool.errors import WireError
from shmpool.serialize.tracebacks import traceback_in
from shmpool.store.blocks import ArenaInfo, Block
from shmpool.store.store import ObjectStore, Payload
from shmpool.wire import messages
from shmpool.wire.messages import Answer, Failed, Ready
from shmpool.worker.process import WorkerHandle

__all__ = ["Answered", "Answers"]

_log = logging.getLogger("shmpool")

#: A task, whether it raised nothing, and its result (or what it raised), still packed; or why there is none.
Answered = tuple[Task, bool, Payload | BaseException]


class Answers:
    """Reads and delivers answers.  It has no state of its own.

    Parameters
    ----------
    foreman : Foreman
    store : ObjectStore
    """

    def __init__(self, foreman: Foreman, store: ObjectStore) -> None:
        self._foreman = foreman
        self._store = store

    def pass_on(self, handle: WorkerHandle) -> bool:
        """Read once what a worker has answered, and deliver it; False if there was nothing."""
        answers = self.read(handle)
        self.deliver(answers or ())
        return answers is not None

    def read(self, handle: WorkerHandle, *, copy: bool = False) -> list[Answered] | None:
        """Read once what a worker has answered; None if there was nothing.  The caller holds ``handle.reader``.

        Unless copied, small results lie in the channel's buffer: to be delivered before anything else is read.
        """
        assert handle.reader.locked()
        if handle.end.problem is not None:
            return None
        received: list[messages.FromParent | messages.FromWorker] = []
        problem: str | None = None
        got: int | None = 0
        try:
            data, got = handle.end.receive()
            problem = handle.end.problem
            for one in data:
                # One by one: what came before something wrong counts.
                received.append(messages.decode(bytes(one) if copy else one))  # noqa: PERF401
        except (WireError, OSError) as error:
            problem = str(error)
        answers, wrong = self._take(handle, received) if received else ([], None)
        problem = wrong or problem
        if problem is not None:
            _log.error("worker %d is of no more use, and is killed: %s", handle.pid, problem)
        if problem is not None or got == 0:
            with self._foreman.lock:
                if problem is not None:
                    self._foreman.condemn(handle, problem)
                self._foreman.stop_reading(handle)
            return answers or None
        return answers if got else None

    def _take(
        self, handle: WorkerHandle, received: list[messages.FromParent | messages.FromWorker]
    ) -> tuple[list[Answered], str | None]:
        """Let the machine know of messages.

        Returns
        -------
        list
            The tasks that they answer, with the results still packed.
        str or None
            What is wrong with them.
        """
        foreman = self._foreman
        taken: list[tuple[Task, Answer]] = []
        done: list[tuple[int, int]] = []
        failures: Failures = []
        problem: str | None = None
        with foreman.lock:
            for message in received:
                if type(message) is Answer:
                    task = foreman.table.answered(handle, message)
                    if task is not None:
                        done.append((message.task, message.microseconds))
                        taken.append((task, message))
                    elif foreman.broken is None:
                        problem = f"an answer to task {message.task}, which was not asked"
                    else:  # it has failed with the pool
                        handle.end.descriptors.close()
                elif isinstance(message, Ready) and not handle.ready:
                    failures += foreman.ready(handle)
                elif isinstance(message, Failed) and handle.ready:
                    problem = message.text
                elif isinstance(message, Failed):
                    foreman.init_failed(handle, message.text)
                else:
                    problem = f"{type(message).__name__}, which was not asked"
                if problem is not None:
                    foreman.condemn(handle, problem)
                    break
            if done:
                failures += foreman.go_on(handle, done)
        # Not settled here: a callback that exits would lose the answers.
        answers: list[Answered] = [(task, False, error) for task, error in failures]
        wrong: str | None = None
        for task, answer in taken:
            if wrong is None:
                try:
                    answers.append((task, answer.ok, self._receive(handle, task, answer)))
                    continue
                except Exception as error:
                    wrong = f"{type(error).__name__}: {error}"
                    with foreman.lock:
                        foreman.condemn(handle, wrong)
            answers.append((task, False, death(handle, task, -signal.SIGKILL)))
        return answers, wrong or problem

    def _receive(self, handle: WorkerHandle, task: Task, answer: Answer) -> Payload:
        """Take over the blocks of a result, then let go of the arguments'."""
        store, peer, extras = self._store, handle.peer, answer.extras
        fds: list[int] = []
        payload: Payload | None = None
        try:
            if extras is not None:
                fds = handle.end.descriptors.take(len(extras.arenas))
                for arena in extras.arenas:
                    store.meet(ArenaInfo(*arena), fds.pop(0), peer)
            store.peer_resident(peer, answer.resident)
            payload = store.receive(answer.result, peer)
            if extras is not None and (extras.kept or extras.released):
                kept = [Block(*block) for block in extras.kept]
                store.peer_keeps(peer, kept, [Block(*block) for block in extras.released])
        except BaseException:
            if payload is not None:
                payload.release()
            raise
        finally:
            for fd in fds:
                os.close(fd)
            task.arguments.release()
        if task.introduced:
            peer.knows.update(task.introduced)
        return payload

    def deliver(self, answers: Iterable[Answered]) -> None:
        """Unpickle results and resolve the futures: all of them, also if a callback of one says ``sys.exit()``."""
        each(self._deliver_one, answers)

    def _deliver_one(self, task: Task, ok: bool, payload: Payload | BaseException) -> None:
        if isinstance(payload, BaseException):
            settle([(task, payload)])
            return
        try:
            value = self._store.load(payload, "r" if task.limits.readonly else "c")
            if not ok and not isinstance(value, BaseException):
                raise TypeError(f"what was raised arrived as {value!r:.100}, which is no exception")  # noqa: TRY301
        except BaseException as error:
            if not ok:
                self._say_what_was_raised(payload, error)
            ok, value = False, without_frames(error)
        finally:
            payload.release()
        resolve(task.future, ok, value)

    def _say_what_was_raised(self, payload: Payload, error: BaseException) -> None:
        """What a task has raised cannot be unpickled, which raised ``error``: the worker's traceback goes with that."""
        text = ""
        with contextlib.suppress(Exception):  # no room for views of it, say
            text = self._store.load(payload, "r", traceback_in).strip('\n"')
        if text:
            error.add_note(f"while this was unpickled, which the task had raised:\n{text}")
