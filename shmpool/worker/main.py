"""A worker: receive, run, send, in one thread.

What a task's code can do to a worker is limited to what it could do to a worker of ``concurrent.futures``: raise
anything, keep its arguments in globals, start threads, exit.  Whatever it raises becomes an answer; only the death of
the process does not.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import time
import traceback
from typing import Any, Literal, NamedTuple, NoReturn

from shmpool.config import Config
from shmpool.errors import SerializationError, WireError
from shmpool.memory.segment import Mode
from shmpool.serialize.mainmodule import MainModule
from shmpool.serialize.pickling import EXCEPTION, RESULT, Pickling
from shmpool.store import current
from shmpool.store.blocks import ArenaInfo, Block
from shmpool.store.heap import HugePages
from shmpool.store.peer import Peer
from shmpool.store.refs import ObjectRef, Values
from shmpool.store.store import ObjectStore, Payload
from shmpool.wire import messages
from shmpool.wire.channel import WorkerEnd, die_with
from shmpool.wire.messages import Answer, Call, Extras, Failed, Notice, Ready
from shmpool.worker.functions import Function, Functions
from shmpool.worker.init import Initializer, Travelled
from shmpool.worker.interrupts import interrupt_only
from shmpool.worker.threads import start_capped

__all__ = ["Settings", "main"]

#: For so many seconds a worker begins no other task after Ctrl-C has ended one.
_REST = 0.3


class Settings(NamedTuple):
    """What a worker is told when it starts.

    ``mode`` is how initargs are mapped; ``threads`` how many BLAS and OpenMP may use, None for no cap;
    ``interruptible`` whether Ctrl-C may reach workers: SIGINT was not blocked where the executor was made.
    """

    config: Config
    capacity: int
    spill_dir: str | Literal[False] | None
    huge_pages: HugePages
    mode: Mode
    threads: int | None = None
    interruptible: bool = True


def main(end: WorkerEnd, initializer: Initializer | Travelled, settings: Settings) -> None:
    """Run a worker until no more calls can come."""
    die_with(end.lifeline)
    start_capped(settings.threads)
    store = ObjectStore(
        settings.capacity, settings.spill_dir, settings.huge_pages, config=settings.config
    )
    store.start_use(lambda: None)
    current.set_store(store)
    worker = _Worker(end, store, settings)
    try:
        interrupt_only(worker.interrupt, unblock=settings.interruptible)
        if worker.start(initializer):
            worker.run()
    except (BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    except KeyboardInterrupt:
        pass  # between tasks: Ctrl-C is the parent's business
    except (WireError, OSError, MemoryError) as error:
        # A call was lost, or half of it; or the answer.  The next would not be understood either.
        with contextlib.suppress(OSError):
            end.send(messages.encode(Failed(f"{type(error).__name__}: {error}")))


class _Worker:
    def __init__(self, end: WorkerEnd, store: ObjectStore, settings: Settings) -> None:
        self._end = end
        self._store = store
        self._settings = settings
        self._parent = Peer(upstream=True)
        self._pickling = Pickling(MainModule.live(), store.wanted)
        self._functions = Functions(store, self._parent)
        self.in_task = False
        self._was_interrupted = False
        self._rests = False
        self._pid = os.getpid()
        store.add_peer(self._parent)

    def interrupt(self) -> bool:
        """Ctrl-C has come; may it raise?  It may in a task.  One that is about to begin is interrupted then."""
        self._was_interrupted = True
        if self.in_task:
            self._rests = True
        return self.in_task

    def start(self, initializer: Initializer | Travelled) -> bool:
        """Run the initializer, and say that this worker is ready; False if the initializer raised."""
        if initializer.needs_arenas:
            data = self._end.receive()
            if data is None:
                return False
            message = messages.decode(data)
            assert isinstance(message, Notice)
            self._take(message.extras)
        try:
            self.in_task = True
            initializer.run(self._store, self._parent, self._settings.mode)
        except BaseException:
            # As the standard library does; BaseException, since an exit would look like a crash.
            logging.getLogger("concurrent.futures").critical(
                "Exception in initializer:", exc_info=True
            )
            self._end.send(messages.encode(Failed(traceback.format_exc())))
            return False
        finally:
            self.in_task = False
        self._end.send(messages.encode(Ready(os.getpid())))
        return True

    def run(self) -> None:
        """Answer calls until no more can come."""
        store = self._store
        functions = self._functions
        while (data := self._next()) is not None:
            message = messages.decode(data)
            assert isinstance(message, Call | Notice)
            functions.expect(message)
            if isinstance(message, Call):
                self._was_interrupted = False
                self._take(message.extras)
                store.set_capacity(message.room)
                self._answer(message)
                if self._rests:
                    # Whoever pressed may be about to take back, or to cancel, the tasks that would come next.
                    self._rests = False
                    self._end.wait_for_end(_REST)
            else:
                self._take(message.extras)
                if message.room:
                    store.set_capacity(message.room)

    def _next(self) -> memoryview | None:
        """The next message, or None at their end.  Nothing is kept for it for longer than it may."""
        end, store, functions = self._end, self._store, self._functions
        while functions.keeps_one or store.idle_seconds() is not None:
            try:
                return end.receive(wait=False)  # one system call where another call waits
            except BlockingIOError:
                functions.forget()
            if not end.wait(store.idle_seconds()):
                store.give_back_if_idle()
            # Else there is one, or was: it may have been taken back.
        return end.receive()

    def _take(self, extras: Extras | None) -> None:
        """What the parent says beside the call."""
        if extras is None:
            return
        store = self._store
        fds = self._end.descriptors.take(len(extras.arenas))
        for (arena_id, size, flags), fd in zip(extras.arenas, fds, strict=True):
            store.meet(ArenaInfo(arena_id, size, flags), fd, self._parent)
        if extras.freed:
            store.freed(extras.freed)
        if extras.forgotten:
            store.forget(extras.forgotten)

    def _answer(self, call: Call) -> None:
        store = self._store
        function = self._functions.receive(call)
        arguments = store.receive(call.arguments, self._parent)
        lent = arguments.blocks
        started = time.perf_counter_ns()
        ok, result = self._run(function, arguments)
        microseconds = (time.perf_counter_ns() - started) // 1000
        if os.getpid() != self._pid:
            _leave(ok, result)
        arguments.release()
        ok, payload = self._pack(ok, result)
        del (
            result
        )  # its views, which may be of the arguments, must be gone before asking what is kept
        lent = [*lent, *self._functions.done(function, lent)]
        try:
            arenas = store.introduce(self._parent, payload.blocks) if payload.blocks else []
        except OSError as error:  # out of descriptors
            payload.release()
            arenas = []
            ok, payload = self._pack(False, _with_traceback(error))
        extras = self._extras(payload, lent)
        told = (
            call.task, ok, payload.data, payload.copied, payload.shared, microseconds, store.resident,
        )  # fmt: skip
        if extras is None:
            self._end.send(messages.encode_answer(*told))
            return
        fds = self._hand_over(extras, arenas) if arenas else None
        try:
            self._end.send(messages.encode(Answer(*told, extras)), fds)
        finally:
            for fd in fds or ():
                os.close(fd)

    def _run(self, function: Function, arguments: Payload) -> tuple[bool, Any]:
        """Call the function; its frame, and with it the arguments, are gone when this returns."""
        try:
            fn = self._functions.load(function)
            args, kwargs = self._store.load(arguments, function.mode)
            if kwargs or _has_ref(args):
                args, kwargs = _resolved(args, kwargs, function.mode)
            self.in_task = True
            try:
                if self._was_interrupted:
                    raise KeyboardInterrupt  # as if it had just begun
                return True, fn(*args, **kwargs)
            finally:
                self.in_task = False
        except BaseException as error:
            # All of it: SystemExit, KeyboardInterrupt; as in concurrent.futures.
            return False, _with_traceback(error)

    def _pack(self, ok: bool, result: Any) -> tuple[bool, Payload]:
        store, pickling = self._store, self._pickling
        try:
            return ok, store.dump(result, pickling, RESULT if ok else EXCEPTION)
        except BaseException as error:
            if isinstance(error, SerializationError):
                # For pools, which say so in multiprocessing's words.
                shown = _shown(result if ok else getattr(result, "exc", result))
                vars(error).update(value=shown, exc=repr(error.__cause__))
                if not ok:
                    # What was raised cannot travel: its traceback, at least, can.
                    error.add_note(f"The exception was:\n{getattr(result, 'tb', result)}")
            try:
                return False, store.dump(_with_traceback(error), pickling, EXCEPTION)
            except Exception as again:
                # Nor can what was raised by pickling it: a BaseException of the user's, or one with causes that go
                # along (tblib sees to that, which dask installs) and are too deep. What both say can.
                from shmpool.serialize.words import reason_of

                reason = f"{reason_of(error)}; {reason_of(again)}"
                said = SerializationError(what=EXCEPTION[0], culprit=None, reason=reason)
                return False, store.dump(_with_traceback(said), pickling, EXCEPTION)

    def _extras(self, payload: Payload, lent: list[Block]) -> Extras | None:
        released = self._store.take_releases(self._parent)
        if not (lent or released or payload.blocks):
            return None
        if payload.blocks:
            self._store.lend(payload, self._parent)
        kept: list[Block] = []
        if lent and self._store.holds_any(lent):
            # An argument that refers to itself is young garbage, and no reason to keep its arrays.
            gc.collect(1)
            kept = self._store.kept_after(lent)
        return Extras(kept=kept, released=released)  # type: ignore[arg-type]  # a Block is a triple of numbers

    def _hand_over(self, extras: Extras | None, arenas: list[tuple[ArenaInfo, int]]) -> list[int]:
        assert extras is not None
        fds = []
        for info, fd in arenas:
            extras.arenas.append(info)
            fds.append(fd)
            self._parent.knows.add(info.id)
        return fds


def _leave(ok: bool, result: Any) -> NoReturn:
    """A child that the task has forked came back from it: it ends as a process does, and answers nothing."""
    if not ok and not isinstance(result.exc, SystemExit):
        print(result.tb, file=sys.stderr)  # noqa: T201  # what else would have printed it
        raise SystemExit(1)
    raise SystemExit(0) if ok else result.exc


def _has_ref(args: tuple[Any, ...]) -> bool:
    for arg in args:  # noqa: SIM110  # any() would make a generator, for each task
        if type(arg) is ObjectRef:
            return True
    return False


def _resolved(
    args: tuple[Any, ...], kwargs: dict[str, Any], mode: Mode
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Refs at the top level become their values, each decoded once."""
    values = Values(mode)
    return tuple(map(values.of, args)), {name: values.of(arg) for name, arg in kwargs.items()}


def _shown(result: object) -> str:
    """``repr(result)``, if that works, and not all of it if it is endless."""
    try:
        return repr(result)[:10_000]
    except Exception:
        return object.__repr__(result)


def _with_traceback(error: BaseException) -> Any:
    """The exception in the standard library's envelope: it arrives with a ``_RemoteTraceback`` as its cause."""
    from concurrent.futures.process import _ExceptionWithTraceback

    envelope = _ExceptionWithTraceback(error, error.__traceback__)  # type: ignore[arg-type]  # None serves
    error.__traceback__ = None  # its frames hold the task's arguments
    return envelope
