"""How much memory a store may take by default."""

from __future__ import annotations

import os

__all__ = ["allowed_memory"]


def allowed_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control groups' limit where that is lower."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits()]
    return min(limits)


def _cgroup_limits() -> list[int]:
    """Memory limits of this process's control group and of the groups around it, versions 1 and 2."""
    try:
        with open("/proc/self/cgroup") as file:
            lines = file.read().splitlines()
    except OSError:  # pragma: no cover  # a kernel without control groups
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, name = "/sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            root, name = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        while True:
            try:
                with open(f"{root}{path.rstrip('/')}/{name}") as file:
                    text = file.read().strip()
                if text != "max":
                    found.append(int(text))
            except (OSError, ValueError):
                pass
            if path in ("", "/"):
                break
            path = os.path.dirname(path)
    return found
