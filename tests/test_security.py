"""What others could get hold of: nothing has a name, nothing listens, nobody is given more than he needs.

Two ways of looking: at all processes while they run (``/proc``), and at every call that could make a name, from the
first instruction of each interpreter on (an audit hook), so that no name exists even for a moment.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import mmap
import multiprocessing.forkserver
import os
import re
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from executor_tasks import METHODS, PYTHON, SOON, environment, run
from support import wait_until

from shmpool import ObjectStore, ShmExecutor
from shmpool.memory.segment import Segment

MIB = 1 << 20

# ---------------------------------------------------------------- names

#: Run at the start of every interpreter. What a path is written to or made with, what is bound and connected to.
HOOK = """
    import os, sys

    EVENTS = {
        "socket.bind", "socket.connect", "socket.sendto", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.mkfifo",
        "os.mknod", "tempfile.mkstemp", "tempfile.mkdtemp", "_posixshmem.shm_open",
    }
    WRITING = os.O_CREAT | os.O_WRONLY | os.O_RDWR
    log = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_APPEND)

    def hook(event, args):
        if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & WRITING:
            told = event, str(args[0]), args[2]
        elif event in EVENTS:
            told = event, str(args[-1] if event.startswith("socket") else args[0]), 0
        else:
            return
        os.write(log, f"{told!r}\\n".encode())

    os.umask(0)
    sys.addaudithook(hook)
"""
PROGRAM = """
    import os, sys
    import numpy as np
    import shmpool
    from shmpool import ObjectStore, ShmExecutor

    def double(array):
        return array * 2, "text" * 100_000

    def leave():
        os._exit(1)

    if __name__ == "__main__":
        method, backend, folder = sys.argv[1:]
        store = ObjectStore(2 << 20, folder)
        with ShmExecutor(2, method, store=store, max_tasks_per_child=None) as executor:
            for _ in range(2):
                results = list(executor.map(double, [np.ones(200_000)] * 4))
            assert executor.submit(leave).exception()
            shared = shmpool.zeros(100_000, store=store)
            assert executor.submit(np.sum, shared).result() == 0
            refs = [executor.put(np.full(200_000, i)) for i in range(4)]
            assert store.stats().spilled > 0
        assert not os.listdir(folder)
"""

#: Of multiprocessing's own doing, in a folder that only this user can enter.
FORK_SERVER = re.compile(r".*/pymp-\w+(/listener-\w+)?")


@pytest.mark.parametrize("backend", ["memfd", "file"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_ever_has_a_name(tmp_path: Path, method: str, backend: str) -> None:
    if backend == "file" and method != "fork":
        pytest.skip("memory is made in the same way, however a process was started")
    site, spill = tmp_path / "site", tmp_path / "spill"
    site.mkdir()
    spill.mkdir()
    temporary = Path(
        tempfile.mkdtemp(prefix="t-")
    )  # short, since the path of a socket may have 107 characters
    (site / "sitecustomize.py").write_text(textwrap.dedent(HOOK))
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    (log := tmp_path / "log").touch()
    env = environment(AUDIT_LOG=str(log), TMPDIR=str(temporary), PYTHONDONTWRITEBYTECODE="1")
    env["PYTHONPATH"] = f"{site}{os.pathsep}{env['PYTHONPATH']}"
    env["SHMPOOL_MEMORY_BACKEND"] = backend
    done = run(*PYTHON, str(tmp_path / "program.py"), method, backend, str(spill), **env)
    temporary.rmdir()  # there is nothing in it
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    events = [ast.literal_eval(line) for line in log.read_text().splitlines()]
    assert any(path == str(spill) for _, path, _ in events), "the hook has seen nothing"
    unexpected = [event for event in events if not _is_harmless(*event, method, temporary)]
    assert not unexpected, unexpected


def _is_harmless(event: str, path: str, flags: int, method: str, temporary: Path) -> bool:
    if event == "open" and flags & os.O_TMPFILE == os.O_TMPFILE:
        return True  # a file that never has a name
    if method == "forkserver" and FORK_SERVER.fullmatch(path):
        return True
    # Python tries out which temporary folder it can write to.
    return method == "forkserver" and Path(path).parent == temporary and bool(flags & os.O_EXCL)


def tree() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def links_of(pid: int) -> Iterator[tuple[int, str]]:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            yield int(fd), os.readlink(f"/proc/{pid}/fd/{fd}")
        except FileNotFoundError:
            continue


def files_of(pid: int) -> dict[tuple[int, int], str]:
    """What a process has open, by what tells it from all else: all memory of ours has the same link."""
    found = {}
    for fd, link in links_of(pid):
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(f"/proc/{pid}/fd/{fd}")
            found[status.st_dev, status.st_ino] = link
    return found


def hold(array: np.ndarray, file: str) -> np.ndarray:
    Path(f"{file}-{os.getpid()}").touch()
    wait_until(lambda: os.path.exists(file), 60, "the file")
    return array + 1


def sockets_with_names() -> dict[str, str]:
    """Of the system: inodes of sockets that somebody could connect or send to, and what they are."""
    found = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        listens = int(fields[3], 16) & 0x10000
        if listens or len(fields) > 7:
            found[fields[6]] = line
    for kind in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6", "netlink", "packet"):
        column = 8 if kind == "packet" else 9
        path = Path("/proc/net", kind)
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            found[line.split()[column]] = f"{kind}: {line}"
    return found


@pytest.mark.parametrize("method", METHODS)
def test_no_socket_has_a_name_or_listens_and_no_memory_has_a_name(
    method: str, tmp_path: Path
) -> None:
    before = {process.pid for process in tree()} - {os.getpid()}
    mine = files_of(os.getpid())
    names = set(os.listdir("/dev/shm"))
    store = ObjectStore(2 * MIB, str(tmp_path / "spill"))
    (tmp_path / "spill").mkdir()
    with ShmExecutor(2, method, store=store) as executor:
        held = [executor.put(np.full(200_000, i)) for i in range(4)]
        futures = [executor.submit(hold, ref, str(tmp_path / "go")) for ref in held]
        try:
            wait_until(lambda: len(list(tmp_path.glob("go-*"))) == 2, 60, "two tasks to run")
            named = sockets_with_names()
            looked_at: Counter[str] = Counter()
            # Other servers that this test process happens to have are not this executor's, and multiprocessing's own
            # fork server listens, in a folder that only this user can enter.
            others = {
                *before,
                getattr(multiprocessing.forkserver._forkserver, "_forkserver_pid", None),
            }
            for pid in {process.pid for process in tree()} - others:
                for number, link in files_of(pid).items():
                    if number in mine:
                        continue
                    if link.startswith("socket:"):
                        assert link[8:-1] not in named, named[link[8:-1]]
                        looked_at["sockets"] += 1
                    if "shmpool" in link or str(tmp_path) in link:
                        assert link.endswith(" (deleted)"), link
                        looked_at["memory"] += 1
            # Of each worker two sockets at either end; the memory and the spill file here, one or both there.
            assert looked_at["sockets"] >= 8 and looked_at["memory"] >= 4, looked_at
            assert not os.listdir(tmp_path / "spill")
            ours = [
                n
                for n in set(os.listdir("/dev/shm")) - names
                if re.search(rf"\b{os.getpid()}\b", n)
            ]
            assert not ours, ours
        finally:
            (tmp_path / "go").touch()  # else the workers wait, although the test has failed
        for i, future in enumerate(futures):
            assert (future.result(SOON) == i + 1).all()
    del held, futures, future


# ---------------------------------------------------------------- files


@pytest.fixture
def no_umask() -> Iterator[None]:
    umask = os.umask(0)
    yield
    os.umask(umask)


@pytest.mark.parametrize("fallback", [False, True], ids=["O_TMPFILE", "a name for an instant"])
def test_files_have_no_name_and_are_the_users_alone(
    tmp_path: Path, no_umask: None, monkeypatch: pytest.MonkeyPatch, fallback: bool
) -> None:
    if fallback:
        monkeypatch.delattr(os, "O_TMPFILE")
    segment = Segment.create(MIB, "file", str(tmp_path))
    status = os.fstat(segment.fd)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_nlink == 0 and not os.listdir(tmp_path)
    assert not os.get_inheritable(segment.fd)


def test_spill_files_of_a_store_and_of_its_workers_are_the_users_alone(
    tmp_path: Path, no_umask: None
) -> None:
    store = ObjectStore(MIB, str(tmp_path))
    with ShmExecutor(1, "fork", store=store) as executor:
        held = [executor.put(np.ones(100_000)) for _ in range(3)]
        results = [executor.submit(np.negative, ref).result(SOON) for ref in held]
        seen = 0
        for process in tree():
            for fd, link in links_of(process.pid):
                if link.startswith(str(tmp_path)):
                    status = os.stat(f"/proc/{process.pid}/fd/{fd}")
                    assert stat.S_IMODE(status.st_mode) == 0o600 and status.st_nlink == 0
                    seen += 1
        assert seen >= 2
        del held, results


# ---------------------------------------------------------------- descriptors


def try_to_write(array: np.ndarray) -> list[str]:
    """In a worker: what can be done to the arenas that it was handed, by their descriptors."""
    done = []
    received = 0
    for fd, link in links_of(os.getpid()):
        if "shmpool" not in link or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
            continue
        received += 1
        attempts = {
            "mapped": lambda fd=fd: mmap.mmap(
                fd, mmap.PAGESIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE
            ),
            "written to": lambda fd=fd: os.pwrite(fd, b"!", 0),
            "shrunk": lambda fd=fd: os.ftruncate(fd, 0),
            "punched": lambda fd=fd: os.posix_fallocate(fd, 0, mmap.PAGESIZE),
        }
        for how, attempt in attempts.items():
            try:
                attempt()
            except OSError:
                continue
            done.append(how)
    assert received, "it was handed none"
    return done


def writable_descriptors() -> int:
    return sum(
        "shmpool" in link and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        for fd, link in links_of(os.getpid())
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_is_handed_descriptors_that_it_cannot_write_to(method: str) -> None:
    """By accident, that is: whoever runs as the same user may open them anew through /proc/self/fd."""
    # What this process has of other stores, a forked worker has as well, to look at the views that there may be.
    inherited = writable_descriptors() if method == "fork" else 0
    with ShmExecutor(1, method, store=ObjectStore()) as executor:
        assert executor.submit(writable_descriptors).result(SOON) == inherited
        assert executor.submit(try_to_write, np.ones(100_000)).result(SOON) == []


def test_nor_can_the_parent_write_to_what_a_worker_hands_over() -> None:
    before = writable_descriptors()
    with ShmExecutor(1, "fork", store=ObjectStore()) as executor:
        result = executor.submit(np.ones, 100_000).result(SOON)
        assert try_to_write(result) == []
        assert writable_descriptors() == before
        del result


def inherited(options: dict[str, bool]) -> str:
    command = ["ls", "-l", "/proc/self/fd"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, **options)
    return done.stdout


@pytest.mark.parametrize("method", METHODS)
def test_programs_that_a_task_or_the_caller_starts_inherit_nothing(method: str) -> None:
    with ShmExecutor(1, method) as executor:
        before = inherited({"close_fds": False})
        held = executor.submit(np.negative, np.ones(100_000)).result(SOON)
        everywhere = executor.submit(inherited, {"close_fds": False}).result(SOON)
        assert "shmpool" not in everywhere
        assert "socket:" not in everywhere or method == "forkserver", everywhere
        here = inherited({"close_fds": False})
        assert "shmpool" not in here
        assert here.count("socket:") <= before.count("socket:")
        del held


#: As another user: tries all that a process of ours has open.
INTRUDER = """
    import os, sys
    os.setgroups([])
    os.setgid(54321)
    os.setuid(54321)
    got = []
    for pid in sys.argv[1:]:
        for what in (f"/proc/{pid}/fd", f"/proc/{pid}/map_files"):
            try:
                got += [os.path.join(what, name) for name in os.listdir(what)]
            except OSError:
                pass
        for fd in range(100):
            try:
                os.close(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY))
                got.append(f"{pid}: {fd}")
            except OSError:
                pass
    print(got)
"""


def test_another_user_gets_at_nothing(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can try as another user")
    with ShmExecutor(1, "fork") as executor:
        held = executor.submit(np.negative, np.ones(100_000)).result(SOON)
        pids = [str(process.pid) for process in tree()]
        done = run(sys.executable, "-c", textwrap.dedent(INTRUDER), *pids)
        assert (done.stdout.strip(), done.stderr) == ("[]", "")
        del held
