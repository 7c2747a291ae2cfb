"""What `explain` says is what happens: the bytes add up, the paths lead there, the reasons are the right ones."""

from __future__ import annotations

import array
import dataclasses
import functools
import io
import pickle
import threading

import cloudpickle
import numpy as np
import pytest
from libraries import CONTIGUOUS, INLINE, SAMPLES, ZERO_COPY, make

from shmpool.config import Config
from shmpool.errors import SerializationError
from shmpool.serialize import custom, tracing, words
from shmpool.serialize.explain import Explanation, Way, explain
from shmpool.serialize.mainmodule import MainModule
from shmpool.serialize.pickling import OBJECT, Pickling

LIMIT = 4096
BIG = np.arange(10_000.0)


def told(obj, name="obj", *, located=lambda _: False, ticket=None, quiet=True, file=None):
    def way(stream, buffers):
        ways = ["shared" if located(buffer) else "copied" for buffer in buffers]
        return Way(ways, sum(map(len, stream)), ticket)

    return explain(
        obj,
        name,
        wanted=lambda buffer: buffer.nbytes >= LIMIT,
        way=way,
        config=Config(inline_limit=LIMIT),
        quiet=quiet,
        file=file,
    )


def ways(explanation):
    """Path to how, without the rest of the stream."""
    return {part.path: part.how for part in explanation.parts[:-1]}


def find(explanation, path, how=None):
    (part,) = (p for p in explanation.parts if p.path == path and how in (None, p.how))
    return part


def dump(obj, limit=LIMIT):
    dumped = Pickling(MainModule.nothing(), lambda b: b.nbytes >= limit).dumps(obj, OBJECT)
    return sum(map(len, dumped.stream)), [buffer.nbytes for buffer in dumped.buffers]


class Holder:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


@dataclasses.dataclass
class Data:
    x: object
    y: object = None


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: object


# ---- the sums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_the_bytes_add_up_to_what_is_sent_and_the_reason_is_right(sample):
    obj = make(sample)
    dump(obj)  # the first time, classes and libraries take notes
    length, buffers = dump(obj)
    explanation = told(obj)
    assert explanation.bytes_copied == sum(buffers)
    assert explanation.bytes_inline == length
    assert explanation.bytes_shared == 0
    for how in ("shared", "copied", "inline"):
        total = sum(part.nbytes for part in explanation.parts if part.how == how)
        assert total == getattr(explanation, f"bytes_{how}")
    largest = max(explanation.parts, key=lambda part: part.nbytes)
    if sample.travels == ZERO_COPY:
        assert largest.how == "copied"
        assert length < 0.1 * sum(buffers) or sample.library == "scikit-learn", str(explanation)
    else:
        assert largest.how == ("copied" if sample.travels == CONTIGUOUS else "inline")
        assert any(sample.travels in part.reason for part in explanation.parts)
        assert largest.advice or sample.travels == INLINE


def test_what_is_in_the_store_is_shared():
    stored, other = BIG.copy(), BIG.copy()
    address = stored.ctypes.data

    def located(buffer):
        start = np.frombuffer(buffer, np.uint8).ctypes.data
        return address <= start < address + stored.nbytes

    explanation = told({"a": stored, "slice": [stored[5000:]], "b": other}, located=located)
    assert ways(explanation) == {
        "obj['a']": "shared",
        "obj['slice'][0]": "shared",
        "obj['b']": "copied",
    }
    assert explanation.bytes_shared == stored.nbytes + stored[5000:].nbytes
    assert explanation.bytes_copied == other.nbytes
    assert find(explanation, "obj['a']").advice == ""


def test_an_object_that_occurs_twice_counts_once():
    explanation = told([BIG, {"again": BIG}])
    assert ways(explanation) == {"obj[0]": "copied"}
    assert explanation.bytes_copied == BIG.nbytes


def test_small_buffers_ride_in_the_message_and_have_lines_of_their_own():
    explanation = told({"small": np.zeros(4), "empty": np.zeros(0)})
    part = find(explanation, "obj['small']")
    assert (part.how, part.nbytes, part.type_name) == ("inline", 32, "numpy.ndarray")
    assert part.reason == "under the inline limit of 4,096 bytes: rides in the message"
    assert find(explanation, "obj['empty']").nbytes == 0


def test_two_empty_read_only_buffers_are_no_trouble():
    empty = np.zeros(0)
    empty.flags.writeable = False
    other = np.zeros((0, 3))
    other.flags.writeable = False
    assert set(ways(told([empty, other]))) == {"obj[0]", "obj[1]"}


# ---- the paths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        (BIG, {"obj": "copied"}),
        ([1, (2, BIG)], {"obj[1][1]": "copied"}),
        ({"a": {1: BIG}}, {"obj['a'][1]": "copied"}),
        (Data(1, [BIG]), {"obj.y[0]": "copied"}),
        (Slotted(BIG), {"obj.x": "copied"}),
        (Holder(model=Holder(weights=BIG)), {"obj.model.weights": "copied"}),
        (Holder(w=BIG).__init__, {"obj.__self__.w": "copied"}),
        (functools.partial(np.dot, BIG, k=[BIG[1:]]),
         {"obj.args[0]": "copied", "obj.keywords['k'][0]": "copied"}),
        ({"b": b"x" * 5000, "s": "y" * 5000}, {"obj['b']": "inline", "obj['s']": "inline"}),
        (np.array([None, BIG], object), {"obj[1]": "copied"}),
        ({"n": 1, "text": "short"}, {}),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_the_path_is_what_python_would_write(obj, expected):
    assert ways(told(obj)) == expected


def test_closures_and_globals_of_functions_are_named():
    inner = BIG[1:]
    namespace = {"__name__": "__main__", "TABLE": BIG}
    exec("def fn(x):\n    return TABLE[x]", namespace)

    def outer():
        return inner, namespace["fn"]

    explanation = told(namespace["fn"], "fn")
    assert ways(explanation) == {"fn.__globals__['TABLE']": "copied"}
    # A function of an importable module goes by name, with nothing of it.
    assert ways(told(dump)) == {}
    assert ways(told(lambda: inner)) == {"obj.__closure__['inner']": "copied"}
    assert "obj.__closure__['namespace']['TABLE']" in ways(told(outer))


def test_columns_of_tables_are_named():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": BIG, "b": BIG, "n": BIG.astype(int), "o": ["x" * 10] * len(BIG)})
    frame["o"] = frame["o"].astype(object)
    explanation = told({"df": frame})
    assert ways(explanation)["obj['df'][['a', 'b']]"] == "copied"
    assert ways(explanation)["obj['df']['n']"] == "copied"
    assert find(explanation, "obj['df']['o']").reason.startswith("object dtype")
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"a": BIG, "b": BIG})
    assert ways(told(table)) == {"obj['a']": "copied", "obj['b']": "copied"}


class MakesArrays:
    """Its reduction gives what no attribute holds."""

    def __init__(self, make_one):
        self.make_one = make_one

    def __reduce__(self):
        return Holder, (), {"made": self.make_one()}


class Text:
    def __init__(self, text):
        self.text = text


class PicklesItself:
    def __reduce__(self):
        return pickle.loads, (pickle.dumps({"array": BIG}),)


def test_what_a_reduction_makes_belongs_to_the_object_with_its_own_reason():
    explanation = told([MakesArrays(BIG.copy)])
    assert ways(explanation) == {"obj[0]": "copied"}
    part = find(explanation, "obj[0]")
    assert part.type_name == "test_explain.MakesArrays"
    assert part.reason == "made when it is pickled, and written each time"
    explanation = told([MakesArrays(lambda: BIG[::2])])
    assert find(explanation, "obj[0]").reason.startswith("not contiguous")
    explanation = told([MakesArrays(lambda: BIG.astype(object))])
    assert find(explanation, "obj[0]").reason.startswith("object dtype")
    explanation = told([PicklesItself()])
    part = find(explanation, "obj[0]")
    assert part.how == "inline"
    assert part.reason.startswith("a pickle stream of its own")


@pytest.mark.parametrize(
    ("obj", "reason"),
    [
        (BIG[:], "not in the store yet: written once, read without a copy"),
        (BIG.reshape(100, -1).T, "not in the store yet: written once, read without a copy"),
        (BIG[::2], "not contiguous: made contiguous, and written"),
        (np.broadcast_to(BIG, (3, BIG.size)), "not contiguous: made contiguous, and written"),
        (array.array("d", BIG), "not in the store yet: written, and copied on arrival"),
        ("x" * 2_000_000, "not in the store yet: written, and copied on arrival"),
        ("\xe9" * 2_000_000, "not in the store yet: written, and copied on arrival"),
    ],
    ids=["slice", "transposed", "strided", "broadcast", "array.array", "long text", "UTF-8"],
)
def test_why_buffers_are_copied(obj, reason):
    explanation = told({"it": obj})
    part = find(explanation, "obj['it']")
    assert (part.how, part.reason, part.type_name) == ("copied", reason, words.type_name(obj))
    assert part.nbytes == dump({"it": obj})[1][0]


def check_the_reason(obj, reason, advice):
    """Most of it is in the stream, for this reason."""
    part = max(told({"it": obj}).parts, key=lambda part: part.nbytes)
    assert (part.path, part.how, part.type_name) == ("obj['it']", "inline", words.type_name(obj))
    assert part.nbytes > LIMIT
    assert (part.reason, part.advice) == (reason, advice)


def test_why_memory_with_gaps_is_in_the_stream():
    check_the_reason(
        memoryview(BIG)[::2],
        "this memoryview pickles in band",
        "numpy.ascontiguousarray(it) travels through the store",
    )


def test_why_strings_of_any_length_are_in_the_stream():
    strings = getattr(getattr(np, "dtypes", None), "StringDType", None)
    if strings is None:
        pytest.skip("this numpy has none")
    check_the_reason(
        np.array(["some text"] * 1000, strings()),
        "variable-width strings have no buffer",
        "astype('U') or astype('S') has one",
    )


IN_BAND = "its dtype, or what its registered serializer makes of it, is pickled in band"


def test_why_the_names_of_fields_are_in_the_stream():
    check_the_reason(np.zeros(2, [("x" * 5000, "f8")]), IN_BAND, "")


def test_why_what_a_registered_serializer_makes_of_an_array_is_in_the_stream(monkeypatch):
    monkeypatch.setattr(custom, "_reducers", {})
    custom.register_serializer(
        np.ndarray, serializer=lambda a: a.tobytes(), deserializer=np.frombuffer
    )
    check_the_reason(BIG, IN_BAND, "")


def test_parts_of_tables_that_pandas_makes_contiguous_are_said_to_be():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(np.zeros((5000, 4)))
    for part in (frame.iloc[10:], frame.iloc[::2], frame.T.iloc[:, 10:]):
        assert "written once" in max(told(part.copy()).parts, key=lambda p: p.nbytes).reason
        values = part._mgr.blocks[0].values
        reason = max(told(part).parts, key=lambda p: p.nbytes).reason
        is_contiguous = values.flags.forc
        assert reason.startswith("not in the store" if is_contiguous else "not contiguous"), part


@pytest.mark.parametrize("obj", [None, 5, 2.5, True, ..., NotImplemented, int, "", b"", (), {}])
def test_the_smallest_objects_have_an_explanation_too(obj):
    explanation = told(obj, quiet=False)
    assert [part.path for part in explanation.parts] == ["obj"]
    assert explanation.bytes_inline == dump(obj)[0]


def test_what_is_too_long_for_a_message_is_copied_with_all_that_would_ride_in_it():
    obj = {"b": b"x" * 100_000, "small": np.zeros(10), "a": BIG}
    explanation = told(obj, ticket=57)
    assert [(part.path, part.how) for part in explanation.parts] == [
        ("obj['b']", "copied"),
        ("obj['small']", "copied"),
        ("obj['a']", "copied"),
        ("obj", "copied"),
        ("obj", "inline"),
    ]
    length, buffers = dump(obj)
    assert explanation.bytes_copied == length + sum(buffers)
    assert explanation.bytes_inline == explanation.parts[-1].nbytes == 57
    reason = find(explanation, "obj['b']").reason
    limit = f"{Config().message_limit:,}"
    assert reason.startswith("bytes pickles in band; a message of more than")
    assert f"more than {limit} bytes is copied into the store" in reason
    assert "written once" in find(explanation, "obj['a']").reason


def test_registered_serializers_are_followed(monkeypatch):
    monkeypatch.setattr(custom, "_reducers", {})
    text = Text("x" * 5000)
    assert find(told([text]), "obj[0].text").how == "inline"
    custom.register_serializer(
        Text, serializer=lambda t: np.frombuffer(t.text.encode(), np.uint8), deserializer=bytes
    )
    assert ways(told([text])) == {"obj[0]": "copied"}


# ---- big and odd objects ---------------------------------------------------------------------------------------------


def test_long_lists_of_numbers_are_quick_and_exact():
    obj = {"numbers": list(range(300_000)), "floats": tuple(BIG.tolist() * 10)}
    explanation = told(obj)
    assert explanation.bytes_inline == dump(obj)[0]
    part = find(explanation, "obj['numbers']")
    assert part.nbytes == pytest.approx(len(pickle.dumps(obj["numbers"], 5)), abs=500)
    assert "object by object" in part.reason
    assert "numpy array" in part.advice


def test_what_is_nested_too_deeply_to_look_inside_is_said_with_the_right_sums():
    obj = [BIG]
    for _ in range(270):
        obj = [obj]
    explanation = told(obj)
    assert explanation.bytes_copied == BIG.nbytes
    assert explanation.bytes_inline == dump(obj)[0]


def test_a_reduction_that_changes_its_mind_does_not_make_explain_lie():
    sizes = iter(range(10_000, 20_000, 1000))
    obj = {"fickle": MakesArrays(lambda: np.zeros(next(sizes))), "other": BIG}
    explanation = told(obj)
    # What was traced is not what was sent; so the paths are not told.
    assert [part.path for part in explanation.parts] == ["obj", "obj"]
    assert explanation.bytes_copied == 80_000 + BIG.nbytes


def test_cycles_end():
    loop = [BIG]
    loop.append(loop)
    assert ways(told(loop)) == {"obj[0]": "copied"}


def test_what_cannot_be_pickled_is_an_error_that_names_the_culprit():
    with pytest.raises(SerializationError, match=r"obj\['lock'\]"):
        told({"lock": threading.Lock()})


def test_explaining_copies_nothing_big():
    tracemalloc = pytest.importorskip("tracemalloc")
    obj = {"a": np.zeros(4_000_000), "m": np.zeros((2000, 1000)).T}
    tracemalloc.start()
    try:
        told(obj)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


# ---- what is printed -------------------------------------------------------------------------------------------------


def test_the_table_is_printed_and_returned(capsys):
    obj = {"a": BIG, "b": BIG[::2]}
    explanation = told(obj, quiet=False)
    printed = capsys.readouterr().out
    assert printed == f"{explanation}\n"
    lines = printed.splitlines()
    assert lines[0].startswith("80,000  copied  obj['a']  numpy.ndarray  not in the store yet")
    assert lines[1].startswith("40,000  copied  obj['b']")
    assert "not contiguous: made contiguous" in lines[1]
    assert lines[3].startswith("0 bytes shared, 120,000 copied, ")
    assert "- obj['b']: send the array that it is a view of" in lines[5]
    out = io.StringIO()
    told(obj, quiet=False, file=out)
    assert out.getvalue() == printed
    assert capsys.readouterr().out == ""


def test_parts_that_are_alike_share_a_line():
    explanation = told([np.zeros(10) for _ in range(500)])
    assert len(explanation.parts) == 501
    lines = str(explanation).splitlines()
    assert len(lines) < 12
    assert "... 495 more" in lines[5]
    assert "39,600" in lines[5]


def test_an_explanation_is_a_value_and_can_be_sent_itself():
    explanation = told([BIG])
    assert isinstance(explanation, Explanation)
    assert pickle.loads(pickle.dumps(explanation)) == explanation
    with pytest.raises(dataclasses.FrozenInstanceError):
        explanation.bytes_copied = 0
    assert cloudpickle.loads(cloudpickle.dumps(explanation)) == explanation
    assert tracing.PIECE_BYTES > 0
