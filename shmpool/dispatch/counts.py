"""What went through an executor so far."""

from __future__ import annotations

from shmpool.store.store import Payload
from shmpool.wire.messages import Answer

__all__ = ["Counts"]


class Counts:
    """Tasks, and bytes of arguments and results together."""

    __slots__ = ("copied", "died", "done", "failed", "inline", "retried", "shared", "submitted")

    def __init__(self) -> None:
        self.submitted = self.done = self.failed = self.died = self.retried = 0
        self.copied = self.shared = self.inline = 0

    def add(self, other: Counts) -> None:
        """Add another executor's."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def count(self, payload: Payload) -> None:
        """Add what was sent."""
        self.inline += len(payload.data)
        self.copied += payload.copied
        self.shared += payload.shared

    def count_answer(self, answer: Answer) -> None:
        """Add what was received."""
        self.done += 1
        self.inline += len(answer.result)
        self.copied += answer.copied
        self.shared += answer.shared
