"""Which arrays of this process are already in the store: a copy that was made once serves again.

An entry is found by the memory's address and length (of an array that is not contiguous, and so was copied on its way
here, by its shape and strides as well), and lives no longer than the array that owns the memory.  Being found there
does not make equal contents: the caller of :meth:`Written.find` says whether the contents can have
changed since; if so they are compared (``memcmp`` reads 22 GB/s, several times as fast as a copy and its page faults
in the worker).  What has been found the same before is also watched from then on, where the system can do that: its
pages need not be compared for as long as nobody has written to them (:mod:`shmpool.memory.watch`).

The caller holds the store's lock, except while it compares.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from shmpool.memory.segment import address_of
from shmpool.memory.watch import Watched, WriteWatch
from shmpool.serialize.reductions import Window
from shmpool.store.blocks import Block

__all__ = ["Entry", "Epoch", "Written", "WrittenKey", "key_of", "owner_of"]

#: Address and length in bytes of an array's memory; of an array that is not contiguous also its items' size, shape and
#: strides, and the length is that of its items together.
WrittenKey = tuple[int, ...]

#: Memory of at least so many bytes is watched: comparing it takes 60 us and more, to ask 15.
_WORTH_WATCHING = 1 << 20
#: Once it has been found the same so many times ...
_PATIENCE = 1
#: ... and so many times as often again, each time that the watch was in vain: memory that is written to between its
#: uses has nothing of it but the page faults.
_PATIENCE_GROWS = 8


class Epoch:
    """A time in which no code of the user's runs that could change an array: the caller sees to that.

    What the user has taught pickle (``__reduce__``, ``__getstate__``, ...) is such code, so it ends when something is
    pickled that may have any.
    """

    __slots__ = ("lasts",)

    def __init__(self) -> None:
        self.lasts = True


def key_of(buffer: Any, source: np.ndarray) -> WrittenKey:
    """Where the entry of a buffer is to be found.

    Parameters
    ----------
    buffer : object
        What the buffer belongs to.
    source : ndarray
        Its bytes.
    """
    base = getattr(buffer, "base", None)
    if type(base) is Window and (array := base.made_of) is not None:
        address: int = array.__array_interface__["data"][0]
        return (address, source.nbytes, array.itemsize, *array.shape, *array.strides)
    return address_of(source), source.nbytes


def owner_of(array: Any) -> tuple[Any, bool]:
    """The object that owns an array's memory, as far as arrays go, and whether the memory can never change.

    A read-only array does not count as unchangeable: its flag can be set back.  An array over ``bytes`` does.
    A :class:`Window` is looked through; behind a copy it shows what that was made of.
    """
    while isinstance(array, np.ndarray):
        base: Any = array.base
        if isinstance(base, Window):
            if base.made_of is not None:
                return owner_of(base.made_of)[0], False
            base = base.owner
            if not isinstance(base, np.ndarray):
                return base, False
        if not isinstance(base, np.ndarray):
            return array, isinstance(base, bytes)
        array = base
    return array, False


class Entry:
    """A copy in the store of an array of this process.

    Attributes
    ----------
    same : int
        How many comparisons in a row have found the memory as it was.
    patience : int
        After how many of them it is watched.
    watched : Watched or None
        ``known`` says that it has been compared since the watch began.
    """

    __slots__ = (
        "block", "constant", "epoch", "owner", "patience", "same", "start", "watchable", "watched",
    )  # fmt: skip

    def __init__(
        self, owner: weakref.ref[Any], block: Block, start: int, epoch: object, constant: bool
    ) -> None:
        self.owner = owner
        self.block = block
        self.start = start
        self.epoch = epoch
        self.constant = constant
        self.same = 0
        self.patience = _PATIENCE
        self.watchable = False
        self.watched: Watched | None = None

    def compared(self, watched: Watched | None, epoch: object) -> None:
        """The memory was found as it was.  ``watched`` was this entry's before the comparison began."""
        self.epoch = epoch
        self.same += 1
        if watched is not None:
            watched.known = True


class Written:
    """The entries, oldest use first.

    Parameters
    ----------
    gone : callable
        Called with the key of an entry whose owner is gone; from a finalizer, so anywhere.
    watch : WriteWatch, optional
        Tells what has been written to; default: nothing does, and all is compared.
    """

    __slots__ = ("_entries", "_gone", "_keys", "_watch")

    def __init__(self, gone: Callable[[WrittenKey], None], watch: WriteWatch | None = None) -> None:
        self._entries: OrderedDict[WrittenKey, Entry] = OrderedDict()
        self._keys: dict[Block, set[WrittenKey]] = {}  # of the entries of each block
        self._gone = gone
        self._watch = watch

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: WrittenKey) -> Entry | None:
        """The entry for memory at ``key``, if its owner is still alive."""
        entry = self._entries.get(key)
        if entry is None or entry.owner() is None:
            return None
        self._entries.move_to_end(key)
        return entry

    def is_unwritten(self, key: WrittenKey, entry: Entry) -> bool:
        """Has nobody written to the whole pages of this memory since they were compared?

        If not, or if that is not known, the caller compares: with ``entry.watched`` as it is now in hand, and then says
        so (:meth:`Entry.compared`).
        """
        watch = self._watch
        if watch is None or not entry.watchable:
            return False
        if entry.watched is not None and entry.watched.known:
            if watch.is_unwritten(entry.watched):
                return True
            self._end_watch(entry)
        if entry.watched is None and entry.same >= entry.patience:
            entry.watched = watch.watch(*key)
            entry.watchable = entry.watched is not None
        return False

    def _end_watch(self, entry: Entry) -> None:
        if entry.watched is not None:
            assert self._watch is not None
            self._watch.stop(entry.watched)
            entry.watched = None
            entry.same = 0
            entry.patience *= _PATIENCE_GROWS

    def add(
        self,
        key: WrittenKey,
        owner: Any,
        block: Block,
        start: int,
        epoch: object,
        constant: bool,
        after: Entry | None = None,
    ) -> bool:
        """Remember a copy, in the place of another; False if the owner cannot be watched: nothing was remembered."""
        gone = self._gone
        try:
            ref = weakref.ref(owner, lambda _ref: gone(key))
        except TypeError:
            return False
        self.take(key)
        entry = self._entries[key] = Entry(ref, block, start, epoch, constant)
        self._keys.setdefault(block, set()).add(key)
        # Memory of the process's own, from malloc. (Of other kinds it is harder to say who writes to it.)
        entry.watchable = (
            len(key) == 2  # else it is not one range
            and key[1] >= _WORTH_WATCHING
            and isinstance(owner, np.ndarray)
            and owner.flags.owndata
        )
        if after is not None:
            entry.patience = after.patience
        return True

    def take(self, key: WrittenKey) -> Entry | None:
        """Forget an entry, if there is one; its block is the caller's to let go of."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._end_watch(entry)
            keys = self._keys[entry.block]
            keys.remove(key)
            if not keys:
                del self._keys[entry.block]
        return entry

    def remove(self, key: WrittenKey) -> Block | None:
        """The same; its block."""
        entry = self.take(key)
        return None if entry is None else entry.block

    def remove_all_of(self, block: Block) -> int:
        """Forget the entries of a block; how many there were."""
        keys = list(self._keys.get(block, ()))
        for key in keys:
            self.take(key)
        return len(keys)

    def remove_dead(self, key: WrittenKey) -> Block | None:
        """The same, unless memory at ``key`` has an owner again."""
        entry = self._entries.get(key)
        return self.remove(key) if entry is not None and entry.owner() is None else None

    def blocks(self) -> list[tuple[Block, int]]:
        """The blocks that entries hold, with how many entries each."""
        return [(block, len(keys)) for block, keys in self._keys.items()]

    def times(self, block: Block) -> int:
        """How many entries a block has."""
        return len(self._keys.get(block, ()))

    def take_oldest(self) -> Block | None:
        """Forget the entry that was used the longest ago."""
        return self.remove(next(iter(self._entries))) if self._entries else None
