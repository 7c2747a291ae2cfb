"""Until when tasks may run whose time is limited.  Guarded by the driver's lock."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

from shmpool.dispatch.wakeup import WakeUp

__all__ = ["Deadlines"]


class Deadlines:
    """The tasks that run, and whose time is limited.

    Parameters
    ----------
    wakeup : WakeUp
        Of who ends the tasks that have run for too long.

    Attributes
    ----------
    until : dict of int to float
        When a task's time is up, by :func:`time.monotonic`.
    """

    __slots__ = ("_looks_at", "_wakeup", "until")

    def __init__(self, wakeup: WakeUp) -> None:
        self.until: dict[int, float] = {}
        self._looks_at = math.inf  # when who ends those that are late will look next, at the latest
        self._wakeup = wakeup

    def __bool__(self) -> bool:
        return bool(self.until)

    def begin(self, task: int, seconds: float) -> None:
        """A task's time begins."""
        self.until[task] = deadline = time.monotonic() + seconds
        if deadline < self._looks_at:
            self._wakeup.ring()

    def forget(self, task: int) -> None:
        """It does not run any more, or not yet."""
        self.until.pop(task, None)

    def next(self) -> float:
        """When the caller will look again, which it promises; infinity if there is nothing to look at."""
        self._looks_at = min(self.until.values(), default=math.inf)
        return self._looks_at

    def overdue(self) -> Iterator[int]:
        """The tasks that have run for too long, each forgotten when it is named.

        One that was begun anew since the first was named, as it was taken back together with that, is not.
        """
        now = time.monotonic()
        for task in [task for task, deadline in self.until.items() if deadline <= now]:
            if self.until.get(task, math.inf) <= now:
                del self.until[task]
                yield task
