"""The system gives no more: memory, disk, descriptors, processes. Clear errors, and on it goes when there is room.

Where a limit is tried at every place, each number of what is left is tried in turn: whatever it is that cannot be had
then, the task fails with an error that says so, nothing is left behind, and the next task works.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from executor_tasks import PYTHON, SOON, run, write_script
from support import wait_until

import shmpool
from shmpool import ObjectStore, ShmExecutor, StoreFullError, WorkerDiedError
from shmpool.config import Config
from shmpool.dispatch.timer import Timer
from shmpool.store.peer import Peer

MIB = 1 << 20
#: Items of an array that goes through the store.
LARGE = 100_000


def ones(number: int) -> np.ndarray:
    return np.ones(number)


def total(array: np.ndarray) -> float:
    return float(array.sum())


def add(array: np.ndarray, number: int) -> np.ndarray:
    return array + number


def long_list(number: int) -> list[int]:
    """Its pickle is so long that it goes through the store."""
    return list(range(number))


def check_all_works(executor: ShmExecutor) -> None:
    assert executor.submit(total, np.ones(LARGE)).result(SOON) == LARGE
    assert executor.submit(ones, LARGE).result(SOON).sum() == LARGE
    assert len(executor.submit(long_list, LARGE).result(SOON)) == LARGE
    assert executor.submit(len, long_list(LARGE)).result(SOON) == LARGE
    assert list(executor.map(abs, range(-20, 0))) == list(range(20, 0, -1))


# ---------------------------------------------------------------- the store


def wrong_or_full(future: Future[np.ndarray], expected: float) -> str:
    """How a task ended that needs room: well, or for lack of it."""
    error = future.exception(SOON)
    if error is None:
        assert (future.result() == expected).all(), "a wrong result"
        return "done"
    assert isinstance(error, StoreFullError), repr(error)
    assert "limit for memory" in str(error)
    return "full"


def test_a_store_at_its_capacity_under_concurrency_refuses_and_mixes_nothing_up() -> None:
    store = ObjectStore(12 * MIB, spill_dir=False)
    ends: Counter[str] = Counter()
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        kept: list[np.ndarray] = []
        try:
            for _ in range(25):
                size, value, more = rng.integers([20_000, 0, 1], [250_000, 100, 50]).tolist()
                future = executor.submit(add, np.full(size, float(value)), more)
                ends[end := wrong_or_full(future, value + more)] += 1
                if end == "done":
                    kept.append(future.result())
                del kept[: -int(rng.integers(1, 4))], future
        except BaseException as error:
            failures.append(error)

    with ShmExecutor(2, "fork", store=store) as executor:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        assert ends["done"] > 0 and ends["full"] > 0, ends
        check_all_works(executor)
    store.verify()
    assert store.stats().used == 0


def test_a_store_at_its_capacity_under_concurrency_spills_what_is_beyond(tmp_path: Path) -> None:
    store = ObjectStore(4 * MIB, str(tmp_path))
    with ShmExecutor(2, "fork", store=store) as executor:
        arrays = [np.full(100_000, float(i)) for i in range(30)]
        results = list(executor.map(add, arrays, range(30)))
        assert all((result == 2 * i).all() for i, result in enumerate(results))
        stats = store.stats()
        assert stats.spilled + stats.resident_in_workers > 0
        assert not os.listdir(tmp_path), "spill files have no names"
        del results, arrays
    assert store.stats().used == 0


@pytest.fixture
def full_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 2 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"may not mount a tmpfs here: {error}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_spill_folder_that_is_full_is_an_error_here_and_in_workers(full_folder: Path) -> None:
    store = ObjectStore(2 * MIB, str(full_folder))
    with ShmExecutor(2, "fork", store=store) as executor:
        held = [executor.put(np.ones(LARGE)) for _ in range(3)]
        for submit in (
            lambda: executor.submit(total, np.ones(5 * LARGE)),
            lambda: executor.submit(ones, 5 * LARGE),
        ):
            for _ in range(3):
                error = submit().exception(SOON)
                assert isinstance(error, StoreFullError), repr(error)
                assert "spill folder" in str(error)
        assert all(ref.get().sum() == LARGE for ref in held)
        del held
        check_all_works(executor)


# ---------------------------------------------------------------- descriptors, in this process


@contextlib.contextmanager
def descriptors_left(number: int) -> Iterator[None]:
    """This process can open so many more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + number + 8, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(number):
            os.close(taken.pop())
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def check_it_is_about_descriptors(error: BaseException) -> None:
    text = str(error)
    if isinstance(error, OSError):
        assert error.errno == errno.EMFILE, repr(error)
    else:
        assert isinstance(error, StoreFullError | WorkerDiedError), repr(error)
        assert os.strerror(errno.EMFILE) in text or "RLIMIT_NOFILE" in text, text


def attempt(work: Callable[[], object]) -> bool:
    """Whether it worked; if not, it says that there were no more descriptors."""
    try:
        work()
    except Exception as error:
        check_it_is_about_descriptors(error)
        return False
    return True


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_executor_that_could_not_start_its_workers_can_later(method: str) -> None:
    worked = []
    for left in (0, 1, 2, 4, 6, 9, 12, 16, 50):
        with ShmExecutor(2, method) as executor:
            with descriptors_left(left):
                worked.append(attempt(lambda: executor.submit(abs, -1).result(SOON)))
            assert executor.submit(abs, -2).result(SOON) == 2
            assert len(executor._processes) <= 2
    assert worked[0] is False and worked[-1] is True, worked


@pytest.mark.parametrize(
    "work",
    [
        lambda ex: ex.submit(total, np.ones(LARGE)).result(SOON),
        lambda ex: ex.submit(ones, LARGE).result(SOON).sum(),
        lambda ex: ex.submit(len, long_list(LARGE)).result(SOON),
        lambda ex: len(ex.submit(long_list, LARGE).result(SOON)),
        lambda ex: ex.put(np.ones(LARGE)).get("c").sum(),
        lambda ex: shmpool.zeros(LARGE, store=ex._store).sum(),
    ],
    ids=["argument", "result", "long argument", "long result", "ref", "shared"],
)
def test_without_descriptors_a_task_with_an_array_fails_and_says_why(work) -> None:
    worked = []
    for left in (0, 1, 2, 3, 10):
        # Nothing is mapped yet, and no arena known.
        with ShmExecutor(1, "fork", store=ObjectStore()) as executor:
            executor.submit(abs, -1).result(SOON)
            with descriptors_left(left):
                worked.append(attempt(lambda: work(executor)))
            check_all_works(executor)
    assert worked[0] is False and worked[-1] is True, worked


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_without_descriptors_a_dead_worker_is_replaced_later(method: str) -> None:
    worked = []
    for left in (1, 4, 30):
        with ShmExecutor(1, method) as executor:
            executor.submit(abs, -1).result(SOON)
            with descriptors_left(left):
                error = executor.submit(os._exit, 3).exception(SOON)
                assert isinstance(error, WorkerDiedError)
                worked.append(attempt(lambda: executor.submit(abs, -1).result(SOON)))
            check_all_works(executor)
    assert worked[-1] is True, worked


def test_without_descriptors_for_all_arenas_of_a_task_none_stays_open() -> None:
    store = ObjectStore(config=Config.from_env()._replace(arena_min=MIB))
    peer = Peer(upstream=False)
    store.add_peer(peer)
    refs = [shmpool.put(np.ones(LARGE), store=store) for _ in range(2)]
    blocks = [block for ref in refs for block in ref._payload.blocks]
    assert len({block.arena for block in blocks}) == 2
    with descriptors_left(1):
        before = os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            store.introduce(peer, blocks)
        assert os.listdir("/proc/self/fd") == before
    for _, fd in store.introduce(peer, blocks):
        os.close(fd)


def test_without_descriptors_there_is_no_timer() -> None:
    with descriptors_left(0), pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        Timer(0.001)


# ---------------------------------------------------------------- what is no limit


@pytest.mark.parametrize(
    "spill_dir", [True, 0, 1, 2.5, b"/tmp", ["/tmp"], np.False_, np.zeros(3)], ids=repr
)
def test_what_is_no_folder_is_refused_as_a_spill_folder(spill_dir: Any) -> None:
    with pytest.raises(TypeError, match="spill_dir must be a folder"):
        ObjectStore(spill_dir=spill_dir)


def test_an_empty_name_is_refused_as_a_spill_folder() -> None:
    with pytest.raises(ValueError, match="None means the temporary one"):
        ObjectStore(spill_dir="")


def test_a_path_object_is_a_spill_folder(tmp_path: Path) -> None:
    assert ObjectStore(spill_dir=tmp_path).spill_dir == str(tmp_path)
    assert ObjectStore(spill_dir=False).spill_dir is False
    assert ObjectStore().spill_dir is None


@pytest.mark.parametrize("huge_pages", [1, 0, None, "yes", b"auto"], ids=repr)
def test_what_says_nothing_about_huge_pages_is_refused(huge_pages: Any) -> None:
    with pytest.raises(ValueError, match="huge_pages must be 'auto', True or False"):
        ObjectStore(huge_pages=huge_pages)


# ---------------------------------------------------------------- room in a socket


def wait_for(file: str) -> None:
    wait_until(lambda: os.path.exists(file), 60, "the file")


def length_and_total(text: bytes, array: np.ndarray | None = None) -> tuple[bytes, int, float]:
    return text[:1], len(text), 0 if array is None else total(array)


@pytest.mark.parametrize("array", [None, np.ones(LARGE)], ids=["plain", "with an array"])
def test_calls_for_which_a_socket_has_no_room_go_when_it_has(
    tmp_path: Path, array: np.ndarray | None
) -> None:
    file = tmp_path / "go"
    with ShmExecutor(1, "fork") as executor:
        first = executor.submit(wait_for, str(file))
        texts = [bytes([i]) * 50_000 for i in range(40)]  # a socket holds four of them
        futures = [executor.submit(length_and_total, text, array) for text in texts]
        file.touch()
        assert first.result(SOON) is None
        expected = 0 if array is None else LARGE
        results = [future.result(SOON) for future in futures]
        assert results == [(text[:1], 50_000, expected) for text in texts]


# ---------------------------------------------------------------- limits of a worker

_held: list[int] = []


def leave_descriptors(number: int) -> int:
    """In a worker: it can open so many more."""
    stack = contextlib.ExitStack()
    stack.enter_context(descriptors_left(number))
    _held.append(stack)  # type: ignore[arg-type]
    return os.getpid()


def let_go() -> int:
    for stack in _held:
        stack.close()  # type: ignore[attr-defined]
    _held.clear()
    return os.getpid()


@pytest.mark.parametrize(
    "work",
    [
        lambda ex: ex.submit(total, np.ones(LARGE)).result(SOON),
        lambda ex: ex.submit(ones, LARGE).result(SOON).sum(),
        lambda ex: ex.submit(len, long_list(LARGE)).result(SOON),
        lambda ex: len(ex.submit(long_list, LARGE).result(SOON)),
    ],
    ids=["argument", "result", "long argument", "long result"],
)
def test_a_worker_without_descriptors_fails_its_task_and_says_why(work) -> None:
    worked = []
    for left in (0, 1, 2, 3, 10):
        with ShmExecutor(1, "fork", store=ObjectStore()) as executor:
            executor.submit(leave_descriptors, left).result(SOON)
            worked.append(attempt(lambda: work(executor)))
            executor.submit(let_go).result(SOON)
            check_all_works(executor)
    assert worked[0] is False and worked[-1] is True, worked


def limit_address_space(more: int) -> None:
    """In a worker: so many bytes more than it has."""
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (has + more, hard))


def unlimit_address_space() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def fill(nbytes: int) -> int:
    return len(bytearray(nbytes))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_whose_address_space_is_limited_says_so(method: str) -> None:
    with ShmExecutor(1, method, initializer=limit_address_space, initargs=(4 * MIB,)) as executor:
        assert executor.submit(abs, -1).result(SOON) == 1
        for future in (
            executor.submit(total, np.ones(20 * LARGE)),
            executor.submit(ones, 20 * LARGE),
            executor.submit(fill, 1 << 30),
        ):
            error = future.exception(SOON)
            assert isinstance(error, MemoryError), repr(error)
            assert not isinstance(error, StoreFullError) or os.strerror(errno.ENOMEM) in str(error)
        # A call that it cannot even read is one that it cannot answer.
        error = executor.submit(len, long_list(10 * LARGE)).exception(SOON)
        assert isinstance(error, MemoryError | WorkerDiedError), repr(error)
        assert os.strerror(errno.ENOMEM) in str(error)
        executor.submit(unlimit_address_space).result(SOON)
        check_all_works(executor)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def test_of_a_worker_that_was_killed_it_is_said_that_memory_may_be_why() -> None:
    with ShmExecutor(1, "fork") as executor:
        error = executor.submit(be_killed).exception(SOON)
        assert isinstance(error, WorkerDiedError)
        assert "when memory runs out" in str(error)


# ---------------------------------------------------------------- processes

#: Root may have as many as it likes, so the program becomes somebody else: a user who has no other processes.
PROCESSES = """
    import os, resource, sys, threading
    import numpy as np
    from shmpool import ObjectStore, ShmExecutor

    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)

    def limit(number, *pids):
        for pid in pids or (0,):
            resource.prlimit(pid, resource.RLIMIT_NPROC, (number, hard))

    def attempt(executor):
        try:
            return executor.submit(abs, -1).result(60)
        except OSError as error:
            assert error.errno == 11, repr(error)
        except RuntimeError as error:
            assert "can't start new thread" in str(error), repr(error)
        return None

    def leave():
        os._exit(3)

    if __name__ == "__main__":
        with ShmExecutor(1, "fork") as executor:  # what is imported later can be read as root only, maybe
            executor.submit(abs, -1).result()
            executor.submit(leave).exception()
            executor.submit(abs, -1).result()
        os.setuid(100_000 + os.getpid())
        worked = []
        for number in range(2, 8):
            executor = ShmExecutor(2, "fork", store=ObjectStore())
            limit(number)
            worked.append(attempt(executor) == 1)
            limit(1000)
            assert executor.submit(abs, -2).result(60) == 2
            # Others are forked by the template, which has the limits that there were then.
            task = f"/proc/self/task/{os.getpid()}/children"
            (template,) = set(map(int, open(task).read().split())) - set(executor._processes)
            limit(1, template)
            for _ in range(2):
                assert "exit code 3" in str(executor.submit(leave).exception(60))
            assert attempt(executor) is None
            limit(1000, template)
            assert executor.submit(np.sum, np.ones(100_000)).result(60) == 100_000
            executor.shutdown()
        assert worked[0] is False and worked[-1] is True, worked
        assert threading.active_count() == 1
        print("done")
"""


def test_where_no_more_processes_can_be_had_tasks_fail_until_there_are(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become a user who has no other processes")
    script = write_script(tmp_path, PROCESSES)
    # OpenBLAS ends a program in which it cannot start its threads.
    done = run(*PYTHON, str(script), OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
