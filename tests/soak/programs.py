"""Programs in processes of their own, all of whose descendants can be found, whoever is their parent by then."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import shmpool

from .processes import command, helpers, is_alive, marked, send_signal

_HOMES = os.pathsep.join(
    [str(Path(__file__).resolve().parents[1]), str(Path(shmpool.__file__).parents[1])]
)


class Program:
    """A module of this package, run as a program; used as a context manager, after which nothing of it is left.

    Parameters
    ----------
    module : str
    settings : dict
        What the program finds in its ``sys.argv[1]``, as JSON; ``folder`` is added.

    Attributes
    ----------
    folder : Path
        Where the program and its workers may leave notes.
    temporary : Path
        Its temporary folder.
    """

    def __init__(self, module: str, settings: dict[str, Any]) -> None:
        self._all = tempfile.TemporaryDirectory(prefix="soak-")
        home = Path(self._all.name)
        self.folder, self.temporary = home / "notes", home / "tmp"
        self.folder.mkdir()
        self.temporary.mkdir()
        self._mark = f"SHMPOOL_SOAK_PROGRAM={secrets.token_hex(8)}"
        name, _, value = self._mark.partition("=")
        self._errors = open(home / "stderr", "w+")  # noqa: SIM115  # closed in __exit__
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"soak.{module}", json.dumps({**settings, "folder": str(self.folder)})],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env={**os.environ, name: value, "PYTHONPATH": _HOMES, "TMPDIR": str(self.temporary)},
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
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process.wait()
        self._errors.close()
        self._all.cleanup()

    @property
    def pid(self) -> int:
        return self.process.pid

    def family(self) -> set[int]:
        """The program and all its descendants, orphans included."""
        return {pid for pid in marked(self._mark) if is_alive(pid)}

    def read_line(self) -> str:
        """What the program says next."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def errors(self) -> str:
        """What was written to standard error so far."""
        self._errors.seek(0)
        return self._errors.read()

    def wait_for_end(self, seconds: float) -> set[int]:
        """Wait for the program's end, and kill it if that does not come; its helpers, which outlive its workers.

        Raises
        ------
        TimeoutError
        """
        found: set[int] = set()
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            found |= helpers(self.pid)
            if time.monotonic() > deadline:
                self.process.kill()
                raise TimeoutError(f"it has not ended after {seconds:g} s")
            time.sleep(0.001)
        return found

    def own_children(self) -> set[int]:
        """Processes that the program's tasks have started on their own account, which they noted down."""
        return {int(note.stem) for note in self.folder.glob("*.child")}

    def wait_until_gone(self, seconds: float, but: set[int]) -> tuple[float, list[str]]:
        """Wait for the end of the family, except for some.

        Returns
        -------
        float
            How long it took.
        list of str
            What is left after all that time.
        """
        begin = time.monotonic()
        while True:
            left = self.family() - but
            took = time.monotonic() - begin
            if not left or took > seconds:
                return took, [f"{pid}: {command(pid)}" for pid in left]
            time.sleep(0.005)

    def files_left(self) -> list[str]:
        """In its temporary folder; but a killed program cannot remove multiprocessing's own."""
        return [
            str(path.relative_to(self.temporary))
            for path in self.temporary.rglob("*")
            if not path.relative_to(self.temporary).parts[0].startswith("pymp-")
        ]

    def names_left(self, family: set[int]) -> list[str]:
        """Names in /dev/shm that mention one of these processes."""
        with contextlib.suppress(FileNotFoundError):
            return [
                name
                for name in os.listdir("/dev/shm")
                if any(str(pid) in name.replace("_", "-").split("-") for pid in family)
            ]
        return []
