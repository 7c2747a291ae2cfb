"""What a receiver has of ``__main__``: as it was at a fork, or as the script says."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from shmpool.serialize.mainmodule import MainModule


@pytest.fixture
def main(monkeypatch, tmp_path):
    """Run some lines as the main script; return its module."""

    def run(source: str, *, file: bool = True) -> types.ModuleType:
        module = types.ModuleType("__main__")
        path = Path(tmp_path, "script.py")
        path.write_text(source)
        if file:
            module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, "__main__", module)
        monkeypatch.delattr(sys, "ps1", raising=False)
        exec(compile(source, str(path), "exec"), vars(module))
        return module

    return run


def test_nothing_has_nothing(main):
    module = main("def f(): pass")
    assert not MainModule.nothing().has(module.f)


def test_live_has_what_main_has_now(main):
    module = main("def f(): pass\nclass C:\n    def m(self): pass")
    receiver = MainModule.live()
    assert receiver.has(module.f) and receiver.has(module.C) and receiver.has(module.C.m)
    old = module.f
    exec("def f(): pass", vars(module))
    assert receiver.has(module.f) and not receiver.has(old)


@pytest.mark.parametrize("make", [MainModule.live, MainModule.snapshot, MainModule.script])
def test_nobody_has_lambdas_local_functions_or_what_is_of_other_modules(main, make):
    module = main(
        "from os.path import join\n"
        "def outer():\n    def inner(): pass\n    return inner\n"
        "made = outer()\n"
        "short = lambda: 1\n"
        "value = 5\n"
    )
    receiver = make()
    for thing in (module.join, module.made, module.short, module.value, sys, None):
        assert not receiver.has(thing)


# ---------------------------------------------------------------- fork


def test_a_forked_receiver_has_what_there_was(main):
    module = main("def f(): pass\nclass C:\n    class D: pass\nalias = f")
    receiver = MainModule.snapshot()
    assert all(map(receiver.has, (module.f, module.C, module.C.D, module.alias)))


def test_a_forked_receiver_has_nothing_that_came_later(main):
    module = main("def f(): pass")
    receiver = MainModule.snapshot()
    old = module.f
    exec("def f(): return 2\ndef g(): pass", vars(module))
    assert not receiver.has(module.f) and not receiver.has(module.g)
    assert not receiver.has(old), "pickle does not find it under its name any more"


def test_a_snapshot_keeps_no_data_alive(main):
    class Big:
        pass

    module = main("def f(): pass")
    module.big = Big()
    import weakref

    big = weakref.ref(module.big)
    receiver = MainModule.snapshot()
    del module.big
    assert big() is None and receiver.has(module.f)


# ---------------------------------------------------------------- spawn: the script's top level


def test_a_spawned_receiver_has_what_stands_at_the_top(main):
    module = main(
        "import functools\n"
        "def f(): pass\n"
        "async def g(): pass\n"
        "class C:\n    def m(self): pass\n"
        "@functools.cache\ndef cached(): pass\n"
        "@functools.total_ordering\nclass Ordered:\n    def __lt__(self, other): return True\n"
    )
    receiver = MainModule.script()
    for thing in (module.f, module.g, module.C, module.C.m, module.Ordered):
        assert receiver.has(thing), thing


def test_a_spawned_receiver_has_nothing_of_the_guarded_part(main):
    module = main(
        "def f(): pass\n"
        "if __name__ == '__main__':\n    def g(): pass\n    class C: pass\n    h = f\n"
        "else:\n    def k(): pass\n"
    )
    exec("def k(): pass", vars(module))
    receiver = MainModule.script()
    assert receiver.has(module.f)
    assert not receiver.has(module.g) and not receiver.has(module.C)


def test_a_function_that_was_redefined_in_the_guarded_part_goes_by_value(main):
    module = main("def f(): return 1\nif __name__ == '__main__':\n    def f(): return 2\n")
    assert not MainModule.script().has(module.f)


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nif sys.maxsize:\n    def f(): pass\nelse:\n    def f(): pass\n",
        "try:\n    import nowhere\nexcept ImportError:\n    def f(): pass\n",
        "try:\n    pass\nfinally:\n    def f(): pass\n",
        "import contextlib\nwith contextlib.suppress(ValueError):\n    def f(): pass\n",
        "def deco(fn):\n    return fn\n@deco\ndef f(): pass\n",
        "def f(): pass\nf = f\n",
    ],
    ids=["if", "except", "finally", "with", "decorator", "assignment"],
)
def test_a_spawned_receiver_has_what_is_defined_on_a_condition(main, source):
    module = main(source)
    assert MainModule.script().has(module.f)


@pytest.mark.parametrize(
    "source",
    [
        "def make():\n    def f(): pass\n    f.__qualname__ = 'f'\n    return f\nexec('f = make()')\n",
        "for _ in range(1):\n    def f(): pass\n",
        "def define():\n    global f\n    def f(): pass\ndefine()\n",
    ],
    ids=["exec", "loop", "global"],
)
def test_what_cannot_be_seen_in_the_script_goes_by_value(main, source):
    module = main(source)
    assert not MainModule.script().has(module.f)


def test_a_namedtuple_is_had(main):
    module = main("from collections import namedtuple\nP = namedtuple('P', 'x y')\n")
    assert MainModule.script().has(module.P)


def test_a_function_wrapped_by_a_decorator_of_the_same_script_is_had(main):
    module = main(
        "import functools\n"
        "def deco(fn):\n"
        "    @functools.wraps(fn)\n"
        "    def wrapper():\n        return fn()\n"
        "    return wrapper\n"
        "@deco\ndef f(): pass\n"
    )
    assert MainModule.script().has(module.f)


def test_what_stands_in_the_other_branch_of_an_inverted_guard_goes_by_value(main):
    module = main("if __name__ != '__main__':\n    pass\nelse:\n    def f(): pass\n")
    assert not MainModule.script().has(module.f)


@pytest.mark.parametrize("test", ["__name__ in ('__main__',)", "__name__ == '__main__' and True"])
def test_in_doubt_what_depends_on_the_name_of_the_module_goes_by_value(main, test):
    module = main(f"def g(): pass\nif {test}:\n    def f(): pass\nelse:\n    pass\n")
    assert not MainModule.script().has(module.f)
    assert MainModule.script().has(module.g)


def test_a_class_that_was_redefined_in_the_guarded_part_goes_by_value(main):
    module = main("class C:\n    x = 1\nif __name__ == '__main__':\n    class C:\n        x = 2\n")
    assert not MainModule.script().has(module.C)


def test_without_a_file_nothing_is_had(main):
    module = main("def f(): pass", file=False)
    assert not MainModule.script().has(module.f)


def test_at_a_prompt_nothing_is_had(main, monkeypatch):
    module = main("def f(): pass")
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert not MainModule.script().has(module.f)


@pytest.mark.parametrize("content", ["def f(:", "\0"], ids=["syntax", "null"])
def test_a_script_that_cannot_be_read_is_had_nothing_of(main, content):
    module = main("def f(): pass")
    Path(module.__file__).write_text(content)
    assert not MainModule.script().has(module.f)


def test_a_script_that_is_gone_is_had_nothing_of(main):
    module = main("def f(): pass")
    Path(module.__file__).unlink()
    assert not MainModule.script().has(module.f)
