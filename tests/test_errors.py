"""Every error is also the standard library's, survives pickling, and says what was wrong, with the values."""

from __future__ import annotations

import pickle
from concurrent.futures.process import BrokenProcessPool

import pytest

import shmpool

ERRORS = [
    (
        shmpool.WorkerDiedError(pid=12, exitcode=-9, task="f"),
        BrokenProcessPool,
        ["12", "SIGKILL", "f", "memory"],
    ),
    (
        shmpool.WorkerDiedError(pid=12, exitcode=-11, task="f"),
        BrokenProcessPool,
        ["SIGSEGV", "PYTHONFAULTHANDLER"],
    ),
    (shmpool.WorkerDiedError(pid=12, exitcode=-99, task="f"), BrokenProcessPool, ["signal 99"]),
    (shmpool.WorkerDiedError(pid=12, exitcode=3, task="f"), BrokenProcessPool, ["exit code 3"]),
    (shmpool.WorkerDiedError(pid=12, exitcode=None, task="f"), BrokenProcessPool, ["unknown"]),
    (
        shmpool.WorkerDiedError(pid=12, exitcode=-9, task="f", problem="a message of 7 bytes"),
        BrokenProcessPool,
        ["12", "f", "a message of 7 bytes"],
    ),
    (shmpool.BrokenPoolError("it broke"), BrokenProcessPool, ["it broke"]),
    (
        shmpool.StoreFullError(requested=1000, used=2000, capacity=3000, detail="no more"),
        MemoryError,
        ["1,000", "2,000", "3,000", "no more"],
    ),
    (
        shmpool.SerializationError(what="the result", culprit="result[0]", reason="TypeError: no"),
        pickle.PicklingError,
        ["the result", "result[0]", "TypeError: no"],
    ),
    (shmpool.TaskTimeoutError(task="f", timeout=1.5), TimeoutError, ["f", "1.5"]),
    (shmpool.RefError("elsewhere"), LookupError, ["elsewhere"]),
    (shmpool.WireError("garbled"), ConnectionError, ["garbled"]),
]


@pytest.mark.parametrize(("error", "kind", "words"), ERRORS, ids=lambda value: type(value).__name__)
def test_an_error_survives_pickling_with_its_data_and_notes(
    error: shmpool.ShmPoolError, kind: type, words: list[str]
) -> None:
    error.add_note("a note")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert isinstance(again, kind)
    assert vars(again) == vars(error)
    assert str(again) == str(error)
    for word in words:
        assert word in str(error)
