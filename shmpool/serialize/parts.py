"""One idea: what an object is made of, as a pickler sees it, and how Python would write the way to each part.

Two tables say it.  What the pickler knows by itself (containers) and what cloudpickle takes by value (functions,
classes, modules) is listed here by type; everything else is what its reduction function (``__reduce_ex__``, a
registered serializer, ...) returns, each piece called by the attribute of the object that holds it, if one does.

Who only names what a pickler has just met gives the reduction that the pickler got; then no code of the object's is
called, and what holds the bytes of a DataFrame or a Table is named by its columns.

Guarantees: :func:`members` raises no ``Exception``, looks at no more than `MAX_MEMBERS` entries of a container, and
does not change the object beyond what pickling it would do.
"""

from __future__ import annotations

import contextlib
import dis
import itertools
import keyword
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cloudpickle

from shmpool.serialize import custom
from shmpool.serialize.words import reason_of, type_name

__all__ = ["Member", "Members", "members", "without_traceback"]

#: Members of one object that are looked at: a hundred thousand small ones take some 20 ms to pickle.
MAX_MEMBERS = 100_000

# What always can be pickled and has no parts.
_ATOMS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, bytearray, type(...), type(NotImplemented), range, slice}
)  # fmt: skip
# Attributes that hold the parts of objects of these types.
_HOLDERS: dict[type, tuple[str, ...]] = {
    types.CellType: ("cell_contents",),
    types.MethodType: ("__func__", "__self__"),
    types.BuiltinFunctionType: ("__self__",),
    property: ("fget", "fset", "fdel"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
}
# cloudpickle leaves these out of a class that it pickles by value.
_CLASS_INTERNALS = frozenset({"__dict__", "__weakref__", "_abc_impl", "__annotate_func__"})
_GLOBAL_OPS = frozenset({"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL"})


class Member(NamedTuple):
    """A part of an object, and the step that leads to it: ``[3]``, ``.lock``."""

    step: str
    value: Any
    #: The object's reduction made it: the step only says where it turned up.
    made: bool = False


@dataclass(slots=True)
class Members:
    """The parts that a pickler would meet inside an object."""

    items: list[Member] = field(default_factory=list)
    #: Why there may be more; empty if there are not.
    note: str = ""
    #: What the object's own reduction function raised; the items are then all attributes, pickled or not.
    error: Exception | None = None
    #: Whether numbers, strings and the like, which always can be pickled, are among the items.
    atoms: bool = False

    def wants(self, value: Any) -> bool:
        """Is this part of a kind to be listed?"""
        return self.atoms or type(value) not in _ATOMS

    def add(self, step: str, value: Any, *, made: bool = False) -> None:
        """Take note of a part, if it is of a kind to be listed."""
        if self.wants(value):
            self.items.append(Member(step, value, made))

    def bounded(self, values: Iterable[Any], size: int | None = None) -> list[Any]:
        """The first `MAX_MEMBERS` of some values; if there are more, a note says so."""
        taken = list(itertools.islice(values, MAX_MEMBERS + 1))
        if len(taken) > MAX_MEMBERS:
            del taken[MAX_MEMBERS:]
            of = f" of {size:,}" if size is not None else ""
            self.note = f"only the first {MAX_MEMBERS:,}{of} members were tried"
        return taken


def members(obj: Any, reduced: Any = None, *, atoms: bool = False) -> Members:
    """The parts that a pickler would meet inside an object, one level down.

    Parameters
    ----------
    obj : object
    reduced : tuple, optional
        What the object's reduction has returned, lists in place of its iterators; by default it is called.
    atoms : bool, default False
        List numbers, strings and the like, too.
    """
    found = Members(atoms=atoms)
    try:
        _take_apart(obj, reduced, found)
    except Exception as error:
        found.note = f"its parts could not be listed: {reason_of(error)}"
    return found


def without_traceback(error: Exception) -> Exception:
    """The same error; the frames of a traceback keep every object on the way until the next garbage collection."""
    return error.with_traceback(None)


def _take_apart(obj: Any, reduced: Any, found: Members) -> None:
    kind = type(obj)
    if kind in _ATOMS:
        return
    if kind is list or kind is tuple:
        _add_items(obj, found, len(obj))
    elif kind is dict:
        _add_entries(obj.items(), found, len(obj))
    elif kind is set or kind is frozenset:
        for value in found.bounded(obj, len(obj)):
            found.add("{...}", value)
    elif kind in custom.registered():
        # Before the special cases: a registered class goes its own way, whatever it is.
        _add_reduced(obj, reduced, found)
    elif kind is types.FunctionType:
        _add_function(obj, found)
    elif kind is types.ModuleType:
        _add_named(vars(obj), found)
    elif issubclass(kind, type):
        _add_class(obj, found)
    elif kind in _HOLDERS:
        for name in _HOLDERS[kind]:
            found.add(f".{name}", getattr(obj, name))
    elif kind is _loaded("numpy", "ndarray") and obj.dtype.hasobject:
        indices = itertools.product(*map(range, obj.shape))
        for index in found.bounded(indices, obj.size):
            found.add(f"[{', '.join(map(str, index))}]", obj[index])
    elif reduced is not None:
        if not _add_columns(obj, reduced, found):
            _add_reduced(obj, reduced, found)
    elif kind is _loaded("pandas", "DataFrame"):
        _add_labels(obj, found, "index", "columns", "attrs")
        for index, label in enumerate(found.bounded(obj.columns, len(obj.columns))):
            found.add(_key_step(label), obj.iloc[:, index])
    elif kind is _loaded("pandas", "Series"):
        _add_labels(obj, found, "index", "attrs")
        if obj.dtype == object:
            for index, value in enumerate(found.bounded(obj, len(obj))):
                found.add(f".iloc[{index}]", value)
        else:
            found.add(".array", obj.array)
    else:
        _add_reduced(obj, None, found)


def _loaded(module: str, name: str) -> object:
    """A class of an optional library, or None where the program has not imported it."""
    return getattr(sys.modules.get(module), name, None)


def _add_labels(obj: Any, found: Members, *names: str) -> None:
    for name in names:
        found.add(f".{name}", getattr(obj, name))


def _add_items(values: Iterable[Any], found: Members, size: int | None = None) -> None:
    for index, value in enumerate(found.bounded(values, size)):
        found.add(f"[{index}]", value)


def _add_entries(
    entries: Iterable[tuple[Any, Any]], found: Members, size: int | None = None
) -> None:
    for index, (key, value) in enumerate(found.bounded(entries, size)):
        found.add(f".keys()[{index}]", key)
        if found.wants(value):
            found.add(_key_step(key), value)


def _add_named(namespace: dict[str, Any], found: Members) -> None:
    for name, value in found.bounded(namespace.items(), len(namespace)):
        found.add(_attribute_step(name), value)


# ---- functions and classes, which cloudpickle takes by value ---------------------------------------------------------


def _add_function(fn: types.FunctionType, found: Members) -> None:
    # A function that is pickled by reference never fails, so this one goes by value.
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=False):
        with contextlib.suppress(ValueError):  # an empty cell
            found.add(f".__closure__[{name!r}]", cell.cell_contents)
    for name in _global_names(fn.__code__):
        if name in fn.__globals__:
            found.add(f".__globals__[{name!r}]", fn.__globals__[name])
    for index, value in enumerate(fn.__defaults__ or ()):
        found.add(f".__defaults__[{index}]", value)
    for name, value in (fn.__kwdefaults__ or {}).items():
        found.add(f".__kwdefaults__[{name!r}]", value)
    _add_named(fn.__dict__, found)
    for name, value in fn.__annotations__.items():
        found.add(f".__annotations__[{name!r}]", value)


def _global_names(code: types.CodeType) -> list[str]:
    """Names of the globals that a code object and those nested in it use, as cloudpickle determines them."""
    names: dict[str, None] = {}
    pending = [code]
    while pending:
        current = pending.pop()
        for instruction in dis.get_instructions(current):
            if instruction.opname in _GLOBAL_OPS:
                names[instruction.argval] = None
        pending += [const for const in current.co_consts if isinstance(const, types.CodeType)]
    return list(names)


def _add_class(cls: type, found: Members) -> None:
    for index, base in enumerate(cls.__bases__):
        found.add(f".__bases__[{index}]", base)
    for name, value in vars(cls).items():
        if name not in _CLASS_INTERNALS and type(value) is not types.MemberDescriptorType:
            found.add(_attribute_step(name), value)


# ---- what a reduction function returns -------------------------------------------------------------------------------


def _add_reduced(obj: Any, reduced: Any, found: Members) -> None:
    attributes = _attributes(obj)
    try:
        reduced = reduced if reduced is not None else _reduce(obj)
    except Exception as error:
        found.error = without_traceback(error)
        for name, value in attributes.items():
            found.add(_attribute_step(name), value)
        return
    if not isinstance(reduced, tuple):
        return  # the name of a global
    if type(obj) in custom.registered():
        _, (deserializer, state) = reduced
        found.add("<deserializer>", deserializer, made=True)
        found.add("<serialized>", state, made=True)
        return
    # What the reduction returns is called by the attribute that holds it, if one does.
    steps = {id(value): _attribute_step(name) for name, value in attributes.items()}
    steps[id(type(obj))] = ".__class__"
    function, args, state, items, entries, setter = (*reduced, *(None,) * 6)[:6]
    if issubclass(type(obj), BaseException) and args is obj.args:
        steps |= {id(value): f".args[{index}]" for index, value in enumerate(args)}

    def add(value: Any, otherwise: str) -> None:
        step = steps.get(id(value))
        found.add(step or otherwise, value, made=step is None)

    add(function, ".__reduce_ex__(5)[0]")
    for index, value in enumerate(args or ()):
        add(value, f".__reduce_ex__(5)[1][{index}]")
    if id(state) in steps:
        add(state, ".__getstate__()")
    elif _is_namespace(state):
        for part in state if type(state) is tuple else (state,):
            for key, value in found.bounded((part or {}).items()):
                if found.wants(value) and attributes.get(key) is value:
                    found.add(_attribute_step(key), value)
                elif found.wants(value):
                    add(value, f".__getstate__(){_key_step(key)}")
    elif type(state) in (list, tuple):
        for index, value in enumerate(found.bounded(state)):
            add(value, f".__getstate__()[{index}]")
    else:
        add(state, ".__getstate__()")
    _add_items(items or (), found)
    _add_entries(entries or (), found)
    found.add(".__reduce_ex__(5)[5]", setter, made=True)
    # functools.partial, for one, names its function among the arguments and in the state.
    found.items = list({(item.step, id(item.value)): item for item in found.items}.values())


def _is_namespace(state: Any) -> bool:
    """A dict, or a pair of dicts (for ``__dict__`` and for ``__slots__``): what ``__getstate__`` gives by default."""
    parts = state if type(state) is tuple and len(state) == 2 else (state,)
    return all(part is None or type(part) is dict for part in parts)


def _reduce(obj: Any) -> Any:
    # In the pickler's own order.
    kind = type(obj)
    reducer = custom.registered().get(kind) or cloudpickle.Pickler.dispatch_table.get(kind)
    return reducer(obj) if reducer is not None else obj.__reduce_ex__(5)


def _add_columns(obj: Any, reduced: Any, found: Members) -> bool:
    """What holds the bytes of a table, by its columns: its reduction has no names for it.  False for anything else."""
    kind = type(obj)
    if kind in (_loaded("pandas", "DataFrame"), _loaded("pandas", "Series")):
        _add_labels(obj, found, "index", "columns" if obj.ndim == 2 else "name", "attrs")
        with contextlib.suppress(
            Exception
        ):  # pandas's own business: without it paths end at the table
            for block in obj._mgr.blocks:
                found.add(_columns_step(obj, block), block.values)
        return True
    if kind in (_loaded("pyarrow", "Table"), _loaded("pyarrow", "RecordBatch")):
        for name, column in zip(obj.column_names, reduced[1][0], strict=True):
            found.add(_key_step(name), column)
        return True
    return False


def _columns_step(obj: Any, block: Any) -> str:
    if obj.ndim == 1:
        return ".values"
    labels = [obj.columns[index] for index in block.mgr_locs.as_array[:4]]
    if block.values.ndim == 1 or len(block.mgr_locs) == 1:
        return _key_step(labels[0])
    more = ", ..." if len(block.mgr_locs) > 3 else ""
    return f"[[{', '.join(_key_step(label)[1:-1] for label in labels[:3])}{more}]]"


def _attributes(obj: Any) -> dict[str, Any]:
    """What an object's ``__dict__`` and ``__slots__`` hold, without asking its ``__getattr__``."""
    found: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # no __dict__, or a strange one
        namespace = object.__getattribute__(obj, "__dict__")
        found.update(itertools.islice(namespace.items(), MAX_MEMBERS))
    for cls in type(obj).__mro__:
        for name, descriptor in list(cls.__dict__.items()):
            if type(descriptor) is types.MemberDescriptorType and name not in found:
                with contextlib.suppress(Exception):  # a slot without a value
                    found[name] = descriptor.__get__(obj, cls)
    found.pop("__dict__", None)  # some types written in C have it as a slot
    return found


# ---- steps -----------------------------------------------------------------------------------------------------------


def _key_step(key: Any) -> str:
    if type(key) in _ATOMS or (type(key) is tuple and all(type(k) in _ATOMS for k in key)):
        text = repr(key)
        return f"[{text if len(text) <= 60 else text[:57] + '...'}]"
    return f"[<{type_name(key)}>]"


def _attribute_step(name: Any) -> str:
    if type(name) is str and name.isidentifier() and not keyword.iskeyword(name):
        return f".{name}"
    return f".__dict__{_key_step(name)}"
