"""The heap: blocks of a process's own, in memory up to a limit, in spill files past it.

Arenas are few and large: each new one is twice as large as the last.  They are sparse, so that only blocks cost
memory, and freed pages, which stay warm for the next block (recycled memory is ten times as fast as fresh memory).

Where a block goes: into a gap in memory; else into a new arena; if that would pass the limit, warm pages and copies
kept for later are given up first; then it goes to the spill folder; then there is no room
(:class:`~shmpool.errors.StoreFullError`).

The caller holds the store's lock, but not for :meth:`Heap.populate`, which can take long.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from shmpool.config import Config
from shmpool.errors import StoreFullError
from shmpool.memory.hugepages import Collapser
from shmpool.memory.segment import HUGE_PAGE, PAGE, Bytes, Segment, may_be_huge, round_up
from shmpool.store.arena import OwnArena
from shmpool.store.blocks import HUGE, SHARED, ArenaInfo, Block

__all__ = ["Heap", "HugePages"]

HugePages = Literal["auto", True, False]


class Heap:
    """Arenas that this process makes, and alone writes to.

    Parameters
    ----------
    config : Config
    capacity : int
        The limit for memory, in bytes.
    spill_dir : str, None or False
        Folder for what goes beyond; None: the temporary folder; False: nothing goes beyond.
    huge_pages : {"auto", True, False}
        Ask for transparent huge pages; use reserved ones; ask for none.

    Attributes
    ----------
    limit : int
        How much memory the arenas may take now: the capacity, less what others have taken of it.
    """

    __slots__ = (
        "_collapser",
        "_config",
        "_huge_pages",
        "_in_memory",
        "_peak_until",
        "_peaks",
        "_shared",
        "_spill_dir",
        "_spilled",
        "_writes",
        "limit",
    )

    def __init__(
        self,
        config: Config,
        capacity: int,
        spill_dir: str | Literal[False] | None,
        huge_pages: HugePages,
    ) -> None:
        self._config = config
        self._spill_dir = spill_dir
        self._huge_pages = huge_pages
        self.limit = capacity
        # Where the system does not make them by itself.
        self._collapser = Collapser() if huge_pages == "auto" and not may_be_huge() else None
        # Not to files, whose room is to be reserved; nor where pages may come as huge ones, which is faster still.
        self._writes = (
            config.memory_backend == "memfd"
            and huge_pages is not True
            and not (huge_pages and may_be_huge())
        )
        self._peaks = 0, 0  # bytes in blocks, lately and before that; see _recent_peak
        self._peak_until = 0.0
        self._in_memory: list[OwnArena] = []
        self._shared: list[OwnArena] = []
        self._spilled: list[OwnArena] = []

    def __iter__(self) -> Iterator[OwnArena]:
        yield from self._in_memory
        yield from self._shared
        yield from self._spilled

    @property
    def used(self) -> int:
        """Bytes in blocks, spilled ones included."""
        return sum(arena.used for arena in self)

    @property
    def resident(self) -> int:
        """Bytes of memory that the arenas cost, with warm pages and what is about to be populated."""
        total = 0  # a loop: asked for each task, and mostly there is one arena or none
        for arena in self._in_memory:
            total += arena.resident
        for arena in self._shared:
            total += arena.resident
        return total

    @property
    def spilled(self) -> int:
        """Bytes of blocks in spill files."""
        return sum(arena.used for arena in self._spilled)

    @property
    def warm(self) -> int:
        """Bytes of freed pages that still cost memory."""
        total = self.resident  # a loop, as there
        for arena in self._in_memory:
            total -= arena.used
        for arena in self._shared:
            total -= arena.used
        return total

    def allocate(
        self, nbytes: int, *, shared: bool, write: bool, give_up: Callable[[], bool]
    ) -> tuple[OwnArena, Block]:
        """A new block, yet to be populated.

        Parameters
        ----------
        nbytes : int
        shared : bool
            In an arena that all processes may write to.
        write : bool
            :meth:`populate` is given what to fill it with.
        give_up : callable
            Lets go of one copy that is only kept for later; False if there is none.

        Raises
        ------
        StoreFullError
            There is no room.
        """
        size = max(nbytes, 1)
        write = write and self._writes
        while True:
            found = self._in_arenas(
                self._shared if shared else self._in_memory,
                size,
                self.limit - self.resident,
                write,
            )
            if found is not None:
                return found
            if self.limit - self.resident >= size:
                try:
                    return self._in_new_arena(
                        self._shared if shared else self._in_memory,
                        size,
                        SHARED if shared else 0,
                        write=write,
                    )
                except OSError as error:
                    why = f"the system gives no more memory ({error})"
                    break
            why = "that is the limit for memory"
            if not self.trim(0) and not give_up():
                break
        return self.spill(size, shared=shared, why=why)

    def spill(self, size: int, *, shared: bool, why: str) -> tuple[OwnArena, Block]:
        """A new block in the spill folder, since ``why``.

        Raises
        ------
        StoreFullError
            There is no such folder, or no more descriptors.
        """
        if self._spill_dir is False:
            raise self.full(size, f"{why}; nothing may be spilled")
        mine = [arena for arena in self._spilled if arena.info.shared == shared]
        found = self._in_arenas(mine, size, 1 << 62, write=False)
        if found is not None:
            return found
        try:
            if self._spill_dir is None:
                import tempfile  # slow to import, and seldom needed

                self._spill_dir = tempfile.gettempdir()
            return self._in_new_arena(self._spilled, size, SHARED if shared else 0, self._spill_dir)
        except OSError as error:
            folder = self._spill_dir or "(none is known)"
            raise self.full(
                size, f"{why}; the spill folder {folder} cannot be used ({error})"
            ) from error

    def populate(
        self, arena: OwnArena, block: Block, pieces: Iterable[tuple[int, Bytes]] = ()
    ) -> bool:
        """Reserve what :meth:`allocate` has promised.  The caller holds the block, but not the lock.

        Parameters
        ----------
        arena, block
            What :meth:`allocate` or :meth:`spill` has returned.
        pieces : iterable, optional
            What to fill it with: where each begins in the block, and its bytes.

        Returns
        -------
        bool
            Whether the pieces have been written.

        Raises
        ------
        OSError
            There is no room after all.
        """
        file = arena in self._spilled or self._config.memory_backend == "file"
        return arena.populate(block.offset, pieces, file=file)

    def is_spilled(self, arena: OwnArena) -> bool:
        """Is it a spill file?"""
        return arena in self._spilled

    def full(self, requested: int, detail: str) -> StoreFullError:
        """The error that says that there is no room."""
        return StoreFullError(
            requested=requested, used=self.used, capacity=self.limit, detail=detail
        )

    def freed(self, arena: OwnArena, offset: int, *, keep_warm: bool) -> None:
        """A block is free."""
        in_use = self.resident - self.warm
        size = arena.free(offset)
        if not keep_warm or arena in self._spilled:
            arena.trim(0)
        else:
            config = self._config
            enough = max(config.warm_bytes, self._recent_peak(in_use) - (in_use - size))
            most = min(config.warm_share * self.limit, enough)
            if self.warm > most:
                self.trim(int(most))

    def _recent_peak(self, in_use: int) -> int:
        """The most memory that was in blocks at a time, this ``warm_seconds`` and in those before."""
        now = time.monotonic()
        seconds = self._config.warm_seconds
        if now >= self._peak_until:
            self._peaks = 0, self._peaks[0] if now < self._peak_until + seconds else 0
            self._peak_until = now + seconds
        self._peaks = max(self._peaks[0], in_use), self._peaks[1]
        return max(self._peaks)

    def trim(self, most: int) -> bool:
        """Give warm pages beyond ``most`` bytes back to the system; False if there were none."""
        before = self.warm
        left = most
        for arena in (*self._in_memory, *self._shared):
            left = max(0, left - arena.trim(left))
        return self.warm < before

    # ---------------------------------------------------------------- arenas

    def _in_arenas(
        self, arenas: Iterable[OwnArena], size: int, most_fresh: int, write: bool
    ) -> tuple[OwnArena, Block] | None:
        """A gap that costs at most so much more memory."""
        for arena in arenas:
            offset = arena.allocate(size)
            if offset is None:
                continue
            taken = round_up(size, arena.granule)
            if arena.promise(offset, taken, write=write) <= most_fresh:
                return arena, Block(arena.info.id, offset, taken)
            arena.break_promise(offset)
            arena.free(offset)
        return None

    def _in_new_arena(
        self,
        arenas: list[OwnArena],
        size: int,
        flags: int,
        folder: str | None = None,
        *,
        write: bool = False,
    ) -> tuple[OwnArena, Block]:
        config = self._config
        huge = self._huge_pages is True and folder is None
        granule = HUGE_PAGE if huge else PAGE
        largest = max((arena.info.size for arena in arenas), default=config.arena_min // 2)
        arena_size = round_up(max(min(2 * largest, config.arena_max), size), granule)
        backend = "file" if folder is not None else "huge" if huge else config.memory_backend
        segment = Segment.create(arena_size, backend, folder)
        info = ArenaInfo(
            int.from_bytes(os.urandom(8), "little"), arena_size, flags | (HUGE if huge else 0)
        )
        arena = OwnArena(info, segment, granule, self._collapser if backend == "memfd" else None)
        if self._huge_pages is not True:
            arena.advise(mmap.MADV_HUGEPAGE if self._huge_pages else mmap.MADV_NOHUGEPAGE)
        arenas.append(arena)
        found = self._in_arenas([arena], size, 1 << 62, write)
        assert found is not None
        return found
