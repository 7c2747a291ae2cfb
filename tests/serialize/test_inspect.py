"""What cannot be pickled is found, named as Python would write it, within bounds and whatever the objects do."""

from __future__ import annotations

import abc
import collections
import dataclasses
import functools
import gc
import io
import itertools
import pickle
import re
import sqlite3
import sys
import threading
import time
import tracemalloc
import types
import weakref

import cloudpickle
import numpy as np
import pytest
from support import TIMEUNIT

from shmpool.serialize import custom, parts, search
from shmpool.serialize import inspect as inspection
from shmpool.serialize.inspect import Failure, culprit_path, inspect_serializability

LOCK = threading.Lock()
NO_LOCK = "cannot pickle '_thread.lock' object"

# Functions of a module that can be imported go by reference, and never fail: those under test are made by exec, as if
# typed at a prompt.
SCRIPT = """
def reads_global(x):
    return LOCK, x

def reads_global_in_nested_code(x):
    def inner():
        return [LOCK for _ in range(x)]
    return inner

def ignores_global(x):
    return x.LOCK

def calls_helper():
    return reads_global(1)

def calls_itself(n):
    return calls_itself(n - 1), LOCK

def calls_only_itself(n):
    return calls_only_itself(n - 1)

def with_defaults(a, b=LOCK, *, c={"key": LOCK}):
    pass

def with_attribute():
    pass

with_attribute.note = [LOCK]

def make_closure(conn):
    count = 1
    def closure():
        return conn, count
    return closure

class WithClassAttribute:
    shared = LOCK

class UsesSuper:
    def method(self):
        return super().__repr__(), LOCK
"""


@pytest.fixture
def script():
    namespace = {"__name__": "__main__", "LOCK": LOCK}
    exec(SCRIPT, namespace)  # as typed at a prompt
    return types.SimpleNamespace(**namespace)


def paths(obj, name="obj", **kwargs):
    ok, failures = inspect_serializability(obj, name, quiet=True, **kwargs)
    assert ok == (not failures)
    return [failure.path for failure in failures]


class Holder:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Slotted:
    __slots__ = ("__private", "empty", "visible")

    def __init__(self):
        self.__private = LOCK
        self.visible = 1


class SlottedChild(Slotted):
    def __init__(self):
        super().__init__()
        self.extra = [LOCK]


@dataclasses.dataclass
class Data:
    x: object
    y: object = None


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenData:
    x: object
    y: object = None


class ListOfOurs(list):
    pass


class WithGetstate:
    def __init__(self):
        self.lock = LOCK
        self.other = LOCK

    def __getstate__(self):
        return {"lock": self.lock, "made up": [LOCK]}


class LeavesItOut:
    def __init__(self):
        self.lock = LOCK

    def __getstate__(self):
        return {}


class WithReduce:
    def __init__(self):
        self.handle = [LOCK]

    def __reduce__(self):
        return WithReduce, (self.handle, {"fresh": LOCK})


# ---- where -----------------------------------------------------------------------------------------------------------


def test_what_can_be_pickled_is_ok_and_has_no_failures():
    for obj in (1, "x", [1, {"a": (2, None)}], np.zeros(3), Data(1), len, Holder, lambda x: x):
        assert inspect_serializability(obj, quiet=True) == (True, [])
        assert culprit_path(obj, "args") is None


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        (LOCK, ["obj"]),
        ([1, LOCK, (2, LOCK)], ["obj[1]", "obj[2][1]"]),
        ({"a": 1, "lock": LOCK, 3: {None: LOCK}}, ["obj['lock']", "obj[3][None]"]),
        ({(1, "b"): LOCK, Data: LOCK}, ["obj[(1, 'b')]", "obj[<type>]"]),
        ({LOCK: 1, (2, LOCK): 3}, ["obj.keys()[0]", "obj.keys()[1][1]"]),
        ({"s": {1, LOCK}, "f": frozenset([LOCK])}, ["obj['s']{...}", "obj['f']{...}"]),
        (collections.defaultdict(list, a=LOCK), ["obj['a']"]),
        (collections.OrderedDict(a=LOCK), ["obj['a']"]),
        (collections.deque([1, LOCK]), ["obj[1]"]),
        (ListOfOurs([1, LOCK]), ["obj[1]"]),
        (Holder(config={"lock": LOCK}, n=1), ["obj.config['lock']"]),
        (Holder(**{"not a name": LOCK}), ["obj.__dict__['not a name']"]),
        (Slotted(), ["obj._Slotted__private"]),
        (SlottedChild(), ["obj.extra[0]", "obj._Slotted__private"]),
        (Data(1, [LOCK]), ["obj.y[0]"]),
        (FrozenData(LOCK, 2), ["obj.x"]),
        (WithGetstate(), ["obj.lock", "obj.__getstate__()['made up'][0]"]),
        (WithReduce(), ["obj.handle[0]", "obj.__reduce_ex__(5)[1][1]['fresh']"]),
        (Holder(lock=LOCK).__init__, ["obj.__self__.lock"]),
        (LOCK.acquire, ["obj.__self__"]),
        (functools.partial(len, LOCK, k={"z": LOCK}), ["obj.args[0]", "obj.keywords['k']['z']"]),
        (functools.partial(LOCK.acquire, 1), ["obj.func.__self__"]),
        (np.array([1, "a", LOCK], dtype=object), ["obj[2]"]),
        (np.array([[1, LOCK], [LOCK, 2]], dtype=object), ["obj[0, 1]", "obj[1, 0]"]),
        (types.SimpleNamespace(lock=LOCK), ["obj.lock"]),
        (ValueError("x", LOCK), ["obj.args[1]"]),
        ([(i for i in ()), sys._getframe()], ["obj[0]", "obj[1]"]),
    ],
    ids=lambda value: (
        re.sub(" at 0x\\w+", "", str(value)) if isinstance(value, list) else type(value).__name__
    ),
)
def test_the_path_is_what_python_would_write(obj, expected):
    assert paths(obj) == expected


def test_exactly_the_innermost_are_reported_with_type_reason_parent_and_depth():
    ok, failures = inspect_serializability({"a": [Holder(lock=LOCK)]}, "config", quiet=True)
    assert not ok
    assert failures == [
        Failure(
            path="config['a'][0].lock",
            type_name="_thread.lock",
            reason=NO_LOCK,
            parent="config['a'][0]",
            depth=3,
        )
    ]
    assert str(failures[0]) == f"config['a'][0].lock (a '_thread.lock'): {NO_LOCK}"


def test_the_same_culprit_in_two_places_is_reported_twice():
    shared = Holder(lock=LOCK)
    assert paths([LOCK, LOCK]) == ["obj[0]", "obj[1]"]
    # An object that was searched before is not searched again: its culprits are known.
    assert paths([shared, shared]) == ["obj[0].lock"]


def test_an_event_shows_its_lock_once_and_not_also_the_lock_s_methods():
    assert paths(threading.Event()) == ["obj._cond._lock"]


def test_a_lock_that_getstate_leaves_out_is_no_failure():
    assert paths([LeavesItOut(), LOCK]) == ["obj[1]"]


# ---- functions and classes -------------------------------------------------------------------------------------------


def test_globals_closures_defaults_and_attributes_of_functions_are_walked(script):
    conn = sqlite3.connect(":memory:")
    try:
        closure = script.make_closure(conn)
        ok, failures = inspect_serializability(closure, quiet=True)
        assert not ok
        assert [(f.path, f.type_name) for f in failures] == [
            ("closure.__closure__['conn']", "sqlite3.Connection")
        ]
    finally:
        conn.close()
    assert paths(script.reads_global, "fn") == ["fn.__globals__['LOCK']"]
    assert paths(script.reads_global_in_nested_code, "fn") == ["fn.__globals__['LOCK']"]
    assert paths(script.with_defaults, "fn") == [
        "fn.__defaults__[0]",
        "fn.__kwdefaults__['c']['key']",
    ]
    assert paths(script.with_attribute, "fn") == ["fn.note[0]"]
    assert paths(script.calls_helper, "fn") == [
        "fn.__globals__['reads_global'].__globals__['LOCK']"
    ]


def test_globals_that_the_code_does_not_use_are_not_walked(script):
    assert paths(script.ignores_global) == []


def test_recursive_functions_end(script):
    assert paths(script.calls_itself, "fn") == ["fn.__globals__['LOCK']"]
    assert paths(script.calls_only_itself, "fn") == []


def test_classes_pickled_by_value_are_walked(script):
    assert paths(script.WithClassAttribute, "C") == ["C.shared"]
    assert paths([script.WithClassAttribute()]) == ["obj[0].__class__.shared"]
    assert paths(script.UsesSuper(), "o") == ["o.__class__.method.__globals__['LOCK']"]


def test_an_abstract_class_s_internals_are_not_blamed():
    class Base(abc.ABC):  # noqa: B024  # what matters is its metaclass
        __slots__ = ("__dict__", "n")

        @property
        def m(self):
            return super()

    obj = Base()
    obj.lock = LOCK
    assert paths(obj) == ["obj.lock"]
    assert paths([Base, LOCK]) == ["obj[1]"]

    class Broken(Base):
        shared = LOCK

    assert paths(Broken, "C") == ["C.shared"]


def test_properties_and_class_methods_are_looked_into(script):
    class Local:
        value = property(script.reads_global)
        make = classmethod(script.reads_global)

    assert paths(Local, "C") == [
        "C.value.fget.__globals__['LOCK']",
    ]


def test_a_module_made_at_run_time_is_walked():
    module = types.ModuleType("made_here")
    module.config = {"lock": LOCK}
    assert paths(module, "m") == ["m.config['lock']"]


def test_default_names_are_the_function_s_own_or_obj():
    _, failures = inspect_serializability(lambda: LOCK, quiet=True)
    assert failures[0].path == "fn.__globals__['LOCK']"
    local = LOCK

    def named():
        return local

    _, failures = inspect_serializability(named, quiet=True)
    assert failures[0].path == "named.__closure__['local']"
    _, failures = inspect_serializability([LOCK], quiet=True)
    assert failures[0].path == "obj[0]"


# ---- pandas ----------------------------------------------------------------------------------------------------------


def test_cells_of_data_frames_are_named():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"n": [1, 2], "o": ["x", LOCK]})
    assert paths(frame, "df") == ["df['o'].iloc[1]"]
    assert paths(pandas.Series([1, LOCK]), "s") == ["s.iloc[1]"]
    (path,) = paths(pandas.Series(pandas.Categorical.from_codes([0], [LOCK])), "s")
    assert path.startswith("s.array."), "what a series of another dtype is made of is in there"
    frame = pandas.DataFrame({"n": [1, 2]})
    frame.attrs["lock"] = LOCK
    assert paths(frame, "df") == ["df.attrs['lock']"]


# ---- hostile objects -------------------------------------------------------------------------------------------------


class Hostile:
    """Raises wherever it is touched."""

    def __getattr__(self, name):
        raise ZeroDivisionError(name)

    def __repr__(self):
        raise ZeroDivisionError("repr")

    def __reduce__(self):
        raise ZeroDivisionError("no\n  way")

    def __eq__(self, other):
        raise ZeroDivisionError("eq")

    def __bool__(self):
        raise ZeroDivisionError("bool")

    __hash__ = None


class Liar:
    """Says that it is something else, or refuses to say."""

    @property
    def __class__(self):
        raise ZeroDivisionError("class")

    @property
    def __dict__(self):
        raise ZeroDivisionError("dict")

    def __reduce_ex__(self, protocol):
        raise ZeroDivisionError("reduce")


class BadIterator(dict):
    def items(self):
        yield "a", LOCK
        raise ZeroDivisionError("items")


class SilentError(Exception):
    def __str__(self):
        raise ZeroDivisionError("str")


class RaisesSilentError:
    def __reduce__(self):
        raise SilentError


class BadReduce:
    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        return self.value


def test_objects_that_raise_everywhere_are_survived_and_blamed():
    ok, failures = inspect_serializability([1, Hostile()], quiet=True)
    assert not ok
    assert [(f.path, f.reason) for f in failures] == [("obj[1]", "no way")]
    assert paths({"k": Liar()}) == ["obj['k']"]
    assert paths([BadIterator()]) == ["obj[0]"]
    _, failures = inspect_serializability(RaisesSilentError(), quiet=True)
    assert failures[0].reason == "SilentError"
    assert culprit_path((Hostile(),), "args") == "args[0] (a 'test_inspect.Hostile')"


class Nameless(type):
    """Its classes do not say where they are from."""

    @property
    def __module__(cls):
        raise ZeroDivisionError("module")


class Unnamed(metaclass=Nameless):
    def __reduce__(self):
        raise TypeError("no")


def test_objects_whose_class_does_not_say_its_module_are_named_all_the_same():
    _, (failure,) = inspect_serializability([Unnamed()], quiet=True)
    assert (failure.path, failure.type_name) == ("obj[0]", "test_inspect.Unnamed")
    assert culprit_path([Unnamed()], "args") == "args[0] (a 'test_inspect.Unnamed')"


class RaisesKeyError:
    def __reduce__(self):
        return {}["missing"]


class GoesRound:
    def __reduce__(self):
        error = ValueError("no")
        error.__cause__ = error
        raise error


def test_what_is_raised_is_told_in_words():
    _, (missing, round_and_round) = inspect_serializability(
        [RaisesKeyError(), GoesRound()], quiet=True
    )
    assert missing.reason == "KeyError: 'missing'", "the key alone would say nothing"
    assert round_and_round.reason == "no"


def test_where_the_search_itself_fails_there_is_no_path_and_no_other_error(monkeypatch):
    """It is made while an exception is, which matters more."""

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(inspection.Search, "run", fail)
    assert culprit_path([LOCK], "args") is None


def test_near_the_limit_of_recursion_there_may_be_no_path_but_there_is_no_other_error():
    """Where an exception is made that names the culprit, nothing else may be raised in its place."""

    def below(levels: int) -> str | None:
        return below(levels - 1) if levels else culprit_path([Hostile()], "args")

    found = set()
    limit = sys.getrecursionlimit()
    for levels in range(limit - 300, limit):
        try:
            found.add(below(levels))
        except RecursionError:  # not even culprit_path could be called
            break
    assert "args[0] (a 'test_inspect.Hostile')" in found
    assert all(path is None or " args" in f" {path}" for path in found), found


@pytest.mark.parametrize("value", [3, (), (1,), (1, 2), (len, 3), (len, (), 1, 2), (len,) * 9])
def test_reductions_that_make_no_sense_are_blamed_on_their_object(value):
    assert paths([BadReduce(value)]) == ["obj[0]"]


def test_an_object_s_own_reduction_is_to_blame_unless_an_attribute_fails_for_the_same_reason():
    class Own:
        def __init__(self):
            self.lock = LOCK

        def __reduce__(self):
            raise ValueError("not today")

    class DumpsInside:
        def __init__(self):
            self.fine = [1]
            self.lock = LOCK

        def __reduce__(self):
            return bytes, (pickle.dumps(self.__dict__),)

    assert paths(Own()) == ["obj"]
    assert paths(DumpsInside()) == ["obj.lock"]


def test_what_fails_only_as_a_whole_is_blamed_as_a_whole():
    def dumps(obj):
        if type(obj) is Data:
            raise ValueError("Data is not welcome")

    assert paths(Data([1], {"a": 2}), dumps=dumps) == ["obj"]


def test_keyboard_interrupt_and_system_exit_pass():
    for kind in (KeyboardInterrupt, SystemExit):

        class Stops:
            def __reduce__(self, kind=kind):
                raise kind

        with pytest.raises(kind):
            inspect_serializability([Stops()], quiet=True)


# ---- cycles, depth, size ---------------------------------------------------------------------------------------------


def test_cycles_end_and_the_culprit_in_them_is_found():
    loop = [1]
    loop.append(loop)
    loop.append({"back": loop, "lock": LOCK})
    assert paths(loop) == ["obj[2]['lock']"]
    first, second = Holder(), Holder()
    first.other, second.other = second, first
    second.lock = LOCK
    assert paths(first) == ["obj.other.lock"]
    assert paths([first, second]) == ["obj[0].other.lock"]


def test_a_cycle_that_fails_only_as_a_whole_is_blamed_on_the_object_that_closes_it():
    def dumps(obj):
        if type(obj) is Holder or (type(obj) is list and obj and type(obj[0]) is Holder):
            raise ValueError("no Holder")

    holder = Holder()
    holder.parts = [holder]
    assert paths(holder, dumps=dumps) == ["obj"]


def nested(levels, innermost=1, wrap=lambda x: [x]):
    obj = innermost
    for _ in range(levels):
        obj = wrap(obj)
    return obj


TOO_DEEP = 30_000
ADVICE = "raise sys.setrecursionlimit" if sys.version_info < (3, 12) else ": flatten it"


@pytest.mark.parametrize(
    ("obj", "path"),
    [
        ((nested(TOO_DEEP),), "args[0][0][0]..."),
        ((1, {"k": nested(TOO_DEEP)}), "args[1]['k'][0]..."),
        ((nested(TOO_DEEP, wrap=lambda x: {"a": Data(x)}),), "args[0]['a'].x..."),
    ],
    ids=["lists", "a dict of lists", "objects"],
)
def test_too_deep_nesting_is_said_clearly(obj, path):
    sentence = culprit_path(obj, "args")
    assert sentence is not None
    assert sentence.startswith("nested deeper than Python's recursion limit")
    assert f" at {path}: " in sentence
    assert ADVICE in sentence
    _, failures = inspect_serializability(obj, "args", quiet=True)
    assert [failure.path for failure in failures] == [path]
    assert "nested deeper" in failures[0].reason


def test_nesting_just_over_the_limit_is_depth_too():
    # The object passes from some level on, which is not where the trouble is.
    low, high = 10, TOO_DEEP
    while high - low > 1:
        middle = (low + high) // 2
        if inspect_serializability(nested(middle), quiet=True)[0]:
            low = middle
        else:
            high = middle
    sentence = culprit_path(nested(high + 3), "args")
    assert sentence is not None
    assert sentence.startswith("nested deeper")


def test_a_reduction_that_calls_itself_without_end_is_not_mistaken_for_depth():
    class Endless:
        def __reduce__(self):
            return self.__reduce__()

    _, failures = inspect_serializability({"k": Endless()}, quiet=True)
    assert [failure.path for failure in failures] == ["obj['k']"]
    assert failures[0].reason.startswith("its own reduction does not end")


def test_an_object_that_reduces_to_new_objects_for_ever_ends():
    class Grows:
        def __reduce__(self):
            return Grows, (Grows(),)

    sentence = culprit_path([Grows()], "args")
    assert sentence is not None
    assert "nested deeper" in sentence


def test_a_culprit_deep_down_is_found_and_beyond_the_limit_the_reason_says_so():
    assert paths(nested(100, LOCK)) == ["obj" + "[0]" * 100]
    levels = search.MAX_DEPTH + 50
    _, (failure,) = inspect_serializability(nested(levels, LOCK), quiet=True)
    assert failure.depth == search.MAX_DEPTH
    assert not failure.complete
    assert f"{search.MAX_DEPTH} levels down" in failure.reason
    sentence = culprit_path(nested(levels, LOCK), "args")
    assert sentence is not None
    assert sentence.startswith("somewhere in args[0]")
    assert " ... " in sentence
    assert len(sentence) < 500


def test_huge_containers_are_tried_up_to_a_limit_with_a_note(monkeypatch):
    monkeypatch.setattr(parts, "MAX_MEMBERS", 1000)
    obj = [(i,) for i in range(3000)] + [LOCK]
    _, (failure,) = inspect_serializability({"big": obj}, quiet=True)
    assert failure.path == "obj['big']"
    assert not failure.complete
    assert "only the first 1,000 of 3,001 members were tried" in failure.reason
    assert culprit_path((obj,), "args") == "somewhere in args[0] (a 'list')"
    assert culprit_path(obj, "args") is None, "that it is somewhere in there is no news"


def test_one_culprit_among_many_takes_few_trials():
    trials = []

    def dumps(obj):
        trials.append(obj)
        return cloudpickle.dumps(obj)

    obj = {i: [i] for i in range(4096)}
    obj[3000] = LOCK
    assert paths(obj, dumps=dumps) == ["obj[3000]"]
    assert len(trials) < 50


def test_the_number_of_failures_is_bounded_and_the_tree_says_so():
    out = io.StringIO()
    ok, failures = inspect_serializability([threading.Lock() for _ in range(500)], print_file=out)
    assert not ok
    assert len(failures) == inspection.MAX_FAILURES
    assert failures[-1].path == f"obj[{inspection.MAX_FAILURES - 1}]"
    assert "ended after 100 failures" in out.getvalue()


def test_big_arrays_cost_nothing():
    array = np.zeros(50_000_000)
    tracemalloc.start()
    try:
        assert paths([array, {"a": array, "lock": LOCK}]) == ["obj[1]['lock']"]
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < array.nbytes / 10, "400 MB must not be copied"


class Endless:
    """So large that to pickle it takes for ever."""

    def __reduce__(self):
        return list, (), None, itertools.repeat(b"x" * 1000)


def test_a_huge_neighbour_does_not_use_up_the_time_of_the_culprit(monkeypatch):
    monkeypatch.setattr(inspection, "CULPRIT_SECONDS", 3 * TIMEUNIT)
    assert culprit_path((Endless(), LOCK), "args") == "args[1] (a '_thread.lock')"


def test_the_time_limit_ends_the_search_with_a_note(monkeypatch):
    def slow(obj):
        time.sleep(0.05)
        return cloudpickle.dumps(obj)

    monkeypatch.setattr(inspection, "INSPECT_SECONDS", 1.0)
    _, (failure,) = inspect_serializability(nested(100, LOCK), dumps=slow, quiet=True)
    assert not failure.complete
    assert 0 < failure.depth < 50
    assert "the search ended after 1 s" in failure.reason


def test_nothing_more_is_tried_once_the_time_is_up(monkeypatch):
    tried = []

    def dumps(obj):
        tried.append(obj)  # takes a second
        return cloudpickle.dumps(obj)

    monkeypatch.setattr(search, "time", types.SimpleNamespace(monotonic=lambda: len(tried)))
    monkeypatch.setattr(inspection, "INSPECT_SECONDS", 6)
    obj = [[i] for i in range(4096)] + [LOCK]
    _, (failure,) = inspect_serializability(obj, dumps=dumps, quiet=True)
    assert failure.path == "obj"
    assert failure.reason.endswith("(the search ended after 6 s)")
    assert len(tried) == 8, "the whole, for which no time counts, and 7 in 6 seconds and some"


def test_nothing_keeps_the_objects_alive_afterwards():
    holder = Holder(lock=LOCK, more=[Holder(lock=LOCK)])
    gone = weakref.ref(holder)
    gc.disable()
    try:
        inspect_serializability([holder], quiet=True)
        culprit_path([holder], "args")
        del holder
        assert gone() is None, "no garbage collection must be needed"
    finally:
        gc.enable()


# ---- what pickles it -------------------------------------------------------------------------------------------------


def test_registered_serializers_are_used_and_looked_into(monkeypatch):
    monkeypatch.setattr(custom, "_reducers", {})
    holder = Holder(lock=LOCK, name="n")
    assert paths([holder]) == ["obj[0].lock"]
    custom.register_serializer(Holder, serializer=lambda h: h.name, deserializer=str)
    assert paths([holder]) == []
    custom.register_serializer(Holder, serializer=lambda h: [h.lock], deserializer=str)
    assert paths([holder]) == ["obj[0]<serialized>[0]"]

    def failing(_):
        raise ValueError("no")

    custom.register_serializer(Holder, serializer=failing, deserializer=str)
    assert paths([holder]) == ["obj[0]"]


def test_the_caller_s_dumps_decides():
    anonymous = lambda: 1  # noqa: E731
    assert paths([anonymous]) == []
    assert paths([anonymous], dumps=pickle.dumps) == ["obj[0]"]
    assert culprit_path([anonymous], "args", pickle.dumps) == "args[0] (a 'function')"
    assert culprit_path([LOCK], "args", lambda _: b"") is None


def test_a_pickler_of_the_caller_s_writes_to_nowhere_and_is_cut_short(monkeypatch):
    files = []

    def pickler(file):
        files.append(file)
        return cloudpickle.Pickler(file)

    huge = [b"x" * 100_000] * 10
    assert culprit_path([huge, LOCK], "args", pickler=pickler) == "args[1] (a '_thread.lock')"
    assert files
    assert all(file.write(b"four") == 4 for file in files)
    monkeypatch.setattr(inspection, "CULPRIT_SECONDS", 3 * TIMEUNIT)
    assert culprit_path([Endless(), LOCK], "args", pickler=pickler) == "args[1] (a '_thread.lock')"
    with pytest.raises(search.TimeUp):
        inspection.Nowhere(time.monotonic() - 1).write(b"")


def test_arrays_that_cannot_fail_are_not_copied_to_be_tried():
    strided = np.zeros((1000, 2000))[:, ::2]
    tracemalloc.start()
    try:
        assert paths([strided, {"k": [strided, LOCK]}]) == ["obj[1]['k'][1]"]
        copies = tracemalloc.get_traced_memory()[1] // strided.nbytes
    finally:
        tracemalloc.stop()
    assert copies <= 2, (
        "one at a time: the whole object was tried, and so were the lists that hold it"
    )


# ---- what is printed -------------------------------------------------------------------------------------------------


def test_the_tree_is_printed_to_stdout_by_default(capsys):
    inspect_serializability({"a": [1, LOCK], "b": 2, "c": Holder(lock=LOCK)}, "config")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [
        "config (a 'dict') cannot be serialised",
        "  ['a'] (a 'list')",
        f"    [1] (a '_thread.lock'): {NO_LOCK}",
        "  ['c'] (a 'test_inspect.Holder')",
        f"    .lock (a '_thread.lock'): {NO_LOCK}",
    ]
    assert "register_serializer" in lines[-1]


def test_what_can_be_serialised_is_said_too_and_quiet_prints_nothing(capsys):
    out = io.StringIO()
    inspect_serializability([1], "args", print_file=out)
    assert out.getvalue() == "args (a 'list') can be serialised\n"
    inspect_serializability([LOCK], quiet=True)
    assert capsys.readouterr().out == ""


def test_a_file_that_cannot_show_a_name_gets_an_escape():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    inspect_serializability({"größe": LOCK}, print_file=out)
    out.flush()
    assert b"['gr\\xf6\\xdfe']" in raw.getvalue()


def test_the_phrase_for_error_messages_names_path_and_type():
    args = ({"model": Holder(lock=LOCK)},)
    assert culprit_path(args, "args") == "args[0]['model'].lock (a '_thread.lock')"
    assert culprit_path([collections.deque([np.array([LOCK], object)])], "x") == (
        "x[0][0][0] (a '_thread.lock')"
    )


def test_the_phrase_comes_quickly_for_usual_objects():
    args = ({"model": Holder(lock=LOCK, weights=list(range(1000)))}, 3)
    culprit_path(args, "args")
    start = time.thread_time()  # what others take of the processor does not count
    for _ in range(20):
        culprit_path(args, "args")
    assert (time.thread_time() - start) / 20 < 0.05


def test_a_program_without_a_console_is_told_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    ok, failures = inspect_serializability(threading.Lock())
    assert not ok
    assert failures
