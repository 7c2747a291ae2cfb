"""Finds the interpreter's own tests of ``multiprocessing.Pool``, and points them at another pool.

As in ``harness.py``, CPython's code is used where it lies, and its classes are run as they are: their tests send bound
methods to workers, which must be able to import the class. There is one class for each start method, in
``test.test_multiprocessing_fork`` and its siblings: packages of modules (3.12 and later), or one file each (3.11).

:func:`redirected` changes, for as long as the tests of one class run:

* ``multiprocessing.Pool``, under which the tests ask for pools; ``multiprocessing.pool.Pool`` only for the test case
  that does so by that name, since managers pickle it by reference;
* ``Pool`` of CPython's mixin, which is the former as it was when the mixin was made;
* the default start method, which CPython sets for a whole module;
* ``assert_python_ok``, so that scripts which tests run in a fresh interpreter get the pool too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import multiprocessing.pool
import os
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from .harness import START_METHODS, TestsAbsent

#: Test cases that are about pools, and of which of their tests: all of them, or these.
TESTS: dict[str, tuple[str, ...] | None] = {
    "WithProcessesTestPool": None,
    "WithProcessesTestPoolWorkerErrors": None,
    "WithProcessesTestPoolWorkerLifetime": None,
    "TestInitializers": ("test_pool_initializer",),
    "TestStdinBadfiledescriptor": ("test_pool_in_process",),
    "TestPoolNotLeakOnFailure": None,
    "MiscTestCase": ("test_large_pool",),
}

#: Tests whose pools are made in other processes than the test's.
IN_OTHER_PROCESSES = {
    "test_worker_finalization_via_atexit_handler_of_multiprocessing",
    "test_pool_in_process",
    "test_large_pool",
}


def load_pool() -> type[multiprocessing.pool.Pool]:
    """The pool under test: ``SHMPOOL_CONFORMANCE_POOL`` as a dotted name, by default shmpool's.

    ``multiprocessing.pool.Pool`` is useful too: the standard library must pass its own tests here, or the harness is
    wrong.
    """
    dotted = os.environ.get("SHMPOOL_CONFORMANCE_POOL", "shmpool.pool.Pool")
    module, _, name = dotted.rpartition(".")
    pool: type[multiprocessing.pool.Pool] = getattr(importlib.import_module(module), name)
    return pool


def find_test_cases() -> dict[str, tuple[str, type[unittest.TestCase]]]:
    """Start method and test case, by a name that has both.

    Raises
    ------
    TestsAbsent
        The interpreter has none, or not what they need.
    """
    found = {}
    for method in START_METHODS:
        for module in _modules(method):
            for name, tests in TESTS.items():
                test_case = vars(module).get(name)
                if test_case is not None:
                    found[f"{name}_{method}"] = method, _only(test_case, tests)
    return found


def _modules(method: str) -> list[types.ModuleType]:
    package = f"test.test_multiprocessing_{method}"
    try:
        module = importlib.import_module(package)
        if not hasattr(module, "__path__"):
            return [module]
        return [
            importlib.import_module(f"{package}.{name}") for name in ("test_processes", "test_misc")
        ]
    except (ImportError, unittest.SkipTest) as error:
        raise TestsAbsent(f"{sys.executable} has no usable {package}: {error}") from error


def _only(
    test_case: type[unittest.TestCase], tests: tuple[str, ...] | None
) -> type[unittest.TestCase]:
    """The test case, with no other tests; one with all its tests is left as it is, for workers to find."""
    if tests is None:
        return test_case
    names = unittest.TestLoader().getTestCaseNames(test_case)
    return type(test_case.__name__, (test_case,), dict.fromkeys(set(names) - set(tests)))


@contextmanager
def redirected(
    pool: type[multiprocessing.pool.Pool], test_case: type, method: str
) -> Iterator[Callable[[], int]]:
    """While inside, CPython's tests use `pool`; yields what tells how many of them were asked for."""
    asked = 0  # a number: a list of them would keep alive what a test expects to be collected
    original_init = pool.__init__

    @functools.wraps(original_init)
    def counting_init(*args: Any, **kwargs: Any) -> None:
        nonlocal asked
        asked += 1
        original_init(*args, **kwargs)

    tests = importlib.import_module("test._test_multiprocessing")
    before = multiprocessing.get_start_method(allow_none=True)
    with ExitStack() as stack:
        stack.callback(multiprocessing.set_start_method, before, force=True)
        multiprocessing.set_start_method(method, force=True)
        patch = functools.partial(_patch, stack)
        patch(pool, "__init__", counting_init)
        patch(multiprocessing, "Pool", pool)
        if test_case.__name__ == "TestPoolNotLeakOnFailure":
            patch(multiprocessing.pool, "Pool", pool)
        patch(tests.ProcessesMixin, "Pool", staticmethod(pool))
        for script_helper in (tests.script_helper, tests.test.support.script_helper):
            wrapped = _with_pool(script_helper.assert_python_ok, pool)
            patch(script_helper, "assert_python_ok", wrapped)
        yield lambda: asked


def _patch(stack: ExitStack, target: object, name: str, value: object) -> None:
    if vars(target).get(name) is not value:
        stack.enter_context(mock.patch.object(target, name, value))


def _with_pool(
    assert_python_ok: Callable[..., Any], pool: type[multiprocessing.pool.Pool]
) -> Callable[..., Any]:
    """`assert_python_ok`, with scripts whose `multiprocessing.Pool` is another one."""
    module, _, _ = pool.__module__.partition(".")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    prelude = _PRELUDE.format(
        folder=str(Path(spec.origin).parent.parent), module=pool.__module__, name=pool.__qualname__
    )

    @functools.wraps(assert_python_ok)
    def run(*args: str, **env: str) -> Any:
        if args[0] == "-c":
            return assert_python_ok("-c", prelude + args[1], *args[2:], **env)
        script = Path(args[0])
        with contextlib.suppress(FileNotFoundError):
            script.write_text(prelude + script.read_text())
        return assert_python_ok(*args, **env)

    return run


_PRELUDE = """\
import multiprocessing, sys
if {folder!r} not in sys.path:
    sys.path.append({folder!r})
import {module}
multiprocessing.Pool = sys.modules[{module!r}].{name}
"""
