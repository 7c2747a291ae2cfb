"""``ShmExecutor``: a ``concurrent.futures.Executor`` whose large arrays travel through shared memory."""

from __future__ import annotations

import itertools
import math
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future
from functools import partial
from types import BuiltinFunctionType, FunctionType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeVar

from shmpool.dispatch.counts import Counts
from shmpool.dispatch.driver import Driver
from shmpool.dispatch.future import TaskFuture
from shmpool.dispatch.living import total_counts
from shmpool.dispatch.state import Machine
from shmpool.dispatch.task import Function, Limits, Task
from shmpool.lokys import loky_context_module
from shmpool.mapping import and_then, chunked, ordered, unordered
from shmpool.serialize.pickling import (
    ARGUMENTS,
    ARGUMENTS_AGAIN,
    FOUND_BY_NAME,
    FUNCTION,
    FUNCTION_AGAIN,
)
from shmpool.store.current import get_store
from shmpool.store.refs import ObjectRef, put
from shmpool.store.store import ObjectStore, StoreStats
from shmpool.store.written import Epoch
from shmpool.worker.chunks import Chunk, StarChunk
from shmpool.worker.interrupts import is_blocked
from shmpool.worker.launch import Launcher, find_context
from shmpool.worker.main import Settings
from shmpool.worker.process import ProcessLike
from shmpool.worker.threads import threads_each

if TYPE_CHECKING:
    from shmpool.progress import Bar

__all__ = ["ExecutorStats", "ShmExecutor", "total_stats"]

T = TypeVar("T")


class _Keep:
    """Stands for an option that is not given."""

    def __repr__(self) -> str:
        return "<as it was>"


_KEEP: Any = _Keep()
#: So many calls of one map are submitted together.
_MOST_TOGETHER = 32
#: Not to be changed.
_NO_KWARGS: dict[str, Any] = {}


class ExecutorStats(NamedTuple):
    """What went through an executor so far.

    Attributes
    ----------
    bytes_copied : int
        Bytes of arguments and results copied into the store, once each.
    bytes_shared : int
        Bytes of arguments and results that were in the store already, and travelled by reference.
    bytes_inline : int
        Bytes of pickle streams inside messages, small arrays included.
    tasks_submitted, tasks_done, tasks_failed : int
        Numbers of tasks; "done" are those that a worker answered, with a result or an exception, "failed" those that
        got no answer.
    tasks_retried : int
        How many times a task was run again since its worker had died.
    workers_died : int
        How many tasks were lost to the death of a worker.
    workers : int
        Processes alive now.
    store : StoreStats
        The store's own figures, of this process.
    """

    bytes_copied: int
    bytes_shared: int
    bytes_inline: int
    tasks_submitted: int
    tasks_done: int
    tasks_failed: int
    tasks_retried: int
    workers_died: int
    workers: int
    store: StoreStats

    @classmethod
    def of(cls, counts: Counts, workers: int, store: StoreStats) -> ExecutorStats:
        """From the driver's counts."""
        return cls(
            bytes_copied=counts.copied,
            bytes_shared=counts.shared,
            bytes_inline=counts.inline,
            tasks_submitted=counts.submitted,
            tasks_done=counts.done,
            tasks_failed=counts.failed,
            tasks_retried=counts.retried,
            workers_died=counts.died,
            workers=workers,
            store=store,
        )


def total_stats() -> ExecutorStats:
    """Figures of what went through all executors of this process so far, over the process-wide store.

    ``workers`` is 0.
    """
    return ExecutorStats.of(total_counts(), 0, get_store().stats())


class _Options(NamedTuple):
    timeout: float | None
    retries: int
    mmap_mode: Literal["c", "r"]
    progress: Any

    def check(self) -> None:
        """Raise ValueError for what makes no sense."""
        if self.mmap_mode not in ("c", "r"):
            raise ValueError(
                f"mmap_mode must be 'c' (private copy-on-write) or 'r' (read-only), not {self.mmap_mode!r}"
            )
        timeout, retries = self.timeout, self.retries
        if timeout is not None and not (_is_number(timeout) and 0 < timeout < math.inf):
            raise ValueError(
                f"timeout must be a positive number of seconds or None, not {timeout!r}"
            )
        if type(retries) is not int or retries < 0:
            raise ValueError(f"retries must be a number of times, 0 or more, not {retries!r}")

    @property
    def limits(self) -> Limits:
        return Limits(self.timeout, self.retries, self.mmap_mode == "r")

    @property
    def has_progress(self) -> bool:
        return self.progress is not None and self.progress is not False


class ShmExecutor(Executor):
    """Run functions in other processes, with zero-copy arrays.

    A drop-in for :class:`concurrent.futures.ProcessPoolExecutor`.  Arrays in arguments and results are written into
    shared memory once, and read there; each side may write into what it has got without the other side noticing.

    Parameters
    ----------
    max_workers : int, optional
        Number of processes.  Default: the number of CPUs that this process may use (``loky.cpu_count()``: affinity and
        control groups count).
    mp_context : context or {"fork", "forkserver", "spawn", "loky"}, optional
        How processes are started.  Default: multiprocessing's default; "spawn" if ``max_tasks_per_child`` is given.
    initializer : callable, optional
        Run in each worker before its first task, with ``initargs``.
    initargs : tuple
    max_tasks_per_child : int, optional
        A worker is replaced after so many tasks.
    mmap_mode : {"c", "r"}
        How arrays arrive, in tasks and in results: ``"c"`` writable, private (copy-on-write); ``"r"`` read-only.
    store : ObjectStore, optional
        Default: the process-wide one.
    idle_timeout : float, optional
        Workers that had nothing to do for so many seconds (or up to a quarter longer) leave; others come when there is
        work again.  Default: they stay.

    Raises
    ------
    ValueError, TypeError
        An argument makes no sense; the messages are ``ProcessPoolExecutor``'s.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        mmap_mode: Literal["c", "r"] = "c",
        store: ObjectStore | None = None,
        idle_timeout: float | None = None,
    ) -> None:
        if max_workers is None:
            max_workers = _cpu_count()
        elif max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        options = _Options(timeout=None, retries=0, mmap_mode=mmap_mode, progress=None)
        if store is not None and not isinstance(store, ObjectStore):
            raise TypeError(f"store must be an ObjectStore, not {store!r}")
        if idle_timeout is not None and not (_is_number(idle_timeout) and idle_timeout > 0):
            raise ValueError(
                f"idle_timeout must be a positive number of seconds, not {idle_timeout!r}"
            )
        if max_tasks_per_child is not None:
            _check_max_tasks(max_tasks_per_child)
            if mp_context is None:
                mp_context = "spawn"  # as the standard library does
        context = find_context(mp_context)
        store = store or get_store()
        config = store.config
        settings = Settings(
            config, store.capacity, store.spill_dir, store.huge_pages, mmap_mode,
            threads_each(max_workers, config.worker_threads), not is_blocked(),
        )  # fmt: skip
        launcher = Launcher(context, store, initializer, initargs, settings)
        machine = Machine(
            max_workers, max_tasks_per_child, launcher.forks,
            config.prefetch_min, config.prefetch_max, config.prefetch_us,
        )  # fmt: skip
        self._driver = Driver(machine, store, launcher.starters, launcher.close, idle_timeout)
        self._launcher = launcher
        self._store = store
        self._last_function: tuple[Any, Function] | None = None
        self._common_bars: weakref.WeakSet[Bar] = weakref.WeakSet()  # of all views
        self._set_options(options)
        # Third parties read these of a ProcessPoolExecutor.
        self._max_workers: int = max_workers
        self._mp_context = context
        self._processes: dict[int, ProcessLike] = self._driver.processes
        #: The executor that this one is a view of, see options().
        self._whole: Self | None = None
        # When nobody can submit any more, what was submitted is finished, and the workers end.
        weakref.finalize(self, self._driver.abandon).atexit = False

    @property
    def _broken(self) -> str | Literal[False]:
        return self._driver.broken or False

    @property
    def is_usable(self) -> bool:
        """Does it take tasks?  Not after shutdown, when it is broken, or in a forked child."""
        try:
            self._driver.check()
        except RuntimeError:
            return False
        return True

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} of at most {self._max_workers} workers by {self._launcher.start_method}, "
            f"{len(self._processes)} alive>"
        )

    # ---------------------------------------------------------------- the standard library's interface

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Schedule ``fn(*args, **kwargs)`` and return a future for it.

        What ``fn`` and its arguments are is settled now: changing them afterwards does not change the task.  An
        :class:`~shmpool.ObjectRef` among the arguments arrives as its value.  If something cannot be pickled, or the
        store has no room, the future carries the exception.

        Raises
        ------
        RuntimeError
            After :meth:`shutdown`.
        BrokenPoolError
            The workers cannot be started.
        """
        return self._bind(fn, once=True)(args, kwargs)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Like ``map(fn, *iterables)``, in parallel; results come in order.

        Parameters
        ----------
        fn : callable
            Pickled once, whatever is bound to it, and unpickled by each task: so nothing that is handed over only once
            (a socket, a connection).
        *iterables : iterable
            Read at once, unless ``buffersize`` is given.
        timeout : float, optional
            Seconds from now until which results must be there.
        chunksize : int
            So many calls make one task.
        buffersize : int, optional
            At most so many tasks are under way whose results have not been taken.

        Raises
        ------
        TimeoutError
            When iterating: the next result was not there in time.
        ValueError, TypeError
            ``chunksize`` or ``buffersize`` make no sense.
        """
        return self._map(ordered, fn, iterables, timeout, chunksize, buffersize)

    def map_unordered(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Like :meth:`map`, with the results as they come: none waits for one that takes longer."""
        return self._map(unordered, fn, iterables, timeout, chunksize, buffersize)

    def _map(
        self,
        results_of: Callable[..., Iterator[Any]],
        fn: Callable[..., Any],
        iterables: tuple[Iterable[Any], ...],
        timeout: float | None,
        chunksize: int,
        buffersize: int | None,
    ) -> Iterator[Any]:
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        deadline = None if timeout is None else time.monotonic() + timeout
        # No user code runs between the items of these, so an array seen twice has not changed in between (Epoch).
        inert = not buffersize and all(type(it) in _INERT for it in iterables)
        bar = self._bar(iterables)
        calls: Iterator[tuple[Any, ...]] = zip(*iterables)  # noqa: B905  # the shortest ends it, as for map()
        if chunksize > 1:
            calls = chunked(calls, chunksize)
            fn = StarChunk(fn, self._options.mmap_mode)
        if bar is not None:
            calls = and_then(calls, bar.no_more)

        def shown(results: Iterator[Any]) -> Iterator[Any]:
            if chunksize > 1:
                results = itertools.chain.from_iterable(results)
            return results if bar is None else bar.watched(results)

        try:
            return results_of(self._bind_all(fn, inert, bar), calls, buffersize, deadline, shown)
        except BaseException:
            if bar is not None:
                bar.close()
            raise

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks; let the workers end when what was submitted is done.

        Parameters
        ----------
        wait : bool
            Return only when all workers have ended and everything is given back.
        cancel_futures : bool
            Cancel the tasks that have not begun.
        """
        self._shutdown(wait, cancel_futures)

    def _shutdown(self, wait: bool, cancel_futures: bool, *, interrupted: bool = False) -> None:
        for bar in list(self._common_bars):
            bar.no_more()
        thread = self._driver.shutdown(cancel_futures, interrupted=interrupted)
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Shut down, and wait.  Ctrl-C has ended the tasks that ran: if it ends the block, no other begins."""
        self._shutdown(True, False, interrupted=isinstance(error, KeyboardInterrupt))

    # ---------------------------------------------------------------- more than that

    def put(self, obj: object) -> ObjectRef:
        """Put an object into this executor's store, once, for any number of its tasks; see :func:`shmpool.put`."""
        return put(obj, store=self._store)

    def options(
        self,
        *,
        timeout: float | None = _KEEP,
        retries: int = _KEEP,
        mmap_mode: Literal["c", "r"] = _KEEP,
        progress: Any = _KEEP,
    ) -> Self:
        """The same executor, with other options for what is submitted through the returned object.

        Workers, store and everything else are shared: to shut one down is to shut both down.  What is not given stays.

        Parameters
        ----------
        timeout : float or None
            Seconds that a task may run, counted from when a worker begins it; a chunk of ``map`` is one task.  A task
            that runs longer is ended with its worker, which is replaced: its future raises
            :class:`~shmpool.TaskTimeoutError`.
        retries : int
            So many times a task is run again if its worker dies.  Not if it raises, or runs too long.
        mmap_mode : {"c", "r"}
            As for the executor itself.
        progress : bool, str or dict
            Show the progress of ``map``, ``map_unordered`` and of submitted tasks, with tqdm: True, or the bar's
            description, or tqdm's keyword arguments.

        Raises
        ------
        ValueError, TypeError
            A value makes no sense.
        ImportError
            Progress is to be shown, and tqdm is not installed.
        """
        given = {
            "timeout": timeout,
            "retries": retries,
            "mmap_mode": mmap_mode,
            "progress": progress,
        }
        changed = {name: value for name, value in given.items() if value is not _KEEP}
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._whole = self._whole or self
        other._set_options(self._options._replace(**changed))
        return other

    def _set_options(self, options: _Options) -> None:
        options.check()
        self._options = options
        self._limits = options.limits
        self._common_bar: Bar | None = None
        if options.has_progress:
            from shmpool.progress import Bar, bar_options  # seldom wanted, and start-up counts

            self._common_bar = Bar(bar_options(options.progress) or {}, open_ended=True)
            self._common_bars.add(self._common_bar)

    def cancel_running(self, future: Future[Any]) -> bool:
        """Cancel a task even if it runs: its worker is killed, and replaced.

        Parameters
        ----------
        future : concurrent.futures.Future
            From this executor.

        Returns
        -------
        bool
            The future is cancelled.  False: it is done, or its result is about to be there.

        Raises
        ------
        ValueError
            The future is not of this executor.
        """
        if isinstance(future, TaskFuture) and future.driver is not self._driver.ref:
            raise ValueError(f"{future!r} is not of this executor")
        if future.cancel():
            return True
        if isinstance(future, TaskFuture) and self._driver.end_running(future.number):
            future.cancel_running()
        return future.cancelled()

    def terminate_workers(self) -> None:
        """End the workers at once (SIGTERM), and shut down; tasks under way fail.  As in Python 3.14."""
        self._driver.terminate(signal.SIGTERM)

    def kill_workers(self) -> None:
        """End the workers at once (SIGKILL), and shut down; tasks under way fail.  As in Python 3.14."""
        self._driver.terminate(signal.SIGKILL)

    def stats(self) -> ExecutorStats:
        """Figures of what went through this executor so far."""
        return ExecutorStats.of(self._driver.counts, len(self._processes), self._store.stats())

    # ---------------------------------------------------------------- for the other faces

    def _bind(
        self,
        fn: Callable[..., Any],
        inert: bool = False,
        bar: Bar | None = None,
        *,
        once: bool = False,
    ) -> Callable[..., Future[Any]]:
        """Pickle a function once, for many calls.

        Parameters
        ----------
        fn : callable
        inert : bool
            No user code runs between the calls, but for what pickling runs: an array that comes again has not changed.
        bar : Bar, optional
            From :meth:`_bar`, to show the progress of these calls.  Default: that of all calls of this view together,
            if its options say so.
        once : bool
            There will be one call only.

        Returns
        -------
        callable
            Given the arguments (a tuple and, if any, a dict), submits a call, and returns its future.
        """
        self._start()
        try:
            function = self._function(fn, once=once)
        except Exception as error:
            return partial(_failed, error)
        submit = partial(self._call, function, Epoch() if inert else None)
        bar = bar or self._common_bar
        if bar is None:
            return submit
        return bar.watching(submit, _items_of_chunk if isinstance(fn, Chunk) else None)

    def _bind_all(
        self, fn: Callable[..., Any], inert: bool, bar: Bar | None
    ) -> Callable[[Iterable[tuple[Any, ...]]], Generator[Future[Any], None, None]]:
        """As :meth:`_bind`, but what it returns is given the arguments of many calls, and yields their futures.

        Whoever closes that before its end, since Ctrl-C has come, cancels those futures that came from it: it cancels
        those that did not, and may cancel some of the others.
        """
        if not inert or bar or self._common_bar:
            return partial(_one_by_one, self._bind(fn, inert, bar))
        self._start()
        try:
            function = self._function(fn)
        except Exception as error:
            return partial(_one_by_one, partial(_failed, error))
        return partial(self._calls, function, Epoch())

    def _bar(self, iterables: tuple[Iterable[Any], ...]) -> Bar | None:
        """A progress bar for the calls that are made of these, if the options say so."""
        if not self._options.has_progress:
            return None
        from shmpool.progress import Bar, bar_options, total_of

        return Bar(bar_options(self._options.progress) or {}, total_of(iterables))

    def _call(
        self,
        function: Function,
        epoch: Epoch | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] = _NO_KWARGS,
    ) -> Future[Any]:
        self._driver.check()
        try:
            task = self._task(function, epoch, args, kwargs)
        except Exception as error:
            return _failed(error)
        try:
            self._driver.submit((task,))
            return task.future
        except BaseException:
            _take_back((task,))
            raise

    def _calls(
        self, function: Function, epoch: Epoch | None, calls: Iterable[tuple[Any, ...]]
    ) -> Generator[Future[Any], None, None]:
        """Several calls, of which none has to be waited for: together they cost less, and small tasks are all cost."""
        most = 1  # the first are on their way at once
        tasks: list[Task] = []
        submit = self._driver.submit
        try:
            for args in calls:
                try:
                    task = self._task(function, epoch, args, _NO_KWARGS)
                except Exception as error:
                    if tasks:
                        submit(tasks)
                        yield from [task.future for task in tasks]
                        tasks = []
                    yield _failed(error)
                    continue
                tasks.append(task)
                if len(tasks) >= most or task.arguments.blocks:
                    submit(tasks)
                    yield from [task.future for task in tasks]
                    tasks = []
                    most = min(2 * most, _MOST_TOGETHER)
            if tasks:
                submit(tasks)
                yield from [task.future for task in tasks]
        except BaseException:
            _take_back(tasks)
            raise

    def _task(
        self, function: Function, epoch: Epoch | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Task:
        what = ARGUMENTS_AGAIN if self._limits.retries else ARGUMENTS
        arguments = self._store.dump((args, kwargs), self._launcher.pickling, what, epoch)
        try:
            return Task(function, arguments, self._limits)
        except BaseException:  # Ctrl-C
            arguments.release()
            raise

    def _start(self) -> None:
        self._driver.check()
        self._driver.start()

    def _start_all_workers(self) -> None:
        """Start all workers now; to be called before anything else."""
        self._driver.start_all()

    def _resize(self, max_workers: int) -> None:
        """Have more workers from now on, or fewer: those that are too many leave when they have nothing to do."""
        self._driver.resize(max_workers)
        self._max_workers = max_workers

    def _function(self, fn: Callable[..., Any], *, once: bool = False) -> Function:
        last = self._last_function
        if last is not None and last[0] is fn and _is_found_by_name(fn):
            return last[1]
        what = FUNCTION if once and not self._limits.retries else FUNCTION_AGAIN
        payload = self._store.dump(fn, self._launcher.pickling, what)
        try:
            function = Function(payload, _name(fn), once=once)
        except BaseException:  # Ctrl-C
            payload.release()
            raise
        if not payload.blocks and payload.data[-3:] == FOUND_BY_NAME and _is_found_by_name(fn):
            # A name and nothing else, so the pickle is good for as long as the name is.
            self._last_function = fn, function
        return function


_NAMED = (FunctionType, BuiltinFunctionType, type)
_INERT = (list, tuple, range, itertools.repeat)


def _is_found_by_name(fn: Any) -> bool:
    if type(fn) not in _NAMED:
        return False
    module = sys.modules.get(fn.__module__)
    return module is not None and module.__dict__.get(fn.__qualname__) is fn


def _name(fn: Any) -> str:
    """What a function is called in errors, shortly."""
    if isinstance(fn, partial):
        return f"partial({_name(fn.func)}, ...)"
    return str(getattr(fn, "__qualname__", None) or f"a {type(fn).__name__}")


def _take_back(tasks: Iterable[Task]) -> None:
    """Of tasks whose futures nobody gets: whether they were taken on or not, depends on when Ctrl-C came."""
    for task in tasks:
        if task.future.driver is None:
            task.arguments.release()
        else:
            task.future.cancel()


def _one_by_one(
    submit: Callable[[tuple[Any, ...]], Future[Any]], calls: Iterable[tuple[Any, ...]]
) -> Generator[Future[Any], None, None]:
    # Without a line between: there Ctrl-C could raise, and a future be lost.
    yield from map(submit, calls)


def _failed(error: BaseException, *_call: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    future.set_exception(error)
    return future


def _items_of_chunk(args: tuple[Any, ...], *_: Any) -> int:
    return len(args)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cpu_count() -> int:
    return int(loky_context_module().cpu_count())


def _check_max_tasks(max_tasks_per_child: object) -> None:
    if not isinstance(max_tasks_per_child, int):
        raise TypeError("max_tasks_per_child must be an integer")
    if max_tasks_per_child <= 0:
        raise ValueError("max_tasks_per_child must be >= 1")
