"""A store that is told lies by a peer: it believes what can be, refuses the rest, and its books stay right."""

from __future__ import annotations

import contextlib
import os
import pickle

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shmpool.config import Config
from shmpool.errors import WireError
from shmpool.memory.segment import Segment
from shmpool.serialize.mainmodule import MainModule
from shmpool.serialize.pickling import OBJECT, Pickling
from shmpool.store import payload as payloads
from shmpool.store.blocks import ArenaInfo, Block
from shmpool.store.peer import Peer
from shmpool.store.store import ObjectStore, Payload

from .misdeeds import EDGES, PAGE, array_in

pytestmark = pytest.mark.slow

MIB = 1 << 20


def make_store() -> ObjectStore:
    return ObjectStore(
        64 * MIB, False, config=Config.from_env()._replace(arena_min=MIB, verify=True)
    )


def dump(store: ObjectStore, array: np.ndarray) -> Payload:
    return store.dump(array, Pickling(MainModule.nothing(), store.wanted), OBJECT)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class ALyingPeer(RuleBasedStateMachine):
    """A parent's store, an honest worker whose results it holds, and one that says anything."""

    @initialize()
    def make(self) -> None:
        self.before = open_descriptors()
        self.store, self.other = make_store(), make_store()
        self.honest, self.liar = Peer(upstream=False), Peer(upstream=False)
        self.store.add_peer(self.honest)
        self.store.add_peer(self.liar)
        self.mine = dump(self.store, np.full(20_000, 1.0))
        result = dump(self.other, np.full(20_000, 2.0))
        for info, fd in self.other.introduce(Peer(upstream=True), result.blocks):
            self.store.meet(info, fd, self.honest)
        self.result = self.store.receive(result.data, self.honest)
        self.arenas: list[ArenaInfo] = []
        self.views: list[np.ndarray] = []

    def some_block(self, draw: st.DataObject) -> Block:
        """One that there is, one beside it, or none at all."""
        arenas = [*self.arenas, *(a.info for a in self.store._arenas.values())]
        there = [*self.mine.blocks, *self.result.blocks]
        number = draw.draw(st.integers(0, 3))
        if number == 0:
            return draw.draw(st.sampled_from(there))
        if number == 1:
            block = draw.draw(st.sampled_from(there))
            shift = draw.draw(st.sampled_from([-PAGE, 0, PAGE]))
            longer = draw.draw(st.sampled_from([-PAGE, 0, 1, PAGE]))
            return Block(block.arena, max(0, block.offset + shift), max(0, block.size + longer))
        arena = draw.draw(st.sampled_from([info.id for info in arenas] + [1]))
        edges = st.sampled_from(EDGES) | st.integers(0, 20).map(lambda pages: pages * PAGE)
        return Block(arena, draw.draw(edges), draw.draw(edges))

    # -- what the liar says

    @rule(data=st.data(), size=st.sampled_from([PAGE, 16 * PAGE]), shared=st.integers(0, 3))
    def here_is_an_arena(self, data, size, shared) -> None:
        kinds = [self.good, self.good, self.pipe, self.directory, self.unsealed, self.deaf]
        make = data.draw(st.sampled_from(kinds))
        said = data.draw(st.sampled_from([size, size, 0, 1, size + PAGE, 1 << 62]))
        known = [info.id for info in self.arenas] + [self.mine.blocks[0].arena]
        number = data.draw(st.integers(0, (1 << 64) - 1) | st.sampled_from(known))
        try:
            self.store.meet(ArenaInfo(number, said, shared), make(size), self.liar)
        except WireError:
            pass
        else:
            assert make == self.good and 0 < said <= size
            self.arenas.append(self.store._arenas[number].info)

    def good(self, size: int) -> int:
        segment = Segment.create(size, "memfd")
        return os.dup(segment.fd)

    def pipe(self, size: int) -> int:
        reading, writing = os.pipe()
        os.close(writing)
        return reading

    def directory(self, size: int) -> int:
        return os.open("/", os.O_RDONLY)

    def unsealed(self, size: int) -> int:
        fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        return fd

    def deaf(self, size: int) -> int:
        """It can be written to, and not read."""
        segment = Segment.create(size, "memfd")
        return os.open(f"/proc/self/fd/{segment.fd}", os.O_WRONLY)

    @rule(data=st.data(), mode=st.sampled_from(["c", "r"]), keep=st.booleans())
    def here_is_an_array(self, data, mode, keep) -> None:
        blocks = [self.some_block(data) for _ in range(data.draw(st.integers(1, 2)))]
        nbytes = data.draw(st.sampled_from([0, 1, PAGE]))
        form = data.draw(st.sampled_from(["array", "carried", "in the store"]))
        if form == "array":
            said = array_in(blocks[0], nbytes)
        elif form == "carried":
            said = b"".join(payloads.encode([pickle.dumps(1)], blocks, []))
        else:
            said = payloads.encode_indirect(blocks[0], data.draw(st.integers(1, 2 * PAGE)))
        with contextlib.suppress(WireError):
            payload = self.store.receive(said, self.liar)
            try:
                with contextlib.suppress(Exception):  # what comes of it is the future's
                    view = self.store.load(payload, mode)
                    if keep and isinstance(view, np.ndarray):
                        assert view.nbytes == nbytes
                        self.views.append(view)
            finally:
                payload.release()

    @rule(data=st.data())
    def i_keep_these(self, data) -> None:
        kept = [self.some_block(data) for _ in range(data.draw(st.integers(0, 2)))]
        released = [self.some_block(data) for _ in range(data.draw(st.integers(0, 2)))]
        with contextlib.suppress(WireError):
            self.store.peer_keeps(self.liar, kept, released)

    @rule(resident=st.sampled_from(EDGES) | st.integers(0, 200 * MIB))
    def i_take_so_much_memory(self, resident) -> None:
        try:
            self.store.peer_resident(self.liar, resident)
        except WireError:
            assert resident > 64 * MIB, "it may be"
        else:
            assert resident < 200 * MIB, "nobody else would have room"

    # -- what happens beside that

    @precondition(lambda self: self.views)
    @rule()
    def a_view_goes(self) -> None:
        self.views.pop()

    @rule()
    def the_liar_dies_and_another_comes(self) -> None:
        self.store.lost_peer(self.liar)
        self.liar = Peer(upstream=False)
        self.store.add_peer(self.liar)

    @rule()
    def what_is_to_be_told_is_told(self) -> None:
        for peer in (self.liar, self.honest):
            self.store.take_frees(peer, 1000)

    @invariant()
    def what_there_was_is_there(self) -> None:
        assert (self.store.load(self.mine, "r") == 1).all()
        assert (self.store.load(self.result, "r") == 2).all()
        self.store.verify()

    @invariant()
    def the_honest_have_room(self) -> None:
        assert self.store.room_for(self.honest) <= 64 * MIB

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.lost_peer(self.liar)
        self.views.clear()
        self.mine.release()
        self.result.release()
        assert self.store.stats().blocks == 0, self.store.stats()
        self.store.lost_peer(self.honest)
        assert all(arena.origin is None for arena in self.store._arenas.values())
        del self.store, self.other, self.mine, self.result
        assert open_descriptors() == self.before


def test_a_payload_in_the_store_that_changes_after_it_was_looked_at_is_refused():
    store, liar = make_store(), Peer(upstream=False)
    store.add_peer(liar)
    segment = Segment.create(16 * PAGE, "memfd")
    store.meet(ArenaInfo(5, 16 * PAGE, 0), os.dup(segment.fd), liar)
    good = array_in(Block(5, 4 * PAGE, 4 * PAGE))
    os.pwrite(segment.fd, good, 0)
    payload = store.receive(payloads.encode_indirect(Block(5, 0, PAGE), len(good)), liar)
    assert store.load(payload, "r").shape == (PAGE,)
    os.pwrite(segment.fd, array_in(Block(5, 8 * PAGE, 4 * PAGE)), 0)
    with pytest.raises(WireError, match="changed"):
        store.load(payload, "r")
    payload.release()
    store.lost_peer(liar)


TestALyingPeer = ALyingPeer.TestCase
TestALyingPeer.settings = settings(max_examples=100, stateful_step_count=20)
