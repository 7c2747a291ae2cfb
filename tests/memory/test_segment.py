"""Segments: what cannot be made, mapped or taken over says so, and leaves no descriptor open."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import fork_while_closing

from shmpool.memory.segment import PAGE, Segment, address_of


@pytest.fixture
def files_end_at_a_page() -> Iterator[None]:
    """The system lets no file grow beyond one page."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("files_end_at_a_page")
@pytest.mark.parametrize("backend", ["memfd", "file"])
def test_a_segment_that_may_not_be_so_large_is_an_error_and_leaves_nothing_open(
    backend: str, tmp_path: object
) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        Segment.create(2 * PAGE, backend, str(tmp_path))
    assert os.listdir("/proc/self/fd") == before
    assert Segment.create(PAGE, backend, str(tmp_path)).size == PAGE


def test_pages_that_cannot_be_had_are_an_error_and_no_signal(tmp_path: object) -> None:
    segment = Segment.create(2 * PAGE, "file", str(tmp_path))
    mapping = segment.map("r+")
    mapping.populate(0, 2 * PAGE)
    os.ftruncate(segment.fd, PAGE)  # to touch the second page would be a SIGBUS, as on a full disk
    mapping.populate(0, PAGE)
    with pytest.raises(OSError, match="no memory for a block") as caught:
        mapping.populate(PAGE, 2 * PAGE)
    assert caught.value.errno == errno.ENOSPC


def test_where_files_cannot_be_made_without_a_name_they_lose_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: str, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    segment = Segment.create(2 * PAGE, "file", str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert stat.S_IMODE(os.fstat(segment.fd).st_mode) == 0o600
    assert not os.get_inheritable(segment.fd)
    segment.map("r+").array(0, 2 * PAGE)[:] = 7
    assert segment.map("r").array(PAGE, PAGE).tolist() == [7] * PAGE


def unsealed() -> int:
    fd = os.memfd_create("shmpool")
    os.ftruncate(fd, PAGE)
    return fd


@pytest.mark.parametrize(
    ("open_it", "why"),
    [
        (lambda: os.open(os.devnull, os.O_RDONLY), "of no file that can be read"),
        (lambda: os.open("/", os.O_RDONLY), "of no file that can be read"),
        (lambda: os.open("/proc/self/exe", os.O_PATH), "of no file that can be read"),
        (lambda: os.memfd_create("shmpool"), "has only 0 bytes"),
        (unsealed, "not sealed against shrinking"),
    ],
    ids=["device", "folder", "path", "short", "unsealed"],
)
def test_what_is_no_segment_is_refused_and_closed(open_it, why: str) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ValueError, match=why):
        Segment.from_another(open_it(), PAGE)
    assert os.listdir("/proc/self/fd") == before


def test_a_child_forked_while_a_segment_is_closed_closes_nothing_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert fork_while_closing(Segment.create(PAGE, "memfd").close, monkeypatch) == [0]


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("length", [0, 1, 5])
@pytest.mark.parametrize("writable", [True, False])
def test_an_address_is_what_numpy_says(start: int, length: int, writable: bool) -> None:
    memory = np.arange(10, dtype=np.uint8)[start : start + length]
    memory.flags.writeable = writable
    assert address_of(memory) == memory.__array_interface__["data"][0]
