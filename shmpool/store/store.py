"""The object store: objects travel through blocks of shared memory.

Data flow, for an object on its way out and in::

    dump:   object --pickle--> stream + buffers --locate or copy--> blocks --encode--> Payload
    load:   Payload --decode--> blocks --lease--> views --unpickle--> object

:class:`~shmpool.store.books.Books` keeps who holds which block, :class:`~shmpool.store.exchange.Exchange` deals with
other processes, :class:`~shmpool.store.heap.Heap` finds room; here they are put together.  Large copies happen outside
the lock, into blocks that are held already.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from shmpool.config import Config, parse_size
from shmpool.errors import RefError, WireError
from shmpool.interrupts import hear, heard, whole
from shmpool.memory import bulk
from shmpool.memory.intervals import IntervalSet
from shmpool.memory.segment import HUGE_PAGE, Bytes, Mode, Segment, address_of, round_up
from shmpool.serialize.atoms import dump_atoms
from shmpool.serialize.bare import BARE
from shmpool.serialize.pickling import Pickling, What, loads
from shmpool.store import payload as wire_form
from shmpool.store.arena import OwnArena
from shmpool.store.blocks import Block, BlockKey
from shmpool.store.books import Payload, stores
from shmpool.store.exchange import Exchange
from shmpool.store.heap import Heap, HugePages
from shmpool.store.limits import allowed_memory
from shmpool.store.payload import Layout, Span
from shmpool.store.written import Epoch, WrittenKey, key_of, owner_of

__all__ = ["ObjectStore", "Payload", "StoreStats", "stores", "travelling"]

_ALIGN = 64


class _Travelling(threading.local):
    """What an object ref must know while something that contains it is pickled or unpickled in this thread."""

    store: ObjectStore | None = None
    #: Blocks of the refs met while pickling; None outside of it.
    carried: list[Block] | None = None


travelling = _Travelling()


class Plan(NamedTuple):
    """What is to become of the buffers of a payload."""

    #: Where each of them lies; None: where is not known yet, it is to be copied.
    spans: list[Span | None]
    #: Those to copy, each group into one new block: indices in `spans`, and the bytes.
    groups: list[list[tuple[int, Bytes]]]
    riding: list[memoryview]
    copied: int
    shared: int


class StoreStats(NamedTuple):
    """What a store did and holds, in bytes unless said otherwise.

    Attributes
    ----------
    bytes_copied : int
        Copied into the store by this process.
    bytes_shared : int
        Sent by reference, since they were in the store already.
    blocks, arenas : int
        Numbers of blocks held by this process, and of arenas open in it.
    holders : dict of str to int
        How many claims there are on those blocks, by who has them: "views" (arrays of this process), "workers" (kept
        by a worker beyond its task), "copies" (kept in case the same array comes again), "others" (payloads of tasks
        under way, object refs).
    used : int
        In blocks of this process's own arenas.
    resident : int
        Memory that those arenas cost, with freed pages that are kept warm.
    spilled : int
        Of the used bytes, those that are in spill files.
    resident_in_workers : int
        Memory that the workers' arenas cost, as they last said.
    capacity : int
        What ``resident`` and ``resident_in_workers`` may grow to, together.
    """

    bytes_copied: int
    bytes_shared: int
    blocks: int
    arenas: int
    holders: dict[str, int]
    used: int
    resident: int
    spilled: int
    resident_in_workers: int
    capacity: int


class ObjectStore(Exchange):
    """Shared memory for the arrays that pass between a process and its workers.

    Parameters
    ----------
    capacity : int or str, optional
        How much memory the blocks of this process and of its workers may take, in bytes or as a string such as
        "4GiB".  Default: 60 % of what the machine or the control group allows.
    spill_dir : str, path object or False, optional
        Folder for what goes beyond the capacity, as files without names.  None (default): the temporary folder.
        False: nothing is spilled.
    huge_pages : {"auto", True, False}
        ``"auto"`` (default) asks for transparent huge pages where the system gives them.  ``True`` uses reserved huge
        pages; each private view of a block takes as many again.  ``False`` asks for none.
    config : Config, optional
        Tunables; default: from the environment.

    Raises
    ------
    ValueError, TypeError
        An argument makes no sense.
    RuntimeError
        ``huge_pages=True``, and the system has none reserved; the message says what to configure.
    """

    def __init__(
        self,
        capacity: int | str | None = None,
        spill_dir: str | os.PathLike[str] | Literal[False] | None = None,
        huge_pages: HugePages = "auto",
        *,
        config: Config | None = None,
    ) -> None:
        config = config or Config.from_env()
        if not isinstance(huge_pages, bool) and huge_pages != "auto":
            raise ValueError(f"huge_pages must be 'auto', True or False, not {huge_pages!r}")
        self.capacity = (
            int(allowed_memory() * config.capacity_share)
            if capacity is None
            else parse_size(capacity, "capacity")
        )
        self.spill_dir = _folder(spill_dir)
        self.huge_pages: HugePages = huge_pages
        if huge_pages is True:
            _try_huge_pages()
        super().__init__(config, Heap(config, self.capacity, self.spill_dir, huge_pages))

    # ---------------------------------------------------------------- objects out

    def wanted(self, buffer: memoryview) -> bool:
        """Does a buffer travel out of band: through the store, or riding beside the pickle stream?

        Raises
        ------
        RefError
            It is shared by all processes, but lies in another store of this one, whose arenas the receiver does not
            know: it would arrive as a private copy, and what is written into that would be lost without a word.
        """
        if len(stores) > 1 and self._is_shared_elsewhere(buffer):
            raise RefError(
                "an array of shmpool.empty, zeros or asarray is shared only through the store that it was made in, and "
                "this is another: make it with store= the executor's, or send a copy of it (a.copy())"
            )
        return buffer.nbytes >= self.config.ride_limit or not self._rides(buffer)

    def _rides(self, buffer: memoryview) -> bool:
        """Does a buffer ride in the message?  Small ones do, unless they are shared by all."""
        return buffer.nbytes < self.config.inline_limit and not (
            self._shared_views > 0 and self.located(buffer)
        )

    def _is_shared_elsewhere(self, buffer: memoryview) -> bool:
        return any(
            store.is_shared(np.frombuffer(buffer, np.uint8))
            for store in list(stores)
            if store is not self and store._shared_views and isinstance(store, ObjectStore)
        )

    def located(self, buffer: memoryview) -> bool:
        """Is a buffer in the store already, so that it travels by reference?"""
        source = np.frombuffer(buffer, np.uint8)
        with self._books:
            return self._locate(source) is not None

    def dump(
        self, obj: object, pickling: Pickling, what: What, epoch: Epoch | None = None
    ) -> Payload:
        """Bring ``obj`` into its travelling form.

        Parameters
        ----------
        obj : object
        pickling : Pickling
        what : What
            Which object it is, for errors.
        epoch : Epoch, optional
            Arrays that were dumped with this same epoch before have not changed since, while it lasts.

        Raises
        ------
        SerializationError
            It cannot be pickled.
        StoreFullError
            There is no room.
        """
        atoms = dump_atoms(obj, self.config.message_limit)
        if atoms is not None:
            return Payload(self, b"\0" + atoms)
        payload: Payload | None = None
        try:
            # Once, not for each lock that is taken: that would take a microsecond and a half.
            with whole:
                payload = self._dump(obj, pickling, what, epoch)
        except BaseException:
            if payload is not None:  # Ctrl-C came meanwhile
                payload.release()
            raise
        return payload

    def _dump(self, obj: object, pickling: Pickling, what: What, epoch: Epoch | None) -> Payload:
        outer = travelling.store, travelling.carried
        carried: list[Block] = []
        travelling.store, travelling.carried = self, carried
        try:
            with heard():  # it may be code of the user's, and take any time
                stream, buffers = pickling.dumps(obj, what)
        except BaseException:
            self.let_go(carried)
            raise
        finally:
            travelling.store, travelling.carried = outer
        if epoch is not None and not (epoch.lasts and stream[0][:1] == BARE):
            epoch.lasts = False  # code of the user's may have run
            epoch = None
        if not buffers and not carried:
            if len(stream) == 1:
                if len(stream[0]) < self.config.message_limit:
                    return Payload(self, b"\0" + stream[0])
            elif sum(map(len, stream)) < self.config.message_limit:
                return Payload(self, b"".join((b"\0", *stream)))
        return self._pack(stream, buffers, carried, epoch)

    def plan(
        self, buffers: list[memoryview], blocks: list[Block], epoch: Epoch | None = None
    ) -> Plan:
        """What is to become of the buffers of a payload.  Nothing is copied yet.

        Parameters
        ----------
        buffers : list
        blocks : list
            The payload's blocks, held already; those in which buffers were found are added, held.  If this fails, all
            are let go of, and none is left in the list.
        epoch : Epoch, optional
            As for :meth:`dump`.
        """
        spans: list[Span | None] = []
        to_copy: list[tuple[int, Bytes]] = []  # (index in spans, bytes)
        entries: dict[BlockKey, list[tuple[int, IntervalSet]]] = {}
        riding: list[memoryview] = []
        copied = shared = ridden = 0
        try:
            for buffer in buffers:
                hear()
                if self._rides(buffer):
                    riding.append(buffer)
                    spans.append(Span(wire_form.RIDING, ridden, buffer.nbytes))
                    ridden += buffer.nbytes
                    continue
                source = np.frombuffer(buffer, np.uint8)
                found = self._find(source, key_of(buffer.obj, source), epoch)
                if found is None:
                    to_copy.append((len(spans), source))
                    spans.append(None)
                    copied += source.nbytes
                else:
                    block, start = found
                    index = _entry_for(block, start, start + source.nbytes, entries, len(blocks))
                    if index == len(blocks):
                        blocks.append(block)
                    else:
                        self.let_go([block])
                    spans.append(Span(index, start, source.nbytes))
                    shared += source.nbytes
        except BaseException:
            self.let_go(blocks)
            blocks.clear()
            raise
        return Plan(spans, _grouped(to_copy, self.config.own_block), riding, copied, shared)

    def is_too_long(self, nbytes: int) -> bool:
        """Does an encoded payload of this length go through the store, since it is too long for a message?"""
        return nbytes > self.config.message_limit

    def _pack(
        self,
        stream: list[bytes | memoryview],
        buffers: list[memoryview],
        carried: list[Block],
        epoch: Epoch | None,
    ) -> Payload:
        blocks = carried  # held already
        try:
            spans, groups, riding, copied, shared = self.plan(buffers, blocks, epoch)
            for group in groups:
                hear()
                self._write(group, blocks, spans, buffers, epoch)
            chunks = wire_form.encode(stream, blocks, spans, riding)  # type: ignore[arg-type]  # no None is left
            nbytes = sum(map(len, chunks))
            if self.is_too_long(nbytes):
                copied += nbytes
                with self._books:
                    self._copied += nbytes
                chunks = [self._indirect(chunks, nbytes, blocks)]
            if shared:
                with self._books:
                    self._shared += shared
        except BaseException:
            self.let_go(blocks)
            raise
        return Payload(self, b"".join(chunks), blocks, copied, shared)

    def _find(
        self, source: Bytes, key: WrittenKey, epoch: Epoch | None
    ) -> tuple[Block, int] | None:
        """Where these bytes are in the store already: (block, now held, start in it)."""
        with self._books:
            found = self._locate(source)
            if found is not None:
                self._hold(found[0])
                return found
            entry = self._written.find(key)
            if entry is None:
                return None
            self._hold(entry.block)
            if self._last_use:
                self._used_now()
            if entry.constant or (epoch is not None and entry.epoch is epoch):
                return entry.block, entry.start
            is_unwritten = self._written.is_unwritten(key, entry)
            watched = entry.watched
        target = self._target(entry.block, entry.start, source.nbytes)
        if is_unwritten:
            assert watched is not None
            head, tail = watched.start - key[0], watched.stop - key[0]
            is_same = bulk.same(source[:head], target[:head]) and bulk.same(
                source[tail:], target[tail:]
            )
        else:
            is_same = bulk.same(source, target)
        if is_same:
            entry.compared(watched, epoch)
            return entry.block, entry.start
        self.let_go([entry.block])  # what is written anew will take the entry's place
        return None

    def _locate(self, source: Bytes) -> tuple[Block, int] | None:
        """In which block these bytes lie, and where, if they are as the store has them."""
        address = address_of(source)
        lease = self._addresses.find(address, source.nbytes)
        if lease is None or (lease.private and self._detector.is_dirty(address, source.nbytes)):
            return None
        return (
            lease.block,
            lease.mapping.start + address - lease.mapping.address - lease.block.offset,
        )

    def _write(
        self,
        group: list[tuple[int, Bytes]],
        blocks: list[Block],
        spans: list[Span | None],
        buffers: list[memoryview],
        epoch: Epoch | None,
    ) -> None:
        """Copy a group of buffers into one new block, and note where they are."""
        starts, end = [], 0
        for _, source in group:
            starts.append(end)
            end = round_up(end + source.nbytes, _ALIGN)
        block = self._allocate(
            end, pieces=[(start, source) for (_, source), start in zip(group, starts, strict=True)]
        )
        index = len(blocks)
        blocks.append(block)
        for (position, source), start in zip(group, starts, strict=True):
            spans[position] = Span(index, start, source.nbytes)
            owner, constant = owner_of(buffers[position].obj)
            key = key_of(buffers[position].obj, source)
            with self._books:
                self._copied += source.nbytes
                if (stale := self._written.take(key)) is not None:
                    self._unhold(stale.block)
                if self._written.add(key, owner, block, start, epoch, constant, stale):
                    self._hold(block)

    def _indirect(
        self, chunks: list[bytes | memoryview], nbytes: int, blocks: list[Block]
    ) -> bytes:
        """Write a payload that is too long for a message into the store; return what goes into the message."""
        pieces, start = [], 0
        for chunk in chunks:
            pieces.append((start, np.frombuffer(chunk, np.uint8)))
            start += len(chunk)
        block = self._allocate(nbytes, pieces=pieces)
        blocks.append(block)
        return wire_form.encode_indirect(block, nbytes)

    def carry(self, payload: Payload) -> bytes:
        """A ref to this payload is being pickled: what is made of it shall hold the blocks as well."""
        carried = travelling.carried
        if carried is None or travelling.store is not self:
            raise RefError(
                "an ObjectRef travels only in the arguments and results of an executor that uses the same store; "
                "elsewhere, send ref.get()"
            )
        with self._books:
            for block in payload.blocks:
                self._hold(block)
                carried.append(block)
        return bytes(payload.data)

    # ---------------------------------------------------------------- objects in

    def load(self, payload: Payload, mode: Mode, read: Callable[..., Any] = loads) -> Any:
        """The object again, its large buffers as views of the store.

        Parameters
        ----------
        payload : Payload
            Still held by the caller.
        mode : {"c", "r"}
            Whether the views are private and writable, or read-only.
        read : callable
            Given the stream and the buffers, makes the object, or something else, of them.
        """
        data = payload.data
        if len(data) and data[0] == wire_form.PLAIN:
            stream: bytes | bytearray | memoryview = (
                data[1:] if type(data) is memoryview else memoryview(data)[1:]
            )
            buffers: list[memoryview] = []
        else:
            layout = payload.layout or wire_form.decode(data)
            if layout.indirect:
                layout = wire_form.decode(self._read(layout))
                if not set(layout.blocks) <= set(payload.blocks):
                    raise WireError("a payload has changed since it came")
            stream = layout.stream
            buffers = self._buffers(layout, mode) if layout.spans else []
        outer, travelling.store = travelling.store, self
        try:
            return read(stream, buffers)
        finally:
            travelling.store = outer

    def _buffers(self, layout: Layout, mode: Mode) -> list[memoryview]:
        """Views for the buffers of a payload.

        Buffers that were written together share a view of their block.  Where two buffers of one payload overlap (two
        views of one array that was in the store already) each has its own entry in ``blocks``, and so a view of its
        own: what is written into one is not seen in the other, as after any other pickling.
        """
        ranges: dict[int, tuple[int, int]] = {}
        for index, start, nbytes in layout.spans:
            if index == wire_form.RIDING:
                continue
            first, last = ranges.get(index, (start, start))
            ranges[index] = min(first, start), max(last, start + nbytes)
        views = {
            index: self._view(layout.blocks[index], first, last, mode).data
            for index, (first, last) in ranges.items()
        }
        return [
            memoryview(bytearray(layout.riding[start : start + nbytes]))
            if index == wire_form.RIDING
            else views[index][start : start + nbytes]
            for index, start, nbytes in layout.spans
        ]

    # ---------------------------------------------------------------- blocks of our own

    def _allocate(
        self, nbytes: int, *, shared: bool = False, pieces: Sequence[tuple[int, Bytes]] = ()
    ) -> Block:
        """A new block, held once, its memory reserved.

        Parameters
        ----------
        nbytes : int
        shared : bool
            All processes may write to it.
        pieces : sequence
            What to fill it with, from its first byte to its last: where each begins, and its bytes.

        Raises
        ------
        StoreFullError
            There is no room.
        """
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this store belongs to the process that made it; a forked child makes its own (shmpool.ObjectStore)"
            )
        heap = self._heap
        with self._books:
            arena, block = heap.allocate(
                nbytes, shared=shared, write=bool(pieces), give_up=self._give_up_one
            )
            self._take_in(arena, block)
        why = self._populate(arena, block, pieces)
        if why is None:
            return block
        detail = f"the system has no more room for it ({why})"
        if heap.is_spilled(arena):
            raise heap.full(
                nbytes, f"that is the limit for memory, and of the spill folder {detail}"
            )
        with self._books:
            arena, block = heap.spill(nbytes, shared=shared, why=detail)
            self._take_in(arena, block)
        why = self._populate(arena, block, pieces)
        if why is not None:
            raise heap.full(nbytes, f"{detail}, and neither has the spill folder ({why})")
        return block

    def _populate(
        self, arena: OwnArena, block: Block, pieces: Sequence[tuple[int, Bytes]]
    ) -> OSError | None:
        """Reserve a new block's memory and fill it; if there is none, the block is gone, and the reason returned."""
        try:
            if not self._heap.populate(arena, block, pieces):
                for start, piece in pieces:
                    bulk.copy(self._target(block, start, piece.nbytes), piece)
        except BaseException as error:
            with self._books:
                arena.break_promise(block.offset)
                self._unhold(block)
            if isinstance(error, OSError):
                return error
            raise
        return None

    def _take_in(self, arena: OwnArena, block: Block) -> None:
        self._arenas.setdefault(arena.info.id, arena)
        self._hold(block, new=True)

    def _give_up_one(self) -> bool:
        block = self._written.take_oldest()
        if block is None:
            return False
        self._unhold(block)
        return True

    def _target(self, block: Block, start: int, nbytes: int) -> Bytes:
        """Bytes of a block of ours that the caller holds, to be written by its maker, or compared."""
        arena = self._arenas[block.arena]
        assert isinstance(arena, OwnArena)
        return arena.writable(block.offset + start, nbytes)

    def is_shared(self, array: Any) -> bool:
        """Do all processes write to the memory of this contiguous array?"""
        with self._books:
            address = array.__array_interface__["data"][0]
            lease = self._addresses.find(address, array.nbytes)
            return lease is not None and self._arenas[lease.block.arena].info.shared

    def is_view(self, memory: Bytes) -> bool:
        """Do these bytes lie in a view that this store has handed out?"""
        with self._books:
            address = memory.__array_interface__["data"][0]
            return self._addresses.find(address, memory.nbytes) is not None

    def view_again(self, memory: Bytes) -> Bytes:
        """The same part of the store as ``memory`` is a view of, in a view of its own: without what was written there.

        Parameters
        ----------
        memory : ndarray of bytes
            In a private view that this store has handed out (:meth:`is_view`).
        """
        with self._books:
            address = memory.__array_interface__["data"][0]
            lease = self._addresses.find(address, memory.nbytes)
            assert lease is not None
        first = address - lease.address
        last = first + memory.nbytes
        return self._view(lease.block, first, last, "c")[
            first:last
        ]  # its block is held by the lease

    def new_shared(self, nbytes: int) -> Bytes:
        """A writable view of a new block that every process writes to that receives it; at least one byte."""
        block = self._allocate(nbytes, shared=True)
        try:
            return self._view(block, 0, block.size, "r+")[: max(nbytes, 1)]
        finally:
            self.let_go([block])

    # ---------------------------------------------------------------- life

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
            heap = self._heap
            return StoreStats(
                bytes_copied=self._copied,
                bytes_shared=self._shared,
                blocks=len(self._holds),
                arenas=len(self._arenas),
                holders=self._holders(),
                used=heap.used,
                resident=heap.resident,
                spilled=heap.spilled,
                resident_in_workers=sum(peer.resident for peer in self._peers),
                capacity=self.capacity,
            )

    def _holders(self) -> dict[str, int]:
        views = len(self._addresses)
        workers = sum(len(peer.keeps) for peer in self._peers)
        copies = len(self._written)
        total = sum(hold.count for hold in self._holds.values())
        return {
            "views": views,
            "workers": workers,
            "copies": copies,
            "others": total - views - workers - copies,
        }


def _entry_for(
    block: Block,
    start: int,
    stop: int,
    entries: dict[BlockKey, list[tuple[int, IntervalSet]]],
    new: int,
) -> int:
    """Which of a payload's blocks serves for a part of ``block``: one whose other parts do not overlap, or a new."""
    same = entries.setdefault(block[:2], [])
    for index, taken in same:
        if not taken.overlap(start, stop):
            taken.add(start, stop)
            return index
    taken = IntervalSet()
    taken.add(start, stop)
    same.append((new, taken))
    return new


def _grouped(items: Iterable[tuple[int, Bytes]], own_block: int) -> list[list[tuple[int, Bytes]]]:
    """Large buffers one by one, small ones together."""
    groups: list[list[tuple[int, Bytes]]] = []
    small: list[tuple[int, Bytes]] = []
    for item in items:
        if item[1].nbytes >= own_block:
            groups.append([item])
        else:
            small.append(item)
    return [*groups, small] if small else groups


def _folder(spill_dir: object) -> str | Literal[False] | None:
    if spill_dir is None or spill_dir is False:
        return spill_dir
    path = spill_dir.__fspath__() if isinstance(spill_dir, os.PathLike) else spill_dir
    if not isinstance(path, str):
        raise TypeError(
            f"spill_dir must be a folder (a str or a path object), None for the temporary folder or False to spill "
            f"nothing, not {spill_dir!r}"
        )
    if not path:
        raise ValueError("spill_dir must be a folder, not ''; None means the temporary one")
    return path


def _try_huge_pages() -> None:
    try:
        segment = Segment.create(HUGE_PAGE, "huge")
        try:
            segment.reserve(0, HUGE_PAGE)
        finally:
            segment.close()
    except OSError as error:
        raise RuntimeError(
            f"huge_pages=True, but the system gives no huge page ({error}): reserve some, for example with "
            "'sysctl vm.nr_hugepages=512' (1 GiB of pages of 2 MiB), or use huge_pages='auto'"
        ) from error
