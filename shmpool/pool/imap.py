"""``imap`` and ``imap_unordered``: read an iterable ahead, but not far; yield results.

::

    iterable --Reader--> tasks --futures--> Results --> the user's next()
                 ^                                          |
                 '----------------- Window <----------------'
                   may one more be read?     one was taken

As in multiprocessing, the iterable is read in a thread of its own, so that one that blocks (a queue, a socket) holds up
no result.  Other than there, reading waits until results are taken: there is never more under way than the window
allows, in number and in bytes.  What is read at once (a list that fits in the window) needs no thread.

Who holds whom
    pool -> readers, and the user's iterator -> pool.  A reader's thread holds its reader only while it submits.  So
    when the pool is gone, its readers are, and their threads end, even if an iterable is never heard of again.
When nobody takes the results any more
    An iterator that was dropped before its first result was asked for: the user wants the tasks to run, not their
    results; the thread drops results as they come.  One that was dropped later (by ``break``): the user has seen
    enough.  Nothing more is read, and tasks that have not begun are cancelled.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import chain, islice
from multiprocessing import pool as stdlib
from typing import TYPE_CHECKING, Any, Protocol

from shmpool.interrupts import HeardEvent, JoinableThread
from shmpool.pool.arrivals import InOrder, Unordered
from shmpool.pool.outcomes import without_frames
from shmpool.pool.window import Window

__all__ = ["INERT", "IMapIterator", "IMapUnorderedIterator", "Owner", "Reader", "calls_of"]

#: The arguments of a task.
Args = tuple[Any, ...]
Submit = Callable[[Args], Future[Any]]

#: No code of the user's runs while these are read, so nothing can block.
INERT = (list, tuple, range)


class Owner(Protocol):
    """Who has readers: what is behind a pool."""

    def add_reader(self, reader: Reader) -> None:
        """It begins."""

    def reader_ended(self, reader: Reader) -> None:
        """It will submit nothing more."""

    def give_up(self, results: InOrder | Unordered) -> None:
        """Cancel what has not begun of it, at the next opportunity.  Safe in finalizers."""


def calls_of(iterable: Iterable[Any], chunksize: int) -> Iterator[Args]:
    """The arguments of each task, so many items at a time.  It holds no item, which may be large."""
    if chunksize == 1:
        return map(_one, iterable)
    items = iter(iterable)
    return iter(lambda: tuple(islice(items, chunksize)), ())


def _one(item: Any) -> Args:
    return (item,)


class Reader:
    """Reads the iterable of one call, and submits tasks.

    Parameters
    ----------
    submit : callable
        Given the arguments of a task, returns its future.
    results : InOrder or Unordered
    window : Window
    owner : weak reference to an Owner
    """

    def __init__(
        self,
        submit: Submit,
        results: InOrder | Unordered,
        window: Window,
        owner: weakref.ref[Owner],
    ) -> None:
        self._submit = submit
        self._owner = owner
        self.results = results
        self.window = window
        self._caller = threading.get_ident()  # reads what is read at once
        self._is_begun = HeardEvent()  # that has been read; the thread, if any, was started
        self._thread: JoinableThread | None = None

    def __del__(self) -> None:
        self.window.close()

    def start(self, iterable: Iterable[Any], chunksize: int) -> None:
        """Read what can be read at once, and let a thread read the rest.

        What goes wrong is the last of the results.
        """
        try:
            owner = self._owner()
            if owner is not None:
                owner.add_reader(self)
            calls = calls_of(iterable, chunksize)
            rest = self._read_at_once(calls) if type(iterable) in INERT else calls
            if rest is None:
                self.end()
                return
            read_on = partial(_read_on, rest, self.window, weakref.ref(self))
            thread = JoinableThread(read_on, "shmpool-imap")
            thread.daemon = True
            try:
                thread.start()
            except RuntimeError:
                if threading.main_thread().is_alive():
                    raise
                # So late, some Pythons start no thread any more: all is read now, as multiprocessing does at any time.
                self.window.remove_limits()
                read_on()
            else:
                self._thread = thread
        except Exception as error:
            self.end(without_frames(error))
        finally:
            self._is_begun.set()

    def join(self) -> None:
        """Wait until it has read all; not if the caller is what it reads, or what runs while it submits."""
        if not self._is_begun.is_set():
            if self._caller == threading.get_ident():
                return
            self._is_begun.wait()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _read_at_once(self, calls: Iterator[Args]) -> Iterator[Args] | None:
        """Read until the window is full; what is left, or None if that was all."""
        for args in calls:
            if not self.window.has_room():
                return chain([args], calls)
            self.submit(args)
        return None

    def submit(self, args: Args) -> None:
        """Submit a task."""
        self.window.enter()
        future = self._submit(args)
        self.results.add(future)
        if self.window.may_grow:
            future.add_done_callback(self.window.one_done)

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more is read."""
        self.results.end(error)
        owner = self._owner()
        if owner is not None:
            owner.reader_ended(self)


def _read_on(calls: Iterator[Args], window: Window, ref: weakref.ref[Reader]) -> None:
    """A reader's thread.  It holds the reader, and with it the executor, neither while it waits nor while it reads."""
    failure: BaseException | None = None
    try:
        while _wait_for_room(window, ref):
            args = next(calls, None)
            reader = ref()
            if args is None or reader is None or not window.is_open:
                break
            reader.submit(args)
            del args, reader
    except (
        BaseException
    ) as error:  # the iterable may raise anything: it belongs to who takes the results
        failure = error
    reader = ref()
    if reader is not None:
        reader.end(failure)
    del failure, reader  # breaks a cycle with the exception's traceback


def _wait_for_room(window: Window, ref: weakref.ref[Reader]) -> bool:
    """Wait until one more task may be submitted; False if none is to be."""
    while window.is_open and not window.has_room():
        if not window.is_forgotten:
            window.wait_for_news()
            continue
        reader = ref()
        if reader is None:
            return False
        results = reader.results
        del reader
        results.take()
        window.one_taken()
    return window.is_open


if TYPE_CHECKING:
    _Base = stdlib.IMapIterator[Any]
    _UnorderedBase = stdlib.IMapUnorderedIterator[Any]
else:  # they are generic for type checkers only
    _Base = stdlib.IMapIterator
    _UnorderedBase = stdlib.IMapUnorderedIterator


class IMapIterator(_Base):
    """What :meth:`Pool.imap` returns.

    Parameters
    ----------
    results : InOrder or Unordered
    window : Window
    pool : object
        Kept alive until the end.
    owner : Owner
        Of the reader.
    """

    _is_wanted = False  # the first result was asked for

    def __init__(
        self, results: InOrder | Unordered, window: Window, pool: object, owner: Owner
    ) -> None:
        # Not the base's: that one enters the iterator into the pool's table.
        self._results = results
        self._window = window
        self._pool: object = pool
        self._owner: Owner | None = owner

    def __del__(self) -> None:
        owner = getattr(self, "_owner", None)
        if owner is None:
            return  # at the end
        if self._is_wanted:
            self._window.close()
            self._results.forget()
            owner.give_up(self._results)
        else:
            self._window.forget()

    def next(self, timeout: float | None = None) -> Any:
        """The next result.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait for it.

        Raises
        ------
        StopIteration
            There are no more.
        multiprocessing.TimeoutError
            It was not there in time; the next call waits for it again.
        Exception
            What the task raised, or the iterable.
        """
        if self._owner is None:
            raise StopIteration
        self._is_wanted = True
        outcome = self._results.take(timeout)
        if outcome is None:
            self._pool = self._owner = None
            self._results.all_taken()
            raise StopIteration
        self._window.one_taken()
        ok, value = outcome
        if ok:
            return value
        try:
            raise value
        finally:
            del self, value, outcome  # breaks a cycle with the exception's traceback

    __next__ = next  # noqa: A003  # multiprocessing's name


class IMapUnorderedIterator(IMapIterator, _UnorderedBase):
    """What :meth:`Pool.imap_unordered` returns."""
