"""A pool from its construction to its end, whichever end that is."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import multiprocessing
import multiprocessing.pool
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pool_tasks as tasks
import pytest
from executor_tasks import PYTHON, SOON, environment, run_script, write_script
from pool_tasks import METHODS
from support import wait_until

import shmpool
from shmpool.pool import Context, Pool, get_context

# Construction.


@pytest.mark.parametrize("make", [multiprocessing.pool.Pool, Pool])
def test_arguments_that_make_no_sense_are_refused_in_the_standard_librarys_words(
    make: Callable[..., Any],
) -> None:
    for processes in (0, -1):
        with pytest.raises(ValueError, match="Number of processes must be at least 1"):
            make(processes)
    for limit in (0, -1, 0.5, "12"):
        with pytest.raises(ValueError, match="maxtasksperchild must be a positive int or None"):
            make(1, maxtasksperchild=limit)
    with pytest.raises(TypeError, match="initializer must be a callable"):
        make(1, initializer=1)
    with pytest.raises(TypeError):
        make("2")


def test_arguments_of_our_own_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="mmap_mode"):
        Pool(1, mmap_mode="w")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="store must be an ObjectStore"):
        Pool(1, store=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mp_context"):
        Pool(1, context="thread")


@pytest.mark.parametrize("method", METHODS)
def test_all_workers_are_there_from_the_beginning(method: str) -> None:
    with Pool(3, context=method) as pool:
        workers = pool._pool
        assert len(workers) == pool._processes == 3
        assert all(worker.is_alive() and worker.pid for worker in workers)
        assert pool.apply(tasks.pid) in {worker.pid for worker in workers}
        assert pool._pool == workers
        assert repr(pool) == "<shmpool.pool.pool.Pool state=RUN pool_size=3>"
    pool.join()
    assert repr(pool) == "<shmpool.pool.pool.Pool state=TERMINATE pool_size=3>"
    assert pool._pool == workers
    assert not any(worker.is_alive() for worker in workers)


def test_the_attributes_that_others_read_are_there() -> None:
    context = multiprocessing.get_context("fork")
    with Pool(1, tasks.identity, (3,), 10, context) as pool:
        assert pool._ctx is context
        assert (pool._initializer, pool._initargs, pool._maxtasksperchild) == (
            tasks.identity,
            (3,),
            10,
        )
        assert pool._state == multiprocessing.pool.RUN
        assert pool._wrap_exception
    pool.join()
    assert pool._state == multiprocessing.pool.TERMINATE


def test_the_default_is_a_worker_for_each_cpu() -> None:
    from loky.backend.context import cpu_count

    with Pool(context="fork") as pool:
        assert len(pool._pool) == cpu_count()
    pool.join()


@pytest.mark.parametrize("method", METHODS)
def test_a_context_makes_pools(method: str) -> None:
    context = get_context(method)
    assert isinstance(context, Context)
    with context.Pool(1, mmap_mode="r") as pool:
        assert pool.apply(tasks.square, (3,)) == 9
        assert not pool.apply(np.ones, (1 << 15,)).flags.writeable
    pool.join()
    assert context.get_start_method() == method
    assert context.cpu_count() == os.cpu_count()
    copied = copy.copy(context)
    assert copied.get_start_method() == method
    with pytest.raises(AttributeError):
        context.no_such_thing  # noqa: B018


@pytest.mark.parametrize("method", METHODS)
def test_the_initializer_runs_in_each_worker_and_may_get_arrays_and_locks(method: str) -> None:
    array = np.arange(1 << 15)
    lock = shmpool.pool.get_context(method).Lock()
    with Pool(2, tasks.keep, [array, lock], context=method) as pool:
        assert pool.map(tasks.look_at_kept, range(8), 1) == [(1 << 15) - 1] * 8
    pool.join()


def test_thread_pools_are_as_they_were() -> None:
    with multiprocessing.pool.ThreadPool(2) as pool:
        assert not isinstance(pool, Pool)
        assert pool.map(threading.Lock().__class__, []) == []
        assert pool.map(tasks.square, range(4)) == [0, 1, 4, 9]
    pool.join()


# Close, terminate, join.


def use(pool: Pool) -> Iterator[Callable[[], object]]:
    yield lambda: pool.apply(tasks.square, (1,))
    yield lambda: pool.apply_async(tasks.square, (1,))
    yield lambda: pool.map(tasks.square, [1])
    yield lambda: pool.map_async(tasks.square, [1])
    yield lambda: pool.starmap(tasks.add, [(1, 2)])
    yield lambda: pool.starmap_async(tasks.add, [(1, 2)])
    yield lambda: pool.imap(tasks.square, [1])
    yield lambda: pool.imap_unordered(tasks.square, [1], 2)
    yield pool.__enter__


@pytest.mark.parametrize(
    "make", [functools.partial(multiprocessing.get_context("fork").Pool), Pool]
)
@pytest.mark.parametrize("end", ["close", "terminate"])
def test_a_pool_that_was_ended_takes_nothing(make: Callable[..., Any], end: str) -> None:
    pool = make(1)
    with pytest.raises(ValueError, match="Pool is still running"):
        pool.join()
    getattr(pool, end)()
    for method in use(pool):
        with pytest.raises(ValueError, match="Pool not running"):
            method()
    for _ in range(2):
        pool.join()
        pool.close()
        assert pool._state == end.upper()
    pool.terminate()
    pool.join()
    assert pool._state == "TERMINATE"


@pytest.mark.parametrize("method", METHODS)
def test_a_closed_pool_finishes_what_it_was_given(method: str, tmp_path: Path) -> None:
    pool = Pool(2, context=method)
    results = [pool.apply_async(tasks.square, (i,)) for i in range(20)]
    mapped = pool.map_async(functools.partial(tasks.touch, str(tmp_path)), range(10), 1)
    workers = pool._pool
    pool.close()
    pool.join()
    assert len(list(tmp_path.iterdir())) == 10
    assert [result.get(0) for result in results] == [i * i for i in range(20)]
    assert mapped.get(0) == list(range(10))
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_a_closed_pool_replaces_workers_until_all_is_done() -> None:
    pool = Pool(2, maxtasksperchild=1, context="fork")
    results = [pool.apply_async(tasks.pid) for _ in range(6)]
    pool.close()
    pool.join()
    assert len({result.get(0) for result in results}) == 6


@pytest.mark.parametrize("method", METHODS)
def test_a_terminated_pool_ends_what_runs_and_tells_who_waits(method: str, tmp_path: Path) -> None:
    pool = Pool(2, context=method)
    fn = functools.partial(tasks.wait_for, str(tmp_path))
    single = pool.apply_async(fn)
    mapped = pool.map_async(fn, range(20), 1)
    ordered = pool.imap(fn, range(1000))
    unordered = pool.imap_unordered(fn, iter(range(1000)), 2)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2, SOON, "tasks to run")
    outcome: list[Any] = []

    def wait() -> None:
        with pytest.raises(shmpool.BrokenPoolError, match="terminated"):
            mapped.get(SOON)
        outcome.append("raised")

    waiting = threading.Thread(target=wait)
    waiting.start()
    workers = pool._pool
    pool.terminate()
    assert not any(worker.is_alive() for worker in workers)
    waiting.join(SOON)
    assert outcome == ["raised"]
    for get in (single.get, ordered.__next__, unordered.__next__):  # type: ignore[attr-defined]
        with pytest.raises(shmpool.BrokenPoolError, match="terminated"):
            get()
    pool.join()


def test_a_block_that_is_left_ends_the_pool_at_once(tmp_path: Path) -> None:
    with pytest.raises(LookupError), Pool(2, context="fork") as pool:
        result = pool.map_async(functools.partial(tasks.wait_for, str(tmp_path)), range(8))
        raise LookupError
    assert not any(worker.is_alive() for worker in pool._pool)
    assert not result.successful()


def test_workers_that_ignore_sigterm_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under fork they inherit the program's handler; multiprocessing then waits for ever."""
    monkeypatch.setattr("shmpool.pool.core.PATIENCE", 0.2)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with Pool(2, context="fork") as pool:
            workers = pool._pool
            pool.map(tasks.square, range(4))
            result = pool.map_async(time.sleep, [3600] * 2, 1)
            wait_until(lambda: pool.executor.stats().tasks_submitted == 6, SOON, "tasks to begin")
        pool.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert {worker.exitcode for worker in workers} <= {-signal.SIGKILL, -signal.SIGTERM, 0}
    assert not result.successful()


def test_a_pool_may_be_terminated_where_a_result_arrives(tmp_path: Path) -> None:
    """That is in the thread which ends when the workers have, so it does not wait for that."""
    where: list[threading.Thread] = []

    def terminate(_: object) -> None:
        pool.terminate()
        where.append(threading.current_thread())

    with Pool(1, context="fork") as pool:
        pool.executor.submit(tasks.wait_for, str(tmp_path)).add_done_callback(terminate)
        (tmp_path / "open").touch()
        wait_until(lambda: where, SOON, "the result")
    pool.join()
    assert where[0] is not threading.current_thread()
    assert not where[0].is_alive()


def test_views_of_a_pool_share_its_end() -> None:
    pool = Pool(1, context="fork")
    view = pool.options(mmap_mode="r").options(retries=1)
    with view as entered:
        assert entered.apply(tasks.square, (2,)) == 4
    assert pool._state == view._state == "TERMINATE"
    pool.join()
    other = Pool(1, context="fork")
    view = other.options(retries=1)
    other.close()
    view.join()
    with pytest.raises(ValueError, match="not running"):
        view.map(tasks.square, [1])


# A pool that is dropped.


@pytest.fixture
def without_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def drop(pool: Pool) -> None:
    """Have it used in all ways, some of which fail; the caller has the last reference."""
    assert pool.map(tasks.square, range(10)) == [i * i for i in range(10)]
    assert list(pool.imap(tasks.square, iter(range(10)))) == [i * i for i in range(10)]
    assert list(pool.imap_unordered(tasks.square, [1] * 10, 3)) == [1] * 10
    next(pool.imap(tasks.square, iter(range(1000))))
    pool.imap(tasks.square, iter(range(10)))
    pool.apply_async(tasks.square, (1,), callback=lambda _: None).wait()
    pool.options(retries=1).apply(tasks.square, (1,))
    with pytest.raises(KeyError):
        pool.apply(tasks.fail, (1,))
    with pytest.raises(KeyError):
        pool.map(tasks.fail, range(10))
    with pytest.raises(TypeError):
        pool.map(tasks.square, [tasks.Unpicklable(TypeError)])
    with pytest.raises(ZeroDivisionError):
        next(pool.imap(tasks.square, (1 // 0 for _ in "x")))


@pytest.mark.parametrize("method", METHODS)
def test_a_pool_that_is_dropped_goes_without_gc(method: str, without_gc: None) -> None:
    pool = Pool(2, context=method)
    drop(pool)
    workers, gone, executor = pool._pool, weakref.ref(pool), weakref.ref(pool.executor)
    with pytest.warns(ResourceWarning, match=r"unclosed running multiprocessing pool <.*state=RUN"):
        del pool
    wait_until(lambda: gone() is None and executor() is None, SOON, "both to be gone")
    wait_until(lambda: not any(worker.is_alive() for worker in workers), SOON, "the workers to end")


def test_a_pool_that_was_ended_goes_without_a_warning(without_gc: None) -> None:
    for end in (Pool.close, Pool.terminate):
        pool = Pool(1, context="fork")
        drop(pool)
        end(pool)
        pool.join()
        gone = weakref.ref(pool)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            del pool
        assert gone() is None


def test_results_outlive_their_pool_and_do_not_keep_it(tmp_path: Path, without_gc: None) -> None:
    pool = Pool(1, context="fork")
    fn = functools.partial(tasks.wait_for, str(tmp_path))
    seen: list[Any] = []
    single = pool.apply_async(fn, (1,), callback=seen.append)
    mapped = pool.map_async(fn, range(3))
    gone = weakref.ref(pool)
    with pytest.warns(ResourceWarning):
        del pool
    assert gone() is None
    (tmp_path / "open").touch()
    assert (single.get(SOON), mapped.get(SOON), seen) == (1, [0, 1, 2], [1])


def test_an_iterator_keeps_its_pool_until_its_end(without_gc: None) -> None:
    """As in the standard library."""
    results = Pool(1, context="fork").imap(tasks.square, iter(range(5)))
    gone = weakref.ref(results._pool)  # type: ignore[attr-defined]
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert gone() is not None
    with pytest.warns(ResourceWarning):
        assert list(results) == []
    wait_until(lambda: gone() is None, SOON, "the pool to go")


def test_a_pool_that_was_never_made_goes_silently() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="Number of processes"):
            Pool(0)
        pool = object.__new__(Pool)
        assert pool._state == "INIT"
        assert pool._pool == []
        for method in use(pool):
            with pytest.raises(ValueError, match="Pool not running"):
                method()
        pool.close()
        pool.terminate()
        pool.join()
        del pool


# Other processes.


def test_in_a_forked_child_a_pool_says_what_is_wrong() -> None:
    with Pool(2, context="fork") as pool:
        result = pool.map_async(tasks.square, range(4))
        result.wait()
        receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

        def child() -> None:
            said = []
            for method in use(pool):
                try:
                    method()
                except RuntimeError as error:
                    said.append(str(error))
            pool.close()
            pool.terminate()
            pool.join()
            with Pool(1, context="fork") as own:
                sender.send((said, own.map(tasks.square, [3])))
            own.join()

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(SOON)
        assert process.exitcode == 0
        said, squares = receiver.recv()
        assert len(said) == 9
        assert all("belongs to the process that made it" in text for text in said)
        assert squares == [9]
        receiver.close()
        sender.close()
        assert pool.map(tasks.square, range(4)) == [0, 1, 4, 9]
    pool.join()


@pytest.mark.parametrize("method", METHODS)
def test_a_task_may_have_a_pool_of_its_own(method: str) -> None:
    """With multiprocessing, workers may have no children."""

    def outer(n: int) -> list[int]:
        with Pool(1, context="fork") as inner:
            found = inner.map(tasks.square, range(n))
        inner.join()
        return found

    with Pool(2, context=method) as pool:
        assert pool.map(outer, [1, 3]) == [[0], [0, 1, 4]]
    pool.join()


# The end of the program.

ENDS = """
import sys, time, pool_tasks as tasks
from pathlib import Path
from shmpool.pool import Pool

def main():
    global pool, result, endless, waiting, iterator
    folder = sys.argv[1]
    pool = Pool(2, context={method!r})
    print(pool.map(tasks.square, range(4)))
    result = pool.map_async(time.sleep, [3600] * 50, 1, callback=print)
    iterator = pool.imap(time.sleep, iter(lambda: 3600, 0))
    {ending}

if __name__ == "__main__":
    main()
"""


#: In development mode (-X dev) a pool that was not closed warns, as the standard library's does.
LEFT_RUNNING = ("-W", "ignore:unclosed running multiprocessing pool:ResourceWarning")


def script_path() -> str:
    return os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])


@pytest.mark.parametrize(
    ("method", "ending"),
    [
        *itertools.product(["fork", "spawn", "loky"], ["pass"]),
        ("fork", "pool.close()"),
        *itertools.product(["fork", "spawn"], ["sys.exit(0)"]),
    ],
)
def test_a_program_does_not_wait_for_what_it_did_not_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, ending: str
) -> None:
    """As in the standard library: pools are terminated at the end."""
    path = os.pathsep.join([script_path(), environment()["PYTHONPATH"]])
    script = write_script(tmp_path, ENDS.format(method=method, ending=ending))
    done = subprocess.run(
        [*PYTHON, *LEFT_RUNNING, str(script), str(tmp_path)], capture_output=True, text=True, timeout=SOON,
        env=environment(PYTHONPATH=path), check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 1, 4, 9]\n", "")


def test_a_program_that_raises_ends_at_once(tmp_path: Path) -> None:
    path = os.pathsep.join([script_path(), environment()["PYTHONPATH"]])
    script = write_script(tmp_path, ENDS.format(method="fork", ending="raise LookupError"))
    done = subprocess.run(
        [*PYTHON, str(script), str(tmp_path)], capture_output=True, text=True, timeout=SOON,
        env=environment(PYTHONPATH=path), check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "LookupError"
    assert done.stderr.count("Traceback") == 1


INTERRUPTED = """
import os, sys, time
from pathlib import Path
from shmpool.pool import Pool

def task(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(3600)

def main():
    {code}

if __name__ == "__main__":
    main()
"""
WAYS = {
    "map in a block": "with Pool(2, context={method!r}) as pool: pool.map(task, sys.argv[1:] * 10, 1)",
    "map": "Pool(2, context={method!r}).map(task, sys.argv[1:] * 10, 1)",
    "imap": "list(Pool(2, context={method!r}).imap(task, iter(sys.argv[1:] * 10)))",
    "imap_unordered": "list(Pool(2, context={method!r}).imap_unordered(task, sys.argv[1:] * 1000))",
    "get": "Pool(2, context={method!r}).starmap_async(task, [sys.argv[1:]] * 10, 1, callback=print).get(3600)",
}


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("way", WAYS)
def test_ctrl_c_ends_a_program_cleanly(tmp_path: Path, way: str, method: str) -> None:
    folder = tmp_path / "begun"
    folder.mkdir()
    script = write_script(tmp_path, INTERRUPTED.format(code=WAYS[way].format(method=method)))
    program = subprocess.Popen(
        [*PYTHON, *LEFT_RUNNING, str(script), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment(), start_new_session=True,
    )  # fmt: skip
    try:
        wait_until(lambda: len(os.listdir(folder)) == 2, 60, "the tasks to begin")
        os.killpg(program.pid, signal.SIGINT)  # all of the terminal's processes, as Ctrl-C
        out, err = program.communicate(timeout=SOON)
    finally:
        program.kill()
        program.communicate()
    assert program.returncode == -signal.SIGINT, err
    assert out == ""
    assert err.splitlines()[-1].startswith("KeyboardInterrupt")
    for pid in map(int, os.listdir(folder)):
        wait_until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), SOON, "the worker to end")


def test_a_script_with_a_pool_at_its_top_level_runs(tmp_path: Path) -> None:
    assert (
        run_script(
            tmp_path,
            """
        from shmpool.pool import Pool

        def double(x):
            return factor * x

        factor = 2
        pool = Pool(2, context="fork")
        print(pool.map(double, range(5)))
        factor = 3
        print(list(pool.imap_unordered(double, [1])))
        pool.close()
        pool.join()
        """,
        )
        == "[0, 2, 4, 6, 8]\n[2]\n"
    )


def test_importing_shmpool_does_not_import_the_pool() -> None:
    code = "import shmpool, sys; sys.exit('multiprocessing.pool' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
