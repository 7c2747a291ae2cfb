"""Objects of the libraries that people send around, and whether their bytes can travel without a copy.

One entry a line: what it is called, how it is made of an array of float64, and "zero-copy", or a word of the reason why
it is not.  ``SAMPLES`` are those of the libraries that are installed, ``ALL`` all of them.
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
CONTIGUOUS = "made contiguous"
INLINE = "rides in the message"
N = 20_000


class Sample(NamedTuple):
    library: str
    name: str
    make: Callable[[Any], Any]
    travels: str
    #: The modules that it takes.
    modules: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.library}: {self.name}"

    @property
    def installed(self) -> bool:
        return all(map(importlib.util.find_spec, self.modules))


class Subclass(np.ndarray):
    """A subclass with an attribute, which pickle loses: what arrives has what ``__array_finalize__`` gives it."""

    def __array_finalize__(self, obj):
        self.unit = getattr(obj, "unit", "m")


class OwnWay(np.ndarray):
    """A subclass that keeps an attribute by itself, the way numpy's documentation says."""

    unit = "m"

    def __reduce__(self):
        function, args, state = super().__reduce__()
        return function, args, (*state, self.unit)

    def __setstate__(self, state):
        *state, self.unit = state
        super().__setstate__(tuple(state))


def in_kilometres(a, cls):
    a = a.view(cls)
    a.unit = "km"
    return a


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


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def forest(a):
    from sklearn.ensemble import RandomForestClassifier

    rng = np.random.default_rng(0)
    return RandomForestClassifier(3, random_state=0).fit(
        rng.random((900, 5)), rng.random(900) > 0.5
    )


def pipeline(a):
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), PCA()).fit(a[:6000].reshape(60, 100) ** 0.5)


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
    "axes in another order": (lambda a: a.reshape(4, 5, -1).transpose(1, 0, 2), ZERO_COPY),
    "read-only": (read_only, ZERO_COPY),
    "over bytes": (lambda a: np.frombuffer(a.tobytes()), ZERO_COPY),
    "every second": (lambda a: a[::2], CONTIGUOUS),
    "reversed": (lambda a: a[::-1], CONTIGUOUS),
    "broadcast": (lambda a: np.broadcast_to(a, (3, N)), CONTIGUOUS),
    "float16": (lambda a: a.astype("f2"), ZERO_COPY),
    "complex": (lambda a: a + 0j, ZERO_COPY),
    "big-endian": (lambda a: a.astype(">f8"), ZERO_COPY),
    "structured": (lambda a: np.zeros(N, [("x", "f8"), ("y", "i4")]), ZERO_COPY),
    "field of a structured": (lambda a: np.zeros(N, [("x", "f8"), ("y", "i4")])["x"], CONTIGUOUS),
    "strings of fixed width": (lambda a: a.astype("U8"), ZERO_COPY),
    "datetime64": (lambda a: a.astype("M8[s]"), ZERO_COPY),
    "timedelta64": (lambda a: a.astype("m8[s]"), ZERO_COPY),
    "object": (lambda a: a.astype(object), "object dtype"),
    "0-d": (lambda a: np.array(1.5), INLINE),
    "empty": (lambda a: np.zeros((0, 3)), INLINE),
    "masked": (masked, ZERO_COPY),
    "memmap": (memmap, ZERO_COPY),
    "asarray of a memmap": (lambda a: np.asarray(memmap(a)), ZERO_COPY),
    "recarray": (lambda a: np.zeros(N, [("x", "f8")]).view(np.recarray), ZERO_COPY),
    "matrix": (lambda a: a.reshape(-1, 2).view(np.matrix), ZERO_COPY),
    "subclass": (lambda a: in_kilometres(a, Subclass), ZERO_COPY),
    "subclass that has its own `__reduce__`": (lambda a: in_kilometres(a, OwnWay), "reduction of its own"),
}  # fmt: skip

PYTHON = {
    "bytes": (lambda a: a.tobytes(), "bytes pickles in band"),
    "bytearray": (bytearray, "bytearray pickles in band"),
    "str": (lambda a: "x" * a.nbytes, "str pickles in band"),
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
    "slice of rows": _P("DataFrame", lambda c, a: c(a.reshape(-1, 4)).iloc[10:], CONTIGUOUS),
    "Int64 (masked)": _P("Series", lambda c, a: c(a, dtype="Int64"), ZERO_COPY),
    "categorical": _P("Categorical", lambda c, a: c.from_codes([0, 1] * (N // 2), ["a", "b"]), ZERO_COPY),
    "datetime": _P("Series", lambda c, a: c(a.astype("M8[s]")), ZERO_COPY),
    "datetime with time zone": _P("Series", lambda c, a: c(a.astype("M8[s]")).dt.tz_localize("UTC"), ZERO_COPY),
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
    for kind, travels in {
        "csr": ZERO_COPY, "csc": ZERO_COPY, "coo": ZERO_COPY, "bsr": ZERO_COPY,
        "lil": "object dtype", "dok": "in band",
    }.items()
}  # fmt: skip
XARRAY = {
    "DataArray": _library("xarray", "DataArray", lambda c, a: c(a), ZERO_COPY),
    "Dataset": _library("xarray", "Dataset", lambda c, a: c({"v": ("t", a)}), ZERO_COPY),
}
SKLEARN = {
    "RandomForestClassifier, fitted": (forest, ZERO_COPY),
    "Pipeline, fitted": (pipeline, ZERO_COPY),
}
_T = functools.partial(_library, "torch")
TORCH = {
    "Tensor": _T("", lambda m, a: m.from_numpy(a), ZERO_COPY),
    "Tensor, strided": _T("", lambda m, a: m.from_numpy(a)[::2], ZERO_COPY),
    "Tensor of bfloat16": _T("", lambda m, a: m.from_numpy(a).bfloat16(), ZERO_COPY),
    "Tensor with requires_grad": _T("", lambda m, a: m.from_numpy(a).requires_grad_(), ZERO_COPY),
    "views of one storage": _T("", lambda m, a: [t := m.from_numpy(a), t[5:]], ZERO_COPY),
    "sparse Tensor": _T("", lambda m, a: m.diag(m.from_numpy(a[1:2000])).to_sparse(), ZERO_COPY),
    "Module": _T("nn", lambda m, a: m.Linear(100, 200), ZERO_COPY),
}

_GROUPS = [
    ("numpy", (), NUMPY),
    ("Python", (), PYTHON),
    ("pandas", ("pandas",), PANDAS),
    ("pandas", ("pandas", "pyarrow"), PANDAS_ARROW),
    ("pyarrow", ("pyarrow",), PYARROW),
    ("polars", ("polars", "pyarrow"), POLARS),
    ("scipy.sparse", ("scipy",), SCIPY),
    ("xarray", ("xarray",), XARRAY),
    ("scikit-learn", ("sklearn",), SKLEARN),
    ("torch", ("torch",), TORCH),
]

ALL = [
    Sample(library, name, make, travels, modules)
    for library, modules, group in _GROUPS
    for name, (make, travels) in group.items()
]
SAMPLES = [sample for sample in ALL if sample.installed]


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


__all__ = ["ALL", "CONTIGUOUS", "INLINE", "SAMPLES", "ZERO_COPY", "Sample", "make"]
