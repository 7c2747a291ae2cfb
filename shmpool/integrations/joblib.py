"""The joblib backend: ``Parallel(backend="shmpool")``, and all that stands on joblib.

How a call goes::

    Parallel.__call__        (the user's thread)
      configure              lease the process-wide executor, see joblib_workers.py
      _start                 takes tasks from the user's iterator, in batches:
        submit               pickles a batch and sends it; returns at once
      retrieval_context      waits for the end of a short call
      _retrieve              looks every 10 ms whether there are results
    dispatcher's thread      (callbacks)
      retrieve_result_callback, then joblib submits the next batch
    abort_everything         an error, Ctrl-C, or nobody wants the results any more
    terminate                gives the executor back, its workers warm

Everything here is joblib's documented interface for backends.  Its base classes come from ``joblib.parallel``, which
keeps them there for backends of third parties.

Arrays that change while a call runs
------------------------------------
An array that comes again is compared with what was written (5 ms for 100 MB; where the system can tell who has written
to it, a tenth of that from the third time on: :mod:`shmpool.memory.watch`), and written anew if it has changed.  So a
task sees what an array held when its batch was pickled.  That is later than when it came from the iterator of tasks:
joblib takes several from that before it submits the first of them, under any backend.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import re
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal

try:
    import joblib
except ImportError as error:
    raise ImportError("the joblib backend needs joblib: pip install 'shmpool[joblib]'") from error

from joblib.externals.loky.process_executor import TerminatedWorkerError as LokyWorkerError
from joblib.parallel import (
    AutoBatchingMixin,
    FallbackToBackend,
    MultiprocessingBackend,
    ParallelBackendBase,
    SequentialBackend,
)
from joblib.parallel import mp as joblib_multiprocessing

from shmpool.errors import (
    BrokenPoolError,
    SerializationError,
    StoreFullError,
    WorkerDiedError,
    describe_exit,
)
from shmpool.executor import ShmExecutor
from shmpool.integrations.joblib_arrays import SharedCopies, by_file, file_array
from shmpool.integrations.joblib_batches import OwnArrays
from shmpool.integrations.joblib_workers import Lease, Wishes, lease, shutdown_workers
from shmpool.interrupts import whole
from shmpool.serialize.reductions import replacing_arrays

__all__ = [
    "ShmpoolBackend",
    "TaskPicklingError",
    "TerminatedWorkerError",
    "WorkersNotStartedError",
    "register_joblib_backend",
    "shutdown_workers",
]

NAME = "shmpool"

#: Seconds after which idle workers leave: joblib's number for loky's.
_IDLE_TIMEOUT = 300.0
#: Seconds between two looks of joblib's at whether there are results.
_JOBLIBS_PAUSE = 0.01
#: ... which a call feels less than that whose last tasks take longer than so many seconds.
_PATIENCE = 1.0
#: Seconds that tasks of an aborted call have to end by themselves (Ctrl-C reaches workers, too), before their workers
#: are killed: new ones would have to import everything again.
_GRACE = 0.1
#: How many backends of processes may be nested, each started by the workers of the one outside of it; loky's number.
_MOST_NESTED = int(os.environ.get("LOKY_MAX_DEPTH") or 10)

Callback = Callable[[Future[Any]], object]

#: In a worker of this backend: the worker of how many backends, one inside of the other.  Else 0.
_depth = 0


def register_joblib_backend(make_default: bool = False) -> None:
    """Make ``backend="shmpool"`` known to joblib.

    Parameters
    ----------
    make_default : bool
        Use it also where no backend is named, instead of loky.

    Raises
    ------
    ImportError
        joblib is not installed (``pip install shmpool[joblib]``).

    Notes
    -----
    Works like joblib's ``"loky"``, but for these:

    * Arrays, in arguments and in results, go through shared memory; joblib's folders of temporary files are not made.
    * A task may write into any array that it is given: it has its own (copy-on-write).  So ``mmap_mode="r"`` (joblib's
      default, which cannot be told from one that was asked for), ``"c"`` and ``None`` mean the same.  With
      ``parallel_config("shmpool", read_only=True)`` arrays are read-only, in tasks and in results.  With ``"r+"`` all
      tasks of a call write to the same arrays, if these have more than ``max_nbytes``.
    * That holds for tasks that joblib sends as one batch as well, as far as arrays are arguments, or in lists, tuples
      and dicts (up to three deep, of up to 100 items) that are.  Other objects that several tasks of a batch are given
      (a DataFrame, an array as an attribute) are one object in all of them, as under loky; ``batch_size=1`` keeps them
      apart.
    * Arrays over files that are mapped for writing (``np.memmap``) are written to by all, wherever they are in a task.
    * An error, Ctrl-C or a timeout ends the tasks of its own call only, not all workers.
    * A Parallel call inside of a worker of multiprocessing is sequential, as under loky, but without a warning.

    Workers that nobody needs leave after ``idle_worker_timeout`` seconds (default: 300), or when
    ``shmpool.integrations.joblib.shutdown_workers()`` is called.

    Examples
    --------
    >>> import joblib, shmpool
    >>> shmpool.register_joblib_backend()
    >>> with joblib.parallel_config(backend="shmpool"):  # doctest: +SKIP
    ...     search.fit(X, y)
    """
    joblib.register_parallel_backend(NAME, ShmpoolBackend, make_default=make_default)


class TerminatedWorkerError(WorkerDiedError, LokyWorkerError):  # type: ignore[misc]  # joblib has no types
    """A worker died while it ran tasks of a Parallel call: shmpool's error, and joblib's for the same misfortune."""

    def __str__(self) -> str:
        return (
            f"A worker process managed by the executor was unexpectedly terminated: worker {self.pid} died "
            f"{describe_exit(self.exitcode)} while it ran {self.task}. This could be caused by a segmentation fault "
            "while calling the function or by an excessive memory usage causing the Operating System to kill the "
            "worker. The next call has all its workers."
        )


class WorkersNotStartedError(BrokenPoolError, LokyWorkerError):  # type: ignore[misc]  # joblib has no types
    """Workers die before they are ready, or their initializer raises: shmpool's error, and joblib's."""


class TaskPicklingError(SerializationError):
    """A task cannot be pickled, said in joblib's words."""

    def __str__(self) -> str:
        return f"Could not pickle the task to send it to the workers. {super().__str__()}"


class _Call:
    """One call of Parallel: what of it is under way.

    The thread that delivers results may be about to submit the call's next batch when the call is given up, and still
    be at it when the same backend is in its next call.  So a batch belongs to the call that it was submitted for, and
    whoever has sent it looks whether that was given up meanwhile.
    """

    def __init__(self, executor: ShmExecutor) -> None:
        self.executor = executor
        self._send: Callable[[tuple[Any]], Future[Any]] | None = None
        #: What is under way, and what it is called in errors.
        self.under_way: dict[Future[Any], str] = {}
        self.last_submit = 0.0
        self.failed = False  # a task of this call has
        self.aborted = False  # nobody wants its results
        self.news = threading.Event()  # nothing is under way any more, or a task has failed

    def send(self, func: Callable[[], list[Any]]) -> Future[Any]:
        """Pickle a batch, and send it to a worker."""
        if self._send is None:
            self._send = self.executor._bind(_run)
        return self._send((func,))

    def abort(self) -> None:
        """End what is under way, and whatever is still to come."""
        self.aborted = True
        running = [future for future in list(self.under_way) if not future.cancel()]
        if running:
            _, running_still = concurrent.futures.wait(running, _GRACE)
            for future in running_still:
                self.executor.cancel_running(future)


class ShmpoolBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]  # joblib has no types
    """joblib's view of shmpool's workers; see :func:`register_joblib_backend`.

    Parameters
    ----------
    nesting_level : int, optional
        Of how many backends its calls are inside of.  joblib's.
    inner_max_num_threads : int, optional
        How many threads BLAS and OpenMP may use in a worker.  Default: as many as make one for each CPU, together.
    read_only : bool
        Large arrays cannot be written to, neither in tasks nor in results.
    **backend_kwargs
        Defaults for what :meth:`configure` takes.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True

    def __init__(
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        *,
        read_only: bool = False,
        **backend_kwargs: Any,
    ) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        self.backend_kwargs = backend_kwargs  # before 1.5 joblib's base class does not take them
        self._read_only = read_only
        self._parallel: Callable[[], joblib.Parallel | None] = lambda: None
        self._lease: Lease | None = None
        self._lease_again: Callable[[], Lease]
        self._shared_copies: SharedCopies | None = None
        self._call: _Call | None = None

    # ---------------------------------------------------------------- a call begins and ends

    @property
    def parallel(self) -> joblib.Parallel | None:
        """The Parallel object whose call this is; joblib's base classes look at it."""
        return self._parallel()

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many workers ``n_jobs`` means, here and now."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None or joblib_multiprocessing is None:  # JOBLIB_MULTIPROCESSING=0
            return 1
        if multiprocessing.current_process().daemon:
            return 1  # multiprocessing allows its workers no children
        if _depth >= _MOST_NESTED or (_depth and not self.in_main_thread()):
            return 1  # a worker's threads would each start as many processes
        if n_jobs < 0:
            return max(int(joblib.cpu_count()) + 1 + n_jobs, 1)
        return n_jobs

    def configure(
        self,
        n_jobs: int | None = 1,
        parallel: joblib.Parallel | None = None,
        prefer: str | None = None,
        require: str | None = None,
        **options: Any,
    ) -> int:
        """Lease workers for the calls of ``parallel``, until :meth:`terminate`; return how many.

        Parameters
        ----------
        n_jobs : int
        parallel : joblib.Parallel
        prefer, require : str, optional
            Not needed.
        **options
            ``max_nbytes``, ``mmap_mode``, ``initializer``, ``initargs`` and ``idle_worker_timeout``; others are
            joblib's own, or of other backends.

        Raises
        ------
        FallbackToBackend
            joblib is to use another backend.
        ValueError
            An option makes no sense.
        """
        del prefer, require
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        other = self.parallel if self._lease is not None else None
        if other is not None and other is not parallel:
            # parallel_config() gives one backend to all the calls inside of it, and a call whose results are a
            # generator is still under way when the next begins.
            raise FallbackToBackend(self._copy())
        options = {**self.backend_kwargs, **options}
        self._shared_copies = _shared_copies(options.get("mmap_mode"), options.get("max_nbytes"))
        wishes = Wishes(
            self._worker_environment(n_jobs),
            options.get("idle_worker_timeout") or _IDLE_TIMEOUT,
            _start_worker,
            (_depth + 1, options.get("initializer"), tuple(options.get("initargs") or ())),
        )
        self._parallel = weakref.ref(parallel) if parallel is not None else lambda: None
        self._lease_again = partial(lease, n_jobs, wishes)
        self._lease = self._lease_again()
        self._begin()
        return n_jobs

    def _begin(self) -> None:
        """What is submitted from now on is a call of its own."""
        assert self._lease is not None
        executor = self._lease.executor
        self._call = _Call(executor.options(mmap_mode="r") if self._read_only else executor)

    def _copy(self) -> ShmpoolBackend:
        return type(self)(
            self.nesting_level,
            self.inner_max_num_threads,
            read_only=self._read_only,
            **self.backend_kwargs,
        )

    def _worker_environment(self, n_jobs: int) -> dict[str, str]:
        """Variables that limit the threads of libraries in workers, before these are imported: joblib's rules."""
        limit = self.inner_max_num_threads
        share = str(max(joblib.cpu_count() // n_jobs, 1))
        environment = {
            name: os.environ.get(name, share) if limit is None else str(limit)
            for name in self.MAX_NUM_THREADS_VARS
        }
        # Where there is TBB, processes are to agree on the number of threads.
        environment[self.TBB_ENABLE_IPC_VAR] = os.environ.get(self.TBB_ENABLE_IPC_VAR, "1")
        return environment

    def start_call(self) -> None:
        """A call begins."""
        if self._lease is not None and not self._lease.executor.is_usable:
            # In a context, and an initializer has raised in the call before.
            self._lease.release()
            self._lease = self._lease_again()
        self._begin()

    def terminate(self) -> None:
        """Give the workers back; they stay warm."""
        leased, self._lease = self._lease, None
        if leased is not None:
            leased.release()
        self._shared_copies = None
        self._call = None
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """End the tasks that are under way; the workers of those that have begun are replaced."""
        del ensure_ready  # start_call sees to that
        if self._call is not None:
            self._call.abort()

    # ---------------------------------------------------------------- tasks

    def submit(self, func: Callable[[], list[Any]], callback: Callback | None = None) -> Any:
        """Send a batch of tasks to a worker.

        Whatever is wrong with it is in the future: joblib may call this in the thread that delivers results, where
        nobody would see an exception.
        """
        call = self._call
        # Ctrl-C may raise while the batch is pickled; once it is sent, only when the call knows of it.
        with whole:
            future = self._submitted(call, func)
            if call is not None:
                call.under_way[future] = _name(func)
                call.last_submit = time.monotonic()
        if call is not None and call.aborted and not future.cancel():  # while it was pickled
            call.executor.cancel_running(future)
        future.add_done_callback(partial(self._settle, call, callback))
        # joblib keeps what it gets here, and not only until it has taken the result: that must be free by then.
        return weakref.proxy(future)

    def apply_async(self, func: Callable[[], list[Any]], callback: Callback | None = None) -> Any:
        """:meth:`submit`, as joblib called it before 1.5."""
        return self.submit(func, callback)

    def _submitted(self, call: _Call | None, func: Callable[[], list[Any]]) -> Future[Any]:
        if call is None or call.aborted:
            future: Future[Any] = Future()
            future.cancel()
            return future
        try:
            with replacing_arrays(self._travelling):
                return call.send(func)
        except Exception as error:
            future = Future()
            future.set_exception(error)
            return future

    def _travelling(self, array: Any) -> Any:
        """What travels in place of an array, wherever in a task it is."""
        instead: Any = file_array(array, "r" if self._read_only else "c")
        if instead is array and self._shared_copies is not None:
            return self._shared_copies.copy_of(array)
        return instead

    def _settle(self, call: _Call | None, callback: Callback | None, future: Future[Any]) -> None:
        """A task is done."""
        try:
            # After the end of the call joblib would do nothing, but wait to be told so: for its lock, which a thread
            # holds that pickles.
            if callback is not None and not (call is not None and call.aborted):
                callback(future)  # joblib takes the result, and submits what is next
        finally:
            if call is not None:
                call.under_way.pop(future, None)
                if not call.under_way:
                    call.news.set()

    def retrieve_result_callback(self, out: Future[Any]) -> list[Any]:
        """The results of a batch; called by joblib from its callback.  Raises what a task raised."""
        call = self._call
        name = None if call is None else call.under_way.get(out)
        try:
            return out.result()  # type: ignore[no-any-return]
        except Exception as error:
            raise _in_joblibs_words(error, name or "tasks") from error.__cause__
        finally:
            if call is not None and name and (out.cancelled() or out.exception() is not None):
                call.failed = True
                call.news.set()

    @contextlib.contextmanager
    def retrieval_context(self) -> Iterator[None]:
        """Wait for the call to end, where nobody needs its results before: joblib itself looks only every 10 ms."""
        parallel, call = self.parallel, self._call
        if parallel is not None and call is not None:
            if parallel.return_generator or parallel.timeout is not None:
                until = time.monotonic() + _JOBLIBS_PAUSE
                _wait_for_end(call, lambda: until)
            else:
                # There may be an error of the iterator's that joblib has not told us of, so not for ever.
                _wait_for_end(call, lambda: call.last_submit + _PATIENCE)
        yield


def _wait_for_end(call: _Call, deadline: Callable[[], float]) -> None:
    while True:
        call.news.clear()  # before the look: what comes after it ends the wait
        if not call.under_way or call.failed:
            return
        left = deadline() - time.monotonic()
        if left <= 0:
            return
        call.news.wait(left)


def _shared_copies(
    mmap_mode: Literal["r", "c", "r+", "w+"] | None, max_nbytes: int | None
) -> SharedCopies | None:
    if mmap_mode not in (None, "r", "c", "r+", "w+"):
        raise ValueError(f"mmap_mode must be 'r', 'c', 'r+', 'w+' or None, not {mmap_mode!r}")
    # As in joblib: "w+" is not to mean that an array is emptied, and without a limit nothing is shared.
    if mmap_mode in ("r+", "w+") and max_nbytes is not None:
        return SharedCopies(max_nbytes)
    return None


def _name(func: Any) -> str:
    """What a batch is called in errors."""
    tasks = getattr(func, "items", None)
    if not tasks:
        return "tasks"
    function = tasks[0][0]
    name = getattr(function, "__qualname__", None) or f"a {type(function).__name__}"
    return str(name) if len(tasks) == 1 else f"a batch of {len(tasks)} calls of {name}"


def _in_joblibs_words(error: Exception, name: str) -> Exception:
    """The error that joblib's users expect."""
    if type(error) is WorkerDiedError:
        return TerminatedWorkerError(pid=error.pid, exitcode=error.exitcode, task=name)
    if type(error) is BrokenPoolError:
        return WorkersNotStartedError(error.reason)
    if isinstance(error.__cause__, StoreFullError):
        return error.__cause__  # there is no room for an array that all tasks write to
    if type(error) is SerializationError and error.what == "the arguments":
        culprit = error.culprit and _PLACE_IN_BATCH.sub(_place_in_call, error.culprit)
        return TaskPicklingError(what=name, culprit=culprit, reason=error.reason)
    return error


#: A batch is the one argument of what is sent; its items are (function, args, kwargs).
_PLACE_IN_BATCH = re.compile(r"^args\[0\]\.items\[\d+\]\[([012])\]")


def _place_in_call(match: re.Match[str]) -> str:
    return ("fn", "args", "kwargs")[int(match[1])]


# ---- in workers ------------------------------------------------------------------------------------------------------


def _start_worker(
    depth: int, initializer: Callable[..., object] | None, initargs: tuple[Any, ...]
) -> None:
    """What a worker does first."""
    global _depth
    _depth = depth
    register_joblib_backend()
    joblib.register_parallel_backend("multiprocessing", _NoMultiprocessing)
    if initializer is not None:
        initializer(*initargs)


class _NoMultiprocessing(MultiprocessingBackend):  # type: ignore[misc]  # joblib has no types
    """joblib's backend of multiprocessing, in a worker: sequential, as in workers of loky.

    A worker's ``__main__`` is not the program's, so functions of that cannot be pickled there.
    """

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """One."""
        if n_jobs not in (None, 1):
            message = "Multiprocessing-backed parallel loops cannot be nested, below shmpool, setting n_jobs=1"
            warnings.warn(message, stacklevel=3)
        return 1


def _run(batch: Callable[[], list[Any]]) -> list[Any]:
    """What a worker does with a batch."""
    tasks = getattr(batch, "items", None)
    if type(tasks) is list:
        batch.items = OwnArrays(tasks).items()  # type: ignore[attr-defined]
        del tasks
    return by_file(batch())
