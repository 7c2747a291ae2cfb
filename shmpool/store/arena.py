"""An arena: a segment with blocks in it, as one process sees it.

Each arena has one writer, the process that made it: only there do blocks come and go, so that no lock is shared
between processes.  Every other process holds the arena as a reader.  Both keep their mappings in place, because a
mapping that is still there reads three times as fast as a new one.

The caller holds the store's lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from shmpool.memory.allocator import Allocator
from shmpool.memory.hugepages import WORTH_IT, Collapser
from shmpool.memory.intervals import IntervalSet
from shmpool.memory.segment import Bytes, Mapping, Mode, Segment, round_up
from shmpool.store.blocks import ArenaInfo, Block

if TYPE_CHECKING:
    from shmpool.store.peer import Peer

__all__ = ["Arena", "OwnArena"]


class Arena:
    """An arena that this process can read.

    Attributes
    ----------
    info : ArenaInfo
    origin : Peer or None
        Who handed it to us; None for our own.
    taken : set of int
        Offsets of the blocks whose one taker on the kept "c" mapping is alive.
    held : int
        How many of its blocks this process holds.
    orphaned : bool
        Its origin is gone: nobody wants to know which blocks are free, and it goes with the last of them.
    """

    __slots__ = ("_kept", "held", "info", "origin", "orphaned", "segment", "taken")

    def __init__(self, info: ArenaInfo, segment: Segment, origin: Peer | None) -> None:
        self.info = info
        self.segment = segment
        self.origin = origin
        self.taken: set[int] = set()
        self.held = 0
        self.orphaned = False
        self._kept: dict[Mode, Mapping] = {}

    def kept_mapping(self, mode: Mode) -> Mapping:
        """The mapping of the whole arena that stays in place for ``mode``."""
        mapping = self._kept.get(mode)
        if mapping is None:
            mapping = self._kept[mode] = self.segment.map(mode)
        return mapping

    def own_mapping(self, mode: Mode, block: Block) -> Mapping:
        """A mapping of one block for one taker."""
        return Mapping(self.segment.fd, block.offset, block.size, mode, reserve=self.info.huge)

    def descriptor_for_others(self) -> int:
        """A new descriptor for another process: read-only, unless all may write.  The caller closes it."""
        return os.dup(self.segment.fd) if self.info.shared else self.segment.open_readonly()

    def close(self) -> None:
        """Let go of the descriptor and the kept mappings; views that are alive stay valid."""
        self._kept.clear()
        self.segment.close()


class _Promise(NamedTuple):
    """What is to be done about the pages of a new block."""

    fresh: list[tuple[int, int]]
    unmapped: list[tuple[int, int]]
    write: bool


class OwnArena(Arena):
    """An arena that this process made, and alone writes to.

    Parameters
    ----------
    info : ArenaInfo
    segment : Segment
    granule : int
        Blocks start and end at multiples of this.
    collapser : Collapser, optional
        Makes huge pages of what is populated.
    """

    __slots__ = ("_allocator", "_collapser", "_mapped", "_populated", "_promised", "granule")

    def __init__(
        self,
        info: ArenaInfo,
        segment: Segment,
        granule: int,
        collapser: Collapser | None = None,
    ) -> None:
        super().__init__(info, segment, None)
        self.granule = granule
        self._collapser = collapser
        self._allocator = Allocator(info.size, granule)
        self._populated = IntervalSet()  # pages that exist, or are promised to
        self._mapped = IntervalSet()  # those of them that are mapped where blocks are written
        self._promised: dict[int, _Promise] = {}

    @property
    def used(self) -> int:
        """Bytes in blocks."""
        return self._allocator.used

    @property
    def resident(self) -> int:
        """Bytes of memory (or of disk) that the arena costs: blocks, and freed pages that are still warm."""
        return self._populated.total

    def allocate(self, nbytes: int) -> int | None:
        """Offset of a new block of at least ``nbytes`` bytes, or None if there is no gap for it."""
        return self._allocator.allocate(nbytes)

    def promise(self, offset: int, size: int, *, write: bool) -> int:
        """Count the pages of a new block as populated; return how many bytes of them are not yet.

        With ``write``, :meth:`populate` writes to the descriptor if the whole block is fresh: such pages are neither
        zeroed nor mapped before they are filled, which takes half the time.  They are mapped when they are used again.
        """
        stop = offset + size
        fresh = self._populated.missing(offset, stop)
        unmapped = self._mapped.missing(offset, stop)
        if not unmapped:
            return 0
        self._populated.add(offset, stop)
        write = write and fresh == [(offset, stop)] and not self._may_be_huge(size)
        if not write:
            self._mapped.add(offset, stop)
        self._promised[offset] = _Promise(fresh, unmapped, write)
        return sum(last - first for first, last in fresh)

    def _may_be_huge(self, size: int) -> bool:
        return self._collapser is not None and size >= WORTH_IT and self._collapser.may_be_had()

    def break_promise(self, offset: int) -> None:
        """They will not be populated, or only in part."""
        promise = self._promised.pop(offset, None)
        if promise is not None:
            for start, stop in promise.unmapped:
                self._mapped.remove(start, stop)
            for start, stop in promise.fresh:
                self._populated.remove(start, stop)
                with contextlib.suppress(
                    OSError
                ):  # what could not be mapped has no pages to give back
                    self.kept_mapping("r+").give_back(start, stop)

    def populate(self, offset: int, pieces: Iterable[tuple[int, Bytes]], *, file: bool) -> bool:
        """Reserve the memory that a block was promised.  Needs no lock: the block is its maker's.

        Parameters
        ----------
        offset : int
        pieces : iterable
            What the block is to hold, down to its last page: where each begins in the block, and its bytes.
        file : bool
            The arena is a file.

        Returns
        -------
        bool
            Whether the pieces have been written.

        Raises
        ------
        OSError
            There is none; the promise stands.
        """
        promise = self._promised.get(offset)
        if promise is None:
            return False
        if promise.write:
            for start, piece in pieces:
                self.segment.write(offset + start, piece)
        elif file:
            for start, stop in promise.fresh:
                self.segment.reserve(start, stop)
        else:
            for start, stop in promise.fresh:
                if self._may_be_huge(stop - start):
                    assert self._collapser is not None
                    self._collapser.make(self.kept_mapping("r+"), start, stop)
            for start, stop in promise.unmapped:
                self._map(start, stop)
        del self._promised[offset]
        return promise.write

    def _map(self, start: int, stop: int) -> None:
        try:
            self.kept_mapping("r+").populate(start, stop)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.segment.reserve(start, stop)  # pragma: no cover  # Linux before 5.14

    def free(self, offset: int) -> int:
        """Give up a block; its size.  Its pages stay warm until :meth:`trim`."""
        return self._allocator.free(offset)

    def writable(self, offset: int, nbytes: int) -> Bytes:
        """The bytes of a block, to be filled by its maker."""
        return self.kept_mapping("r+").array(offset, nbytes)

    def advise(self, advice: int) -> None:
        """Advise the system about the mapping through which blocks are written."""
        self.kept_mapping("r+").advise(advice)

    def trim(self, most: int) -> int:
        """Return freed pages beyond ``most`` bytes to the system; return how many bytes of them are left warm."""
        warm = self.resident - self.used
        for start, stop in list(self._allocator.free_extents()) if warm > most else ():
            for first, last in self._populated.overlap(start, stop):
                if warm <= most:
                    return warm
                begin = max(first, last - round_up(warm - most, self.granule))
                self.kept_mapping("r+").give_back(begin, last)
                self._populated.remove(begin, last)
                self._mapped.remove(begin, last)
                warm -= last - begin
        return warm

    def verify(self) -> None:
        """Check the books of the allocator, and that every block has its memory reserved."""
        self._allocator.verify()
        assert self.resident >= self.used, (self.resident, self.used)
