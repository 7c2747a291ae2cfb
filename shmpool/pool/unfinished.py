"""What a pool has not finished, for programs that look at ``pool._cache`` and ``pool._taskqueue``.

The names are private to multiprocessing, but there is no other way to ask a pool how much is under way, so recipes that
keep it short of work for a while ("while len(pool._cache) > 100: sleep") are widely copied.  Nothing is kept for them:
who asks pays.
"""

from __future__ import annotations

from typing import cast

from shmpool.pool.core import Core
from shmpool.pool.results import AsyncResult

__all__ = ["TaskQueue", "unfinished"]


def unfinished(core: Core) -> dict[int, AsyncResult]:
    """Results that are not there yet, or whose callback has not returned.

    As in multiprocessing, but that a ``map`` without callbacks counts once for each chunk, as ``imap`` does for each
    task that has been read.
    """
    awaited = cast("list[AsyncResult]", core.callbacks.expected())
    found = {id(result): result for result in awaited}
    theirs = {future for result in awaited for future in result._futures}
    for number, task in core.executor._driver.tasks().items():
        if task.future not in theirs:
            found[number] = AsyncResult([task.future], core.callbacks)
    return found


class TaskQueue:
    """The tasks that no worker has been sent, to be counted only."""

    def __init__(self, core: Core | None) -> None:
        self._core = core

    def qsize(self) -> int:
        """How many there are."""
        if self._core is None:
            return 0
        tasks = self._core.executor._driver.tasks()
        return sum(not task.started for task in tasks.values())

    def empty(self) -> bool:
        """Is there none?"""
        return not self.qsize()
