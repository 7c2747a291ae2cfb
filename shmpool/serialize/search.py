"""One idea: to find what cannot be pickled, try the parts of what cannot be pickled.

An object that fails is taken apart the way the pickler would (:mod:`shmpool.serialize.parts`), the parts are tried one
by one, and those that fail are taken apart in turn.  A part that fails although all of its own parts pass is a culprit.

::

    fn                           fails: look inside
    |- .__closure__['n']         passes: done with
    `- .__globals__['CONFIG']    fails: look inside
       |- ['name']                   passes
       `- ['lock']                   fails, and has no parts that fail: a culprit

How an object is tried is the caller's: :data:`Trial`.

Rules
-----
* Nothing is tried twice, and nothing is tried that cannot fail.  Many parts are tried together, then in halves.
* No recursion here: the search keeps its own stack, so that it sees the same recursion limit at every depth.
* Everything that runs code of the user's (reduction functions, attributes, iteration) may raise anything.

Guarantees
----------
* Work is bounded: members per object, depth, failures, time.  What was cut short says so in its failure's reason.
* Cycles end.  Of what the objects' own code raises, only ``KeyboardInterrupt`` and ``SystemExit`` get out.
"""

from __future__ import annotations

import math
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shmpool.errors import RefError
from shmpool.serialize.parts import Member, Members, members, without_traceback
from shmpool.serialize.words import reason_of, type_name, with_article

__all__ = ["NESTED", "Failure", "Node", "Search", "TimeUp", "Trial"]

#: Pickles an object, or raises what pickling it raises; at a point in time (``time.monotonic``) it may give up with
#: :class:`TimeUp`.  It has no side effects: it is called many times, with the parts and with lists of parts.
Trial = Callable[[Any, float], object]

#: Levels below the object that was asked about.
MAX_DEPTH = 200
#: A RecursionError that is still there so many levels further down comes from depth, not from one object's own code.
DEEP = 20
#: How the reason begins where it is depth.
NESTED = "nested deeper than Python's recursion limit"


class TimeUp(Exception):
    """A trial was given up at its point in time: whether the object can be pickled is not known."""


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
        return f"{self.path} ({with_article(self.type_name)}): {self.reason}"


@dataclass(slots=True, eq=False)
class Node:
    """An object that fails, on the search's stack or done with."""

    step: str
    value: Any
    error: Exception
    parent: Node | None
    depth: int
    #: How many nodes in a row, this one last, failed with a RecursionError.
    deep: int = 0
    parts: Members = field(default_factory=Members)
    pending: Iterator[tuple[Member, Exception]] = field(default_factory=lambda: iter(()))
    children: list[Node] = field(default_factory=list)
    #: Culprits were found here or below.
    found: bool = False
    #: The lowest depth on the stack that this one leads back to: a cycle.
    back: int = sys.maxsize
    failure: Failure | None = None

    @property
    def path(self) -> str:
        """The way to it, from the object that was asked about."""
        steps = []
        node: Node | None = self
        while node is not None:
            steps.append(node.step)
            node = node.parent
        return "".join(reversed(steps))


class Search:
    """Depth first, with a stack of its own.

    A node is closed when all of its failing parts are.  If no culprit was found in them it is one itself, unless
    it only leads back to a node above it, which then decides for the whole cycle.

    Parameters
    ----------
    trial : Trial
        How an object is tried.
    seconds : float
        What the search may take.
    most : int
        Culprits after which it ends.
    """

    def __init__(self, trial: Trial, *, seconds: float, most: int) -> None:
        self._trial = trial
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._most = most
        self.failures: list[Failure] = []
        self._nodes: dict[int, Node] = {}  # by id of the object, which the node keeps alive
        self._tried: dict[int, tuple[Any, Exception | None]] = {}

    def run(self, obj: Any, name: str, *, whole: bool = False) -> Node | None:
        """Search; give the root of the tree of what fails, or None if nothing does.

        Parameters
        ----------
        whole : bool
            The object itself is tried to the end, however long that takes; only then does time count.
        """
        error = self._attempt(obj, math.inf if whole else None)
        if error is None:
            return None
        if whole:
            self._deadline = time.monotonic() + self._seconds
        root = Node(name, obj, error, None, 0, deep=int(_is_recursion(error)))
        stack = [root]
        self._open(root)
        while stack:
            node = stack[-1]
            following = None if self._ended() else next(node.pending, None)
            if following is None:
                self._close(stack.pop())
            else:
                child = self._enter(node, *following)
                if child is not None:
                    stack.append(child)
        return root

    def _ended(self) -> bool:
        return len(self.failures) >= self._most or self._late()

    def _late(self) -> bool:
        return time.monotonic() > self._deadline

    def let_go(self) -> None:
        """Drop the objects, which cycles between the nodes would keep until the next collection."""
        for node in self._nodes.values():
            node.value = node.parent = None
            node.children.clear()
        self._nodes.clear()
        self._tried.clear()

    def _attempt(self, value: Any, until: float | None = None) -> Exception | None:
        """What pickling this object raises, if anything; a `TimeUp` says that it is not known."""
        known = self._tried.get(id(value))
        if known is not None:
            return known[1]
        error = self._attempt_new(value, until)
        self._tried[id(value)] = (value, error)
        return error

    def _attempt_new(self, value: Any, until: float | None = None) -> Exception | None:
        if until is None:
            # A huge member must not take the time of those behind it; to forget it again takes time as well.
            now = time.monotonic()
            until = now + (self._deadline - now) / 3
        try:
            self._trial(value, until)
        except Exception as error:
            return without_traceback(error)
        return None

    def _open(self, node: Node) -> None:
        self._nodes[id(node.value)] = node
        if node.deep < DEEP and node.depth < MAX_DEPTH and not _seldom_fails(node.value):
            node.parts = members(node.value)
            node.pending = self._failing(node)

    def _failing(self, node: Node) -> Iterator[tuple[Member, Exception]]:
        """The parts of a node that fail, in order: all together first, then halves of what fails."""
        # Arrays that cannot travel are those of another store, and seldom there.
        of_store = isinstance(node.error, RefError)
        parts = [part for part in node.parts.items if of_store or not _seldom_fails(part.value)]
        ranges = [(0, len(parts))] if parts else []
        while ranges:
            if self._late():
                return
            start, stop = ranges.pop()
            if stop - start > 1:
                # The node fails, so the whole is not worth a try, and neither are a few.
                if 4 < stop - start < len(parts):
                    together = [part.value for part in parts[start:stop]]
                    if self._attempt_new(together) is None:
                        continue
                middle = (start + stop) // 2
                ranges += [(middle, stop), (start, middle)]
                continue
            error = self._attempt(parts[start].value)
            if isinstance(error, TimeUp):
                node.parts.note = node.parts.note or "some of its members took too long to try"
            if error is None or isinstance(error, TimeUp):
                continue
            if node.parts.error is not None and reason_of(error) != reason_of(node.parts.error):
                continue  # the object's own reduction failed, for another reason than this attribute
            yield parts[start], error

    def _enter(self, node: Node, part: Member, error: Exception) -> Node | None:
        """Take note of a failing part; give a node if it is to be searched."""
        known = self._nodes.get(id(part.value))
        if known is None:
            deep = node.deep + 1 if _is_recursion(error) else 0
            child = Node(part.step, part.value, error, node, node.depth + 1, deep)
            node.children.append(child)
            self._open(child)
            return child
        if known.failure is not None and type(node.value) is not types.BuiltinFunctionType:
            # A culprit in a second place: both need to be seen.  (Not so lock.acquire beside the lock.)
            again = Node(part.step, part.value, error, node, node.depth + 1)
            self._blame(again, known.failure.reason)
            node.children.append(again)
            node.found = True
        elif known.found or known.failure is not None:
            node.found = True
        else:
            node.back = min(node.back, known.depth, known.back)
        return None

    def _close(self, node: Node) -> None:
        parent = node.parent
        if not node.found and node.back >= node.depth:
            own = node.parts.error
            if own is not None and _is_recursion(own):
                self._blame(node, f"its own reduction does not end: {reason_of(own)}")
            elif node.deep:
                self._blame_depth(node)
            else:
                self._blame(node, reason_of(node.error), self._cut(node))
        if parent is not None:
            parent.found = parent.found or node.found
            if not node.found:
                parent.back = min(parent.back, node.back)
            if node.failure is None and not node.children and node in parent.children:
                parent.children.remove(node)  # it led only to what is in the tree elsewhere
        node.parts = Members()
        node.pending = iter(())

    def _cut(self, node: Node) -> str:
        if node.parts.note:
            return node.parts.note
        if self._late():
            return f"the search ended after {self._seconds:g} s"
        if node.depth >= MAX_DEPTH:
            return f"the search ended {MAX_DEPTH} levels down"
        return ""

    def _blame(self, node: Node, reason: str, cut: str = "") -> None:
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

    def _blame_depth(self, node: Node) -> None:
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


def _nested_too_deeply() -> str:
    if sys.version_info >= (3, 12):
        # Code in C, such as the pickler, has a limit of its own there, which no setting moves.
        return f"{NESTED} for code in C (no setting moves it): flatten it"
    return f"{NESTED} ({sys.getrecursionlimit()}): flatten it or raise sys.setrecursionlimit"


def _is_recursion(error: BaseException | None) -> bool:
    # cloudpickle turns a RecursionError into a PicklingError with that as its cause.
    for _ in range(10):
        if error is None:
            return False
        if isinstance(error, RecursionError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _seldom_fails(value: Any) -> bool:
    # Numpy copies an array that is not contiguous: too much for nothing.  (A dtype's metadata may hold anything.)
    if type(value) is not np.ndarray:
        return False
    dtype = value.dtype
    return not dtype.hasobject and dtype.names is None and dtype.metadata is None
