"""Has this process written to a range of its own memory since it was last looked at? The kernel is asked to remember.

To compare 100 MB with a copy of them takes 5 to 10 ms, and 200 MB of the memory's bandwidth; to ask the page tables,
0.1 ms where the memory is in huge pages (numpy asks for them), 0.7 ms where it is not.

How
    ``userfaultfd`` write-protects pages; in its asynchronous mode (Linux 6.7) the first write to such a page is a page
    fault that only takes the protection off, with nobody told. What PAGEMAP_SCAN still finds protected has not been
    written to. See the kernel's Documentation/admin-guide/mm/userfaultfd.rst and pagemap.rst. No privilege is needed;
    some sandboxes (Docker's without more rights) do not allow it: then nothing is watched.

Guarantees
    A True of `WriteWatch.is_unwritten` is certain: each page is there, anonymous, and as it was when `WriteWatch.watch`
    returned. Whoever writes through this process's page tables is noticed: its threads, compiled code, the kernel for a
    system call (``read`` into an array). Memory that was unmapped, moved or dropped since has no protection, and so
    counts as written; anonymous memory is not shared with other processes but for forked ones, which get a copy.

    Only a device writes past the page tables, to pages that were pinned for it. To pin them counts as a write. They may
    have been pinned before, so as long as a descriptor of a device is open (GPU, RDMA, io_uring), no watch begins.

    A False may be wrong. Writing the same value counts. A page is 4 KB or, where huge ones are in use, 2 MB.

What it costs
    The first write to each page afterwards is a page fault: 100 MB rewritten take 1 ms more in huge pages, 20 to 60 ms
    in small ones. So who watches what is written to often loses: see `shmpool.store.written`, which gives up in time.

Rules
    One thread at a time uses a `WriteWatch` (a store's is guarded by the store's lock). Ranges that overlap are not
    watched at the same time: to protect the pages of one would make written pages of the other look unwritten.

The descriptor
    After a fork the inherited one is still about the parent's memory: it is closed in the child. Closing the last one
    takes all protection off.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import mmap
import os
import re
import struct
import sys

from shmpool.memory.pagemap import (
    PAGE_IS_FILE,
    PAGE_IS_PRESENT,
    PAGE_IS_WRITTEN,
    AboutThisProcess,
    ask_pages,
)

__all__ = ["Watched", "WriteWatch"]

_PAGE = mmap.PAGESIZE

#: So many ranges at a time: each may split a mapping in three, of which a process has 65,530 by default.
_MOST = 64

_SYSCALLS = {"x86_64": 323, "aarch64": 282, "riscv64": 282, "loongarch64": 282}
#: The last one is what the unprivileged may ask for.  In asynchronous mode the kernel's own writes are noticed all the
#: same.
_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | 1

# include/uapi/linux/userfaultfd.h: struct uffdio_api, uffdio_register, uffdio_writeprotect, uffdio_range, all of u64.
_API = 0xAA
_WP_UNPOPULATED = 1 << 13
_WP_ASYNC = 1 << 15
_MODE_WP = 1 << 1
_PROTECT = 1 << 0
_READ_WRITE, _READ = 3, 2
_USERFAULTFD_IOC_NEW = 0xAA << 8
_UFFDIO_API = _READ_WRITE << 30 | 24 << 16 | 0xAA << 8 | 0x3F
_UFFDIO_REGISTER = _READ_WRITE << 30 | 32 << 16 | 0xAA << 8 | 0x00
_UFFDIO_UNREGISTER = _READ << 30 | 16 << 16 | 0xAA << 8 | 0x01
_UFFDIO_WRITEPROTECT = _READ_WRITE << 30 | 24 << 16 | 0xAA << 8 | 0x06

# include/uapi/linux/fs.h, a flag of PAGEMAP_SCAN.
_CHECK_WPASYNC = 1 << 1  # fail where a mapping is not watched

#: Descriptors that lead to no device which could write to memory by itself.
_HARMLESS = re.compile(
    r"/dev/(null|zero|full|u?random|tty\w*|console|ptmx|pts/\d+|shm/.*|userfaultfd)"
    r"|(?!/dev/|anon_inode:\[io_uring\]).*",
    re.DOTALL,
)


class Watched:
    """A range that is watched: its whole pages, from ``start`` to ``stop``.

    Attributes
    ----------
    known : bool
        For the user of the watch: the range has been looked at since the watch began.
    """

    __slots__ = ("known", "start", "stop")

    def __init__(self, start: int, stop: int) -> None:
        self.start = start
        self.stop = stop
        self.known = False


class WriteWatch(AboutThisProcess):
    """Watches ranges of this process's memory.  Opens its descriptors when first needed."""

    def __init__(self) -> None:
        super().__init__()
        self._ranges: set[Watched] = set()
        # struct page_region: start, end, categories; where the kernel says what it found.
        self._region = (ctypes.c_uint64 * 3)()

    def watch(self, address: int, nbytes: int) -> Watched | None:
        """Watch the whole pages of a range, from now on.  None: they cannot be watched, or not now."""
        start = -(-address // _PAGE) * _PAGE
        stop = (address + nbytes) // _PAGE * _PAGE
        if (
            start >= stop
            or len(self._ranges) >= _MOST
            or any(start < other.stop and other.start < stop for other in self._ranges)
            or not _works()
            or _may_be_pinned()
        ):
            return None
        try:
            self._protect(start, stop)
        except OSError:
            return None  # memory of another kind, or watched by somebody else
        watched = Watched(start, stop)
        self._ranges.add(watched)
        return watched

    def is_unwritten(self, watched: Watched) -> bool:
        """Has nobody written to any page of a range since its watch began?"""
        try:
            return watched in self._ranges and self._are_unwritten(watched.start, watched.stop)
        except OSError:
            return False

    def stop(self, watched: Watched) -> None:
        """Watch a range no more."""
        if watched not in self._ranges:
            return  # of the process that this one was forked from
        self._ranges.remove(watched)
        argument = struct.pack("=2Q", watched.start, watched.stop - watched.start)
        with contextlib.suppress(OSError):  # the memory is gone, and the watch with it
            fcntl.ioctl(self._userfaultfd(), _UFFDIO_UNREGISTER, argument)

    def close(self) -> None:
        """Watch nothing any more, and give back the descriptors.  Can be called twice."""
        self._ranges.clear()
        super().close()

    def _protect(self, start: int, stop: int) -> None:
        uffd = self._userfaultfd()
        length = stop - start
        fcntl.ioctl(
            uffd, _UFFDIO_REGISTER, bytearray(struct.pack("=4Q", start, length, _MODE_WP, 0))
        )
        try:
            argument = struct.pack("=3Q", start, length, _PROTECT)
            fcntl.ioctl(uffd, _UFFDIO_WRITEPROTECT, bytearray(argument))
        except OSError:
            fcntl.ioctl(uffd, _UFFDIO_UNREGISTER, struct.pack("=2Q", start, length))
            raise

    def _are_unwritten(self, start: int, stop: int) -> bool:
        """Are all pages from ``start`` to ``stop`` present, anonymous and protected?"""
        # Neighbouring pages that answer are one region, and there is room for one: it has to be the whole range.
        found = ask_pages(
            self._pagemap(),
            start,
            stop,
            ctypes.addressof(self._region),
            flags=_CHECK_WPASYNC,
            inverted=PAGE_IS_WRITTEN | PAGE_IS_FILE,
            all_of=PAGE_IS_WRITTEN | PAGE_IS_FILE | PAGE_IS_PRESENT,
            most=0,
        )
        return found == 1 and (self._region[0], self._region[1]) == (start, stop)

    def _userfaultfd(self) -> int:
        return self._opened("userfaultfd", _open_userfaultfd)


def _open_userfaultfd() -> int:
    descriptor = _from_device() if _is_filtered() else _from_system_call()
    try:
        argument = struct.pack("=3Q", _API, _WP_ASYNC | _WP_UNPOPULATED, 0)
        fcntl.ioctl(descriptor, _UFFDIO_API, bytearray(argument))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_filtered() -> bool:
    """Is there a filter of system calls?  It may end the process for one that it does not know, as systemd's do."""
    with open("/proc/self/status", "rb") as file:
        return not re.search(rb"^Seccomp:\s*0$", file.read(), re.MULTILINE)


def _from_system_call() -> int:
    number = _SYSCALLS.get(os.uname().machine) if sys.maxsize > 1 << 32 else None
    if number is None:
        raise OSError("no number of this system call is known here")
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = int(libc.syscall(number, _FLAGS))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd")
    return descriptor


def _from_device() -> int:
    device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)  # as a rule it is root's
    try:
        return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, _FLAGS)
    finally:
        os.close(device)


def _may_be_pinned() -> bool:
    """Is a device open for which memory may have been pinned?"""
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:  # the listing's own
            continue
        if not _HARMLESS.fullmatch(target):
            return True
    return False


@functools.cache
def _works() -> bool:
    """Try it: a sandbox may have the calls and not the meaning."""
    watch = WriteWatch()
    try:
        with mmap.mmap(-1, 4 * _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            for page in range(3):  # the last one is never touched
                memory[page * _PAGE] = 1
            view = ctypes.c_char.from_buffer(memory)
            start = ctypes.addressof(view)
            del view  # or the memory could not be closed
            watch._protect(start, start + 4 * _PAGE)
            memory[_PAGE] = 1
            pages = [start + page * _PAGE for page in range(4)]
            told = [watch._are_unwritten(page, page + _PAGE) for page in pages]
            if told != [True, False, True, False] or watch._are_unwritten(start, pages[3]):
                return False
            memory.madvise(mmap.MADV_DONTNEED, 0, _PAGE)
            return not watch._are_unwritten(start, start + _PAGE)
    except OSError:
        return False
    finally:
        watch.close()
