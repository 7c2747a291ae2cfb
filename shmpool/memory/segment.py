"""Segments: pieces of shareable memory, and mappings of them.  The only module that touches memfd and mmap.

A :class:`Segment` is one descriptor of fixed size: anonymous memory (``memfd_create``, sealed against shrinking and
growing) or an unlinked file.  Either way it has no name that could be left behind, and its memory is gone with the
last descriptor and mapping of it.

A :class:`Mapping` is a range of a segment in this process, in one of numpy.memmap's modes: ``"r+"`` shared and
writable, ``"r"`` shared and read-only, ``"c"`` private: the first write to a page copies it (copy-on-write).

Guarantees: pages that :meth:`Segment.reserve` has returned for cannot raise SIGBUS.  A descriptor from
:meth:`Segment.open_readonly` cannot be mapped shared and writable: the kernel refuses.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import stat
import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

__all__ = [
    "HUGE_PAGE",
    "PAGE",
    "Bytes",
    "Mapping",
    "Mode",
    "Segment",
    "address_of",
    "may_be_huge",
    "round_up",
]

PAGE = mmap.PAGESIZE
#: The usual size of a huge page; what MFD_HUGETLB gives by default.
HUGE_PAGE = 2 << 20
Mode = Literal["r", "c", "r+"]
# numpy.typing.NDArray, which takes 0.3 ms to import
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

# In Python's mmap module only since 3.13; the number is Linux's on every architecture that has memfd but
# Alpha, MIPS, PA-RISC and Xtensa. Without it a private mapping of a large arena counts as memory in use.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
# Linux's numbers; the fcntl module has them, but not on every build.
_F_ADD_SEALS = getattr(fcntl, "F_ADD_SEALS", 1033)
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MADV_COLLAPSE = 25  # Linux 6.1
_UNREADABLE = os.O_WRONLY | getattr(os, "O_PATH", 0)
_F_GET_SEALS = getattr(fcntl, "F_GET_SEALS", 1034)
_SEAL_SHRINK = 0x0002
_SEALS = 0x0001 | _SEAL_SHRINK | 0x0004  # seal, shrink, grow


# Before Python 3.13 each mapping keeps a descriptor of its own.
_UNTRACKED: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}

# Unlike mmap.madvise, a call through ctypes lets other threads run meanwhile.
_libc = ctypes.CDLL(None, use_errno=True)
_madvise = _libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
# Unlike Python's, it can be told where.
_map_at = _libc.mmap
_map_at.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
_map_at.restype = ctypes.c_void_p
_MAP_FIXED = 0x10  # Linux's, on every architecture but Alpha and PA-RISC
_CAN_PLACE = sys.platform == "linux" and sys.maxsize > 1 << 32

_byte_in: Callable[[Any], ctypes.c_char] = ctypes.c_char.from_buffer


def address_of(memory: Bytes) -> int:
    """Where bytes lie.  numpy's ``__array_interface__``, a new dict each time, takes four times as long."""
    try:
        return ctypes.addressof(_byte_in(memory))
    except (TypeError, ValueError):  # read-only, or none
        return int(memory.__array_interface__["data"][0])


def round_up(value: int, multiple: int = PAGE) -> int:
    """The smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


class Mapping:
    """A range of a segment, mapped.  Unmapped when it and all arrays made from it are gone.

    Parameters
    ----------
    fd : int
        Descriptor of the segment; not needed afterwards.
    start, size : int
        The range in bytes; ``start`` is page-aligned.
    mode : {"r", "c", "r+"}
        See the module's docstring.
    reserve : bool
        For "c": set memory aside for private copies of all pages.  Huge pages need it: a write that finds none left
        would be a SIGBUS.
    """

    __slots__ = ("_begin", "_mmap", "address", "mode", "size", "start")

    def __init__(
        self, fd: int, start: int, size: int, mode: Mode, *, reserve: bool = False
    ) -> None:
        if mode == "c":
            flags, prot = mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
            if not reserve:
                flags |= _MAP_NORESERVE
        elif mode == "r":
            flags, prot = mmap.MAP_SHARED, mmap.PROT_READ
        else:
            flags, prot = mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE
        self._begin = 0  # in the mmap
        placed = _placed(fd, start, size, flags, prot) if size >= HUGE_PAGE else None
        if placed is not None:
            self._mmap, self._begin = placed
        else:
            self._mmap = mmap.mmap(fd, size, flags=flags, prot=prot, offset=start, **_UNTRACKED)
        self.start = start
        self.size = size
        self.mode = mode
        self.address: int = self.array(start, 1).__array_interface__["data"][0]

    def array(self, start: int, nbytes: int) -> Bytes:
        """A new exporter of ``nbytes`` bytes at offset ``start`` of the segment.

        All that is made from it (slices, memoryviews, unpickled arrays) keeps it alive, so that a weak reference to
        it tells when the last of them is gone.
        """
        return np.frombuffer(self._mmap, np.uint8, nbytes, self._begin + start - self.start)

    def drop_private_pages(self, start: int, stop: int) -> None:
        """Forget what was written to ``[start, stop)`` of a "c" mapping: the segment shows through again."""
        self._mmap.madvise(mmap.MADV_DONTNEED, self._begin + start - self.start, stop - start)

    def populate(self, start: int, stop: int) -> None:
        """Make sure that the pages ``[start, stop)`` of an "r+" mapping exist, and are mapped.

        Raises
        ------
        OSError
            There is no room (where touching the pages would be a SIGBUS); or EINVAL: an old kernel.
        """
        if _madvise(self.address + start - self.start, stop - start, _MADV_POPULATE_WRITE):
            code = ctypes.get_errno()
            raise OSError(errno.ENOSPC if code == errno.EFAULT else code, "no memory for a block")

    def collapse(self, start: int, stop: int) -> None:
        """Put what lies in ``[start, stop)``, which is as long as huge pages and begins as one, into such.

        Raises
        ------
        OSError
            EINVAL: the system does not do that, or not for this memory; or there are none now.
        """
        if _madvise(self.address + start - self.start, stop - start, _MADV_COLLAPSE):
            raise OSError(ctypes.get_errno(), "no huge pages")

    def advise(self, advice: int) -> None:
        """Advise the system about all of the mapping; it need not listen."""
        with contextlib.suppress(OSError):
            self._mmap.madvise(advice, self._begin, self.size)

    def give_back(self, start: int, stop: int) -> None:
        """Return the pages ``[start, stop)`` of an "r+" mapping to the system; they read as zeros afterwards."""
        self._mmap.madvise(mmap.MADV_REMOVE, self._begin + start - self.start, stop - start)


_failed: list[mmap.mmap] = []


def _placed(fd: int, start: int, size: int, flags: int, prot: int) -> tuple[mmap.mmap, int] | None:
    """Map where addresses have the same place within a huge page as what they map: else none can be had there.

    Python lets nobody say where.  So it gets a larger range with nothing in it, into which this maps, and which goes
    as a whole in the end.

    Returns
    -------
    mmap.mmap
    int
        Where in it the mapping begins.

    None if it cannot be done here, or there is no room for more than the mapping.
    """
    if not _CAN_PLACE:
        return None
    nothing = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        room = mmap.mmap(-1, size + HUGE_PAGE, flags=nothing, prot=prot)
    except OSError:
        return None
    address = np.frombuffer(room, np.uint8, 1).__array_interface__["data"][0]
    begin = (start - address) % HUGE_PAGE
    if _map_at(address + begin, size, prot, flags | _MAP_FIXED, fd, start) != address + begin:
        # There may be nothing at all any more where there was room, or what another thread has mapped: let it be.
        _failed.append(room)
        return None
    return room, begin


class Segment:
    """One descriptor's worth of shareable memory.

    Parameters
    ----------
    fd : int
        An open descriptor, owned from now on.
    size : int
        Bytes, a multiple of the page size.
    """

    __slots__ = ("fd", "size")

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size

    @classmethod
    def create(cls, size: int, backend: str, folder: str | None = None) -> Segment:
        """Make a segment of ``size`` bytes, sparse: nothing is reserved yet.

        Parameters
        ----------
        size : int
            Bytes, a multiple of the page size.
        backend : {"memfd", "huge", "file"}
            Anonymous memory, the same of huge pages, or an unlinked file in ``folder``.
        folder : str, optional
            Where the file goes. Default: /dev/shm where it can be written to, else the temporary folder.

        Raises
        ------
        OSError
            Out of descriptors, or the folder cannot be used.
        """
        anonymous = backend != "file"
        if anonymous:
            huge = os.MFD_HUGETLB if backend == "huge" else 0
            fd = os.memfd_create("shmpool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | huge)
        else:
            fd = _open_unlinked(folder or _shared_folder())
        try:
            os.ftruncate(fd, size)
            if anonymous:
                fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, size)

    @classmethod
    def from_another(cls, fd: int, size: int) -> Segment:
        """A segment that another process has made; the descriptor is owned from now on, or closed.

        Raises
        ------
        ValueError, OSError
            It cannot be what it is said to be: to map it would fail, or to read it could be a SIGBUS.
        """
        segment = cls(fd, size)
        try:
            _check(fd, size)
        except BaseException:
            segment.close()
            raise
        return segment

    def open_readonly(self) -> int:
        """A new descriptor that can be mapped "r" or "c" only.  The caller closes it."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def reserve(self, start: int, stop: int) -> None:
        """Make sure that there is room for the pages ``[start, stop)``, so that touching them cannot fail.

        Raises
        ------
        OSError
            ENOSPC, ENOMEM or EFBIG: there is no room.
        """
        os.posix_fallocate(self.fd, start, stop - start)

    def write(self, start: int, data: Bytes) -> None:
        """Write to offset ``start``: pages that do not exist yet are made and filled in one pass, and not mapped.

        Raises
        ------
        OSError
            ENOSPC, ENOMEM or EFBIG: there is no room.
        """
        left = memoryview(data)  # type: ignore[arg-type]  # numpy's stubs are behind
        while left.nbytes:
            written = os.pwrite(self.fd, left, start)  # at most 2 GiB at a time
            start += written
            left = left[written:]

    def map(self, mode: Mode, start: int = 0, size: int | None = None) -> Mapping:
        """Map a page-aligned range; the whole segment by default."""
        return Mapping(self.fd, start, self.size - start if size is None else size, mode)

    def close(self) -> None:
        """Close the descriptor.  Mappings stay valid.  May be called twice."""
        fd, self.fd = self.fd, -1  # first: another thread may be about to fork
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if os is not None:  # at interpreter exit modules are emptied
            self.close()


@functools.cache
def may_be_huge() -> bool:
    """May the system make huge pages of a memfd's memory where it is mapped?"""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/shmem_enabled") as setting:
            return not {"[never]", "[deny]"} & set(setting.read().split())
    except OSError:
        return False


def _check(fd: int, size: int) -> None:
    """Raise ValueError if a descriptor is none of a segment of ``size`` bytes."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or fcntl.fcntl(fd, fcntl.F_GETFL) & _UNREADABLE:
        raise ValueError("its descriptor is of no file that can be read")
    if not 0 < size <= status.st_size or size % PAGE:
        raise ValueError(f"its file has only {status.st_size} bytes")
    anonymous = os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")
    if anonymous and not fcntl.fcntl(fd, _F_GET_SEALS) & _SEAL_SHRINK:
        raise ValueError("its memory is not sealed against shrinking")


def _shared_folder() -> str:
    import tempfile  # slow to import, and seldom needed

    return "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else tempfile.gettempdir()


def _open_unlinked(folder: str) -> int:
    """Open a file that has no name, mode 0600."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (OSError, AttributeError):
        import tempfile

        # Not every file system has O_TMPFILE (overlayfs on old kernels, NFS): a name for an instant, then none.
        fd, path = tempfile.mkstemp(prefix="shmpool-", dir=folder)
        os.unlink(path)
        return fd
