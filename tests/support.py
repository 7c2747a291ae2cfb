"""What several test modules need: waiting for something, and what this process holds at a moment.

Rules: this is the only place in the tests that sleeps in order to wait, and all time-outs are multiples of one unit. A
slow machine sets ``SHMPOOL_TEST_TIMEUNIT=3`` and every limit is three times as long.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import pytest  # workers import this

T = TypeVar("T")

#: What there is on Linux.
START_METHODS = ("fork", "forkserver", "spawn", "loky")

#: Seconds that "1" means in the time-outs of the tests.
TIMEUNIT = float(os.environ.get("SHMPOOL_TEST_TIMEUNIT") or 1)


def wait_until(predicate: Callable[[], T], timeout: float, what: str | Callable[[], str]) -> T:
    """Return the first true value of ``predicate()``; fail with ``what`` was waited for after ``timeout`` units."""
    seconds = timeout * TIMEUNIT
    deadline = time.monotonic() + seconds
    pause = 0.001
    while not (value := predicate()):
        if time.monotonic() >= deadline:
            text = what if isinstance(what, str) else what()
            raise AssertionError(f"waited {seconds:g} s in vain for {text}")
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return value


def fork_while_closing(close: Callable[[], object], patch: pytest.MonkeyPatch) -> list[int]:
    """Fork as another thread may while this one closes: after each ``os.close`` of ``close()``, which a child repeats.

    Returns the children's exit codes: 1 is that of one to which closing again was an error.
    """
    codes = []
    real = os.close

    def closing(fd: int) -> None:
        real(fd)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.close = real
                close()
                code = 0
            finally:
                os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    with patch.context() as during:
        during.setattr(os, "close", closing)
        close()
    return codes


def is_gone(pid: int) -> bool:
    """Has a process ended? Nobody may be there to wait for it, so a zombie is gone, too."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat[stat.rindex(")") + 2] == "Z"


@contextlib.contextmanager
def started(
    *command: str, deadline: float = 120, **options: Any
) -> Iterator[subprocess.Popen[Any]]:
    """Start a program in a session of its own, all of whose processes end with the block, whatever happened in it.

    They are killed after ``deadline`` units as well, so that whoever reads what the program prints does not hang.
    """
    with subprocess.Popen(command, start_new_session=True, **options) as process:

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(deadline * TIMEUNIT, kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            timer.join()
            kill()


# What is left behind.

#: The checks, by the name that ``@pytest.mark.leaks`` knows them by, and what they find.
CHECKS = {
    "descriptors": "open file descriptors",
    "processes": "child processes",
    "threads": "running threads",
    "shm": "names in /dev/shm",
    "temp": "files in the temporary folder",
    "blocks": "blocks of the object store",
}

#: Descriptors that may appear at any time: what they point to, and why they stay.
KEPT_DESCRIPTORS = {
    r"/dev/u?random": "Python opens it once where getrandom() is missing",
    r"/proc/\d+/fd": "the listing of descriptors that is being made",
    r"/proc/\d+/pagemap|anon_inode:\[userfaultfd\]": "a store's, opened when needed; test_store.py sees them go",
}

#: Threads that may appear at any time: the name of their class, and why they stay.
KEPT_THREADS = {
    "_DummyThread": "a thread of compiled code that once ran Python: not ours to end",
    "TMonitor": "tqdm starts one for the whole process",
}

#: Processes that serve this one until it ends: module, object in it, attributes with its pid and with the descriptor
#: that keeps it.
DAEMONS = (
    ("multiprocessing.resource_tracker", "_resource_tracker", "_pid", "_fd"),
    ("multiprocessing.forkserver", "_forkserver", "_forkserver_pid", "_forkserver_alive_fd"),
    ("loky.backend.resource_tracker", "_resource_tracker", "_pid", "_fd"),
    ("joblib.externals.loky.backend.resource_tracker", "_resource_tracker", "_pid", "_fd"),
)


@dataclass(frozen=True)
class Holdings:
    """What this process holds at a moment, each under a name that never changes, counted."""

    descriptors: Counter[str]
    processes: Counter[str]
    threads: Counter[str]
    shm: Counter[str]
    temp: Counter[str]
    blocks: Counter[str]

    @classmethod
    def now(cls, temp: Path) -> Holdings:
        """Take stock; ``temp`` is the folder in which temporary files are made."""
        return cls(
            Counter(_descriptors()),
            Counter(_processes()),
            Counter(_threads()),
            Counter(_names("/dev/shm")),
            Counter(_names(temp, but="pymp-")),  # multiprocessing's own folder, see conftest.py
            Counter({"blocks that are still held": live_blocks()}),
        )

    def left_since(self, before: Holdings, *, off: Collection[str] = ()) -> dict[str, list[str]]:
        """What is held now and was not before, by check; checks in ``off`` are left out."""
        found = {}
        for check in CHECKS.keys() - set(off):
            more: Counter[str] = getattr(self, check) - getattr(before, check)
            if check == "shm":
                more = Counter({name: n for name, n in more.items() if not held_by_others(name)})
            if more:
                found[check] = [
                    (f"{n} x " if n > 1 else "") + _describe(check, what)
                    for what, n in sorted(more.items())
                ]
        return found


def _describe(check: str, what: str) -> str:
    """Add what may change while the thing stays the same, as a process's command does when it is started."""
    number = what.split()[1] if " " in what else ""
    if check == "processes":
        try:
            command = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            return what
        return f"{what}: {command.decode(errors='replace').strip()[:200] or 'a zombie'}"
    if check == "threads":
        return what + "".join(
            f": {t.name!r}, {t!r}" for t in threading.enumerate() if str(t.ident) == number
        )
    return what


def _daemons() -> tuple[set[int], set[int]]:
    """The pids of this process's daemons, and the descriptors by which it holds them."""
    pids: set[int] = set()
    descriptors: set[int] = set()
    for module, name, pid, fd in DAEMONS:
        daemon = getattr(sys.modules.get(module), name, None)
        if getattr(daemon, pid, None) is not None:
            pids.add(getattr(daemon, pid))
            descriptors.add(getattr(daemon, fd))
    return pids, descriptors


def _descriptors() -> Iterator[str]:
    _, kept = _daemons()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the listing's own
            continue
        if int(fd) not in kept and not any(
            re.fullmatch(regex, target) for regex in KEPT_DESCRIPTORS
        ):
            yield target


def _processes() -> Iterator[str]:
    daemons, _ = _daemons()
    unseen = _children(os.getpid())
    while unseen:
        pid = unseen.pop()
        unseen += _children(pid)
        if pid in daemons:
            continue
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        # After the name in parentheses: state, ppid, ...; the 20th is the start time, which tells a reused pid.
        yield f"process {pid} started at tick {stat[stat.rindex(')') + 2 :].split()[19]}"


def _children(pid: int) -> list[int]:
    """The children of one process, the zombies among them too."""
    children: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            text = Path(f"/proc/{pid}/task/{thread}/children").read_text()
            children += map(int, text.split())
    except (FileNotFoundError, ProcessLookupError):
        if not os.path.exists(f"/proc/self/task/{threading.get_native_id()}/children"):
            return _children_by_search(pid)  # a kernel without CONFIG_PROC_CHILDREN
    return children


def _children_by_search(parent: int) -> list[int]:
    children = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(stat[stat.rindex(")") + 2 :].split()[1]) == parent:
                children.append(int(entry))
    return children


def _threads() -> Iterator[str]:
    for thread in threading.enumerate():
        if type(thread).__name__ not in KEPT_THREADS:
            yield f"thread {thread.ident} ({thread.native_id})"


def _names(folder: str | Path, *, but: str | tuple[str, ...] = ()) -> list[str]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [os.path.join(folder, name) for name in names if not name.startswith(but)]


def live_blocks() -> int:
    """How many blocks the stores of this process hold; a test that never imports shmpool pays nothing."""
    count = getattr(sys.modules.get("shmpool.store"), "live_blocks", None)
    return count() if count else 0


def held_by_others(path: str) -> bool:
    """Whether a process outside this one's tree has this file of /dev/shm open or mapped, or is named in its name.

    Test processes run side by side and /dev/shm is one for all of them, so a new name may be a neighbour's.
    """
    family, unseen = {os.getpid()}, [os.getpid()]
    while unseen:
        children = _children(unseen.pop())
        family.update(children)
        unseen += children
    others = {int(entry) for entry in os.listdir("/proc") if entry.isdigit()} - family
    if others & {int(number) for number in re.findall(r"(?<![a-zA-Z\d])\d+(?![a-zA-Z\d])", path)}:
        return True  # as in loky-<pid>-<random>
    try:
        file = os.stat(path)
    except FileNotFoundError:
        return True  # gone by now
    return any(_holds(pid, file) for pid in others)


def _holds(pid: int, file: os.stat_result) -> bool:
    # By inode: a semaphore is made under another name, and that is the one which the list of mappings shows.
    device = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}"
    try:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if line.split()[3:5] == [device, str(file.st_ino)]:
                return True
        return any(
            os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), file)
            for fd in os.listdir(f"/proc/{pid}/fd")
        )
    except OSError:  # it has ended, or belongs to another user
        return False
