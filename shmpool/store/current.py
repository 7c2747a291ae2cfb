"""The process-wide store: made when it is first needed, one a process, set by a worker when it starts.

A forked child starts without one.
"""

from __future__ import annotations

import os
import threading

from shmpool.store.store import ObjectStore, stores

__all__ = ["get_store", "live_blocks", "set_store"]

_lock = threading.Lock()  # guards the making of _store
_store: ObjectStore | None = None


def get_store() -> ObjectStore:
    """The process-wide store."""
    global _store
    if _store is None:
        with _lock:
            if _store is None:
                _store = ObjectStore()
    return _store


def set_store(store: ObjectStore | None) -> None:
    """Make ``store`` the process-wide one; None: a new one is made when it is needed."""
    global _store
    _store = store


def live_blocks() -> int:
    """How many blocks this process's stores hold, finalizers done."""
    return sum(store.live_blocks() for store in list(stores))


def _after_fork_in_child() -> None:
    global _store, _lock
    _store = None
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
