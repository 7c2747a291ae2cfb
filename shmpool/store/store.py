"""The object store: blocks in use, who holds them, and objects that travel through them.

Data flow, for an object on its way out and in::

    dump:   object --pickle--> stream + buffers --locate or copy--> blocks --encode--> Payload
    load:   Payload --decode--> blocks --lease--> views --unpickle--> object

One lock (``_lock``) guards all books of a store; code that runs under it calls no user code and takes no other lock.
Finalizers only append to ``_pending`` and try, without waiting, to have it worked off (:meth:`ObjectStore._drain`);
whoever holds the lock looks again when it lets go, so nothing is forgotten.  Large copies happen outside the lock,
into blocks that are held already.

A block is held, counted in ``_holds``, by each payload that names it, each lease of a view, each ref, each entry of
``_written``, each peer that keeps it.  At zero a block of our own is free; one of a peer is reported to that peer
(see :mod:`shmpool.store.peer`).

After a fork the child's copy of a store is inert: it frees nothing, tells nobody, and its views stay readable.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shmpool.config import Config, parse_size
from shmpool.errors import RefError, StoreFullError, WireError
from shmpool.memory import dirty
from shmpool.memory.segment import Bytes, Mode, Segment, round_up
from shmpool.serialize.pickling import Pickling, What, loads
from shmpool.store import payload as wire_form
from shmpool.store.addresses import AddressTable
from shmpool.store.arena import Arena, OwnArena
from shmpool.store.blocks import ArenaInfo, Block, BlockKey
from shmpool.store.leases import Lease
from shmpool.store.limits import allowed_memory
from shmpool.store.payload import Layout, Span
from shmpool.store.peer import Peer
from shmpool.store.written import Written, WrittenKey, owner_of, same_bytes

__all__ = ["ObjectStore", "Payload", "StoreStats", "stores", "travelling"]

_ALIGN = 64


class _Travelling(threading.local):
    """What an object ref must know while something that contains it is pickled or unpickled in this thread."""

    store: ObjectStore | None = None
    #: Blocks of the refs met while pickling; None outside of it.
    carried: list[Block] | None = None
    mode: Mode = "c"


travelling = _Travelling()


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store did and holds, in bytes unless said otherwise.

    Attributes
    ----------
    bytes_copied : int
        Copied into the store by this process.
    bytes_shared : int
        Sent by reference, since they were in the store already.
    blocks, arenas : int
        Numbers of blocks held by this process, and of arenas open in it.
    used : int
        In blocks of this process's own arenas.
    resident : int
        Memory that those arenas cost, with freed pages that are kept warm.
    capacity : int
        What ``resident`` may grow to.
    """

    bytes_copied: int
    bytes_shared: int
    blocks: int
    arenas: int
    used: int
    resident: int
    capacity: int


class _Hold:
    __slots__ = ("block", "count", "credits", "reported")

    def __init__(self, block: Block) -> None:
        self.block = block
        self.count = 0
        self.credits = 0  # how many times the downstream owner counts it as lent to us
        self.reported = False  # we, a worker, told our parent that we keep it


class Payload:
    """An object in its travelling form.  Holds its blocks until :meth:`release`.

    Attributes
    ----------
    data : bytes
        What goes into a message.
    blocks : list of Block
    copied, shared : int
        Bytes of its buffers that were copied into the store, and that were there already.
    """

    __slots__ = ("_store", "blocks", "copied", "data", "shared")

    def __init__(self, store: ObjectStore, data: bytes | memoryview, blocks: list[Block], copied: int = 0, shared: int = 0) -> None:
        self._store = store
        self.data = data
        self.blocks = blocks
        self.copied = copied
        self.shared = shared

    def release(self) -> None:
        """Let go of the blocks.  May be called twice."""
        if self.blocks:
            blocks, self.blocks = self.blocks, []
            self._store.let_go(blocks)

    def release_later(self) -> None:
        """The same, from a finalizer: without waiting for a lock."""
        if self.blocks:
            self._store._gone(self)


class ObjectStore:
    """Shared memory for the arrays that pass between a process and its workers.

    Parameters
    ----------
    capacity : int or str, optional
        How much memory its blocks may take, in bytes or as a string such as "4GiB".  Default: 60 % of what the
        machine or the control group allows.
    config : Config, optional
        Tunables; default: from the environment.

    Raises
    ------
    ValueError, TypeError
        The capacity is no size.
    """

    def __init__(self, capacity: int | str | None = None, *, config: Config | None = None) -> None:
        self.config = config or Config.from_env()
        self.capacity: int = (
            int(allowed_memory() * self.config.capacity_share) if capacity is None else parse_size(capacity, "capacity")
        )
        self._lock = threading.Lock()  # guards everything below but _pending
        self._pending: deque[Lease | WrittenKey | Payload] = deque()
        self._own: list[OwnArena] = []
        self._arenas: dict[int, Arena] = {}  # own ones, too
        self._holds: dict[BlockKey, _Hold] = {}
        self._addresses: AddressTable[Lease] = AddressTable()
        self._written = Written(self._gone)
        self._peers: list[Peer] = []
        self._detector = dirty.choose(self.config.dirty_detector)
        self._copied = self._shared = 0
        self._users = 0  # executors that are running: freed pages stay warm while there are any
        self._inherited = False
        stores.add(self)

    # ---------------------------------------------------------------- objects out and in

    def wanted(self, buffer: memoryview) -> bool:
        """Is a buffer worth the store?  Smaller ones ride in the message."""
        return buffer.nbytes >= self.config.inline_limit

    def dump(self, obj: object, pickling: Pickling, what: What, epoch: object = None) -> Payload:
        """Bring ``obj`` into its travelling form.

        Parameters
        ----------
        obj : object
        pickling : Pickling
        what : What
            Which object it is, for errors.
        epoch : object, optional
            Arrays that were dumped with this same epoch before have not changed since.

        Raises
        ------
        SerializationError
            It cannot be pickled.
        StoreFullError
            There is no room.
        """
        outer = travelling.carried
        travelling.carried = carried = []
        travelling.store = self
        try:
            stream, buffers = pickling.dumps(obj, what)
        finally:
            travelling.carried = outer
        if not buffers and not carried and len(stream) < self.config.message_limit:
            return Payload(self, b"\0" + stream, [])
        return self._pack(stream, buffers, carried, epoch)

    def load(self, payload: Payload, mode: Mode) -> Any:
        """The object again, its large buffers as views of the store.

        Parameters
        ----------
        payload : Payload
            Still held by the caller.
        mode : {"c", "r"}
            Whether the views are private and writable, or read-only.
        """
        layout = wire_form.decode(payload.data)
        if layout.indirect:
            span = layout.spans[0]
            whole = self._view(layout.blocks[0], span.start, span.start + span.nbytes, "r")
            layout = wire_form.decode(memoryview(whole)[span.start : span.start + span.nbytes])
        buffers = self._buffers(layout, mode) if layout.spans else []
        outer = travelling.mode
        travelling.store, travelling.mode = self, mode
        try:
            return loads(layout.stream, buffers)
        finally:
            travelling.mode = outer

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
        if data[0] == wire_form.PLAIN:
            return Payload(self, data, [])
        blocks = wire_form.decode(data).blocks
        with self._books:
            for block in blocks:
                arena = self._arenas.get(block.arena)
                if arena is None or block.offset + block.size > arena.info.size:
                    raise WireError(f"a payload names {block}, which is in no arena that this process has")
            for block in blocks:
                hold = self._hold(block)
                if origin is not None and self._arenas[block.arena].origin is origin and not origin.upstream:
                    hold.credits += 1
        return Payload(self, data, blocks)

    def _pack(self, stream: bytes | memoryview, buffers: list[memoryview], carried: list[Block], epoch: object) -> Payload:
        blocks: list[Block] = []
        spans: list[Span | None] = []
        copied = shared = 0
        try:
            to_copy: list[tuple[int, Bytes]] = []  # (index in spans, bytes)
            for buffer in buffers:
                source = np.frombuffer(buffer, np.uint8)
                found = self._find(source, buffer, epoch)
                if found is None:
                    to_copy.append((len(spans), source))
                    spans.append(None)
                    copied += source.nbytes
                else:
                    block, start = found
                    spans.append(Span(len(blocks), start, source.nbytes))
                    blocks.append(block)
                    shared += source.nbytes
            for group in _grouped(to_copy, self.config.own_block):
                self._write(group, blocks, spans, buffers, epoch)
            with self._books:
                self._copied += copied
                self._shared += shared
                for block in carried:
                    self._hold(block)
                    blocks.append(block)
            data = wire_form.encode(stream, blocks, spans)  # type: ignore[arg-type]  # no None is left in spans
            if len(data) > self.config.message_limit:
                copied += len(data)
                block = self._allocate(len(data))
                blocks.insert(0, block)
                np.copyto(self._target(block, 0, len(data)), np.frombuffer(data, np.uint8))
                data = wire_form.encode_indirect(blocks, len(data))
        except BaseException:
            self.let_go(blocks)
            raise
        return Payload(self, data, blocks, copied, shared)

    def _find(self, source: Bytes, buffer: memoryview, epoch: object) -> tuple[Block, int] | None:
        """Where these bytes are in the store already: (block, now held, start in it)."""
        address = source.__array_interface__["data"][0]
        key = (address, source.nbytes)
        with self._books:
            lease = self._addresses.find(address, source.nbytes)
            if lease is not None:
                if lease.private and self._detector.is_dirty(address, source.nbytes):
                    return None
                self._hold(lease.block)
                first_byte = lease.mapping.start + address - lease.mapping.address
                return lease.block, first_byte - lease.block.offset
            entry = self._written.find(key)
            if entry is None:
                return None
            self._hold(entry.block)
        if entry.constant or (epoch is not None and entry.epoch is epoch):
            return entry.block, entry.start
        if same_bytes(source, self._target(entry.block, entry.start, source.nbytes)):
            entry.epoch = epoch
            return entry.block, entry.start
        self.let_go([entry.block])  # what is written anew will take the entry's place
        return None

    def _write(
        self, group: list[tuple[int, Bytes]], blocks: list[Block], spans: list[Span | None], buffers: list[memoryview], epoch: object
    ) -> None:
        """Copy a group of buffers into one new block, and note where they are."""
        starts, end = [], 0
        for _, source in group:
            starts.append(end)
            end = round_up(end + source.nbytes, _ALIGN)
        block = self._allocate(end)
        index = len(blocks)
        blocks.append(block)
        for (position, source), start in zip(group, starts, strict=True):
            np.copyto(self._target(block, start, source.nbytes), source)
            spans[position] = Span(index, start, source.nbytes)
            owner, constant = owner_of(buffers[position].obj)
            key = (source.__array_interface__["data"][0], source.nbytes)
            with self._books:
                if (stale := self._written.remove(key)) is not None:
                    self._unhold(stale)
                if self._written.add(key, owner, block, start, epoch, constant):
                    self._hold(block)

    def _buffers(self, layout: Layout, mode: Mode) -> list[memoryview]:
        """Views for the buffers of a payload.

        Buffers that were written together share a view of their block.  Where two buffers of one payload overlap (two
        views of one array that was in the store already) each has its own entry in ``blocks``, and so a view of its
        own: what is written into one is not seen in the other, as after any other pickling.
        """
        ranges: dict[int, tuple[int, int]] = {}
        for index, start, nbytes in layout.spans:
            first, last = ranges.get(index, (start, start))
            ranges[index] = min(first, start), max(last, start + nbytes)
        views = {
            index: memoryview(self._view(layout.blocks[index], first, last, mode))
            for index, (first, last) in ranges.items()
        }
        return [views[index][start : start + nbytes] for index, start, nbytes in layout.spans]

    def _view(self, block: Block, first: int, last: int, mode: Mode) -> Bytes:
        """A new exporter of a whole block, of which the taker will use ``[first, last)``."""
        with self._books:
            arena = self._arenas[block.arena]
            if arena.info.shared:
                mode = "r+"
            if mode != "c" or block.offset not in arena.taken:
                mapping = arena.kept_mapping(mode)
                if mode == "c":
                    arena.taken.add(block.offset)
                kept = mode == "c"
            else:
                # The kept mapping has a taker whose writes this one must not see.
                mapping = arena.segment.map(mode, block.offset, block.size)
                kept = False
            lease = Lease(block, mapping, block.offset, block.size, block.offset + first, block.offset + last, kept)
            view = mapping.array(block.offset, block.size)
            self._hold(block)
            self._addresses.add(lease)
            lease.watch(view, self._gone)
            return view

    # ---------------------------------------------------------------- blocks of our own

    def _allocate(self, nbytes: int) -> Block:
        """A new block, held once."""
        with self._books:
            block = self._allocate_locked(round_up(nbytes))
            self._hold(block)
            return block

    def _allocate_locked(self, size: int) -> Block:
        for arena in self._own:
            offset = arena.allocate(size)
            if offset is not None:
                break
        else:
            arena = self._new_arena(size)
            offset = arena.allocate(size)
            assert offset is not None
        try:
            fresh = arena.fresh(offset, size)
            if fresh:
                self._make_room(fresh, size)
                arena.populate(offset, size)
        except BaseException as error:
            arena.free(offset)
            if isinstance(error, OSError):
                raise self._full(size, f"the system has no more: {error}") from error
            raise
        return Block(arena.info.id, offset, size)

    def _new_arena(self, size: int) -> OwnArena:
        config = self.config
        doubled = 2 * self._own[-1].info.size if self._own else config.arena_min
        arena_size = round_up(max(min(doubled, config.arena_max), size))
        info = ArenaInfo(int.from_bytes(os.urandom(8), "little"), arena_size, shared=False)
        try:
            segment = Segment.create(arena_size, config.memory_backend)
        except OSError as error:
            raise self._full(size, f"the system gives no more: {error}") from error
        arena = OwnArena(info, segment)
        self._own.append(arena)
        self._arenas[info.id] = arena
        return arena

    def _make_room(self, fresh: int, requested: int) -> None:
        """Give back warm pages, and copies kept for later, until ``fresh`` more bytes are within the capacity."""
        def over() -> int:
            return sum(arena.resident for arena in self._own) + fresh - self.capacity

        while over() > 0:
            self._trim(0)
            if over() <= 0:
                return
            block = self._written.take_oldest()
            if block is None:
                raise self._full(requested, "that is all it may take")
            self._unhold(block)

    def _full(self, requested: int, detail: str) -> StoreFullError:
        used = sum(arena.used for arena in self._own)
        return StoreFullError(requested=requested, used=used, capacity=self.capacity, detail=detail)

    def _target(self, block: Block, start: int, nbytes: int) -> Bytes:
        """Bytes of a block of ours that the caller holds, to be written by its maker, or compared."""
        arena = self._arenas[block.arena]
        assert isinstance(arena, OwnArena)
        return arena.writable(block.offset + start, nbytes)

    def _trim(self, most: int) -> None:
        for arena in self._own:
            most = max(0, most - arena.trim(most))

    # ---------------------------------------------------------------- holding

    @property
    def _books(self) -> _Books:
        return _Books(self)

    def _hold(self, block: Block) -> _Hold:
        key = block[:2]
        hold = self._holds.get(key)
        if hold is None:
            hold = self._holds[key] = _Hold(block)
            self._arenas[block.arena].held += 1
        hold.count += 1
        return hold

    def _unhold(self, block: Block) -> None:
        key = block[:2]
        hold = self._holds[key]
        hold.count -= 1
        if hold.count:
            return
        del self._holds[key]
        arena = self._arenas[block.arena]
        arena.held -= 1
        if isinstance(arena, OwnArena):
            arena.free(block.offset)
            if not self._users:
                self._trim(0)
        else:
            origin = arena.origin
            assert origin is not None
            if hold.reported:
                origin.to_release.append(block)
            elif hold.credits:
                origin.to_free.append((block.arena, block.offset, hold.credits))
            if arena.orphaned and not arena.held:
                self._detach(arena)

    def let_go(self, blocks: Iterable[Block]) -> None:
        """Hold each of ``blocks`` once less."""
        with self._books:
            for block in blocks:
                self._unhold(block)

    def _gone(self, item: Lease | WrittenKey | Payload) -> None:
        """The last user of a view, the array that a copy was made of, or the owner of a payload is gone.

        Called by weak references wherever that happens: in any thread, inside any lock, at interpreter exit.
        """
        self._pending.append(item)
        self._settle()

    def _settle(self) -> None:
        """Work off what finalizers have left, unless somebody holds the lock: then they will."""
        while self._pending and self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()

    def _drain(self) -> None:
        while self._pending:
            gone = self._pending.popleft()
            if self._inherited:
                continue
            if isinstance(gone, Payload):
                for block in gone.blocks:
                    self._unhold(block)
                gone.blocks = []
                continue
            if isinstance(gone, tuple):
                if (stale := self._written.remove_dead(gone)) is not None:
                    self._unhold(stale)
                continue
            lease, block = gone, gone.block
            self._addresses.remove(lease)
            if lease.kept:
                if self._detector.is_dirty(lease.first, lease.last - lease.first):
                    lease.mapping.drop_private_pages(block.offset, block.offset + block.size)
                self._arenas[block.arena].taken.discard(block.offset)
            lease.end()
            self._unhold(block)

    # ---------------------------------------------------------------- peers

    def add_peer(self, peer: Peer) -> None:
        """Begin to deal with the process at the other end of a channel."""
        with self._books:
            self._peers.append(peer)

    def introduce(self, peer: Peer, blocks: Iterable[Block]) -> list[tuple[ArenaInfo, int]]:
        """The arenas of ``blocks`` that ``peer`` may not know, each with a descriptor that the caller must close."""
        unknown = {block.arena for block in blocks} - peer.knows
        found: list[tuple[ArenaInfo, int]] = []
        if unknown:
            with self._books:
                for arena_id in unknown:
                    arena = self._arenas[arena_id]
                    if arena.origin is peer:
                        continue
                    fd = os.dup(arena.segment.fd) if arena.info.shared else arena.segment.open_readonly()
                    found.append((arena.info, fd))
        return found

    def meet(self, info: ArenaInfo, fd: int, origin: Peer) -> None:
        """Take in an arena that ``origin`` handed over; the descriptor is the store's now, known arena or not."""
        segment = Segment(fd, info.size)
        with self._books:
            if info.id in self._arenas:
                segment.close()
                return
            if os.fstat(fd).st_size < info.size:
                raise WireError(f"{info} has only {os.fstat(fd).st_size} bytes")
            self._arenas[info.id] = Arena(info, segment, origin)

    def forget(self, arena_ids: Iterable[int]) -> None:
        """Drop arenas that ``origin`` says are of no more use, each as soon as no block of it is held."""
        with self._books:
            for arena_id in arena_ids:
                arena = self._arenas.get(arena_id)
                if arena is None or isinstance(arena, OwnArena):
                    continue
                arena.orphaned = True
                if not arena.held:
                    self._detach(arena)

    def freed(self, freed: Iterable[tuple[int, int, int]]) -> None:
        """The parent has let go of blocks that were sent to it: (arena, offset, how often sent)."""
        with self._books:
            for arena_id, offset, times in freed:
                hold = self._holds[arena_id, offset]
                for _ in range(times):
                    self._unhold(hold.block)

    def lend(self, payload: Payload, peer: Peer) -> None:
        """A result is about to be sent upstream: what comes from there needs no hold, the rest stays held as lent."""
        with self._books:
            for block in payload.blocks:
                if self._arenas[block.arena].origin is peer:
                    self._unhold(block)

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

    def peer_keeps(self, peer: Peer, kept: Iterable[Block], released: Iterable[Block]) -> None:
        """A worker has said which blocks of its task it keeps, and which earlier ones it has let go of.

        Raises
        ------
        WireError
            It names a block that it cannot have.
        """
        with self._books:
            for block in kept:
                key = block[:2]
                if key not in self._holds:
                    raise WireError(f"a worker keeps {block}, which was not lent to it")
                if key not in peer.keeps:
                    peer.keeps.add(key)
                    self._hold(self._holds[key].block)
            for block in released:
                key = block[:2]
                if key in peer.keeps:
                    peer.keeps.remove(key)
                    self._unhold(self._holds[key].block)

    def take_releases(self, peer: Peer) -> list[Block]:
        """What this worker has to tell its parent: blocks kept earlier and let go of since."""
        if not peer.to_release:
            return []
        with self._books:
            released, peer.to_release = peer.to_release, []
            return released

    def take_frees(self, peer: Peer, most: int) -> tuple[list[tuple[int, int, int]], list[int]]:
        """What to tell a worker: blocks of its that are free, arenas that it need not keep; at most so many each."""
        if not peer.to_free and not peer.to_forget:
            return [], []
        with self._books:
            freed, peer.to_free = peer.to_free[:most], peer.to_free[most:]
            forgotten, peer.to_forget = peer.to_forget[:most], peer.to_forget[most:]
            return freed, forgotten

    def untake_frees(self, peer: Peer, freed: list[tuple[int, int, int]], forgotten: list[int]) -> None:
        """The message with these did not arrive: they are still to be told."""
        with self._books:
            peer.to_free[:0] = freed
            peer.to_forget[:0] = forgotten

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

    def _detach(self, arena: Arena) -> None:
        del self._arenas[arena.info.id]
        arena.close()
        for peer in self._peers:
            if arena.info.id in peer.knows:
                peer.knows.discard(arena.info.id)
                peer.to_forget.append(arena.info.id)

    # ---------------------------------------------------------------- life

    def start_use(self) -> None:
        """An executor begins to use the store: from now on freed pages are kept warm."""
        with self._books:
            self._users += 1

    def end_use(self) -> None:
        """An executor is done with the store; after the last one freed memory goes back to the system at once."""
        with self._books:
            self._users -= 1
            if not self._users:
                while (block := self._written.take_oldest()) is not None:
                    self._unhold(block)
                self._trim(0)

    def pin_views(self) -> Payload:
        """Hold every block that has a view now, for children about to be forked that may look at them."""
        with self._books:
            blocks = [lease.block for lease in self._addresses]
            for block in blocks:
                self._hold(block)
        return Payload(self, b"", blocks)

    def stats(self) -> StoreStats:
        """What the store did and holds."""
        with self._books:
            return StoreStats(
                bytes_copied=self._copied,
                bytes_shared=self._shared,
                blocks=len(self._holds),
                arenas=len(self._arenas),
                used=sum(arena.used for arena in self._own),
                resident=sum(arena.resident for arena in self._own),
                capacity=self.capacity,
            )

    def _after_fork_in_child(self) -> None:
        self._inherited = True
        self._lock = threading.Lock()
        self._pending.clear()


class _Books:
    """Holding a store's lock, with what finalizers have left worked off on the way in and out."""

    __slots__ = ("_store",)

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def __enter__(self) -> None:
        store = self._store
        store._lock.acquire()
        if store._pending:
            store._drain()

    def __exit__(self, *_: object) -> None:
        store = self._store
        store._lock.release()
        if store._pending:
            store._settle()


def _grouped(items: list[tuple[int, Bytes]], own_block: int) -> list[list[tuple[int, Bytes]]]:
    """Large buffers one by one, small ones together."""
    small = [item for item in items if item[1].nbytes < own_block]
    groups = [[item] for item in items if item[1].nbytes >= own_block]
    return [*groups, small] if small else groups


stores: weakref.WeakSet[ObjectStore] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for store in list(stores):
        store._after_fork_in_child()
    stores.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
