"""What the store's bytes are called: plain frozen values that mean the same in every process.

A block is named by (arena, offset), never by an address: each process maps an arena somewhere else.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ArenaInfo", "Block", "BlockKey"]

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
    #: True for arenas of ``shmpool.empty`` and its like, which all processes may write to.
    shared: bool
