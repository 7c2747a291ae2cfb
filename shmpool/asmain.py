"""Run a program as ``__main__``, as the interpreter does it.

What CPython does in C for ``python script.py`` and ``python -m module`` (``Modules/main.c``, ``Python/pythonrun.c``)
is done here once more, in the process that there is, so that the program cannot tell: ``sys.argv``, ``sys.path[0]``, a
fresh module ``__main__`` with all its attributes, ``sys.excepthook`` for what it does not catch, and the exit code.
Child processes look at the same attributes to find the main module, so they find the program's.

One difference remains: whoever looks at the whole stack sees frames of this module below the program's.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib.machinery
import io
import os
import pkgutil
import runpy
import sys
from collections.abc import Callable
from types import CodeType, ModuleType, TracebackType
from typing import Any

__all__ = ["run_module", "run_script"]


def run_script(script: str, args: list[str]) -> int:
    """Do as ``python script args...`` does.

    Parameters
    ----------
    script : str
        A file with Python's source, or compiled (``.pyc``); a folder or zip file with a ``__main__.py``; or ``-``, for
        standard input.
    args : list of str

    Returns
    -------
    int
        The exit code.

    Raises
    ------
    SystemExit
        As raised by the program.
    """
    sys.argv[:] = [script, *args]
    if script == "-":
        return _run_standard_input()
    # Joined, not normalized: `./a.py` is known as `/where/it/is/./a.py`.
    path = os.path.join(os.getcwd(), script)
    if pkgutil.get_importer(path) is not None:  # a folder or zip file
        _set_first_path(path, always=True)
        _make_main()
        return _run(lambda: _run_module_as_main("__main__", False))
    _set_first_path(os.path.dirname(os.path.realpath(path)))
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        reason = f"[Errno {error.errno}] {error.strerror}"
        sys.stderr.write(f"{sys.orig_argv[0]}: can't open file {path!r}: {reason}\n")
        return 2
    return _run_file(path, source)


def run_module(name: str, args: list[str]) -> int:
    """Do as ``python -m name args...`` does; parameters and results are those of :func:`run_script`."""
    sys.argv[:] = ["-m", *args]  # until the module is found
    _make_main()
    return _run(lambda: _run_module_as_main(name))


#: What the interpreter itself calls for ``-m``, folders and zip files: tracebacks show the same frames as ever.
_run_module_as_main: Callable[..., object] = runpy._run_module_as_main  # type: ignore[attr-defined]


def _run_file(path: str, source: bytes) -> int:
    main = _make_main(path)
    if path.endswith(".pyc"):
        compiled = importlib.machinery.SourcelessFileLoader("__main__", path)
        main.__loader__ = compiled
        return _run(lambda: exec(compiled.get_code("__main__"), vars(main)))  # type: ignore[arg-type]  # noqa: S102
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    return _run(lambda: exec(_compile(source, path), vars(main)))  # noqa: S102  # it is what was asked for


def _run_standard_input() -> int:
    _set_first_path("")
    main = _make_main("<stdin>")
    source = sys.stdin.buffer.read()
    return _run(lambda: exec(_compile(source, "<stdin>"), vars(main)))  # noqa: S102  # it is what was asked for


def _compile(source: bytes, path: str) -> CodeType:
    return compile(source, path, "exec", dont_inherit=True)


def _set_first_path(folder: str, *, always: bool = False) -> None:
    """Put ``folder`` where ``-m shmpool`` has put the working folder.

    With ``python -P`` nothing is there, and nothing is to be there unless ``always``.
    """
    if not sys.flags.safe_path:
        sys.path[0] = folder
    elif always:
        sys.path.insert(0, folder)
    # The working folder may be where shmpool was found. The processes of its pools must find it, too.
    if all(finder.find_spec("shmpool", None) is None for finder in sys.meta_path):
        sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _make_main(path: str | None = None) -> ModuleType:
    """A new module ``__main__``, with the attributes that the interpreter gives it, in their order."""
    main = ModuleType("__main__")
    main.__loader__ = importlib.machinery.BuiltinImporter
    if sys.version_info < (3, 14):
        main.__annotations__ = {}
    main.__builtins__ = builtins  # type: ignore[attr-defined]
    if path is not None:
        main.__file__ = path
        main.__cached__ = None  # type: ignore[attr-defined]
    sys.modules["__main__"] = main
    if "__mp_main__" in sys.modules:  # multiprocessing's name for it
        sys.modules["__mp_main__"] = main
    return main


def _run(program: Callable[[], object]) -> int:
    try:
        program()
    except SystemExit:
        raise
    except BaseException as error:
        uncaught = error
    else:
        return 0
    # Not in the except clause: the hook is called with no exception being handled.
    return _report_uncaught(uncaught)


def _report_uncaught(error: BaseException) -> int:
    """What the interpreter does with an exception that nobody has caught."""
    error.__traceback__ = _of_program(error.__traceback__)
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
    if sys.version_info >= (3, 12):
        sys.last_exc = error
    failed = _call_hook(error)
    if failed is not None:
        failed.__traceback__ = _of_program(failed.__traceback__)
        sys.stderr.write("Error in sys.excepthook:\n")
        _display(failed)
        sys.stderr.write("\nOriginal exception was:\n")
        _display(error)
    if type(error) is KeyboardInterrupt:
        _end_by_sigint_later()
    return 1


def _call_hook(error: BaseException) -> BaseException | None:
    """Call ``sys.excepthook``; return what it raises."""
    try:
        hook: Callable[..., Any] = sys.excepthook
    except AttributeError:
        sys.stderr.write("sys.excepthook is missing\n")
        hook = sys.__excepthook__
    try:
        hook(type(error), error, error.__traceback__)
    except SystemExit:
        raise
    except BaseException as failed:
        return failed
    return None


def _display(error: BaseException) -> None:
    sys.__excepthook__(type(error), error, error.__traceback__)


def _of_program(traceback: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames of this module, which lead to the program's."""
    while traceback is not None and traceback.tb_frame.f_globals is globals():
        traceback = traceback.tb_next
    return traceback


def _end_by_sigint_later() -> None:
    """Have the process end by SIGINT, after threads, exit handlers and all: so shells know that it was interrupted.

    The interpreter does so if a ``KeyboardInterrupt`` has left source code that it ran, and it notes that wherever it
    runs source code, a string for instance.
    """
    with contextlib.suppress(KeyboardInterrupt):
        exec("raise KeyboardInterrupt", {})  # noqa: S102
