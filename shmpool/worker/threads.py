"""How many threads BLAS and OpenMP may use in a worker: workers times threads shall not exceed the cores.

Each such library starts a thread for each core, in each worker, and threads that compete for cores are slower than
one.  It is told in two ways: by environment variables, which it reads when it is loaded, and, where it is loaded
already, by calling it.  Who does what, by start method:

============================  =======================================  =================================
start method                  variables                                libraries that are loaded already
============================  =======================================  =================================
fork, first workers           the worker                               the parent, while it forks
fork, later ones              the worker                               the template, before it forks
spawn, forkserver, loky       the worker's name, before all else       the worker
============================  =======================================  =================================

A forked process must not call OpenBLAS itself: fork has ended OpenBLAS's threads, and to set their number starts them
all again, which then spin for 0.1 s.

This is a cap.  A number is only ever lowered, so ``threadpoolctl.threadpool_limits()`` around the executor holds in
forked workers, and whatever an initializer or a task sets afterwards is not touched.  A library for which the user has
set a variable is left alone altogether.  ``SHMPOOL_WORKER_THREADS`` sets the cap itself, or switches it off.

threadpoolctl would do for the calls, but it may not be there, and takes 4 ms to import.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Self

from shmpool.lokys import loky_context_module

__all__ = [
    "Herald",
    "lower_libraries",
    "lowered_libraries",
    "start_capped",
    "threads_each",
    "variables",
]

_log = logging.getLogger("shmpool")

#: By kind of library, the variables that it reads: the first that is set counts. OMP_NUM_THREADS serves others too
#: (BLIS, numexpr, Arrow).
_VARIABLES = {
    "openblas": ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"),
    "mkl": ("MKL_NUM_THREADS", "OMP_NUM_THREADS"),
    "openmp": ("OMP_NUM_THREADS",),
    "numba": ("NUMBA_NUM_THREADS",),
}

#: By kind of library, what its file's name begins with.
_FILES = {
    "openblas": ("libscipy_openblas", "libopenblas", "libblas."),
    "mkl": ("libmkl_rt",),
    "openmp": ("libgomp", "libiomp", "libomp.", "libomp-", "libomp5"),
}

#: What is in the names of files that link to one of those: conda's libcblas.so.3 is OpenBLAS or MKL.
_CANDIDATES = ("blas", "lapack", "mkl", "omp")

#: By kind of library, the functions that get and set its number of threads, under all names that builds give them.
_FUNCTIONS = {
    "openblas": tuple(
        tuple(f"{prefix}openblas_{verb}_num_threads{suffix}" for verb in ("get", "set"))
        for prefix in ("scipy_", "")  # those of wheels first
        for suffix in ("64_", "", "_64")
    ),
    "mkl": (("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),),
    "openmp": (("omp_get_max_threads", "omp_set_num_threads"),),
}


def threads_each(max_workers: int, limit: int | None = None) -> int | None:
    """How many threads each of ``max_workers`` workers may use.

    Parameters
    ----------
    max_workers : int
    limit : int, optional
        ``Config.worker_threads``: a number for all, 0 for no cap.  Default: the cores, divided.

    Returns
    -------
    int or None
        None: as many as it likes.
    """
    if limit is not None:
        return limit or None
    if len(os.sched_getaffinity(0)) < 2 * max_workers:
        return 1  # a control group could only mean fewer, and loky, which would know, takes 9 ms to import
    return max(1, int(loky_context_module().cpu_count()) // max_workers)


def variables(threads: int | None) -> dict[str, str]:
    """The environment variables that cap a process which is about to start; none that contradicts the user's."""
    if threads is None:
        return {}
    return {names[0]: str(threads) for names in _VARIABLES.values() if _said(names) is None}


def _said(names: tuple[str, ...]) -> str | None:
    return next((value for name in names if (value := os.environ.get(name))), None)


class Herald(str):
    """The name of a process, which brings environment variables with it, and has Ctrl-C wait.

    A process that is spawned unpickles its name before all else, before it imports ``__main__`` and with that numpy:
    so libraries never start the threads that they shall not have.  That makes two workers ready in two thirds of the
    time.  There is no other way in: contexts take no environment for a process, and in this process, whose
    environment children inherit, other threads would see the change.

    Parameters
    ----------
    name : str
    variables : dict of str to str
        Those that are set already win.
    """

    __slots__ = ("_variables",)
    _variables: dict[str, str]

    def __new__(cls, name: str, variables: dict[str, str]) -> Self:  # noqa: D102  # see the class
        self = super().__new__(cls, name)
        self._variables = variables
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # An expression, since nothing of shmpool can be imported yet: sys.path comes with the same message.
        # The name comes a second time, with the process object: what __main__ has set by then must stay.
        # SIGINT is blocked, until the worker has a handler for it; see shmpool.worker.interrupts.
        code = (
            "(__import__('signal').pthread_sigmask(0, [2]),"
            " [__import__('os').environ.setdefault(*item) for item in {!r}], {!r})[2]"
        )
        return eval, (code.format([*self._variables.items()], str(self)),)


_to_repeat: list[Callable[[], object]] = []  # by forked children


def start_capped(threads: int | None) -> None:
    """What a worker does first, whoever has lowered the libraries that it has: cap those to come."""
    wanted = variables(threads)
    if _numba_has_threads():
        # Too late, and numba raises when it next compiles something and finds another number.
        wanted.pop("NUMBA_NUM_THREADS", None)
    os.environ.update(wanted)
    for function in _to_repeat:
        function()


def lower_libraries(threads: int | None) -> list[Callable[[], object]]:
    """Cap the libraries that this process has loaded, and return what undoes it."""
    undo: list[Callable[[], object]] = []
    _to_repeat.clear()
    if threads is None:
        return undo
    # A variable with this very value may be a herald's doing.
    free = {kind for kind, names in _VARIABLES.items() if _said(names) in (None, str(threads))}
    try:
        for kind, path in _loaded():
            lowered = _lower(kind, path, threads) if kind in free else None
            if lowered is not None:
                setter, number = lowered
                undo.append(partial(setter, number))
                if kind == "openmp":  # LLVM's and Intel's begin anew in a forked process
                    _to_repeat.append(partial(setter, threads))
    except Exception:  # whatever is wrong with a library, tasks can do without a cap
        _log.debug("the threads of a library could not be limited", exc_info=True)
    return undo


#: Held while libraries are lowered for the sake of children.  Reentrant: a finalizer of the user's may run meanwhile,
#: in the same thread, and have another executor start its workers.
_forking = threading.RLock()


@contextlib.contextmanager
def lowered_libraries(threads: int | None) -> Iterator[None]:
    """Cap the libraries of this process meanwhile, so that the processes which it forks inherit that.

    Other threads of this process may notice; they get what is left of it for some milliseconds, and right results.
    """
    with _forking:
        pid = os.getpid()
        outer = _to_repeat[:]
        undo = lower_libraries(threads)
        try:
            yield
        finally:
            if os.getpid() == pid:
                for function in undo:
                    function()
                _to_repeat[:] = outer


def _renew_lock() -> None:
    global _forking
    _forking = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


def _numba_has_threads() -> bool:
    return getattr(sys.modules.get("numba.np.ufunc.parallel"), "_is_initialized", False)


def _loaded() -> Iterator[tuple[str, str]]:
    """The libraries that this process has: kind, and path by which it was loaded."""
    for path in _shared_objects():
        if any(part in os.path.basename(path) for part in _CANDIDATES):
            name = os.path.basename(os.path.realpath(path))
            yield from ((kind, path) for kind, begin in _FILES.items() if name.startswith(begin))


class _ObjectInfo(ctypes.Structure):
    """The beginning of C's ``struct dl_phdr_info``."""

    _fields_ = (("address", ctypes.c_void_p), ("name", ctypes.c_char_p))


def _shared_objects() -> list[str]:
    """Paths of all shared objects; from the dynamic linker, since /proc/self/maps takes ten times as long."""
    found: list[str] = []

    def see(info: Any, size: int, data: int | None) -> int:
        del size, data
        found.append(os.fsdecode(info.contents.name or b""))
        return 0

    callback = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(_ObjectInfo), ctypes.c_size_t, ctypes.c_void_p
    )
    # PyDLL keeps the GIL: the linker's lock is held meanwhile, and a thread with the GIL may wait for that.
    ctypes.PyDLL(None).dl_iterate_phdr(callback(see), None)
    return found


def _lower(kind: str, path: str, threads: int) -> tuple[Callable[[int], object], int] | None:
    """Lower one library, if it has more; return what sets its number, and what that was."""
    library = ctypes.CDLL(path, os.RTLD_NOLOAD | os.RTLD_LAZY)
    for getter, setter in _FUNCTIONS[kind]:
        if hasattr(library, getter):
            number = library[getter]()
            if number <= threads:
                return None
            library[setter](threads)
            return library[setter], number
    return None
