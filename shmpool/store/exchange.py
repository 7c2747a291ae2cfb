"""Lending blocks to other processes and borrowing theirs: the protocol of :mod:`shmpool.store.peer`, in the books."""

from __future__ import annotations

import os
from collections.abc import Iterable

from shmpool.errors import WireError
from shmpool.memory.segment import HUGE_PAGE, PAGE, Segment
from shmpool.store import payload as wire_form
from shmpool.store.arena import Arena, OwnArena
from shmpool.store.blocks import ArenaInfo, Block
from shmpool.store.books import Books, Payload
from shmpool.store.payload import Layout
from shmpool.store.peer import Peer

__all__ = ["Exchange"]


class Exchange(Books):
    """Dealings with peers.  A part of :class:`~shmpool.store.store.ObjectStore`."""

    #: How much memory the store, with those of its workers, may take.
    capacity: int

    def add_peer(self, peer: Peer) -> None:
        """Begin to deal with the process at the other end of a channel."""
        with self._books:
            self._peers.append(peer)

    def lost_peer(self, peer: Peer) -> None:
        """The other end is gone: its claims end, its arenas live on as long as blocks of them are held here."""
        with self._books:
            if not peer.alive:
                return
            peer.alive = False
            self._peers.remove(peer)
            for key in peer.keeps:
                self._unhold(self._holds[key].block)
            peer.keeps.clear()
            for arena in list(self._arenas.values()):
                if arena.origin is peer:
                    arena.orphaned = True
                    if not arena.held:
                        self._detach(arena)
            self._share_capacity()

    # ---------------------------------------------------------------- arenas

    def introduce(self, peer: Peer, blocks: Iterable[Block]) -> list[tuple[ArenaInfo, int]]:
        """The arenas of ``blocks`` that ``peer`` may not know, each with a descriptor that the caller must close."""
        unknown = {block.arena for block in blocks} - peer.knows
        found: list[tuple[ArenaInfo, int]] = []
        if unknown:
            with self._books:
                try:
                    for arena_id in unknown:
                        arena = self._arenas[arena_id]
                        if arena.origin is not peer:
                            found.append((arena.info, arena.descriptor_for_others()))
                except OSError:
                    for _, fd in found:
                        os.close(fd)
                    raise
        return found

    def meet(self, info: ArenaInfo, fd: int, origin: Peer) -> None:
        """Take in an arena that ``origin`` handed over; the descriptor is the store's now, known arena or not.

        Raises
        ------
        WireError
            It is not what it should be: to read it could be a SIGBUS.
        """
        try:
            segment = Segment.from_another(fd, info.size)
        except (ValueError, OSError) as error:
            raise WireError(f"{info} is no arena: {error}") from error
        with self._books:
            if info.id in self._arenas:
                segment.close()
            else:
                self._arenas[info.id] = Arena(info, segment, origin)

    def forget(self, arena_ids: Iterable[int]) -> None:
        """Drop arenas that the parent says are of no more use, each as soon as no block of it is held."""
        with self._books:
            for arena_id in arena_ids:
                arena = self._arenas.get(arena_id)
                if arena is None or isinstance(arena, OwnArena):
                    continue
                arena.orphaned = True
                if not arena.held:
                    self._detach(arena)

    # ---------------------------------------------------------------- blocks that come

    def receive(self, data: bytes | memoryview, origin: Peer | None) -> Payload:
        """Take a payload that came in a message; its blocks are held from now on.

        Parameters
        ----------
        data : bytes-like
        origin : Peer or None
            Who sent it; None for a payload that this process has kept itself.

        Raises
        ------
        WireError
            It is no payload, or names an arena that this process does not have.
        """
        if len(data) and data[0] == wire_form.PLAIN:
            return Payload(self, data)
        layout = wire_form.decode(data)
        if not layout.blocks:
            return Payload(self, data, layout=layout)
        with self._books:
            blocks = self._receive_blocks(layout.blocks, origin)
            if layout.indirect:
                try:
                    inner = wire_form.decode(self._read(layout))
                    blocks += self._receive_blocks(inner.blocks, origin)
                except BaseException:
                    for block in blocks:
                        self._unhold(block)
                    raise
        return Payload(self, data, blocks, layout=layout)

    def _receive_blocks(self, blocks: list[Block], origin: Peer | None) -> list[Block]:
        for block in blocks:
            self._check(block, origin)
        for block in blocks:
            hold = self._hold(block)
            if origin is not None and not origin.upstream:
                hold.credits += self._arenas[block.arena].origin is origin
        return list(blocks)

    def _read(self, layout: Layout) -> memoryview:
        """What an indirect payload refers to, by the mapping that stays in place; its block must be held."""
        (block,), (span,) = layout.blocks, layout.spans
        mapping = self._arenas[block.arena].kept_mapping("r")
        return mapping.array(block.offset + span.start, span.nbytes).data

    def _check(self, block: Block, origin: Peer | None) -> None:
        arena = self._arenas.get(block.arena)
        if arena is None or block.offset + block.size > arena.info.size:
            raise WireError(f"a payload names {block}, which is in no arena that this process has")
        hold = self._holds.get(block[:2])
        if hold is None and (isinstance(arena, OwnArena) or arena.origin is not origin):
            raise WireError(f"a payload names {block}, which is not in use")
        if hold is None and (not block.size or (block.offset | block.size) % PAGE):
            raise WireError(f"a payload names {block}, which is not made of pages")
        if hold is not None and hold.block != block:
            raise WireError(f"a payload names {block}, where {hold.block} is")

    # ---------------------------------------------------------------- a worker's side

    def lend(self, payload: Payload, peer: Peer) -> None:
        """A result is about to be sent upstream: what comes from there needs no hold, the rest stays held as lent."""
        with self._books:
            for block in payload.blocks:
                if self._arenas[block.arena].origin is peer:
                    self._unhold(block)

    def freed(self, freed: Iterable[tuple[int, int, int]]) -> None:
        """The parent has let go of blocks that were sent to it: (arena, offset, how often sent)."""
        with self._books:
            for arena_id, offset, times in freed:
                hold = self._holds[arena_id, offset]
                for _ in range(times):
                    self._unhold(hold.block)

    def holds_any(self, blocks: Iterable[Block]) -> bool:
        """Is one of these held still?"""
        with self._books:
            return any(block[:2] in self._holds for block in blocks)

    def kept_after(self, blocks: Iterable[Block]) -> list[Block]:
        """Of the blocks that came with a task, those that this worker still holds and has not reported yet."""
        kept = []
        with self._books:
            for block in blocks:
                hold = self._holds.get(block[:2])
                if hold is None or hold.reported:
                    continue
                origin = self._arenas[block.arena].origin
                if origin is not None and origin.upstream:
                    hold.reported = True
                    kept.append(block)
        return kept

    def take_releases(self, peer: Peer) -> list[Block]:
        """What this worker has to tell its parent: blocks kept earlier and let go of since."""
        if not peer.to_release:
            return []
        with self._books:
            released, peer.to_release = peer.to_release, []
            return released

    # ---------------------------------------------------------------- a parent's side

    def peer_keeps(self, peer: Peer, kept: Iterable[Block], released: Iterable[Block]) -> None:
        """A worker has said which blocks of its task it keeps, and which earlier ones it has let go of.

        Raises
        ------
        WireError
            It names a block that it cannot have.
        """
        with self._books:
            # Released first: a block that was let go of may have come again, and have been kept again.
            for block in released:
                key = block[:2]
                if key in peer.keeps:
                    peer.keeps.remove(key)
                    self._unhold(self._holds[key].block)
            for block in kept:
                key = block[:2]
                if key not in self._holds:
                    raise WireError(f"a worker keeps {block}, which was not lent to it")
                if key not in peer.keeps:
                    peer.keeps.add(key)
                    self._hold(self._holds[key].block)

    def take_frees(self, peer: Peer, most: int) -> tuple[list[tuple[int, int, int]], list[int]]:
        """What to tell a worker: blocks of its that are free, arenas that it need not keep; at most so many each."""
        if not peer.to_free and not peer.to_forget:
            return [], []
        with self._books:
            freed, peer.to_free = peer.to_free[:most], peer.to_free[most:]
            forgotten, peer.to_forget = peer.to_forget[:most], peer.to_forget[most:]
            return freed, forgotten

    def untake_frees(
        self, peer: Peer, freed: list[tuple[int, int, int]], forgotten: list[int]
    ) -> None:
        """The message with these did not arrive: they are still to be told."""
        with self._books:
            peer.to_free[:0] = freed
            peer.to_forget[:0] = forgotten

    # ---------------------------------------------------------------- capacity

    @property
    def resident(self) -> int:
        """Bytes of memory that this process's arenas cost now."""
        return self._heap.resident

    def peer_resident(self, peer: Peer, resident: int) -> None:
        """A worker has said how much memory its arenas cost.

        Raises
        ------
        WireError
            More than it can be: it would leave no room for the others.
        """
        # It keeps below what it is told, which is never more than the capacity, but for what is rounded up.
        if resident > 2 * self.capacity + HUGE_PAGE:
            raise WireError(f"a worker says that its arenas cost {resident:,} bytes")
        if resident != peer.resident:
            with self._books:
                peer.resident = resident
                self._share_capacity()

    def room_for(self, peer: Peer) -> int:
        """How much memory a worker's arenas may take: the capacity less what all others have in use.

        Messages cross, so all together can pass the capacity for a moment, by what the workers allocate meanwhile.
        """
        return max(0, self._heap.limit - self._heap.resident + peer.resident)

    def set_capacity(self, capacity: int) -> None:
        """The parent says how much memory this worker may take."""
        if capacity != self.capacity:
            with self._books:
                self.capacity = capacity
                self._share_capacity()

    def _share_capacity(self) -> None:
        heap = self._heap
        heap.limit = self.capacity - sum(peer.resident for peer in self._peers)
        if heap.resident > heap.limit:
            heap.trim(0)
