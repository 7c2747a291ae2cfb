"""The parts of an object, as a pickler meets them, each with the step that leads to it."""

from __future__ import annotations

import functools
import types

import numpy as np
import pytest

from shmpool.serialize import custom, parts
from shmpool.serialize.parts import Member, members

INNER = [1]


def steps(obj, reduced=None, **kwargs):
    return {part.step: part.value for part in members(obj, reduced, **kwargs).items}


class Plain:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Made:
    def __init__(self):
        self.held = INNER

    def __reduce__(self):
        return Made, (self.held, [2])


class Refuses:
    def __init__(self):
        self.held = INNER

    def __reduce__(self):
        raise ValueError("no")


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        (3, []),
        ("text", []),
        ([1, INNER, "x"], ["[1]"]),
        ((INNER, INNER), ["[0]", "[1]"]),
        ({"a": INNER, "b": 2, (1, 2): INNER}, ["['a']", ".keys()[2]", "[(1, 2)]"]),
        ({INNER.__class__: 1}, [".keys()[0]"]),
        ({(1, 2)}, ["{...}"]),
        (Plain(a=INNER, b=1), [".a"]),
        (functools.partial(len, INNER), [".args", ".func", ".keywords"]),
        (Plain(x=INNER).__init__, [".__func__", ".__self__"]),
        (property(len), [".fget"]),
        (types.CellType(INNER), [".cell_contents"]),
        (np.array([INNER, None], object), ["[0]"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_parts_are_named_as_python_would_write_the_way_to_them(obj, expected):
    names = [
        part.step for part in members(obj).items if not part.made and part.step != ".__class__"
    ]
    assert sorted(names) == sorted(expected)


def test_atoms_are_listed_where_they_are_asked_for():
    assert steps([1, "x"], atoms=True) == {"[0]": 1, "[1]": "x"}
    assert steps(Plain(b=b"x"), atoms=True)[".b"] == b"x"


def test_what_a_reduction_makes_is_marked():
    found = members(Made())
    assert Member(".held", INNER) in found.items
    assert Member(".__reduce_ex__(5)[1][1]", [2], made=True) in found.items


def test_a_reduction_that_is_given_is_not_called_again():
    calls = []

    class Counts:
        def __reduce__(self):
            calls.append(1)
            return Counts, ()

    assert steps(Counts(), (Counts, (), None, [INNER], [("k", INNER)])).keys() >= {"[0]", "['k']"}
    assert not calls


def test_a_reduction_that_fails_leaves_the_attributes_and_its_error():
    found = members(Refuses())
    assert isinstance(found.error, ValueError)
    assert found.error.__traceback__ is None
    assert found.items == [Member(".held", INNER)]


def test_registered_serializers_are_asked_first(monkeypatch):
    monkeypatch.setattr(custom, "_reducers", {})
    custom.register_serializer(Refuses, serializer=lambda r: r.held, deserializer=len)
    assert steps(Refuses()) == {"<deserializer>": len, "<serialized>": INNER}
    assert all(part.made for part in members(Refuses()).items)


def test_functions_have_the_globals_that_their_code_uses():
    namespace = {"__name__": "__main__", "A": INNER, "B": INNER}
    exec("def fn(x=[2]):\n    def g():\n        return A\n    return x.B, g", namespace)
    assert steps(namespace["fn"]) == {".__globals__['A']": INNER, ".__defaults__[0]": [2]}


def test_a_long_container_is_looked_at_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(parts, "MAX_MEMBERS", 10)
    found = members([[i] for i in range(30)])
    assert len(found.items) == 10
    assert found.note == "only the first 10 of 30 members were tried"


def test_columns_of_tables_are_named_when_their_reduction_is_known():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1.0], "b": [2.0], "n": [3]})
    found = steps(frame, frame.__reduce_ex__(5))
    assert {"[['a', 'b']]", "['n']", ".index", ".columns"} <= found.keys()
    assert steps(frame).keys() >= {"['a']", "['b']", "['n']"}
    assert ".values" in steps(frame["a"], frame["a"].__reduce_ex__(5))
