"""Are two things that scikit-learn computed the same, to the last bit?"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse
from numpy.random import RandomState

#: How long something took is not the same twice.
_TIMES = ("_time", "_times", "_time_")


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Compare results, fitted estimators among them, attribute by attribute; fail with the path to a difference."""
    assert type(one) is type(other), f"{where}: {type(one)} is not {type(other)}"
    if isinstance(one, np.ndarray):
        _assert_same_arrays(one, other, where)
    elif isinstance(one, Mapping):
        assert list(one) == list(other), f"{where}: other keys"
        for key, value in one.items():
            if not str(key).endswith(_TIMES):
                assert_same(value, other[key], f"{where}[{key!r}]")
    elif isinstance(one, Sequence) and not isinstance(one, str | bytes | range):
        assert len(one) == len(other), f"{where}: other lengths"
        for index, (mine, others) in enumerate(zip(one, other, strict=True)):
            assert_same(mine, others, f"{where}[{index}]")
    elif scipy.sparse.issparse(one):
        for part in ("data", "indices", "indptr", "shape"):
            assert_same(getattr(one, part), getattr(other, part), f"{where}.{part}")
    elif isinstance(one, RandomState):
        assert_same(one.get_state(), other.get_state(), where)
    elif isinstance(one, types.FunctionType | types.BuiltinFunctionType | type):
        assert one.__qualname__ == other.__qualname__, where
    elif hasattr(one, "__dict__"):
        assert_same(vars(one), vars(other), f"{where}<{type(one).__name__}>")
    elif type(one).__reduce__ is not object.__reduce__:  # compiled: trees, losses
        assert_same(one.__reduce__()[1:], other.__reduce__()[1:], f"{where}<{type(one).__name__}>")
    else:
        assert one == other or (one != one and other != other), f"{where}: {one!r} is not {other!r}"  # noqa: PLR0124  # nan


def _assert_same_arrays(one: Any, other: Any, where: str) -> None:
    assert (one.dtype, one.shape) == (other.dtype, other.shape), where
    if one.dtype.hasobject:
        assert_same(one.tolist(), other.tolist(), where)
    else:
        equal_nan = one.dtype.kind in "fc"
        assert np.array_equal(one, other, equal_nan=equal_nan), f"{where}: other values"
