"""The object store in one process: what goes in comes out, who sees whose writes, and when a block is free again."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import struct
import threading
import weakref
from typing import Any

import numpy as np
import pytest
from link import MIB, Link, array, dump, make_store, recount, ref_of

from shmpool.errors import RefError, StoreFullError, WireError
from shmpool.memory import dirty, segment, watch
from shmpool.memory.watch import WriteWatch
from shmpool.store.blocks import Block
from shmpool.store.heap import Heap
from shmpool.store.payload import decode
from shmpool.store.refs import ObjectRef, get, put
from shmpool.store.store import ObjectStore, Payload
from shmpool.store.written import Epoch


@pytest.fixture(params=["scan", "pagemap", "none"])
def detector(request) -> str:
    if request.param != "none" and dirty._why_not(request.param):
        pytest.skip(f"the detector {request.param} does not work here")
    return str(request.param)


@pytest.fixture
def store(memory_backend) -> ObjectStore:
    return make_store()


@pytest.fixture
def link(memory_backend) -> Link:
    return Link(make_store(), make_store())


def address_of(a: np.ndarray) -> int:
    return int(a.__array_interface__["data"][0])


def in_store(store: ObjectStore, a: np.ndarray) -> bool:
    return store._addresses.find(address_of(a), a.nbytes) is not None


def blocks(store: ObjectStore) -> int:
    return store.live_blocks()


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    "value",
    [
        {"nothing": None, "big": 1},
        np.arange(50_000.0),
        np.arange(50_000).reshape(100, 500).T,
        np.asfortranarray(np.ones((300, 200))),
        np.arange(100_000)[::2],
        np.zeros(0),
        np.array(["x" * 3000, "y"]),
        [np.arange(3), np.arange(10_000), b"x" * 10_000, bytearray(b"y" * 10_000)],
        "x" * 300_000,
    ],
    ids=["plain", "array", "T", "fortran", "strided", "empty", "strings", "mixed", "long stream"],
)
@pytest.mark.parametrize("mode", ["r", "c"])
def test_what_is_put_comes_out_equal(store, value, mode):
    ref = ref_of(store, value)
    np.testing.assert_equal(ref.get(mode), value)
    del ref
    recount(store)


def test_two_views_of_one_object_share_memory_and_nothing_is_copied(store):
    ref = ref_of(store, array(7))
    copied = store.stats().bytes_copied
    first, second = ref.get("r"), ref.get("r")
    assert address_of(first) == address_of(second) and in_store(store, first)
    assert store.stats().bytes_copied == copied == 100_000


def test_small_buffers_ride_in_the_message(store):
    payload = dump(store, array(1, 4095))
    assert not payload.blocks and len(payload.data) > 4095
    assert not dump(store, array(1, 100)).blocks


def test_arrays_are_aligned(store):
    ref = ref_of(store, [array(n, 5000 + n) for n in range(5)])
    assert all(address_of(a) % 64 == 0 for a in ref.get())


def test_small_arrays_share_a_block_and_large_ones_have_their_own(store):
    payload = dump(store, [array(1, 5000), array(2, 2 * MIB), array(3, 6000), array(4, MIB)])
    assert len(set(payload.blocks)) == 3
    payload.release()


def test_a_stream_that_is_too_long_for_a_message_goes_through_the_store(store):
    payload = dump(store, ["x" * 200_000, array(3)])
    assert len(payload.data) < 1000
    text, a = store.load(payload, "c")
    assert text == "x" * 200_000 and a[0] == 3 and a.flags.writeable
    payload.release()
    del a
    recount(store)


def test_one_array_twice_in_one_object_stays_one(store):
    a = array(1)
    first, second = ref_of(store, [a, a]).get("c")
    assert first is second


def test_an_array_that_cannot_be_pickled_holds_nothing(store):
    with pytest.raises(Exception, match="lock"):
        dump(store, [array(1), threading.Lock()])
    assert blocks(store) == 0


# ---------------------------------------------------------------- who sees whose writes


def test_writes_into_a_private_view_are_seen_by_nobody_else(memory_backend, detector):
    store = make_store(detector=detector)
    ref = ref_of(store, array(1))
    mine = ref.get("c")
    mine[:] = 2
    assert (ref.get("c") == 1).all() and (ref.get("r") == 1).all()
    assert (mine == 2).all()


def test_writes_are_gone_when_the_view_is(memory_backend, detector):
    store = make_store(detector=detector)
    ref = ref_of(store, array(1))
    for position in (0, 50_000, 99_999):
        view = ref.get("c")
        assert (view == 1).all(), "of the writer before"
        view[position] = 2
        del view
    assert (ref.get("c") == 1).all()


def test_a_slice_keeps_the_view_and_what_was_written_there(memory_backend, detector):
    store = make_store(detector=detector)
    ref = ref_of(store, array(1))
    part = ref.get("c")[10_000:20_000]
    part[0] = 2
    other = ref.get("c")
    assert part[0] == 2 and other[10_000] == 1
    assert not np.shares_memory(part, other)


def test_the_first_taker_has_the_kept_mapping_and_the_second_one_of_its_own(store):
    ref = ref_of(store, array(1))
    first = ref.get("c")
    kept = address_of(first)
    second = ref.get("c")
    assert address_of(second) != kept
    del first
    assert address_of(ref.get("c")) == kept, "it is free again"
    second[0] = 9
    assert ref.get("c")[0] == 1


def test_two_overlapping_views_in_one_object_are_private_to_each_other(store):
    a = ref_of(store, array(1)).get("c")
    first, second = ref_of(store, [a[:60_000], a[40_000:]]).get("c")
    first[:] = 2
    assert (second == 1).all()


def test_a_read_only_array_arrives_writable(store):
    a = array(1)
    a.flags.writeable = False
    assert ref_of(store, [a, ref_of(store, array(2)).get("r")]).get("c")[1].flags.writeable


def test_read_only_views_cannot_be_written_to(store):
    view = ref_of(store, array(1)).get("r")
    assert not view.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        view.flags.writeable = True


# ---------------------------------------------------------------- what is in the store already


def test_a_clean_view_travels_by_reference_and_a_written_one_by_copy(memory_backend, detector):
    store = make_store(detector=detector)
    view = ref_of(store, array(1)).get("c")
    if detector != "none":
        payload = dump(store, view)
        assert (payload.copied, payload.shared) == (0, 100_000)
        payload.release()
    view[99_999] = 2
    payload = dump(store, view)
    assert (payload.copied, payload.shared) == (100_000, 0)
    assert store.load(payload, "r")[99_999] == 2
    payload.release()
    del view
    recount(store)


def test_slices_of_a_view_travel_by_reference(store):
    view = ref_of(store, np.arange(100_000)).get("r")
    payload = dump(store, [view[1000:50_000], view.reshape(100, 1000)[3:70].T])
    assert payload.copied == 0
    part, other = store.load(payload, "r")
    np.testing.assert_array_equal(part, view[1000:50_000])
    np.testing.assert_array_equal(other, view.reshape(100, 1000)[3:70].T)
    payload.release()


def test_the_same_array_again_is_not_written_again(store):
    a = array(1)
    first, second = dump(store, a), dump(store, a)
    assert first.blocks == second.blocks and second.copied == 0
    first.release()
    second.release()


def test_a_changed_array_is_written_anew(store):
    a = array(1)
    first = dump(store, a)
    a[-1] = 2
    second = dump(store, a)
    assert store.load(first, "r")[-1] == 1 and store.load(second, "r")[-1] == 2
    a[-1] = 1
    assert store.load(second, "r")[-1] == 2
    first.release()
    second.release()


@pytest.fixture
def compared(monkeypatch) -> list[int]:
    """How many bytes were compared, each time."""
    if not watch._works():
        pytest.skip("nothing can be watched here")
    sizes: list[int] = []

    def same(one: np.ndarray, other: np.ndarray) -> bool:
        sizes.append(one.nbytes)
        return bool((one == other).all())

    monkeypatch.setattr("shmpool.store.store.bulk.same", same)
    return sizes


def test_an_array_that_comes_a_third_time_is_watched_and_compared_no_more(store, compared):
    a = array(1, MIB + 100)
    refs = [ref_of(store, a) for _ in range(5)]
    assert compared[:2] == [a.nbytes] * 2
    assert len(compared) == 2 + 2 * 2 and max(compared[2:]) < 4096, "only what is no whole page"
    assert store.stats().bytes_copied == a.nbytes
    assert all((ref.get() == 1).all() for ref in refs)


@pytest.mark.parametrize("at", [0, 5000, MIB // 2, -5000, -1])
def test_what_is_written_to_a_watched_array_travels(store, compared, at):
    a = array(1, MIB + 100)
    for _ in range(4):
        ref_of(store, a)
    for value in (2, 3, 4):
        a[at] = value
        assert ref_of(store, a).get()[at] == value


def test_a_part_of_a_watched_array_is_compared(store, compared):
    a = array(1, 3 * MIB)
    for _ in range(4):
        ref_of(store, a)
    part = a[MIB : 2 * MIB + 10]
    for _ in range(4):
        ref_of(store, part)
    a[MIB + 5] = 2
    assert ref_of(store, part).get()[5] == 2
    assert ref_of(store, a).get()[MIB + 5] == 2
    part[6] = 3
    assert ref_of(store, a).get()[MIB + 6] == 3


def test_an_array_that_changes_between_its_uses_is_soon_only_compared(store, monkeypatch):
    begun = []
    original = WriteWatch.watch
    monkeypatch.setattr(
        WriteWatch, "watch", lambda *args: begun.append(original(*args)) or begun[-1]
    )
    a = array(0, MIB)
    for value in range(1, 30):
        a.fill(value)
        for _ in range(4):
            assert ref_of(store, a).get()[7] == value
    assert len(begun) == 1


def test_an_array_that_is_gone_is_watched_no_more(store, compared):
    a = array(1, MIB)
    for _ in range(4):
        ref_of(store, a)
    watching = store._written._watch
    assert len(watching._ranges) == 1
    del a
    assert store.live_blocks() == 0
    assert not watching._ranges


def test_what_a_store_asks_the_kernel_with_goes_with_the_store():
    def held() -> list[str]:
        links = []
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(f"/proc/self/fd/{fd}"))
        return sorted(link for link in links if "pagemap" in link or "userfaultfd" in link)

    before = held()
    store = make_store()
    a = array(1, 5 * MIB)
    refs = [ref_of(store, a) for _ in range(4)]
    view = refs[0].get("c")
    view[0] = 2
    assert ref_of(store, view).get()[0] == 2
    if watch._works():
        assert len(held()) > len(before)
    del refs, view, store
    gc.collect()
    assert held() == before


def test_arrays_over_memory_that_others_may_write_to_are_always_compared(store, compared):
    memory = bytearray(MIB)
    a = np.frombuffer(memory, np.uint8)
    for value in range(6):
        memory[value] = value
        assert ref_of(store, a).get()[value] == value
        ref_of(store, a)
    assert set(compared) == {MIB}


def test_nothing_is_watched_where_the_user_says_so(compared, monkeypatch):
    monkeypatch.setenv("SHMPOOL_WATCH_WRITES", "0")
    store = ObjectStore()
    a = array(1, MIB)
    for _ in range(5):
        ref_of(store, a)
    assert compared == [MIB] * 4


def test_threads_that_put_one_array_while_it_changes_see_no_older_state_than_their_own(store):
    """What was in it when put was called, or later: never what was in it before."""
    a = array(0, MIB + 50)
    wrong: list[tuple[int, int]] = []
    written_so_far = 0

    def putter() -> None:
        for _ in range(150):
            before = written_so_far
            got = int(ref_of(store, a).get()[MIB // 2])
            if got < before:
                wrong.append((before, got))

    threads = [threading.Thread(target=putter) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for _ in range(20):  # long enough unchanged to be watched
            ref_of(store, a)
        if written_so_far < 250:
            a[MIB // 2] = written_so_far + 1
            written_so_far += 1
    for thread in threads:
        thread.join()
    assert not wrong


def test_within_an_epoch_an_array_is_taken_to_be_unchanged(store):
    a, epoch = array(1), Epoch()
    first = dump(store, a, epoch)
    a[0] = 2
    second, third = dump(store, a, epoch), dump(store, a, Epoch())
    assert second.blocks == first.blocks
    assert store.load(third, "r")[0] == 2
    for payload in (first, second, third):
        payload.release()


class Refilling:
    """Its pickling changes an array, as user code may."""

    def __init__(self, a: np.ndarray) -> None:
        self.a = a

    def __getstate__(self) -> dict[str, Any]:
        self.a += 1
        return {"a": self.a}


def test_an_epoch_is_over_when_code_of_the_users_may_have_run(store):
    a, epoch = array(0), Epoch()
    objects = [a, Refilling(a), Refilling(a), a]
    payloads = [dump(store, obj, epoch) for obj in objects]
    first, second, third, last = (store.load(payload, "r") for payload in payloads)
    assert [first[0], second.a[0], third.a[0], last[0]] == [0, 1, 2, 2]
    for payload in payloads:
        payload.release()


STRIDED = [
    lambda a: a[:, ::2],
    lambda a: a[10:, 5:],
    lambda a: a[::-1],
    lambda a: a.T[::3],
    lambda a: np.broadcast_to(a[0], (50, a.shape[1])),
    lambda a: a.view("u1,u1,u2,u4")["f2"],
]


@pytest.mark.parametrize("cut", STRIDED)
def test_an_array_that_is_not_contiguous_is_written_once_too(store, cut):
    a = np.arange(200 * 300, dtype=np.uint64).reshape(200, 300)
    part = cut(a)
    refs = [ref_of(store, part) for _ in range(3)] + [ref_of(store, cut(a)) for _ in range(3)]
    assert store.stats().bytes_copied == part.nbytes
    for ref in refs:
        np.testing.assert_array_equal(ref.get(), part)
    a[12, 8] += 77
    a[0, 6] += 77
    np.testing.assert_array_equal(ref_of(store, part).get(), part)
    del refs, ref, part
    del a
    assert store.live_blocks() == 0


def test_parts_of_one_array_that_look_alike_are_told_apart(store):
    a = np.arange(400 * 400, dtype=np.uint32).reshape(400, 400)
    parts = [a[:, ::2], a[:, 1::2], a[::2, :200], a[:200, ::2], a.T[:, ::2], a[:, :200].T]
    refs = [ref_of(store, part) for part in parts * 2]
    for ref, part in zip(refs, parts * 2, strict=True):
        np.testing.assert_array_equal(ref.get(), part)
    assert store.stats().bytes_copied == sum(part.nbytes for part in parts)


def test_an_array_that_is_not_contiguous_and_comes_from_the_store_is_written_once(store):
    a = ref_of(store, np.arange(100_000.0)).get("c")
    copied = store.stats().bytes_copied
    refs = [ref_of(store, a[::2]) for _ in range(3)]
    assert store.stats().bytes_copied - copied == a[::2].nbytes
    a[2] = -1
    assert ref_of(store, a[::2]).get()[1] == -1
    assert [ref.get()[1] for ref in refs] == [2, 2, 2]


def test_memory_that_is_used_again_is_not_taken_for_what_was_there(store):
    for value in range(20):
        a = array(value)  # lies where the last one lay, as a rule
        payload = dump(store, a)
        assert (store.load(payload, "r") == value).all()
        payload.release()
        del a


def test_an_array_of_bytes_is_known_without_a_look(store):
    text = os.urandom(100_000)
    first = dump(store, np.frombuffer(text, np.uint8)), np.frombuffer(text, np.uint8)
    second = dump(store, first[1])
    assert store.load(second, "r").tobytes() == text
    first[0].release()
    second.release()


def test_a_written_view_that_is_sent_twice_is_copied_once(store):
    view = ref_of(store, array(1)).get("c")
    view[0] = 2
    first, second = dump(store, view), dump(store, view)
    copied = second.copied
    first.release()
    second.release()
    assert copied == 0


# ---------------------------------------------------------------- when blocks are free


def test_a_block_lives_as_long_as_its_ref_or_any_array_made_from_it(store):
    ref = ref_of(store, array(1))
    view = ref.get("r")
    part = view[5:10].view()
    del ref, view
    assert blocks(store) == 1 and (part == 1).all()
    del part
    assert blocks(store) == 0 and store.stats().used == 0


def test_a_memoryview_of_an_array_keeps_its_block(store):
    view = memoryview(ref_of(store, array(1)).get("r"))
    assert blocks(store) == 1 and view[0] == 1
    del view
    assert blocks(store) == 0


def test_freed_blocks_are_used_again(store):
    seen = set()
    for value in range(5):
        ref = ref_of(store, array(value))
        seen.add(ref._payload.blocks[0])
        del ref
    assert len(seen) == 1


def test_freed_memory_goes_back_at_once_when_nobody_runs_tasks_and_stays_warm_when_somebody_does(
    store,
):
    def waker() -> None:
        pass

    ref = ref_of(store, array(1))
    del ref
    assert store.stats().resident == 0
    store.start_use(waker)
    ref = ref_of(store, array(1))
    del ref
    assert store.stats().resident >= 100_000
    store.end_use(waker)
    assert store.stats().resident == 0


def test_what_is_only_kept_for_later_goes_with_the_array(store):
    a = array(1)
    ref = ref_of(store, a)
    del ref
    assert store.stats().blocks == 1 and blocks(store) == 0
    del a
    assert store.stats().blocks == 0


def test_a_payload_can_be_released_twice(store):
    payload = dump(store, array(1))
    payload.release()
    payload.release()
    recount(store)


def test_a_full_store_says_so_with_sizes_and_works_on_when_something_is_dropped(memory_backend):
    store = make_store(2 * MIB)
    refs = [ref_of(store, array(n, MIB)) for n in range(2)]
    with pytest.raises(StoreFullError) as caught:
        ref_of(store, array(9, MIB))
    assert (caught.value.requested, caught.value.used) == (MIB, 2 * MIB)
    assert caught.value.capacity == 2 * MIB and "2,097,152" in str(caught.value)
    recount(store, [ref._payload for ref in refs])
    assert [ref.get()[0] for ref in refs] == [0, 1]
    refs.pop()
    assert ref_of(store, array(9, MIB)).get()[0] == 9


def test_copies_that_are_kept_for_later_make_room(memory_backend):
    store = make_store(2 * MIB)
    owners = [array(n, MIB) for n in range(2)]
    for owner in owners:
        dump(store, owner).release()
    assert store.stats().blocks == 2
    assert ref_of(store, array(9, 2 * MIB)).get()[0] == 9


def test_warm_memory_between_blocks_makes_room(memory_backend):
    store = make_store(3 * MIB)

    def waker() -> None:
        pass

    store.start_use(waker)
    first = ref_of(store, array(1, MIB))
    between = ref_of(store, array(2, 4096))
    del first
    large = ref_of(store, array(3, 5 * MIB // 2))
    assert large.get()[0] == 3 and between.get()[0] == 2
    store.end_use(waker)


def test_stats_say_who_holds_what(store):
    a = array(1)
    ref = ref_of(store, a)
    view = ref.get()
    stats = store.stats()
    assert stats.holders == {"views": 1, "workers": 0, "copies": 1, "others": 1}
    assert (stats.blocks, stats.arenas, stats.bytes_copied) == (1, 1, 100_000)
    del view


# ---------------------------------------------------------------- finalizers


def test_views_that_end_while_the_lock_is_held_are_settled_when_it_is_let_go(store):
    views = [ref_of(store, array(n)).get("c") for n in range(3)]
    with store._books:
        views.clear()
        assert len(store._pending) >= 3 and len(store._addresses) == 3
    assert len(store._addresses) == 0 and blocks(store) == 0


def test_garbage_that_is_collected_under_the_lock_is_settled_afterwards(store, monkeypatch):
    class Cycle:
        pass

    for n in range(3):
        cycle = Cycle()
        cycle.me, cycle.view = cycle, ref_of(store, array(n)).get("c")
        cycle.ref = ref_of(store, array(n))
    del cycle
    original = type(store)._hold

    def hold(self, block, **options):
        gc.collect()
        return original(self, block, **options)

    monkeypatch.setattr(type(store), "_hold", hold)
    keep = ref_of(store, array(9))
    monkeypatch.undo()
    recount(store, [keep._payload])
    assert blocks(store) == 1 and keep.get()[0] == 9


def test_views_may_end_in_many_threads_at_once(store):
    ref = ref_of(store, array(1))
    failed: list[BaseException] = []

    def take_and_drop() -> None:
        try:
            for _ in range(100):
                view = ref.get("c")
                assert view[0] == 1
                view[0] = 2
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=take_and_drop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    recount(store, [ref._payload])
    assert (ref.get("c") == 1).all()


def test_a_view_outlives_its_store():
    store = make_store()
    view = ref_of(store, array(1)).get("c")
    gone = weakref.ref(store)
    del store
    gc.collect()
    assert gone() is None
    view[0] = 2
    assert view[0] == 2 and view[-1] == 1


@pytest.mark.leaks("the exception on purpose leaves a block on the books", "blocks")
def test_an_interrupt_while_finalizers_are_worked_off_does_not_leave_the_lock_locked(store):
    def interrupted() -> None:
        raise KeyboardInterrupt

    store._pending.append((1, 1))
    store._drain = interrupted
    with pytest.raises(KeyboardInterrupt):
        store.stats()
    del store._drain
    locked = store.is_inside()
    if locked:
        store._lock.release()
    assert not locked


# ---------------------------------------------------------------- refs


def test_a_ref_inside_an_object_carries_its_blocks_along(store):
    inner = ref_of(store, array(3))
    outer = ref_of(store, {"ref": inner})
    del inner
    again = outer.get()["ref"]
    assert isinstance(again, ObjectRef) and again.get()[0] == 3
    del outer
    assert blocks(store) == 1 and again.get()[0] == 3


def test_a_ref_that_is_pickled_elsewhere_says_why_it_cannot_be(store):
    import pickle

    with pytest.raises(RefError, match="same store"):
        pickle.dumps(ref_of(store, array(1)))


class PutsWhenPickled:
    store: Any = None

    def __init__(self, value: int) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectRef.get, (put(array(self.value), store=self.store),)


@pytest.mark.leaks("what it shows is a block that is used and free at once", "blocks")
def test_a_ref_that_is_made_while_pickling_is_held(store, monkeypatch):
    monkeypatch.setattr(PutsWhenPickled, "store", store)
    payload = dump(store, PutsWhenPickled(7))
    other = ref_of(store, array(9))
    assert payload.blocks[0] != other._payload.blocks[0]
    assert store.load(payload, "r")[0] == 7
    payload.release()


# ---------------------------------------------------------------- forks


def in_a_child(work) -> None:
    """Run it in a forked child; fail if it fails there."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "it failed in the child"


def test_a_forked_child_frees_nothing_of_its_parents(store):
    ref, held = ref_of(store, array(1)), [ref_of(store, array(2)).get("c")]
    held[0][0] = 5

    def child() -> None:
        nonlocal ref
        assert ref.get()[0] == 1 and held[0][0] == 5
        held.clear()
        del ref
        gc.collect()
        for _ in range(3):
            store.stats()

    in_a_child(child)
    recount(store, [ref._payload])
    assert (ref.get("r") == 1).all() and held[0][0] == 5 and (held[0][1:] == 2).all()


def test_writes_of_a_forked_child_are_its_own(store):
    ref = ref_of(store, array(1))
    view = ref.get("c")

    def child() -> None:
        view[:] = 8
        ref.get("c")[:] = 9
        assert (view == 8).all()

    in_a_child(child)
    assert (view == 1).all() and (ref.get("c") == 1).all()


def test_a_child_can_be_forked_while_another_thread_holds_the_lock(store):
    ref = ref_of(store, array(1))
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with store._books:
            held.set()
            go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def child() -> None:
        assert ref.get()[0] == 1

    in_a_child(child)
    go.set()
    thread.join()


def test_what_another_thread_holds_survives_a_fork(store):
    made, forked = threading.Event(), threading.Event()
    local = threading.local()
    seen = []

    def work() -> None:
        local.ref = ref_of(store, array(7))
        made.set()
        forked.wait()
        seen.append(int(local.ref.get()[0]))
        del local.ref

    thread = threading.Thread(target=work)
    thread.start()
    made.wait()
    in_a_child(lambda: None)
    forked.set()
    thread.join()
    assert seen == [7]


def test_a_forked_child_does_not_write_into_its_parents_arenas(store):
    keep = ref_of(store, array(1))
    done, done_out = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.read(done, 1)
            ref_of(store, array(6))
        finally:
            os._exit(0)
    mine = ref_of(store, array(5))
    os.write(done_out, b"!")
    os.waitpid(pid, 0)
    os.close(done)
    os.close(done_out)
    assert (mine.get() == 5).all() and keep.get()[0] == 1


# ---------------------------------------------------------------- a parent and a worker


def test_an_argument_is_held_until_the_answer_and_no_longer(link):
    ref = ref_of(link.parent, array(7))
    assert link.call(lambda a: int(a.sum()), ref.get()) == 700_000
    recount(link.parent, [ref._payload])
    recount(link.worker)
    assert blocks(link.worker) == 0


def test_a_worker_writes_into_its_argument_and_nobody_sees_it(link):
    ref = ref_of(link.parent, array(7))

    def work(a: np.ndarray) -> int:
        a[:] = 1
        return int(a[0])

    assert link.call(work, ref.get("c")) == 1
    assert (ref.get() == 7).all()
    assert link.call(lambda a: int(a[0]), ref.get("c")) == 7, "not even the next task"


def test_a_result_is_the_workers_until_the_parent_lets_go(link):
    result = link.call(lambda _: array(5), None)
    assert (result == 5).all() and in_store(link.parent, result)
    assert blocks(link.worker) == 1
    recount(link.worker, lent=link.lent.elements())
    link.flush()
    assert (result == 5).all() and blocks(link.worker) == 1
    del result
    assert link.down.to_free, "it is to be told"
    link.flush()
    assert blocks(link.worker) == 0 and blocks(link.parent) == 0
    recount(link.worker)


def test_a_result_that_is_sent_twice_is_freed_when_both_are_gone(link):
    kept = []

    def work(again: bool) -> Any:
        if not again:
            kept.append(ref_of(link.worker, array(5)).get("r"))
        return kept[0]

    first, second = link.call(work, False), link.call(work, True)
    kept.clear()
    del first
    link.flush()
    assert (second == 5).all() and blocks(link.worker) == 1
    del second
    link.flush()
    assert blocks(link.worker) == 0
    recount(link.worker)


def test_a_result_that_goes_back_to_its_worker_is_not_copied(link):
    result = link.call(lambda _: array(5), None)
    before = link.parent.stats().bytes_copied
    same = link.call(lambda a: a[10:], result)
    assert link.parent.stats().bytes_copied == before
    assert np.shares_memory(link.parent.load(dump(link.parent, same), "r"), same) or len(same)
    np.testing.assert_array_equal(same, result[10:])


def test_a_result_goes_on_to_another_worker(link):
    other = Link(link.parent, make_store())
    result = link.call(lambda _: array(5), None)
    before = link.parent.stats().bytes_copied
    assert other.call(lambda a: int(a[0]), result) == 5
    assert link.parent.stats().bytes_copied == before
    del result
    other.flush()
    link.flush()
    recount(link.worker)
    recount(other.worker)


def test_an_argument_that_a_worker_returns_is_the_parents_own(link):
    ref = ref_of(link.parent, array(5))
    same = link.call(lambda a: a[5:], ref.get())
    assert in_store(link.parent, same) and len(link.parent._arenas) == 1
    assert len(set(map(address_of, (same[:1], ref.get("c")[5:6])))) == 2
    assert blocks(link.worker) == 0


def test_an_argument_that_a_worker_keeps_is_held_for_it(link):
    kept = []
    link.call(kept.append, ref_of(link.parent, array(5)).get())
    assert blocks(link.parent) == 1 and len(link.down.keeps) == 1
    refs = [ref_of(link.parent, array(n)) for n in range(10)]
    assert (kept[0] == 5).all()
    recount(link.parent, [ref._payload for ref in refs])
    recount(link.worker)
    refs.clear()
    kept.clear()
    link.flush()
    assert blocks(link.parent) == 0 and not link.down.keeps


def test_an_argument_that_is_kept_twice_is_held_until_both_are_gone(link):
    kept = []
    ref = ref_of(link.parent, array(5))
    for _ in range(2):
        link.call(kept.append, ref.get())
    del ref
    kept.pop()
    link.flush()
    assert blocks(link.parent) == 1 and (kept[0] == 5).all()
    kept.pop()
    link.flush()
    assert blocks(link.parent) == 0


def test_what_was_let_go_of_and_then_kept_again_is_held(link):
    parent, down = link.parent, link.down
    ref = ref_of(parent, array(5))
    block = ref._payload.blocks[0]
    parent.peer_keeps(down, [block], [])
    # Let go of, brought again by another task, and kept again: one answer says both.
    parent.peer_keeps(down, [block], [block])
    try:
        assert down.keeps == {block[:2]}
    finally:
        parent.peer_keeps(down, [], [block])


def test_blocks_that_are_let_go_of_at_a_distance_come_home_in_any_order(link):
    results = [link.call(array, n) for n in range(6)]
    for index in (3, 0, 3, 1, 1, 0):
        results.pop(index)
        link.flush()
        for left in results:
            assert (left == left[0]).all()
        left = None
        recount(link.worker, lent=link.lent.elements())
    assert blocks(link.worker) == 0


def test_when_a_worker_dies_its_results_live_on_and_its_claims_end(link):
    kept = []
    result = link.call(lambda _: array(5), None)
    link.call(kept.append, ref_of(link.parent, array(6)).get())
    link.parent.lost_peer(link.down)
    link.parent.lost_peer(link.down)
    assert blocks(link.parent) == 1, "the result; what it had kept is free"
    assert (result == 5).all() and len(link.parent._arenas) == 2
    other = Link(link.parent, make_store())
    assert other.call(lambda a: int(a[0]), result) == 5
    arena = link.parent._addresses.find(address_of(result), 1)
    assert arena is not None
    del result
    assert len(link.parent._arenas) == 1, "its arena went with the last block"
    other.flush()
    assert len(other.worker._arenas) == 0, "and those who knew it were told"
    kept.clear()
    recount(link.parent)


def test_when_a_worker_dies_without_blocks_its_arena_goes_at_once(link):
    result = link.call(lambda _: array(5), None)
    del result
    assert len(link.parent._arenas) == 1
    link.parent.lost_peer(link.down)
    assert len(link.parent._arenas) == 0


def test_refs_travel_and_are_counted(link):
    kept = []
    ref = ref_of(link.parent, array(5))
    link.call(lambda refs: kept.append(refs[0]), [ref])
    del ref
    assert blocks(link.parent) == 1 and kept[0].get()[0] == 5
    kept.clear()
    link.flush()
    assert blocks(link.parent) == 0
    back = link.call(lambda _: ref_of(link.worker, array(6)), None)
    gc.collect()
    assert back.get()[0] == 6
    del back
    link.flush()
    assert blocks(link.worker) == 0


def test_a_payload_that_names_what_is_not_there_is_a_wire_error(link):
    payload = dump(link.parent, array(5))
    with pytest.raises(WireError, match="no arena"):
        link.worker.receive(payload.data, link.up)
    with pytest.raises(WireError):
        link.worker.receive(b"", link.up)
    payload.release()
    recount(link.worker)


def test_an_arena_that_is_smaller_than_it_should_be_is_a_wire_error(link):
    payload = dump(link.parent, array(5))
    ((info, fd),) = link.parent.introduce(link.down, payload.blocks)
    with pytest.raises(WireError, match="only"):
        link.worker.meet(info._replace(size=info.size + MIB), fd, link.up)
    payload.release()


def test_an_arena_that_is_known_already_is_not_taken_in_twice(link):
    payload = dump(link.parent, array(5))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        for info, fd in link.parent.introduce(link.down, payload.blocks):
            link.worker.meet(info, fd, link.up)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    payload.release()


def test_frees_that_did_not_arrive_are_told_again(link):
    result = link.call(lambda _: array(5), None)
    del result
    told = link.parent.take_frees(link.down, 1000)
    assert len(told[0]) == 1 and link.parent.take_frees(link.down, 1000) == ([], [])
    link.parent.untake_frees(link.down, *told)
    assert link.parent.take_frees(link.down, 1000) == told
    link.parent.untake_frees(link.down, *told)
    link.flush()
    assert blocks(link.worker) == 0


def test_a_worker_that_keeps_what_it_was_not_given_is_a_wire_error(link):
    with pytest.raises(WireError, match="not lent"):
        link.parent.peer_keeps(link.down, [Block(1, 2, 3)], [])


def replaced_in_its_block(store: ObjectStore, payload: Payload, old: Block, new: Block) -> None:
    """What only a process gone astray does: rewrite an indirect payload that others have been told of."""
    layout = decode(payload.data)
    assert layout.indirect
    (block,), (span,) = layout.blocks, layout.spans
    memory = store._arenas[block.arena].writable(block.offset, span.nbytes)
    text = memory.tobytes().replace(struct.pack("<3Q", *old), struct.pack("<3Q", *new))
    assert text != memory.tobytes()
    memory[:] = np.frombuffer(text, np.uint8)


def test_an_indirect_payload_that_names_what_is_not_there_is_a_wire_error(link):
    payload = dump(link.worker, [array(5), *range(100_000)])
    for info, fd in link.worker.introduce(link.up, payload.blocks):
        link.parent.meet(info, fd, link.down)
    inner = next(block for block in payload.blocks if block not in decode(payload.data).blocks)
    replaced_in_its_block(link.worker, payload, inner, inner._replace(offset=inner.offset + 1))
    with pytest.raises(WireError, match="a payload names"):
        link.parent.receive(payload.data, link.down)
    assert blocks(link.parent) == 0
    recount(link.parent)
    payload.release()


def test_an_indirect_payload_that_is_rewritten_after_it_came_is_a_wire_error(link):
    payload = dump(link.worker, [array(5), *range(100_000)])
    for info, fd in link.worker.introduce(link.up, payload.blocks):
        link.parent.meet(info, fd, link.down)
    link.worker.lend(payload, link.up)
    received = link.parent.receive(payload.data, link.down)
    inner = next(block for block in payload.blocks if block not in decode(payload.data).blocks)
    replaced_in_its_block(link.worker, payload, inner, inner._replace(offset=inner.offset + 4096))
    with pytest.raises(WireError, match="has changed since it came"):
        link.parent.load(received, "c")
    received.release()
    assert blocks(link.parent) == 0
    payload.release()


@pytest.mark.parametrize("mode", ["w", "r+", None])
def test_a_ref_knows_two_ways_to_be_read(store, mode):
    ref = put(array(5), store=store)
    with pytest.raises(ValueError, match="mmap_mode must be 'r' or 'c'"):
        ref.get(mode)


def test_what_is_no_ref_cannot_be_got(store):
    ref = put(array(5), store=store)
    assert [a.tobytes() for a in get([ref, ref])] == [array(5).tobytes()] * 2
    for what in ("x", [ref, "x"], {ref}):
        with pytest.raises(TypeError, match="takes an ObjectRef or a list of them"):
            get(what)


def test_a_ref_says_how_large_its_object_is(store):
    assert "bytes>" in repr(put(array(5), store=store))


def test_memory_that_the_system_does_not_have_is_an_error_and_leaves_no_block(monkeypatch):
    monkeypatch.setenv("SHMPOOL_MEMORY_BACKEND", "memfd")
    store = make_store()

    def no_memory(*_: object) -> int:
        ctypes.set_errno(errno.EFAULT)  # what the kernel says of pages that cannot be had
        return -1

    with monkeypatch.context() as patch:
        patch.setattr(segment, "_madvise", no_memory)
        with pytest.raises(StoreFullError, match="no memory for a block"):
            store.new_shared(MIB)
    recount(store)
    assert blocks(store) == store.stats().resident == 0
    assert store.new_shared(MIB).nbytes == MIB


def test_arenas_that_a_worker_does_not_have_or_that_are_its_own_are_not_forgotten(link):
    link.call(lambda _: array(7), None)
    link.flush()
    assert blocks(link.worker) == 0
    own = [*link.worker._arenas]
    assert own
    link.worker.forget([*own, 12345])
    assert own == [*link.worker._arenas]
    recount(link.worker)
    assert link.call(lambda _: array(8), None).tobytes() == array(8).tobytes()


def test_an_interrupt_while_memory_is_reserved_leaves_no_block(store, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Heap, "populate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            put(array(5), store=store)
    assert blocks(store) == 0
    recount(store)
    assert put(array(5), store=store).get().tobytes() == array(5).tobytes()
