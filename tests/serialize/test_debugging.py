"""The pickler written in Python writes what the usual one writes, and its tracebacks show the way."""

from __future__ import annotations

import io
import pickle
import pickletools
import threading
import traceback

import numpy as np
import pytest
from libraries import SAMPLES, make

from shmpool.serialize import custom
from shmpool.serialize.byvalue import CloudPickler
from shmpool.serialize.debugging import DebugPickler
from shmpool.serialize.mainmodule import MainModule
from shmpool.serialize.pickling import dispatch_table

LIMIT = 4096


def write_with(pickler, obj, main):
    buffers, file = [], io.BytesIO()

    def in_band(buffer):
        view = buffer.raw()
        if view.nbytes >= LIMIT:
            buffers.append(view)
        return view.nbytes < LIMIT

    pickler(file, main or MainModule.nothing(), in_band, dispatch_table()).dump(obj)
    return file.getvalue(), buffers


def debug(obj, main=None):
    return write_with(DebugPickler, obj, main)


def usual(obj, main=None):
    return write_with(CloudPickler, obj, main)


def operations(stream):
    """The stream without its frames, which only group it."""
    return [(op.name, arg) for op, arg, _ in pickletools.genops(stream) if op.name != "FRAME"]


GLOBAL = [1, 2, 3]


def make_objects():
    class Local:
        shared = GLOBAL

        def method(self):
            return super().__repr__(), Local

    namespace = {"__name__": "__main__", "GLOBAL": GLOBAL}
    exec("def one():\n    return GLOBAL, two\ndef two():\n    return GLOBAL, one", namespace)
    loop = [1]
    loop.append(loop)
    shared = {"a": (1, 2.5, "x" * 300, None)}
    return {
        "containers": [shared, shared, {1, 2}, frozenset([3]), b"bytes" * 100, 1 << 70, loop],
        "lambda": lambda x=GLOBAL: (x, GLOBAL),
        "functions of __main__ that call each other": [namespace["one"], namespace["two"]],
        "local class": [Local, Local()],
        "property and method": [Local().method, property(len), classmethod(len)],
        "exception": ValueError("x", 3),
        "types": [type(None), type(...), int, threading.Thread, len, dict.fromkeys],
    }


@pytest.mark.parametrize("name", make_objects())
def test_it_writes_what_the_usual_pickler_writes(name):
    obj = make_objects()[name]
    usual(obj)  # the first time, classes and libraries take notes
    stream, buffers = debug(obj)
    other, other_buffers = usual(obj)
    assert operations(stream) == operations(other)
    assert [b.nbytes for b in buffers] == [b.nbytes for b in other_buffers]
    pickle.loads(stream, buffers=buffers)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_objects_of_libraries_go_the_same_way(sample):
    obj = make(sample)
    stream, buffers = debug(obj)
    other, other_buffers = usual(obj)
    assert [bytes(b) for b in buffers] == [bytes(b) for b in other_buffers]
    assert len(stream) == pytest.approx(len(other), abs=200)
    again = pickle.loads(stream, buffers=buffers)
    assert type(again) is type(obj) or sample.name in ("PickleBuffer", "memoryview")


def test_empty_read_only_buffers_are_no_trouble():
    # Both are the one b"", which Python's pickler meets twice without having remembered it.
    stream, _ = debug([np.frombuffer(b""), np.frombuffer(b"")])
    assert [array.size for array in pickle.loads(stream)] == [0, 0]


def test_what_the_receiver_has_in_its_main_goes_by_name():
    namespace = {"__name__": "__main__"}
    exec("def fn():\n    return 'a text of the function'", namespace)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("__main__.fn", namespace["fn"], raising=False)
        stream, _ = debug(namespace["fn"], MainModule.live())
        assert b"__main__" in stream
        assert b"a text of the function" not in stream
        assert pickle.loads(stream) is namespace["fn"]
    assert b"a text of the function" in debug(namespace["fn"])[0]


class Database:
    def __init__(self, lock):
        self.lock = lock


def test_registered_serializers_are_used(monkeypatch):
    monkeypatch.setattr(custom, "_reducers", {})
    with pytest.raises(TypeError):
        debug(Database(threading.Lock()))
    custom.register_serializer(Database, serializer=lambda d: 3, deserializer=Database)
    stream, _ = debug(Database(threading.Lock()))
    assert pickle.loads(stream).lock == 3


def test_the_traceback_shows_the_way_to_the_culprit():
    obj = {"a": (1, [Database(threading.Lock())])}
    with pytest.raises(TypeError, match="lock") as caught:
        debug(obj)
    frames = [frame.name for frame in traceback.extract_tb(caught.tb)]
    steps = [
        name for name in frames if name in ("save_dict", "save_tuple", "save_list", "save_reduce")
    ]
    assert steps == ["save_dict", "save_tuple", "save_list", "save_reduce", "save_dict"]
    variables = [frame.f_locals.get("obj") for frame, _ in traceback.walk_tb(caught.tb)]
    assert any(type(value) is Database for value in variables)
