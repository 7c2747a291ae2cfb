"""``multiprocessing.Pool``, on :class:`shmpool.ShmExecutor`.

::

    Pool --- Core ---> ShmExecutor               who is there, and until when
     |        '------> Callbacks, Reader, ...    a thread if there are callbacks, one for each imap() that reads on
     |
     +-- apply, map -> AsyncResult, MapResult    covers over the executor's futures
     '-- imap -------> IMapIterator -> Pool
"""

from __future__ import annotations

from shmpool.pool.context import Context, get_context
from shmpool.pool.imap import IMapIterator, IMapUnorderedIterator
from shmpool.pool.outcomes import EncodingError
from shmpool.pool.pool import Pool
from shmpool.pool.results import AsyncResult, MapResult

__all__ = [
    "AsyncResult",
    "Context",
    "EncodingError",
    "IMapIterator",
    "IMapUnorderedIterator",
    "MapResult",
    "Pool",
    "get_context",
]
