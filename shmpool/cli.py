"""``python -m shmpool run``: a program as it is, with shmpool in the place of the standard library's process pools."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from collections.abc import Iterator, Sequence

from shmpool import asmain

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Run the command; ``argv`` is what follows ``python -m shmpool``.

    Returns
    -------
    int
        The exit code.

    Raises
    ------
    SystemExit
        Raised by the program that is run; for ``--help`` and ``--version``; for options that make no sense.
    """
    own, program = _split(list(argv))
    parser, run_parser = _make_parsers()
    options = parser.parse_args(own)
    if options.command is None:
        parser.print_help()
        return 0
    as_module = program[:1] == ["-m"]
    if len(program) < 1 + as_module:
        run_parser.error("a script is required, or -m and a module")
    if options.report:
        # First, so that it runs last: after the exit handlers of the program and of multiprocessing.
        atexit.register(_report, os.getpid())
    from shmpool.integrations.install import install

    install()
    if as_module:
        return asmain.run_module(program[1], program[2:])
    return asmain.run_script(program[0], program[1:])


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Tell our own options from the program and its arguments.

    Everything from the first word after ``run`` that is no option belongs to the program, whatever it looks like.
    (argparse would drop a ``--``.)
    """
    if "run" in argv:
        for i in range(argv.index("run") + 1, len(argv)):
            if argv[i] in ("-", "-m") or not argv[i].startswith("-"):
                return argv[:i], argv[i:]
    return argv, []


def _make_parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    version = sys.modules["shmpool"].__version__  # imported before this, as any package is
    parser = argparse.ArgumentParser(prog="python -m shmpool", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"shmpool {version}")
    run = parser.add_subparsers(dest="command", metavar="command").add_parser(
        "run",
        help="run a program with shmpool's process pools",
        usage=_RUN_USAGE,
        description=_RUN_DESCRIPTION,
    )
    run.add_argument(
        "--report",
        action="store_true",
        help="say at the end, on standard error, what went through shared memory",
    )
    return parser, run


_DESCRIPTION = "Process pools whose large arrays go through shared memory."
_RUN_USAGE = """\
python -m shmpool run [--report] script [arguments ...]
       python -m shmpool run [--report] -m module [arguments ...]"""
_RUN_DESCRIPTION = """\
Runs a program as python itself does, after shmpool.install(): multiprocessing.Pool and
concurrent.futures.ProcessPoolExecutor are shmpool's. The script may be a file, a folder or zip file with a __main__.py,
or - for standard input. What follows it is passed on to it."""


def _report(pid: int) -> None:
    """Say what went through the pools of this process; not in a fork of it that ends like the main program."""
    if os.getpid() == pid:
        sys.stderr.write("".join(f"shmpool: {line}\n" for line in _report_lines()))


def _report_lines() -> Iterator[str]:
    nothing = "no pool of multiprocessing or concurrent.futures was opened in the main process"
    if "shmpool.executor" not in sys.modules:  # and it is too late to import it
        yield nothing
        return
    from shmpool.config import Config
    from shmpool.executor import total_stats
    from shmpool.integrations.standins import opened

    stats = total_stats()
    if not (opened or stats.tasks_submitted):
        yield nothing
        return
    pools = _number(opened["Pool"], "pool")
    executors = _number(opened["ProcessPoolExecutor"], "executor")
    lost = f" ({stats.tasks_failed:,} lost)" if stats.tasks_failed else ""
    died = f", {_number(stats.workers_died, 'worker')} died" if stats.workers_died else ""
    yield f"{pools}, {executors}, {_number(stats.tasks_submitted, 'task')}{lost}{died}"
    copied, shared = stats.bytes_copied, stats.bytes_shared
    if shared:
        yield (
            f"{_size(copied + shared)} went through shared memory: {_size(copied)} copied into it once, "
            f"{_size(shared)} that were there already"
        )
    elif copied:
        yield f"{_size(copied)} went through shared memory, copied into it once"
    else:
        limit = Config.from_env().inline_limit
        yield f"nothing went through shared memory, which is for buffers of {_size(limit)} and more"
    yield f"{_size(stats.bytes_inline)} went through sockets, pickled"


def _number(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _size(n: int) -> str:
    size = float(n)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
