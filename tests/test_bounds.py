"""The store is bounded: what it costs, where it goes when memory is full, when it comes back. By figures of memory."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import numpy as np
import psutil
import pytest
from support import TIMEUNIT, wait_until

import shmpool
from shmpool.config import Config
from shmpool.memory import segment

MB = 1_000_000
MIB = 1 << 20


def tree_memory() -> int:
    """Bytes of memory of this process and its children, shared pages counted once (PSS), without those of files.

    Arenas count with what they hold, be it mapped or not. Other files are left out since how many of their pages count
    depends on what other programs map them.
    """
    me = psutil.Process()
    anonymous = mapped = 0
    files: dict[tuple[int, int], int] = {}
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(OSError):  # it has just ended
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            sizes = dict(line.split(":", 1) for line in text.splitlines()[1:])
            anonymous += int(sizes["Pss_Anon"].split()[0]) * 1024
            mapped += int(sizes["Pss_Shmem"].split()[0]) * 1024
            for entry in os.scandir(f"/proc/{process.pid}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    if os.readlink(entry.path).startswith("/memfd:shmpool"):
                        status = os.stat(entry.path)
                        files[status.st_dev, status.st_ino] = status.st_blocks * 512
    return anonymous + max(mapped, sum(files.values()))


class Peak:
    """The largest memory of the tree while a block of code runs."""

    def __enter__(self) -> Self:
        self.before = self.most = tree_memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.most = max(self.most, tree_memory())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.most = max(self.most, tree_memory())


def filled(nbytes: int, value: int) -> np.ndarray:
    return np.full(nbytes, value, np.uint8)


def total(array: np.ndarray) -> int:
    return int(array.sum(dtype=np.int64))


def make(nbytes: int, value: int) -> np.ndarray:
    return filled(nbytes, value)


def make_large(value: int) -> np.ndarray:
    return filled(100 * MB, value)


@pytest.mark.parametrize(
    ("capacity", "expected"), [(5_000_000, 5_000_000), ("4 MiB", 4 * MIB), ("1.5kB", 1500)]
)
def test_capacity_is_bytes_or_a_string(capacity: int | str, expected: int) -> None:
    assert shmpool.ObjectStore(capacity).stats().capacity == expected


@pytest.mark.parametrize("capacity", ["four", "", -1, 0, "4 parsecs", "nan"])
def test_a_capacity_that_is_no_size_is_refused_with_its_value(capacity: object) -> None:
    with pytest.raises(ValueError, match="capacity") as caught:
        shmpool.ObjectStore(capacity)
    assert repr(capacity) in str(caught.value)


def test_past_the_capacity_blocks_go_to_files_without_names(
    tmp_path: Path, memory_backend: str
) -> None:
    store = shmpool.ObjectStore(8 * MIB, str(tmp_path))
    refs = [shmpool.put(filled(3 * MIB, i), store=store) for i in range(6)]
    stats = store.stats()
    assert stats.resident <= 8 * MIB
    assert stats.spilled >= 12 * MIB
    assert not os.listdir(tmp_path)
    for i, ref in enumerate(refs):
        view = ref.get("c")
        assert (view == i).all()
        view[:] = 99
        assert (ref.get() == i).all()
    del refs, ref, view
    assert store.stats().used == 0
    store.verify()


def test_tasks_go_on_when_arguments_and_results_are_spilled(
    tmp_path: Path, start_method: str
) -> None:
    store = shmpool.ObjectStore(8 * MIB, str(tmp_path))
    with shmpool.ShmExecutor(2, start_method, store=store) as ex:
        futures = [ex.submit(total, filled(3 * MIB, i)) for i in range(8)]
        results = [ex.submit(make, 3 * MIB, i) for i in range(8)]
        assert [f.result() for f in futures] == [3 * MIB * i for i in range(8)]
        arrays = [f.result() for f in results]
        for i, array in enumerate(arrays):
            assert (array == i).all()
        stats = store.stats()
        # A worker learns of its limit with each task, and of the others' use not at once.
        assert stats.resident + stats.resident_in_workers <= 8 * MIB + 2 * 3 * MIB
    del array, arrays, results, futures


def test_where_nothing_may_be_spilled_the_error_has_the_sizes_and_room_returns() -> None:
    store = shmpool.ObjectStore(8 * MIB, spill_dir=False)
    first = shmpool.put(filled(6 * MIB, 1), store=store)
    with pytest.raises(shmpool.StoreFullError) as caught:
        shmpool.put(filled(3 * MIB, 2), store=store)
    assert isinstance(caught.value, MemoryError)
    assert (caught.value.requested, caught.value.used, caught.value.capacity) == (
        3 * MIB,
        6 * MIB,
        8 * MIB,
    )
    assert f"{3 * MIB:,}" in str(caught.value)
    del first
    assert total(shmpool.put(filled(3 * MIB, 2), store=store).get()) == 6 * MIB
    store.verify()


def test_a_full_store_fails_the_future_and_the_pool_goes_on() -> None:
    store = shmpool.ObjectStore(8 * MIB, spill_dir=False)
    with shmpool.ShmExecutor(1, store=store) as ex:
        assert isinstance(ex.submit(total, filled(9 * MIB, 1)).exception(), shmpool.StoreFullError)
        assert isinstance(ex.submit(make, 9 * MIB, 1).exception(), shmpool.StoreFullError)
        assert ex.submit(total, filled(MIB, 1)).result() == MIB
        assert total(ex.submit(make, MIB, 1).result()) == MIB


def test_a_full_file_system_is_an_error_and_no_signal(
    monkeypatch: pytest.MonkeyPatch, small_tmpfs: Path
) -> None:
    store = shmpool.ObjectStore(2 * MIB, str(small_tmpfs))
    kept = [shmpool.put(filled(MIB, i), store=store) for i in range(4)]
    with pytest.raises(shmpool.StoreFullError, match="spill folder"):
        kept.extend(shmpool.put(filled(MIB, i), store=store) for i in range(16))
    assert [int(ref.get()[0]) for ref in kept] == [0, 1, 2, 3, *range(len(kept) - 4)]
    store.verify()
    del kept[1:]
    assert total(shmpool.put(filled(MIB, 1), store=store).get()) == MIB


@pytest.mark.parametrize("spill_is_full", [False, True])
def test_where_shared_memory_is_full_blocks_go_to_the_spill_folder(
    monkeypatch: pytest.MonkeyPatch,
    small_tmpfs: Path,
    tmp_path_factory: pytest.TempPathFactory,
    spill_is_full: bool,
) -> None:
    """A container's /dev/shm is small, and memory is made of files there where the system has no memfd."""
    monkeypatch.setattr(segment, "_shared_folder", lambda: str(small_tmpfs))
    spill = small_tmpfs if spill_is_full else tmp_path_factory.mktemp("spill")
    config = Config.from_env()._replace(memory_backend="file", arena_min=16 * MIB)
    store = shmpool.ObjectStore(64 * MIB, str(spill), config=config)
    refs = [shmpool.put(filled(3 * MIB, i), store=store) for i in range(2)]
    if spill_is_full:
        with pytest.raises(shmpool.StoreFullError, match="neither has the spill folder"):
            shmpool.put(filled(3 * MIB, 2), store=store)
    else:
        refs += [shmpool.put(filled(3 * MIB, i), store=store) for i in range(2, 6)]
        assert store.stats().spilled == 4 * 3 * MIB
    assert [total(ref.get()) // (3 * MIB) for ref in refs] == list(range(len(refs)))
    del refs
    assert total(shmpool.put(filled(3 * MIB, 1), store=store).get()) == 3 * MIB
    store.verify()


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 8 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"may not mount a tmpfs here: {error}")
    yield tmp_path
    # Lazily: the store, which has files open there, is the test's, and goes when its frame goes.
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_freed_pages_stay_warm_and_go_back_after_some_idle_time() -> None:
    for seconds in (0.3, 3, 30):
        store = shmpool.ObjectStore(config=Config(warm_seconds=seconds * TIMEUNIT))
        with shmpool.ShmExecutor(1, "fork", store=store) as ex:
            assert ex.submit(total, filled(32 * MIB, 1)).result() == 32 * MIB
            assert total(ex.submit(make, 32 * MIB, 1).result()) == 32 * MIB
            ex.submit(total, np.zeros(3)).result()
            before = tree_memory()
            if store.stats().resident < 32 * MIB:
                continue  # so slow a machine that they may have gone back before they were looked at
            less = before - 60 * MIB
            wait_until(lambda store=store: store.stats().resident == 0, 60, "warm pages to go")
            wait_until(lambda less=less: tree_memory() < less, 60, "the tree's memory to fall")
            return
    pytest.fail("the freed pages were given back at once")


def test_an_array_that_a_long_task_holds_is_not_written_again(tmp_path: Path) -> None:
    store = shmpool.ObjectStore(config=Config(warm_seconds=0.3 * TIMEUNIT))
    go = tmp_path / "go"

    def hold(array: np.ndarray) -> int:
        while not go.exists():
            time.sleep(0.01)
        return array.nbytes

    with shmpool.ShmExecutor(2, "fork", store=store) as ex:
        array = filled(8 * MIB, 1)
        held = ex.submit(hold, array)
        ex.submit(total, filled(8 * MIB, 2)).result()
        wait_until(lambda: store.stats().resident <= 8 * MIB, 60, "the warm pages to go")
        before = ex.stats().bytes_copied
        assert ex.submit(total, array).result() == 8 * MIB
        assert ex.stats().bytes_copied == before
        go.touch()
        assert held.result() == 8 * MIB


def test_without_an_executor_freed_memory_goes_back_at_once() -> None:
    store = shmpool.ObjectStore()
    ref = shmpool.put(filled(32 * MIB, 1), store=store)
    before = tree_memory()
    del ref
    assert store.stats().resident == 0
    assert tree_memory() < before - 30 * MIB


def test_warm_pages_are_limited() -> None:
    store = shmpool.ObjectStore(64 * MIB, config=Config(warm_share=0.25))
    with shmpool.ShmExecutor(1, store=store) as ex:
        refs = [ex.put(filled(8 * MIB, i)) for i in range(7)]
        ex.submit(total, np.zeros(3)).result()
        del refs
        assert store.stats().resident <= 16 * MIB


def test_as_many_pages_stay_warm_as_were_in_use_lately_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1e6
    monkeypatch.setattr("shmpool.store.heap.time", SimpleNamespace(monotonic=lambda: now))
    store = shmpool.ObjectStore(config=Config(warm_bytes=MIB, warm_seconds=3600))
    with shmpool.ShmExecutor(1, store=store) as ex:
        ex.submit(total, np.zeros(3)).result()  # from now on the store is in use

        def left_by(count: int) -> int:
            refs = [ex.put(filled(4 * MIB, i)) for i in range(count)]
            assert [total(ref.get()) for ref in refs] == [4 * MIB * i for i in range(count)]
            del refs
            return store.stats().resident

        assert left_by(8) == left_by(8) == left_by(1) == 32 * MIB
        now += 3601
        assert left_by(1) == 32 * MIB, "it was not long ago"
        now += 3601
        assert left_by(1) == 4 * MIB


def test_copies_that_are_only_kept_for_later_go_back_after_some_idle_time() -> None:
    """The arrays live on, and nothing else is freed meanwhile."""
    store = shmpool.ObjectStore(config=Config(warm_seconds=0.3 * TIMEUNIT))
    arrays = [filled(8 * MIB, value) for value in range(4)]
    with shmpool.ShmExecutor(1, store=store) as ex:
        assert list(ex.map(total, arrays)) == [8 * MIB * value for value in range(4)]
        wait_until(lambda: store.stats().resident == 0, 60, "the copies to go")
        assert list(ex.map(total, arrays)) == [8 * MIB * value for value in range(4)]


def test_the_results_a_caller_drops_are_given_back_by_an_idle_worker() -> None:
    store = shmpool.ObjectStore(config=Config(warm_seconds=0.3 * TIMEUNIT))
    with shmpool.ShmExecutor(1, store=store) as ex:
        before = tree_memory()
        kept = ex.submit(make, 64 * MIB, 1).result()
        assert total(kept) == 64 * MIB
        assert tree_memory() > before + 60 * MIB
        del kept
        wait_until(lambda: tree_memory() < before + 20 * MIB, 60, "the worker's memory to fall")


@pytest.mark.slow
def test_a_backlog_under_buffersize_stays_small() -> None:
    def produce() -> Iterator[np.ndarray]:
        for i in range(60):
            yield filled(100 * MB, i)

    with Peak() as peak, shmpool.ShmExecutor(2) as ex:
        totals = list(ex.map(total, produce(), buffersize=4))
    assert totals == [100 * MB * i for i in range(60)]
    assert peak.most - peak.before < 1500 * MB


@pytest.mark.slow
def test_large_results_of_a_pool_that_reads_a_generator_stay_few() -> None:
    def produce() -> Iterator[int]:
        yield from range(60)

    seen = []
    with Peak() as peak:
        with shmpool.Pool(2) as pool:
            for result in pool.imap(make_large, produce()):
                seen.append((result.nbytes, int(result[0]), int(result[-1])))
                del result  # else it is there while the next one is awaited
        pool.join()
    assert sorted(seen) == [(100 * MB, i, i) for i in range(60)]
    assert peak.most - peak.before < 1500 * MB


def test_one_array_for_many_tasks_is_one_copy_in_all() -> None:
    size = 200 * MB
    array = filled(size, 1)
    # Spawned, and warmed up: else what grows is the workers' own share of pages that they were forked with.
    with shmpool.ShmExecutor(4, "spawn") as ex:
        list(ex.map(make, [MB] * 40, range(40)))
        copied = ex.stats().bytes_copied
        before = tree_memory()
        assert list(ex.map(total, [array] * 8)) == [size] * 8
        # All still have it mapped. (At rest: while processes begin to share pages, a look at one after the other counts
        # some of them twice.)
        grown = tree_memory() - before
        assert ex.stats().bytes_copied - copied == size
    assert 0.9 * size < grown < 1.5 * size


def test_huge_pages_are_used_or_clearly_refused() -> None:
    free = int(Path("/proc/sys/vm/nr_hugepages").read_text())
    if free < 64:
        with pytest.raises(RuntimeError, match=r"vm\.nr_hugepages"):
            shmpool.ObjectStore(huge_pages=True)
        return
    store = shmpool.ObjectStore(huge_pages=True, config=Config(arena_min=64 * MIB))
    ref = shmpool.put(filled(4 * MIB, 1), store=store)
    view = ref.get("c")
    view[0] = 2
    assert total(ref.get()) == 4 * MIB


@pytest.mark.parametrize("huge_pages", ["auto", False])
def test_transparent_huge_pages_may_be_asked_for_or_not(huge_pages: object) -> None:
    store = shmpool.ObjectStore(huge_pages=huge_pages)
    assert total(shmpool.put(filled(4 * MIB, 1), store=store).get()) == 4 * MIB


def test_other_values_of_huge_pages_are_refused() -> None:
    with pytest.raises(ValueError, match="'sometimes'"):
        shmpool.ObjectStore(huge_pages="sometimes")
