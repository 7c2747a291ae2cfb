"""The watch that conftest.py keeps on every test: a test that leaks or hangs fails, and one that does not passes.

A test session of its own runs the small tests below, with this folder's conftest.py and a short time unit.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import CHECKS, TIMEUNIT, held_by_others, wait_until

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent

WATCHED = """
import atexit, gc, multiprocessing, os, subprocess, sys, tempfile, threading, types
import pytest

keep = []

def hold_a_descriptor():
    keep.append(os.open("/dev/zero", os.O_RDONLY))

class Descriptor:
    def __init__(self):
        self.fd = os.open("/dev/zero", os.O_RDONLY)
    def __del__(self):
        os.close(self.fd)

# What fails.

def test_leaks_a_descriptor():
    hold_a_descriptor()

def test_leaks_a_second_descriptor_of_the_same_file():
    hold_a_descriptor()

def test_leaks_a_process():
    keep.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE))  # ends with this process, as its input does

def test_leaks_a_grandchild():
    keep.append(subprocess.Popen(["sh", "-c", "head -n 1 | cat; true"], stdin=subprocess.PIPE))

def test_leaks_a_zombie():
    if not os.fork():
        os._exit(0)

def test_leaks_a_thread():
    threading.Thread(target=threading.Event().wait, daemon=True, name="still here").start()

def test_leaks_a_name_in_dev_shm():
    path = f"/dev/shm/shmpool-test-{os.getpid()}"
    atexit.register(os.unlink, path)
    with open(path, "w"):
        pass

def test_leaks_a_temporary_file():
    fd, path = tempfile.mkstemp()
    os.close(fd)

def test_leaks_a_temporary_file_of_a_child():
    subprocess.run([sys.executable, "-c", "import tempfile; tempfile.mkdtemp()"], check=True)

def test_leaks_store_blocks():
    sys.modules["shmpool.store"] = types.SimpleNamespace(live_blocks=lambda: 3)

@pytest.mark.leaks("descriptors only", "descriptors")
def test_leaks_what_the_marker_does_not_name():
    hold_a_descriptor()
    tempfile.mkdtemp()

@pytest.mark.leaks("descriptors")
def test_has_a_marker_without_a_reason():
    pass

@pytest.mark.leaks("for no check there is", "descriptor")
def test_has_a_marker_with_a_wrong_check():
    pass

def test_fails_and_leaks():
    hold_a_descriptor()
    assert False, "the only failure"

def test_fails_with_random_numbers(rng):
    assert rng is None

# What passes.

def test_lets_go_through_the_garbage_collector():
    gc.disable()
    cycle = [Descriptor()]
    cycle.append(cycle)

@pytest.fixture
def descriptor():
    return Descriptor()

def test_gets_a_fixture(descriptor):
    assert descriptor.fd

@pytest.fixture(scope="module")
def wide_descriptor():
    return Descriptor()

def test_makes_a_fixture_of_the_module(wide_descriptor):
    gc.enable()

def test_lets_go_a_moment_later():
    threading.Timer(0.1, lambda: None).start()

def test_starts_the_daemons_of_multiprocessing():
    process = multiprocessing.get_context("forkserver").Process()
    process.start()
    process.join()
    process.close()

def test_writes_to_pytests_folder(tmp_path):
    (tmp_path / "file").write_text("text")

@pytest.mark.leaks("descriptors only", "descriptors")
def test_leaks_what_the_marker_names():
    hold_a_descriptor()

@pytest.mark.leaks("for a reason")
def test_leaks_with_a_marker_for_all():
    hold_a_descriptor()
    tempfile.mkdtemp()

def test_gets_each_start_method(start_method):
    multiprocessing.get_context(start_method) if start_method != "loky" else None

def test_gets_a_temporary_folder_of_its_own(temporary_folder):
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(temporary_folder)
"""

FAILING = {
    "test_leaks_a_descriptor": r"open file descriptors: /dev/zero",
    "test_leaks_a_second_descriptor_of_the_same_file": r"open file descriptors: /dev/zero",
    "test_leaks_a_process": r"child processes: process \d+ started at tick \d+: cat",
    "test_leaks_a_grandchild": r"child processes: process \d+ started at tick \d+: head -n 1",
    "test_leaks_a_zombie": r"child processes: process \d+ .*: a zombie",
    "test_leaks_a_thread": r"running threads: thread \d+ \(\d+\): 'still here', <Thread",
    "test_leaks_a_name_in_dev_shm": r"names in /dev/shm: /dev/shm/shmpool-test-\d+",
    "test_leaks_a_temporary_file": r"files in the temporary folder: /",
    "test_leaks_a_temporary_file_of_a_child": r"files in the temporary folder: /",
    "test_leaks_store_blocks": r"blocks of the object store: 3 x blocks that are still held",
    "test_leaks_what_the_marker_does_not_name": r"left behind:\n  files in the temporary folder: .*$",
    "test_has_a_marker_without_a_reason": r"must be leaks\(reason, \*checks\)",
    "test_has_a_marker_with_a_wrong_check": r"must be leaks\(reason, \*checks\)",
    "test_fails_and_leaks": r"the only failure",
    "test_fails_with_random_numbers": r"assert Generator",
}
PASSING = [
    name for name in re.findall(r"^def (test_\w+)", WATCHED, re.MULTILINE) if name not in FAILING
]


def run_pytest(folder: Path, text: str, *, unit: float) -> SimpleNamespace:
    """Run tests in a session of their own; ``output``, ``code`` and what was wrong with each, by name."""
    for name in ("conftest.py", "support.py"):
        shutil.copy(HERE / name, folder)
    (folder / "test_watched.py").write_text(text)
    (folder / "pytest.ini").write_text(
        "[pytest]\naddopts = --strict-markers\nfilterwarnings = error\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    package = importlib.util.find_spec("shmpool")
    if package and package.submodule_search_locations:  # it may be found in the current folder only
        env["PYTHONPATH"] = str(Path(next(iter(package.submodule_search_locations))).parent)
    env |= {"SHMPOOL_TEST_TIMEUNIT": str(unit * TIMEUNIT), "SHMPOOL_TEST_SEED": "20240229"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--basetemp", str(folder / "base"), "--junitxml", str(folder / "junit.xml")]
    done = subprocess.run(
        command,
        check=False,
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=150 * TIMEUNIT,
    )
    wrong: dict[str, list[str]] = {}
    if (folder / "junit.xml").exists():
        for case in ET.parse(folder / "junit.xml").iter("testcase"):
            texts = wrong.setdefault(case.get("name", ""), [])
            texts += [part.text or "" for part in case if part.tag in ("failure", "error")]
    return SimpleNamespace(output=done.stdout + done.stderr, code=done.returncode, wrong=wrong)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return run_pytest(tmp_path_factory.mktemp("watched"), WATCHED, unit=0.05)


@pytest.mark.parametrize("name", FAILING)
def test_a_leak_fails_the_test_and_is_named(session: SimpleNamespace, name: str) -> None:
    assert len(session.wrong[name]) == 1, session.output
    assert re.search(FAILING[name], session.wrong[name][0])


@pytest.mark.parametrize("name", PASSING)
def test_what_is_gone_in_time_or_kept_on_purpose_passes(
    session: SimpleNamespace, name: str
) -> None:
    runs = {case: wrong for case, wrong in session.wrong.items() if case.split("[")[0] == name}
    assert runs and not any(runs.values()), runs or session.output


def test_an_array_that_is_kept_is_a_leak_and_the_default_store_is_none(tmp_path: Path) -> None:
    text = """
import os, numpy as np, shmpool

kept = []

def test_uses_the_default_store():
    assert shmpool.put(np.ones(1 << 18)).get().sum() == 1 << 18

def test_keeps_an_array():
    kept.append(shmpool.put(np.ones(1 << 18)).get())

def test_makes_a_pool():
    with shmpool.ShmExecutor(1) as executor:
        assert executor.submit(np.add, 1, 2).result() == 3

def test_gets_each_kind_of_memory(memory_backend):
    kept.clear()
    array = shmpool.put(np.ones(1 << 18)).get()
    kinds = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert any("memfd:shmpool" in kind for kind in kinds) == (memory_backend == "memfd")
"""
    session = run_pytest(tmp_path, text, unit=0.2)
    (wrong,) = session.wrong.pop("test_keeps_an_array")
    assert "blocks of the object store: " in wrong
    assert len(session.wrong) == 4, session.output
    assert not any(session.wrong.values()), session.output


def test_a_name_in_dev_shm_that_another_program_holds_is_not_ours() -> None:
    script = """
import multiprocessing, os, sys
if os.fork():
    os._exit(0)  # the child is nobody's child from now on
lock = multiprocessing.get_context("spawn").Lock()
print(lock._semlock.name, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout and parent.stdin
        path = "/dev/shm/sem." + parent.stdout.readline().strip().removeprefix("/")
        parent.wait()
        assert os.path.exists(path)
        assert held_by_others(path)
        parent.stdin.close()
        wait_until(lambda: not os.path.exists(path), 60, "the other program to end")


def test_every_check_is_seen_to_fail() -> None:
    seen = {
        check for check, what in CHECKS.items() if any(what in text for text in FAILING.values())
    }
    assert seen == CHECKS.keys()


def test_the_seed_is_printed_where_a_test_fails(session: SimpleNamespace) -> None:
    assert session.output.count("SHMPOOL_TEST_SEED=20240229") == 1


def test_the_seed_decides_the_numbers(
    rng: np.random.Generator, request: pytest.FixtureRequest
) -> None:
    section = next(
        text for _, what, text in request.node._report_sections if what == "random numbers"
    )
    seed = int(section.removeprefix("SHMPOOL_TEST_SEED="))
    assert rng.bytes(8) == np.random.default_rng(seed).bytes(8)


@pytest.mark.leaks("a test process that ends hard leaves its temporary folder", "temp")
def test_a_test_that_hangs_ends_with_the_tracebacks_of_all_threads(tmp_path: Path) -> None:
    text = """
import threading, pytest

@pytest.mark.timeout(30)
def test_hangs():
    thread = threading.Thread(target=threading.Event().wait, name="the other")
    thread.start()
    thread.join()
"""
    session = run_pytest(tmp_path, text, unit=0.1)
    assert session.code == 1, session.output
    assert "Timeout (0:00:0" in session.output
    assert session.output.count("Thread 0x") >= 2
    assert "in test_hangs" in session.output


def test_wait_until_returns_what_it_waited_for() -> None:
    answers = iter([0, "", None, "there"])
    assert wait_until(lambda: next(answers), 5, "an answer") == "there"


def test_wait_until_says_what_did_not_come() -> None:
    with pytest.raises(AssertionError, match=r"^waited 0\.\d+ s in vain for a miracle$"):
        wait_until(lambda: False, 0.02 / TIMEUNIT, "a miracle")


def test_wait_until_can_say_how_far_it_came() -> None:
    with pytest.raises(AssertionError, match="in vain for 3 of 4"):
        wait_until(lambda: False, 0, lambda: "3 of 4")
