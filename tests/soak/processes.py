"""Processes, as seen from outside, through /proc."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """All processes below one, but for those whose parents have died."""
    found: list[int] = []
    unseen = [pid]
    while unseen:
        for task in Path(f"/proc/{unseen.pop()}/task").glob("*/children"):
            try:
                children = [int(child) for child in task.read_text().split()]
            except OSError:  # it has ended
                continue
            found += children
            unseen += children
    return found


def helpers(pid: int) -> set[int]:
    """Processes that multiprocessing and loky have started for a process beside the workers."""
    found = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended
            found.update(map(int, task.read_text().split()))
    return {pid for pid in found if re.search("resource_tracker|forkserver", command(pid))}


def marked(variable: str) -> list[int]:
    """All processes that were started with this ``NAME=value`` in their environment, orphans too; no zombies."""
    found = []
    wanted = variable.encode()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            environment = Path(f"/proc/{entry}/environ").read_bytes()
        except OSError:  # it has ended, or belongs to another user
            continue
        if wanted in environment.split(b"\0"):
            found.append(int(entry))
    return found


def shared_memory(pid: int) -> list[str]:
    """What a process has open or mapped of shmpool's shared memory (that of memfd)."""
    found = set()
    with contextlib.suppress(OSError):  # it has ended
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            found.add(" ".join(line.split()[5:]))
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(str(entry.readlink()))
    return sorted(name for name in found if name.startswith("/memfd:shmpool"))


def is_alive(pid: int) -> bool:
    """Is it there, and no zombie?"""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat[stat.rindex(")") + 2] not in "ZX"


def command(pid: int) -> str:
    """What it was started as."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()[:160]
    except OSError:
        return "(gone)"


def send_signal(pid: int, number: int) -> None:
    """Send a signal, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def status(pid: int) -> dict[str, str]:
    """What /proc says of it, by field."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def catches(pid: int, number: int) -> bool:
    """Does it have a handler for a signal?"""
    return bool(int(status(pid).get("SigCgt", "0"), 16) >> (number - 1) & 1)


def resident(pid: int) -> tuple[int, int]:
    """Memory of a process, in bytes: its own (anonymous), and what it has mapped of shared memory and files."""
    found = status(pid)
    own, shared = (
        sum(int(found.get(name, "0 kB").split()[0]) * 1024 for name in names)
        for names in (("RssAnon",), ("RssShmem", "RssFile"))
    )
    return own, shared


def continue_all(pids: list[int]) -> None:
    """Wake those that are stopped."""
    for pid in pids:
        send_signal(pid, signal.SIGCONT)
