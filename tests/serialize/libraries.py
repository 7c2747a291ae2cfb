"""Objects of the libraries that people send around, and whether their bytes can travel without a copy.

One entry a line: what it is called, how it is made of an array of float64, and "zero-copy", or a word of the reason why
it is not.  A library that is not installed is left out.
"""

from __future__ import annotations

import array
import copyreg
import functools
import importlib.util
import pickle
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

ZERO_COPY = "zero-copy"
N = 20_000


class Sample(NamedTuple):
    library: str
    name: str
    make: Callable[[Any], Any]
    travels: str


class Subclass(np.ndarray):
    """A subclass with an attribute."""

    def __array_finalize__(self, obj):
        self.unit = getattr(obj, "unit", "m")


class Model:
    def __init__(self, weights):
        self.weights = weights
        self.config = {"n": 1, "layers": [weights[: N // 2], "x"]}


def memmap(a):
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, dtype=a.dtype, shape=a.shape)
    mapped[:] = a
    return mapped


def masked(a):
    return np.ma.array(a, mask=a > 5)


def forest(a):
    from sklearn.ensemble import RandomForestClassifier

    x = np.random.default_rng(0).random((300, 5))
    return RandomForestClassifier(3, random_state=0).fit(x, x[:, 0] > 0.5)


def strings(a):
    return [f"some text {i}" for i in range(N)]


def _library(name, attribute, make, travels):
    # The library is imported when a sample is made, not when tests are collected.
    def made(a):
        module = importlib.import_module(name)
        return make(functools.reduce(getattr, filter(None, attribute.split(".")), module), a)

    return made, travels


NUMPY = {
    "C order": (lambda a: a, ZERO_COPY),
    "Fortran order": (lambda a: np.asfortranarray(a.reshape(-1, 2)), ZERO_COPY),
    "contiguous slice": (lambda a: a[10:], ZERO_COPY),
    "transposed": (lambda a: a.reshape(-1, 2).T, ZERO_COPY),
    "read-only": (lambda a: np.frombuffer(a.tobytes()), ZERO_COPY),
    "every second": (lambda a: a[::2], "not contiguous"),
    "broadcast": (lambda a: np.broadcast_to(a, (3, N)), "not contiguous"),
    "float16": (lambda a: a.astype("f2"), ZERO_COPY),
    "complex": (lambda a: a + 0j, ZERO_COPY),
    "big-endian": (lambda a: a.astype(">f8"), ZERO_COPY),
    "structured": (lambda a: np.zeros(N, [("x", "f8"), ("y", "i4")]), ZERO_COPY),
    "field of a structured": (lambda a: np.zeros(N, [("x", "f8"), ("y", "i4")])["x"], "contiguous"),
    "strings of fixed width": (lambda a: a.astype("U8"), ZERO_COPY),
    "datetime64": (lambda a: a.astype("M8[s]"), "no buffer"),
    "timedelta64": (lambda a: a.astype("m8[s]"), "no buffer"),
    "object": (lambda a: a.astype(object), "object dtype"),
    "masked": (masked, "masked array"),
    "memmap": (memmap, "subclass of numpy.ndarray"),
    "asarray of a memmap": (lambda a: np.asarray(memmap(a)), ZERO_COPY),
    "recarray": (
        lambda a: np.zeros(N, [("x", "f8")]).view(np.recarray), "subclass of numpy.ndarray",
    ),
    "subclass": (lambda a: a.view(Subclass), "subclass of numpy.ndarray"),
}  # fmt: skip

PYTHON = {
    "bytes": (lambda a: a.tobytes(), "bytes pickles in band"),
    "bytearray": (bytearray, "bytearray pickles in band"),
    "str": (lambda a: "x" * N, "str pickles in band"),
    "array.array": (lambda a: array.array("d", a), ZERO_COPY),
    "memoryview": (lambda a: memoryview(a.tobytes()), ZERO_COPY),
    "PickleBuffer": (lambda a: pickle.PickleBuffer(bytearray(a)), ZERO_COPY),
    "list of numbers": (lambda a: a.tolist(), "object by object"),
    "list of arrays": (lambda a: [a, a[: N // 2]], ZERO_COPY),
    "object with attributes": (Model, ZERO_COPY),
    "partial": (lambda a: functools.partial(np.dot, a), ZERO_COPY),
    "bound method": (lambda a: Model(a).__init__, ZERO_COPY),
    "closure": (lambda a: lambda: a, ZERO_COPY),
}

_P, _A, _L = (
    lambda *args, name=name: _library(name, *args) for name in ("pandas", "pyarrow", "polars")
)
PANDAS = {
    "DataFrame of numbers": _P("DataFrame", lambda c, a: c({"a": a, "b": a, "n": a.astype(int)}), ZERO_COPY),
    "Series of numbers": _P("Series", lambda c, a: c(a), ZERO_COPY),
    "slice of rows": _P("DataFrame", lambda c, a: c(a.reshape(-1, 4)).iloc[10:], ZERO_COPY),
    "Int64 (masked)": _P("Series", lambda c, a: c(a, dtype="Int64"), ZERO_COPY),
    "categorical": _P("Categorical", lambda c, a: c.from_codes([0, 1] * (N // 2), ["a", "b"]), ZERO_COPY),
    "datetime": _P("Series", lambda c, a: c(a.astype("M8[s]")), "no buffer"),
    "datetime with time zone": _P("Series", lambda c, a: c(a.astype("M8[s]")).dt.tz_localize("UTC"), "no buffer"),
    "object": _P("Series", lambda c, a: c(strings(a), dtype=object), "object dtype"),
}  # fmt: skip
PANDAS_ARROW = {
    "Arrow-backed numbers": _P("Series", lambda c, a: c(a, dtype="double[pyarrow]"), ZERO_COPY),
    "Arrow-backed strings": _P("Series", lambda c, a: c(strings(a), dtype="string[pyarrow]"), ZERO_COPY),
}  # fmt: skip
PYARROW = {
    "Table": _A("table", lambda f, a: f({"a": a, "s": strings(a)}), ZERO_COPY),
    "RecordBatch": _A("", lambda m, a: m.record_batch({"a": m.array(a)}), ZERO_COPY),
    "Array": _A("array", lambda f, a: f(a), ZERO_COPY),
    "ChunkedArray": _A("chunked_array", lambda f, a: f([a, a]), ZERO_COPY),
    "Buffer": _A("py_buffer", lambda f, a: f(a.tobytes()), ZERO_COPY),
}
POLARS = {
    "DataFrame": _L("DataFrame", lambda c, a: c({"a": a, "b": a}), "stream of its own"),
    "Series": _L("Series", lambda c, a: c(a), "stream of its own"),
    "to_arrow()": _L("DataFrame", lambda c, a: c({"a": a}).to_arrow(), ZERO_COPY),
}
SCIPY = {
    kind: _library(
        "scipy.sparse", "", lambda m, a, kind=kind: m.random(900, 900, 0.01, format=kind), travels
    )
    for kind, travels in dict.fromkeys(("csr", "csc", "coo", "bsr"), ZERO_COPY).items()
    | {"lil": "object dtype", "dok": "in band"}.items()
}
XARRAY = {
    "DataArray": _library("xarray", "DataArray", lambda c, a: c(a), ZERO_COPY),
    "Dataset": _library("xarray", "Dataset", lambda c, a: c({"v": ("t", a)}), ZERO_COPY),
}
SKLEARN = {"RandomForest": (forest, ZERO_COPY)}

_GROUPS = {
    ("numpy", "numpy"): NUMPY,
    ("Python", "array"): PYTHON,
    ("pandas", "pandas"): PANDAS,
    ("pandas", "pyarrow"): PANDAS_ARROW,
    ("pyarrow", "pyarrow"): PYARROW,
    ("polars", "polars"): POLARS,
    ("scipy.sparse", "scipy"): SCIPY,
    ("xarray", "xarray"): XARRAY,
    ("scikit-learn", "sklearn"): SKLEARN,
}

SAMPLES = [
    Sample(library, name, make, travels)
    for (library, module), group in _GROUPS.items()
    if importlib.util.find_spec(module)
    if library != "pandas" or importlib.util.find_spec("pandas")
    for name, (make, travels) in group.items()
]


def make(sample: Sample) -> Any:
    """The object; what the libraries warn of, and what they do to exceptions (dask does), is not ours."""
    before = set(copyreg.dispatch_table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        obj = sample.make(np.arange(N, dtype=float))
    for kind in set(copyreg.dispatch_table) - before:
        if issubclass(kind, BaseException):
            del copyreg.dispatch_table[kind]
    return obj


__all__ = ["SAMPLES", "ZERO_COPY", "Sample", "make"]
