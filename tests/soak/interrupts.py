"""Ctrl-C at random moments, once or twice in a row, at programs in terminals of their own.

From when an executor is about to be made until the interpreter has ended: while workers are started, tasks sent,
results awaited, pools ended.  Such a program ends by SIGINT, soon, with one traceback of a ``KeyboardInterrupt``; no
worker says anything; no process, file or name stays.  A Ctrl-C may come when the program has done its work: plain
Python then says that it ignores it (or not even that), and ends well.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from support import TIMEUNIT

import shmpool

from .interrupted import WORK
from .kill import METHODS
from .processes import send_signal
from .report import Report
from .terminal import CTRL_C, Terminal, noise, tracebacks

#: Seconds after the last Ctrl-C in which a program must have ended.
HANGS_AFTER = 20 * TIMEUNIT
_HOMES = os.pathsep.join(
    [str(Path(__file__).resolve().parents[1]), str(Path(shmpool.__file__).parents[1])]
)


def run(
    *,
    seed: int,
    seconds: float,
    methods: tuple[str, ...] = METHODS,
    programs: float = float("inf"),
) -> Report:
    """Interrupt one program after another.

    Parameters
    ----------
    seed : int
    seconds : float
    methods : tuple of str
        How workers are started, in turn.
    programs : int
        At most so many.
    """
    report = Report("interrupts", seed)
    total: Counter[str] = Counter()
    took: list[tuple[float, str]] = []
    begin = time.monotonic()
    number = 0
    while number < programs and time.monotonic() - begin < seconds:
        rng = random.Random(f"{seed} interrupts {number}")
        settings = {
            "method": methods[number % len(methods)],
            "work": rng.choice(list(WORK)),
            "seed": rng.randrange(1 << 30),
        }
        # The work lasts for some seconds at most; workers start in the first tenths of one.
        after = rng.choice((0.03, 0.3, 2.0)) * rng.random()
        again = rng.choice((None, None, 0.0, 0.001, 0.02, 0.3))
        presses = [after] if again is None else [after, again * rng.random()]
        interrupt(settings, presses, report, total, took)
        number += 1
    report.figures = dict(sorted(total.items()))
    report.figures["programs"] = number
    if took:
        took.sort()
        report.figures["end after the last Ctrl-C, s: median"] = round(took[len(took) // 2][0], 3)
        report.figures["... of nine in ten, at most"] = round(took[len(took) * 9 // 10][0], 3)
        report.figures["... of all, at most"] = round(took[-1][0], 3)
        report.figures["the slowest"] = took[-1][1]
    report.figures["seconds"] = round(time.monotonic() - begin, 1)
    return report


def interrupt(
    settings: dict[str, object],
    presses: list[float],
    report: Report,
    total: Counter[str],
    took: list[tuple[float, str]],
) -> None:
    """Run one program, and press Ctrl-C after so many seconds, and again after so many more."""
    folder = Path(tempfile.mkdtemp(prefix="c-"))
    environment = {**os.environ, "PYTHONPATH": _HOMES, "TMPDIR": str(folder)}
    words = [sys.executable, "-m", "soak.interrupted", json.dumps(settings)]
    wrong: list[str] = []
    with Terminal(words, environment) as terminal:
        terminal.read_until("ready", HANGS_AFTER)
        family: set[int] = set()
        for after in presses:
            time.sleep(after)
            family |= terminal.family()
            if terminal.process.poll() is None:
                terminal.type(CTRL_C)
        try:
            took.append((terminal.wait(HANGS_AFTER), f"{settings}, Ctrl-C after {presses}"))
            left = terminal.wait_until_gone(HANGS_AFTER)[1]
            if left:
                wrong.append(f"left behind: {left}")
        except TimeoutError:
            wrong.append(f"it hangs\n{_stacks(terminal)}")
        code, screen = terminal.process.poll(), terminal.screen
    total["ended by SIGINT" if code == -signal.SIGINT else f"ended with {code}"] += 1
    total["Ctrl-C twice"] += len(presses) > 1
    wrong += _told(code, screen, once=len(presses) == 1)
    files = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    if len(presses) > 1:  # the second may have ended the removal of multiprocessing's own
        files = [name for name in files if not name.startswith("pymp-")]
    if files:
        wrong.append(f"left in the temporary folder: {files}")
    names = [name for name in os.listdir("/dev/shm") if family & _numbers(name)]
    if names:
        wrong.append(f"left in /dev/shm: {names}")
    if wrong:
        report.violated(f"{settings}, Ctrl-C after {presses}: {'; '.join(wrong)}\n{screen}")
        print(report.violations[-1], file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)


def _told(code: int | None, screen: str, *, once: bool) -> list[str]:
    """What is wrong with how it ended, and with what it said."""
    wrong = []
    if not once and re.search(
        r"threading\.py.*\nRuntimeError: release unlocked lock", screen, re.DOTALL
    ):
        # The second has come while threading took back the lock of a condition after the first: whoever waits by
        # concurrent.futures.wait(), for example, gets this, whatever is waited for.
        return wrong
    if code not in (-signal.SIGINT, 0):
        wrong.append(f"exit code {code}")
    if lines := noise(screen):
        wrong.append(f"said by others: {lines}")
    ends = re.findall(r"^[\w.]+(?:Error|Interrupt|Exception)\b.*$", screen, re.MULTILINE)
    # An import that Ctrl-C ends shows itself as the context of the KeyboardInterrupt.
    others = [
        end
        for end in ends
        if end.rstrip(": ") != "KeyboardInterrupt" and not end.startswith("KeyError: '/")
    ]
    if others:
        wrong.append(f"other exceptions: {others}")
    if once and tracebacks(screen) - screen.count("During handling of the above") > 1:
        wrong.append("more than one traceback")
    return wrong


def _numbers(name: str) -> set[int]:
    return set(map(int, re.findall(r"\d{2,9}", name)))


def _stacks(terminal: Terminal) -> str:
    """Where everybody stands."""
    spy = shutil.which("py-spy", path=os.path.dirname(sys.executable))
    told = []
    for pid in sorted(terminal.family()):
        if spy is not None:
            done = subprocess.run(
                [spy, "dump", "--pid", str(pid)], capture_output=True, text=True, check=False
            )
            told.append(done.stdout or f"{pid}: {done.stderr}")
    if spy is None:
        send_signal(terminal.pid, signal.SIGUSR1)
        time.sleep(0.5)
    return "\n".join(told)
