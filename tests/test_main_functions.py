"""What is defined in ``__main__``: in a script, in ``python -c``, on standard input, at a prompt, by start method.

Each test is a program of its own.  Whatever holds there holds with plain ``multiprocessing`` only for what stands at
the top of a file.
"""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from executor_tasks import METHODS, PYTHON, SOON, environment, run, run_script

DEFINITIONS = """
    import dataclasses, enum, functools, os, sys
    from collections import namedtuple
    import numpy as np
    from shmpool import ShmExecutor

    METHOD = sys.argv[1]
    FACTOR = 3

    def triple(x):
        return FACTOR * x

    def counted(function):
        @functools.wraps(function)
        def wrapper(*args):
            return function(*args), "counted"
        return wrapper

    @counted
    def decorated(x):
        return triple(x) + 1

    def adder(n):
        def add(x):
            return x + n
        return add

    def recursive(n):
        return 1 if n == 0 else n * recursive(n - 1)

    class Base:
        def __init__(self, value):
            self.value = value

        def plus(self, x):
            return type(self)(self.value + x)

        @classmethod
        def make(cls, value):
            return cls(value)

        @staticmethod
        def double(x):
            return 2 * x

        class Inner:
            here = "inside"

    class Derived(Base):
        def plus(self, x):
            result = super().plus(x)
            result.array = np.full(20_000, self.value)
            return result

    class Color(enum.Enum):
        RED = 1
        BLUE = 2

    @dataclasses.dataclass(frozen=True)
    class Point:
        x: int
        y: int = 5

    Pair = namedtuple("Pair", "left right")

    class OwnError(Exception):
        pass

    def fail(x):
        raise OwnError(x)

    def check_what_is_defined(executor):
        def run(fn, *args):
            return executor.submit(fn, *args).result(60)

        assert run(triple, 5) == 15
        assert list(executor.map(triple, range(4), chunksize=2)) == [0, 3, 6, 9]
        assert run(decorated, 5) == (16, "counted")
        assert run(adder(7), 1) == 8
        assert run(lambda x: triple(x) + 1, 5) == 16
        assert run(functools.partial(triple, 2)) == 6
        assert run(recursive, 6) == 720

        base = run(Base, 4)
        assert type(base) is Base and base.value == 4
        derived = run(Derived(5).plus, 6)
        assert type(derived) is Derived and isinstance(derived, Base)
        assert derived.value == 11 and derived.array[-1] == 5
        assert type(run(Derived.make, 3)) is Derived
        assert run(Base.double, 4) == 8
        assert run(lambda thing: isinstance(thing, Base), Derived(1)) is True
        assert run(lambda: Derived) is Derived
        assert run(lambda: Base.Inner) is Base.Inner

        assert run(lambda color: (color is Color.RED, Color.BLUE), Color.RED) == (True, Color.BLUE)
        assert run(lambda color: color, Color.RED) is Color.RED
        point = run(dataclasses.replace, Point(1), )
        assert point == Point(1, 5) and type(point) is Point
        assert run(lambda: {Point(1, 2): Pair(1, Color.RED)}) == {Point(1, 2): Pair(1, Color.RED)}
        assert type(run(Pair, 1, 2)) is Pair

        try:
            run(fail, 8)
        except OwnError as error:
            assert error.args == (8,)
        else:
            raise AssertionError("nothing was raised")
"""
#: Runs the above, wherever the definitions stand.
USE = """
    if __name__ == "__main__":
        with ShmExecutor(1, mp_context=METHOD) as executor:
            check_what_is_defined(executor)
            check_what_is_defined(executor)
        print("ok")
"""


def dedent(*parts: str) -> str:
    return "".join(textwrap.dedent(part) for part in parts)


def under_the_guard(text: str) -> str:
    return 'if __name__ == "__main__":\n' + textwrap.indent(textwrap.dedent(text), "    ")


# Scripts.


def test_what_stands_at_the_top_of_a_script(start_method: str, tmp_path: Path) -> None:
    assert run_script(tmp_path, dedent(DEFINITIONS, USE), start_method) == "ok\n"


def test_what_stands_under_the_guard_of_a_script(start_method: str, tmp_path: Path) -> None:
    text = under_the_guard(DEFINITIONS) + dedent(USE)
    assert run_script(tmp_path, text, start_method) == "ok\n"


def test_what_is_defined_after_the_workers_started(start_method: str, tmp_path: Path) -> None:
    start = """
        import sys
        from shmpool import ShmExecutor
        if __name__ == "__main__":
            early = ShmExecutor(1, mp_context=sys.argv[1])
            early.submit(abs, 1).result()
    """
    use = """
        check_what_is_defined(early)
        early.shutdown()
        print("ok")
    """
    text = dedent(start) + under_the_guard(DEFINITIONS) + textwrap.indent(dedent(use), "    ")
    assert run_script(tmp_path, text, start_method) == "ok\n"


REDEFINED = """
    import sys
    from shmpool import ShmExecutor

    def answer():
        return "first"

    class Thing:
        def answer(self):
            return "first"

    old, old_thing = answer, Thing()

    if __name__ == "__main__":
        with ShmExecutor(1, mp_context=sys.argv[1]) as executor:
            def answers(*calls):
                return [executor.submit(call).result() for call in calls]

            def all_kinds():
                kinds = {
                    "function": [answer, lambda: answer()],
                    "class": [Thing().answer, lambda: Thing().answer()],
                    "former function": [old, lambda: old()],
                    "former class": [old_thing.answer],
                }
                return answers(*kinds[sys.argv[2]])

            assert set(all_kinds()) == {"first"}

            def answer():
                return "second"

            class Thing:
                def answer(self):
                    return "second"

            expected = "first" if "former" in sys.argv[2] else "second"
            assert set(all_kinds()) == {expected}, all_kinds()
            if sys.argv[2] == "class":
                assert type(executor.submit(Thing).result()) is Thing
            if sys.argv[2] == "function":
                exec("def answer(): return 'third'")
                assert answers(answer) == ["third"]
        print("ok")
"""


@pytest.mark.parametrize("kind", ["function", "class", "former function", "former class"])
def test_what_is_defined_again_is_used_as_it_is_now(
    start_method: str, kind: str, tmp_path: Path
) -> None:
    if kind.startswith("former") and start_method in ("forkserver", "loky"):
        pytest.skip("as with spawn")
    assert run_script(tmp_path, REDEFINED, start_method, kind) == "ok\n"


INITIALIZER = """
    import sys
    import numpy as np
    from shmpool import ShmExecutor

    table = None
    calls = 0

    def set_table(value):
        global table
        table = value

    def look_up(i):
        global calls
        calls += 1
        return table[i], calls

    def method_of_a_class_may_too():
        return Reader().read()

    class Reader:
        def read(self):
            return table[-1]

    if __name__ == "__main__":
        array = np.arange(100_000)
        with ShmExecutor(1, mp_context=sys.argv[1], initializer=set_table, initargs=(array,)) as executor:
            assert [executor.submit(look_up, i).result() for i in range(5)] == [(i, i + 1) for i in range(5)]
            assert executor.submit(method_of_a_class_may_too).result() == 99_999
            assert executor.submit(Reader().read).result() == 99_999
            assert executor.stats().bytes_inline < 10_000
        assert table is None
        print("ok")
"""


# Not with loky: there functions of __main__ travel by value, and each has globals of its own (loky's own executor is
# the same).
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_initializer_may_set_a_global_for_the_tasks_to_read(method: str, tmp_path: Path) -> None:
    assert run_script(tmp_path, INITIALIZER, method) == "ok\n"


SHARED = """
    import multiprocessing, sys
    import shmpool

    class Settings:
        step = 2

    def init(c, a, q, r, barrier, settings):
        global counter, array, queue, reader, both
        counter, array, queue, reader, both = c, a, q, r, barrier
        assert settings.step == 2

    def work(i):
        with counter.get_lock():
            counter.value += i
        array[i] = i
        queue.put(i)
        both.wait(60)
        return i

    if __name__ == "__main__":
        context = multiprocessing.get_context(sys.argv[1])
        counter, array = context.Value("i", 0), context.Array("i", 6)
        queue, barrier = context.Queue(), context.Barrier(2)
        reader, writer = context.Pipe(duplex=False)
        things = counter, array, queue, reader, barrier, Settings()
        with shmpool.Pool(2, init, things, context=context) as pool:
            assert pool.map(work, range(6), 1) == list(range(6))
        pool.join()
        assert sorted(queue.get(timeout=60) for _ in range(6)) == list(range(6))
        assert (counter.value, list(array)) == (15, list(range(6)))
        queue.close()
        queue.join_thread()
        print("ok")
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_initializer_may_get_what_multiprocessing_shares(method: str, tmp_path: Path) -> None:
    """Descriptors of it are inherited by each worker: once, though the initializer is one of ``__main__``."""
    assert run_script(tmp_path, SHARED, method) == "ok\n"


PICKLED_ONCE = """
    import multiprocessing, os, sys
    from shmpool import ShmExecutor

    class Job:
        times = 0

        def __init__(self, end=None):
            self.end = end

        def __getstate__(self):
            Job.times += 1
            return self.__dict__

    def close(job):
        job.end.close()

    if __name__ == "__main__":
        with ShmExecutor(1, mp_context=sys.argv[1]) as executor:
            descriptors = 0
            for i in range(20):
                one, other = multiprocessing.Pipe()
                executor.submit(close, Job(other)).result()
                one.close()
                other.close()
                descriptors = descriptors or len(os.listdir("/proc/self/fd"))
            # Not to the one: a thread of multiprocessing's may be about to close the last.
            assert len(os.listdir("/proc/self/fd")) < descriptors + 10
        assert Job.times == 20, Job.times
        print("ok")
"""


def test_what_is_of_a_class_of_main_is_pickled_once(start_method: str, tmp_path: Path) -> None:
    assert run_script(tmp_path, PICKLED_ONCE, start_method) == "ok\n"


BIG_GLOBAL = """
    import sys
    import numpy as np
    from shmpool import ShmExecutor

    big = np.arange(1_000_000.0)
    text = "x" * 1_000_000

    def look(i):
        return big[i], len(text)

    class Reader:
        def look(self, i):
            return big[i], len(text)

    if __name__ == "__main__":
        with ShmExecutor(2, mp_context=sys.argv[1]) as executor:
            for fn in (look, Reader().look):
                assert list(executor.map(fn, range(20))) == [(i, 1_000_000) for i in range(20)]
                assert executor.submit(fn, 7).result() == (7, 1_000_000)
            stats = executor.stats()
            assert stats.bytes_copied == stats.store.bytes_copied == 0, stats
            assert stats.bytes_inline < 20_000, stats
        print("ok")
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_big_global_that_a_function_uses_is_not_shipped_where_workers_have_it(
    method: str, tmp_path: Path
) -> None:
    assert run_script(tmp_path, BIG_GLOBAL, method) == "ok\n"


def test_script_run_as_a_module_or_from_a_package(start_method: str, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "part.py").write_text("def base(x):\n    return x + 1\n")
    (package / "__main__.py").write_text(
        dedent("""
            import sys
            from shmpool import ShmExecutor
            from .part import base

            def task(x):
                return base(x) * 2

            if __name__ == "__main__":
                with ShmExecutor(1, mp_context=sys.argv[1]) as executor:
                    print(executor.submit(task, 4).result(), executor.submit(lambda: task(5)).result())
        """)
    )
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    done = run(*PYTHON, "-m", "package", start_method, PYTHONPATH=path)
    assert (done.stdout, done.stderr) == ("10 12\n", "")


# Without a file.


def test_python_c(start_method: str) -> None:
    done = run(*PYTHON, "-c", dedent(DEFINITIONS, USE), start_method)
    assert (done.stdout, done.stderr) == ("ok\n", "")


@pytest.mark.parametrize("method", ["fork", "loky"])
def test_program_on_standard_input(method: str) -> None:
    # spawn and forkserver cannot: multiprocessing has the workers look for a file called "<stdin>".
    done = run(*PYTHON, "-", method, stdin=dedent(DEFINITIONS, USE))
    assert (done.stdout, done.stderr) == ("ok\n", "")


def test_runpy_and_exec_in_a_module_of_ones_own(start_method: str, tmp_path: Path) -> None:
    path = tmp_path / "inner.py"
    path.write_text(dedent(DEFINITIONS, USE))
    outer = "import runpy, sys\nif __name__ == '__main__':\n    runpy.run_path(sys.argv[2], run_name='__main__')\n"
    assert run_script(tmp_path, outer, start_method, str(path)) == "ok\n"


class Terminal:
    """A Python at a prompt."""

    def __init__(self, *command: str) -> None:
        self._fd, other = pty.openpty()
        self._python = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, start_new_session=True,
            env=environment(TERM="dumb", PYTHON_BASIC_REPL="1", PYTHONSTARTUP=""),
        )  # fmt: skip
        os.close(other)
        self.read()

    def read(self) -> str:
        """All that comes before the next prompt."""
        text = ""
        deadline = time.monotonic() + 2 * SOON
        while not text.endswith(">>> "):
            ready, _, _ = select.select([self._fd], [], [], deadline - time.monotonic())
            assert ready, f"no prompt, but: {text}"
            text += os.read(self._fd, 65536).decode(errors="replace").replace("\r\n", "\n")
        return text

    def enter(self, *lines: str) -> str:
        """What is printed after some lines were entered."""
        for line in lines[:-1]:
            os.write(self._fd, line.encode() + b"\n")
        os.write(self._fd, lines[-1].encode() + b"\n")
        text = self.read()
        return text.removesuffix(">>> ").split("\n", 1)[1]

    def close(self) -> int:
        os.write(self._fd, b"\x04")
        try:
            return self._python.wait(SOON)
        finally:
            self._python.kill()
            self._python.wait()
            os.close(self._fd)


@pytest.fixture(params=[(), ("-i", "-c", "here = 1")], ids=["prompt", "-i"])
def terminal(request: pytest.FixtureRequest) -> Iterator[Terminal]:
    terminal = Terminal(sys.executable, "-q", *request.param)
    yield terminal
    assert terminal.close() == 0


@pytest.mark.parametrize("method", METHODS)
def test_prompt(method: str, terminal: Terminal) -> None:
    enter = terminal.enter
    enter("from shmpool import ShmExecutor")
    enter(f"executor = ShmExecutor(1, mp_context={method!r})")
    assert enter("executor.submit(abs, -3).result()").strip() == "3"
    enter("factor = 3")
    os.write(terminal._fd, b"def times(x):\n")
    os.write(terminal._fd, b"    return factor * x\n")
    enter("")
    assert enter("executor.submit(times, 5).result()").strip() == "15"
    enter("class Thing: value = 1\n")
    assert enter("type(executor.submit(Thing).result()) is Thing").strip() == "True"
    assert enter("list(executor.map(lambda x: times(x) + 1, [1, 2]))").strip() == "[4, 7]"
    text = enter("executor.submit(times).result()")
    assert "TypeError: times() missing 1 required positional argument" in text
    # The executor is left to the end of the program.
