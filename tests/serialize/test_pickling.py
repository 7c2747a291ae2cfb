"""Pickling: which way an object goes, what travels out of band, and what is said when it cannot travel."""

from __future__ import annotations

import array
import copyreg
import ctypes
import functools
import io
import multiprocessing
import pickle
import socket
import subprocess
import sys
import threading
import traceback
from multiprocessing import resource_sharer
from pathlib import Path

import cloudpickle
import numpy as np
import pytest

import shmpool
from shmpool.errors import SerializationError
from shmpool.serialize import custom, reductions
from shmpool.serialize.mainmodule import MainModule
from shmpool.serialize.pickling import ARGUMENTS, FUNCTION, OBJECT, RESULT, Pickling, loads


@pytest.fixture
def out_of_band() -> list[int]:
    """The sizes of the buffers that were asked about."""
    return []


@pytest.fixture
def plain(out_of_band) -> Pickling:
    """Pickling where buffers of 1000 bytes and more travel out of band."""

    def wanted(view: memoryview) -> bool:
        out_of_band.append(view.nbytes)
        return view.nbytes >= 1000

    return Pickling(MainModule.nothing(), wanted)


@pytest.fixture
def careful(monkeypatch) -> list[object]:
    """The objects for which cloudpickle was needed."""
    seen: list[object] = []
    original = cloudpickle.Pickler.dump

    def dump(self, obj):
        seen.append(obj)
        return original(self, obj)

    monkeypatch.setattr(cloudpickle.Pickler, "dump", dump)
    return seen


def there_and_back(plain: Pickling, obj: object) -> object:
    stream, buffers = plain.dumps(obj, RESULT)
    return loads(b"".join(stream), buffers)


# ---------------------------------------------------------------- which way


@pytest.mark.parametrize(
    "obj",
    [None, (1, "two", 3.0), {"a": [1]}, len, np.arange(5), functools.partial(max, 1), io.BytesIO],
    ids=repr,
)
def test_what_plain_pickle_can_do_needs_no_more(plain, careful, obj):
    back = there_and_back(plain, obj)
    assert type(back) is type(obj)
    assert not careful


def test_lambdas_and_closures_need_cloudpickle(plain, careful):
    n = 3
    assert there_and_back(plain, lambda x: x + n)(4) == 7
    assert len(careful) == 1


def test_local_classes_need_cloudpickle(plain, careful):
    class Local:
        value = 5

    assert there_and_back(plain, Local()).value == 5
    assert len(careful) == 1


def test_a_name_in_the_data_that_looks_like_main_costs_only_time(plain, careful):
    assert there_and_back(plain, ["__main__"]) == ["__main__"]
    assert len(careful) == 1


def test_buffers_are_not_doubled_when_cloudpickle_has_to_start_anew(plain):
    a = np.zeros(1000)
    stream, buffers = plain.dumps([a, lambda: 1], OBJECT)
    assert len(buffers) == 1
    assert loads(b"".join(stream), buffers)[1]() == 1


def test_what_the_receiver_has_in_main_goes_by_name(monkeypatch, careful):
    def task():
        return 1

    task.__module__, task.__qualname__ = "__main__", "task"
    monkeypatch.setattr("__main__.task", task, raising=False)
    by_name = Pickling(MainModule.live(), lambda _: False)
    stream, _ = by_name.dumps(task, FUNCTION)
    assert len(b"".join(stream)) < 50 and not careful
    stream, _ = by_name.dumps([task], ARGUMENTS)
    assert len(b"".join(stream)) < 50 and loads(b"".join(stream), []) == [task]
    stream, _ = Pickling(MainModule.nothing(), lambda _: False).dumps(task, FUNCTION)
    assert loads(b"".join(stream), []) is not task, "by value"


# ---------------------------------------------------------------- buffers


def test_only_buffers_of_the_wanted_size_travel_out_of_band(plain, out_of_band):
    small, large = np.zeros(999, np.uint8), np.zeros(1000, np.uint8)
    _, buffers = plain.dumps([small, large], OBJECT)
    assert out_of_band == [999, 1000]
    assert [view.nbytes for view in buffers] == [1000]


def test_buffers_are_views_of_the_objects_own_memory(plain):
    a = np.zeros(1000, np.uint8)
    _, (view,) = plain.dumps(a, OBJECT)
    a[7] = 9
    assert view[7] == 9


def test_what_comes_back_is_a_view_of_the_buffer(plain):
    a = np.arange(1000)
    stream, (view,) = plain.dumps(a, OBJECT)
    memory = bytearray(view)
    back = loads(b"".join(stream), [memoryview(memory)])
    memory[:8] = b"\xff" * 8
    assert back[0] == -1 and back.flags.writeable


@pytest.mark.parametrize(
    "a",
    [
        np.arange(3000).reshape(30, 100),
        np.arange(3000).reshape(30, 100).T,
        np.asfortranarray(np.ones((40, 50))),
        np.arange(3000)[::2],
        np.zeros(1000, [("a", "i4"), ("b", "f8")]),
        np.arange(2000, dtype=">i4"),
        np.zeros(2000, "datetime64[ns]"),
    ],
    ids=["C", "T", "F", "strided", "structured", "big-endian", "datetime"],
)
def test_arrays_of_all_kinds_come_back_equal(plain, a):
    back = there_and_back(plain, a)
    np.testing.assert_array_equal(back, a)
    assert back.dtype == a.dtype


def test_an_object_array_travels_in_the_stream(plain, out_of_band):
    a = np.array([{}, []] * 500, dtype=object)
    assert there_and_back(plain, a).shape == (1000,)
    assert not out_of_band


@pytest.mark.parametrize("code", [*"bBhHiIlLqQfd"])
def test_arrays_of_the_standard_library_come_back_equal(plain, code):
    a = array.array(code, [1] * 500)
    assert there_and_back(plain, a) == a


@pytest.mark.parametrize(
    "view",
    [
        memoryview(b"x" * 2000),
        memoryview(bytearray(2000))[5:],
        memoryview(b"abcdef")[::2],
        memoryview(np.arange(3000).reshape(30, 100)),
    ],
    ids=["bytes", "slice", "strided", "matrix"],
)
def test_memoryviews_come_back_equal(plain, view):
    back = there_and_back(plain, view)
    assert back == view and back.shape == view.shape and back.format == view.format


@pytest.mark.parametrize(
    "view",
    [
        memoryview(b""),
        memoryview(np.zeros((0, 3))),
        memoryview(np.zeros(500, ">i4")),
        memoryview(np.zeros(500, ">i4"))[::2],
        memoryview(np.zeros(500, [("x", "f8"), ("y", "i4")])),
        memoryview(b"12345678").cast("d", ()),
        memoryview(b"x" * 2000).cast("c"),
        memoryview(b"x" * 2000).cast("?"),
    ],
    ids=["empty", "empty-2d", "big-endian", "strided", "structured", "0-d", "chars", "bools"],
)
def test_unusual_memoryviews_come_back_equal(plain, view):
    back = there_and_back(plain, view)
    assert (back.shape, back.format, back.readonly) == (view.shape, view.format, view.readonly)
    assert back.tobytes() == view.tobytes()


def test_a_memoryview_whose_format_numpy_does_not_know_is_refused_when_it_is_sent(plain):
    with pytest.raises(SerializationError, match=r"memoryview of format '<P'.*valid"):
        plain.dumps(memoryview((ctypes.c_void_p * 3)()), OBJECT)


def test_a_memoryview_that_nobody_can_make_again_is_refused_when_it_is_sent(plain):
    view = memoryview(b"").cast("c")  # numpy calls this format "s"
    with pytest.raises(SerializationError, match="memoryview of format 'c'"):
        plain.dumps([view], OBJECT)


@pytest.mark.parametrize("empty", [array.array("d"), array.array("b")], ids=repr)
def test_empty_arrays_of_the_standard_library_come_back(plain, empty):
    assert there_and_back(plain, empty) == empty


# ---------------------------------------------------------------- arrays that numpy would copy


def frozen(a):
    a.flags.writeable = False
    return a


def out(plain, obj):
    """The object again, and the sizes of its buffers."""
    stream, buffers = plain.dumps(obj, OBJECT)
    memory = [memoryview(bytearray(buffer)) for buffer in buffers]
    return loads(b"".join(stream), memory), [buffer.nbytes for buffer in buffers]


PAIRS = [("x", "f8"), ("when", "M8[s]"), ("z", "i2")]


@pytest.mark.parametrize(
    "a",
    [
        frozen(np.arange(3000.0)),
        np.frombuffer(bytes(8000)),
        np.broadcast_to(3.0, (100, 10)),
        np.arange(3000).astype("M8[ms]"),
        np.arange(3000).astype("m8[D]").reshape(30, 100).T,
        frozen(np.arange(3000).astype("M8[ns]")),
        np.zeros(500, PAIRS),
        np.zeros(500, PAIRS)["z"],
        np.arange(6000)[::2],
        np.arange(6000.0)[::-3],
        np.arange(6000.0).reshape(10, 20, 30).transpose(1, 0, 2),
        frozen(np.arange(6000.0).reshape(10, 20, 30).transpose(2, 0, 1)),
        np.zeros(500, "V8"),
        np.arange(1000.0).reshape(1, 1000, 1)[:, :, ::-1],
        np.ma.array(np.arange(3000.0), mask=np.arange(3000) % 2),
    ],
    ids=lambda a: f"{a.dtype}-{a.shape}-{a.strides}",
)
def test_these_arrays_travel_out_of_band_and_arrive_writable(plain, a):
    back, sizes = out(plain, a)
    assert sizes[0] == a.nbytes
    assert back.flags.writeable
    assert type(back) is type(a) and back.dtype == a.dtype
    np.testing.assert_array_equal(back, a)


@pytest.mark.parametrize("size", [1, 10_000])
def test_a_read_only_array_arrives_writable_even_if_it_rides_in_the_stream(plain, size):
    back, _ = out(plain, frozen(np.zeros(size, np.uint8)))
    back[0] = 1


def test_the_memory_of_a_read_only_array_is_kept_while_it_is_on_its_way(plain):
    def make():
        return frozen(np.full(3000, 7.0))

    stream, (view,) = plain.dumps([make()], OBJECT)
    assert np.frombuffer(view)[-1] == 7
    del stream


def test_a_buffer_that_arrives_read_only_makes_a_read_only_array(plain):
    stream, buffers = plain.dumps(frozen(np.zeros(3000)), OBJECT)
    back = loads(b"".join(stream), [memoryview(bytes(buffers[0]))])
    assert not back.flags.writeable


@pytest.mark.parametrize("dtype", [object, [("a", "O"), ("b", "i4")]], ids=str)
def test_arrays_of_objects_come_back_equal(plain, dtype):
    a = np.zeros(100, dtype)
    back, _ = out(plain, frozen(a))
    assert back.dtype == a.dtype and back.tolist() == a.tolist() and back.flags.writeable


class Unit(np.ndarray):
    def __array_finalize__(self, obj):
        self.seen = obj
        self.unit = getattr(obj, "unit", "metre")


class Keeps(np.ndarray):
    """Its own way to keep an attribute."""

    unit = "metre"

    def __reduce__(self):
        function, args, state = super().__reduce__()
        return function, args, (*state, self.unit)

    def __setstate__(self, state):
        *state, self.unit = state
        super().__setstate__(tuple(state))


def test_a_subclass_gets_back_what_plain_pickle_gives_it(plain):
    a = np.arange(6000.0).reshape(2, 3000).T.view(Unit)
    a.unit = "inch"
    stream, buffers = plain.dumps([a, np.zeros(3, object)], OBJECT)
    assert [b.nbytes for b in buffers] == [a.nbytes]
    back = loads(b"".join(stream), [memoryview(bytearray(buffers[0]))])[0]
    plainly = pickle.loads(pickle.dumps(a))
    assert type(back) is Unit and vars(back) == vars(plainly) == {"seen": None, "unit": "metre"}
    np.testing.assert_array_equal(back, a)
    assert back.flags.writeable


def test_a_subclass_with_a_reduction_of_its_own_keeps_it(plain):
    a = np.arange(6000.0).view(Keeps)
    a.unit = "inch"
    back, sizes = out(plain, a)
    assert (type(back), back.unit, sizes) == (Keeps, "inch", [])


def test_a_local_subclass_travels_out_of_band_too(plain):
    class Local(np.ndarray):
        pass

    back, sizes = out(plain, np.arange(6000.0).view(Local))
    assert sizes == [48_000] and type(back).__name__ == "Local"


def test_a_class_is_learned_once(plain, monkeypatch):
    looks = []
    monkeypatch.setattr(reductions, "learn", lambda: looks.append(1))
    out(plain, [np.arange(6000.0), np.arange(20_000).astype(object)])
    assert not looks, "only a large stream that mentions the function of numpy is a reason to look"
    out(plain, np.arange(6000.0).view(Keeps))
    assert looks


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(
    "mask", [np.ma.nomask, True, np.arange(3000) % 3 == 0], ids=["no", "all", "some"]
)
def test_a_masked_array_keeps_mask_fill_value_and_hardness(plain, mask, hard):
    a = np.ma.array(np.arange(3000), mask=mask, hard_mask=hard, fill_value=-5)
    back, sizes = out(plain, a)
    plainly = pickle.loads(pickle.dumps(a))
    assert sizes[0] == a.data.nbytes
    assert (back.fill_value, back.hardmask) == (-5, hard)
    np.testing.assert_array_equal(back.data, a.data)
    np.testing.assert_array_equal(back.mask, plainly.mask)
    back[0] = 9
    assert a.data[0] == 0


def test_a_structured_masked_array_comes_back(plain):
    a = np.ma.array(np.zeros(3000, [("x", "f8"), ("n", "i2")]), mask=[(True, False)] * 3000)
    back, _ = out(plain, a)
    np.testing.assert_array_equal(back.mask, a.mask)
    assert back.fill_value == a.fill_value


# ---------------------------------------------------------------- files


def test_a_file_is_refused_and_the_standard_streams_go_by_name(plain, tmp_path, monkeypatch):
    with open(tmp_path / "file", "w+") as file, pytest.raises(SerializationError) as caught:
        plain.dumps({"log": file}, OBJECT)
    assert caught.value.culprit == "obj['log'] (a '_io.TextIOWrapper')"
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    assert there_and_back(plain, [sys.stdout, sys.stderr]) == [sys.stdout, sys.stderr]


# ---------------------------------------------------------------- tensors


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def test_tensors_travel_out_of_band_with_their_gradients_and_attributes(plain, torch):
    a = torch.arange(3000.0, requires_grad=True)
    b = torch.arange(6000, dtype=torch.bfloat16)[::2]
    b.note = "kept"
    z = torch.arange(2000.0).to(torch.complex64).conj()
    back, sizes = out(plain, [a, b, z, torch.nn.Parameter(torch.ones(2000))])
    assert sizes == [12_000, 12_000, 16_000, 8_000]
    assert back[0].requires_grad and back[0].is_leaf and torch.equal(back[0], a)
    assert back[1].note == "kept" and torch.equal(back[1], b) and back[1].stride() == (2,)
    assert back[2].is_conj() and torch.equal(back[2], z)
    assert type(back[3]) is torch.nn.Parameter
    back[1][0] = 5
    assert b[0] == 0


def test_views_of_one_storage_stay_views_of_one_storage(plain, torch):
    a = torch.arange(3000.0)
    back, sizes = out(plain, [a, a[1000:], a.view(30, 100).T])
    assert sizes == [12_000]
    back[0][1000] = -1
    assert back[1][0] == -1 and back[2][0, 10] == -1


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_empty_small_and_sparse_tensors_come_back(plain, torch):
    tensors = [torch.zeros(0), torch.tensor(1.5), torch.zeros(3, 0, 2), torch.eye(2000).to_sparse()]
    back, _ = out(plain, tensors)
    assert [t.shape for t in back] == [t.shape for t in tensors]
    assert torch.equal(back[3].to_dense(), torch.eye(2000))


def test_a_tensor_of_read_only_memory_is_a_copy_since_torch_would_crash_on_a_write(plain, torch):
    stream, buffers = plain.dumps(torch.arange(3000.0), OBJECT)
    back = loads(b"".join(stream), [memoryview(bytes(buffers[0]))])
    back[0] = 1


def test_the_gradient_of_a_computation_is_refused_as_torch_does(plain, torch):
    with pytest.raises(SerializationError, match=r"detach\(\)"):
        plain.dumps([torch.ones(3000, requires_grad=True) * 2], OBJECT)


def test_torch_is_not_imported(tmp_path):
    code = (
        "import sys; from shmpool.serialize.pickling import *; from shmpool.serialize.mainmodule import MainModule\n"
        "Pickling(MainModule.nothing(), lambda _: False).dumps([1], OBJECT); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(shmpool.__file__).parents[1])


# ---------------------------------------------------------------- sockets and connections


@pytest.fixture
def sharer():
    """End the thread that hands out descriptors."""
    yield
    resource_sharer.stop()


def test_a_socket_travels_as_a_descriptor(plain, sharer):
    one, other = socket.socketpair()
    with one, other, there_and_back(plain, {"socket": one})["socket"] as copy:
        copy.sendall(b"hello")
        assert other.recv(5) == b"hello"


def test_a_connection_travels_as_a_descriptor(plain, sharer):
    one, other = multiprocessing.Pipe()
    with one, other, there_and_back(plain, [one])[0] as copy:
        assert copy.fileno() != one.fileno()
        copy.send("hello")
        assert other.recv() == "hello"


# ---------------------------------------------------------------- what cannot travel


def test_a_lock_is_an_error_that_says_where_it_is(plain):
    with pytest.raises(SerializationError) as caught:
        plain.dumps((([1, {"lock": threading.Lock()}],), {}), ARGUMENTS)
    assert caught.value.culprit == "args[0][1]['lock'] (a '_thread.lock')"
    assert "the arguments" in str(caught.value)


def test_a_keyword_argument_is_found_too(plain):
    with pytest.raises(SerializationError) as caught:
        plain.dumps(((1,), {"x": [threading.Lock()]}), ARGUMENTS)
    assert caught.value.culprit == "kwargs['x'][0] (a '_thread.lock')"


def test_a_lock_of_multiprocessing_is_an_error(plain):
    with pytest.raises(SerializationError, match="inheritance"):
        plain.dumps(multiprocessing.get_context("spawn").Lock(), OBJECT)


def nested(depth: int) -> list[object]:
    thing: list[object] = []
    for _ in range(depth):
        thing = [thing]
    return thing


def test_what_is_nested_too_deeply_is_an_error(plain):
    with pytest.raises(SerializationError, match=r"[Rr]ecursion"):
        plain.dumps(nested(100_000), RESULT)


class Raises:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self):
        raise self.error


def test_what_raises_while_it_is_pickled_is_an_error(plain):
    with pytest.raises(SerializationError) as caught:
        plain.dumps([Raises(ValueError("not me"))], OBJECT)
    assert caught.value.reason == "ValueError: not me"
    assert caught.value.culprit is not None and caught.value.culprit.startswith("obj[0]")
    assert isinstance(caught.value.__cause__, ValueError)


class SpeechlessError(Exception):
    def __str__(self):
        raise ZeroDivisionError("str")


def test_an_error_that_cannot_say_what_it_is_has_its_name(plain):
    with pytest.raises(SerializationError) as caught:
        plain.dumps([Raises(SpeechlessError())], OBJECT)
    assert caught.value.reason == "SpeechlessError"
    assert caught.value.culprit == "obj[0] (a 'test_pickling.Raises')"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_what_ends_a_program_is_no_error_of_pickling(plain, error):
    with pytest.raises(type(error)):
        plain.dumps([Raises(error)], OBJECT)


def test_the_object_is_not_changed_by_a_failure(plain):
    thing = {"a": np.zeros(1000), "lock": threading.Lock()}
    before = dict(thing)
    with pytest.raises(SerializationError):
        plain.dumps(thing, OBJECT)
    assert thing == before


def test_what_the_objects_own_code_raises_on_arrival_is_raised(plain):
    stream, buffers = plain.dumps(BadOnArrival(), OBJECT)
    with pytest.raises(ZeroDivisionError):
        loads(b"".join(stream), buffers)


class BadOnArrival:
    def __reduce__(self):
        return divmod, (1, 0)


def test_with_pickle_debug_the_traceback_shows_the_way(monkeypatch):
    def frames():
        with pytest.raises(SerializationError) as caught:
            Pickling(MainModule.nothing(), lambda _: True).dumps([{"a": threading.Lock()}], OBJECT)
        return [frame.name for frame in traceback.extract_tb(caught.value.__cause__.__traceback__)]

    assert "save_dict" not in frames()
    monkeypatch.setenv("SHMPOOL_PICKLE_DEBUG", "1")
    assert {"save_list", "save_dict"} <= set(frames())


# ---------------------------------------------------------------- custom serializers


class Handle:
    def __init__(self, name: str) -> None:
        self.name, self.lock = name, threading.Lock()


@pytest.fixture
def registered():
    custom.register_serializer(Handle, serializer=lambda h: h.name, deserializer=Handle)
    yield
    custom.deregister_serializer(Handle)


def test_a_registered_class_travels(plain, registered):
    assert there_and_back(plain, [Handle("x")])[0].name == "x"


def test_a_class_that_is_no_more_registered_does_not_travel(plain, registered):
    there_and_back(plain, Handle("x"))
    custom.deregister_serializer(Handle)
    with pytest.raises(SerializationError):
        plain.dumps(Handle("x"), OBJECT)


def test_a_deserializer_without_a_name_travels_with_the_object(plain):
    prefix = ">"
    custom.register_serializer(
        Handle, serializer=lambda h: h.name, deserializer=lambda name: prefix + name
    )
    try:
        stream, buffers = plain.dumps(Handle("x"), OBJECT)
    finally:
        custom.deregister_serializer(Handle)
    assert loads(b"".join(stream), buffers) == ">x"


def test_large_arrays_in_a_serialized_state_travel_out_of_band(plain):
    custom.register_serializer(
        Handle, serializer=lambda h: np.zeros(1000), deserializer=lambda a: a
    )
    try:
        _, buffers = plain.dumps(Handle("x"), OBJECT)
    finally:
        custom.deregister_serializer(Handle)
    assert len(buffers) == 1


def test_reductions_that_were_registered_with_copyreg_are_used(plain, careful):
    copyreg.pickle(Handle, lambda h: (Handle, (h.name + "!",)))
    try:
        assert there_and_back(plain, Handle("x")).name == "x!"
    finally:
        del copyreg.dispatch_table[Handle]
    assert not careful
    with pytest.raises(SerializationError):
        plain.dumps(Handle("x"), OBJECT)


def test_large_buffers_that_are_not_wanted_out_of_band_are_part_of_the_stream():
    pickling = Pickling(MainModule.nothing(), lambda view: False)
    obj = [np.arange(50_000.0), {"a": np.arange(7)}]
    stream, buffers = pickling.dumps(obj, OBJECT)
    assert not buffers
    back = loads(b"".join(stream), [])
    assert np.array_equal(back[0], obj[0])
    assert np.array_equal(back[1]["a"], obj[1]["a"])


@pytest.mark.parametrize("make", [lambda: np.zeros((0, 3)), lambda: np.array([1, [2]], object)])
def test_of_a_class_that_was_learned_what_has_no_buffer_goes_its_own_way(make):
    class Learned(np.ndarray):
        pass

    Learned.__qualname__ = "Learned"
    globals()["Learned"] = Learned
    try:
        pickling = Pickling(MainModule.nothing(), lambda view: view.nbytes >= 1000)
        large = np.arange(10_000.0).view(Learned)
        stream, buffers = pickling.dumps([large], OBJECT)
        assert len(buffers) == 1, "it was learned"
        obj = make().view(Learned)
        stream, buffers = pickling.dumps([obj], OBJECT)
        assert not buffers
        (back,) = loads(b"".join(stream), [])
        assert type(back) is Learned
        assert back.shape == obj.shape
        assert back.dtype == obj.dtype
        assert list(back.flat) == list(obj.flat)
    finally:
        del globals()["Learned"]


def test_a_storage_that_is_shared_stays_shared(torch):
    """torch hands over its descriptor, as ever, and not a copy of what is in it."""
    pickling = Pickling(MainModule.nothing(), lambda view: view.nbytes >= 1000)
    tensor = torch.arange(3000.0).share_memory_()
    stream, buffers = pickling.dumps([tensor.untyped_storage()], ARGUMENTS)
    assert not buffers
    (back,) = loads(b"".join(stream), [])
    torch.tensor([], dtype=torch.float32).set_(back)[0] = 7
    assert tensor[0] == 7
    resource_sharer.stop()


def test_arrow_strings_in_several_pieces_arrive_as_they_were(plain):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    words = [pandas.Series([text] * 2000, dtype="string[pyarrow]") for text in ("one", "two")]
    both = pandas.concat(words)
    assert both.array._pa_array.num_chunks == 2
    back, _ = out(plain, both)
    assert back.equals(both)
