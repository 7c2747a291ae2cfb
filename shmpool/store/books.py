"""The books: which blocks are in use, who holds them, and which views of them this process has handed out.

One lock guards all books of a store; ``with self._books:`` takes it.  Code that runs under it calls no user code and
takes no other lock.  Finalizers only append to ``_pending`` and try, without waiting, to have it worked off
(:meth:`Books._drain`); whoever holds the lock looks again when it lets go, so nothing is forgotten.

A block is held, counted in ``_holds``, by each payload that names it, each lease of a view, each ref, each entry of
``_written``, each worker that keeps it.  At zero a block of our own is free; one of another process is reported to
whom it came from (see :mod:`shmpool.store.peer`).

After a fork the child's copy of a store is inert: it frees nothing, tells nobody, and its views stay readable.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from shmpool.config import Config
from shmpool.interrupts import WholeLock, whole
from shmpool.memory import dirty
from shmpool.memory.segment import Bytes, Mode
from shmpool.memory.watch import WriteWatch
from shmpool.store.addresses import AddressTable
from shmpool.store.arena import Arena, OwnArena
from shmpool.store.blocks import Block, BlockKey
from shmpool.store.heap import Heap
from shmpool.store.leases import Lease
from shmpool.store.payload import Layout
from shmpool.store.peer import Peer
from shmpool.store.written import Written, WrittenKey

__all__ = ["INSIDE", "Books", "Payload", "stores"]

#: What is said to code of the user's that cannot be served where it runs.
INSIDE = (
    "an object's finalizer (or a signal handler) called shmpool while this thread was inside of it"
)


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
    blocks : sequence of Block
    copied, shared : int
        Bytes of its buffers that were copied into the store, and that were there already.
    layout : Layout or None
        Of the data, if it has been decoded.
    """

    __slots__ = ("_books", "blocks", "copied", "data", "layout", "shared")

    def __init__(
        self,
        books: Books,
        data: bytes | memoryview,
        blocks: Sequence[Block] = (),
        copied: int = 0,
        shared: int = 0,
        layout: Layout | None = None,
    ) -> None:
        self._books = books
        self.data = data
        self.blocks = blocks
        self.copied = copied
        self.shared = shared
        self.layout = layout

    def release(self) -> None:
        """Let go of the blocks.  May be called twice."""
        if self.blocks:
            blocks, self.blocks = self.blocks, ()
            self._books.let_go(blocks)

    def release_later(self) -> None:
        """The same, from a finalizer: without waiting for a lock."""
        if self.blocks:
            self._books._gone(self)


class Books:
    """Who holds what.  The base of :class:`~shmpool.store.store.ObjectStore`."""

    def __init__(self, config: Config, heap: Heap) -> None:
        self.config = config
        # Guards everything below but _pending. Never taken twice, but it knows which thread has it.
        self._lock = WholeLock()
        self._books = _Lock(self)
        self._pending: deque[Lease | WrittenKey | Payload] = deque()
        self._report_gone = _reporter(weakref.ref(self))
        self._heap = heap
        self._arenas: dict[int, Arena] = {}  # own ones, too
        self._holds: dict[BlockKey, _Hold] = {}
        self._addresses: AddressTable[Lease] = AddressTable()
        self._written = Written(self._report_gone, WriteWatch() if config.watch_writes else None)
        self._peers: list[Peer] = []
        self._detector = dirty.choose(config.dirty_detector)
        self._copied = self._shared = 0
        self._shared_views = 0  # how many views of arenas are alive that all processes may write to
        self._last_use = 0.0
        self._wakers: list[Callable[[], None]] = []  # one for each executor that is running
        self._pid = os.getpid()
        stores.add(self)

    def is_inside(self) -> bool:
        """Does this thread hold the lock?"""
        return self._lock.is_owned()

    # ---------------------------------------------------------------- holding

    def _hold(self, block: Block, *, new: bool = False) -> _Hold:
        key = block[:2]
        hold = self._holds.get(key)
        if hold is None:
            # A block of our own that nobody holds is free, and may be somebody else's by now.
            assert new or not isinstance(self._arenas[block.arena], OwnArena), block
            hold = self._holds[key] = _Hold(block)
            self._arenas[block.arena].held += 1
        hold.count += 1
        return hold

    def _unhold(self, block: Block) -> None:
        key = block[:2]
        hold = self._holds[key]
        hold.count -= 1
        if hold.count:
            if not self._last_use and hold.count == self._written.times(hold.block):
                self._used_now()  # from now on it is only kept in case the same array comes again
            return
        del self._holds[key]
        arena = self._arenas[block.arena]
        arena.held -= 1
        if isinstance(arena, OwnArena):
            self._heap.freed(arena, block.offset, keep_warm=bool(self._wakers))
        else:
            self._tell_origin(arena, hold)
        self._used_now()

    def _tell_origin(self, arena: Arena, hold: _Hold) -> None:
        """A block of another process is not held here any more."""
        origin = arena.origin
        assert origin is not None
        if hold.reported:
            origin.to_release.append(hold.block)
        elif hold.credits:
            origin.to_free.append((hold.block.arena, hold.block.offset, hold.credits))
        if arena.orphaned and not arena.held:
            self._detach(arena)

    def _detach(self, arena: Arena) -> None:
        del self._arenas[arena.info.id]
        arena.close()
        for peer in self._peers:
            if arena.info.id in peer.knows:
                peer.knows.discard(arena.info.id)
                peer.to_forget.append(arena.info.id)

    def let_go(self, blocks: Iterable[Block]) -> None:
        """Hold each of ``blocks`` once less.  In a forked child: nothing."""
        if os.getpid() != self._pid:
            return
        with self._books:
            for block in blocks:
                self._unhold(block)

    # ---------------------------------------------------------------- views

    def _view(self, block: Block, first: int, last: int, mode: Mode) -> Bytes:
        """A new exporter of a whole block, of which the taker will use ``[first, last)``."""
        with self._books:
            arena = self._arenas[block.arena]
            if arena.info.shared:
                mode = "r+"
            # Writes of one taker must not be seen by the next: a second one gets a mapping of its own.
            kept = mode != "c" or not (arena.info.huge or block.offset in arena.taken)
            try:
                mapping = arena.kept_mapping(mode) if kept else arena.own_mapping(mode, block)
            except OSError as error:
                raise self._heap.full(
                    block.size, f"no more of it can be mapped ({error})"
                ) from error
            start = block.offset
            lease = Lease(block, mapping, start + first, start + last, alone=kept and mode == "c")
            view = mapping.array(start, block.size)
            self._hold(block)
            self._shared_views += arena.info.shared
            if lease.alone:
                arena.taken.add(start)
            self._addresses.add(lease)
            lease.watch(view, self._report_gone)
            return view

    def lease_of(self, array: Any) -> Lease | None:
        """Which view this contiguous array lies in, if this process has handed out one."""
        with self._books:
            return self._addresses.find(array.__array_interface__["data"][0], array.nbytes)

    def is_clean(self, lease: Lease) -> bool:
        """Has its taker not written to a private view?  The caller has an array in it; nobody writes meanwhile."""
        return lease.is_clean(self._detector)

    def _end_lease(self, lease: Lease) -> None:
        block = lease.block
        arena = self._arenas[block.arena]
        self._addresses.remove(lease)
        if lease.alone:
            if not lease.is_clean(self._detector):
                lease.mapping.drop_private_pages(block.offset, block.offset + block.size)
            arena.taken.discard(block.offset)
        if arena.info.shared:
            self._shared_views -= 1
        lease.end()
        self._unhold(block)

    # ---------------------------------------------------------------- finalizers

    def _gone(self, item: Lease | WrittenKey | Payload) -> None:
        """The last user of a view, the array that a copy was made of, or the owner of a payload is gone.

        Called by weak references wherever that happens: in any thread, inside any lock, at interpreter exit.
        """
        pid = self._pid
        if (
            pid and os.getpid() == pid
        ):  # pid first: it is 0 at interpreter exit, when modules are emptied
            self._pending.append(item)
            self._settle()

    def _settle(self) -> None:
        """Work off what finalizers have left, unless somebody holds the lock: then they will."""
        with whole:
            while self._pending and not self.is_inside() and self._lock.acquire(blocking=False):
                try:
                    self._drain()
                finally:
                    self._lock.release()

    def _drain(self) -> None:
        while self._pending:
            item = self._pending.popleft()
            if isinstance(item, Lease):
                self._end_lease(item)
            elif isinstance(item, Payload):
                for block in item.blocks:
                    self._unhold(block)
                item.blocks = ()
            else:
                stale = self._written.remove_dead(item)
                if stale is not None:
                    self._unhold(stale)

    # ---------------------------------------------------------------- idleness

    def start_use(self, waker: Callable[[], None]) -> None:
        """An executor begins to use the store: from now on freed pages are kept warm.

        Parameters
        ----------
        waker : callable
            Called, under the lock, when there is something to give back after some idle time: then
            :meth:`idle_seconds` says when.
        """
        with self._books:
            self._wakers.append(waker)

    def end_use(self, waker: Callable[[], None]) -> None:
        """An executor is done with the store; after the last one freed memory goes back to the system at once."""
        with self._books:
            self._wakers.remove(waker)
            if not self._wakers:
                self._give_back()

    def idle_seconds(self) -> float | None:
        """In how many seconds something is to be given back, if nothing happens until then; None: nothing is."""
        if not self._last_use:
            return None
        return max(0.0, self._last_use + self.config.warm_seconds - time.monotonic())

    def give_back_if_idle(self) -> bool:
        """Give memory back if nothing has happened for so long; True if so."""
        with self._books:
            if not self._last_use or self._last_use + self.config.warm_seconds > time.monotonic():
                return False
            self._last_use = 0.0
            self._give_back(in_use=False)
            return True

    def _give_back(self, *, in_use: bool = True) -> None:
        """Give up what is only kept for later; ``in_use``: also the entries of blocks that somebody else holds."""
        for block, entries in self._written.blocks():
            # A task may hold it that runs for long: to forget it would save nothing, and cost a second copy later.
            if in_use or self._holds[block[:2]].count == entries:
                for _ in range(self._written.remove_all_of(block)):
                    self._unhold(block)
        self._heap.trim(0)

    def _used_now(self) -> None:
        first = not self._last_use
        self._last_use = time.monotonic()
        if first:
            for wake in self._wakers:
                wake()

    # ---------------------------------------------------------------- checks

    def live_blocks(self) -> int:
        """How many blocks are held, finalizers done, copies that are only kept for later not counted."""
        with self._books:
            return len(self._holds) - sum(
                self._holds[block[:2]].count == times for block, times in self._written.blocks()
            )

    def verify(self) -> None:
        """Recount the books.

        Raises
        ------
        AssertionError
            They are wrong; the message says where.
        """
        with self._books:
            self._verify()

    def _verify(self) -> None:
        for own in self._heap:
            own.verify()
            assert own is self._arenas.get(own.info.id), own.info
        held: dict[int, int] = {}
        for key, hold in self._holds.items():
            assert key == hold.block[:2], (key, hold.block)
            assert hold.count > 0, (hold.block, hold.count)
            held[key[0]] = held.get(key[0], 0) + hold.block.size
        for arena_id, arena in self._arenas.items():
            if isinstance(arena, OwnArena):
                assert arena.used == held.get(arena_id, 0), (arena.info, arena.used, held)
        needed: dict[BlockKey, int] = {}
        for lease in self._addresses:
            needed[lease.block[:2]] = needed.get(lease.block[:2], 0) + 1
        for block, times in self._written.blocks():
            needed[block[:2]] = needed.get(block[:2], 0) + times
        for peer in self._peers:
            for key in peer.keeps:
                needed[key] = needed.get(key, 0) + 1
        for key, count in needed.items():
            assert self._holds[key].count >= count, (key, self._holds[key].count, count)

    def _after_fork_in_child(self) -> None:
        self._lock = WholeLock()
        self._books = _Lock(self)
        self._wakers = []
        self._pending.clear()


class _Lock:
    """Holding a store's lock, with what finalizers have left worked off on the way in and out."""

    # Twelve times for an array that goes there and back: each call that is not made counts.
    __slots__ = ("_books", "_enter", "_exit", "_is_inside", "_verify")

    def __init__(self, books: Books) -> None:
        self._books = weakref.ref(books)  # no cycle: a store goes when its last user goes
        lock = books._lock
        self._enter, self._exit, self._is_inside = lock.__enter__, lock.__exit__, lock.is_owned
        self._verify = books.config.verify

    def __enter__(self) -> None:
        if self._is_inside():
            # Cyclic garbage may be collected at any line, and run a finalizer of the user's that comes here.
            raise RuntimeError(INSIDE)
        self._enter()
        books: Any = self._books()
        if books._pending:
            try:
                books._drain()
            except BaseException:
                self._exit()
                raise

    def __exit__(self, *_: object) -> None:
        books: Any = self._books()
        if self._verify:
            try:
                books._verify()
            finally:
                self._exit()
        else:
            self._exit()
        if books._pending:
            books._settle()


def _reporter(books: weakref.ref[Books]) -> Callable[[Lease | WrittenKey], None]:
    """What finalizers call.  It does not keep the store alive: where that is gone, there are no books to keep."""

    def report(item: Lease | WrittenKey) -> None:
        store = books()
        if store is not None:
            store._gone(item)
        elif hasattr(
            item, "end"
        ):  # a lease, said without a name that interpreter exit may have emptied
            item.end()

    return report


stores: weakref.WeakSet[Books] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for store in list(stores):
        store._after_fork_in_child()
    stores.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _at_exit() -> None:
    """From now on finalizers of ours do nothing: the process's end gives everything back."""
    for store in list(stores):
        store._pid = 0
        lock = store._books
        lock._enter = partial(_enter_at_exit, store._lock, sys.is_finalizing)


def _enter_at_exit(lock: WholeLock, is_finalizing: Callable[[], bool]) -> None:
    """The interpreter ends daemon threads wherever they are: who waited for a lock that one has would wait for ever."""
    if is_finalizing():
        if not lock.acquire(blocking=False):
            raise RuntimeError("the interpreter ends, and has ended a thread that used this store")
    else:
        lock.__enter__()


atexit.register(_at_exit)
