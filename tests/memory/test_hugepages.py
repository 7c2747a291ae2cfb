"""Huge pages that are asked for: there where the system gives them, and nothing is different but the time it takes."""

from __future__ import annotations

import errno
import mmap
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shmpool
from shmpool.memory import dirty, hugepages, segment
from shmpool.memory.hugepages import WORTH_IT, Collapser
from shmpool.memory.segment import HUGE_PAGE, PAGE, Mapping, Segment

SIZE = 4 * HUGE_PAGE


def in_huge_pages(mapping: Mapping) -> int:
    """Bytes of a mapping that are mapped as huge pages."""
    text = Path("/proc/self/smaps").read_text()
    start = f"{mapping.address:x}-"
    (entry,) = re.findall(rf"^{start}.*?^VmFlags", text, re.MULTILINE | re.DOTALL)
    return sum(int(kb) * 1024 for kb in re.findall(r"(?:Shmem|File)PmdMapped: +(\d+)", entry))


@pytest.fixture
def memory() -> Iterator[Segment]:
    memory = Segment.create(SIZE, "memfd")
    yield memory
    memory.close()


@pytest.fixture
def works() -> None:
    """The system has some, now."""
    trial = Segment.create(SIZE, "memfd")
    try:
        mapping = trial.map("r+")
        Collapser().make(mapping, 0, SIZE)
        if not in_huge_pages(mapping):
            pytest.skip("no huge pages of shared memory can be asked for here (Linux 6.7)")
    finally:
        trial.close()


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
@pytest.mark.parametrize("start", [0, PAGE, HUGE_PAGE, HUGE_PAGE + 5 * PAGE])
def test_addresses_have_the_same_place_in_a_huge_page_as_what_they_map(memory, mode, start):
    wide = Mapping(memory.fd, start, SIZE - start, mode)
    assert (wide.address - start) % HUGE_PAGE == 0
    assert wide.array(start, SIZE - start).nbytes == SIZE - start
    assert wide.array(SIZE - PAGE, PAGE).nbytes == PAGE
    with pytest.raises(ValueError, match="buffer"):
        wide.array(SIZE, HUGE_PAGE + PAGE)


def test_a_mapping_goes_with_its_last_array(memory):
    def is_mapped() -> bool:
        return address in Path("/proc/self/maps").read_text()

    mapping = memory.map("r+")
    address = f"{mapping.address:x}-"
    array = mapping.array(PAGE, PAGE)
    del mapping
    assert is_mapped()
    array[0] = 1
    del array
    assert not is_mapped()


@pytest.mark.usefixtures("works")
def test_what_is_made_is_there_at_once_and_for_all_mappings(memory):
    mapping = memory.map("r+")
    Collapser().make(mapping, 0, SIZE)
    assert in_huge_pages(mapping) == SIZE
    array = mapping.array(0, SIZE)
    assert not array.any()
    array[:] = np.arange(SIZE) % 251
    for mode in ("r", "c"):
        other = memory.map(mode)
        assert np.array_equal(other.array(0, SIZE), array)
        assert in_huge_pages(other) == SIZE
    assert os.fstat(memory.fd).st_blocks * 512 == SIZE


@pytest.mark.usefixtures("works")
def test_only_what_lies_whole_in_the_range_is_made(memory):
    mapping = memory.map("r+")
    Collapser().make(mapping, PAGE, 3 * HUGE_PAGE + PAGE)
    assert in_huge_pages(mapping) == 2 * HUGE_PAGE
    assert os.fstat(memory.fd).st_blocks * 512 == 2 * HUGE_PAGE


@pytest.mark.usefixtures("works")
def test_memory_goes_back_also_in_parts(memory):
    mapping = memory.map("r+")
    Collapser().make(mapping, 0, SIZE)
    array = mapping.array(0, SIZE)
    array[:] = 7
    mapping.give_back(HUGE_PAGE // 2, SIZE - 3 * PAGE)
    kept = HUGE_PAGE // 2 + 3 * PAGE
    assert os.fstat(memory.fd).st_blocks * 512 == kept
    assert array.astype(bool).sum() == kept
    assert (array[: HUGE_PAGE // 2] == 7).all()
    assert (array[-3 * PAGE :] == 7).all()


@pytest.mark.usefixtures("works")
@pytest.mark.parametrize("name", ["scan", "pagemap"])
def test_private_writes_are_seen_and_can_be_dropped(memory, name):
    detector = dirty.choose(name)
    shared = memory.map("r+")
    Collapser().make(shared, 0, SIZE)
    shared.array(0, SIZE)[:] = 1
    private = memory.map("c")
    view = private.array(0, SIZE)
    assert view.sum() == SIZE
    if name == "scan" or _linux() >= (6, 11):
        assert not detector.is_dirty(private.address, SIZE)
    view[HUGE_PAGE + 12345] = 9
    assert detector.is_dirty(private.address, SIZE)
    assert shared.array(0, SIZE).sum() == SIZE
    private.drop_private_pages(0, SIZE)
    assert view.sum() == SIZE
    if name == "scan" or _linux() >= (6, 11):
        assert not detector.is_dirty(private.address, SIZE)
    detector.close()


def _linux() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


# ---------------------------------------------------------------- where there are none


def test_what_cannot_be_one_is_an_error_and_stays_as_it_is(memory):
    mapping = memory.map("r+")
    mapping.array(0, PAGE)[:] = 7
    with pytest.raises(OSError, match="no huge pages") as caught:
        mapping.collapse(1, 1 + HUGE_PAGE)  # no system has any that begin within a page
    assert caught.value.errno == errno.EINVAL
    assert mapping.array(0, PAGE).sum() == 7 * PAGE
    assert not in_huge_pages(mapping)


class Told:
    """A mapping that does as it is told: fails, or takes long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[int] = []
        self.now = self.used = 0.0
        self.takes: float = 0.0
        self.raises: int | None = None
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "thread_time", lambda: self.used)
        monkeypatch.setattr(hugepages, "_are_allowed", lambda: True)

    def populate(self, start: int, stop: int) -> None:
        assert stop == start + PAGE

    def collapse(self, start: int, stop: int) -> None:
        assert stop == start + HUGE_PAGE
        self.asked.append(start // HUGE_PAGE)
        self.used += self.takes
        if self.raises is not None:
            raise OSError(self.raises, "as told")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(monkeypatch)


def ask(collapser: Collapser, told: Any) -> list[int]:
    """Which pages are asked for."""
    told.asked.clear()
    collapser.make(told, 0, 10 * HUGE_PAGE)
    return [*told.asked]


def test_what_is_slow_is_left_at_that_and_tried_again_later_each_time(told):
    collapser = Collapser()
    assert ask(collapser, told) == [*range(10)]
    told.takes = 1.0
    for pause in (1, 2, 4, 8, 16, 32, 64, 64):
        assert collapser.may_be_had()
        assert ask(collapser, told) == [0, 1]
        told.now += 0.99 * pause
        assert not collapser.may_be_had()
        assert ask(collapser, told) == []
        told.now += 0.02 * pause
    told.takes = 0.0
    assert ask(collapser, told) == [*range(10)]
    told.takes = 1.0
    assert ask(collapser, told) == [0, 1]
    told.now += 1.01
    assert collapser.may_be_had(), "the pauses begin anew"


def test_where_there_are_none_now_it_is_tried_again(told):
    collapser = Collapser()
    told.raises = errno.ENOMEM
    assert ask(collapser, told) == [0]
    assert not collapser.may_be_had()
    told.now += 1.01
    told.raises = None
    assert ask(collapser, told) == [*range(10)]


def test_where_the_system_does_not_know_of_it_that_was_the_last_try(told):
    collapser = Collapser()
    told.raises = errno.EINVAL
    assert ask(collapser, told) == [0]
    told.now += 1e9
    assert not collapser.may_be_had()
    assert ask(collapser, told) == []


@pytest.mark.parametrize("case", ["never", "no setting", "an old kernel", "32 bits"])
def test_where_it_is_not_allowed_it_is_not_tried(case, tmp_path, monkeypatch):
    setting = tmp_path / "enabled"
    setting.write_text("always [madvise] never\n")
    monkeypatch.setattr(hugepages, "_SETTING", str(setting))
    if sys.platform == "linux" and sys.maxsize > 1 << 32 and _linux() >= (6, 7):
        assert Collapser().may_be_had()
    if case == "never":
        setting.write_text("always madvise [never]\n")
    elif case == "no setting":
        setting.unlink()
    elif case == "an old kernel":
        name = os.uname()
        old = os.uname_result((name[0], name[1], "6.6.9-generic", *name[3:]))
        monkeypatch.setattr(os, "uname", lambda: old)
    else:
        monkeypatch.setattr(sys, "maxsize", (1 << 31) - 1)
    assert not Collapser().may_be_had()


@pytest.mark.parametrize("case", ["no room", "not there", "not here"])
def test_where_a_mapping_cannot_be_placed_it_is_anywhere(case, memory, monkeypatch):
    if case == "no room":
        make = mmap.mmap

        def refuse(fd: int, *args: Any, **options: Any) -> mmap.mmap:
            if fd == -1:
                raise OSError(errno.ENOMEM, "no room")
            return make(fd, *args, **options)

        monkeypatch.setattr(mmap, "mmap", refuse)
    elif case == "not there":
        monkeypatch.setattr(segment, "_map_at", lambda *_: -1)
        monkeypatch.setattr(segment, "_failed", [])
    else:
        monkeypatch.setattr(segment, "_CAN_PLACE", False)
    mapping = memory.map("r+")
    mapping.populate(0, SIZE)
    mapping.array(0, SIZE)[:] = 3
    mapping.give_back(0, HUGE_PAGE)
    assert memory.map("r").array(0, SIZE).sum() == 3 * (SIZE - HUGE_PAGE)


# ---------------------------------------------------------------- in a store


@pytest.mark.parametrize("huge_pages", ["auto", False])
def test_a_store_asks_for_them_unless_it_is_to_have_none(huge_pages, monkeypatch):
    asked: list[tuple[int, int]] = []
    make = Collapser.make

    def noted(self: Collapser, mapping: Mapping, start: int, stop: int) -> None:
        asked.append((start, stop))
        make(self, mapping, start, stop)

    monkeypatch.setattr(Collapser, "make", noted)
    store = shmpool.ObjectStore(huge_pages=huge_pages)
    small, large = np.ones(WORTH_IT - PAGE, np.uint8), np.arange(WORTH_IT, dtype=np.uint8)
    refs = [shmpool.put(array, store=store) for array in (small, large, large.copy())]
    if huge_pages == "auto" and store._heap._collapser and store._heap._collapser.may_be_had():
        assert [stop - start for start, stop in asked] == [WORTH_IT, WORTH_IT]
    if not huge_pages:
        assert not asked
    for ref, array in zip(refs, (small, large, large), strict=True):
        assert np.array_equal(ref.get(), array)
        private = ref.get("c")
        private[:] = 0
        assert np.array_equal(ref.get("c"), array)


def test_memory_that_was_used_before_is_used_again_as_it_is(monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(Collapser, "make", lambda *args: asked.append(1))
    with shmpool.ShmExecutor(1) as executor:
        store = executor._store
        for number in range(3):
            ref = shmpool.put(np.full(SIZE // 8, float(number)), store=store)
            assert executor.submit(np.sum, ref).result(60) == SIZE // 8 * number
            del ref
    assert len(asked) <= 1
