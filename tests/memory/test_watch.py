"""Write watches on real memory: every way to write is noticed, and what nobody wrote to is known to be as it was."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from shmpool.memory import pagemap
from shmpool.memory import watch as module
from shmpool.memory.segment import Segment
from shmpool.memory.watch import Watched, WriteWatch

PAGE = mmap.PAGESIZE
LENGTH = 64 * PAGE


@pytest.fixture
def works() -> None:
    if not module._works():
        pytest.skip("no userfaultfd with asynchronous write protection here (Linux 6.7)")


@pytest.fixture
def watch(works: None) -> Iterator[WriteWatch]:
    watch = WriteWatch()
    yield watch
    watch.close()


@pytest.fixture
def array() -> np.ndarray:
    """Memory of malloc's, that begins and ends within a page."""
    return np.ones(LENGTH + PAGE // 2, np.uint8)


def begin(watch: WriteWatch, array: np.ndarray) -> Watched:
    watched = watch.watch(array.ctypes.data, array.nbytes)
    assert watched is not None
    return watched


def test_memory_that_is_only_read_is_unwritten(watch: WriteWatch, array: np.ndarray) -> None:
    watched = begin(watch, array)
    assert int(array.sum()) == array.size
    assert watch.is_unwritten(watched)
    assert watch.is_unwritten(watched), "each time"


def test_all_whole_pages_of_the_range_are_watched(watch: WriteWatch, array: np.ndarray) -> None:
    watched = begin(watch, array)
    address = array.ctypes.data
    assert address <= watched.start < address + PAGE
    assert address + array.nbytes - PAGE < watched.stop <= address + array.nbytes


@pytest.mark.parametrize("page", [0, 1, 31, -2, -1])
@pytest.mark.parametrize("within", [0, PAGE - 1])
def test_one_written_byte_is_noticed(
    watch: WriteWatch, array: np.ndarray, page: int, within: int
) -> None:
    watched = begin(watch, array)
    edge = watched.start if page >= 0 else watched.stop
    array[edge + page * PAGE + within - array.ctypes.data] = 2
    assert not watch.is_unwritten(watched)
    assert not watch.is_unwritten(watched), "and is not forgotten"


def test_bytes_outside_of_the_whole_pages_are_not_watched(
    watch: WriteWatch, array: np.ndarray
) -> None:
    watched = begin(watch, array)
    if watched.start > array.ctypes.data:
        array[0] = 2
    if watched.stop < array.ctypes.data + array.nbytes:
        array[-1] = 2
    assert watch.is_unwritten(watched)


def by_the_kernel(array: np.ndarray) -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"x" * 8)
        assert os.readv(reader, [memoryview(array)[LENGTH // 2 : LENGTH // 2 + 8]]) == 8
    finally:
        os.close(reader)
        os.close(writer)


def by_a_thread(array: np.ndarray) -> None:
    thread = threading.Thread(target=array.fill, args=(3,))
    thread.start()
    thread.join()


def by_compiled_code(array: np.ndarray) -> None:
    ctypes.memset(array.ctypes.data + LENGTH // 2, 7, 1)


def through_proc_mem(array: np.ndarray) -> None:
    fd = os.open("/proc/self/mem", os.O_RDWR)
    try:
        os.pwrite(fd, b"y", array.ctypes.data + LENGTH // 2)
    finally:
        os.close(fd)


def through_another_view(array: np.ndarray) -> None:
    np.frombuffer(memoryview(array), np.uint8)[LENGTH // 2] = 9


def after_a_fork(array: np.ndarray) -> None:
    if not (pid := os.fork()):
        os._exit(0)
    os.waitpid(pid, 0)
    array[LENGTH // 2] = 5


def by_dropping_pages(array: np.ndarray) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    start = -(-array.ctypes.data // PAGE) * PAGE
    address, length = ctypes.c_void_p(start), ctypes.c_size_t(4 * PAGE)
    assert libc.madvise(address, length, mmap.MADV_DONTNEED) == 0
    assert array[PAGE] == 0


@pytest.mark.parametrize(
    "write",
    [by_the_kernel, by_a_thread, by_compiled_code, through_proc_mem, through_another_view,
     after_a_fork, by_dropping_pages],
)  # fmt: skip
def test_whoever_writes_is_noticed(
    watch: WriteWatch, array: np.ndarray, write: Callable[[np.ndarray], None]
) -> None:
    watched = begin(watch, array)
    assert watch.is_unwritten(watched)
    write(array)
    assert not watch.is_unwritten(watched)


def test_what_a_forked_child_writes_changes_nothing_here(
    watch: WriteWatch, array: np.ndarray
) -> None:
    watched = begin(watch, array)
    pid = os.fork()
    if not pid:
        array.fill(9)
        os._exit(1 if watch.is_unwritten(watched) else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the watch is not the child's"
    assert array[0] == 1
    assert watch.is_unwritten(watched)


def test_other_memory_at_the_same_address_counts_as_written(watch: WriteWatch) -> None:
    memory = mmap.mmap(-1, LENGTH, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(view)
    del view
    memory[:] = b"1" * LENGTH
    watched = watch.watch(address, LENGTH)
    assert watched is not None and watch.is_unwritten(watched)
    memory.close()
    assert not watch.is_unwritten(watched), "it is gone"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    fixed_noreplace = 0x100000
    got = libc.mmap(
        ctypes.c_void_p(address), ctypes.c_size_t(LENGTH), mmap.PROT_READ | mmap.PROT_WRITE,
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed_noreplace, -1, ctypes.c_long(0),
    )  # fmt: skip
    assert got == address
    try:
        ctypes.memset(address, 1, LENGTH)
        assert not watch.is_unwritten(watched)
        watch.stop(watched)
        again = watch.watch(address, LENGTH)
        assert again is not None and watch.is_unwritten(again)
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(LENGTH))


def test_pages_that_are_not_there_count_as_written(watch: WriteWatch) -> None:
    with mmap.mmap(-1, LENGTH, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:PAGE] = b"1" * PAGE
        view = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(view)
        del view
        watched = watch.watch(address, LENGTH)
        assert watched is not None and not watch.is_unwritten(watched)


@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE])
def test_memory_that_others_may_write_to_is_never_known_to_be_unwritten(
    watch: WriteWatch, flags: int
) -> None:
    segment = Segment.create(LENGTH, "memfd")
    with mmap.mmap(segment.fd, LENGTH, flags) as memory:
        assert memory[:PAGE] == bytes(PAGE)
        view = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(view)
        del view
        _ = memory[:]
        watched = watch.watch(address, LENGTH)
        assert watched is None or not watch.is_unwritten(watched)
    segment.close()


def test_ranges_that_overlap_are_not_watched_together(watch: WriteWatch, array: np.ndarray) -> None:
    first = begin(watch, array[: LENGTH // 2])
    array[PAGE * 8] = 2
    assert watch.watch(array.ctypes.data, array.nbytes) is None
    assert not watch.is_unwritten(first), "its written page has not been protected again"
    other = begin(watch, array[LENGTH // 2 + PAGE :])
    assert watch.is_unwritten(other)
    watch.stop(first)
    watch.stop(other)
    assert watch.is_unwritten(begin(watch, array))


def test_a_watch_that_has_ended_knows_nothing(watch: WriteWatch, array: np.ndarray) -> None:
    first = begin(watch, array)
    watch.stop(first)
    array.fill(2)
    begin(watch, array)
    assert not watch.is_unwritten(first)
    watch.stop(first)  # twice is no mistake


def test_only_so_many_ranges_are_watched(
    watch: WriteWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST", 2)
    arrays = [np.ones(LENGTH, np.uint8) for _ in range(3)]
    watched = [watch.watch(array.ctypes.data, LENGTH) for array in arrays]
    assert [one is not None for one in watched] == [True, True, False]
    assert watched[0] is not None
    watch.stop(watched[0])
    assert watch.watch(arrays[2].ctypes.data, LENGTH) is not None


def test_less_than_a_page_is_not_watched(watch: WriteWatch, array: np.ndarray) -> None:
    assert watch.watch(array.ctypes.data, PAGE - 1) is None


@pytest.mark.parametrize(
    ("target", "harmless"),
    [("/dev/null", True), ("/dev/urandom", True), ("/dev/pts/3", True), ("/dev/shm/x", True),
     ("/dev/tty", True), ("/home/x/dev/file", True), ("socket:[12]", True), ("pipe:[3]", True),
     ("anon_inode:[eventfd]", True), ("/memfd:shmpool (deleted)", True), ("a\nb", True),
     ("/dev/nvidia0", False), ("/dev/nvidiactl", False), ("/dev/kfd", False),
     ("/dev/dri/renderD128", False), ("/dev/infiniband/uverbs0", False), ("/dev/vfio/1", False),
     ("anon_inode:[io_uring]", False)],
)  # fmt: skip
def test_devices_that_could_write_by_themselves_are_told_from_others(
    target: str, harmless: bool
) -> None:
    assert bool(module._HARMLESS.fullmatch(target)) == harmless


def test_no_watch_begins_while_a_device_is_open(
    watch: WriteWatch, array: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        assert watch.watch(array.ctypes.data, PAGE * 8) is not None
        monkeypatch.setattr(module, "_HARMLESS", module.re.compile(r"(?!/dev/null).*"))
        assert watch.watch(array.ctypes.data + PAGE * 16, PAGE * 8) is None
    finally:
        os.close(fd)


@pytest.fixture
def no_verdict_yet() -> Iterator[None]:
    """Forget whether it works, before and after."""
    module._works.cache_clear()
    yield
    module._works.cache_clear()


def refuse(*_: object, **__: object) -> int:
    raise OSError(errno.EPERM, "not here")


@pytest.mark.usefixtures("no_verdict_yet")
@pytest.mark.parametrize(
    "what",
    [
        *("no userfaultfd", "no pagemap", "nonsense", "other machine", "filtered, no device"),
        *("unknown to the kernel", "another interface"),
    ],
)
def test_where_the_system_cannot_do_it_nothing_is_watched(
    what: str, array: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "no userfaultfd":
        monkeypatch.setattr(module, "_open_userfaultfd", refuse)
    elif what == "no pagemap":
        monkeypatch.setattr(pagemap, "PAGEMAP", "/proc/self/no-such-file")
    elif what == "nonsense":
        monkeypatch.setattr(WriteWatch, "_are_unwritten", lambda *_: True)
    elif what == "unknown to the kernel":
        monkeypatch.setattr(module, "_is_filtered", lambda: False)
        monkeypatch.setattr(module, "_SYSCALLS", {os.uname().machine: 1_000_000})
    elif what == "another interface":
        monkeypatch.setattr(module, "_UFFDIO_API", module._UFFDIO_API + 7)
    elif what == "other machine":
        monkeypatch.setattr(module, "_is_filtered", lambda: False)
        monkeypatch.setattr(module, "_SYSCALLS", {"pdp11": 1})
    else:
        monkeypatch.setattr(module, "_is_filtered", lambda: True)
        monkeypatch.setattr(module, "_from_device", refuse)
        monkeypatch.setattr(module, "_from_system_call", lambda: pytest.fail("it may be deadly"))
    before = len(os.listdir("/proc/self/fd"))
    watch = WriteWatch()
    assert watch.watch(array.ctypes.data, array.nbytes) is None
    watch.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_where_a_range_cannot_be_protected_none_is_watched_and_nothing_stays(
    watch: WriteWatch, array: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_UFFDIO_WRITEPROTECT", module._UFFDIO_WRITEPROTECT + 7)
    assert watch.watch(array.ctypes.data, array.nbytes) is None
    monkeypatch.undo()
    assert watch.is_unwritten(begin(watch, array))


def test_where_the_kernel_does_not_answer_all_counts_as_written(
    watch: WriteWatch, array: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = begin(watch, array)
    monkeypatch.setattr(module, "ask_pages", refuse)
    assert not watch.is_unwritten(watched)


def test_it_opens_two_descriptors_and_gives_them_back(works: None, array: np.ndarray) -> None:
    before = len(os.listdir("/proc/self/fd"))
    watch = WriteWatch()
    assert len(os.listdir("/proc/self/fd")) == before
    assert watch.is_unwritten(begin(watch, array))
    assert len(os.listdir("/proc/self/fd")) == before + 2
    watch.close()
    assert len(os.listdir("/proc/self/fd")) == before
    watch.close()


@pytest.mark.skipif(not os.access("/dev/userfaultfd", os.W_OK), reason="it is not ours to open")
@pytest.mark.usefixtures("no_verdict_yet")
def test_where_system_calls_are_filtered_the_device_serves(
    array: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_is_filtered", lambda: True)
    monkeypatch.setattr(module, "_from_system_call", lambda: pytest.fail("it may be deadly"))
    watch = WriteWatch()
    watched = begin(watch, array)
    assert watch.is_unwritten(watched)
    array[LENGTH // 2] = 2
    assert not watch.is_unwritten(watched)
    watch.close()


def test_a_filter_of_system_calls_is_noticed() -> None:
    script = """
import ctypes
from shmpool.memory import watch
assert not watch._is_filtered(), "here, before"
libc = ctypes.CDLL(None)
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER = 38, 22, 2
class Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction))]
allow = (Instruction * 1)(Instruction(0x06, 0, 0, 0x7FFF0000))  # return SECCOMP_RET_ALLOW
assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
if libc.prctl(PR_SET_SECCOMP, FILTER, ctypes.byref(Program(1, allow)), 0, 0):
    print("no filters here")
else:
    print(watch._is_filtered())
"""
    if module._is_filtered():
        pytest.skip("there is one here already")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    if "no filters" in done.stdout:
        pytest.skip("this system cannot filter")
    assert done.stdout.strip() == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has userfaultfd")
def test_a_kernel_that_should_have_it_has_it() -> None:
    version = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2]))
    if version < (6, 7) or not Path("/proc/sys/vm/unprivileged_userfaultfd").exists():
        pytest.skip("this kernel has no such thing")
    if os.geteuid() or module._is_filtered():
        pytest.skip("a sandbox may refuse it")
    assert module._works()
