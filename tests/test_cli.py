"""``python -m shmpool run``: programs cannot tell that they were not started by python itself.

Most tests run a program twice, and want the same output, errors and exit code, to the byte.
"""

from __future__ import annotations

import os
import py_compile
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from support import TIMEUNIT, is_gone, started, wait_until

import shmpool

ROOT = str(Path(shmpool.__file__).parent.parent)


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def run(folder: Path, *command: str, text: str = "", **env: str) -> Ended:
    """Run python in a folder; shmpool can be imported there."""
    done = subprocess.run(
        [sys.executable, *command],
        check=False,
        cwd=folder,
        input=text,
        capture_output=True,
        text=True,
        timeout=120 * TIMEUNIT,
        env=os.environ | {"PYTHONPATH": ROOT} | env,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def run_both(folder: Path, *program: str, options: tuple[str, ...] = (), text: str = "") -> Ended:
    """Run a program by python and by shmpool; both must end alike.

    Addresses of objects do not count, nor does how deep a recursion got: there are some more frames.
    """
    plain, ours = (
        Ended(code, *(re.sub(r"0x[0-9a-f]+|\d+ more times", "...", said) for said in (out, err)))
        for code, out, err in (
            run(folder, *options, *program, text=text),
            run(folder, *options, "-m", "shmpool", "run", *program, text=text),
        )
    )
    assert ours == plain
    return ours


def write(path: Path, source: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source))
    return path


# What a program can see of how it was started.
LOOKS_AROUND = """\
import sys
names = list(globals())
print(names, {name: globals()[name] for name in names if name != "__builtins__"})
print(__builtins__, sys.modules["__main__"], vars(sys.modules["__main__"]) is globals())
print(sys.argv, sys.path, (lambda: 0).__code__.co_filename, sys.flags)
"""


@pytest.mark.parametrize(
    "program",
    [
        ["there/look.py"],
        ["./there/../there//look.py", "a", "--report", "-m", "--", "-", ""],
        ["link.py", "x"],
        ["folder", "x"],
        ["./folder/", "x"],
        ["archive.zip", "x"],
        ["compiled.pyc", "x"],
        ["-m", "there.look", "x", "-m", "y"],
        ["-m", "folder"],
        ["-", "x"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("options", [[], ["-P", "-O"]], ids=["", "-P -O"])
def test_a_program_finds_everything_as_python_sets_it(
    tmp_path: Path, program: list[str], options: list[str]
) -> None:
    look = write(tmp_path / "there" / "look.py", LOOKS_AROUND)
    write(tmp_path / "folder" / "__main__.py", LOOKS_AROUND)
    (tmp_path / "link.py").symlink_to(look)
    py_compile.compile(str(look), str(tmp_path / "compiled.pyc"), dfile="look.py")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", LOOKS_AROUND)
    if program[0] == "-m" and "-P" in options:
        (tmp_path / "in").mkdir()
        options = [*options, "-X", f"pycache_prefix={tmp_path / 'cache'}"]
    ended = run_both(tmp_path, *program, options=tuple(options), text=LOOKS_AROUND)
    if "-P" in options and program[0] == "-m":
        assert ended.code == 1 and "No module named" in ended.err
    else:
        assert ended.code == 0 and "__builtins__" in ended.out


ENDS = {
    "nothing": ("pass", 0),
    "a number": ("import sys; sys.exit(3)", 3),
    "None": ("import sys; sys.exit()", 0),
    "a sentence": ("import sys; sys.exit('so it ends')", 1),
    "a large number": ("raise SystemExit(256 + 7)", 7),
    "a subclass": ("class E(SystemExit): pass\nraise E(4)", 4),
    "at once": ("import os; print('x', flush=True); os._exit(5)", 5),
    "an error": ("def f(x):\n    return 1 / x\n\nf(0)", 1),
    "chained errors": (
        """\
        def f():
            try:
                {}["key"]
            except KeyError as error:
                raise ValueError("no such thing") from error
        try:
            f()
        finally:
            raise OSError("and then this")
        """,
        1,
    ),
    "an error with a note, in a group": (
        "e = ValueError(1)\ne.add_note('noted')\nraise ExceptionGroup('many', [e, KeyError(2)])",
        1,
    ),
    "no Exception": ("class E(BaseException): pass\nraise E('x')", 1),
    "does not compile": ("x = 1\nif x\n    pass\n", 1),
    "imports what does not compile": ("import broken", 1),
    "too deep": ("def f(): f()\nf()", 1),
    "short tracebacks": (
        "import sys\nsys.tracebacklimit = 1\ndef f(): g()\ndef g(): 1 / 0\nf()",
        1,
    ),
    "in an exit handler": ("import atexit\natexit.register(lambda: 1 / 0)", 0),
    "an error looked at by an exit handler": (
        """\
        import atexit, sys, traceback
        @atexit.register
        def look():
            traceback.print_exception(sys.last_type, sys.last_value, sys.last_traceback)
            print(getattr(sys, "last_exc", "not of this Python") is sys.last_value, x)
        x = 1
        x / 0
        """,
        1,
    ),
    "a hook": (
        """\
        import sys, traceback
        def hook(kind, error, tb):
            print(kind, [f.f_code.co_name for f, _ in traceback.walk_tb(tb)], sys.exc_info())
            print(error.__traceback__ is tb, error.__context__)
        sys.excepthook = hook
        {}[0]
        """,
        1,
    ),
    "a hook that raises": (
        """\
        import sys
        def hook(*args):
            raise RuntimeError("in the hook")
        sys.excepthook = hook
        1 / 0
        """,
        1,
    ),
    "a hook that exits": (
        "import sys\nsys.excepthook = lambda *args: sys.exit(6)\n1 / 0",
        6,
    ),
    "no hook": ("import sys\ndel sys.excepthook\n1 / 0", 1),
    "a thread that goes on": (
        """\
        import atexit, threading
        def go_on():
            threading.main_thread().join()
            print(x, __name__, flush=True)
        x = "still here"
        threading.Thread(target=go_on).start()
        atexit.register(lambda: print("then handlers", x))
        class Late:
            def __del__(self):
                print("then finalizers")
        late = Late()
        raise ValueError
        """,
        1,
    ),
    "interrupted": (
        "import atexit\natexit.register(print, 'handled')\nraise KeyboardInterrupt",
        -signal.SIGINT,
    ),
    "interrupted by a subclass": (
        "class K(KeyboardInterrupt): pass\nraise K",
        1,
    ),
    "interrupted by a signal": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True: pass",
        -signal.SIGINT,
    ),
    "terminated": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nwhile True: pass",
        -signal.SIGTERM,
    ),
    "a fork that ends, too": (
        """\
        import os, sys
        if pid := os.fork():
            os.waitpid(pid, 0)
            1 / 0
        else:
            sys.exit("child")
        """,
        1,
    ),
    "source": (
        """\
        import inspect, linecache, warnings
        def f():
            warnings.warn("one")
            warnings.warn("two", stacklevel=2)
            warnings.warn("three", DeprecationWarning)
        f()
        print(inspect.getsource(f), linecache.getline(__file__, 2))
        """,
        0,
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_program_ends_as_under_python(tmp_path: Path, case: str) -> None:
    source, code = ENDS[case]
    write(tmp_path / "program.py", source)
    write(tmp_path / "broken.py", "x = (")
    assert run_both(tmp_path, "program.py").code == code


@pytest.mark.parametrize(
    "case", ["a sentence", "an error", "interrupted", "a hook", "does not compile", "source"]
)
def test_a_module_ends_as_under_python(tmp_path: Path, case: str) -> None:
    source, code = ENDS[case]
    write(tmp_path / "program.py", source)
    write(tmp_path / "package" / "__main__.py", source)
    assert run_both(tmp_path, "-m", "program").code == code
    # Whether an interrupt there ends in a signal is up to the version of python.
    assert run_both(tmp_path, "package").code in (code, 1)


@pytest.mark.parametrize(
    "program",
    [
        "missing.py",
        "program.py/x",
        "empty",
        "-m missing",
        "-m empty",
        "-m json.missing",
        "-m program.py",
        "-m .x",
    ],
)
def test_what_cannot_be_run_is_refused_as_by_python(tmp_path: Path, program: str) -> None:
    write(tmp_path / "program.py", "")
    write(tmp_path / "empty" / "__init__.py", "")
    ended = run_both(tmp_path, *program.split())
    assert ended.code and not ended.out


def test_python_found_on_the_path_calls_itself_by_that_name(tmp_path: Path) -> None:
    folder, name = os.path.split(sys.executable)
    path = folder + os.pathsep + os.environ.get("PATH", "")
    said = [
        subprocess.run(
            [name, *command, "missing.py"],
            check=False,
            cwd=tmp_path,
            capture_output=True,
            env=os.environ | {"PYTHONPATH": ROOT, "PATH": path},
            executable=shutil.which(name, path=path),
            timeout=60 * TIMEUNIT,
        ).stderr
        for command in ([], ["-m", "shmpool", "run"])
    ]
    assert said[0] == said[1] and said[0].startswith(name.encode() + b":")


# ---------------------------------------------------------------- pools

POOLS = """\
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Pool
import numpy as np

class Point:
    def __init__(self, x):
        self.x = x

def step(point):
    return Point(point.x + 1), Pool.__func__.__module__, ProcessPoolExecutor.__module__

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    with multiprocessing.Pool(1) as pool:
        found, *homes = pool.apply(step, (Point(np.zeros(50_000)),))
        assert type(found) is Point and found.x.sum() == 50_000
        pool.close()
        pool.join()
    with ProcessPoolExecutor(1, multiprocessing.get_context(sys.argv[1])) as executor:
        assert type(executor.submit(step, Point(0)).result()[0]) is Point
    print([home.partition(".")[0] for home in homes])
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize(
    "program", ["script.py", "-m package.module", "-m package", "folder"], ids=str.strip
)
def test_children_find_the_main_module_and_are_installed_too(
    tmp_path: Path, program: str, method: str
) -> None:
    for name in ("script.py", "package/module.py", "steps.py", "folder/steps.py"):
        write(tmp_path / name, POOLS)
    write(tmp_path / "package" / "__init__.py", "")
    # Children do not run a __main__.py once more, here as ever; what they need comes from a module.
    main = "from steps import *\n" + POOLS[POOLS.index("if __name__") :]
    for name in ("package/__main__.py", "folder/__main__.py"):
        write(tmp_path / name, main)
    ended = run(tmp_path, "-m", "shmpool", "run", *program.split(), method)
    assert ended == (0, "['shmpool', 'shmpool']\n", "")


# In the place of a folder where shmpool is installed: all that is there, but for that.
NOT_INSTALLED = """\
import os, sys
for number, folder in enumerate(sys.path):
    if os.path.isdir(os.path.join(folder, "shmpool")):
        sys.path[number] = os.path.join(os.path.dirname(__file__), "the others", str(number))
        os.makedirs(sys.path[number], exist_ok=True)
        for name in {*os.listdir(folder)} - {"shmpool", *os.listdir(sys.path[number])}:
            os.symlink(os.path.join(folder, name), os.path.join(sys.path[number], name))
"""


# loky gives its processes sys.path before anything else, multiprocessing a while later.
BOTH_POOLS = """\
import multiprocessing
import shmpool

def home():
    return multiprocessing.Pool.__func__.__module__.partition(".")[0]

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(home)
    with shmpool.ShmExecutor(1, "loky") as executor:
        print([found, executor.submit(home).result()])
"""


def test_pools_find_shmpool_that_is_only_in_the_working_folder(tmp_path: Path) -> None:
    site = str(write(tmp_path / "site" / "sitecustomize.py", NOT_INSTALLED).parent)
    script = str(write(tmp_path / "elsewhere" / "script.py", BOTH_POOLS))
    assert "No module named 'shmpool'" in run(tmp_path, "-c", "import shmpool", PYTHONPATH=site).err
    ended = run(Path(ROOT), "-m", "shmpool", "run", script, PYTHONPATH=site)
    assert ended == (0, "['shmpool', 'shmpool']\n", "")


NO_POOL = (
    "shmpool: no pool of multiprocessing or concurrent.futures was opened in the main process\n"
)

# What a program is, and what is on standard error in the end.
REPORTED = {
    "nothing, and nothing of shmpool's was ever imported": (
        "number = 1",
        """\
        shmpool: no pool of multiprocessing or concurrent.futures was opened in the main process
        """,
    ),
    "an executor that is not made": ("from shmpool import ShmExecutor", NO_POOL),
    "a name that is not used": ("from multiprocessing.pool import Pool", NO_POOL),
    "small things": (
        "import multiprocessing\nwith multiprocessing.Pool(1) as pool: pool.map(abs, [1, 2], 1)",
        """\
        shmpool: 1 pool, 0 executors, 2 tasks
        shmpool: nothing went through shared memory, which is for buffers of 73.7 kB and more
        shmpool: [0-9.]+ (bytes|kB) went through sockets, pickled
        """,
    ),
    "large things, and an error": (
        """\
        import numpy as np
        from concurrent.futures import ProcessPoolExecutor
        with ProcessPoolExecutor(1) as executor:
            array = executor.submit(np.ones, 1_000_000).result()
            for _ in range(3):
                executor.submit(np.sum, array).result()
        1 / 0
        """,
        """\
        Traceback (?s:.*)ZeroDivisionError: division by zero
        shmpool: 0 pools, 1 executor, 4 tasks
        shmpool: 32 MB went through shared memory: 8 MB copied into it once, 24 MB that were there already
        shmpool: [0-9.]+ (bytes|kB) went through sockets, pickled
        """,
    ),
    "a worker that dies": (
        """\
        import os
        from concurrent.futures import ProcessPoolExecutor
        from concurrent.futures.process import BrokenProcessPool
        with ProcessPoolExecutor(1) as executor:
            try:
                executor.submit(os._exit, 1).result()
            except BrokenProcessPool:
                pass
            executor.submit(abs, 1).result()
        """,
        """\
        shmpool: 0 pools, 1 executor, 2 tasks \\(1 lost\\), 1 worker died
        shmpool: nothing .*
        shmpool: [0-9.]+ (bytes|kB) .*
        """,
    ),
    "forks, and other threads and exit handlers that use pools": (
        """\
        import atexit, os, sys, threading
        from concurrent.futures import ProcessPoolExecutor
        def late():
            threading.main_thread().join()
            sys.stderr.write(f"late: {future.result()}\\n")
        if not os.fork():
            sys.exit("the fork ends")
        os.wait()
        executor = ProcessPoolExecutor(1)
        future = executor.submit(abs, -1)
        atexit.register(sys.stderr.write, "handler\\n")
        threading.Thread(target=late).start()
        """,
        """\
        the fork ends
        late: 1
        handler
        shmpool: 0 pools, 1 executor, 1 task
        shmpool: nothing .*
        shmpool: [0-9.]+ (bytes|kB) .*
        """,
    ),
}


@pytest.mark.parametrize("case", REPORTED)
def test_a_report_says_at_the_very_end_what_went_through_shared_memory(
    tmp_path: Path, case: str
) -> None:
    source, said = REPORTED[case]
    write(tmp_path / "program.py", source)
    ended = run(tmp_path, "-m", "shmpool", "run", "--report", "program.py")
    assert re.fullmatch(textwrap.dedent(said), ended.err), ended.err
    assert ended.code == ("Traceback" in said) and not ended.out


def test_without_report_nothing_is_said(tmp_path: Path) -> None:
    write(tmp_path / "program.py", "import sys; print(sys.argv)")
    ended = run(tmp_path, "-m", "shmpool", "run", "program.py", "--report")
    assert ended == (0, "['program.py', '--report']\n", "")


def test_ctrl_c_ends_a_program_that_waits_for_its_pool(tmp_path: Path) -> None:
    write(
        tmp_path / "program.py",
        """\
        import sys, time
        from multiprocessing import Pool
        if __name__ == "__main__":
            with Pool(2) as pool:
                results = [pool.apply_async(time.sleep, (1000,)) for _ in range(2)]
                print("waiting", *(process.pid for process in pool._pool), flush=True)
                results[0].get()
        """,
    )
    with started(
        *(sys.executable, "-m", "shmpool", "run", "--report", "program.py"),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ROOT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        _, *pids = process.stdout.readline().split()
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60 * TIMEUNIT)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in err and "shmpool: 1 pool, 0 executors, 2 tasks" in err
    for pid in map(int, pids):
        wait_until(lambda pid=pid: is_gone(pid), 60, "the worker to end")


# ---------------------------------------------------------------- the command itself


def test_help_and_version(tmp_path: Path) -> None:
    for options in (["--help"], []):
        ended = run(tmp_path, "-m", "shmpool", *options)
        assert ended.code == 0 and ended.out.startswith("usage: python -m shmpool ")
        assert not ended.err
    ended = run(tmp_path, "-m", "shmpool", "run", "--help")
    assert ended.code == 0 and "--report" in ended.out and "-m module" in ended.out
    assert run(tmp_path, "-m", "shmpool", "--version") == (
        0,
        f"shmpool {shmpool.__version__}\n",
        "",
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["walk"], "invalid choice: 'walk'"),
        (["run"], "a script is required, or -m and a module"),
        (["run", "-m"], "a script is required, or -m and a module"),
        (["run", "--report"], "a script is required, or -m and a module"),
        (["run", "--reprot", "x.py"], "unrecognized arguments: --reprot"),
        (["--report", "run", "x.py"], "unrecognized arguments: --report"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, options: list[str], sentence: str
) -> None:
    ended = run(tmp_path, "-m", "shmpool", *options)
    assert ended.code == 2 and not ended.out
    assert ended.err.startswith("usage: ") and sentence in ended.err


def test_the_main_module_is_imported_without_effect() -> None:
    import shmpool.__main__  # noqa: F401  # it would exit
