"""install(): who gets shmpool's pools, who keeps the standard library's, and that nothing is left after uninstall()."""

from __future__ import annotations

import abc
import concurrent.futures
import concurrent.futures.process
import inspect
import multiprocessing
import multiprocessing.context
import multiprocessing.dummy
import multiprocessing.managers
import multiprocessing.pool
import multiprocessing.process
import multiprocessing.spawn
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor as ImportedExecutor
from multiprocessing.pool import Pool as ImportedPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from install_tasks import (
    answer_of_child,
    answer_of_grandchild,
    double,
    everything_is_replaced,
    nothing_is_replaced,
    sum_by_pool,
)
from support import TIMEUNIT

import shmpool
from shmpool.pool import Pool as ShmPool

imported_method = multiprocessing.Pool

LARGE = 1 << 20  # bytes: goes through the store

MODULES = (multiprocessing.pool, concurrent.futures, concurrent.futures.process)


@pytest.fixture
def installed() -> Iterator[None]:
    with shmpool.install():
        yield


def snapshot() -> list[object]:
    """All that install() touches."""
    return [
        *(type(module) for module in MODULES),
        *(dict(vars(module)) for module in MODULES),
        multiprocessing.Pool,
        dict(vars(multiprocessing.context.BaseContext)),
        multiprocessing.spawn.get_preparation_data,
        dict(multiprocessing.process.current_process()._config),
    ]


# ---------------------------------------------------------------- the names


def test_all_names_are_shmpools_while_installed_and_the_old_ones_afterwards() -> None:
    before = snapshot()
    assert nothing_is_replaced()
    shmpool.install()
    try:
        assert everything_is_replaced()
    finally:
        shmpool.uninstall()
    assert nothing_is_replaced()
    assert snapshot() == before


def test_the_names_are_the_same_classes_everywhere(installed: None) -> None:
    from concurrent.futures.process import ProcessPoolExecutor
    from multiprocessing.pool import Pool

    assert concurrent.futures.ProcessPoolExecutor is ProcessPoolExecutor
    assert multiprocessing.pool.Pool is Pool
    namespace: dict[str, Any] = {}
    exec("from multiprocessing.pool import *; from concurrent.futures import *", namespace)
    assert namespace["Pool"] is Pool
    assert namespace["ProcessPoolExecutor"] is ProcessPoolExecutor


def test_names_imported_before_are_the_standard_librarys(installed: None) -> None:
    with imported_method(1) as pool:
        assert type(pool) is ImportedPool
        assert pool.apply(double, (4,)) == 8
        pool.close()
        pool.join()
    assert ImportedPool.__module__ == "multiprocessing.pool"
    with ImportedExecutor(1) as executor:
        assert type(executor).__module__ == "concurrent.futures.process"
        assert executor.submit(double, 4).result() == 8


def test_signatures_are_those_of_the_standard_library_and_more(installed: None) -> None:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing.pool import Pool

    for ours, standard in ((Pool, ImportedPool), (ProcessPoolExecutor, ImportedExecutor)):
        parameters = inspect.signature(ours).parameters
        for name, parameter in inspect.signature(standard).parameters.items():
            assert parameters[name].kind == parameter.kind, name
            assert parameters[name].default == parameter.default, name
    ours, standard = multiprocessing.Pool, imported_method
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(standard).parameters)


@pytest.mark.parametrize("name", ["Pool", "ProcessPoolExecutor"])
def test_a_name_that_is_replaced_for_a_while_comes_back(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot()
    module = MODULES[name != "Pool"]
    with shmpool.install():
        ours = getattr(module, name)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, "a fake")
            assert getattr(module, name) == "a fake"
        assert getattr(module, name) is ours
        # pytest has put back what is there without install(); who does it by hand, what was shown.
        setattr(module, name, "a fake")
        setattr(module, name, ours)
        with multiprocessing.pool.ThreadPool(1) as threads:
            assert threads.apply(abs, (-1,)) == 1
    assert snapshot() == before


def test_what_others_put_in_the_place_of_a_name_meanwhile_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with shmpool.install():
        theirs = multiprocessing.Pool = lambda: None  # type: ignore[assignment]
    assert multiprocessing.Pool is theirs
    multiprocessing.Pool = imported_method
    assert nothing_is_replaced()


# ---------------------------------------------------------------- calls of install()


def test_installing_twice_is_installing_once() -> None:
    shmpool.install()
    once = snapshot()
    shmpool.install()
    assert snapshot() == once
    shmpool.uninstall()
    assert nothing_is_replaced()
    shmpool.uninstall()
    assert nothing_is_replaced()


def test_the_last_block_that_is_left_uninstalls() -> None:
    outer = shmpool.install()
    inner = shmpool.install()
    with outer:
        with inner:
            assert everything_is_replaced()
        assert everything_is_replaced()
    assert nothing_is_replaced()
    with inner:
        assert everything_is_replaced()
    assert nothing_is_replaced()


def test_a_block_within_a_call_without_a_block_changes_nothing() -> None:
    shmpool.install()
    with shmpool.install():
        assert everything_is_replaced()
    assert everything_is_replaced()
    with shmpool.install():
        shmpool.uninstall()
        assert nothing_is_replaced()
    assert nothing_is_replaced()


def test_a_block_that_raises_uninstalls() -> None:
    with pytest.raises(KeyError), shmpool.install():
        raise KeyError
    assert nothing_is_replaced()


def test_blocks_of_many_threads_overlap() -> None:
    before = snapshot()
    wrong: list[str] = []
    start = threading.Barrier(4)

    def enter_and_leave() -> None:
        start.wait()
        for _ in range(50):
            with shmpool.install():
                if not everything_is_replaced():
                    wrong.append("not installed in its own block")

    threads = [threading.Thread(target=enter_and_leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert snapshot() == before


# ---------------------------------------------------------------- pools


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_each_context_makes_pools_with_its_start_method(installed: None, method: str) -> None:
    context = multiprocessing.get_context(method)
    array = np.arange(LARGE // 8)
    with context.Pool(1, None, (), 5) as pool:
        assert isinstance(pool, ShmPool)
        assert [type(process) for process in pool._pool] == [context.Process]
        assert (pool.map(double, [array])[0] == 2 * array).all()
        pool.close()
        pool.join()
    with concurrent.futures.ProcessPoolExecutor(1, context) as executor:
        assert isinstance(executor, shmpool.ShmExecutor)
        assert (executor.submit(double, array).result() == 2 * array).all()
        assert [type(process) for process in executor._processes.values()] == [context.Process]


def test_pools_outlive_being_installed() -> None:
    with shmpool.install():
        pool = multiprocessing.Pool(2)
    with pool:
        assert pool.map(double, range(3)) == [0, 2, 4]
        pool.close()
        pool.join()


def test_contexts_of_others_keep_their_pools(installed: None) -> None:
    loky = pytest.importorskip("loky.backend.context").get_context("loky")
    assert isinstance(loky, multiprocessing.context.BaseContext)

    class Context(type(loky)):  # type: ignore[misc]
        Process = multiprocessing.get_context("fork").Process

    with Context().Pool(1) as pool:
        assert type(pool) is ImportedPool
        assert pool.apply(double, (1,)) == 2
        pool.close()
        pool.join()


def test_contexts_derived_from_the_standard_librarys_get_shmpools(installed: None) -> None:
    class Context(type(multiprocessing.get_context("fork"))):  # type: ignore[misc]
        pass

    with Context().Pool(1) as pool:
        assert isinstance(pool, ShmPool)
        assert type(pool._ctx) is Context
        assert pool.apply(double, (1,)) == 2
        pool.close()
        pool.join()


def test_thread_pools_do_not_notice(installed: None) -> None:
    for make in (multiprocessing.pool.ThreadPool, multiprocessing.dummy.Pool):
        with make(2) as pool:
            assert type(pool) is multiprocessing.pool.ThreadPool
            assert pool.map(lambda x: x + 1, range(5)) == [1, 2, 3, 4, 5]
            assert isinstance(pool, multiprocessing.pool.Pool)
            pool.close()
            pool.join()
    assert multiprocessing.pool.ThreadPool.__mro__[1] is ImportedPool
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        assert executor.submit(abs, -1).result() == 1
        assert not isinstance(executor, concurrent.futures.ProcessPoolExecutor)


# ---------------------------------------------------------------- classes


def test_an_instance_of_either_class_is_one_of_both(installed: None) -> None:
    with multiprocessing.Pool(1) as ours, imported_method(1) as standard, ShmPool(1) as direct:
        for pool in (ours, standard, direct):
            assert isinstance(pool, multiprocessing.pool.Pool)
            assert isinstance(pool, ImportedPool)
            assert not isinstance(pool, concurrent.futures.ProcessPoolExecutor)
            pool.close()
            pool.join()
    with (
        concurrent.futures.ProcessPoolExecutor(1) as ours_too,
        ImportedExecutor(1) as standard_too,
        shmpool.ShmExecutor(1) as direct_too,
    ):
        for executor in (ours_too, standard_too, direct_too):
            assert isinstance(executor, concurrent.futures.ProcessPoolExecutor)
        assert isinstance(ours_too, ImportedExecutor)
    assert not isinstance(1, multiprocessing.pool.Pool)


def test_a_subclass_is_a_subclass_of_shmpools(installed: None) -> None:
    class Doubling(multiprocessing.pool.Pool):
        def __init__(self, processes: int) -> None:
            super().__init__(processes)
            self.factor = 2

        def map(self, *args: Any, **kwargs: Any) -> list[Any]:
            return [self.factor * value for value in super().map(*args, **kwargs)]

    class Logging(concurrent.futures.ProcessPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            submitted.append(args)
            return super().submit(*args, **kwargs)

    submitted: list[Any] = []
    with Doubling(1) as pool:
        assert isinstance(pool, ShmPool)
        assert isinstance(pool, multiprocessing.pool.Pool)
        assert pool.map(abs, [-1, -2]) == [2, 4]
        pool.close()
        pool.join()
    with Logging(max_workers=1) as executor:
        assert isinstance(executor, shmpool.ShmExecutor)
        assert executor.submit(abs, -1).result() == 1
    assert submitted == [(abs, -1)]
    with multiprocessing.Pool(1) as plain:
        assert not isinstance(plain, Doubling)
        plain.close()
        plain.join()


class OwnQueues:
    def _setup_queues(self) -> None:
        super()._setup_queues()  # type: ignore[misc]
        self.set_up = True


@pytest.mark.parametrize("mixed_in", [False, True])
def test_a_subclass_with_internals_of_its_own_keeps_the_standard_librarys(
    installed: None, mixed_in: bool
) -> None:
    base = multiprocessing.pool.Pool
    if mixed_in:

        class Own(OwnQueues, base, abc.ABC):  # type: ignore[valid-type,misc]
            pass

    else:

        class Own(base):  # type: ignore[valid-type,misc,no-redef]
            _setup_queues = OwnQueues._setup_queues
            set_up = True

            def __init__(self, processes: int) -> None:
                super().__init__(processes=processes)

            def _setup_queues(self) -> None:
                super()._setup_queues()

    assert not issubclass(Own, ShmPool)
    assert issubclass(Own, ImportedPool) and issubclass(Own, base)
    with Own(1) as pool:
        assert pool.set_up
        assert isinstance(pool, multiprocessing.pool.Pool)
        assert pool.map(double, [1, 2]) == [2, 4]
        pool.close()
        pool.join()


def test_a_subclass_that_overrides_process_keeps_the_standard_librarys(installed: None) -> None:
    started: list[object] = []

    class Own(multiprocessing.pool.Pool):
        @staticmethod
        def Process(context: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N802
            started.append(context)
            return context.Process(*args, **kwargs)

    with Own(2) as pool:
        assert pool.apply(double, (2,)) == 4
        pool.close()
        pool.join()
    assert len(started) == 2


def test_classes_can_be_pickled_installed_or_not() -> None:
    with shmpool.install():
        for ours in (multiprocessing.pool.Pool, concurrent.futures.ProcessPoolExecutor):
            assert pickle.loads(pickle.dumps(ours)) is ours
        # As with what managers offer.
        ours, theirs = multiprocessing.Pipe()
        with ours, theirs:
            theirs.send(ImportedPool)
            assert ours.recv() is ImportedPool
        stand_in = multiprocessing.pool.Pool
        pickled = pickle.dumps(stand_in)
    assert pickle.loads(pickled) is stand_in


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_managers_start_and_offer_pools_of_their_own(installed: None, method: str) -> None:
    with multiprocessing.get_context(method).Manager() as manager:
        pool = manager.Pool(1)
        assert pool.map(double, [1]) == [2]
        pool.close()
        pool.join()


# ---------------------------------------------------------------- other processes


@pytest.mark.parametrize("answer", [answer_of_child, answer_of_grandchild])
def test_children_are_installed(start_method: str, answer: Callable[..., object]) -> None:
    if start_method == "loky":
        pytest.importorskip("loky")
    with shmpool.install():
        assert answer(start_method, everything_is_replaced)
    assert answer(start_method, nothing_is_replaced)


def test_a_worker_opens_a_pool(installed: None, start_method: str) -> None:
    if start_method == "loky":
        context = pytest.importorskip("loky.backend.context").get_context("loky")
    else:
        context = multiprocessing.get_context(start_method)
    with concurrent.futures.ProcessPoolExecutor(1, context) as executor:
        home, total = executor.submit(sum_by_pool, [1, 2, 3]).result()
    assert home.startswith("shmpool.") and total == 12


def test_uninstalled_in_a_child_it_is_not_in_grandchildren(installed: None) -> None:
    for method in ("fork", "spawn"):
        assert answer_of_child("fork", lambda: _uninstall_and_ask(method))  # noqa: B023  # called now


def _uninstall_and_ask(method: str) -> object:
    shmpool.uninstall()
    return nothing_is_replaced() and answer_of_child(method, nothing_is_replaced)


def run_script(folder: Path, source: str, **env: str) -> str:
    (folder / "script.py").write_text(textwrap.dedent(source))
    root = str(Path(shmpool.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-W", "error", "script.py"],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"ROOT": root} | env,
        capture_output=True,
        check=False,
        text=True,
        timeout=120 * TIMEUNIT,
    )
    assert not done.stderr and done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_names_that_a_script_imports_first_of_all_are_replaced_in_its_children(
    tmp_path: Path, method: str
) -> None:
    # shmpool is on sys.path by the script's own doing, and the folder is another one by the time of the start.
    out = run_script(
        tmp_path,
        f"""\
        import os, sys
        sys.path.insert(0, os.environ["ROOT"])
        if __name__ == "__main__":
            import shmpool
            shmpool.install()
        from multiprocessing import Pool, get_context
        from concurrent.futures import ProcessPoolExecutor

        def ask():
            print(Pool.__func__.__module__, ProcessPoolExecutor.__module__, sys.path[0] == os.environ["ROOT"])

        if __name__ == "__main__":
            os.chdir("/")
            process = get_context({method!r}).Process(target=ask)
            process.start()
            process.join()
        """,
    )
    assert out.split() == ["shmpool.integrations.install", "shmpool.integrations.standins", "True"]


def test_installing_and_importing_names_imports_no_numpy_and_fixes_no_start_method(
    tmp_path: Path,
) -> None:
    out = run_script(
        tmp_path,
        """\
        import os, sys
        sys.path.insert(0, os.environ["ROOT"])
        import shmpool
        shmpool.install()
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing.pool import Pool
        class Own(Pool):
            def _setup_queues(self):
                pass
        assert not isinstance(1, Pool) and not issubclass(Pool, ProcessPoolExecutor)
        assert not {"numpy", "loky", "cloudpickle"} & sys.modules.keys()
        import multiprocessing
        def method(_):
            return multiprocessing.get_start_method()
        if __name__ == "__main__":
            multiprocessing.set_start_method("spawn")
            with multiprocessing.Pool(1) as pool:
                print(type(pool).__module__, pool.map(method, [0]))
        """,
    )
    assert out.strip() == "shmpool.integrations.standins ['spawn']"


def test_modules_may_have_a_class_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(types.ModuleType):
        pass

    monkeypatch.setattr(multiprocessing.pool, "__class__", Counting)
    with shmpool.install():
        assert isinstance(multiprocessing.pool, Counting)
        assert everything_is_replaced()
    assert type(multiprocessing.pool) is Counting
