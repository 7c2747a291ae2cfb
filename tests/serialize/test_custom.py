"""Custom serializers: what is registered is used, travels with its deserialiser, and can be taken back."""

from __future__ import annotations

import fractions
import functools
import io
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import types
from collections import ChainMap

import cloudpickle
import numpy as np
import pytest
from support import TIMEUNIT

import shmpool
from shmpool.serialize import custom
from shmpool.serialize.custom import (
    deregister_serializer,
    has_custom,
    reduce_custom,
    register_serializer,
    registered,
)


class Database:
    """Holds what cannot travel: an open connection."""

    def __init__(self, path=":memory:"):
        self.path = path
        self.connection = sqlite3.connect(path)

    def answer(self):
        return self.connection.execute("select 42").fetchone()[0]

    def close(self):
        self.connection.close()


class Counter:
    """Holds a lock beside a large array."""

    def __init__(self, values):
        self.values = values
        self.lock = threading.Lock()


class SubCounter(Counter):
    pass


class Plain:
    """Can be pickled as it is."""

    def __init__(self, n):
        self.n = n


class Pickler(cloudpickle.Pickler):
    def __init__(self, file, **kwargs):
        self.dispatch_table = ChainMap(registered(), cloudpickle.Pickler.dispatch_table)
        super().__init__(file, protocol=5, **kwargs)


def dumps(obj, **kwargs):
    file = io.BytesIO()
    Pickler(file, **kwargs).dump(obj)
    return file.getvalue()


def trip(obj):
    return pickle.loads(dumps(obj))


def in_a_new_process(payload, expression):
    """What `expression` gives where only the payload is known: `obj` is what came out of it."""
    script = f"import pickle, sys; obj = pickle.load(sys.stdin.buffer); print({expression})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=payload,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


@pytest.fixture(autouse=True)
def _empty_table(monkeypatch):
    monkeypatch.setattr(custom, "_reducers", {})


def test_a_class_that_holds_a_connection_travels_as_its_path():
    database = Database()
    with pytest.raises(TypeError, match="sqlite3"):
        dumps(database)
    register_serializer(Database, serializer=lambda db: db.path, deserializer=Database)
    there = trip({"db": database})["db"]
    assert type(there) is Database
    assert there.connection is not database.connection
    assert there.answer() == 42
    there.close()
    database.close()


def test_a_class_that_holds_a_lock_gets_a_new_lock_and_its_array_out_of_band():
    register_serializer(Counter, serializer=lambda c: c.values, deserializer=Counter)
    counter = Counter(np.arange(100_000.0))
    buffers = []
    payload = dumps(counter, buffer_callback=buffers.append)
    assert len(buffers) == 1
    assert len(payload) < 1000, "the array must not be inside the stream"
    there = pickle.loads(payload, buffers=buffers)
    assert there.lock.acquire(blocking=False)
    assert there.values.base is not None, "the array must be a view of the buffer"
    np.testing.assert_array_equal(there.values, counter.values)


def test_a_receiver_that_registered_nothing_can_use_a_lambda_and_a_closure():
    offset = 40
    register_serializer(Plain, serializer=lambda p: p.n, deserializer=lambda n: n + offset)
    assert in_a_new_process(dumps([Plain(2), Plain(3)]), "obj") == "[42, 43]"


def test_an_importable_deserializer_travels_by_name():
    register_serializer(Plain, serializer=lambda p: f"{p.n}/7", deserializer=fractions.Fraction)
    payload = pickle.dumps(reduce_custom(Plain(3)))
    assert b"fractions" in payload
    assert len(payload) < 200
    assert in_a_new_process(dumps(Plain(3)), "obj") == "3/7"


def test_registering_again_replaces_and_the_payload_of_before_still_works():
    register_serializer(Plain, serializer=lambda p: p.n, deserializer=lambda n: ("first", n))
    before = dumps(Plain(1))
    register_serializer(Plain, serializer=lambda p: p.n, deserializer=lambda n: ("second", n))
    assert trip(Plain(1)) == ("second", 1)
    assert pickle.loads(before) == ("first", 1)
    assert len(registered()) == 1


def test_deregistering_brings_back_the_class_s_own_way_and_is_idempotent():
    assert not has_custom()
    register_serializer(Plain, serializer=lambda p: p.n, deserializer=str)
    assert has_custom()
    assert trip(Plain(1)) == "1"
    deregister_serializer(Plain)
    deregister_serializer(Plain)
    assert not has_custom()
    assert trip(Plain(1)).n == 1
    deregister_serializer(Database)
    with pytest.raises(KeyError):
        reduce_custom(Plain(1))


def test_registration_comes_before_the_class_s_own_reduce():
    class Own:
        def __reduce__(self):
            return str, ("own",)

    register_serializer(Own, serializer=lambda _: "registered", deserializer=str)
    assert trip(Own()) == "registered"


def test_a_subclass_of_a_registered_class_is_not_concerned():
    register_serializer(Counter, serializer=lambda c: c.values, deserializer=Counter)
    with pytest.raises(TypeError, match="lock"):
        dumps(SubCounter([1]))
    register_serializer(SubCounter, serializer=lambda c: c.values, deserializer=SubCounter)
    assert type(trip(SubCounter([1]))) is SubCounter


def test_a_subclass_of_a_builtin_container_can_be_registered():
    class Shouting(dict):
        pass

    register_serializer(Shouting, serializer=list, deserializer=sorted)
    assert trip(Shouting(b=1, a=2)) == ["a", "b"]


def test_an_object_that_occurs_twice_is_serialised_once_and_stays_one():
    calls = []
    register_serializer(
        Counter, serializer=lambda c: calls.append(1) or c.values, deserializer=Counter
    )
    counter = Counter([1])
    first, second = trip([counter, counter])
    assert first is second
    assert len(calls) == 1


def test_registered_serializers_nest():
    register_serializer(Counter, serializer=lambda c: c.values, deserializer=Counter)
    register_serializer(Database, serializer=lambda db: db.path, deserializer=Database)
    database = Database()
    there = trip(Counter([database, Counter([1])]))
    assert there.values[0].answer() == 42
    assert there.values[1].values == [1]
    there.values[0].close()
    database.close()


def test_a_partial_and_a_bound_method_will_do_as_deserializer():
    class Factory:
        def make(self, state):
            return ["made", state]

    register_serializer(Plain, serializer=lambda p: p.n, deserializer=functools.partial(pow, 2))
    assert trip(Plain(5)) == 32
    register_serializer(Plain, serializer=lambda p: p.n, deserializer=Factory().make)
    assert trip(Plain(5)) == ["made", 5]


def test_what_a_serializer_or_deserializer_raises_says_which_one():
    def failing(_):
        raise ValueError("no")

    register_serializer(Plain, serializer=failing, deserializer=str)
    with pytest.raises(ValueError, match="no") as sending:
        dumps(Plain(1))
    assert sending.value.__notes__ == ["raised by the serializer registered for Plain"]
    register_serializer(Plain, serializer=lambda p: p.n, deserializer=failing)
    with pytest.raises(ValueError, match="no") as receiving:
        trip(Plain(1))
    assert "failing, registered with register_serializer" in receiving.value.__notes__[0]


@pytest.mark.parametrize("cls", [3, "Plain", None, list[int], Plain(1)])
def test_what_is_no_class_is_refused_with_its_value(cls):
    with pytest.raises(TypeError, match="cls must be a class, not ") as error:
        register_serializer(cls, serializer=str, deserializer=str)
    assert repr(cls) in str(error.value)
    with pytest.raises(TypeError, match="cls must be a class, not "):
        deregister_serializer(cls)


@pytest.mark.parametrize("role", ["serializer", "deserializer"])
def test_what_is_not_callable_is_refused_with_its_value(role):
    functions = {"serializer": str, "deserializer": str, role: 17}
    with pytest.raises(TypeError, match=f"^{role} must be callable with one argument, not 17"):
        register_serializer(Plain, **functions)
    assert not has_custom()


class Meta(type):
    pass


NEVER_ASKED = [
    None, True, 1, 1.0, "s", b"b", bytearray(b"b"), [], (1,), {}, set(), frozenset([1]),
    trip, int, Meta("OfMeta", (), {}), pickle.PickleBuffer(b"b"),
]  # fmt: skip


@pytest.mark.parametrize("obj", NEVER_ASKED, ids=lambda obj: type(obj).__name__)
def test_types_for_which_no_pickler_asks_are_refused(obj):
    with pytest.raises(TypeError, match="would never be called"):
        register_serializer(type(obj), serializer=str, deserializer=str)
    # That this is so, not only said:
    asked = []

    class Asking(cloudpickle.Pickler):
        dispatch_table = {type(obj): lambda obj: asked.append(obj) or (str, ())}  # noqa: RUF012

    Asking(io.BytesIO(), protocol=5).dump(obj)
    assert asked == []


@pytest.mark.parametrize(
    "obj", [1j, slice(3), range(3), memoryview(b"m"), types, len], ids=lambda o: type(o).__name__
)
def test_other_builtin_types_can_be_registered(obj):
    register_serializer(type(obj), serializer=lambda _: "seen", deserializer=str)
    assert trip(obj) == "seen"


def test_a_table_once_taken_never_changes():
    register_serializer(Plain, serializer=lambda p: p.n, deserializer=str)
    before = registered()
    reducer = before[Plain]
    deregister_serializer(Plain)
    register_serializer(Counter, serializer=str, deserializer=str)
    assert before == {Plain: reducer}
    assert reducer(Plain(1)) == (custom._rebuild, (str, 1))
    assert "Plain" in repr(reducer)


def test_threads_that_register_at_once_lose_nothing():
    classes = [type(f"C{i}", (), {}) for i in range(200)]
    start = threading.Barrier(4)

    def register(mine):
        start.wait()
        for cls in mine:
            register_serializer(cls, serializer=id, deserializer=str)
            assert trip(cls()).isdigit()
            if cls.__name__.endswith("0"):
                deregister_serializer(cls)

    threads = [threading.Thread(target=register, args=(classes[i::4],)) for i in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    expected = {cls for cls in classes if not cls.__name__.endswith("0")}
    assert set(registered()) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_during_a_registration_has_the_table_and_can_register():
    register_serializer(Plain, serializer=lambda p: p.n, deserializer=str)
    with custom._lock:
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)  # ends the child, should it hang
            code = 1
            try:
                register_serializer(Counter, serializer=str, deserializer=str)
                code = 0 if set(registered()) == {Plain, Counter} else 2
            finally:
                os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert set(registered()) == {Plain}


def test_for_one_object_a_small_class_with_a_reduce_of_its_own_will_do():
    class ByPath:
        def __init__(self, database):
            self.database = database

        def __reduce__(self):
            return Database, (self.database.path,)

    database = Database()
    there = trip([ByPath(database)])[0]
    assert there.answer() == 42
    there.close()
    database.close()


def test_registrations_of_another_process_are_adopted_and_do_not_replace_those_made_here():
    custom.register_serializer(First, serializer=str, deserializer=len)
    there = pickle.loads(cloudpickle.dumps(list(custom.registered().values())))
    custom.deregister_serializer(First)
    custom.register_serializer(Second, serializer=repr, deserializer=len)
    table = custom.registered()
    custom.adopt([*there, custom.Reducer(Second, str, str)])
    assert custom.registered()[First].serializer is str
    assert custom.registered()[Second].serializer is repr
    assert First not in table


class First:
    pass


class Second:
    pass


@pytest.mark.parametrize("method", ["spawn", "loky"])
def test_a_serializer_that_cannot_reach_a_worker_is_no_reason_for_it_not_to_start(
    method, monkeypatch
):
    lock = threading.Lock()
    nowhere = types.ModuleType("nowhere_else")
    exec("def to_text(obj): return 'text'", vars(nowhere))
    monkeypatch.setitem(sys.modules, "nowhere_else", nowhere)
    register_serializer(First, serializer=lambda _: lock.locked(), deserializer=str)
    register_serializer(Second, serializer=nowhere.to_text, deserializer=str)
    register_serializer(Plain, serializer=str, deserializer=len)
    with shmpool.ShmExecutor(1, method) as executor:
        known = executor.submit(registered_here).result(60 * TIMEUNIT)
    assert known == [Plain.__name__]


def registered_here():
    return [cls.__name__ for cls in registered()]
