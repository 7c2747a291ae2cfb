"""Ctrl-C, pressed at a real (pseudo-)terminal: it reaches the program and all of its processes at once.

One traceback, of one ``KeyboardInterrupt``, of the program; no worker says anything; the program ends soon, by SIGINT,
and nothing of it stays.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from executor_tasks import SOON, environment
from soak import interrupts
from soak.terminal import CTRL_C, Terminal, noise, tracebacks
from support import START_METHODS, TIMEUNIT, wait_until

pytestmark = pytest.mark.slow

PROGRAM = """
import os, pathlib, sys, time
from concurrent import futures
import shmpool

def long(seconds=1000, *_):
    pathlib.Path({begun!r}, str(os.getpid())).touch()
    time.sleep(seconds)

def main():
    method = {method!r}
{code}

if __name__ == "__main__":
    main()
"""
EXECUTOR = "shmpool.ShmExecutor(2, method)"
#: What a program does when Ctrl-C comes, with two tasks that run, and more that wait.
WAYS = {
    "map": f"list({EXECUTOR}.map(long, [1000] * 10))",
    "map in a block": f"with {EXECUTOR} as ex: list(ex.map(long, [1000] * 10))",
    "map in chunks": f"with {EXECUTOR} as ex: list(ex.map(long, [1000] * 10, chunksize=2))",
    "map_unordered": f"with {EXECUTOR} as ex: list(ex.map_unordered(long, [1000] * 10))",
    "result": f"ex = {EXECUTOR}; fs = [ex.submit(long) for _ in range(2)]; fs[0].result()",
    "result, more wait": f"ex = {EXECUTOR}; fs = [ex.submit(long) for _ in range(10)]; fs[0].result()",
    "result in a block": f"with {EXECUTOR} as ex: [ex.submit(long) for _ in range(2)][0].result()",
    "result in a block, more wait": f"with {EXECUTOR} as ex: [ex.submit(long) for _ in range(10)][0].result()",
    "shutdown": f"ex = {EXECUTOR}; fs = [ex.submit(long) for _ in range(2)]; ex.shutdown(wait=True)",
    "end of a block": f"with {EXECUTOR} as ex: fs = [ex.submit(long) for _ in range(2)]",
    "sleep in a block": f"""with {EXECUTOR} as ex:
        fs = [ex.submit(long) for _ in range(2)]
        time.sleep(1000)""",
    "loop in a block": f"""with {EXECUTOR} as ex:
        fs = [ex.submit(long) for _ in range(2)]
        while True: sum(range(100))""",
    "loop in a block, more wait": f"""with {EXECUTOR} as ex:
        fs = [ex.submit(long) for _ in range(10)]
        while True: sum(range(100))""",
    "wait": f"with {EXECUTOR} as ex: futures.wait([ex.submit(long) for _ in range(2)])",
    "as_completed": f"with {EXECUTOR} as ex: list(futures.as_completed([ex.submit(long) for _ in range(10)]))",
    "Pool.map": "shmpool.Pool(2, context=method).map(long, [1000] * 10, 1)",
    "Pool.map in a block": "with shmpool.Pool(2, context=method) as pool: pool.map(long, [1000] * 10, 1)",
    "Pool.imap": "with shmpool.Pool(2, context=method) as pool: list(pool.imap(long, iter([1000] * 10)))",
    "Pool.join": """pool = shmpool.Pool(2, context=method)
    pool.map_async(long, [1000] * 2, 1)
    pool.close()
    pool.join()""",
    "sleep in a pool's block": """with shmpool.Pool(2, context=method) as pool:
        r = pool.map_async(long, [1000] * 10, 1)
        time.sleep(1000)""",
    "asyncio": f"""import asyncio

    async def together(ex):
        loop = asyncio.get_running_loop()
        await asyncio.gather(*[loop.run_in_executor(ex, long) for _ in range(6)])

    with {EXECUTOR} as ex:
        asyncio.run(together(ex))""",
    "joblib": """import joblib
    shmpool.register_joblib_backend()
    with joblib.parallel_config("shmpool", context=method):
        joblib.Parallel(2)(joblib.delayed(long)(1000) for _ in range(10))""",
}


class Home:
    """Where a program runs, and what it may leave there."""

    def __init__(self, folder: Path) -> None:
        self.begun = folder / "begun"
        self.temporary = Path(
            tempfile.mkdtemp(prefix="c-")
        )  # short: the path of a socket has limits
        self.begun.mkdir()
        self.script = folder / "script.py"

    def start(self, *words: str) -> Terminal:
        return Terminal(
            [sys.executable, *(words or (str(self.script),))],
            environment(
                TMPDIR=str(self.temporary),
                PYTHONUNBUFFERED="1",
                PYTHON_BASIC_REPL="1",
                TERM="dumb",
            ),
        )

    def write(self, method: str, code: str, text: str = PROGRAM) -> None:
        self.script.write_text(
            text.format(begun=str(self.begun), method=method, code="    " + code)
        )

    def wait_until_begun(self, tasks: int = 2) -> None:
        wait_until(
            lambda: len(os.listdir(self.begun)) >= tasks, SOON / TIMEUNIT, "the tasks to begin"
        )

    def check_nothing_is_left(self, terminal: Terminal, family: set[int]) -> None:
        _, left = terminal.wait_until_gone(SOON)
        assert not left
        assert not list(self.temporary.iterdir())
        assert not names_of(family)


def names_of(family: set[int]) -> list[str]:
    """Names in /dev/shm that mention one of these processes."""
    pids = set(map(str, family))
    return [name for name in os.listdir("/dev/shm") if pids & set(re.findall(r"\d+", name))]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path)
    yield home
    shutil.rmtree(home.temporary)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The report of a failure says how to get the same again."""
    number = int(os.environ.get("SHMPOOL_TEST_SEED") or secrets.randbits(32))
    request.node.add_report_section("setup", "seed", f"SHMPOOL_TEST_SEED={number}")
    return number


def pause_at_random(most: float, seed: int) -> None:
    time.sleep(most * random.Random(seed).random())


def check_ended(terminal: Terminal, home: Home, family: set[int]) -> None:
    terminal.wait(SOON)
    home.check_nothing_is_left(terminal, family)
    screen = terminal.screen
    assert terminal.process.returncode == -signal.SIGINT, screen
    # asyncio shows the end of its coroutine as the context.
    assert tracebacks(screen) - screen.count("During handling of the above") == 1, screen
    assert not noise(screen), screen
    assert screen.rstrip().splitlines()[-1] == "KeyboardInterrupt", screen


#: What else is waited for, and how, is a matter of this process alone: with one start method.
CORE = ("map in a block", "result", "shutdown", "loop in a block", "Pool.map in a block", "joblib")


@pytest.mark.parametrize(
    ("start_method", "way"),
    [
        (method, way)
        for method in START_METHODS
        for way in (WAYS if method == START_METHODS[0] else CORE)
    ],
)
def test_ctrl_c_ends_a_program_cleanly(home, way, start_method, record_property):
    home.write(start_method, WAYS[way])
    with home.start() as terminal:
        home.wait_until_begun()
        family = terminal.family()
        begin = time.monotonic()
        terminal.type(CTRL_C)
        check_ended(terminal, home, family)
        record_property("seconds", round(time.monotonic() - begin, 3))


@pytest.mark.parametrize("way", ["map", "Pool.map", "joblib"])
def test_ctrl_c_ends_a_script_that_is_run_with_shmpool_in_its_place(home, way):
    code = {
        "map": "with futures.ProcessPoolExecutor(2) as ex: list(ex.map(long, [1000] * 10))",
        "Pool.map": "with multiprocessing.Pool(2) as pool: pool.map(long, [1000] * 10, 1)",
        "joblib": "import joblib; joblib.Parallel(2)(joblib.delayed(long)(1000) for _ in range(10))",
    }[way]
    home.write("fork", code, "import multiprocessing\n" + PROGRAM)
    with home.start("-m", "shmpool", "run", str(home.script)) as terminal:
        home.wait_until_begun()
        family = terminal.family()
        terminal.type(CTRL_C)
        check_ended(terminal, home, family)


@pytest.mark.parametrize("way", CORE[:-1])
@pytest.mark.parametrize(
    ("start_method", "pause"),
    [(START_METHODS[0], pause) for pause in (0, 0.02, 0.3)]
    + [(method, 0.1) for method in START_METHODS[1:]],
)
def test_a_second_ctrl_c_does_no_harm(home, way, pause, start_method, seed):
    home.write(start_method, WAYS[way])
    with home.start() as terminal:
        home.wait_until_begun()
        family = terminal.family()
        terminal.type(CTRL_C)
        pause_at_random(pause, seed)
        terminal.type(CTRL_C)
        terminal.wait(SOON)
        left, screen = terminal.wait_until_gone(SOON)[1], terminal.screen
        assert not left, screen
        # The second may come when the interpreter ends, which tells of it and goes on, or is about to end itself.
        assert terminal.process.returncode == -signal.SIGINT, screen
        assert not noise(screen), screen
        assert "KeyboardInterrupt" in screen
        assert not names_of(family)


def test_ctrl_c_at_a_prompt_ends_a_call_and_nothing_else(home, start_method):
    (home.script.parent / "tasks_of_prompt.py").write_text(
        "import os, pathlib, time\n"
        "def long(seconds):\n"
        f"    pathlib.Path({str(home.begun)!r}, str(os.getpid())).touch()\n"
        "    time.sleep(seconds)\n"
    )
    with home.start("-q", "-i") as terminal:
        terminal.read_until(">>> ", SOON)
        prompts = 1

        def enter(line: str, *, wait: bool = True) -> str:
            nonlocal prompts
            before = len(terminal.screen)
            terminal.type(line.encode() + b"\n")
            if wait:
                prompts += 1
                terminal.read_until(">>> ", SOON, times=prompts)
            return terminal.screen[before:]

        enter(f"import sys; sys.path.insert(0, {str(home.script.parent)!r})")
        enter("import shmpool, tasks_of_prompt as t")
        enter(f"ex = shmpool.ShmExecutor(2, {start_method!r})")
        for call in (
            "list(ex.map(t.long, [1000] * 10))",
            "ex.submit(t.long, 1000).result()",
            "list(ex.map_unordered(t.long, [1000] * 10))",
        ):
            for file in home.begun.iterdir():
                file.unlink()
            before = len(terminal.screen)
            enter(call, wait=False)
            home.wait_until_begun(1 if "submit" in call else 2)
            terminal.type(CTRL_C)
            prompts += 1
            terminal.read_until(">>> ", SOON, times=prompts)
            said = terminal.screen[before:]
            assert tracebacks(said) == 1, said
            assert said.count("KeyboardInterrupt") == 1, said
            assert not noise(said), said
            assert "[-1, -2, -3]" in enter("import operator; list(ex.map(operator.neg, [1, 2, 3]))")
        family = terminal.family()
        enter("exit()", wait=False)
        assert terminal.wait(SOON) < SOON
        assert terminal.process.returncode == 0
        home.check_nothing_is_left(terminal, family)


def test_ctrl_c_at_random_moments_leaves_nothing_and_hangs_nowhere(seed):
    report = interrupts.run(seed=seed, seconds=60, programs=8)
    assert not report.violations, str(report)
