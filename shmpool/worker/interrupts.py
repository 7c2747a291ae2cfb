"""Ctrl-C and workers.  It reaches all processes of a terminal, and is the parent's business.

In a worker it interrupts a task, never the worker's own code.  It could come before a worker has said so: while it is
forked (when hooks that close its copies of descriptors would be cut short, so that processes outlive each other for
ever), while it imports what it needs (when a traceback would end up in the terminal).  So SIGINT is blocked while a
process is started, which the new process inherits, through ``exec`` as well; a worker unblocks it as soon as it has a
handler of its own.  A fork server blocks nothing, since it starts other people's processes too: its children hold
SIGINT back from when they unpickle their name (:class:`shmpool.worker.threads.Herald`).
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import FrameType
from typing import Any

from shmpool.interrupts import handle_with

__all__ = ["held_back", "interrupt_only", "is_blocked"]

#: By start method, what multiprocessing and loky would start at the first need, and what unblocks SIGINT by doing so,
#: or would inherit that it is blocked.
_HELPERS = {
    "spawn": ("multiprocessing.resource_tracker",),
    "forkserver": ("multiprocessing.resource_tracker",),
    "loky": ("loky.backend.resource_tracker", "multiprocessing.resource_tracker"),
    "loky_init_main": ("loky.backend.resource_tracker", "multiprocessing.resource_tracker"),
}


def is_blocked() -> bool:
    """Does this thread, as the user wants it, get no SIGINT?"""
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@contextlib.contextmanager
def held_back(start_method: str) -> Iterator[None]:
    """Have SIGINT wait while a process is started, in this thread and in that process."""
    for helper in _HELPERS.get(start_method, ()):
        import_module(helper).ensure_running()
    if start_method == "forkserver":
        _start_fork_server()
        yield
        return
    with _blocked():
        yield


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        # This may raise the KeyboardInterrupt of a Ctrl-C before, when SIGINT is blocked already.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Unblocking(list[str]):
    """The modules that a fork server imports first; how they are told to it has it unblock SIGINT.

    It would die of a Ctrl-C while it starts, with a traceback, but its children must not inherit that SIGINT is
    blocked: they may be anybody's.  What came meanwhile is dropped, by ignoring it for a moment.
    """

    def __repr__(self) -> str:
        module = "__import__('signal')"
        return (
            f"[{module}.signal(2, {module}.SIG_IGN), {module}.pthread_sigmask({module}.SIG_UNBLOCK, [2]),"
            f" {module}.signal(2, {module}.default_int_handler), {super().__repr__()}][3]"
        )


def _start_fork_server() -> None:
    """Start it, unless it runs."""
    module: Any = import_module("multiprocessing.forkserver")
    server = module._forkserver
    modules = server._preload_modules
    with _blocked():
        server._preload_modules = _Unblocking(modules)
        try:
            module.ensure_running()
        finally:
            server._preload_modules = modules


def interrupt_only(may_raise: Callable[[], bool], *, unblock: bool) -> None:
    """From now on SIGINT interrupts tasks, and nothing else; if the user has other plans for it, those hold.

    Parameters
    ----------
    may_raise : callable
        Told of it; does a task run?
    unblock : bool
        SIGINT was blocked by :func:`held_back`, not by the user.
    """

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        if may_raise():
            signal.default_int_handler(signum, frame)

    if _is_pythons_own(signal.getsignal(signal.SIGINT)):
        handle_with(on_interrupt)
    if unblock:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _is_pythons_own(handler: Any) -> bool:
    """Python's, or that by which ``asyncio.run`` has it end a coroutine: a worker that is forked in one inherits it."""
    if handler is signal.default_int_handler:
        return True
    runner: Any = getattr(sys.modules.get("asyncio"), "Runner", ())
    return isinstance(getattr(getattr(handler, "func", None), "__self__", None), runner)
