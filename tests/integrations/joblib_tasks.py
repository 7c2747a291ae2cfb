"""What the tests of the joblib backend share, and what they run in workers."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from joblib import Parallel, delayed
from support import TIMEUNIT, wait_until

import shmpool
from shmpool.integrations.joblib import ShmpoolBackend, shutdown_workers
from shmpool.store.current import get_store

#: Longer than any test takes: what sleeps so long must be ended.
FOR_EVER = 600


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """The backend is registered, and no workers are left afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        # register_parallel_backend() changes these two, for good.
        patch.setattr(joblib.parallel, "BACKENDS", dict(joblib.parallel.BACKENDS))
        patch.setattr(joblib.parallel, "DEFAULT_BACKEND", joblib.parallel.DEFAULT_BACKEND)
        shmpool.register_joblib_backend()
        try:
            yield
        finally:
            shutdown_workers()


#: What the backend takes itself.  Parallel passes it on only since joblib 1.5.
_OF_THE_BACKEND = ("initializer", "initargs", "idle_worker_timeout", "read_only")


def parallel(n_jobs: int = 2, **options: Any) -> Parallel:
    own = {name: options.pop(name) for name in _OF_THE_BACKEND if name in options}
    backend = ShmpoolBackend(**own) if own else "shmpool"
    return Parallel(n_jobs=n_jobs, backend=backend, **options)


def both_workers(call: Parallel, folder: Path) -> set[int]:
    """The pids of two workers: each of two tasks waits for the other, so they need one each."""
    folder.mkdir()
    return set(call(delayed(meet)(str(folder), str(i)) for i in range(2)))


# ---- tasks -----------------------------------------------------------------------------------------------------------


def identity(value: Any) -> Any:
    return value


def square(value: int) -> int:
    return value * value


def pid(_: object = None) -> int:
    return os.getpid()


def meet(folder: str, name: str, parties: int = 2) -> int:
    """Return when so many tasks are in here at the same time."""
    Path(folder, name).touch()
    wait_until(lambda: len(os.listdir(folder)) >= parties, 60, f"{parties} tasks at a time")
    return os.getpid()


def wait_for(path: str, value: Any = None) -> Any:
    wait_until(lambda: os.path.exists(path), 60, path)
    return value


def sleep_or_raise(number: int) -> int:
    if number == 1:
        raise ValueError("task 1")
    time.sleep(FOR_EVER)
    return number


def sleep(_: object) -> None:
    time.sleep(FOR_EVER)


def interrupt_parent(number: int) -> None:
    if number == 0:
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(FOR_EVER)


def raise_interrupt(_: object) -> None:
    raise KeyboardInterrupt


def die(number: int, signal_number: int) -> int:
    if number == 0:
        os.kill(os.getpid(), signal_number)
    return number


def environment() -> dict[str, str]:
    return dict(os.environ)


def threads_of_blas() -> set[int]:
    import threadpoolctl

    np.ones((9, 9)) @ np.ones((9, 9))
    return {int(library["num_threads"]) for library in threadpoolctl.threadpool_info()}


class PickledSlowly:
    """Its pickling says that it has begun, and waits until it may end."""

    begun = threading.Event()
    may_end = threading.Event()

    def __reduce__(self) -> tuple[Any, ...]:
        self.begun.set()
        assert self.may_end.wait(60 * TIMEUNIT)
        return int, ()


# ---- initializers ----------------------------------------------------------------------------------------------------

_told: Any = "nothing"


def tell(value: Any) -> None:
    global _told
    _told = value


def told(_: object = None) -> tuple[int, Any]:
    return os.getpid(), _told


def refuse_unless(path: str) -> None:
    if not os.path.exists(path):
        raise RuntimeError("this initializer refuses for now")


def refuse() -> None:
    raise RuntimeError("this initializer refuses")


# ---- nesting ---------------------------------------------------------------------------------------------------------


def describe(call: Parallel) -> tuple[str, int]:
    return type(call._backend).__name__, call._backend.nesting_level


def nested(depth: int) -> tuple[Any, ...]:
    """For a call inside of this task: its backend, the processes and threads that it runs in; and so on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call = Parallel(n_jobs=2)
        described = describe(call)
        places = set(call(delayed(place)() for _ in range(4)))
        inner = call([delayed(nested)(depth - 1)]) if depth else []
    return described, places, inner, [str(warning.message) for warning in caught]


def place() -> tuple[int, bool]:
    return os.getpid(), threading.current_thread() is threading.main_thread()


def nested_explicitly(n_jobs: int, backend: str = "shmpool") -> tuple[int, set[int], list[str]]:
    """A call inside of this task that names the backend."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pids = set(Parallel(n_jobs, backend=backend)(delayed(pid)() for _ in range(4)))
    return os.getpid(), pids, [str(warning.message) for warning in caught]


def squares_in_child(count: int) -> tuple[int, list[int], set[int]]:
    """A call in a child of multiprocessing or concurrent.futures."""
    shmpool.register_joblib_backend()
    with joblib.parallel_config(backend="shmpool", n_jobs=2):
        squares = Parallel()(delayed(square)(i) for i in range(count))
        pids = set(Parallel()(delayed(pid)() for _ in range(count)))
    return os.getpid(), squares, pids


# ---- arrays ----------------------------------------------------------------------------------------------------------


def write(array: Any, value: float) -> tuple[float, bool]:
    """What was there, and whether writing works."""
    before = float(array.flat[0])
    try:
        array.flat[0] = value
    except ValueError:
        return before, False
    return before, True


def add_one(*arrays: Any, into: Any = None) -> float:
    """What the first item of the first array is, once it is one more in all of them."""
    for array in arrays:
        np.add(array, 1, out=array)
    if into is not None:
        into["array"][0] += 1
    return float((arrays[0] if arrays else into["array"]).flat[0])


def add_one_and_keep(array: Any, number: int) -> Any:
    """The array, changed or not."""
    if number % 2:
        array += number
    return array[:3] if number % 3 else array


def same_and_add(first: Any, others: list[Any]) -> tuple[bool, float]:
    first += 1
    return others[0] is first, float(others[0].flat[0])


def views(array: Any) -> int:
    """How many views of the store this process has."""
    del array
    return get_store().stats().holders["views"]


def write_row(rows: Any, number: int) -> type:
    rows[number] = number
    rows.flush()
    return type(rows)


def fill(arrays: list[Any], value: float) -> None:
    arrays[0][...] = value


def first_and_sum(array: Any) -> tuple[float, float]:
    return float(array.flat[0]), float(array.sum())


def ones(count: int) -> Any:
    return np.ones(count)


def same_file(rows: Any) -> Any:
    return {"rows": rows[1:]}


class Holder:
    def __init__(self, array: Any) -> None:
        self.array = array

    def put(self, number: int) -> None:
        put(self.array, number)

    def total(self, number: int) -> float:
        return float(self.array.sum()) + number


class Locked:
    def __init__(self) -> None:
        self.lock = threading.Lock()


def write_item(arrays: list[Any], number: int) -> None:
    arrays[0][number, 0] = 10 * number


def put(array: Any, number: int) -> None:
    array[number] = number + 1


def put_in_first(arrays: list[Any], number: int) -> None:
    put(arrays[0], number)


def put_in_frame(frame: Any, number: int) -> None:
    put(frame["x"].to_numpy(), number)


def put_deep(nested: Any, number: int) -> None:
    put(nested[0][0][0][0][0]["x"], number)


def sum_of(data: dict[str, Any]) -> float:
    return float(data["x"].sum())


def get_sum(ref: Any) -> float:
    return float(ref.get().sum())


def fit_and_score(estimator: Any, x: Any, y: Any, alpha: float) -> float:
    return float(estimator.set_params(alpha=alpha).fit(x, y).score(x, y))


def write_and_compare(one: Any, other: Any) -> tuple[bool, float, float]:
    before = float(one[0][0])
    one[0][0] += 1
    return one is other, before, float(other[0][0])


def address_of(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
