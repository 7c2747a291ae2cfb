"""A program that ends while it holds results, refs and executors says nothing on its way out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import shmpool

SCRIPT = """
import numpy as np
import shmpool

def double(array):
    return array * 2

if __name__ == "__main__":
    executor = shmpool.ShmExecutor(1, METHOD)
    ref = executor.put(np.ones(1 << 17))
    results = [executor.submit(double, ref).result() for _ in range(3)]
    views = [ref.get("c"), ref.get("r"), results[0][10:]]
    future = executor.submit(double, np.ones(1 << 17))
    shared = shmpool.zeros(1 << 17)
    shmpool.kept = results, views, future, executor  # beyond the life of __main__
    print("done")
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn", "loky"])
@pytest.mark.parametrize("options", [[], ["-X", "dev", "-W", "error"]], ids=["plain", "dev mode"])
def test_a_program_that_holds_everything_ends_silently(method, options, tmp_path):
    done = run(SCRIPT.replace("METHOD", repr(method)), options, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def run(program, options, folder):
    script = folder / "script.py"
    script.write_text(program)
    home = str(Path(shmpool.__file__).parents[1])
    return subprocess.run(
        [sys.executable, *options, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": home},
    )


ENDED = """
import sys
import threading

import numpy as np
import shmpool

store = shmpool.ObjectStore()

class Late:
    def __del__(self, put=shmpool.put):
        try:
            put(np.ones(1 << 17), store=store)
        except RuntimeError as error:
            print(error)

held = threading.Event()

def hold():
    with store._books:
        held.set()
        threading.Event().wait()

sys.last_value = Late()  # goes before modules are emptied
threading.Thread(target=hold, daemon=True).start()
held.wait()
"""


def test_a_daemon_thread_that_the_interpreter_ends_keeps_nobody_waiting(tmp_path):
    """It had the store's lock, and a finalizer wants it."""
    done = run(ENDED, [], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "the interpreter ends, and has ended a thread that used this store\n"
