"""Memory of a process tree on Linux, with what the processes share counted once.

The sum of the processes' proportional set sizes (PSS), except for shared memory files (memfd,
/dev/shm): of these it is the blocks that the file holds, where that can be seen. Pages that were
written with `write` or are no longer mapped occupy memory too, yet are part of nobody's PSS; and
shares that are read one process after the other do not add up while another one maps the pages.
"""

import os
import statistics
import threading
import time
from pathlib import Path

SHARED = ("/memfd:", "/dev/shm/", "/dev/zero", "/SYSV", "/anon_hugepage")


def descendants(pid: int) -> list[int]:
    """The process and everything below it, as far as it can be seen."""
    pids = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in children.read_text().split():
                pids += descendants(int(child))
        except OSError:
            pass
    return pids


def tree_bytes(pid: int) -> int:
    """Memory in use by the tree below `pid`, in bytes; 0 where it cannot be told."""
    private, files = 0, {}
    for member in descendants(pid):
        try:
            private += _mappings(member, files)
            _descriptors(member, files)
        except OSError:
            pass  # ended meanwhile
    return private + sum(held or mapped for mapped, held in files.values())


def _mappings(pid, files):
    """Add a process's share of shared files to `files`; return what is its own, in bytes."""
    private = mapped = anonymous = 0
    file = None
    with open(f"/proc/{pid}/smaps", errors="replace") as lines:
        for line in lines:
            word, _, rest = line.partition(" ")
            if not word.endswith(":"):
                _, _, device, inode, *name = rest.split(None, 4)
                shared = bool(name) and name[0].startswith(SHARED)
                file = (*(int(part, 16) for part in device.split(":")), int(inode))
                file = file if shared else None
                if shared and file not in files:
                    files[file] = 0, _held(name[0].strip(), file)
            elif word == "Pss:":
                mapped = int(rest.split()[0]) * 1024
                if file is None:
                    private += mapped
            elif word == "Anonymous:" and file is not None:
                anonymous = int(rest.split()[0]) * 1024  # pages copied on write: its own
                private += anonymous
                total, held = files[file]
                files[file] = total + max(0, mapped - anonymous), held
    return private


def _descriptors(pid, files):
    """Shared files that are open, mapped or not."""
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            if os.readlink(entry.path).startswith(SHARED):
                status = os.stat(entry.path)
                file = os.major(status.st_dev), os.minor(status.st_dev), status.st_ino
                mapped, _ = files.get(file, (0, 0))
                files[file] = mapped, status.st_blocks * 512
        except OSError:
            pass


def _held(name, file):
    """Bytes that a mapped file under /dev/shm holds, if it still has its name."""
    try:
        status = os.stat(name)
    except OSError:
        return 0
    same = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino) == file
    return status.st_blocks * 512 if same else 0


class Unsampled(Exception):
    """The machine was too busy, or this is not Linux."""


class Sampler:
    """Samples the tree below a process from a thread, until it is told to stop."""

    def __init__(self, pid: int, interval: float = 0.01):
        self.samples: list[tuple[float, int]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(pid, interval))
        self._thread.start()

    def _run(self, pid, interval):
        pause = interval
        while not self._done.wait(pause):
            start = time.monotonic()
            self.samples.append((start, tree_bytes(pid)))
            pause = max(interval, time.monotonic() - start)  # leave the processors to the race

    def stop(self):
        self._done.set()
        self._thread.join()

    def growth(self, before: float, start: float, stop: float) -> float:
        """Peak between `start` and `stop` over the median between `before` and `start`, bytes."""
        return self.peak(start, stop) - statistics.median(self._between(before, start))

    def peak(self, start: float, stop: float) -> float:
        """The most that was in use between `start` and `stop`, in bytes."""
        return max(self._between(start, stop))

    def _between(self, start, stop):
        sizes = [size for when, size in self.samples if start <= when <= stop and size]
        if not sizes:
            raise Unsampled(f"no sample of memory in {stop - start:.1f} s")
        return sizes
