"""Memory of a process tree, for the examples that measure themselves."""

import os
from pathlib import Path

SHARED = ("/memfd:", "/dev/shm/")


def tree_memory(pid: int) -> int:
    """Memory of a process and its descendants in bytes; what they share counts once.

    Shared memory also costs where it has been written and nobody has mapped it, so of the files it lies in it is what
    they hold, if that is more than what is mapped of them (PSS).
    """
    files: dict[tuple[int, int], int] = {}
    private, mapped = _add(pid, files)
    return private + max(mapped, sum(files.values()))


def _add(pid: int, files: dict[tuple[int, int], int]) -> tuple[int, int]:
    private = mapped = 0
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in rollup}
        private, mapped = sizes["Pss"] - sizes["Pss_Shmem"], sizes["Pss_Shmem"]
        for entry in os.scandir(f"/proc/{pid}/fd"):
            if os.readlink(entry.path).startswith(SHARED):
                status = os.stat(entry.path)
                files[status.st_dev, status.st_ino] = status.st_blocks * 512
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                more_private, more_mapped = _add(int(child), files)
                private, mapped = private + more_private, mapped + more_mapped
    except (OSError, KeyError, IndexError):
        pass  # it has just ended, or this is not Linux
    return private, mapped
