"""``install()``: code that asks the standard library for a process pool gets shmpool's.

What is replaced, and how:

``BaseContext.Pool``, ``multiprocessing.Pool``
    By a method that makes shmpool's pool with the context's start method.  Contexts that are not multiprocessing's own
    or derived from them (loky's) keep the standard library's pool.

``multiprocessing.pool.Pool``, ``concurrent.futures.ProcessPoolExecutor``, also from ``concurrent.futures.process``
    The modules' dictionaries stay as they are, since the standard library itself relies on these names: ``ThreadPool``
    calls ``Pool.__init__``, the ``Pool`` method that somebody imported before does ``from .pool import Pool``, and a
    manager pickles the class by name.  Instead, the modules get another class (``module.__class__``), whose attribute
    look-up shows shmpool's to everybody but ``multiprocessing``, ``concurrent.futures`` and shmpool.

``multiprocessing.spawn.get_preparation_data``, the configuration that processes inherit
    So that children that do not inherit memory are installed, too: see ``_send_to_children``.

Importing this module, installing, and starting a child cost little: numpy and most of shmpool are imported when the
first pool is made.
"""

from __future__ import annotations

import concurrent.futures.process
import multiprocessing
import multiprocessing.context
import multiprocessing.pool
import multiprocessing.process
import multiprocessing.spawn
import os
import runpy
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType, ModuleType, TracebackType
from typing import Any, Self

from shmpool.integrations import standins

__all__ = ["Installation", "install", "uninstall"]

#: The standard library's classes, by the name that they have in the modules below.
_STANDARD = {
    "Pool": multiprocessing.pool.Pool,
    # Asked of the package first: it loads the name late, and keeps what it then finds in the module.
    "ProcessPoolExecutor": concurrent.futures.ProcessPoolExecutor,
}
_STAND_INS = {name: getattr(standins, name) for name in _STANDARD}
_MODULES = (multiprocessing.pool, concurrent.futures, concurrent.futures.process)

#: Packages that are shown the standard library's classes.
_WITHIN = ("multiprocessing", "concurrent.futures", "shmpool")

_OWN_CONTEXTS = (
    multiprocessing.context.ForkContext,
    multiprocessing.context.SpawnContext,
    multiprocessing.context.ForkServerContext,
)

_IN_CHILD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "in_child.py")

_lock = threading.RLock()  # guards what follows
_holding: set[Installation] = set()  # installed as long as there are any
_restore: ExitStack | None = None  # what uninstalls; None: not installed


class Installation:
    """One call of :func:`install`, and a context manager that undoes it.

    It travels to child processes, where it installs again.
    """

    def __enter__(self) -> Self:
        with _lock:
            _holding.add(self)
            _replace()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _lock:
            _holding.discard(self)
            if not _holding:
                _put_back()

    def __reduce__(self) -> tuple[Any, ...]:
        return install, ()


def install() -> Installation:
    """Let this process, and its children, use shmpool wherever code asks for a process pool of the standard library.

    From now on these names mean shmpool's classes: ``multiprocessing.Pool``, ``multiprocessing.pool.Pool``, the
    ``Pool`` method of ``multiprocessing.get_context(method)`` (which keeps the context's start method), and
    ``ProcessPoolExecutor`` of ``concurrent.futures`` and ``concurrent.futures.process``.  They take the same arguments.

    Code that imported one of the names before (``from multiprocessing import Pool``) keeps the standard library's, so
    call this first, or run the program by ``python -m shmpool run``.  ``isinstance`` with either class is true for
    pools of both.  ``ThreadPool``, ``multiprocessing.dummy``, the pools of managers, loky and its context are not
    changed, nor are subclasses of ``Pool`` that override its private methods.

    Child processes are installed, too, however they are started by ``multiprocessing`` or loky; programs started with
    :mod:`subprocess` are not.  (Newer Pythons import the main module in the fork server, once for all its children:
    what that module imports by name is the standard library's in them.)

    Returns
    -------
    Installation
        A context manager: leaving the block undoes this call.

    Notes
    -----
    Calls may be repeated, and blocks may be nested or overlap in several threads: shmpool stays installed until the
    last block is left, or, if ``install()`` was called without ``with``, until :func:`uninstall`.  What is installed is
    the same for all threads.

    Examples
    --------
    >>> import multiprocessing, shmpool
    >>> with shmpool.install():
    ...     with multiprocessing.Pool(2) as pool:
    ...         pool.map(abs, [-1, 2])
    [1, 2]
    """
    return Installation().__enter__()


def uninstall() -> None:
    """Undo all calls of :func:`install`, however many: the names mean the standard library's classes again.

    Pools that were made meanwhile go on.  Not being installed is no error.
    """
    with _lock:
        _holding.clear()
        _put_back()


def _replace() -> None:
    global _restore
    if _restore is not None:
        return
    with ExitStack() as stack:
        for module in _MODULES:
            shown = type("_Shown", (_ShowsStandIns, type(module)), {})
            _set(stack, module, "__class__", shown)
        _set(stack, multiprocessing.context.BaseContext, "Pool", _make_pool_method())
        # The package has the methods of its default context as functions.
        _set(stack, multiprocessing, "Pool", multiprocessing.context._default_context.Pool)
        _send_to_children(stack)
        _restore = stack.pop_all()


def _put_back() -> None:
    global _restore
    if _restore is not None:
        _restore.close()
        _restore = None


def _set(stack: ExitStack, owner: object, name: str, value: Any) -> None:
    """Set an attribute, and have ``stack`` set it back, unless somebody else has replaced it by then."""
    before = getattr(owner, name)
    setattr(owner, name, value)

    def set_back() -> None:
        if getattr(owner, name) == value:  # not `is`: a bound method
            setattr(owner, name, before)

    stack.callback(set_back)


class _ShowsStandIns(ModuleType):
    """A module that shows shmpool's class where it has the standard library's.

    This is not a property: Python 3.14 reads attributes of modules from their dictionary, whatever descriptors their
    class has, unless it has a ``__getattribute__`` of its own.
    """

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in _STANDARD and value is _STANDARD[name] and not _is_within(sys._getframe(1)):
            return _STAND_INS[name]
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Somebody has replaced the name for a while and puts back what was shown.
        if name in _STANDARD and value is _STAND_INS[name]:
            value = _STANDARD[name]
        super().__setattr__(name, value)


def _is_within(frame: FrameType) -> bool:
    """Does the code in this frame belong to a package that is shown the standard library's classes?"""
    module = frame.f_globals.get("__name__") or ""
    return any(module == package or module.startswith(f"{package}.") for package in _WITHIN)


def _make_pool_method() -> Callable[..., Any]:
    standard_method = multiprocessing.context.BaseContext.Pool

    def Pool(  # noqa: N802  # as it is called in multiprocessing
        self: multiprocessing.context.BaseContext,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        maxtasksperchild: int | None = None,
    ) -> Any:
        """Return a process pool object, shmpool's."""
        context: object = self.get_context()
        if not isinstance(context, _OWN_CONTEXTS):
            return standard_method(self, processes, initializer, initargs, maxtasksperchild)
        return standins.Pool(processes, initializer, initargs, maxtasksperchild, context)

    return Pool


def _send_to_children(stack: ExitStack) -> None:
    """Have the children that are started without this process's memory installed, too.

    What multiprocessing sends to a child first is its preparation data: what is in there is unpickled before the child
    imports the main module.  loky has a function of its own for that, and no main module; it does send the process
    object, and with that the configuration that each process inherits from its parent's process object.
    """
    standard_function = multiprocessing.spawn.get_preparation_data

    def get_preparation_data(name: str) -> dict[str, Any]:
        return {**standard_function(name), "shmpool": _Travelling()}

    _set(stack, multiprocessing.spawn, "get_preparation_data", get_preparation_data)
    _inherited()["shmpool"] = Installation()
    stack.callback(lambda: _inherited().pop("shmpool", None))


def _inherited() -> dict[str, Any]:
    """What the process objects of children made by this process will have."""
    return multiprocessing.process.current_process()._config  # type: ignore[attr-defined,no-any-return]


class _Travelling:
    """Unpickling it installs, also where shmpool cannot be imported yet."""

    def __reduce__(self) -> tuple[Any, ...]:
        return runpy.run_path, (_IN_CHILD, None, "shmpool.integrations.in_child")


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)
