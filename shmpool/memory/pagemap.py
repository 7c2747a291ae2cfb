"""/proc/self/pagemap: what the page tables of this process say, and the ioctl that searches them.

A descriptor of it means the memory of the process that opened it, for good: after a fork the child would be told about
its parent. So an inherited one is closed in the child right after the fork, before its number can come to mean another
file, and a new one is opened when next needed. It is not inherited through exec. No capability is needed: an
unprivileged process sees its own entries, with the page frame numbers blanked, which are not used.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import weakref
from collections.abc import Callable

__all__ = [
    "PAGEMAP", "PAGE_IS_FILE", "PAGE_IS_PRESENT", "PAGE_IS_SWAPPED", "PAGE_IS_WRITTEN", "AboutThisProcess", "ask_pages",
]  # fmt: skip

PAGEMAP = "/proc/self/pagemap"

# include/uapi/linux/fs.h: categories of pages.
PAGE_IS_WRITTEN = 1 << 1  # not, or no longer, write-protected by userfaultfd
PAGE_IS_FILE = 1 << 2  # or shared memory
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
# struct pm_scan_arg: size, flags, start, end, walk_end, vec, vec_len, max_pages,
# category_inverted, category_mask, category_anyof_mask, return_mask; all of them u64.
_ARGUMENT = struct.Struct("=12Q")
# _IOWR('f', 16, struct pm_scan_arg). The architectures differ in the bits for "read" and for
# "write", but not in those for both.
_REQUEST = 3 << 30 | _ARGUMENT.size << 16 | ord("f") << 8 | 16


def ask_pages(
    descriptor: int,
    start: int,
    stop: int,
    region: int,
    *,
    flags: int = 0,
    inverted: int,
    all_of: int,
    any_of: int = 0,
    most: int,
) -> int:
    """The PAGEMAP_SCAN ioctl (Linux 6.7).

    Parameters
    ----------
    descriptor
        Of /proc/self/pagemap.
    start, stop
        Addresses of pages.
    region
        Address of a struct page_region, into which goes the first run of pages that have the wanted categories.
    flags
        PM_SCAN_*.
    inverted, all_of, any_of
        Masks of categories: those whose absence is meant; those that a page must all have; those of which it must have
        one.
    most
        Stop after so many pages; 0 for no limit.

    Returns
    -------
    int
        How many runs were found: 0 or 1.

    Raises
    ------
    OSError
        The kernel does not know it, or not for this memory.
    """
    # A bytearray of less than 1 KB: the GIL is released, and the result is the count.
    argument = bytearray(
        _ARGUMENT.pack(
            _ARGUMENT.size, flags, start, stop, 0, region, 1, most, inverted, all_of, any_of, PAGE_IS_PRESENT
        )
    )  # fmt: skip
    return int(fcntl.ioctl(descriptor, _REQUEST, argument, True))


class AboutThisProcess:
    """Descriptors that are about the memory of this process: opened when first needed, closed in a forked child.

    Who makes one closes it, when no other thread is in it; it costs descriptors until then, or until nobody holds it.
    """

    def __init__(self) -> None:
        # A dict, since its setdefault is atomic: no lock, which a fork could leave locked.
        self._open: dict[str, int] = {}
        _inherited.add(self)

    def close(self) -> None:
        """Give back the descriptors; the next question opens them again. Can be called twice."""
        while self._open:
            _, descriptor = self._open.popitem()
            os.close(descriptor)

    def __del__(self) -> None:
        if os is not None:  # at interpreter exit modules are emptied
            self.close()

    def _pagemap(self) -> int:
        return self._opened(PAGEMAP, _open_pagemap)

    def _opened(self, name: str, opener: Callable[[], int]) -> int:
        descriptor = self._open.get(name)
        if descriptor is None:
            mine = opener()
            descriptor = self._open.setdefault(name, mine)
            if descriptor != mine:  # another thread was faster
                os.close(mine)
        return descriptor


def _open_pagemap() -> int:
    return os.open(PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)


_inherited: weakref.WeakSet[AboutThisProcess] = weakref.WeakSet()


def _forget_the_parents_memory() -> None:
    for one in list(_inherited):
        with contextlib.suppress(OSError):
            one.close()


os.register_at_fork(after_in_child=_forget_the_parents_memory)
