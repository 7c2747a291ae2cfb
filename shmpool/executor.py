"""``ShmExecutor``: a ``concurrent.futures.Executor`` whose large arrays travel through shared memory."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, Literal, TypeVar

from shmpool.dispatch.driver import Driver
from shmpool.dispatch.state import Machine
from shmpool.dispatch.task import Function, Task
from shmpool.serialize.pickling import ARGUMENTS, FOUND_BY_NAME, FUNCTION
from shmpool.store.current import get_store
from shmpool.store.refs import ObjectRef, put
from shmpool.store.store import ObjectStore, StoreStats
from shmpool.worker.launch import Launcher, find_context
from shmpool.worker.main import Settings
from shmpool.worker.process import ProcessLike

__all__ = ["ExecutorStats", "ShmExecutor"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ExecutorStats:
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
    workers_died: int
    workers: int
    store: StoreStats


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
        A worker is replaced after so many tasks.  Not with "fork".
    mmap_mode : {"c", "r"}
        How arrays arrive, in tasks and in results: ``"c"`` writable, private (copy-on-write); ``"r"`` read-only.
    store : ObjectStore, optional
        Default: the process-wide one.

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
    ) -> None:
        if max_workers is None:
            max_workers = _cpu_count()
        elif max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if mmap_mode not in ("c", "r"):
            raise ValueError(
                f"mmap_mode must be 'c' (private copy-on-write) or 'r' (read-only), not {mmap_mode!r}"
            )
        if store is not None and not isinstance(store, ObjectStore):
            raise TypeError(f"store must be an ObjectStore, not {store!r}")
        if mp_context is None and max_tasks_per_child is not None:
            mp_context = "spawn"
        context = find_context(mp_context)
        if max_tasks_per_child is not None:
            _check_max_tasks(max_tasks_per_child, context)
        store = store or get_store()
        config = store.config
        settings = Settings(config, store.capacity, store.spill_dir, store.huge_pages, mmap_mode)
        launcher = Launcher(context, store, initializer, initargs, settings)
        machine = Machine(
            max_workers, max_tasks_per_child, launcher.forks,
            config.prefetch_min, config.prefetch_max, config.prefetch_us,
        )  # fmt: skip
        self._driver = Driver(machine, store, mmap_mode, launcher.starters, launcher.close)
        self._launcher = launcher
        self._store = store
        self._last_function: tuple[Any, Function] | None = None
        self._readonly = mmap_mode == "r"
        # Third parties read these of a ProcessPoolExecutor.
        self._max_workers: int = max_workers
        self._mp_context = context
        self._processes: dict[int, ProcessLike] = self._driver.processes
        # When nobody can submit any more, what was submitted is finished, and the workers end.
        weakref.finalize(self, self._driver.abandon).atexit = False

    @property
    def _broken(self) -> str | Literal[False]:
        return self._driver.broken or False

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
        self._driver.check()
        self._driver.start()
        try:
            function = self._function(fn)
            task = self._task(function, args, kwargs, None)
        except Exception as error:
            return _failed(error)
        self._submit(task)
        return task.future

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
            Pickled once, whatever is bound to it.
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
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        deadline = None if timeout is None else time.monotonic() + timeout
        self._driver.check()
        self._driver.start()
        calls: Iterator[tuple[Any, ...]] = zip(*iterables)  # noqa: B905  # the shortest ends it, as for map()
        # No user code runs between the items of these, so an array seen twice has not changed in between.
        inert = not buffersize and all(type(it) in _INERT for it in iterables)
        epoch = object() if inert else None
        if chunksize > 1:
            calls = _chunked(calls, chunksize)
        try:
            function = self._function(partial(_run_chunk, fn) if chunksize > 1 else fn)
        except Exception as error:
            submit_next: Callable[[tuple[Any, ...]], Future[Any]] = partial(_failed_call, error)
        else:
            # With a buffersize the results need the executor, else only their futures.
            executor = weakref.ref(self) if buffersize is None else lambda: self
            submit_next = partial(_submit_call, executor, function, epoch)
        futures = deque(map(submit_next, itertools.islice(calls, buffersize)))
        results = _results(futures, calls if buffersize else None, submit_next, deadline)
        return itertools.chain.from_iterable(results) if chunksize > 1 else results

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks; let the workers end when what was submitted is done.

        Parameters
        ----------
        wait : bool
            Return only when all workers have ended and everything is given back.
        cancel_futures : bool
            Cancel the tasks that have not begun.
        """
        thread = self._driver.shutdown(cancel_futures)
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join()

    # ---------------------------------------------------------------- more than that

    def put(self, obj: object) -> ObjectRef:
        """Put an object into this executor's store, once, for any number of its tasks; see :func:`shmpool.put`."""
        return put(obj, store=self._store)

    def terminate_workers(self) -> None:
        """End the workers at once (SIGTERM), and shut down; tasks under way fail.  As in Python 3.14."""
        self._driver.terminate(signal.SIGTERM)

    def kill_workers(self) -> None:
        """End the workers at once (SIGKILL), and shut down; tasks under way fail.  As in Python 3.14."""
        self._driver.terminate(signal.SIGKILL)

    def stats(self) -> ExecutorStats:
        """Figures of what went through this executor so far."""
        counts = self._driver.counts
        return ExecutorStats(
            bytes_copied=counts.copied,
            bytes_shared=counts.shared,
            bytes_inline=counts.inline,
            tasks_submitted=counts.submitted,
            tasks_done=counts.done,
            tasks_failed=counts.failed,
            workers_died=counts.died,
            workers=len(self._processes),
            store=self._store.stats(),
        )

    def _submit(self, task: Task) -> None:
        try:
            self._driver.submit(task)
        except BaseException:
            task.arguments.release()
            raise

    def _function(self, fn: Callable[..., Any]) -> Function:
        last = self._last_function
        if last is not None and last[0] is fn and _is_found_by_name(fn):
            return last[1]
        payload = self._store.dump(fn, self._launcher.pickling, FUNCTION)
        function = Function(payload, _name(fn))
        if not payload.blocks and payload.data[-3:] == FOUND_BY_NAME and _is_found_by_name(fn):
            # A name and nothing else, so the pickle is good for as long as the name is.
            self._last_function = fn, function
        return function

    def _task(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], epoch: object
    ) -> Task:
        arguments = self._store.dump((args, kwargs), self._launcher.pickling, ARGUMENTS, epoch)
        return Task(function, arguments, self._readonly)


_INERT = (list, tuple, range, itertools.repeat)


def _submit_call(
    executor: Callable[[], ShmExecutor | None],
    function: Function,
    epoch: object,
    args: tuple[Any, ...],
) -> Future[Any]:
    ex = executor()
    if ex is None:
        raise RuntimeError("cannot schedule new futures: the executor is gone")
    ex._driver.check()
    try:
        task = ex._task(function, args, {}, epoch)
    except Exception as error:
        return _failed(error)
    ex._submit(task)
    return task.future


def _is_found_by_name(fn: Any) -> bool:
    if type(fn) is not FunctionType:
        return False
    module = sys.modules.get(fn.__module__)
    return module is not None and module.__dict__.get(fn.__qualname__) is fn


def _name(fn: Any) -> str:
    """What a function is called in errors, shortly."""
    if isinstance(fn, partial):
        return f"partial({_name(fn.func)}, ...)"
    return str(getattr(fn, "__qualname__", None) or f"a {type(fn).__name__}")


def _failed(error: BaseException) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    future.set_exception(error)
    return future


def _failed_call(error: BaseException, _args: tuple[Any, ...]) -> Future[Any]:
    return _failed(error)


def _results(
    futures: deque[Future[Any]],
    calls: Iterator[tuple[Any, ...]] | None,
    submit_next: Callable[[tuple[Any, ...]], Future[Any]],
    deadline: float | None,
) -> Iterator[Any]:
    """Yield results in order; for each one taken submit one more of ``calls``."""
    try:
        while futures:
            if calls is not None:
                for args in itertools.islice(calls, 1):
                    futures.append(submit_next(args))
            # No name may keep the future, and so its result, alive while the caller looks at it.
            yield _result_or_cancel(futures.popleft(), deadline)
    finally:
        for future in futures:
            future.cancel()


def _result_or_cancel(future: Future[T], deadline: float | None) -> T:
    try:
        try:
            return future.result(None if deadline is None else deadline - time.monotonic())
        finally:
            future.cancel()
    finally:
        del future  # breaks a cycle with the exception's traceback


def _chunked(calls: Iterator[tuple[Any, ...]], size: int) -> Iterator[tuple[Any, ...]]:
    while chunk := list(itertools.islice(calls, size)):
        yield (chunk,)


def _run_chunk(fn: Callable[..., T], calls: list[tuple[Any, ...]]) -> list[T]:
    return [fn(*args) for args in calls]


def _cpu_count() -> int:
    from loky.backend.context import cpu_count

    return int(cpu_count())


def _check_max_tasks(max_tasks_per_child: object, context: Any) -> None:
    if not isinstance(max_tasks_per_child, int):
        raise TypeError("max_tasks_per_child must be an integer")
    if max_tasks_per_child <= 0:
        raise ValueError("max_tasks_per_child must be >= 1")
    if context.get_start_method(allow_none=False) == "fork":
        raise ValueError(
            "max_tasks_per_child is incompatible with the 'fork' multiprocessing start method; "
            "supply a different mp_context."
        )
