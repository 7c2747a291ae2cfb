"""Which arrays of this process are already in the store: a copy that was made once serves again.

An entry is found by the memory's address and length, and lives no longer than the array that owns the memory.  Equal
address and length do not make equal contents: the caller of :meth:`Written.find` says whether the contents can have
changed since; if so they are compared (``memcmp`` reads 22 GB/s, several times as fast as a copy and its page faults
in the worker).  The caller holds the store's lock.
"""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from shmpool.serialize.reductions import Window
from shmpool.store.blocks import Block

__all__ = ["Entry", "Written", "WrittenKey", "owner_of"]

#: Address and length in bytes of an array's memory.
WrittenKey = tuple[int, int]


def owner_of(array: Any) -> tuple[Any, bool]:
    """The object that owns an array's memory, as far as arrays go, and whether the memory can never change.

    A read-only array does not count as unchangeable: its flag can be set back.  An array over ``bytes`` does.
    A :class:`Window` is looked through.
    """
    while isinstance(array, np.ndarray):
        base: Any = array.base
        if isinstance(base, Window):
            base = base.owner
            if not isinstance(base, np.ndarray):
                return base, False
        if not isinstance(base, np.ndarray):
            return array, isinstance(base, bytes)
        array = base
    return array, False


class Entry:
    """A copy in the store of an array of this process."""

    __slots__ = ("block", "constant", "epoch", "owner", "start")

    def __init__(
        self, owner: weakref.ref[Any], block: Block, start: int, epoch: object, constant: bool
    ) -> None:
        self.owner = owner
        self.block = block
        self.start = start
        self.epoch = epoch
        self.constant = constant


class Written:
    """The entries, oldest use first.

    Parameters
    ----------
    gone : callable
        Called with the key of an entry whose owner is gone; from a finalizer, so anywhere.
    """

    __slots__ = ("_entries", "_gone")

    def __init__(self, gone: Callable[[WrittenKey], None]) -> None:
        self._entries: OrderedDict[WrittenKey, Entry] = OrderedDict()
        self._gone = gone

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: WrittenKey) -> Entry | None:
        """The entry for memory at ``key``, if its owner is still alive."""
        entry = self._entries.get(key)
        if entry is None or entry.owner() is None:
            return None
        self._entries.move_to_end(key)
        return entry

    def add(
        self, key: WrittenKey, owner: Any, block: Block, start: int, epoch: object, constant: bool
    ) -> bool:
        """Remember a copy; False if the owner cannot be watched, and so nothing was remembered."""
        gone = self._gone
        try:
            ref = weakref.ref(owner, lambda _ref: gone(key))
        except TypeError:
            return False
        self._entries[key] = Entry(ref, block, start, epoch, constant)
        return True

    def remove(self, key: WrittenKey) -> Block | None:
        """Forget an entry, if there is one; its block is the caller's to let go of."""
        entry = self._entries.pop(key, None)
        return None if entry is None else entry.block

    def remove_all_of(self, block: Block) -> int:
        """Forget the entries of a block; how many there were."""
        keys = [key for key, entry in self._entries.items() if entry.block == block]
        for key in keys:
            del self._entries[key]
        return len(keys)

    def remove_dead(self, key: WrittenKey) -> Block | None:
        """The same, unless memory at ``key`` has an owner again."""
        entry = self._entries.get(key)
        return self.remove(key) if entry is not None and entry.owner() is None else None

    def blocks(self) -> list[tuple[Block, int]]:
        """The blocks that entries hold, with how many entries each."""
        times = Counter(entry.block for entry in self._entries.values())
        return list(times.items())

    def take_oldest(self) -> Block | None:
        """Forget the entry that was used the longest ago."""
        return self.remove(next(iter(self._entries))) if self._entries else None
