"""What the figures depend on."""

import contextlib
import datetime as dt
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from .contenders import CONTENDERS

ROOT = Path(__file__).resolve().parent.parent


def about() -> dict:
    """The machine, the versions of everything that takes part, the date."""
    packages = {contender.package for contender in CONTENDERS.values()} - {"", "shmpool"}
    versions = {}
    for package in sorted(packages | {"numpy", "pandas", "scikit-learn"}):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "huge pages of shared memory": _setting(
            "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
        ),
        "commit": _commit(),
        "versions": versions,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "")


def _setting(file: str) -> str:
    """The chosen one of several words."""
    try:
        return Path(file).read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return ""


def _commit() -> str:
    """Of shmpool, with a plus if files have been changed since."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, check=True, text=True).stdout.strip()
    return ""
