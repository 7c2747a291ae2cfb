"""Finds the interpreter's own tests of process pools, and points them at another executor.

CPython's code is used where it lies, in the interpreter's ``test`` package; none of it is copied here. It
lies there in one of two shapes, and :func:`load_modules` knows both: a package of modules (3.12 and later),
or one file (3.11). Many builds leave it out.

The classes are not subclassed: their tests send bound methods to workers, by reference to class and module,
so a worker must be able to import the very class the test runs in. Instead, :func:`redirected` changes three
kinds of names for as long as one test runs:

* ``executor_type`` of CPython's mixins, one per start method;
* ``futures.ProcessPoolExecutor`` as the test modules see it (they name it where they make an executor of
  their own);
* ``assert_python_ok``, so that the scripts which tests run in a fresh interpreter, and which say
  ``from concurrent.futures import <name of the executor type>``, get the executor too.
"""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import importlib
import importlib.util
import os
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from multiprocessing.managers import EventProxy
from pathlib import Path
from typing import Any
from unittest import mock

from support import TIMEUNIT

START_METHODS = ("fork", "forkserver", "spawn")

_PACKAGE = "test.test_concurrent_futures"
_MODULES = (
    "test_process_pool",
    "test_init",
    "test_shutdown",
    "test_as_completed",
    "test_wait",
    "test_deadlock",
)
_MIXINS = {"ProcessPoolForkMixin", "ProcessPoolForkserverMixin", "ProcessPoolSpawnMixin"}

# Test cases that use process pools without being made from a mixin.
_OTHER_TEST_CASES = {"FailingInitializerResourcesTest"}

# The tests that skip themselves when the executor is `futures.ProcessPoolExecutor`, because that one has the
# bug they are about. They get to see the real one.
_ABOUT_THE_REAL_EXECUTOR = {"test_hang_gh83386"}

# The test that gives a manager's event, which a worker sets, one second: too few on a busy machine.
_WAITS_FOR_A_SECOND = {"test_ressources_gced_in_workers"}


class TestsAbsent(Exception):
    """This interpreter came without CPython's own tests; says which import failed."""


def load_executor() -> type[concurrent.futures.Executor]:
    """The executor under test: ``SHMPOOL_CONFORMANCE_EXECUTOR`` as a dotted name, by default shmpool's.

    ``concurrent.futures.ProcessPoolExecutor`` is useful too: the standard library must pass its own tests
    here, or the harness is wrong.
    """
    dotted = os.environ.get("SHMPOOL_CONFORMANCE_EXECUTOR", "shmpool.ShmExecutor")
    module, _, name = dotted.rpartition(".")
    executor: type[concurrent.futures.Executor] = getattr(importlib.import_module(module), name)
    return executor


def load_modules() -> list[types.ModuleType]:
    """CPython's test modules about process pools.

    Raises
    ------
    TestsAbsent
        The interpreter has none, or not what they need.
    """
    try:
        package = importlib.import_module(_PACKAGE)
        if not hasattr(package, "__path__"):
            return [package]
        return [importlib.import_module(f"{_PACKAGE}.{name}") for name in _MODULES]
    except ImportError as error:
        raise TestsAbsent(f"{sys.executable} has no usable {_PACKAGE}: {error}") from error


def find_test_cases(modules: list[types.ModuleType]) -> dict[str, type[unittest.TestCase]]:
    """The test cases about process pools, under every start method, by name."""
    found: dict[str, type[unittest.TestCase]] = {}
    for module in modules:
        for name, value in vars(module).items():
            if not (isinstance(value, type) and issubclass(value, unittest.TestCase)):
                continue
            if name in _OTHER_TEST_CASES or find_mixin(value) is not None:
                assert found.setdefault(name, value) is value, f"two test cases are named {name}"
    return found


def find_mixin(test_case: type) -> type | None:
    """The mixin that gives a test case its start method (``ctx``) and executor."""
    return next((base for base in test_case.__mro__ if base.__name__ in _MIXINS), None)


def find_start_method(test_case: type, test: str) -> str:
    """The start method a test runs under."""
    mixin = find_mixin(test_case)
    return mixin.ctx if mixin is not None else test.rpartition("_")[2]  # type: ignore[attr-defined]


def is_skipped_by_cpython(test_case: type[unittest.TestCase], test: str) -> bool:
    """Whether a decorator of CPython's keeps the test from being run on this system."""
    return any(
        getattr(part, "__unittest_skip__", False) for part in (test_case, getattr(test_case, test))
    )


@contextmanager
def redirected(
    modules: list[types.ModuleType],
    executor: type[concurrent.futures.Executor],
    test_case: type,
    test: str,
) -> Iterator[Callable[[], int]]:
    """While inside, CPython's tests use `executor`; yields what tells how many of them they have made."""
    made = 0  # a number: a list of them would keep alive what a test expects to be collected
    original_init = executor.__init__

    @functools.wraps(original_init)
    def counting_init(*args: Any, **kwargs: Any) -> None:
        nonlocal made
        made += 1
        original_init(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(executor, "__init__", counting_init))
        for mixin in _find_mixins(modules):
            stack.enter_context(mock.patch.object(mixin, "executor_type", executor))
        for module in modules:
            if hasattr(module, "futures") and test not in _ABOUT_THE_REAL_EXECUTOR:
                stack.enter_context(mock.patch.object(module, "futures", _Futures(executor)))
            if hasattr(module, "assert_python_ok"):
                wrapped = _with_executor_importable(module.assert_python_ok, executor)
                stack.enter_context(mock.patch.object(module, "assert_python_ok", wrapped))
        if test_case.__name__ in _OTHER_TEST_CASES:
            stack.enter_context(_fresh_resource_tracker())
        if test in _WAITS_FOR_A_SECOND:
            stack.enter_context(mock.patch.object(EventProxy, "wait", _patient(EventProxy.wait)))
        yield lambda: made


def _patient(wait: Callable[..., bool]) -> Callable[..., bool]:
    return lambda event, timeout=None: wait(event, 60 * TIMEUNIT)


@contextmanager
def _fresh_resource_tracker() -> Iterator[None]:
    """Lends `multiprocessing` another resource tracker.

    `FailingInitializerResourcesTest` stops the tracker and wants to hear that nothing was left; what the
    tests before it, of whatever module, still hold would be counted, and unlinked.
    """
    gc.collect()
    tracker = resource_tracker.ResourceTracker()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(resource_tracker, "_resource_tracker", tracker))
        for name in ("ensure_running", "register", "unregister", "getfd"):
            stack.enter_context(mock.patch.object(resource_tracker, name, getattr(tracker, name)))
        yield


def _find_mixins(modules: list[types.ModuleType]) -> set[type]:
    mixins = {find_mixin(test_case) for test_case in find_test_cases(modules).values()}
    return {mixin for mixin in mixins if mixin is not None}


class _Futures(types.ModuleType):
    """`concurrent.futures`, but for the name of the executor."""

    def __init__(self, executor: type[concurrent.futures.Executor]) -> None:
        super().__init__("concurrent.futures")
        self.ProcessPoolExecutor = executor

    def __getattr__(self, name: str) -> Any:
        return getattr(concurrent.futures, name)


def _with_executor_importable(
    assert_python_ok: Callable[..., Any], executor: type[concurrent.futures.Executor]
) -> Callable[..., Any]:
    """`assert_python_ok`, with scripts that can import the executor from `concurrent.futures`."""
    module, _, _ = executor.__module__.partition(".")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    prelude = _PRELUDE.format(
        folder=str(Path(spec.origin).parent.parent),
        module=executor.__module__,
        name=executor.__qualname__,
    )

    @functools.wraps(assert_python_ok)
    def run(flag: str, script: str, **env: str) -> Any:
        assert flag == "-c" and f"import {executor.__name__}" in script, (
            f"a script that the harness cannot redirect:\n{script}"
        )
        return assert_python_ok(flag, prelude + script, **env)

    return run


# What runs before a script's first line. The executor's package is imported only when the script asks for it,
# since the order in which modules register what they do at exit is part of what is tested. `multiprocessing`
# is a name that one script (test_hang_gh83386) uses without importing it.
_PRELUDE = """\
import concurrent.futures, multiprocessing, sys
if {folder!r} not in sys.path:
    sys.path.append({folder!r})
def _find(name, _find=concurrent.futures.__getattr__):
    if name != {name!r}:
        return _find(name)
    import importlib
    return getattr(importlib.import_module({module!r}), {name!r})
concurrent.futures.__getattr__ = _find
"""
