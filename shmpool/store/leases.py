"""Leases: views of blocks that this process has handed out, and how it learns that the last user is gone.

An exporter (a numpy array over the mapping) is made for each taker of a block.  Every array and memoryview that is
made from it keeps it alive; a weak reference to it fires when the last of them is gone.  That can happen anywhere, in
any thread, also while a lock is held: the callback only appends the lease to a queue, and then tries, without
waiting, to have the queue emptied.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from shmpool.memory.dirty import DirtyDetector, page_faults
from shmpool.memory.segment import Bytes, Mapping
from shmpool.store.blocks import Block

__all__ = ["Lease"]

#: In bytes. Below, to walk the pages is as fast.
_LARGE = 4 << 20


class _ViewRef(weakref.ref[Bytes]):
    __slots__ = ("lease",)
    lease: Lease


class Lease:
    """One taker's view of a block.

    Attributes
    ----------
    block : Block
    mapping : Mapping
        Kept here so that its addresses cannot be used for anything else before the lease is taken off the books.
    address, nbytes : int
        Where the view lies in this process.
    first, last : int
        The part of it that the taker was given, as addresses; only there can it have been written to.
    alone : bool
        The mapping is the arena's kept private one: this taker has it alone, and its private pages must go after it.
    """

    __slots__ = (
        "_faults", "_ref", "address", "alone", "block", "first", "last", "mapping", "nbytes",
    )  # fmt: skip

    def __init__(
        self, block: Block, mapping: Mapping, first: int, last: int, *, alone: bool
    ) -> None:
        shift = mapping.address - mapping.start
        self.block = block
        self.mapping = mapping
        self.address = shift + block.offset
        self.nbytes = block.size
        self.first = shift + first
        self.last = shift + last
        self.alone = alone
        # When it began.
        self._faults = page_faults() if alone and last - first >= _LARGE else -1
        self._ref: _ViewRef | None = None

    @property
    def private(self) -> bool:
        """May the view differ from the store (copy-on-write)?"""
        return self.mapping.mode == "c"

    def is_clean(self, detector: DirtyDetector) -> bool:
        """Has the taker not written to it?  Nobody writes meanwhile.  Its pages know, but there may be many."""
        if self._faults < 0:
            return not detector.is_dirty(self.first, self.last - self.first)
        faults = page_faults()
        if faults == self._faults:
            return True
        if detector.is_dirty(self.first, self.last - self.first):
            return False
        self._faults = faults  # clean until the next
        return True

    def watch(self, view: Bytes, gone: Callable[[Lease], None]) -> None:
        """Call ``gone(self)`` when ``view`` and all that was made from it is gone."""
        self._ref = _ViewRef(view, lambda ref: gone(ref.lease))
        self._ref.lease = self

    def end(self) -> None:
        """Let go of the mapping, and of the weak reference (a cycle)."""
        self._ref = None
        del self.mapping
