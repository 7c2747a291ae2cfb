"""Dirty-page detectors on real private mappings, of anonymous memory and of an unlinked file."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
import resource
import struct
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shmpool.memory import dirty, pagemap
from shmpool.memory.dirty import AlwaysDirty, DirtyDetector, PagemapRead

PAGE = mmap.PAGESIZE
PAGES = 7


@pytest.fixture(params=["memfd", "file"])
def descriptor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """Open a file of PAGES pages without a name, every page of it filled."""
    if request.param == "memfd":
        if not hasattr(os, "memfd_create"):
            pytest.skip("no memfd_create here")
        fd = os.memfd_create("test")
    else:
        fd, path = tempfile.mkstemp(dir=tmp_path)
        os.unlink(path)
    os.write(fd, b"".join(bytes([1 + n]) * PAGE for n in range(PAGES)))
    yield fd
    os.close(fd)


@pytest.fixture
def mapping(descriptor: int) -> mmap.mmap:
    """Map that file privately and writable; nothing is touched yet."""
    return mmap.mmap(descriptor, PAGES * PAGE, mmap.MAP_PRIVATE)


@pytest.fixture(params=["scan", "pagemap"])
def detector(request: pytest.FixtureRequest) -> Iterator[DirtyDetector]:
    """Make each of the detectors that ask the kernel; skip those that do not work here."""
    try:
        made = dirty.choose(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield made
    made.close()


def address_of(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def dirty_pages(detector: DirtyDetector, mapping: mmap.mmap) -> list[int]:
    """Ask about one page after the other; return the dirty ones."""
    address = address_of(mapping)
    return [n for n in range(PAGES) if detector.is_dirty(address + n * PAGE, PAGE)]


def read_all(mapping: mmap.mmap) -> None:
    assert [mapping[n * PAGE] for n in range(PAGES)] == [1 + n for n in range(PAGES)]


def in_child(check: Callable[[], bool]) -> bool:
    """Fork, and return what the check says there; fail if it raises."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if check() else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 1), f"the child failed with exit code {code}"
    return code == 0


def open_pagemaps() -> int:
    """Count the descriptors of this process that are open on a pagemap."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists the folder
            count += os.readlink(f"/proc/self/fd/{name}").endswith("/pagemap")
    return count


def test_untouched_pages_are_clean(detector: DirtyDetector, mapping: mmap.mmap) -> None:
    assert dirty_pages(detector, mapping) == []
    assert not detector.is_dirty(address_of(mapping), PAGES * PAGE)


def test_pages_that_were_only_read_are_clean(detector: DirtyDetector, mapping: mmap.mmap) -> None:
    read_all(mapping)
    assert dirty_pages(detector, mapping) == []


@pytest.mark.parametrize("page", range(PAGES))
@pytest.mark.parametrize("within", [0, PAGE // 2, PAGE - 1])
def test_one_written_byte_makes_its_page_dirty_and_no_other(
    detector: DirtyDetector, mapping: mmap.mmap, page: int, within: int
) -> None:
    read_all(mapping)
    mapping[page * PAGE + within] = 200
    assert dirty_pages(detector, mapping) == [page]


def test_a_write_without_a_read_before_it_is_seen(
    detector: DirtyDetector, mapping: mmap.mmap
) -> None:
    mapping[3 * PAGE] = 200
    assert dirty_pages(detector, mapping) == [3]


def test_reading_and_writing_back_is_a_write(detector: DirtyDetector, mapping: mmap.mmap) -> None:
    mapping[2 * PAGE] += 1
    mapping[4 * PAGE] += 0  # the same value again: the kernel cannot tell
    assert dirty_pages(detector, mapping) == [2, 4]


def test_a_page_overwritten_with_zeros_is_dirty(
    detector: DirtyDetector, mapping: mmap.mmap
) -> None:
    mapping[PAGE : 2 * PAGE] = bytes(PAGE)
    assert dirty_pages(detector, mapping) == [1]


def test_a_dirty_page_stays_dirty_when_it_is_read(
    detector: DirtyDetector, mapping: mmap.mmap
) -> None:
    mapping[0] = 200
    assert mapping[0] == 200
    assert dirty_pages(detector, mapping) == [0]


def test_dropped_pages_are_clean_again_and_show_the_file(
    detector: DirtyDetector, mapping: mmap.mmap
) -> None:
    for page in range(PAGES):
        mapping[page * PAGE] = 200
    assert dirty_pages(detector, mapping) == list(range(PAGES))
    mapping.madvise(mmap.MADV_DONTNEED, 2 * PAGE, 3 * PAGE)
    assert dirty_pages(detector, mapping) == [0, 1, 5, 6]
    mapping.madvise(mmap.MADV_DONTNEED)
    assert dirty_pages(detector, mapping) == []
    read_all(mapping)
    assert dirty_pages(detector, mapping) == []


def test_what_others_write_to_the_file_does_not_make_it_dirty(
    detector: DirtyDetector, descriptor: int, mapping: mmap.mmap
) -> None:
    read_all(mapping)
    os.pwrite(descriptor, b"\xc8", 0)
    with mmap.mmap(descriptor, PAGES * PAGE) as shared:
        shared[PAGE] = 200
    assert (mapping[0], mapping[PAGE]) == (200, 200)
    assert dirty_pages(detector, mapping) == []


@pytest.mark.parametrize("pages_per_question", [1, 2, 3, 8192])
def test_any_range_is_dirty_if_and_only_if_a_written_page_is_in_it(
    detector: DirtyDetector,
    mapping: mmap.mmap,
    pages_per_question: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dirty, "_PAGES_PER_QUESTION", pages_per_question)
    written = {1, 4}
    for page in written:
        mapping[page * PAGE + 17] = 200
    address = address_of(mapping)
    for first, last in itertools.combinations(range(PAGES + 1), 2):
        told = detector.is_dirty(address + first * PAGE, (last - first) * PAGE)
        assert told == bool(written & set(range(first, last))), f"pages [{first}, {last})"


def test_a_range_that_is_not_aligned_means_every_page_it_touches(
    detector: DirtyDetector, mapping: mmap.mmap
) -> None:
    mapping[3 * PAGE] = 200
    address = address_of(mapping) + 3 * PAGE
    assert detector.is_dirty(address + PAGE - 1, 1)
    assert detector.is_dirty(address + 100, 100)
    assert detector.is_dirty(address - 1, 2)
    assert not detector.is_dirty(address - 1, 1)
    assert detector.is_dirty(address + PAGE - 1, 2)
    assert not detector.is_dirty(address + PAGE, 1)


@pytest.mark.parametrize("name", ["scan", "pagemap", "none"])
def test_an_empty_range_is_clean(name: str, mapping: mmap.mmap) -> None:
    mapping[0] = 200
    try:
        detector = dirty.choose(name)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert not detector.is_dirty(address_of(mapping) + 1, 0)
    detector.close()


def test_a_child_sees_its_own_writes_and_the_parent_does_not(
    detector: DirtyDetector, mapping: mmap.mmap
) -> None:
    read_all(mapping)
    assert dirty_pages(detector, mapping) == []  # and the descriptor is open

    def write_and_look() -> bool:
        mapping[5 * PAGE] = 200
        return dirty_pages(detector, mapping) == [5]

    assert in_child(write_and_look)
    assert dirty_pages(detector, mapping) == []


def test_a_child_does_not_see_what_the_parent_writes_after_the_fork(
    detector: DirtyDetector, mapping: mmap.mmap
) -> None:
    read_all(mapping)
    assert dirty_pages(detector, mapping) == []
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0 if dirty_pages(detector, mapping) == [] else 1)
        finally:
            os._exit(2)
    os.close(reading)
    mapping[0] = 200
    os.write(writing, b"x")
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert dirty_pages(detector, mapping) == [0]


def test_copies_inherited_from_the_parent_are_dirty_in_the_child_too(
    detector: DirtyDetector, mapping: mmap.mmap
) -> None:
    mapping[PAGE] = 200
    assert in_child(lambda: mapping[PAGE] == 200 and dirty_pages(detector, mapping) == [1])


def test_a_child_has_no_descriptor_of_its_parents_memory(
    detector: DirtyDetector, mapping: mmap.mmap
) -> None:
    before = open_pagemaps()
    assert not detector.is_dirty(address_of(mapping), PAGE)
    assert open_pagemaps() == before + 1
    assert in_child(lambda: open_pagemaps() == 0)
    assert open_pagemaps() == before + 1


def test_a_grandchild_sees_its_own_writes(detector: DirtyDetector, mapping: mmap.mmap) -> None:
    def write_and_look() -> bool:
        mapping[0] = 200
        return dirty_pages(detector, mapping) == [0]

    def fork_again() -> bool:
        return (
            dirty_pages(detector, mapping) == []
            and in_child(write_and_look)
            and dirty_pages(detector, mapping) == []
        )

    assert dirty_pages(detector, mapping) == []
    assert in_child(fork_again)


def test_close_gives_the_descriptor_back_and_can_be_repeated(
    detector: DirtyDetector, mapping: mmap.mmap
) -> None:
    before = open_pagemaps()
    detector.is_dirty(address_of(mapping), PAGE)
    detector.close()
    detector.close()
    assert open_pagemaps() == before


def test_a_detector_that_nobody_holds_any_more_gives_its_descriptor_back(
    mapping: mmap.mmap,
) -> None:
    before = open_pagemaps()
    detector = PagemapRead()
    detector.is_dirty(address_of(mapping), PAGE)
    del detector
    assert open_pagemaps() == before


def test_after_close_a_question_opens_it_again(detector: DirtyDetector, mapping: mmap.mmap) -> None:
    mapping[0] = 200
    detector.close()
    assert dirty_pages(detector, mapping) == [0]


def test_threads_that_ask_first_at_the_same_time_share_one_descriptor(
    detector: DirtyDetector, mapping: mmap.mmap
) -> None:
    mapping[PAGE] = 200
    before = open_pagemaps()
    barrier = threading.Barrier(8)
    told: list[list[int]] = []

    def ask() -> None:
        barrier.wait()
        told.append(dirty_pages(detector, mapping))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [[1]] * 8
    assert open_pagemaps() == before + 1


def test_where_the_kernel_cannot_be_asked_the_answer_is_dirty(
    detector: DirtyDetector, mapping: mmap.mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagemap, "PAGEMAP", "/proc/self/no-such-file")
    assert dirty_pages(detector, mapping) == list(range(PAGES))


def test_a_pagemap_that_ends_too_early_means_dirty(
    mapping: mmap.mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagemap, "PAGEMAP", "/dev/null")
    with contextlib.closing(PagemapRead()) as detector:
        assert detector.is_dirty(address_of(mapping), PAGE)


def test_the_detector_that_knows_nothing_calls_everything_dirty(mapping: mmap.mmap) -> None:
    assert dirty_pages(AlwaysDirty(), mapping) == list(range(PAGES))


FILE, SWAPPED, PRESENT = 1 << 61, 1 << 62, 1 << 63


@pytest.mark.parametrize(
    ("entry", "private"),
    [
        (0, False),
        (PRESENT | FILE, False),
        (SWAPPED | FILE, False),  # a page of the file on its way to another place
        (FILE, False),
        (PRESENT, True),
        (SWAPPED, True),
        (PRESENT | SWAPPED, True),
        (PRESENT | 1 << 55 | 1 << 56 | 1 << 57 | 0xABC, True),
        (PRESENT | FILE | 1 << 55 | 1 << 56 | 1 << 57 | 0xABC, False),
        (1 << 55 | 1 << 56 | 1 << 57 | 0xABC, False),
    ],
)
def test_an_entry_is_a_private_copy_by_its_three_top_bits(entry: int, private: bool) -> None:
    clean = PRESENT | FILE | 1 << 56
    for entries in ([entry], [entry, clean, 0], [clean, 0, entry]):
        assert PagemapRead._any_private(struct.pack(f"={len(entries)}Q", *entries)) == private


# Page faults.


def write_by_hand(mapping: mmap.mmap, _: int) -> None:
    mapping[3 * PAGE] = 9


def write_in_a_thread(mapping: mmap.mmap, _: int) -> None:
    thread = threading.Thread(target=write_by_hand, args=(mapping, 0))
    thread.start()
    thread.join()


def have_the_kernel_write(mapping: mmap.mmap, descriptor: int) -> None:
    with memoryview(mapping)[3 * PAGE : 4 * PAGE] as view:
        assert os.preadv(descriptor, [view], 0) == PAGE


@pytest.mark.parametrize("write", [write_by_hand, write_in_a_thread, have_the_kernel_write])
@pytest.mark.parametrize("was_read", [False, True])
def test_the_first_write_to_a_page_is_a_page_fault(
    mapping: mmap.mmap,
    descriptor: int,
    detector: DirtyDetector,
    was_read: bool,
    write: Callable[[mmap.mmap, int], None],
) -> None:
    if was_read:
        read_all(mapping)
    before = dirty.page_faults()
    write(mapping, descriptor)
    assert dirty.page_faults() > before
    assert dirty_pages(detector, mapping) == [3]


def test_a_system_that_does_not_count_them_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    dirty._are_faults_counted.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(dirty, "_count_faults", lambda: 0)
        assert dirty.page_faults() == -1
    assert dirty.page_faults() == -1
    dirty._are_faults_counted.cache_clear()
    assert dirty.page_faults() > 0


def test_where_it_cannot_be_found_out_whether_they_are_counted_they_are_not() -> None:
    dirty._are_faults_counted.cache_clear()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, limits[1]))  # no file of three pages
    try:
        assert dirty.page_faults() == -1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        dirty._are_faults_counted.cache_clear()


def test_to_read_again_what_was_read_is_none(mapping: mmap.mmap) -> None:
    def faults_of_reading() -> int:
        before = dirty.page_faults()
        read_all(mapping)
        return dirty.page_faults() - before

    assert min(faults_of_reading() for _ in range(20)) == 0  # others of this process have some


@pytest.fixture
def no_verdict_yet() -> Iterator[None]:
    """Forget which detectors were tried, before and after."""
    dirty._why_not.cache_clear()
    yield
    dirty._why_not.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a pagemap")
@pytest.mark.usefixtures("no_verdict_yet")
def test_the_first_that_works_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: set[str] = set()
    ask = {name: asking._ask for name, asking in dirty._ASKING.items()}

    def make_ask(name: str) -> Callable[[dirty._Asking, int, int], bool]:
        def asks_or_fails(self: dirty._Asking, first: int, last: int) -> bool:
            if name in refused:
                raise OSError(errno.ENOTTY, "not here")
            return ask[name](self, first, last)

        return asks_or_fails

    for name, asking in dirty._ASKING.items():
        monkeypatch.setattr(asking, "_ask", make_ask(name))
    works = [
        name
        for name in ("scan", "pagemap", "none")
        if not dirty._ASKING.get(name) or not dirty._why_not(name)
    ]
    for best in works:
        dirty._why_not.cache_clear()
        detector = dirty.choose()
        assert detector.name == best
        detector.close()
        refused.add(best)


@pytest.mark.parametrize("name", ["scan", "pagemap"])
@pytest.mark.usefixtures("no_verdict_yet")
def test_one_that_was_asked_for_and_does_not_work_says_why(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagemap, "PAGEMAP", "/proc/self/no-such-file")
    with pytest.raises(RuntimeError, match=rf"{name!r} does not work here: .*no-such-file"):
        dirty.choose(name)
    assert dirty.choose().name == "none"


@pytest.mark.parametrize(("told", "what"), [(True, "True, True, True"), (False, "False, False")])
@pytest.mark.usefixtures("no_verdict_yet")
def test_one_that_tells_wrong_things_is_not_used(
    told: bool, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for asking in dirty._ASKING.values():
        monkeypatch.setattr(asking, "_ask", lambda *_: told)
    with pytest.raises(RuntimeError, match=what):
        dirty.choose("scan")
    assert isinstance(dirty.choose(), AlwaysDirty)


@pytest.mark.usefixtures("no_verdict_yet")
def test_one_that_does_not_notice_that_pages_were_dropped_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for asking in dirty._ASKING.values():
        told = itertools.cycle([False, True, False, True])  # the last: of all three, one dropped
        monkeypatch.setattr(asking, "_ask", lambda *_, told=told: next(told))
    with pytest.raises(RuntimeError, match="reports a dropped page as written"):
        dirty.choose("pagemap")
    assert isinstance(dirty.choose(), AlwaysDirty)


def test_an_unknown_name_is_answered_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="'best'; there are 'scan', 'pagemap', 'none'"):
        dirty.choose("best")


def test_the_choice_leaves_no_descriptor_behind() -> None:
    before = set(os.listdir("/proc/self/fd"))
    detector = dirty.choose()
    detector.close()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("no_verdict_yet")
def test_the_choice_can_be_made_without_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    best = dirty.choose()
    monkeypatch.delattr(os, "memfd_create")
    dirty._why_not.cache_clear()
    again = dirty.choose()
    assert again.name == best.name
    best.close()
    again.close()
