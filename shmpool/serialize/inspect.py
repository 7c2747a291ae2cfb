"""One idea: to find what cannot be pickled, try the parts of what cannot be pickled.

An object that fails is taken apart the way the pickler would (containers, what its reduction function returns, a
function's closure and the globals its code really names, ...), the parts are tried one by one, and those that fail
are taken apart in turn.  A part that fails although all of its own parts pass is a culprit.

::

    fn               fails: look inside
    |- .__closure__['n']         passes: done with
    `- .__globals__['CONFIG']    fails: look inside
       |- ['name']                   passes
       `- ['lock']                   fails, and has no parts that fail: a culprit

The file is longer than most because its two halves, the parts of an object (:func:`members`) and the search among
them, only make sense together: what is a part decides who is blamed.  The rest is what is said to the user.

Rules
-----
* Nothing is tried twice, and nothing is tried that cannot fail.  Many parts are tried together, then in halves.
* No recursion here: the search keeps its own stack, so that it sees the same recursion limit at every depth.
* Everything that runs code of the user's (reduction functions, attributes, iteration) may raise anything.

Guarantees
----------
* Work is bounded: members per object, depth, failures, time.  What was cut short says so in its failure's reason.
  With a ``dumps`` of the caller's, one call of it is the grain of the time limit.
* Cycles end.  Of what the objects' own code raises, only ``KeyboardInterrupt`` and ``SystemExit`` get out.
* The objects are not changed, beyond what pickling them would do.

Assumption: ``dumps`` has no side effects; it is called many times, with the parts and with lists of parts.
"""

from __future__ import annotations

import contextlib
import dis
import itertools
import keyword
import math
import pickle
import sys
import time
import types
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TextIO

import cloudpickle

from shmpool.serialize import custom

__all__ = ["Failure", "Member", "Members", "culprit_path", "inspect_serializability", "members"]

Dumps = Callable[[Any], object]

#: Members of one object that are looked at: a hundred thousand small ones take some 20 ms to pickle.
MAX_MEMBERS = 100_000
#: Levels below the object that was asked about.
MAX_DEPTH = 200
#: Failures worth showing.
MAX_FAILURES = 100
#: Seconds that inspect_serializability may take: someone waits for it at a prompt.
INSPECT_SECONDS = 10.0
#: Seconds that may be added to an error that is raised anyway.
CULPRIT_SECONDS = 0.25
#: A RecursionError that is still there so many levels further down comes from depth, not from one object's own code.
DEEP = 20
#: Characters of an exception's text or of a path in a message.
MAX_TEXT = 300

# What always passes and has no parts.
_ATOMS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, bytearray, type(...), type(NotImplemented), range, slice}
)  # fmt: skip
# cloudpickle leaves these out of a class that it pickles by value.
_CLASS_INTERNALS = frozenset({"__dict__", "__weakref__", "_abc_impl", "__annotate_func__"})
_GLOBAL_OPS = frozenset({"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL"})


@dataclass(frozen=True, slots=True)
class Failure:
    """One object that cannot be pickled although all of its parts can.

    Attributes
    ----------
    path : str
        The way to it, as Python would write it: ``args[0].config['lock']``, ``fn.__closure__['conn']``.
    type_name : str
        Its type: ``_thread.lock``.
    reason : str
        What the pickler said, on one line.
    parent : str or None
        The path of what holds it; None if it is the object itself that was asked about.
    depth : int
        How many steps the path has.
    complete : bool
        False if the search was cut short here, so that the cause may be further inside; `reason` says why.
    """

    path: str
    type_name: str
    reason: str
    parent: str | None = None
    depth: int = 0
    complete: bool = True

    def __str__(self) -> str:
        return f"{self.path} ({_article(self.type_name)}): {self.reason}"


def inspect_serializability(
    obj: Any,
    name: str | None = None,
    *,
    dumps: Dumps | None = None,
    print_file: TextIO | None = None,
    quiet: bool = False,
) -> tuple[bool, list[Failure]]:
    """Say whether an object can be sent to a worker, and if not, what inside it is in the way.

    Parameters
    ----------
    obj : object
        A function, an argument, anything.
    name : str, optional
        What to call it in paths; default: a function's own name, else ``obj``.
    dumps : callable, optional
        Serialises one object or raises; default: cloudpickle with protocol 5, the registered serializers, and
        buffers left out, so that big arrays cost nothing.
    print_file : file, optional
        Where the tree of what fails is printed; default: ``sys.stdout``.
    quiet : bool, default False
        Print nothing.

    Returns
    -------
    ok : bool
        Whether it can be serialised.
    failures : list of Failure
        The innermost culprits, in the order in which they are met; an object that is met in two places is there
        twice.  At most 100.

    Examples
    --------
    >>> import threading
    >>> ok, failures = inspect_serializability({"n": 1, "lock": threading.Lock()}, "config")
    config (a 'dict') cannot be serialised
      ['lock'] (a '_thread.lock'): cannot pickle '_thread.lock' object
    Make such objects inside the task or in an initializer, leave them out in __getstate__, or see ...
    >>> failures[0].path
    "config['lock']"
    """
    label = name or _default_name(obj)
    search = _Search(dumps, seconds=INSPECT_SECONDS, most=MAX_FAILURES)
    try:
        root = search.run(obj, label, whole=True)
        if not quiet:
            _print(_render(root, label, obj, len(search.failures)), print_file)
        return root is None, search.failures
    finally:
        search.let_go()


def culprit_path(obj: Any, name: str, dumps: Dumps | None = None) -> str | None:
    """One phrase for an error message: where the first part is that cannot be pickled.

    Parameters
    ----------
    obj : object
        What could not be pickled.
    name : str
        What to call it: ``args``.
    dumps : callable, optional
        As for :func:`inspect_serializability`.

    Returns
    -------
    str or None
        ``args[0]['model'].lock (a '_thread.lock')``; None if `obj` can be pickled after all, or nothing is known.
        Takes a quarter of a second or two, give or take one call of `dumps`.  Raises no ``Exception``.
    """
    search = _Search(dumps, seconds=CULPRIT_SECONDS, most=1)
    try:
        search.run(obj, name)
    except Exception:
        # It is called while an error is being made, which matters more than what went wrong here.
        return None
    finally:
        search.let_go()
    if not search.failures:
        return None
    failure = search.failures[0]
    if failure.depth == 0 and not failure.complete:
        return None  # that much was known before
    path = _shorten(failure.path)
    if failure.reason.startswith(_NESTED):
        limit, _, advice = failure.reason.partition(": ")
        return f"{limit} at {path}: {advice}"
    where = f"{path} ({_article(failure.type_name)})"
    return where if failure.complete else f"somewhere in {where}"


# ---- the parts of an object ------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """A part of an object, and the step that leads to it: ``[3]``, ``.lock``."""

    step: str
    value: Any


@dataclass(slots=True)
class Members:
    """The parts that a pickler would meet inside an object."""

    #: Those that could fail; numbers, strings and the like are left out.
    items: list[Member] = field(default_factory=list)
    #: Why there may be more; empty if there are not.
    note: str = ""
    #: What the object's own reduction function raised; the items are then all attributes, pickled or not.
    error: Exception | None = None

    def add(self, step: str, value: Any) -> None:
        """Take note of a part, if it is of a kind that could fail."""
        if type(value) not in _ATOMS:
            self.items.append(Member(step, value))


def members(obj: Any) -> Members:
    """The parts that a pickler would meet inside an object, one level down.

    Never raises an ``Exception``; at most `MAX_MEMBERS` entries of a container are looked at.
    """
    found = Members()
    try:
        _take_apart(obj, found)
    except Exception as error:
        found.note = f"its parts could not be listed: {_reason(error)}"
    return found


def _take_apart(obj: Any, found: Members) -> None:
    kind = type(obj)
    if kind in _ATOMS:
        return
    if kind is list or kind is tuple:
        _add_items(obj, found, len(obj))
    elif kind is dict:
        _add_entries(obj.items(), found, len(obj))
    elif kind is set or kind is frozenset:
        for value in _bounded(obj, found, len(obj)):
            found.add("{...}", value)
    elif kind in custom.registered():
        # Before the special cases: a registered class goes its own way, whatever it is.
        _add_custom(obj, found)
    elif kind is types.FunctionType:
        _add_function(obj, found)
    elif kind is types.ModuleType:
        _add_named(vars(obj), found)
    elif issubclass(kind, type):
        _add_class(obj, found)
    elif kind is types.CellType:
        found.add(".cell_contents", obj.cell_contents)
    elif kind is types.MethodType or kind is types.BuiltinFunctionType:
        if kind is types.MethodType:
            found.add(".__func__", obj.__func__)
        found.add(".__self__", obj.__self__)
    elif kind is property:
        for attribute in ("fget", "fset", "fdel"):
            found.add(f".{attribute}", getattr(obj, attribute))
    elif kind is staticmethod or kind is classmethod:
        found.add(".__func__", obj.__func__)
    elif kind is _loaded("numpy", "ndarray") and obj.dtype.hasobject:
        indices = itertools.product(*map(range, obj.shape))
        for index in _bounded(indices, found, obj.size):
            found.add(f"[{', '.join(map(str, index))}]", obj[index])
    elif kind is _loaded("pandas", "DataFrame"):
        _add_labels(obj, found, "index", "columns", "attrs")
        for index, label in enumerate(_bounded(obj.columns, found, len(obj.columns))):
            found.add(_key_step(label), obj.iloc[:, index])
    elif kind is _loaded("pandas", "Series"):
        _add_labels(obj, found, "index", "attrs")
        if obj.dtype == object:
            for index, value in enumerate(_bounded(obj, found, len(obj))):
                found.add(f".iloc[{index}]", value)
        else:
            found.add(".array", obj.array)
    else:
        _add_reduced(obj, found)


def _loaded(module: str, name: str) -> object:
    """A class of an optional library, or None where the program has not imported it."""
    return getattr(sys.modules.get(module), name, None)


def _add_labels(obj: Any, found: Members, *names: str) -> None:
    for name in names:
        found.add(f".{name}", getattr(obj, name))


def _bounded(values: Iterable[Any], found: Members, size: int | None = None) -> list[Any]:
    taken = list(itertools.islice(values, MAX_MEMBERS + 1))
    if len(taken) > MAX_MEMBERS:
        del taken[MAX_MEMBERS:]
        of = f" of {size:,}" if size is not None else ""
        found.note = f"only the first {MAX_MEMBERS:,}{of} members were tried"
    return taken


def _add_items(values: Iterable[Any], found: Members, size: int | None = None) -> None:
    for index, value in enumerate(_bounded(values, found, size)):
        found.add(f"[{index}]", value)


def _add_entries(
    entries: Iterable[tuple[Any, Any]], found: Members, size: int | None = None
) -> None:
    for index, (key, value) in enumerate(_bounded(entries, found, size)):
        found.add(f".keys()[{index}]", key)
        if type(value) not in _ATOMS:
            found.add(_key_step(key), value)


def _add_named(namespace: dict[str, Any], found: Members) -> None:
    for name, value in _bounded(namespace.items(), found, len(namespace)):
        found.add(_attribute_step(name), value)


def _add_function(fn: types.FunctionType, found: Members) -> None:
    # A function that is pickled by reference never fails, so this one goes by value.
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=False):
        try:
            found.add(f".__closure__[{name!r}]", cell.cell_contents)
        except ValueError:  # an empty cell
            continue
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


def _add_custom(obj: Any, found: Members) -> None:
    try:
        _, (deserializer, state) = custom.reduce_custom(obj)
    except Exception as error:
        found.error = _bare(error)
        return
    found.add("<deserializer>", deserializer)
    found.add("<serialized>", state)


def _add_reduced(obj: Any, found: Members) -> None:
    attributes = _attributes(obj)
    try:
        reduced = _reduce(obj)
    except Exception as error:
        found.error = _bare(error)
        for name, value in attributes.items():
            found.add(_attribute_step(name), value)
        return
    if not isinstance(reduced, tuple):
        return  # the name of a global
    # What the reduction returns is called by the attribute that holds it, if one does.
    steps = {id(value): _attribute_step(name) for name, value in attributes.items()}
    steps[id(type(obj))] = ".__class__"
    function, args, state, items, entries, setter = (*reduced, *(None,) * 6)[:6]
    if issubclass(type(obj), BaseException) and args is obj.args:
        steps |= {id(value): f".args[{index}]" for index, value in enumerate(args)}
    found.add(steps.get(id(function), ".__reduce_ex__(5)[0]"), function)
    for index, value in enumerate(args or ()):
        found.add(steps.get(id(value), f".__reduce_ex__(5)[1][{index}]"), value)
    _add_state(state, attributes, steps, found)
    if items is not None:
        _add_items(items, found)
    if entries is not None:
        _add_entries(entries, found)
    found.add(".__reduce_ex__(5)[5]", setter)
    # functools.partial, for one, names its function among the arguments and in the state.
    found.items = list({(item.step, id(item.value)): item for item in found.items}.values())


def _add_state(
    state: Any, attributes: dict[str, Any], steps: dict[int, str], found: Members
) -> None:
    if id(state) in steps:
        found.add(steps[id(state)], state)
        return
    # A dict, or a pair of dicts (for __dict__ and for __slots__), unless __getstate__ says otherwise.
    parts = state if type(state) is tuple and len(state) == 2 else (state,)
    if all(part is None or type(part) is dict for part in parts):
        for part in parts:
            for key, value in _bounded((part or {}).items(), found):
                if type(value) in _ATOMS:
                    continue
                if attributes.get(key) is value:
                    found.add(_attribute_step(key), value)
                else:
                    found.add(steps.get(id(value), f".__getstate__(){_key_step(key)}"), value)
    elif type(state) in (list, tuple):
        for index, value in enumerate(_bounded(state, found)):
            found.add(steps.get(id(value), f".__getstate__()[{index}]"), value)
    else:
        found.add(".__getstate__()", state)


def _reduce(obj: Any) -> Any:
    # In the pickler's own order.
    reducer = cloudpickle.Pickler.dispatch_table.get(type(obj))
    return reducer(obj) if reducer is not None else obj.__reduce_ex__(5)


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


def _key_step(key: Any) -> str:
    if type(key) in _ATOMS or (type(key) is tuple and all(type(k) in _ATOMS for k in key)):
        text = repr(key)
        return f"[{text if len(text) <= 60 else text[:57] + '...'}]"
    return f"[<{type_name(key)}>]"


def _attribute_step(name: Any) -> str:
    if type(name) is str and name.isidentifier() and not keyword.iskeyword(name):
        return f".{name}"
    return f".__dict__{_key_step(name)}"


def _bare(error: Exception) -> Exception:
    # The frames of a traceback keep every object on the way, until the next garbage collection.
    return error.with_traceback(None)


# ---- the search ------------------------------------------------------------------------------------------------------


class _TimeUp(Exception):
    """The time limit passed in the middle of a trial."""


@dataclass(slots=True, eq=False)
class _Node:
    """An object that fails, on the search's stack or done with."""

    step: str
    value: Any
    error: Exception
    parent: _Node | None
    depth: int
    #: How many nodes in a row, this one last, failed with a RecursionError.
    deep: int = 0
    parts: Members = field(default_factory=Members)
    pending: Iterator[tuple[Member, Exception]] = field(default_factory=lambda: iter(()))
    children: list[_Node] = field(default_factory=list)
    #: Culprits were found here or below.
    found: bool = False
    #: The lowest depth on the stack that this one leads back to: a cycle.
    back: int = sys.maxsize
    failure: Failure | None = None

    @property
    def path(self) -> str:
        steps = []
        node: _Node | None = self
        while node is not None:
            steps.append(node.step)
            node = node.parent
        return "".join(reversed(steps))


class _Search:
    """Depth first, with a stack of its own.

    A node is closed when all of its failing parts are.  If no culprit was found in them it is one itself, unless
    it only leads back to a node above it, which then decides for the whole cycle.
    """

    def __init__(self, dumps: Dumps | None, *, seconds: float, most: int) -> None:
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds
        self.most = most
        self.failures: list[Failure] = []
        self.dumps = dumps
        self.nodes: dict[int, _Node] = {}  # by id of the object, which the node keeps alive
        self.tried: dict[int, tuple[Any, Exception | None]] = {}

    def run(self, obj: Any, name: str, *, whole: bool = False) -> _Node | None:
        """Search; give the root of the tree of what fails, or None if nothing does.

        Parameters
        ----------
        whole : bool
            The object itself is tried to the end, however long that takes; only then does time count.
        """
        error = self.attempt(obj, math.inf if whole else None)
        if error is None:
            return None
        if whole:
            self.deadline = time.monotonic() + self.seconds
        root = _Node(name, obj, error, None, 0, deep=int(_is_recursion(error)))
        stack = [root]
        self.open(root)
        while stack:
            node = stack[-1]
            following = None if self.ended() else next(node.pending, None)
            if following is None:
                self.close(stack.pop())
            else:
                child = self.enter(node, *following)
                if child is not None:
                    stack.append(child)
        return root

    def ended(self) -> bool:
        return len(self.failures) >= self.most or self.late()

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def let_go(self) -> None:
        """Drop the objects, which cycles between the nodes would keep until the next collection."""
        for node in self.nodes.values():
            node.value = node.parent = None
            node.children.clear()
        self.nodes.clear()
        self.tried.clear()

    def attempt(self, value: Any, limit: float | None = None) -> Exception | None:
        """What pickling this object raises, if anything; a `_TimeUp` says that it is not known."""
        known = self.tried.get(id(value))
        if known is not None:
            return known[1]
        error = self.attempt_new(value, limit)
        self.tried[id(value)] = (value, error)
        return error

    def attempt_new(self, value: Any, limit: float | None = None) -> Exception | None:
        try:
            if self.dumps is not None:
                self.dumps(value)
            else:
                if limit is None:
                    # A huge member must not take the time of those behind it.
                    limit = (time.monotonic() + self.deadline) / 2
                _Probe(limit).dump(value)
        except Exception as error:
            return _bare(error)
        return None

    def open(self, node: _Node) -> None:
        self.nodes[id(node.value)] = node
        if node.deep < DEEP and node.depth < MAX_DEPTH:
            node.parts = members(node.value)
            node.pending = self.failing(node)

    def failing(self, node: _Node) -> Iterator[tuple[Member, Exception]]:
        """The parts of a node that fail, in order: all together first, then halves of what fails."""
        parts = node.parts.items
        ranges = [(0, len(parts))] if parts else []
        while ranges:
            if self.late():
                return
            start, stop = ranges.pop()
            if stop - start > 1:
                # The node fails, so the whole is not worth a try, and neither are a few.
                if 4 < stop - start < len(parts):
                    together = [part.value for part in parts[start:stop]]
                    if self.attempt_new(together) is None:
                        continue
                middle = (start + stop) // 2
                ranges += [(middle, stop), (start, middle)]
                continue
            error = self.attempt(parts[start].value)
            if isinstance(error, _TimeUp):
                node.parts.note = node.parts.note or "some of its members took too long to try"
            if error is None or isinstance(error, _TimeUp):
                continue
            if node.parts.error is not None and _reason(error) != _reason(node.parts.error):
                continue  # the object's own reduction failed, for another reason than this attribute
            yield parts[start], error

    def enter(self, node: _Node, part: Member, error: Exception) -> _Node | None:
        """Take note of a failing part; give a node if it is to be searched."""
        known = self.nodes.get(id(part.value))
        if known is None:
            deep = node.deep + 1 if _is_recursion(error) else 0
            child = _Node(part.step, part.value, error, node, node.depth + 1, deep)
            node.children.append(child)
            self.open(child)
            return child
        if known.failure is not None and type(node.value) is not types.BuiltinFunctionType:
            # A culprit in a second place: both need to be seen.  (Not so lock.acquire beside the lock.)
            again = _Node(part.step, part.value, error, node, node.depth + 1)
            self.blame(again, known.failure.reason)
            node.children.append(again)
            node.found = True
        elif known.found or known.failure is not None:
            node.found = True
        else:
            node.back = min(node.back, known.depth, known.back)
        return None

    def close(self, node: _Node) -> None:
        parent = node.parent
        if not node.found and node.back >= node.depth:
            own = node.parts.error
            if own is not None and _is_recursion(own):
                self.blame(node, f"its own reduction does not end: {_reason(own)}")
            elif node.deep:
                self.blame_depth(node)
            else:
                self.blame(node, _reason(node.error), self.cut(node))
        if parent is not None:
            parent.found = parent.found or node.found
            if not node.found:
                parent.back = min(parent.back, node.back)
            if node.failure is None and not node.children and node in parent.children:
                parent.children.remove(node)  # it led only to what is in the tree elsewhere
        node.parts = Members()
        node.pending = iter(())

    def cut(self, node: _Node) -> str:
        if node.parts.note:
            return node.parts.note
        if self.late():
            return f"the search ended after {self.seconds:g} s"
        if node.depth >= MAX_DEPTH:
            return f"the search ended {MAX_DEPTH} levels down"
        return ""

    def blame(self, node: _Node, reason: str, cut: str = "") -> None:
        node.found = True
        node.failure = Failure(
            path=node.path,
            type_name=type_name(node.value),
            reason=f"{reason} ({cut})" if cut else reason,
            parent=node.parent.path if node.parent is not None else None,
            depth=node.depth,
            complete=not cut,
        )
        self.failures.append(node.failure)

    def blame_depth(self, node: _Node) -> None:
        """Nested too deeply: the place that matters is where it begins, with a few steps to recognise it by."""
        chain = [node]
        while chain[-1].deep > 1 and chain[-1].parent is not None:
            chain.append(chain[-1].parent)
        chain.reverse()
        top = chain[0]
        steps = "".join(below.step for below in chain[1:4])
        shown = chain[min(1, len(chain) - 1)]
        shown.failure = Failure(
            path=f"{top.path}{steps}...",
            type_name=type_name(shown.value),
            reason=_nested_too_deeply(),
            parent=shown.parent.path if shown.parent is not None else None,
            depth=shown.depth,
        )
        self.failures.append(shown.failure)
        shown.children.clear()
        for below in chain[1:]:
            below.found = True
            below.pending = iter(())  # one such place is enough
        node.found = True


_NESTED = "nested deeper than Python's recursion limit"


def _nested_too_deeply() -> str:
    if sys.version_info >= (3, 12):
        # Code in C, such as the pickler, has a limit of its own there, which no setting moves.
        return f"{_NESTED} for code in C (no setting moves it): flatten it"
    return f"{_NESTED} ({sys.getrecursionlimit()}): flatten it or raise sys.setrecursionlimit"


def _is_recursion(error: BaseException | None) -> bool:
    # cloudpickle turns a RecursionError into a PicklingError with that as its cause.
    for _ in range(10):
        if error is None:
            return False
        if isinstance(error, RecursionError):
            return True
        error = error.__cause__ or error.__context__
    return False


class _Probe(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle is untyped
    """Pickles to nowhere, with the registered serializers, until a point in time."""

    def __init__(self, deadline: float) -> None:
        # Before Pickler's own __init__, which looks at it once; later it would be ignored.
        self.dispatch_table = ChainMap(custom.registered(), cloudpickle.Pickler.dispatch_table)
        super().__init__(_Nowhere(deadline), protocol=5, buffer_callback=_swallow)


class _Nowhere:
    """A file that keeps nothing, and a clock: the pickler writes to it about every 64 KB."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def write(self, data: Any) -> int:
        if time.monotonic() > self.deadline:
            raise _TimeUp("it took too long to try")
        return len(data)


def _swallow(buffer: pickle.PickleBuffer) -> None:
    """Take a buffer out of band, and do nothing with it."""


# ---- what is said ----------------------------------------------------------------------------------------------------


def type_name(obj: Any) -> str:
    """The name of an object's type, with its module unless that is ``builtins`` or ``__main__``."""
    kind: type = type(obj)
    module: object = kind.__module__
    if not isinstance(module, str) or module in ("builtins", "__main__"):
        return kind.__qualname__
    return f"{module}.{kind.__qualname__}"


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} '{name}'"


def _reason(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    name = type(error).__name__
    if isinstance(error, KeyError) and text:
        text = f"{name}: {text}"  # its text alone is but the key
    return _shorten(text) if text else name


def _shorten(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    return f"{text[:half]} ... {text[-half:]}"


def _default_name(obj: Any) -> str:
    if type(obj) is types.FunctionType:
        return obj.__name__ if obj.__name__.isidentifier() else "fn"
    return str(obj.__name__) if issubclass(type(obj), type) else "obj"


_ADVICE = (
    "Make such objects inside the task or in an initializer, leave them out in __getstate__, "
    "or see shmpool.register_serializer."
)


def _render(root: _Node | None, label: str, obj: Any, count: int) -> list[str]:
    head = f"{label} ({_article(type_name(obj))})"
    if root is None:
        return [f"{head} can be serialised"]
    lines = []
    pending = [root]
    while pending:
        node = pending.pop()
        what = f"{node.step} ({_article(type_name(node.value))})" if node is not root else head
        if node is root and node.failure is None:
            what += " cannot be serialised"
        elif node.failure is not None:
            what += f": {node.failure.reason}"
        lines.append("  " * node.depth + what)
        pending += reversed(node.children)
    if count >= MAX_FAILURES:
        lines.append(f"... the search ended after {MAX_FAILURES} failures")
    return [*lines, _ADVICE]


def _print(lines: list[str], file: TextIO | None) -> None:
    out = file if file is not None else sys.stdout
    if out is None:
        return  # a program without a console
    text = "\n".join(lines) + "\n"
    encoding = getattr(out, "encoding", None) or "utf-8"
    # A name that the file cannot show must not be what fails here.
    out.write(text.encode(encoding, "backslashreplace").decode(encoding))
