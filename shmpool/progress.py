"""Progress bars, drawn by tqdm: how many items are finished, how many there are, how fast it goes.

An item is finished when its task has returned or raised, whether or not anybody has looked at the result: a bar shows
what workers have done, not what the program has taken.  What is cancelled is never finished.

Bars are updated by whichever thread learns that a task is done, and forked children inherit them.  Hence, other than
bars that users make themselves, those of shmpool

* have no monitor thread (it would be there when workers are forked): each update looks at the clock instead;
* make no semaphore, which would settle multiprocessing's start method: tqdm's lock between threads is enough;
* never keep that lock, whatever interrupts the drawing, and have it free in a child that is forked meanwhile;
* are not drawn by children of the process that made them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import operator
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

__all__ = ["Bar", "WatchedResults", "bar_options", "total_of"]

_log = logging.getLogger("shmpool")

#: Seconds after the last submit in which more is expected.
_LINGER = 0.1

T = TypeVar("T")
#: Keyword arguments of tqdm.
Options = dict[str, Any]


def bar_options(progress: object) -> Options | None:
    """What users say about progress, as keyword arguments of tqdm; None for no bar.

    Parameters
    ----------
    progress : bool, str, dict or None
        True; what to write before the bar; or keyword arguments of tqdm.

    Raises
    ------
    TypeError
        It is something else.
    ImportError
        tqdm is not installed.
    """
    if progress is None or progress is False:
        return None
    if progress is True:
        options = {}
    elif isinstance(progress, str):
        options = {"desc": progress}
    elif isinstance(progress, dict):
        options = dict(progress)
    else:
        raise TypeError(
            f"progress must be True, a description or a dict of tqdm's arguments, not {progress!r}"
        )
    _bar_class()
    return options


def total_of(iterables: Iterable[object]) -> int | None:
    """How many calls ``map(fn, *iterables)`` makes at the most, as far as they tell; None if none of them does."""
    hints = []
    for iterable in iterables:
        try:
            hints.append(operator.length_hint(iterable, -1))
        except Exception:  # whatever a __len__ of the user's raises: it is not asked for here
            _log.debug("no length of %r", type(iterable), exc_info=True)
    return min((hint for hint in hints if hint >= 0), default=None)


class Bar:
    """One progress bar, for any number of futures.  Its methods may be called in any thread.

    Parameters
    ----------
    options : dict
        From :func:`bar_options`.  A ``total`` in it is the user's word; it only ever grows.
    total : int, optional
        How many items there will be.  More may come, then it grows; fewer are no problem.  None: unknown until
        :meth:`no_more`, and only the count and the rate are shown (or, if open-ended, as many as have come).
    open_ended : bool
        Nobody knows when there will be no more.  It closes when all is done,
        unless the last came just now: a loop that submits quick tasks shall not begin a line for each of them.  When
        more comes after that, it begins a new line, and goes on counting.  With a ``total`` of the user's it closes
        when that is reached.  Whatever is left open closes when the bar is dropped.

    Raises
    ------
    Exception
        What tqdm raises for options that it does not know.
    """

    def __init__(
        self, options: Options, total: int | None = None, *, open_ended: bool = False
    ) -> None:
        self._options = dict(options)
        self._promised = self._options.pop("total", None)
        self._initial = self._options.pop("initial", 0)
        self._total = total if self._promised is None else self._promised
        if open_ended and self._total is None:
            self._total = 0
        self._watched = 0
        self._done = 0
        self._open_ended = open_ended
        self._no_more = False
        self._settled = -1
        self._last_came = 0.0
        self._abandoned = False
        self._closed = False
        self._shown: Any = None  # a tqdm
        self._pid = os.getpid()
        # Reentrant: a garbage collection may come in between, and let go of what closes this bar.
        self._lock = threading.RLock()
        if self._total:
            self._show()  # else with the first future: a notebook takes a bar without a total for one without an end

    # ---------------------------------------------------------------- what comes

    def watch(self, future: Future[Any], items: int = 1) -> None:
        """Count ``items`` when a future is done."""
        with self._lock:
            self._watched += items
            self._last_came = time.monotonic()
            if self._total is not None and self._initial + self._watched > self._total:
                self._set_total(self._initial + self._watched)
            self._show()
        future.add_done_callback(partial(self._count, items))

    def watching(
        self, submit: Callable[..., Future[T]], items_of: Callable[..., int] | None = None
    ) -> Callable[..., Future[T]]:
        """``submit``, with all futures that it returns watched.

        Parameters
        ----------
        submit : callable
        items_of : callable, optional
            Given the same arguments, says how many items the future stands for.  Default: one.
        """

        def submit_watched(*args: Any) -> Future[T]:
            made: list[Future[T]] = []
            try:
                # In one call: Ctrl-C comes before it or after.
                made.extend(itertools.starmap(submit, (args,)))
                self.watch(made[0], 1 if items_of is None else items_of(*args))
                return made[0]
            except BaseException:  # Ctrl-C, and nobody gets it
                for future in made:
                    future.cancel()
                raise

        return submit_watched

    def watched(self, results: Iterator[T]) -> Iterator[T]:
        """The results of what is watched; see :class:`WatchedResults`."""
        return WatchedResults(results, self)

    def no_more(self) -> None:
        """All that there will be is watched: the total is known, and the bar closes when that is done."""
        with self._lock:
            self._no_more = True
            if not self._open_ended:
                self._show()
            if self._promised is None:
                self._set_total(self._initial + self._watched)
            self._settle()

    # ---------------------------------------------------------------- what is done

    def finish(self) -> None:
        """All that is watched is done, although the thread that knows may not have said so yet: close."""
        if os.getpid() == self._pid:
            with self._lock:
                self._no_more = True
                self._advance(self._watched - self._done)
                self.close()

    def close(self) -> None:
        """Draw it for the last time.  What is done later is not counted, and nothing is drawn any more."""
        # In a child, the lock may be held by a thread that only its parent has.
        if os.getpid() == self._pid:
            with self._lock:
                self._closed = True
                self._hide()

    def abandon(self) -> None:
        """Close it, soon.  Waits for nothing, as behoves a finalizer."""
        self._abandoned = True
        if os.getpid() == self._pid and self._lock.acquire(blocking=False):
            try:
                self.close()
            finally:
                self._lock.release()

    def _count(self, items: int, future: Future[Any]) -> None:
        if os.getpid() == self._pid:
            with self._lock:
                if future.cancelled():
                    self._watched -= items
                    self._settle()
                else:
                    self._advance(items)
                if self._abandoned:
                    self.close()

    def _advance(self, items: int) -> None:
        self._done += items
        if self._shown is not None:
            self._draw(self._shown.update, items)
        self._settle()

    def _settle(self) -> None:
        """If all is done that is watched, let it be seen."""
        if self._done < self._watched:
            return
        if self._no_more or (self._open_ended and self._is_idle()):
            self._hide()
        elif self._shown is not None and self._done - self._settled != 1:
            # tqdm waits a while before it draws again. A loop that waits for each task can wait for that too.
            self._draw(self._shown.refresh)
        self._settled = self._done

    def _is_idle(self) -> bool:
        if self._promised is not None:
            return bool(self._initial + self._done >= self._promised)
        return time.monotonic() - self._last_came > _LINGER

    # ---------------------------------------------------------------- what is seen

    def _show(self) -> None:
        if self._shown is None and not self._closed:
            arguments = {"miniters": 1, **self._options}
            self._shown = _bar_class()(
                total=self._total, initial=self._initial + self._done, **arguments
            )

    def _hide(self) -> None:
        if self._shown is not None:
            self._draw(self._shown.close)
            self._shown = None

    def _draw(self, draw: Callable[..., object], *args: int) -> None:
        """Nothing that goes wrong there is a reason for a task to fail, or for a dispatcher to end."""
        try:
            draw(*args)
        except Exception:
            _log.warning("a progress bar cannot be drawn", exc_info=True)
            self._closed = True
            with contextlib.suppress(Exception):
                self._shown.close()
            self._shown = None

    def _set_total(self, total: int) -> None:
        self._total = total
        if self._shown is not None:
            self._shown.total = total
            container = getattr(self._shown, "container", None)
            if container is not None:  # in a notebook: the widget has a number of its own
                container.children[1].max = total


class WatchedResults(Iterator[T]):
    """An iterator over the results of what a bar watches; it closes the bar at the end, and at each early end.

    An early end is an exception, :meth:`close`, or that nobody takes the rest.  If nobody has taken anything, the bar
    goes on for as long as there is something to be done: only the tasks were wanted.

    Parameters
    ----------
    results : iterator
    bar : Bar
    """

    def __init__(self, results: Iterator[T], bar: Bar) -> None:
        self._results = results
        self._bar = bar
        self._begun = False

    def __next__(self) -> T:
        self._begun = True
        try:
            return next(self._results)
        except StopIteration:
            self._bar.finish()
            raise
        except BaseException:
            self._bar.close()
            raise

    def close(self) -> None:
        """Take no more; as a generator's ``close``."""
        self._bar.close()
        results, self._results = self._results, iter(())
        if isinstance(results, Generator):
            results.close()

    def __del__(self) -> None:
        if self._begun:
            self._bar.abandon()


# ---------------------------------------------------------------- tqdm


def _bar_class() -> Any:
    """The tqdm for where this program runs (terminal or notebook), made fit for our use."""
    try:
        from tqdm.auto import tqdm
        from tqdm.std import TqdmDefaultWriteLock
    except ImportError as error:
        raise ImportError(
            "progress bars are drawn by tqdm, which cannot be imported: pip install 'shmpool[progress]'"
        ) from error
    cls = _fit(tqdm, TqdmDefaultWriteLock.th_lock)
    # The lock of all bars, if the program has used one or set one. tqdm's default is this one and a semaphore, which
    # only bars in other processes need.
    cls._lock = getattr(tqdm, "_lock", TqdmDefaultWriteLock.th_lock)
    return cls


@functools.cache
def _fit(tqdm: Any, lock: Any) -> Any:
    class Fit(tqdm):  # type: ignore[misc]  # tqdm has no types
        monitor_interval = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._pid = os.getpid()
            super().__init__(*args, **kwargs)

        def __del__(self) -> None:
            # At interpreter exit modules are emptied.
            if os is not None and os.getpid() == self._pid:  # type: ignore[redundant-expr]
                super().__del__()

        def refresh(self, nolock: bool = False, lock_args: Any = None) -> Any:
            if nolock or lock_args:
                return super().refresh(nolock, lock_args)
            with self._lock:  # tqdm would keep it if it was interrupted
                return super().refresh(nolock=True)

    os.register_at_fork(
        before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
    )
    return Fit
