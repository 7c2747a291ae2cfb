"""What travels without a copy: measured through an executor, object by object, and shown as a table in README.md.

``python tests/test_libraries.py --write`` makes the table anew.  Rows of libraries that are not installed stay as they
are.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from executor_tasks import SOON, identity, warm_up
from libraries import (
    ALL,
    CONTIGUOUS,
    INLINE,
    SAMPLES,
    ZERO_COPY,
    Model,
    OwnWay,
    Sample,
    Subclass,
    make,
)

import shmpool
from shmpool.config import Config
from shmpool.serialize.mainmodule import MainModule
from shmpool.serialize.pickling import OBJECT, Pickling

# torch says so when it makes a sparse tensor from its parts.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- zero-copy-table -->\n", "<!-- /zero-copy-table -->\n"
#: Buffers of this size go through the store here, so that small objects show how larger ones travel.
LIMIT = 4096

# What the second and third columns say.
WITHOUT, ON_ARRIVAL = "written once, read without a copy", "written once, copied on arrival"
CONTIGUOUS_FIRST = "made contiguous, then as above"
NOTHING, AGAIN = "nothing is copied", "written again"
#: What arrives is memory of the library's own, into which it copies.
COPIED_ON_ARRIVAL = {"Python: array.array", "scikit-learn: RandomForestClassifier, fitted"}


class Trip(NamedTuple):
    """An object that went to a worker, came back, and went again; and what that cost, in bytes."""

    back: Any
    #: Its buffers, and its pickle stream.
    buffers: int
    stream: int
    #: Of the buffers, those that lie somewhere else each time that it is pickled: copies, made on the way.
    made: int
    #: Copied into the store when the worker returned it, and when it was sent once more.
    returned: int
    again: int


@contextlib.contextmanager
def small_limits() -> Iterator[shmpool.ShmExecutor]:
    config = Config.from_env()._replace(inline_limit=LIMIT)
    store = shmpool.ObjectStore(config=config)
    with shmpool.ShmExecutor(1, mp_context="fork", store=store) as executor:
        warm_up(executor, 1)
        # Arenas of this process are mapped by itself as well, and stay so.
        executor.put([np.ones(LIMIT), "x" * 200_000]).get("c")
        yield executor


@pytest.fixture(scope="module")
def executor() -> Iterator[shmpool.ShmExecutor]:
    with small_limits() as executor:
        yield executor


def travel(executor: shmpool.ShmExecutor, obj: Any) -> Trip:
    pickling = Pickling(MainModule.nothing(), executor._store.wanted)
    one, other = pickling.dumps(obj, OBJECT), pickling.dumps(obj, OBJECT)
    pairs = zip(one.buffers, other.buffers, strict=True)
    made = sum(a.nbytes for a, b in pairs if address_of(a) != address_of(b))
    buffers, stream = sum(a.nbytes for a in one.buffers), sum(map(len, one.stream))
    del one, other

    def copied(fn: Any, *args: Any) -> tuple[Any, int]:
        before = executor.stats().bytes_copied
        result = executor.submit(fn, *args).result(SOON)
        return result, executor.stats().bytes_copied - before

    ref = executor.put(obj)  # so that what is counted is the way back alone
    back, returned = copied(identity, ref)
    _, again = copied(nothing, back)
    return Trip(back, buffers, stream, made, returned, again)


def address_of(buffer: memoryview) -> int:
    return int(np.frombuffer(buffer, np.uint8).__array_interface__["data"][0])


def nothing(obj: Any) -> None:
    pass


def cells(trip: Trip, sample: Sample) -> tuple[str, str]:
    """What the table says of it."""
    moved = NOTHING if trip.returned == trip.again == 0 else AGAIN
    if trip.buffers + trip.stream < LIMIT:
        return INLINE, "rides in the message"
    if trip.stream > 0.5 * trip.buffers:
        return f"in the pickle stream: {sample.travels}", moved
    if moved == AGAIN:
        return ON_ARRIVAL, moved  # it is not in the store where it is now
    return (CONTIGUOUS_FIRST if trip.made > 0.5 * trip.buffers else WITHOUT), moved


# Equal.


def same(one: Any, other: Any) -> bool:
    """Is what came back what was sent, type and all?"""
    kind = type(one)
    if kind in (memoryview, pickle.PickleBuffer):
        return bytes(one) == bytes(other)
    if kind is not type(other):
        return False
    library = kind.__module__.partition(".")[0]
    if isinstance(one, np.ndarray):
        return same_arrays(one, other)
    if library in ("pandas", "polars", "pyarrow"):
        return bool(one.equals(other))
    if library == "scipy":
        return one.shape == other.shape and not (one != other).nnz
    if library == "xarray":
        return bool(one.identical(other))
    if library == "torch":
        return same_in_torch(one, other)
    if library == "sklearn":
        x = np.random.default_rng(1).random((50, one.n_features_in_))
        what = "predict_proba" if hasattr(one, "predict_proba") else "transform"
        return np.array_equal(getattr(one, what)(x), getattr(other, what)(x))
    if kind is types.MethodType:
        return one.__func__ is other.__func__ and same(one.__self__, other.__self__)
    if kind is types.FunctionType:
        return same(one(), other())
    if kind is functools.partial:
        return one.func is other.func and same(list(one.args), list(other.args))
    if kind is Model:
        return same(vars(one), vars(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if kind is list and not all(type(item) in (float, str) for item in one):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def same_arrays(one: Any, other: Any) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if isinstance(one, np.ma.MaskedArray) and not np.array_equal(one.mask, other.mask):
        return False
    if type(one) in (Subclass, OwnWay) and vars(other) != vars(pickle.loads(pickle.dumps(one))):
        return False
    return np.array_equal(one, other)


def same_in_torch(one: Any, other: Any) -> bool:
    import torch

    if isinstance(one, torch.nn.Module):
        return same(one.state_dict(), other.state_dict())
    if one.layout != torch.strided:
        one, other = one.to_dense(), other.to_dense()
    facts = [(t.dtype, t.requires_grad, t.stride()) for t in (one, other)]
    return facts[0] == facts[1] and torch.equal(one, other)


# The tests.


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_it_comes_back_equal_and_is_copied_as_little_as_the_table_says(executor, sample):
    obj = make(sample)
    trip = travel(executor, obj)
    assert same(obj, trip.back)
    first, then = cells(trip, sample)
    if sample.travels == ZERO_COPY:
        copied = str(sample) in COPIED_ON_ARRIVAL
        assert (first, then) == ((ON_ARRIVAL, AGAIN) if copied else (WITHOUT, NOTHING)), trip[1:]
    elif sample.travels == CONTIGUOUS:
        assert (first, then) == (CONTIGUOUS_FIRST, NOTHING), trip[1:]
    else:
        assert first == (
            INLINE if sample.travels == INLINE else f"in the pickle stream: {sample.travels}"
        )


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_explain_says_what_is_then_counted(executor, sample):
    obj = make(sample)
    store = executor._store
    store.dump(obj, Pickling(MainModule.nothing(), store.wanted), OBJECT).release()
    for _ in range(2):
        explanation = shmpool.explain(obj, store=store, quiet=True)
        payload = executor.put(obj)._payload
        assert (
            explanation.bytes_copied,
            explanation.bytes_shared,
            explanation.bytes_inline,
        ) == (payload.copied, payload.shared, len(payload.data))
    is_strided = any("made contiguous" in part.reason for part in explanation.parts)
    made = travel(executor, obj).made
    # What has been made contiguous for an earlier task may be found in the store.
    assert is_strided == (made > 0) or payload.shared >= made > 0, str(explanation)


def test_the_table_in_the_readme_is_what_is_measured(executor):
    text = README.read_text(encoding="utf-8")
    assert with_table(text, executor) == text, f"run: python tests/{Path(__file__).name} --write"


# Subclasses with attributes.


class Bare(np.ndarray):
    """Says nothing of its attributes."""

    unit = "m"


class ByReduce(np.ndarray):
    """Keeps its attributes with ``__reduce__`` alone."""

    unit = "m"

    def __reduce__(self):
        return _with_attributes, (np.asarray(self), vars(self))


class ByState(OwnWay):
    """Keeps all attributes, by ``__reduce__`` and ``__setstate__``."""

    def __reduce__(self):
        function, args, state = np.ndarray.__reduce__(self)
        return function, args, (*state, vars(self))

    def __setstate__(self, state):
        *state, attributes = state
        np.ndarray.__setstate__(self, tuple(state))
        vars(self).update(attributes)


def _with_attributes(a, attributes):
    made = a.view(ByReduce)
    vars(made).update(attributes)
    return made


SUBCLASSES = {Subclass: False, Bare: False, OwnWay: True, ByReduce: True, ByState: True}


@pytest.mark.parametrize("n", [10, 20_000], ids=["small", "large"])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("cls", SUBCLASSES, ids=lambda cls: cls.__name__)
def test_attributes_of_subclasses_are_kept_or_lost_as_by_pickle(executor, cls, step, n):
    sent = np.arange(float(step * n)).view(cls)[::step]
    sent.unit, sent.notes = "km", ["a note"]
    pickled = pickle.loads(pickle.dumps(sent, 5))
    assert pickled.unit == ("km" if SUBCLASSES[cls] else "m"), "what pickle does"
    there = executor.submit(attributes, sent).result(SOON)
    assert there == attributes(pickled)
    for back in (executor.submit(identity, sent).result(SOON), executor.put(sent).get("c")):
        assert type(back) is cls
        assert vars(back) == vars(pickled) and back.unit == pickled.unit
        assert np.array_equal(back, sent)
        # Also of what has come out of the store.
        assert vars(executor.submit(identity, back).result(SOON)) == vars(
            pickle.loads(pickle.dumps(back, 5))
        )


def attributes(obj: Any) -> Any:
    return type(obj).__name__, obj.unit, dict(vars(obj)), float(obj.sum())


# The table.


def with_table(text: str, executor: shmpool.ShmExecutor) -> str:
    """The README with a new table; what cannot be measured here is taken from the old one."""
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    known = {tuple(row.split(" | ")[:2]): row for row in old.splitlines() if row.startswith("| ")}
    rows = ["| | | the first time | passed on again |", "|---|---|---|---|"]
    for sample in ALL:
        start = f"| {sample.library}", sample.name
        if sample.installed:
            first, then = cells(travel(executor, make(sample)), sample)
            rows.append(" | ".join((*start, first, then)) + " |")
        elif start in known:
            rows.append(known[start])
    return f"{before}{BEGIN}{chr(10).join(rows)}\n{END}{after}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: python {sys.argv[0]} --write")
    with small_limits() as measured:
        README.write_text(
            with_table(README.read_text(encoding="utf-8"), measured), encoding="utf-8"
        )
