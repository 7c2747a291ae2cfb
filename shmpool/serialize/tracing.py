"""What a pickler does with each part of an object, as it happens: which bytes go out of band, which into the stream.

:func:`trace` pickles to nowhere, with the pickler written in Python, and watches it: what :meth:`_Tracer.save` is
given, what reduction functions return, how many bytes are written meanwhile, and which buffers are met.  Nothing is
guessed: a byte belongs to the innermost object that was being saved when it was written.  What a reduction made on
the way (a tuple of arguments, a copy as bytes) has no path of its own; its bytes belong to the object that made it.

::

    obj                          a dict: 60 bytes of its own
    `- ['model']                 an object: a path, by its key
       `- (reduction) state      made on the way: no path
          `- .weights            an array: a path, by its attribute; its buffer goes out of band
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from shmpool.serialize.debugging import PROTOCOL, DebugPickler
from shmpool.serialize.mainmodule import MainModule
from shmpool.serialize.parts import Members, members
from shmpool.serialize.text import Lent, lending
from shmpool.serialize.words import type_name

__all__ = ["Piece", "trace"]

#: In the stream, parts with fewer bytes are no pieces of their own, but belong to what holds them.
PIECE_BYTES = 1024
#: Lists and the like of at least so many numbers are pickled as a whole: one by one takes a microsecond each.
MANY = 1000

_NUMBERS = frozenset({type(None), bool, int, float, complex})
#: What is never a piece inside of something, so that nobody needs to know where it was met.
_SMALL = _NUMBERS | {type(...), type(NotImplemented), type}


class Piece(NamedTuple):
    """Bytes of an object that went one way."""

    #: The way to the object.
    path: str
    type_name: str
    nbytes: int
    #: The buffer, if they are one: out of band, or refused for being small.
    buffer: memoryview | None
    out_of_band: bool
    #: What had these bytes: the object at `path`, or something that its reduction made.
    holder: Any
    #: The innermost object whose reduction gave the holder, if it is a buffer's; else None.
    giver: Any = None


def trace(
    obj: Any,
    name: str,
    *,
    main: MainModule,
    table: Mapping[type, Callable[[Any], Any]],
    wanted: Callable[[memoryview], bool],
    telling: Callable[[Any], bool],
    lends: bool = False,
) -> list[Piece]:
    """Pickle an object to nowhere, and say where its bytes go.

    Parameters
    ----------
    obj, name
        The object, and what to call it.
    main, table
        As for :class:`DebugPickler`.
    wanted : callable
        Which buffers travel out of band.
    telling : callable
        Does it tell more to know that an object had these bytes than that the one which made it had?
    lends : bool, default False
        Large strings are lent, as buffers (:mod:`shmpool.serialize.text`).

    Returns
    -------
    list of Piece
        In the order in which they are met.  The last is the object itself, with what is left of the stream.
    """
    tracer = (lending(_Tracer) if lends else _Tracer)(name, main, table, wanted, telling)
    pieces: list[Piece] = tracer.pieces
    try:
        tracer.dump(obj)
    finally:
        # It refers to itself, and to all that it met. Memoryviews among that, with buffers over them, must not be left
        # to the garbage collector: Python 3.11 crashes when it clears them in the wrong order.
        vars(tracer).clear()
    return pieces


class _Frame:
    """An object that is being saved."""

    __slots__ = ("_steps", "counted", "obj", "path", "reduced", "start")

    def __init__(self, obj: Any, start: int) -> None:
        self.obj = obj
        self.start = start
        #: Bytes written since then that belong to pieces.
        self.counted = 0
        #: What its reduction returned, lists in place of iterators.
        self.reduced: tuple[Any, ...] | None = None
        #: The way to it; "" if it has none, None if nobody has asked yet.
        self.path: str | None = None
        self._steps: tuple[Members, dict[int, str]] | None = None

    def step_to(self, obj: Any) -> str | None:
        """The step from this object to one that was met inside, if the object really holds it."""
        if self._steps is None:
            found = members(self.obj, self.reduced, atoms=True)
            # The first name wins. The members themselves are kept: an id serves as long as its object lives.
            steps = {id(part.value): part.step for part in reversed(found.items) if not part.made}
            self._steps = found, steps
        return self._steps[1].get(id(obj))


class _Counter:
    """A file that only counts."""

    nbytes = 0

    def write(self, data: Any) -> int:
        self.nbytes += len(data)
        return len(data)


class _Tracer(DebugPickler):
    def __init__(
        self,
        name: str,
        main: MainModule,
        table: Mapping[type, Callable[[Any], Any]],
        wanted: Callable[[memoryview], bool],
        telling: Callable[[Any], bool],
    ) -> None:
        self._counter = _Counter()
        super().__init__(self._counter, main, self._meet_buffer, table)
        # Past the frames that the pickler collects: every byte counts when it is written.
        self.write = self._counter.write
        self._write_large_bytes = self._write_parts
        self._name = name
        self._wanted = wanted
        self._telling = telling
        self._stack: list[_Frame] = []
        self.pieces: list[Piece] = []

    def _write_parts(self, *parts: bytes) -> None:
        for part in parts:
            self._counter.write(part)

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        kind = type(obj)
        if (kind in _SMALL and self._stack) or id(obj) in self.memo:
            super().save(obj, save_persistent_id)  # type: ignore[misc]
            return
        frame = _Frame(obj, self._counter.nbytes)
        self._stack.append(frame)
        if kind in (list, tuple, set, frozenset, dict) and len(obj) >= MANY and _only_numbers(obj):
            pickle.Pickler(self._counter, PROTOCOL).dump(obj)
            self.memoize(obj)
        else:
            super().save(obj, save_persistent_id)  # type: ignore[misc]
        own = self._counter.nbytes - frame.start - frame.counted
        if len(self._stack) == 1 or (own >= PIECE_BYTES and self._deserves(frame)):
            self._add(len(self._stack) - 1, own, None, False)
        self._stack.pop()
        if self._stack:
            self._stack[-1].counted += frame.counted

    def save_reduce(
        self,
        func: Any,
        args: Any,
        state: Any = None,
        listitems: Iterable[Any] | None = None,
        dictitems: Iterable[Any] | None = None,
        state_setter: Any = None,
        *,
        obj: Any = None,
    ) -> None:
        items = None if listitems is None else list(listitems)
        entries = None if dictitems is None else list(dictitems)
        if self._stack and self._stack[-1].obj is obj:
            self._stack[-1].reduced = (func, args, state, items, entries, state_setter)
        super().save_reduce(  # type: ignore[misc]
            func,
            args,
            state,
            None if items is None else iter(items),
            None if entries is None else iter(entries),
            state_setter,
            obj=obj,
        )

    def _meet_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        wanted = self._wanted(view)
        self._add(len(self._stack) - 1, view.nbytes, view, wanted)
        return not wanted

    def _deserves(self, frame: _Frame) -> bool:
        """Is this object to be a piece?"""
        return bool(self._path(len(self._stack) - 1)) or self._telling(frame.obj)

    def _add(self, level: int, nbytes: int, buffer: memoryview | None, out_of_band: bool) -> None:
        """Take note of bytes of the object on this level of the stack."""
        frame = self._stack[level]
        if not out_of_band:
            frame.counted += nbytes
        holder = frame.obj
        givers = (above.obj for above in reversed(self._stack) if above.reduced is not None)
        if type(holder) is pickle.PickleBuffer and not self._path(level):
            holder = next(givers)  # what has this memory is what was just being reduced
        if type(holder) is Lent:
            holder = holder.text
        giver = next(givers, None) if buffer is not None else None
        while not (path := self._path(level)):
            level -= 1
        at = self._stack[level].obj
        self.pieces.append(Piece(path, type_name(at), nbytes, buffer, out_of_band, holder, giver))

    def _path(self, level: int) -> str:
        """The way to the object on this level of the stack, or "" if a reduction made it."""
        frame = self._stack[level]
        if frame.path is None:
            frame.path = self._name if level == 0 else ""
            for above in range(level - 1, -1, -1):
                step = self._stack[above].step_to(frame.obj)
                if step is not None and (base := self._path(above)):
                    frame.path = base + step
                    break
        return frame.path


def _only_numbers(obj: Any) -> bool:
    values = obj if type(obj) is not dict else (part for entry in obj.items() for part in entry)
    return all(type(value) in _NUMBERS for value in values)
