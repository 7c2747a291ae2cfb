"""``Pool``: ``multiprocessing.Pool``'s interface."""

from __future__ import annotations

import multiprocessing.pool
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Future
from typing import Any, Literal

from shmpool.executor import ShmExecutor
from shmpool.pool.arrivals import InOrder, Unordered
from shmpool.pool.callbacks import Callback
from shmpool.pool.core import Core
from shmpool.pool.imap import INERT, IMapIterator, IMapUnorderedIterator, Reader, calls_of
from shmpool.pool.outcomes import outcome_of, without_frames
from shmpool.pool.process import WorkerContext
from shmpool.pool.results import AsyncResult, MapResult
from shmpool.pool.unfinished import TaskQueue, unfinished
from shmpool.pool.window import Window
from shmpool.progress import Bar
from shmpool.store.store import ObjectStore
from shmpool.worker.chunks import Chunk, StarChunk
from shmpool.worker.launch import find_context
from shmpool.worker.process import ProcessLike

__all__ = ["Pool"]


class Pool(multiprocessing.pool.Pool):
    """A pool of worker processes: ``multiprocessing.Pool``, with zero-copy arrays.

    All that ``multiprocessing.Pool`` does works the same way; what differs on purpose is in the README.  In short:
    arrays travel through shared memory, lambdas work, a worker that dies fails its own task only, no ``get()`` waits
    for ever, and :meth:`imap` reads ahead a bounded number of items.

    Parameters
    ----------
    processes : int, optional
        Number of worker processes.  Default: the number of CPUs that this process may use (affinity and control groups
        count).
    initializer : callable, optional
        Run in each worker when it starts, with ``initargs``.  If it raises, the pool is broken: all tasks raise
        :class:`~shmpool.BrokenPoolError`.
    initargs : tuple
    maxtasksperchild : int, optional
        A worker is replaced after so many tasks; a chunk of ``map`` is one task.
    context : context or {"fork", "forkserver", "spawn", "loky"}, optional
        How processes are started.  Default: multiprocessing's default.
    mmap_mode : {"c", "r"}
        How arrays arrive, in tasks and in results: ``"c"`` writable, private (copy-on-write); ``"r"`` read-only.
    store : ObjectStore, optional
        Default: the process-wide one.

    Raises
    ------
    ValueError, TypeError
        An argument makes no sense; the messages are ``multiprocessing.Pool``'s.
    OSError
        A worker cannot be started.

    Notes
    -----
    It is a subclass so that ``isinstance(pool, multiprocessing.pool.Pool)`` holds, which others rely on.  Of the base,
    nothing runs but ``__enter__``, ``__exit__``, ``__reduce__``, ``__repr__`` and the warning in ``__del__``.
    """

    _core: Core | None = None  # None: not yet, or never, made
    _whole: Pool | None = None  # the pool that this one is a view of, see options()

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
        *,
        mmap_mode: Literal["c", "r"] = "c",
        store: ObjectStore | None = None,
    ) -> None:
        if processes is not None and processes < 1:
            raise ValueError("Number of processes must be at least 1")
        limit: Any = maxtasksperchild
        if limit is not None and (not isinstance(limit, int) or limit <= 0):
            raise ValueError("maxtasksperchild must be a positive int or None")
        self._ctx = find_context(context)
        executor = ShmExecutor(
            processes, WorkerContext(self._ctx), initializer, tuple(initargs),
            max_tasks_per_child=maxtasksperchild, mmap_mode=mmap_mode, store=store,
        )  # fmt: skip
        self._core = Core(executor)
        self._executor = executor
        # Third parties read these, as well as _ctx, _pool and _state.
        self._processes: int = executor._max_workers
        self._initializer = initializer
        self._initargs = initargs
        self._maxtasksperchild = maxtasksperchild

    def __del__(self) -> None:
        core = self._core
        if core is not None and self._whole is None and core.is_own:
            super().__del__()  # warns if the pool is still running

    # ---------------------------------------------------------------- what the base's methods look at

    @property
    def _state(self) -> str:
        return multiprocessing.pool.INIT if self._core is None else self._core.state

    @_state.setter
    def _state(self, state: str) -> None:
        assert self._core is not None
        self._core.state = state

    @property
    def _pool(self) -> list[ProcessLike]:
        """The worker processes, all there from the beginning."""
        return [] if self._core is None else self._core.workers

    @property
    def _cache(self) -> dict[int, AsyncResult]:
        """What is under way, for programs that wait until that is little: multiprocessing has it by this name."""
        return {} if self._core is None else unfinished(self._core)

    @property
    def _taskqueue(self) -> TaskQueue:
        """What no worker has been sent, for programs that wait until that is little: ``_taskqueue.qsize()``."""
        return TaskQueue(self._core)

    def _check_running(self) -> Core:
        core = self._core
        if core is None:
            raise ValueError("Pool not running")
        core.check()
        return core

    def _repopulate_pool(self) -> None:
        """The executor does that by itself."""

    # ---------------------------------------------------------------- one call

    def apply(
        self, func: Callable[..., Any], args: Iterable[Any] = (), kwds: Mapping[str, Any] = {}
    ) -> Any:
        """``func(*args, **kwds)``, in a worker: the result.  Raises what :meth:`AsyncResult.get` raises."""
        callbacks = self._check_running().callbacks
        ok, value = outcome_of(self._submit(func, args, kwds), callbacks)
        if ok:
            return value
        try:
            raise value
        finally:
            del value  # breaks a cycle with the exception's traceback

    def apply_async(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] = {},
        callback: Callback | None = None,
        error_callback: Callback | None = None,
    ) -> AsyncResult:
        """``func(*args, **kwds)``, in a worker; returns at once.

        Parameters
        ----------
        func : callable
        args : iterable
        kwds : mapping
            What ``func`` and its arguments are is settled now: changing them afterwards does not change the task.
        callback, error_callback : callable, optional
            Called with the result, or with the exception.  Callbacks of a pool are called one at a time, in the order
            in which results arrive, in a thread of their own; not any more after :meth:`terminate`.

        Raises
        ------
        ValueError
            The pool was closed or terminated.
        """
        core = self._check_running()
        future = self._submit(func, args, kwds)
        return AsyncResult([future], core.callbacks, callback, error_callback)

    def _submit(
        self, func: Callable[..., Any], args: Iterable[Any], kwds: Mapping[str, Any]
    ) -> Future[Any]:
        try:
            return self._executor.submit(func, *args, **kwds)
        except RuntimeError as error:
            self._check_running()  # closed just now?
            return _failed(error.with_traceback(None))

    # ---------------------------------------------------------------- many calls, all results

    def map(
        self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int | None = None
    ) -> list[Any]:
        """``list(map(func, iterable))``, in the workers; parameters as for :meth:`map_async`."""
        results: list[Any] = self._map_all(func, iterable, chunksize, False).get()
        return results

    def map_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
    ) -> MapResult:
        """``list(map(func, iterable))``, in the workers; returns at once.

        Parameters
        ----------
        func : callable
        iterable : iterable
            Read at once.
        chunksize : int, optional
            So many items make one task.  Default: four tasks for each worker.
        callback, error_callback : callable, optional
            Called once, with the list of results, or with the first exception; see :meth:`apply_async`.

        Raises
        ------
        ValueError
            The pool was closed or terminated, or ``chunksize`` is not positive.
        """
        return self._map_all(func, iterable, chunksize, False, callback, error_callback)

    def starmap(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
    ) -> list[Any]:
        """As :meth:`map`, with items that hold the arguments of a call: ``func(*item)``."""
        results: list[Any] = self._map_all(func, iterable, chunksize, True).get()
        return results

    def starmap_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
    ) -> MapResult:
        """As :meth:`map_async`, with items that hold the arguments of a call: ``func(*item)``."""
        return self._map_all(func, iterable, chunksize, True, callback, error_callback)

    def _map_all(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None,
        star: bool,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
    ) -> MapResult:
        core = self._check_running()
        if not isinstance(iterable, Sized):
            iterable = list(iterable)
        if chunksize is None:
            chunksize, extra = divmod(len(iterable), self._processes * 4)
            chunksize = max(1, chunksize + bool(extra))
        elif chunksize < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize!r}")
        bar = self._executor._bar((iterable,))
        return MapResult(
            self._submit_all(func, iterable, chunksize, star, bar),
            core.callbacks, callback, error_callback, length=len(iterable), chunksize=chunksize, bar=bar,
        )  # fmt: skip

    def _submit_all(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int,
        star: bool,
        bar: Bar | None,
    ) -> list[Future[Any]]:
        """Submit the tasks of a ``map``.  What the iterable raises fails one more task, at its place."""
        futures: list[Future[Any]] = []
        try:
            star_calls = star and chunksize == 1
            inert = type(iterable) in INERT and not (
                star_calls and any(type(item) not in (tuple, list) for item in iterable)
            )
            submit = self._bind(func, chunksize, bar, star, inert=inert)
            calls = map(tuple, iterable) if star_calls else calls_of(iterable, chunksize)
            futures.extend(map(submit, calls))
        except Exception as error:
            self._check_running()  # closed just now?
            futures.append(_failed(without_frames(error)))
        finally:
            if bar is not None:
                bar.no_more()
        return futures

    def _bind(
        self,
        func: Callable[..., Any],
        chunksize: int,
        bar: Bar | None,
        star: bool = False,
        *,
        inert: bool = False,
    ) -> Callable[[tuple[Any, ...]], Future[Any]]:
        """What submits a task, given its arguments: those of ``func``, or the items of a chunk."""
        executor = self._executor
        if chunksize > 1:
            func = StarChunk(func, executor._options.mmap_mode) if star else Chunk(func)
        return executor._bind(func, inert, bar)

    # ---------------------------------------------------------------- many calls, results one by one

    def imap(  # type: ignore[override]  # with chunks it is a generator, as multiprocessing's in fact
        self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int = 1
    ) -> Iterator[Any]:
        """``map(func, iterable)``, in the workers: yields results in order.

        The iterable is read in a thread, and only so far ahead of the results that were taken: 64 tasks for each
        worker, if they are small, and if they are large, as many as carry 256 MB, but at least one for each worker and
        one more.  So the iterable may be infinite, and memory stays bounded.  :meth:`join` reads on to the end.

        Parameters
        ----------
        func : callable
        iterable : iterable
            What it raises is raised in place of the result.
        chunksize : int
            So many items make one task.

        Returns
        -------
        iterator
            With ``chunksize=1`` it has a method ``next(timeout=None)``.

        Raises
        ------
        ValueError
            The pool was closed or terminated, or ``chunksize`` is not positive.
        """
        return self._imap(IMapIterator, InOrder, func, iterable, chunksize)

    def imap_unordered(  # type: ignore[override]  # see imap
        self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int = 1
    ) -> Iterator[Any]:
        """As :meth:`imap`, with the results as they come."""
        return self._imap(IMapUnorderedIterator, Unordered, func, iterable, chunksize)

    def _imap(
        self,
        iterator_type: type[IMapIterator],
        results_type: type[InOrder | Unordered],
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int,
    ) -> Iterator[Any]:
        core = self._check_running()
        if chunksize < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize!r}")
        bar = self._executor._bar((iterable,))
        results = results_type(core.callbacks, bar)
        window = Window(self._executor._driver.counts, self._processes)
        iterator = iterator_type(results, window, self, core)
        try:
            submit = self._bind(func, chunksize, bar)
        except RuntimeError as error:
            self._check_running()  # closed just now?
            results.end(error.with_traceback(None))
        else:
            Reader(submit, results, window, weakref.ref(core)).start(iterable, chunksize)
        if chunksize == 1:
            return iterator
        return (item for chunk in iterator for item in chunk)

    # ---------------------------------------------------------------- the end

    def close(self) -> None:
        """Take no more tasks; the workers end when all that was asked for is done."""
        if self._core is not None:
            self._core.close()

    def terminate(self) -> None:
        """End the workers now.  Results that are not there yet raise :class:`~shmpool.BrokenPoolError`."""
        if self._core is not None:
            self._core.terminate()

    def join(self) -> None:
        """Wait for the workers to end, after :meth:`close` or :meth:`terminate`.

        Raises
        ------
        ValueError
            The pool is still running.
        """
        if self._core is not None:
            self._core.join()

    # ---------------------------------------------------------------- more than that

    @property
    def executor(self) -> ShmExecutor:
        """The executor that runs the tasks: for ``submit``, ``put``, ``stats``, ``cancel_running`` and the rest."""
        return self._executor

    def options(self, **options: Any) -> Pool:
        """The same pool, with other options for what is asked of the returned object.

        The workers are the same, and to close, terminate or join one of the two is to do so with both.

        Parameters
        ----------
        timeout, retries, mmap_mode, progress :
            See :meth:`ShmExecutor.options`.
        """
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view._whole = self._whole or self
        view._executor = self._executor.options(**options)
        return view


def _failed(error: BaseException) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    future.set_exception(error)
    return future
