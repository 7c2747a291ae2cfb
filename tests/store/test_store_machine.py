"""Random lives of arrays in a parent's store and in a worker's, against plain copies of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)
from link import Link, array, make_store, recount, ref_of

from shmpool.errors import StoreFullError
from shmpool.store import written
from shmpool.store.refs import ObjectRef

pytestmark = pytest.mark.slow

#: Under one page, some pages, a block of its own.
SIZES = st.sampled_from([4096, 5000, 20_000, 100_000])


class _Held:
    """An array or a ref of one of the two processes, and what must be in it."""

    def __init__(self, thing: np.ndarray | ObjectRef, model: np.ndarray) -> None:
        self.thing, self.model = thing, model.copy()

    def check(self) -> None:
        a = self.thing.get("r") if isinstance(self.thing, ObjectRef) else self.thing
        np.testing.assert_array_equal(a, self.model)


class ArraysAgainstCopies(RuleBasedStateMachine):
    """Every array shows what its own holder wrote, whatever the others do and however blocks are used again."""

    refs = Bundle("refs")
    arrays = Bundle("arrays")

    @initialize(
        detector=st.sampled_from([None, "none"]),
        capacity=st.sampled_from([1, 64]),
        watched_from=st.sampled_from([1, written._WORTH_WATCHING]),
    )
    def make(self, detector, capacity, watched_from) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(written, "_WORTH_WATCHING", watched_from)
        self.detector = detector
        self.parent = make_store(capacity << 20, detector=detector, own_block=8192)
        self.held: list[_Held] = []
        self.start_worker()

    def start_worker(self) -> None:
        self.link = Link(self.parent, make_store(detector=self.detector, own_block=8192))
        self.in_worker: list[_Held] = []

    def hold(self, thing: np.ndarray | ObjectRef, model: np.ndarray) -> _Held:
        held = _Held(thing, model)
        self.held.append(held)
        return held

    @rule(target=refs, value=st.integers(0, 255), nbytes=SIZES)
    def put(self, value, nbytes):
        try:
            return self.hold(ref_of(self.parent, array(value, nbytes)), array(value, nbytes))
        except StoreFullError:
            return multiple()

    @rule(target=arrays, value=st.integers(0, 255), nbytes=SIZES)
    def make_an_array_in_the_heap(self, value, nbytes):
        return self.hold(array(value, nbytes), array(value, nbytes))

    @rule(target=arrays, ref=refs, mode=st.sampled_from("ccr"))
    def get(self, ref, mode):
        return self.hold(ref.thing.get(mode), ref.model)

    @rule(target=arrays, held=arrays, start=st.integers(0, 5000))
    def slice(self, held, start):
        # What is written into one must be seen in the other: the model shares memory, too.
        part = self.hold(held.thing[start:], held.model)
        part.model = held.model[start:]
        return part

    @rule(held=arrays, value=st.integers(0, 255), at=st.integers(0, 99_999))
    def write(self, held, value, at):
        if len(held.model) and held.thing.flags.writeable:
            held.thing[at % len(held.model)] = value
            held.model[at % len(held.model)] = value

    @rule(target=refs, held=arrays)
    def put_an_array_again(self, held):
        try:
            return self.hold(ref_of(self.parent, held.thing), held.model)
        except StoreFullError:
            return multiple()

    @rule(target=refs, held=arrays, times=st.integers(2, 4))
    def put_an_array_again_and_again(self, held, times):
        """So often that it is watched; what is written to it later must be noticed."""
        try:
            made = [ref_of(self.parent, held.thing) for _ in range(times)]
        except StoreFullError:
            return multiple()
        return self.hold(made[-1], held.model)

    @rule(
        target=arrays, held=arrays, how=st.sampled_from(["same", "part", "new"]), keep=st.booleans()
    )
    def send_to_the_worker(self, held, how, keep):
        def work(a: np.ndarray) -> np.ndarray:
            np.testing.assert_array_equal(a, held.model)
            if keep:
                self.in_worker.append(_Held(a, held.model))
            if how == "new":
                return a + np.uint8(1)
            return a[:4500] if how == "part" else a

        try:
            result = self.link.call(work, held.thing)
        except StoreFullError:
            return multiple()
        model = held.model[:4500] if how == "part" else held.model
        return self.hold(result, model + np.uint8(1) if how == "new" else model)

    @rule(number=st.integers(0, 99), value=st.integers(0, 255))
    def the_worker_writes_into_what_it_keeps(self, number, value):
        if self.in_worker:
            kept = self.in_worker[number % len(self.in_worker)]
            if len(kept.model) and kept.thing.flags.writeable:
                # Arrays that it kept from one call may share memory only with what it got in that call.
                kept.thing[-1] = value
                kept.model[-1] = value

    @rule(target=arrays, number=st.integers(0, 99))
    def the_worker_sends_what_it_keeps(self, number):
        if not self.in_worker:
            return multiple()
        kept = self.in_worker[number % len(self.in_worker)]
        return self.hold(self.link.call(lambda _: kept.thing, None), kept.model)

    @rule(number=st.integers(0, 99))
    def the_worker_drops_what_it_keeps(self, number):
        if self.in_worker:
            del self.in_worker[number % len(self.in_worker)]

    @rule(held=consumes(arrays) | consumes(refs))
    def drop(self, held):
        self.held.remove(held)
        held.thing = None  # the bundle may still know it

    @rule()
    def the_worker_dies(self) -> None:
        self.parent.lost_peer(self.link.down)
        self.start_worker()

    @rule()
    def messages_pass(self) -> None:
        self.link.flush()

    @invariant()
    def everybody_sees_what_is_theirs(self) -> None:
        if hasattr(self, "held"):
            for held in (*self.held, *self.in_worker):
                held.check()

    def count(self) -> None:
        refs = [h.thing._payload for h in self.held if isinstance(h.thing, ObjectRef)]
        recount(self.parent, refs)
        recount(self.link.worker, lent=self.link.lent.elements())

    def teardown(self) -> None:
        if not hasattr(self, "held"):
            return
        self.patch.undo()
        self.count()
        self.in_worker.clear()
        self.link.flush()
        self.count()
        for held in self.held:
            held.thing = None
        self.held.clear()
        assert self.parent.live_blocks() == 0
        self.link.flush()
        assert self.link.worker.live_blocks() == 0
        assert not self.link.lent
        recount(self.parent)
        recount(self.link.worker)


TestArraysAgainstCopies = ArraysAgainstCopies.TestCase
TestArraysAgainstCopies.settings = settings(
    max_examples=100, stateful_step_count=40, report_multiple_bugs=False
)
