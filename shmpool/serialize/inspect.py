"""Say what inside an object cannot be pickled: as a tree for people, as a phrase for error messages.

A trial keeps no bytes, and ends when its time is up.  (Not so with a ``dumps`` of the caller's: one call of it is then
the grain of the time limit.)  The objects are not changed, beyond what pickling them would do.
"""

from __future__ import annotations

import time
import types
from collections import ChainMap
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol, TextIO

import cloudpickle

from shmpool.serialize import custom
from shmpool.serialize.handover import ONCE, standing_in
from shmpool.serialize.reductions import REDUCTIONS
from shmpool.serialize.search import NESTED, Failure, Node, Search, TimeUp, Trial
from shmpool.serialize.words import print_lines, shorten, type_name, with_article

__all__ = ["Failure", "Nowhere", "culprit_path", "inspect_serializability"]

#: Failures worth showing.
MAX_FAILURES = 100
#: Seconds that inspect_serializability may take: someone waits for it at a prompt.
INSPECT_SECONDS = 10.0
#: Seconds that may be added to an error that is raised anyway.
CULPRIT_SECONDS = 0.25

Dumps = Callable[[Any], object]


class _Dumping(Protocol):
    def dump(self, obj: Any, /) -> object: ...


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

    Notes
    -----
    A socket or a connection of multiprocessing passes, since it can be an argument or a result.  It cannot be where
    it would be handed over several times: in the function of a ``map``, in what is put, in a task with retries.

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
    trial = _probing() if dumps is None else _once(dumps)
    search = Search(trial, seconds=INSPECT_SECONDS, most=MAX_FAILURES)
    try:
        root = search.run(obj, label, whole=True)
        if not quiet:
            print_lines(_render(root, label, obj, len(search.failures)), print_file)
        return root is None, search.failures
    finally:
        search.let_go()


def culprit_path(
    obj: Any,
    name: str,
    dumps: Dumps | None = None,
    *,
    pickler: Callable[[Nowhere], _Dumping] | None = None,
) -> str | None:
    """One phrase for an error message: where the first part is that cannot be pickled.

    Parameters
    ----------
    obj : object
        What could not be pickled.
    name : str
        What to call it: ``args``.
    dumps : callable, optional
        As for :func:`inspect_serializability`.
    pickler : callable, optional
        In its place: ``pickler(file)`` makes a pickler that writes to `file`, which keeps nothing.  Buffers should go
        out of band, to nowhere as well.

    Returns
    -------
    str or None
        ``args[0]['model'].lock (a '_thread.lock')``; None if `obj` can be pickled after all, or nothing is known.
        Takes a quarter of a second or two, give or take one call of `dumps`.  Raises no ``Exception``.
    """
    if pickler is not None:
        trial = _with(pickler)
    elif dumps is not None:
        trial = _once(dumps)
    else:
        trial = _probing()
    search = Search(trial, seconds=CULPRIT_SECONDS, most=1)
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
    path = shorten(failure.path)
    if failure.reason.startswith(NESTED):
        limit, _, advice = failure.reason.partition(": ")
        return f"{limit} at {path}: {advice}"
    where = f"{path} ({with_article(failure.type_name)})"
    return where if failure.complete else f"somewhere in {where}"


# ---- how an object is tried ------------------------------------------------------------------------------------------


class Nowhere:
    """A file that keeps nothing, and a clock: picklers write to it about every 64 KB.

    Parameters
    ----------
    deadline : float
        Point in time (``time.monotonic``) from which on a write raises :class:`TimeUp`.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def write(self, data: Any) -> int:
        """Count what was written, and forget it."""
        if time.monotonic() > self.deadline:
            raise TimeUp("it took too long to try")
        return len(data)


def _with(pickler: Callable[[Nowhere], _Dumping]) -> Trial:
    return lambda obj, deadline: pickler(Nowhere(deadline)).dump(obj)


def _once(dumps: Dumps) -> Trial:
    return lambda obj, _deadline: dumps(obj)


class _Probe(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle is untyped
    """cloudpickle's pickler with the registered serializers; buffers go nowhere."""

    def __init__(self, file: Nowhere, handed_over: dict[type, Callable[[Any], Any]]) -> None:
        # Before Pickler's own __init__, which looks at it once; later it would be ignored.
        self.dispatch_table = ChainMap(
            custom.registered(), handed_over, REDUCTIONS, cloudpickle.Pickler.dispatch_table
        )
        super().__init__(file, protocol=5, buffer_callback=lambda _: None)


def _probing() -> Trial:
    handed_over = standing_in(ForkingPickler._extra_reducers, ONCE)  # type: ignore[attr-defined]
    return _with(lambda file: _Probe(file, handed_over))


# ---- what is said ----------------------------------------------------------------------------------------------------


def _default_name(obj: Any) -> str:
    if type(obj) is types.FunctionType:
        return obj.__name__ if obj.__name__.isidentifier() else "fn"
    return str(obj.__name__) if issubclass(type(obj), type) else "obj"


_ADVICE = (
    "Make such objects inside the task or in an initializer, leave them out in __getstate__, "
    "or see shmpool.register_serializer."
)


def _render(root: Node | None, label: str, obj: Any, count: int) -> list[str]:
    head = f"{label} ({with_article(type_name(obj))})"
    if root is None:
        return [f"{head} can be serialised"]
    lines = []
    pending = [root]
    while pending:
        node = pending.pop()
        what = f"{node.step} ({with_article(type_name(node.value))})" if node is not root else head
        if node is root and node.failure is None:
            what += " cannot be serialised"
        elif node.failure is not None:
            what += f": {node.failure.reason}"
        lines.append("  " * node.depth + what)
        pending += reversed(node.children)
    if count >= MAX_FAILURES:
        lines.append(f"... the search ended after {MAX_FAILURES} failures")
    return [*lines, _ADVICE]
