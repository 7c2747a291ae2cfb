"""Two stores in one process that deal with each other as a parent's and a worker's do, and a recount of their books."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from shmpool.config import Config
from shmpool.serialize.mainmodule import MainModule
from shmpool.serialize.pickling import OBJECT, Pickling
from shmpool.store.blocks import Block
from shmpool.store.peer import Peer
from shmpool.store.refs import ObjectRef
from shmpool.store.store import ObjectStore, Payload
from shmpool.store.written import Epoch

MIB = 1 << 20


def make_store(
    capacity: int = 64 * MIB, *, detector: str | None = None, **changes: Any
) -> ObjectStore:
    """A store with small arenas, that does not spill."""
    changes = {"arena_min": 4 * MIB, "inline_limit": 4096, **changes}
    config = Config.from_env()._replace(dirty_detector=detector, **changes)
    return ObjectStore(capacity, False, config=config)


def dump(store: ObjectStore, obj: object, epoch: Epoch | None = None) -> Payload:
    return store.dump(obj, Pickling(MainModule.nothing(), store.wanted), OBJECT, epoch)


def recount(
    store: ObjectStore, payloads: Iterable[Payload] = (), lent: Iterable[Block] = ()
) -> None:
    """Check that every claim on a block has somebody who makes it: views, copies, peers, and what the caller knows of.

    Parameters
    ----------
    payloads : iterable of Payload
        All that are alive and not released, those of refs included.
    lent : iterable of Block
        What a worker has sent to its parent, once for each time, and was not told to be free.
    """
    store.verify()
    with store._books:
        claims = Counter(lease.block for lease in store._addresses)
        for block, times in store._written.blocks():
            claims[block] += times
        for peer in store._peers:
            claims.update(store._holds[key].block for key in peer.keeps)
        for payload in payloads:
            claims.update(payload.blocks)
        claims.update(lent)
        assert claims == Counter({hold.block: hold.count for hold in store._holds.values()})


class Link:
    """A parent's store and a worker's, and the messages between them as the driver and the worker make them."""

    def __init__(self, parent: ObjectStore, worker: ObjectStore) -> None:
        self.parent, self.worker = parent, worker
        self.down, self.up = Peer(upstream=False), Peer(upstream=True)
        parent.add_peer(self.down)
        worker.add_peer(self.up)
        self.lent: Counter[Block] = Counter()  # by the worker

    def tell(self, blocks: list[Block]) -> list[int]:
        """What rides along with a call."""
        freed, forgotten = self.parent.take_frees(self.down, 1000)
        arenas = self.parent.introduce(self.down, blocks)
        for info, fd in arenas:
            self.worker.meet(info, fd, self.up)
        for arena, offset, times in freed:
            block = self.worker._holds[arena, offset].block
            self.lent[block] -= times
        self.lent = +self.lent
        self.worker.freed(freed)
        self.worker.forget(forgotten)
        return [info.id for info, _ in arenas]

    def call(self, function: Callable[[Any], Any], argument: object, mode: Any = "c") -> Any:
        """Have the worker run ``function(argument)``; return the result, as the parent has it."""
        task = dump(self.parent, argument)
        introduced = self.tell(task.blocks)
        arguments = self.worker.receive(task.data, self.up)
        came = list(arguments.blocks)
        value = function(self.worker.load(arguments, mode))
        arguments.release()
        result = dump(self.worker, value)
        del value
        released = self.worker.take_releases(self.up)
        self.worker.lend(result, self.up)
        for block in result.blocks:
            if self.worker._arenas[block.arena].origin is not self.up:
                self.lent[block] += 1
        kept = self.worker.kept_after(came)
        for info, fd in self.worker.introduce(self.up, result.blocks):
            self.up.knows.add(info.id)
            self.parent.meet(info, fd, self.down)
        arrived = self.parent.receive(result.data, self.down)
        # What was let go of was so before the task was received that brought what is kept.
        self.parent.peer_keeps(self.down, [], released)
        self.parent.peer_keeps(self.down, kept, [])
        self.down.knows.update(introduced)
        task.release()
        try:
            return self.parent.load(arrived, mode)
        finally:
            arrived.release()

    def flush(self) -> None:
        """A message in each direction, so that all is told."""
        self.call(lambda x: x, None)
        self.call(lambda x: x, None)


def array(value: int, nbytes: int = 100_000) -> np.ndarray:
    return np.full(nbytes, value, np.uint8)


def ref_of(store: ObjectStore, obj: object) -> ObjectRef:
    return ObjectRef(store, dump(store, obj))
