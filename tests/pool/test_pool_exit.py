"""Pools at the end of a program: they go on while other threads do, and for exit handlers, as the standard library's.

What a Python allows so late differs from version to version (3.12.1 starts no threads or processes any more once the
main thread has ended), so each program runs with the standard library's pool first, and has to say the same with ours.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from threading import current_thread
from types import SimpleNamespace

import pytest
from executor_tasks import PYTHON, SOON, run, write_script

from shmpool.interrupts import JoinableThread
from shmpool.pool import Pool, callbacks, imap
from shmpool.pool.window import MOST_PER_WORKER

START = """
import {module} as mp
import atexit, threading, time

{touch}

def square(x):
    return x * x

def slow(x):
    time.sleep(0.1)
    return x

def say(*words):
    print(*words, flush=True)

def wait_for_the_main_thread():
    threading.main_thread().join()
    time.sleep(0.1)

"""

REPLACED = "with workers that are replaced"
PROGRAMS = {
    "results come one by one": """
        def work():
            with mp.Pool(2) as pool:
                begun.set()
                for x in pool.imap(slow, range(6)):
                    say(x)
                say(pool.map(square, range(3)))

        begun = threading.Event()
        if __name__ == "__main__":
            threading.Thread(target=work).start()
            begun.wait()
    """,
    "asked for when the main thread has ended": """
        def work():
            with mp.Pool(2) as pool:
                begun.set()
                wait_for_the_main_thread()
                say(pool.map(square, range(3)), pool.apply(square, (3,)))
                say(list(pool.imap(square, iter(range(200)), 3)) == [x * x for x in range(200)])
                say(sorted(pool.imap_unordered(square, (x for x in range(3)))))
                called = []
                results = [pool.apply_async(square, (x,), callback=called.append) for x in range(3)]
                results.append(pool.map_async(square, [5], callback=called.append))
                for result in results:
                    result.wait(60)
                pool.apply_async(square, "x", error_callback=called.append).wait(60)
                say(sorted(map(str, called[:-1])), type(called[-1]).__name__)

        begun = threading.Event()
        if __name__ == "__main__":
            threading.Thread(target=work).start()
            begun.wait()
    """,
    REPLACED: """
        def work():
            with mp.Pool(2, maxtasksperchild=1) as pool:
                begun.set()
                wait_for_the_main_thread()
                say(pool.map(square, range(6), 1))

        begun = threading.Event()
        if __name__ == "__main__":
            threading.Thread(target=work).start()
            begun.wait()
    """,
    "made when the main thread has ended": """
        def work():
            wait_for_the_main_thread()
            with mp.Pool(2) as pool:
                say(pool.map(square, range(3)), list(pool.imap(square, iter([4]))))
            pool = mp.Pool(1)
            say(pool.map(square, range(3)))  # and is left as it is

        if __name__ == "__main__":
            threading.Thread(target=work).start()
    """,
    "made by an exit handler": """
        def late():
            with mp.Pool(2) as pool:
                say("late", pool.map(square, range(3)))

        if __name__ == "__main__":
            atexit.register(late)
    """,
    "used by an exit handler": """
        def late():
            say("late", pool.map(square, range(3)), list(pool.imap(square, iter([4]))))

        if __name__ == "__main__":
            pool = mp.Pool(2)
            atexit.register(late)
    """,
    "left with tasks": """
        def work():
            say(pool.apply(square, (3,)))
            wait_for_the_main_thread()
            say(pool.apply(square, (4,)))
            pool.map_async(time.sleep, [3600] * 5, 1, callback=say)

        if __name__ == "__main__":
            pool = mp.Pool(2)
            threading.Thread(target=work).start()
    """,
    "in a child": """
        def child():
            pool = mp.Pool(1)
            say(pool.apply(square, (3,)))
            pool.map_async(time.sleep, [3600] * 5, 1, callback=say)
            pools.append(pool)

        pools = []
        if __name__ == "__main__":
            process = mp.Process(target=child)
            process.start()
            process.join()
            say(process.exitcode)
    """,
}

#: A pool that was not closed warns, in development mode and here.
OPTIONS = ("-W", "ignore:unclosed running multiprocessing pool:ResourceWarning")


def ended(folder: Path, name: str, *options: str, touch: str = "") -> tuple[int, str, list[str]]:
    """Exit code, output, and the last line of each traceback."""
    text = START.format(module="multiprocessing", touch=touch)
    body = "\n".join(line[8:] for line in PROGRAMS[name].splitlines())
    script = write_script(folder, text + body)
    done = run(*PYTHON, *OPTIONS, *options, str(script))
    said = [line for line in done.stderr.splitlines() if line[:1] not in ("", " ")]
    return done.returncode, done.stdout, [line for line in said if "Error" in line]


TOUCHES = {
    "the first": "",
    "not the first": 'if __name__ == "__main__":\n    with mp.Pool(1) as first: first.apply(square_root, (4,))',
}
TOUCH = "from math import sqrt as square_root\n"


@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_pools_outlive_the_main_thread_as_the_standard_librarys(
    tmp_path: Path, name: str, touch: str
) -> None:
    """Whether it is then that shmpool is loaded, or before."""
    code = TOUCH + TOUCHES[touch]
    if name == REPLACED and sys.version_info[:2] == (3, 12):
        standard = 0, "[0, 1, 4, 9, 16, 25]\n", list[str]()  # that of the standard library hangs
    else:
        standard = ended(tmp_path, name, touch=code)
    assert ended(tmp_path, name, "-m", "shmpool", "run", touch=code) == standard
    if sys.version_info[:2] != (3, 12):
        assert standard[2] == [] and standard[1]


def test_where_no_thread_can_be_started_any_more_all_is_done_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So it is in some Pythons when the main thread has ended: callbacks are called where a result arrives."""

    def fail(_: object) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    ended = SimpleNamespace(is_alive=lambda: False)
    seen: list[tuple[int, threading.Thread]] = []
    with Pool(1, context="fork") as pool:
        monkeypatch.setattr(JoinableThread, "start", fail)
        monkeypatch.setattr(callbacks, "main_thread", lambda: ended)
        monkeypatch.setattr(
            imap, "threading", SimpleNamespace(**vars(threading) | {"main_thread": lambda: ended})
        )
        results = [
            pool.apply_async(abs, (-i,), callback=lambda x: seen.append((x, current_thread())))
            for i in range(3)
        ]
        assert [result.get(SOON) for result in results] == [0, 1, 2]
        assert [x for x, _ in seen] == [0, 1, 2]
        assert not any(thread.name == "shmpool-callbacks" for _, thread in seen)
        assert len(pool._cache) == 0
        many = 3 * MOST_PER_WORKER
        assert list(pool.imap(abs, iter(range(many)))) == list(range(many))
    pool.join()


EXECUTOR = """
import concurrent.futures.process, multiprocessing.util, threading, time

def work():
    threading.main_thread().join()
    time.sleep(0.1)
    import shmpool
    executor = {executor}(1)
    try:
        executor.submit(abs, -1)
    except RuntimeError as error:
        print(error)

if __name__ == "__main__":
    {before}
    threading.Thread(target=work).start()
"""


@pytest.mark.parametrize("before", ["pass", "import shmpool; shmpool.ShmExecutor"])
def test_an_executor_that_is_made_too_late_says_so_in_the_standard_librarys_words(
    tmp_path: Path, before: str
) -> None:
    said = []
    for executor in ("concurrent.futures.process.ProcessPoolExecutor", "shmpool.ShmExecutor"):
        script = write_script(tmp_path, EXECUTOR.format(executor=executor, before=before))
        done = run(*PYTHON, str(script))
        assert (done.returncode, done.stderr) == (0, "")
        said.append(done.stdout)
    assert said == ["cannot schedule new futures after interpreter shutdown\n"] * 2


FAILED = """
import sys
import shmpool

sys.modules["numpy"] = None
with shmpool.install():
    import multiprocessing
    try:
        multiprocessing.Pool(1)
    except ImportError as error:
        print(type(error).__name__)
"""


def test_a_pool_that_cannot_be_loaded_says_it_once(tmp_path: Path) -> None:
    done = run(*PYTHON, str(write_script(tmp_path, FAILED)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "ModuleNotFoundError\n", "")


INTERRUPTED = """
import sys
import shmpool
from shmpool.executor import ShmExecutor

start = ShmExecutor._start_all_workers

def start_and_ctrl_c(executor):
    start(executor)
    raise KeyboardInterrupt

if __name__ == "__main__":
    ShmExecutor._start_all_workers = start_and_ctrl_c
    shmpool.Pool(2, context=sys.argv[1])
"""


def test_ctrl_c_just_after_the_workers_have_started_ends_the_program(
    start_method: str, tmp_path: Path
) -> None:
    """What there is of the pool then are its workers, and nobody else knows of them."""
    done = run(*PYTHON, str(write_script(tmp_path, INTERRUPTED)), start_method)
    assert done.stderr.strip().endswith("KeyboardInterrupt"), done.stderr
    assert done.returncode == -signal.SIGINT
