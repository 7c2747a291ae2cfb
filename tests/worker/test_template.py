"""The process that forks workers to replace others, and the workers that it forks."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import resource
import signal
import socket
from pathlib import Path

import pytest
from executor_tasks import SOON, run_script
from support import wait_until

from shmpool import Pool, ShmExecutor, WorkerDiedError


def leave() -> None:
    os._exit(3)


def replace_the_worker(executor: ShmExecutor) -> None:
    """Have the next worker be one of the template's."""
    assert isinstance(executor.submit(leave).exception(SOON), WorkerDiedError)


def test_a_worker_that_was_forked_on_request_looks_like_a_process_of_multiprocessing() -> None:
    with ShmExecutor(1, "fork") as executor:
        replace_the_worker(executor)
        pid = executor.submit(os.getpid).result(SOON)
        process = executor._processes[pid]
        assert process.pid == process.ident == pid
        assert process.is_alive() and process.exitcode is None
        assert f"pid={pid} started" in repr(process)
        process.terminate()
        process.join(SOON)
        assert not process.is_alive()
        assert repr(process).endswith(f"pid={pid} stopped exitcode={-signal.SIGTERM}>")
        process.kill()  # another process may have its number by now
        another = executor.submit(os.getpid).result(SOON)
        running = executor._processes[another]
        running.join(0)
        assert running.is_alive()
        running.kill()
        running.join()
        assert running.exitcode == -signal.SIGKILL
    process.close()
    process.close()
    process.join()
    assert process.exitcode == -signal.SIGTERM


def die_and_leave_a_child_behind(file: str) -> None:
    pid = os.fork()
    if not pid:
        while True:
            signal.pause()
    Path(file).write_text(str(pid))
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_end_of_a_worker_is_noticed_although_its_template_is_dead_and_its_child_lives(
    tmp_path: Path,
) -> None:
    file = tmp_path / "child"
    with ShmExecutor(1, "fork") as executor:
        replace_the_worker(executor)
        worker = executor.submit(os.getpid).result(SOON)
        template = executor._launcher._template
        assert template is not None
        template._process.kill()
        template._process.join()
        try:
            future = executor.submit(die_and_leave_a_child_behind, str(file))
            assert isinstance(future.exception(SOON), WorkerDiedError)
            assert executor.submit(os.getpid).result(SOON) != worker
        finally:
            os.kill(int(file.read_text()), signal.SIGKILL)


def test_a_process_that_was_closed_while_it_ran_is_not_waited_for() -> None:
    with ShmExecutor(1, "fork") as executor:
        replace_the_worker(executor)
        process = executor._processes[executor.submit(os.getpid).result(SOON)]
        process.close()
        process.join()
        assert process.exitcode is None
        assert executor.submit(abs, -1).result(SOON) == 1


def ignores_interrupts(pid: int) -> bool:
    """The last that a template does before it waits for requests."""
    status = Path(f"/proc/{pid}/status").read_text()
    (ignored,) = re.findall(r"^SigIgn:\s*(\w+)$", status, re.MULTILINE)
    return bool(int(ignored, 16) & 1 << signal.SIGINT - 1)


def test_a_template_without_descriptors_is_an_error_and_workers_come_later() -> None:
    with ShmExecutor(1, "fork") as executor:
        executor.submit(abs, -1).result(SOON)
        template = executor._launcher._template._process.pid
        wait_until(lambda: ignores_interrupts(template), 60, "the template to be ready")
        # A request brings four, and then nothing is left to fork with.
        limits = resource.prlimit(template, resource.RLIMIT_NOFILE)
        taken = set(map(int, os.listdir(f"/proc/{template}/fd")))
        fourth = [fd for fd in range(len(taken) + 4) if fd not in taken][3]
        resource.prlimit(template, resource.RLIMIT_NOFILE, (fourth + 1, limits[1]))
        replace_the_worker(executor)
        error = executor.submit(abs, -1).exception(SOON)
        assert isinstance(error, OSError) and error.errno == errno.EMFILE, repr(error)
        assert "could not fork a worker" in str(error)
        resource.prlimit(template, resource.RLIMIT_NOFILE, limits)
        assert executor.submit(abs, -1).result(SOON) == 1
        assert executor._launcher._template._process.pid == template


KILLED_AGAIN_AND_AGAIN = """
    import multiprocessing, os, signal
    from shmpool import ShmExecutor

    def die():
        if multiprocessing.current_process().name == "shmpool-template":
            os.kill(os.getpid(), signal.SIGKILL)

    def leave():
        os._exit(3)

    if __name__ == "__main__":
        os.register_at_fork(before=die)
        with ShmExecutor(1, "fork") as executor:
            executor.submit(abs, -1).result()
            print(type(executor.submit(leave).exception(60)).__name__)
            try:
                raise executor.submit(abs, -1).exception(60)
            except Exception as error:
                print(type(error).__name__, error)
"""


def test_a_template_that_is_killed_whenever_it_forks_breaks_the_pool(tmp_path: Path) -> None:
    said = run_script(tmp_path, KILLED_AGAIN_AND_AGAIN).splitlines()
    assert said[0] == "WorkerDiedError"
    assert said[1].startswith("BrokenPoolError no worker could be started: ChannelSpentError")
    assert "is killed again and again" in said[1]


def who(_: object = None) -> tuple[str, tuple[int, ...], int, str]:
    process, parent = multiprocessing.current_process(), multiprocessing.parent_process()
    assert parent is not None and parent.is_alive()
    return process.name, process._identity, parent.pid, parent.name


@pytest.mark.parametrize("in_a_child", [False, True])
def test_workers_are_numbered_and_named_as_if_their_parent_had_forked_all_of_them(
    in_a_child: bool,
) -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def look() -> None:
        own = multiprocessing.current_process()
        before = context.Process()._identity
        with Pool(2, maxtasksperchild=1, context="fork") as pool:
            seen = pool.map(who, range(6), 1)
            wait_until(lambda: len(pool._pool) == 2, SOON, "the last to be replaced")
            names = {process.name for process in pool._pool}
        pool.join()
        with ShmExecutor(1, "fork") as executor:
            replace_the_worker(executor)
            seen.append(executor.submit(who).result(SOON))
        sender.send((own.name, os.getpid(), own._identity, before[-1], seen, names))

    if in_a_child:
        child = context.Process(target=look)
        child.start()
    else:
        look()
    name, pid, own, before, seen, names = receiver.recv()
    if in_a_child:
        child.join()
    receiver.close()
    sender.close()
    assert len(own) == in_a_child
    identities = [identity for _, identity, _, _ in seen]
    # The first two, those that replaced them, and perhaps one of the last two; an executor's second.
    assert len(set(identities[:6])) == 6
    assert set(identities[:6]) <= {(*own, before + number) for number in range(1, 9)}
    assert len(identities[6]) == len(own) + 1 and identities[6] > max(identities[:6])
    assert {(pid, name)} == {one[2:] for one in seen}
    for shown, identity, _, _ in seen[:6]:
        assert shown == "ForkPoolWorker-" + ":".join(map(str, identity))
    assert all(shown.startswith("ForkPoolWorker-") for shown in names)
    shown, identity, _, _ = seen[6]
    assert shown == "ForkProcess-" + ":".join(map(str, identity))


NOBODY_KNOWS = """
    import multiprocessing, os, signal, sys
    from shmpool import Pool, ShmExecutor, WorkerDiedError

    def leave():
        os._exit(3)

    def handler(_):
        found = signal.getsignal(signal.SIGCHLD)
        return getattr(found, "__name__", str(found))

    def reap(*_):
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass

    def main(method, action):
        signal.signal(signal.SIGCHLD, action)
        with Pool(2, context=method) as pool:
            print(set(pool.map(handler, range(4), 1)))
            for _ in range(2):
                try:
                    pool.apply_async(leave).get(60)
                except WorkerDiedError:
                    print("died")
            print(set(pool.map_async(handler, range(4), 1).get(60)))
        pool.join()
        print(any(process.is_alive() for process in pool._pool))
        pool = Pool(2, maxtasksperchild=1, context=method)
        print(set(pool.map_async(handler, range(6), 1).get(60)))
        pool.close()
        pool.join()
        with ShmExecutor(2, method, max_tasks_per_child=1) as executor:
            print(set(executor.map(handler, range(4))))
        print(multiprocessing.active_children())

    if __name__ == "__main__":
        main(sys.argv[1], {"ignored": signal.SIG_IGN, "reaps": reap}[sys.argv[2]])
"""


@pytest.mark.parametrize("action", ["ignored", "reaps"])
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn", "loky"])
def test_workers_whose_exit_codes_are_lost_are_replaced_and_end_all_the_same(
    tmp_path: Path, method: str, action: str
) -> None:
    """Some supervisors have SIGCHLD ignored; a handler may wait for whatever child has ended."""
    seen = {"ignored": "1", "reaps": "reap"}[action] if method == "fork" else None
    lines = run_script(tmp_path, NOBODY_KNOWS, method, action).splitlines()
    shown = {lines.pop(number) for number in (6, 5, 3, 0)}
    assert lines == ["died", "died", "False", "[]"]
    if seen is not None:
        assert shown == {str({seen})}


def test_a_template_that_cannot_be_asked_leaves_no_descriptors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then there is no worker for now; the next event tries again."""
    with ShmExecutor(1, "fork") as executor:
        replace_the_worker(executor)
        assert executor.submit(abs, -1).result(SOON) == 1
        send = socket.send_fds
        refused = []

        def send_fds(*args: object) -> int:
            if not refused:
                refused.append(args)
                raise OSError(errno.ETOOMANYREFS, "too many descriptors are under way")
            return send(*args)

        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(socket, "send_fds", send_fds)
        replace_the_worker(executor)

        def works() -> bool:
            future = executor.submit(abs, -2)
            return future.exception(SOON) is None and future.result() == 2

        wait_until(works, 60, "another worker")
        assert len(refused) == 1
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_template_tells_how_a_worker_ended_without_descriptors_of_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def not_here(_pid: int, _flags: int = 0) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "pidfd_open", not_here)  # Linux before 5.3
    with ShmExecutor(1, "fork") as executor:
        replace_the_worker(executor)
        process = executor._processes[executor.submit(os.getpid).result(SOON)]
        replace_the_worker(executor)
        assert process.exitcode == 3
