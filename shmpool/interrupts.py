"""Ctrl-C never cuts in two what must be done as a whole.

Python raises the ``KeyboardInterrupt`` of a Ctrl-C in the main thread, between any two of its bytecodes: also where
tables are half changed, or where a lock has just been acquired that nobody would then release.  To block SIGINT in that
thread would not help, since any other thread that gets it has Python raise in the main thread all the same.  So while
the main thread is in such code, the program's handler stands aside for one that takes note, and gets its turn when that
code is through.  That takes microseconds, unless something is wrong: who waits for longer and presses again is heard.

Of other signals' handlers those that raise are not held back: they may raise in the wrong place.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from _thread import get_ident
from collections.abc import Callable
from importlib import import_module
from types import FrameType
from typing import Any, TypeAlias

__all__ = [
    "HeardCondition",
    "HeardEvent",
    "JoinableThread",
    "WholeLock",
    "handle_with",
    "hear",
    "heard",
    "whole",
]

_signal: Any = import_module("_signal")  # signal's makes enums, which takes microseconds
_get_handler, _set_handler = _signal.getsignal, _signal.signal

_SIGINT = int(signal.SIGINT)
#: Seconds after which a second Ctrl-C is not held back any more.
_PATIENCE = 1.0

_Outside: TypeAlias = "tuple[int, _Outside] | None"

# All of these belong to the main thread.
_main = threading.main_thread().ident
_depth = 0  # how many sections it is in
_outside: _Outside = (
    None  # where it is in sections, but Ctrl-C is heard: how many, and what this was there
)
_noted = 0.0  # when a Ctrl-C came that was held back; 0: none did
_users: Any = None  # the handler that stands aside, or was the last to
_ours: Any = None  # the handler of :func:`handle_with`


def handle_with(handler: Callable[[int, FrameType | None], object]) -> None:
    """Handle SIGINT by this, from now on, outside of sections; for processes that are ours.

    There the handler that takes note is the only one, and need not change places twice for each section.
    """
    global _users, _ours
    _users = _ours = handler
    _set_handler(_SIGINT, _note)


def _note(_signum: int, frame: FrameType | None) -> None:
    """The handler while the main thread is in a section."""
    global _noted
    if not _depth or (_noted and time.monotonic() - _noted > _PATIENCE):
        _tell(frame)
    elif not _noted:
        _noted = time.monotonic()


def _tell(frame: FrameType | None) -> None:
    """Have the user's handler do what it does."""
    global _depth, _noted, _outside
    _noted = 0.0
    if _depth or _outside is None:
        _users(_SIGINT, frame)
        return
    here = _outside
    _depth, _outside = here
    _users(_SIGINT, frame)
    _outside = here  # it has not raised: the wait goes on
    _depth = 0


def _enter() -> None:
    global _depth, _users
    if not _depth:
        handler = _get_handler(_SIGINT)
        if handler is _note and _ours is not None:
            _users = _ours  # also if somebody had another one meanwhile
        # SIG_DFL and SIG_IGN are numbers: they cut nothing in two.
        if handler is not _note and callable(handler):
            _users = handler
            try:
                _set_handler(_SIGINT, _note)  # raises what came before
            except ValueError:  # a subinterpreter, which gets no signals
                return
    _depth += 1


def _leave() -> None:
    global _depth
    if _depth > 1:
        _depth -= 1
        return
    # From the next line on it may raise at any: then the handler stays, hears everything, and is put back next time.
    _depth = 0
    if _outside is None and _users is not _ours and _get_handler(_SIGINT) is _note:
        _set_handler(_SIGINT, _users)
    if _noted:
        _tell(sys._getframe(1))


class _Whole:
    __slots__ = ()

    def __enter__(self) -> None:
        if get_ident() == _main:
            _enter()

    def __exit__(self, *_: object) -> None:
        if get_ident() == _main:
            _leave()


class heard:  # noqa: N801  # used as a function is
    """Inside of a section, where Ctrl-C may raise all the same, such as a wait: ``with heard():``.

    If it does raise, it is over with that: what follows in the section, an ``except`` or ``finally``, is whole again.
    """

    __slots__ = ("_here",)
    _here: _Outside

    def __enter__(self) -> None:
        global _depth, _outside
        if not _depth or get_ident() != _main:
            self._here = None
            return
        self._here = _outside = _depth, _outside
        _depth = 0
        if _noted:
            _tell(sys._getframe(1))

    def __exit__(self, *_: object) -> None:
        global _depth, _outside
        here = self._here
        if here is not None and here is _outside:
            _depth = here[0]
            _outside = here[1]


def hear() -> None:
    """Between two steps of a section that may take long: if Ctrl-C has come meanwhile, it raises here."""
    if _noted:
        with heard():
            pass


#: A section of code that Ctrl-C does not cut in two: ``with whole:``, in any thread, nested or not.
whole = _Whole()


class WholeLock:
    """A ``threading.RLock``; while the main thread holds it, it is in a section."""

    __slots__ = ("_lock", "_release", "_take", "is_owned")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._take, self._release = self._lock.acquire, self._lock.release
        #: Does this thread hold it?
        self.is_owned: Callable[[], bool] = self._lock._is_owned  # type: ignore[attr-defined]  # unknown to typeshed

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """As ``RLock.acquire``."""
        if get_ident() != _main:
            return self._lock.acquire(blocking, timeout)
        _enter()
        acquired = False
        try:
            acquired = self._lock.acquire(blocking, timeout)
        finally:
            if not acquired:
                _leave()
        return acquired

    def release(self) -> None:
        """As ``RLock.release``."""
        self._lock.release()
        if get_ident() == _main:
            _leave()

    def __enter__(self) -> None:
        global _depth
        if get_ident() != _main:
            self._take()
            return
        if _depth:
            _depth += 1
        else:
            _enter()
        try:
            self._take()
        except BaseException:
            _leave()
            raise

    def __exit__(self, *_: object) -> None:
        global _depth
        self._release()
        if get_ident() == _main:
            if _depth > 1:
                _depth -= 1
            else:
                _leave()

    # For threading.Condition, which lets go of it while it waits.

    def _is_owned(self) -> bool:
        return self.is_owned()

    def _release_save(self) -> Any:
        return self._lock._release_save()  # type: ignore[attr-defined]

    def _acquire_restore(self, state: Any) -> None:
        self._lock._acquire_restore(state)  # type: ignore[attr-defined]


class HeardCondition(threading.Condition):
    """A condition with a :class:`WholeLock`, whose :meth:`wait` hears Ctrl-C."""

    def __init__(self) -> None:
        super().__init__(WholeLock())  # type: ignore[arg-type]  # all that is needed of an RLock

    def wait(self, timeout: float | None = None) -> bool:
        """As ``Condition.wait``."""
        with heard():
            return super().wait(timeout)


class HeardEvent(threading.Event):
    """An event; waiting for it hears Ctrl-C."""

    def __init__(self) -> None:
        super().__init__()
        self._cond = HeardCondition()


class JoinableThread(threading.Thread):
    """A thread that is still one when Ctrl-C has ended a :meth:`join`: Python 3.11 and 3.12 take it for ended then.

    One that is about to be started can be waited for, too.
    """

    def __init__(self, target: Callable[[], object], name: str) -> None:
        super().__init__(target=target, name=name)
        self._is_over = HeardEvent()

    def run(self) -> None:
        """As ``Thread.run``."""
        try:
            super().run()
        finally:
            self._is_over.set()

    def join(self, timeout: float | None = None) -> None:
        """As ``Thread.join``."""
        if self._is_over.wait(timeout) and self.ident is not None:
            with whole:
                super().join()

    def give_up(self) -> None:
        """It could not be started: nobody is to wait for it."""
        self._is_over.set()


def _after_fork_in_child() -> None:
    global _main, _depth, _outside, _noted, _ours
    _main = get_ident()
    if _get_handler(_SIGINT) is _note:
        _set_handler(_SIGINT, _users if _ours is None else _ours)
    _ours = None
    _depth, _outside = 0, None
    _noted = 0.0


os.register_at_fork(after_in_child=_after_fork_in_child)
