"""Every tunable, with its reason; the only reader of ``SHMPOOL_*`` environment variables.

A :class:`Config` is read once, when a store is made, and travels to the workers with it: parent and workers always
agree, whatever happens to the environment in between.
"""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

__all__ = ["LONGEST_POLL", "Config", "parse_size", "pickle_debug"]

MIB = 1 << 20

#: Seconds. ``poll`` and ``epoll`` take milliseconds in 31 bits, 24 days; who wants to wait longer asks again.
LONGEST_POLL = 86_400.0

_UNITS = {
    "": 1, "b": 1, "k": 1000, "kb": 1000, "m": 1000**2, "mb": 1000**2, "g": 1000**3, "gb": 1000**3,
    "t": 1000**4, "tb": 1000**4, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip


def parse_size(value: float | str, what: str) -> int:
    """Bytes from a number or from a string such as ``"4GiB"`` or ``"500 MB"``.

    Raises
    ------
    ValueError
        The string is no size, or the size is not positive.
    TypeError
        The value is neither a number nor a string.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(
            f"{what} must be a number of bytes or a string such as '4GiB', not {value!r}"
        )
    size: float
    if isinstance(value, str):
        text = value.strip().lower().replace("_", "")
        digits = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
        unit = text[len(digits) :].strip()
        try:
            size = float(digits) * _UNITS[unit]
        except (ValueError, KeyError):
            raise ValueError(
                f"{what} must be a size such as 4000000, '500 MB' or '4GiB', not {value!r}"
            ) from None
    else:
        size = value
    if not 1 <= size < 1 << 62:
        raise ValueError(f"{what} must be at least one byte, not {value!r}")
    return int(size)


class Config(NamedTuple):
    """Tunables of a store and of the executors that use it."""

    #: Where arenas live: anonymous memory (memfd), or unlinked files where the system has no memfd.
    memory_backend: Literal["memfd", "file"] = "memfd"
    #: Buffers below this many bytes ride in the message. Two copies through a socket cost less than taking, mapping
    #: and giving back a block up to 128 KB and more (measured with benchmarks' 64 KB argument); but a message holds
    #: only so much, and what rides is sent again for each task.
    inline_limit: int = 72 * 1024
    #: Of those, buffers of at least this size ride beside the pickle stream, which is searched for names: that takes
    #: 20 us for 64 KB, while to keep a buffer apart takes 5 us.
    ride_limit: int = 16 * 1024
    #: A payload longer than this goes through the store itself. A message has two (function and arguments), must fit
    #: whole into a socket's buffer (about 200 KB by default), and some of that is for what rides along.
    message_limit: int = 80 * 1024
    #: Buffers of at least this size get a block of their own, so that one can go while its neighbours stay; smaller
    #: ones of one payload share a block, since a block costs about 10 us.
    own_block: int = MIB
    #: First arena's size. Arenas are sparse: only the pages that are written cost memory.
    arena_min: int = 64 * MIB
    #: Arenas double up to this size: few arenas mean few descriptors.
    arena_max: int = 4096 * MIB
    #: How many tasks wait inside a worker's socket beyond the running one, at the least: one hides the round trip.
    #: (Unread tasks can be taken back at any time, so none is stuck behind a long one.)
    prefetch_min: int = 1
    #: ... and at the most, when tasks are tiny.
    prefetch_max: int = 32
    #: Enough tasks are sent ahead to keep a worker busy for this long, in microseconds.
    prefetch_us: int = 1000
    #: Seconds for which a thread that waits for a short task's result asks again and again before it sleeps, if there
    #: is a processor to spare: to be woken takes 40 us and more, as long as all the rest of a task that does nothing.
    #: 0 = never.
    spin_seconds: float = 150e-6
    #: Freed pages stay warm, since recycled memory is several times as fast as fresh memory: up to this many bytes, or
    #: so many that together with what is in use they are no more than what was in use at a time lately ...
    warm_bytes: int = 256 * MIB
    #: ... but no more than this share of the store's capacity ...
    warm_share: float = 0.5
    #: ... and for this many seconds after the last use of the store.
    warm_seconds: float = 10.0
    #: Share of the memory that the machine or the cgroup allows that a store takes before it spills.
    capacity_share: float = 0.6
    #: How private copies of pages are found: "scan" (PAGEMAP_SCAN), "pagemap", "none"; None = the best that works.
    dirty_detector: str | None = None
    #: Have the kernel watch large arrays that come again and again unchanged, instead of comparing them each time; off
    #: by ``SHMPOOL_WATCH_WRITES=0``.
    watch_writes: bool = True
    #: How many threads BLAS and OpenMP may use in each worker; None = the cores, divided among the workers; 0 = no cap.
    worker_threads: int | None = None
    #: Recount the store's books after every change: slow, on in tests.
    verify: bool = False

    @classmethod
    def from_env(cls) -> Config:
        """The defaults, as changed by ``SHMPOOL_MEMORY_BACKEND``, ``_INLINE_LIMIT``, ``_DIRTY_DETECTOR``, ...

        Raises
        ------
        ValueError
            A variable has a value that makes no sense; the message names it.
        """
        env = os.environ
        default = cls()
        backend = env.get("SHMPOOL_MEMORY_BACKEND") or (
            "memfd" if hasattr(os, "memfd_create") else "file"
        )
        if backend not in ("memfd", "file"):
            raise ValueError(f"SHMPOOL_MEMORY_BACKEND must be 'memfd' or 'file', not {backend!r}")
        detector = env.get("SHMPOOL_DIRTY_DETECTOR") or None
        if detector not in (None, "scan", "pagemap", "none"):
            raise ValueError(
                f"SHMPOOL_DIRTY_DETECTOR must be 'scan', 'pagemap' or 'none', not {detector!r}"
            )
        return cls(
            memory_backend=backend,  # type: ignore[arg-type]  # checked above
            inline_limit=_size(env, "SHMPOOL_INLINE_LIMIT", default.inline_limit),
            arena_min=_size(env, "SHMPOOL_ARENA_MIN", default.arena_min),
            spin_seconds=_seconds(env, "SHMPOOL_SPIN_SECONDS", default.spin_seconds),
            warm_seconds=_seconds(env, "SHMPOOL_WARM_SECONDS", default.warm_seconds),
            dirty_detector=detector,
            watch_writes=env.get("SHMPOOL_WATCH_WRITES") != "0",
            worker_threads=_threads(env, "SHMPOOL_WORKER_THREADS"),
            verify=_flag(env, "SHMPOOL_VERIFY"),
        )


def pickle_debug() -> bool:
    """Is ``SHMPOOL_PICKLE_DEBUG`` set?  Then what cannot be pickled has a traceback with the way through the object."""
    return _flag(os.environ, "SHMPOOL_PICKLE_DEBUG")


def _size(env: os._Environ[str], name: str, default: int) -> int:
    return parse_size(env.get(name) or default, name)


def _seconds(env: os._Environ[str], name: str, default: float) -> float:
    text = env.get(name)
    try:
        return float(text) if text else default
    except ValueError:
        raise ValueError(f"{name} must be a number of seconds, not {text!r}") from None


def _threads(env: os._Environ[str], name: str) -> int | None:
    text = env.get(name, "").strip().lower()
    if text in ("", "off"):
        return 0 if text else None
    if text.isdecimal():
        return int(text)
    raise ValueError(f"{name} must be a number of threads, or 'off' for no cap, not {env[name]!r}")


def _flag(env: os._Environ[str], name: str) -> bool:
    return env.get(name, "0") not in ("", "0")
