"""Fixtures for all tests, and the watch that is kept on each of them.

Every test is watched: it fails when it leaves something behind (descriptors, processes, threads, names in /dev/shm,
temporary files, blocks of the store), and when it hangs, the tracebacks of all threads are printed and the test process
ends. `support.py` holds what is measured and how long is waited.
"""

from __future__ import annotations

import contextlib
import copyreg
import faulthandler
import gc
import importlib
import multiprocessing.util
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from support import CHECKS, START_METHODS, TIMEUNIT, Holdings, live_blocks, wait_until

#: Units of time after which a test is taken to hang. The slowest take a tenth of it.
HANGS_AFTER = 180
#: Units of time that is waited for what a test let go of to be gone.
GONE_AFTER = 20

MARKERS = (
    "leaks(reason, *checks): the test leaves something behind, for a reason; without checks, all are off",
    "timeout(units): the test may take longer, or must take less, before it is taken to hang",
)

# On a shared machine the time that one example takes says nothing, nor does the time to make one. Everything else stays
# as hypothesis chose it (where CI is set, it chooses the same examples every time).
settings.register_profile(
    "shmpool", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("shmpool")

_stderr = pytest.StashKey[int]()
_failed = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault(
        "SHMPOOL_VERIFY", "1"
    )  # stores recount their books after every change, in workers too
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    # While a test runs, descriptor 2 is pytest's capture file, and what is in that is lost in a hard exit.
    config.stash[_stderr] = os.dup(2)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _stderr in config.stash:
        os.close(config.stash[_stderr])
        del config.stash[_stderr]


@pytest.hookimpl(optionalhook=True)  # it is pytest-xdist's
def pytest_xdist_auto_num_workers() -> int:
    """One test process more than there are processors: a fifth of the time, a test waits for what it has started."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out start methods that ``SHMPOOL_TEST_START_METHODS=fork,spawn`` does not name."""
    wanted = set(filter(None, os.environ.get("SHMPOOL_TEST_START_METHODS", "").split(",")))
    if unknown := wanted - set(START_METHODS):
        raise pytest.UsageError(f"SHMPOOL_TEST_START_METHODS: no start method is called {unknown}")
    unwanted = set(START_METHODS) - wanted if wanted else set()
    kept, left_out = [], []
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        is_unwanted = any(isinstance(value, str) and value in unwanted for value in values)
        (left_out if is_unwanted else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_collection_finish() -> None:
    """Prepare this process, and so the workers that it forks, for a machine that is slow.

    The garbage collector passes over what was imported and collected: half a million objects by now, which take it a
    third of a second, and a forked process that collects would copy all of their pages. Many tests collect, CPython's
    own thirty times.
    """
    gc.collect()
    gc.freeze()
    if "shmpool" in sys.modules:
        # The quarter of a second that may be spent on saying what cannot be pickled is soon over on a busy machine.
        inspection = importlib.import_module("shmpool.serialize.inspect")
        inspection.CULPRIT_SECONDS = 10.0 * TIMEUNIT


def pytest_report_header() -> str:
    spec = importlib.util.find_spec("shmpool")
    return f"shmpool: {spec.origin if spec else 'not installed'}; time unit {TIMEUNIT:g} s"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End the test process with all tracebacks when one test hangs."""
    marker = item.get_closest_marker("timeout")
    units = marker.args[0] if marker else HANGS_AFTER
    faulthandler.dump_traceback_later(units * TIMEUNIT, exit=True, file=item.config.stash[_stderr])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when != "teardown" and not report.passed:
        item.stash[_failed] = True
    return report


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A temporary folder of this test process's own: what appears in it is the doing of its tests.

    One for all tests, since a fork server that one test starts serves the later ones, with the environment that it
    was started in. Its name is short, since the path of a socket may have 107 characters.
    """
    tmp_path_factory.getbasetemp()  # pytest's own folders do not belong in there
    folder = Path(tempfile.mkdtemp(prefix="st-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        # Development mode is for this process and its workers. Of programs that tests start it is looked at what they
        # print, which is more then.
        patch.delenv("PYTHONDEVMODE", raising=False)
        patch.setattr(tempfile, "tempdir", str(folder))
        # multiprocessing makes a folder once and keeps it until the process ends: not the doing of the test that
        # happens to need it first.
        multiprocessing.util.get_temp_dir()
        # It is removed at exit with priority -100; this comes after it.
        multiprocessing.util.Finalize(
            None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=-101
        )
        yield folder


@pytest.fixture(autouse=True)
def nothing_is_left_behind(
    request: pytest.FixtureRequest, temporary_folder: Path
) -> Iterator[None]:
    """Fail a test that leaves something behind; see ``CHECKS`` in support.py for what is looked at.

    It is the first fixture of a test, so that the test's own fixtures are gone when it looks; what fixtures of wider
    scope hold was there before.
    """
    off = _checks_switched_off(request.node)
    before = Holdings.now(temporary_folder)
    yield
    if request.node.stash.get(_failed, False):
        _forget_the_default_store()
        return  # the traceback holds the test's variables, and one failure is enough
    getattr(request.node, "funcargs", {}).clear()  # what the test's fixtures returned

    left: dict[str, list[str]] = {}

    def all_gone() -> bool:
        if live_blocks() <= before.blocks.total():  # else it is needed to count them
            _forget_the_default_store()
        left.clear()
        left.update(Holdings.now(temporary_folder).left_since(before, off=off))
        return not left

    if all_gone():
        return
    gc.collect()  # only now: with many packages imported it takes longer than most tests
    with contextlib.suppress(AssertionError):
        wait_until(all_gone, GONE_AFTER, "nothing")
    if left:
        lines = [f"  {CHECKS[check]}: {what}" for check in CHECKS for what in left.get(check, ())]
        pytest.fail("the test left behind:\n" + "\n".join(lines), pytrace=False)


def _checks_switched_off(node: pytest.Item) -> set[str]:
    off: set[str] = set()
    for marker in node.iter_markers("leaks"):
        if not marker.args or marker.args[0] in CHECKS or set(marker.args[1:]) - CHECKS.keys():
            pytest.fail(f"{marker} must be leaks(reason, *checks), checks of {', '.join(CHECKS)}")
        off |= set(marker.args[1:]) or CHECKS.keys()
    return off


def _forget_the_default_store() -> None:
    """Let the next user of the process-wide store make a new one; the old one goes with its last user.

    It keeps its arenas warm, descriptors and all, which is its purpose, and it read its settings when it was made.
    """
    if "shmpool.store.current" in sys.modules:
        sys.modules["shmpool.store.current"].set_store(None)


def _forget_how_others_pickle_exceptions() -> None:
    if "tblib" in sys.modules:
        for kind in [kind for kind in copyreg.dispatch_table if issubclass(kind, BaseException)]:
            del copyreg.dispatch_table[kind]


@pytest.fixture(scope="session", autouse=True)
def pickling_of_exceptions_begins_as_pythons_own() -> None:
    """What test modules import (dask) may have changed it: see the next one."""
    _forget_how_others_pickle_exceptions()


@pytest.fixture(autouse=True)
def pickling_of_exceptions_stays_pythons_own() -> Iterator[None]:
    """No test finds exceptions pickled otherwise because another one has imported dask.

    That has tblib pickle all exceptions of the process, which loses some: the code of a ``SystemExit``, a
    ``BaseExceptionGroup``. It does so in the standard library's pools, too.
    """
    yield
    _forget_how_others_pickle_exceptions()


@pytest.fixture(params=START_METHODS)
def start_method(request: pytest.FixtureRequest) -> str:
    """Each way to start a process, by name: ``ShmExecutor(mp_context=start_method)``."""
    return str(request.param)


@pytest.fixture(params=["memfd", "file"])
def memory_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kind of memory that stores are made of, the process-wide one too."""
    if request.param == "memfd" and not hasattr(os, "memfd_create"):
        pytest.skip("this Python has no os.memfd_create")
    importlib.import_module("shmpool.store.current")
    monkeypatch.setenv("SHMPOOL_MEMORY_BACKEND", request.param)
    _forget_the_default_store()
    return str(request.param)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers; the report of a failure says how to get the same again."""
    seed = int(os.environ.get("SHMPOOL_TEST_SEED") or secrets.randbits(32))
    request.node.add_report_section("setup", "random numbers", f"SHMPOOL_TEST_SEED={seed}")
    return np.random.default_rng(seed)
