"""Parallel numpy without pickled arrays: executors that pass arguments and results through shared memory.

>>> from shmpool import ShmExecutor
>>> with ShmExecutor() as ex:  # doctest: +SKIP
...     results = list(ex.map(fn, arrays))

All names are loaded when they are first used, so that ``import shmpool`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from shmpool.errors import (
        BrokenPoolError,
        RefError,
        SerializationError,
        ShmPoolError,
        StoreFullError,
        TaskTimeoutError,
        WireError,
        WorkerDiedError,
    )
    from shmpool.executor import ExecutorStats, ShmExecutor
    from shmpool.integrations.install import install, uninstall
    from shmpool.integrations.joblib import register_joblib_backend
    from shmpool.pool import Pool, get_context
    from shmpool.reusable import get_reusable_executor
    from shmpool.serialize.custom import deregister_serializer, register_serializer
    from shmpool.serialize.inspect import inspect_serializability
    from shmpool.store.explaining import Explanation, Part, explain
    from shmpool.store.refs import ObjectRef, get, put
    from shmpool.store.shared import asarray, empty, zeros
    from shmpool.store.store import ObjectStore, StoreStats

_HOME = {
    "BrokenPoolError": "errors",
    "ExecutorStats": "executor",
    "Explanation": "store.explaining",
    "ObjectRef": "store.refs",
    "ObjectStore": "store.store",
    "Part": "store.explaining",
    "Pool": "pool",
    "RefError": "errors",
    "SerializationError": "errors",
    "ShmExecutor": "executor",
    "ShmPoolError": "errors",
    "asarray": "store.shared",
    "empty": "store.shared",
    "zeros": "store.shared",
    "StoreFullError": "errors",
    "StoreStats": "store.store",
    "TaskTimeoutError": "errors",
    "WireError": "errors",
    "WorkerDiedError": "errors",
    "deregister_serializer": "serialize.custom",
    "explain": "store.explaining",
    "get": "store.refs",
    "get_context": "pool",
    "get_reusable_executor": "reusable",
    "inspect_serializability": "serialize.inspect",
    "install": "integrations.install",
    "put": "store.refs",
    "register_joblib_backend": "integrations.joblib",
    "register_serializer": "serialize.custom",
    "uninstall": "integrations.install",
}

__all__ = [
    "BrokenPoolError",
    "ExecutorStats",
    "Explanation",
    "ObjectRef",
    "ObjectStore",
    "Part",
    "Pool",
    "RefError",
    "SerializationError",
    "ShmExecutor",
    "ShmPoolError",
    "StoreFullError",
    "StoreStats",
    "TaskTimeoutError",
    "WireError",
    "WorkerDiedError",
    "__version__",
    "asarray",
    "deregister_serializer",
    "empty",
    "explain",
    "get",
    "get_context",
    "get_reusable_executor",
    "inspect_serializability",
    "install",
    "put",
    "register_joblib_backend",
    "register_serializer",
    "uninstall",
    "zeros",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
