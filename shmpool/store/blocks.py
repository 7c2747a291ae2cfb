"""What the store's bytes are called: plain frozen values that mean the same in every process.

A block is named by (arena, offset), never by an address: each process maps an arena somewhere else.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["HUGE", "SHARED", "ArenaInfo", "Block", "BlockKey"]

SHARED, HUGE = 1, 2

#: Names a block: (arena id, offset in the arena).
BlockKey = tuple[int, int]


class Block(NamedTuple):
    """A block of an arena: where it starts and how many bytes it has, both multiples of the page size."""

    arena: int
    offset: int
    size: int


class ArenaInfo(NamedTuple):
    """What a process must know of an arena, beside its descriptor, to map it."""

    id: int
    size: int
    #: A sum of the flags below.
    flags: int

    @property
    def shared(self) -> bool:
        """For ``shmpool.empty`` and its like: all processes may write to it."""
        return bool(self.flags & SHARED)

    @property
    def huge(self) -> bool:
        """Made of reserved huge pages."""
        return bool(self.flags & HUGE)
