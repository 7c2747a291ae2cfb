"""``os.fork()`` in a program that has an executor, by whomever: the child is a program of its own.

It reads what it has inherited, makes executors of its own, and however it ends, its parent and the parent's workers do
not notice. All of it runs in programs of their own, that are started such that nothing else is in the way.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from executor_tasks import METHODS, SOON, environment, run
from support import is_gone, started, wait_until

#: A fork of a process with threads is what this is about, so the warning says nothing.
PYTHON = (sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning")

HEAD = """
    import gc, multiprocessing, os, signal, sys, threading, time
    from pathlib import Path
    import numpy as np
    import shmpool
    from shmpool import ShmExecutor

    def wait_for(condition, what):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.01)

    def double(array):
        return array * 2

    def wait_for_file(file, value):
        Path(f"{file}-{os.getpid()}").touch()
        wait_for(lambda: os.path.exists(file), "the file")
        return value

    def fork(work, end=os._exit):
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            end(code)

    def end_of(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    method, folder = sys.argv[1:]
    go = os.path.join(folder, "go")
"""


def run_program(tmp_path: Path, method: str, body: str) -> str:
    """Run it; it must end well and say nothing on stderr."""
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(HEAD) + textwrap.dedent(body))
    folder = tmp_path / "files"
    folder.mkdir()
    done = run(*PYTHON, str(script), method, str(folder), SHMPOOL_VERIFY="1")
    assert (done.returncode, done.stderr) == (0, ""), f"{done.stdout}{done.stderr}"
    return done.stdout


ENDS = {
    "os._exit": "os._exit",
    "sys.exit": "sys.exit",
    "killed": "lambda code: os.kill(os.getpid(), signal.SIGKILL if code == 0 else signal.SIGTERM)",
}


@pytest.mark.parametrize(
    ("method", "end"),
    [*((method, "os._exit") for method in METHODS), ("fork", "sys.exit"), ("fork", "killed")],
)
def test_a_child_that_ends_harms_nothing_of_its_parents(tmp_path, method, end):
    """While tasks run, while results are held, from the main thread and from another one."""
    body = """
    def child():
        assert (mine == 3).all() and (result == 2).all() and (ref.get() == 5).all()
        result[:] = 9  # its own
        for use in (lambda: executor.submit(abs, -1), lambda: list(executor.map(abs, [1]))):
            try:
                use()
            except RuntimeError as error:
                assert "fork" in str(error), error
            else:
                raise AssertionError("an inherited executor took a task")
        executor.shutdown()
        gc.collect()

    if __name__ == "__main__":
        executor = ShmExecutor(2, method)
        running = [executor.submit(wait_for_file, go, i) for i in range(6)]
        mine = np.full(100_000, 3.0)
        wait_for(lambda: len(os.listdir(folder)) == 2, "tasks to run")
        workers = set(executor._processes)
        other = ShmExecutor(1, method)
        result, ref = other.submit(double, np.ones(100_000)).result(), other.put(np.full(100_000, 5.0))

        ended = []
        def fork_one():
            ended.append(end_of(fork(child, END)))
        fork_one()
        thread = threading.Thread(target=fork_one)
        thread.start()
        thread.join()
        assert ended == [CODE, CODE], ended

        assert (result == 2).all() and (ref.get() == 5).all()
        assert set(executor._processes) == workers
        Path(go).touch()
        assert [future.result(60) for future in running] == list(range(6))
        assert (executor.submit(double, result).result(60) == 4).all()
        executor.shutdown()
        other.shutdown()
        assert executor.stats().workers_died == 0
    """
    code = "-signal.SIGKILL" if end == "killed" else "0"
    run_program(tmp_path, method, body.replace("END", ENDS[end]).replace("CODE", code))


@pytest.mark.parametrize("method", METHODS)
def test_a_child_has_an_executor_of_its_own(tmp_path, method):
    body = """
    def child():
        # The fork server is its parent's child, and multiprocessing cannot use it from here.
        method = "spawn" if sys.argv[1] == "forkserver" else sys.argv[1]
        with ShmExecutor(2, method) as own:
            assert (own.submit(double, result).result(60) == 4).all()
            mine = own.submit(double, np.full(100_000, 4.0)).result(60)
            assert list(own.map(abs, range(-50, 0))) == list(range(50, 0, -1))
        assert (mine == 8).all()
        assert (shmpool.put(np.zeros(100_000)).get() == 0).all()
        again = shmpool.get_reusable_executor(1, context=method)
        assert again is not reusable and again.submit(abs, -3).result(60) == 3

    if __name__ == "__main__":
        reusable = shmpool.get_reusable_executor(1, context=method)
        with ShmExecutor(1, method) as executor:
            result = executor.submit(double, np.ones(100_000)).result()
            assert reusable.submit(abs, -1).result() == 1
            running = executor.submit(wait_for_file, go, "done")
            assert end_of(fork(child, sys.exit)) == 0
            Path(go).touch()
            assert running.result(60) == "done"
            assert (result == 2).all()
        assert reusable.submit(abs, -1).result(60) == 1
    """
    run_program(tmp_path, method, body)


def test_forks_at_any_moment_from_many_threads(tmp_path):
    """Whatever lock another thread holds at that moment."""
    body = """
    def child():
        assert (result == 2).all()
        with ShmExecutor(1, "fork") as own:
            assert (own.submit(double, result).result(60) == 4).all()

    def submit():
        while not stop.is_set():
            arrays = list(executor.map(double, [np.ones(20_000)] * 5))
            assert all((array == 2).all() for array in arrays)

    if __name__ == "__main__":
        executor = ShmExecutor(2, "fork")
        result = executor.submit(double, np.ones(100_000)).result()
        stop = threading.Event()
        threads = [threading.Thread(target=submit) for _ in range(3)]
        for thread in threads:
            thread.start()
        codes = [end_of(fork(child)) for _ in range(15)]
        stop.set()
        for thread in threads:
            thread.join()
        executor.shutdown()
        assert codes == [0] * 15, codes
    """
    run_program(tmp_path, "fork", body)


LONG_CHILD = """
    if __name__ == "__main__":
        executor = ShmExecutor(2, method)
        futures = [executor.submit(wait_for_file, go, i) for i in range(2)]
        wait_for(lambda: len(os.listdir(folder)) == 2, "tasks to run")
        pid = fork(lambda: time.sleep(1000))
        print(pid, *executor._processes, flush=True)
        time.sleep(1000)
"""


@pytest.mark.parametrize("method", METHODS)
def test_a_child_does_not_keep_the_workers_of_its_parent_alive(tmp_path, method):
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(HEAD) + textwrap.dedent(LONG_CHILD))
    folder = tmp_path / "files"
    folder.mkdir()
    command = [*PYTHON, str(script), method, str(folder)]
    with started(*command, stdout=subprocess.PIPE, env=environment()) as parent:
        assert parent.stdout is not None
        child, *workers = map(int, parent.stdout.readline().split())
        assert len(workers) == 2
        parent.kill()
        wait_until(lambda: all(map(is_gone, workers)), 60, "the workers to be gone")
        assert not is_gone(child), "it was none of theirs"
    wait_until(lambda: is_gone(child), SOON, "the child to be gone")


TASKS = """
    def fork_and(end):
        \"\"\"A task that forks; the child has an executor of its own, and ends in some way.\"\"\"
        array = np.ones(100_000)
        pid = os.fork()
        if pid:
            return os.getpid(), end_of(pid)
        with ShmExecutor(1, "fork") as own:
            assert (own.submit(double, array).result(60) == 2).all()
        if end == "comes back":
            return "from the child"
        if end == "raises":
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            raise OSError("in the child")
        if end == "exits":
            sys.exit(7)
        os._exit(7)
"""


@pytest.mark.parametrize(
    ("end", "code"), [("comes back", 0), ("raises", 1), ("exits", 7), ("is gone", 7)]
)
@pytest.mark.parametrize("method", METHODS)
def test_a_child_that_a_task_forks_ends_on_its_own(tmp_path, method, end, code):
    """Also one that comes back from the task, which would else go on as a second worker."""
    body = f"""
    if __name__ == "__main__":
        with ShmExecutor(1, method) as executor:
            for _ in range(2):
                pid, code = executor.submit(fork_and, {end!r}).result(60)
                assert (pid, code) == (executor.submit(os.getpid).result(60), {code}), (pid, code)
            assert (executor.submit(double, np.ones(100_000)).result(60) == 2).all()
            stats = executor.stats()
        assert (stats.workers_died, stats.tasks_failed) == (0, 0), stats
    """
    run_program(tmp_path, method, TASKS + body)


PROCESSES = """
    def in_a_process(array, start, daemon):
        context = multiprocessing.get_context(start)
        queue = context.SimpleQueue()
        process = context.Process(target=put_sum, args=(queue, array), daemon=daemon)
        process.start()
        total = queue.get()
        process.join()
        queue.close()
        return total, process.exitcode

    def put_sum(queue, array):
        queue.put(float(array.sum()))

    def leave_a_process(folder, daemon):
        context = multiprocessing.get_context("fork")
        context.Process(target=linger, args=(folder,), daemon=daemon).start()

    def linger(folder):
        Path(folder, f"lingers-{os.getpid()}").touch()
        wait_for(lambda: os.path.exists(os.path.join(folder, "go")), "the file")
        Path(folder, "ended").touch()
"""


@pytest.mark.parametrize("daemon", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_task_may_start_processes(tmp_path, method, daemon):
    start = "spawn" if method == "spawn" else "fork"
    body = f"""
    if __name__ == "__main__":
        with ShmExecutor(1, method) as executor:
            for _ in range(2):
                task = executor.submit(in_a_process, np.ones(100_000), {start!r}, {daemon})
                assert task.result(60) == (100_000, 0)
            assert executor.stats().workers_died == 0
    """
    run_program(tmp_path, method, PROCESSES + body)


@pytest.mark.parametrize("daemon", [False, True])
def test_a_process_that_a_task_leaves_behind_ends_with_the_worker(tmp_path, daemon):
    """As multiprocessing has it: a daemon is ended, another one waited for. Neither takes results along."""
    body = f"""
    def go_later():
        time.sleep(0.2)
        if not {daemon}:
            Path(go).touch()

    if __name__ == "__main__":
        executor = ShmExecutor(1, method)
        executor.submit(leave_a_process, folder, {daemon}).result(60)
        result = executor.submit(double, np.ones(100_000)).result(60)
        wait_for(lambda: len(os.listdir(folder)) == 1, "the process to run")
        thread = threading.Thread(target=go_later)
        thread.start()
        executor.shutdown()
        thread.join()
        assert (result == 2).all()
        print(sorted(name.split("-")[0] for name in os.listdir(folder)))
    """
    out = run_program(tmp_path, "fork", PROCESSES + body)
    assert out.strip() == str(["lingers"] if daemon else ["ended", "go", "lingers"])
