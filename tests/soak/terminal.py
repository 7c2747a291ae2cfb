"""A program in a pseudo-terminal of its own, at whose keyboard a test sits.

The program leads a session and is its terminal's foreground group, with all processes that it starts: so Ctrl-C
reaches all of them at once, as it does for a user.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from .processes import command, send_signal

CTRL_C = b"\x03"
#: Makes the terminal at its descriptor 0 its own, and becomes the program.
_LOGIN = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"
#: How a worker's, a fork server's or a tracker's end would show on the screen, beside the program's own traceback.
_NOISE = re.compile(
    r"""^(Process\ \S+:
    |\ \ File\ "<string>",\ line\ 1,\ in\ <module>       # started with -c
    |.*popen_loky_posix.*in\ <module>|.*\b_get_module_details
    |.*resource_tracker:.*|.*leaked\ .*\ objects.*
    |Exception\ in\ .*|.*Fatal\ Python\ error.*)$""",
    re.MULTILINE | re.VERBOSE,
)


class Terminal:
    """A program, and the terminal that it runs in; used as a context manager, after which nothing of it is left.

    Parameters
    ----------
    words : sequence of str
        The command.
    environment : dict of str to str
    folder : Path, optional
        Where it runs.
    """

    def __init__(
        self, words: Sequence[str], environment: dict[str, str], folder: Path | None = None
    ) -> None:
        self._master, slave = pty.openpty()
        settings = termios.tcgetattr(slave)
        settings[1] &= ~termios.OPOST  # newlines stay as they are
        settings[3] &= ~termios.ECHO  # ^C is not shown
        settings[3] |= termios.NOFLSH  # nor does it wipe out what was printed and not yet read
        termios.tcsetattr(slave, termios.TCSANOW, settings)
        self._slave = (
            slave  # held open, so that the master can be read when all others have closed it
        )
        self._screen = bytearray()
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LOGIN, *words],
            stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=folder,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for pid in self.family():
            send_signal(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        os.close(self._slave)
        os.close(self._master)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def screen(self) -> str:
        """All that was written so far."""
        self._read(0)
        return self._screen.decode(errors="replace")

    def _read(self, seconds: float) -> None:
        """Read what there is, after waiting for the first of it at most so long."""
        while select.select([self._master], [], [], seconds)[0]:
            self._screen += os.read(self._master, 1 << 16)
            seconds = 0

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._master, keys)

    def read_until(self, text: str, seconds: float, *, times: int = 1) -> None:
        """Wait until something has been written, so many times."""
        self._wait_until(lambda: self.screen.count(text) >= times, seconds, repr(text))

    def wait(self, seconds: float) -> float:
        """Wait for the end of the program; how long it took."""
        begin = time.monotonic()
        self._wait_until(lambda: self.process.poll() is not None, seconds, "the end")
        return time.monotonic() - begin

    def _wait_until(self, is_so: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:g} s in vain for {what} of\n{self.screen}")
            self._read(0.002)

    def family(self) -> set[int]:
        """The processes of the session; no zombies."""
        found = set()
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):  # it has ended
                    stat = Path(f"/proc/{entry}/stat").read_text()
                    # After the name in parentheses: state, ppid, group, session.
                    state, _, _, session = stat[stat.rindex(")") + 2 :].split()[:4]
                    if int(session) == self.pid and state not in "ZX":
                        found.add(int(entry))
        return found

    def wait_until_gone(self, seconds: float) -> tuple[float, list[str]]:
        """Wait for the end of all processes of the session: how long it took, and what is left after all that time."""
        begin = time.monotonic()
        while True:
            left = self.family()
            took = time.monotonic() - begin
            if not left or took > seconds:
                return took, [f"{pid}: {command(pid)}" for pid in left]
            self._read(0.005)


def noise(screen: str) -> list[str]:
    """The lines of a screen that no program has written whose Ctrl-C is its parent's business alone."""
    return [match[0] for match in _NOISE.finditer(screen)]


def tracebacks(screen: str) -> int:
    """How many there are, those of workers and ignored ones included."""
    return screen.count("Traceback (most recent call last)")
