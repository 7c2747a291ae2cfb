"""Has this process written into a private file mapping? The page tables know; here they are asked.

A page of a ``MAP_PRIVATE`` mapping of a file is in one of three states: not mapped, mapped to the
file's own page, or replaced by a private copy, which the kernel makes on the first write. "Dirty"
means: at least one page of a range is a private copy. Such a page no longer shows what the file
holds, now or later, until it is dropped with ``MADV_DONTNEED``.

Rules
    A page is a private copy if it is present or swapped out, and not a page of the file. Pages
    never touched, only read, or dropped are therefore clean; pages written, written and swapped
    out, and pages that a forked child inherited as copies from its parent are dirty. The zero page
    counts as a copy: reading a file shows the file's pages, also in its holes, but samepage merging
    (KSM) may put the zero page in the place of a copy that the process filled with zeros.

    `PagemapScan` asks with the PAGEMAP_SCAN ioctl (Linux 6.7), `PagemapRead` reads the entries of
    /proc/self/pagemap, `AlwaysDirty` cannot know. `choose` tries them in this order on a real
    mapping, since a sandbox may have the file and not the meaning. Both need no capability: an
    unprivileged process sees its own entries, with the page frame numbers blanked, which are not
    used. What the bits mean is said in the kernel's Documentation/admin-guide/mm/pagemap.rst and
    include/uapi/linux/fs.h.

    Both ask for 32 MB at a time. The cost is that of the kernel's walk: 0.7 ms for 100 MB that are
    mapped and clean, 7 us (scan) or 50 us (read) for 100 MB not mapped, 1.8 us for one page; the
    walk ends in the first 32 MB that have a copy (all measured, Linux 6.18).

Guarantees
    A False is certain: the range shows what the file holds, since whatever this process has written
    there has been dropped. A True may be wrong: where the kernel cannot be asked (no descriptor
    left, /proc gone, privileges dropped without exec), the answer is True, never an exception, for
    it is needed in places that cannot fail. Known false alarms: copies made without a change of
    contents (writing back the same value, ``mlock`` or ``MAP_POPULATE`` on a writable private
    mapping), and for `PagemapRead` before Linux 6.11, pages of the file that are mapped as
    transparent huge pages.

    A range need not be aligned: every page that it touches is looked at. The GIL is released while
    the kernel works. A detector may be used by several threads at once.

Assumptions
    The range lies in private mappings of files (in a shared one nothing is ever dirty, in an
    anonymous one everything ever touched is). Nobody writes into it or unmaps it during the call;
    else the answer is about some moment in it. POSIX; on anything but Linux, `choose` finds
    `AlwaysDirty`.

Not to have to ask
    The first write to a page of a private mapping is a page fault, and the system counts those of a
    process: `page_faults`. If there has been none since a range was clean, it still is. That takes
    2 us, and spares the walk wherever code only reads what it has read before.
"""

from __future__ import annotations

import array
import ctypes
import errno
import functools
import itertools
import mmap
import os
import sys
import tempfile
from typing import Protocol

from shmpool.memory.pagemap import (
    PAGE_IS_FILE,
    PAGE_IS_PRESENT,
    PAGE_IS_SWAPPED,
    PAGEMAP,
    AboutThisProcess,
    ask_pages,
)

__all__ = ["AlwaysDirty", "DirtyDetector", "PagemapRead", "PagemapScan", "choose", "page_faults"]

_PAGE = mmap.PAGESIZE

# One question to the kernel covers at most this many pages (32 MB where they have 4 KB): it holds
# the lock of the address space meanwhile, for 0.2 ms, and a copy found early ends the search early.
# (The ioctl alone stops at the second page found, or at the end.) Larger is no faster.
_PAGES_PER_QUESTION = 8192


def page_faults() -> int:
    """How many page faults there have been in this process, of all its threads and of the kernel's work for them.

    -1 where they are not counted, as in some sandboxes: that is tried once in a process.
    """
    return _count_faults() if _are_faults_counted() else -1


def _count_faults() -> int:
    import resource  # seldom needed before a worker has had a large array

    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt


@functools.cache
def _are_faults_counted() -> bool:
    try:
        with _three_pages() as mapping:
            mapping[0]  # page 0 is read before it is written
            counts = [_count_faults()]
            for page in range(3):
                mapping[page * _PAGE] = 1
                counts.append(_count_faults())
    except OSError:
        return False
    return all(before < after for before, after in itertools.pairwise(counts))


class DirtyDetector(Protocol):
    """Tells whether this process has written into a range of its private file mappings."""

    name: str

    def is_dirty(self, address: int, nbytes: int) -> bool:
        """Tell whether any page that ``[address, address + nbytes)`` touches is a private copy."""
        ...

    def close(self) -> None:
        """Give back the descriptor, if there is one; the next question opens it again."""
        ...


class _Asking(AboutThisProcess):
    """What the two that ask the kernel share: erring on the side of True."""

    name: str

    def is_dirty(self, address: int, nbytes: int) -> bool:
        """Tell whether any page that ``[address, address + nbytes)`` touches is a private copy."""
        if nbytes <= 0:
            return False
        try:
            return self._ask(address // _PAGE, -(-(address + nbytes) // _PAGE))
        except OSError:
            return True

    def _ask(self, first: int, last: int) -> bool:
        """Answer for the pages ``[first, last)``; raise OSError where the kernel does not."""
        raise NotImplementedError


class PagemapScan(_Asking):
    """Ask with the PAGEMAP_SCAN ioctl, which searches inside the kernel (Linux 6.7)."""

    name: str = "scan"

    def __init__(self) -> None:
        super().__init__()
        # Where the kernel writes the struct page_region that it finds (start, end, categories).
        # Only that it found one matters, so all threads share it. Without it, it finds nothing.
        self._region = array.array("Q", (0, 0, 0))

    def _ask(self, first: int, last: int) -> bool:
        descriptor = self._pagemap()
        region, _ = self._region.buffer_info()
        while first < last:
            stop = min(last, first + _PAGES_PER_QUESTION)
            if ask_pages(
                descriptor,
                first * _PAGE,
                stop * _PAGE,
                region,
                inverted=PAGE_IS_FILE,  # wanted is the opposite of this category,
                all_of=PAGE_IS_FILE,  # in any case,
                any_of=PAGE_IS_PRESENT | PAGE_IS_SWAPPED,  # and one of these
                most=1,  # one page is enough to know
            ):
                return True
            first = stop
        return False


class PagemapRead(_Asking):
    """Read /proc/self/pagemap, eight bytes a page, and look at the bits (Linux 4.2)."""

    name: str = "pagemap"

    # What counts is in the top byte of an entry: bit 61 file (or shared), 62 swapped, 63 present.
    _TOP = 7 if sys.byteorder == "little" else 0
    # The top bytes of entries that are no private copies: of the file, or not present nor swapped.
    _CLEAN = bytes(top for top in range(256) if top & 0b001_00000 or not top & 0b110_00000)

    def _ask(self, first: int, last: int) -> bool:
        descriptor = self._pagemap()
        while first < last:
            wanted = 8 * min(last - first, _PAGES_PER_QUESTION)
            entries = os.pread(descriptor, wanted, 8 * first)
            if len(entries) % 8 or not entries:
                raise OSError(errno.EIO, f"{PAGEMAP} ended at page {first}", PAGEMAP)
            if self._any_private(entries):
                return True
            first += len(entries) // 8
        return False

    @classmethod
    def _any_private(cls, entries: bytes) -> bool:
        # Two passes at the speed of C: take every eighth byte, then delete those that mean "clean".
        # 4 us for 8192 entries; the kernel needs 230 us to write them.
        return bool(entries[cls._TOP :: 8].translate(None, cls._CLEAN))


class AlwaysDirty:
    """Knows nothing, so everything may have been written: for systems that cannot be asked."""

    name: str = "none"

    def is_dirty(self, address: int, nbytes: int) -> bool:  # noqa: ARG002 - the others need it
        """Return True, unless the range is empty."""
        return nbytes > 0

    def close(self) -> None:
        """Do nothing: there is no descriptor."""


_ASKING: dict[str, type[_Asking]] = {"scan": PagemapScan, "pagemap": PagemapRead}


def choose(name: str | None = None) -> DirtyDetector:
    """Make the best detector that works here.

    Parameters
    ----------
    name
        "scan", "pagemap" or "none" asks for that one; None (default) for the first of them that
        works. Each is tried once in a process, on a small mapping made for that (0.1 ms).

    Returns
    -------
    DirtyDetector
        A new one; the caller closes it.

    Raises
    ------
    ValueError
        If there is no detector of that name.
    RuntimeError
        If the one asked for does not work here; the message says why.
    """
    if name is None:
        for candidate, asking in _ASKING.items():
            if not _why_not(candidate):
                return asking()
        return AlwaysDirty()
    if name == AlwaysDirty.name:
        return AlwaysDirty()
    if name not in _ASKING:
        valid = ", ".join(map(repr, (*_ASKING, AlwaysDirty.name)))
        raise ValueError(f"no dirty-page detector is called {name!r}; there are {valid}")
    reason = _why_not(name)
    if reason:
        raise RuntimeError(
            f"the dirty-page detector {name!r} does not work here: {reason}. "
            "Ask for None to get the best that does."
        )
    return _ASKING[name]()


@functools.cache
def _why_not(name: str) -> str:
    """Try a detector on a real private mapping; return why it is of no use, or "" if it works."""
    detector = _ASKING[name]()
    try:
        with _three_pages() as mapping:
            return _find_mistake(detector, mapping)
    except OSError as error:
        return str(error)
    finally:
        detector.close()


def _find_mistake(detector: _Asking, mapping: mmap.mmap) -> str:
    view = ctypes.c_char.from_buffer(mapping)
    first = ctypes.addressof(view) // _PAGE
    del view  # or the mapping could not be closed
    mapping[0]  # page 0 is read, page 1 written, page 2 left alone
    mapping[_PAGE] = 1
    told = [detector._ask(page, page + 1) for page in range(first, first + 3)]
    if told != [False, True, False]:
        return f"of a read, a written and an untouched page it reports {told} as written"
    mapping.madvise(mmap.MADV_DONTNEED, _PAGE, _PAGE)
    if detector._ask(first, first + 3):
        return "it reports a dropped page as written"
    return ""


def _three_pages() -> mmap.mmap:
    """Map three pages of a file without a name, privately."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("shmpool-dirty-probe", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        os.ftruncate(descriptor, 3 * _PAGE)
        return mmap.mmap(descriptor, 3 * _PAGE, mmap.MAP_PRIVATE)
    finally:
        os.close(descriptor)
