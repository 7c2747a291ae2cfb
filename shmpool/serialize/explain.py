"""Which bytes of an object travel by reference, which are copied, which ride in the message, and why.

The object is really pickled, by the code that sends objects: that gives the totals.  Then it is pickled once more to
nowhere, watched part by part (:mod:`shmpool.serialize.tracing`): that gives the paths.  Only the reasons are
knowledge about types, kept in one table, and one is given only for what has been seen to happen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TextIO

from shmpool.serialize import pickling
from shmpool.serialize.mainmodule import MainModule
from shmpool.serialize.pickling import OBJECT, Pickling
from shmpool.serialize.reasons import (
    SHARED,
    TOGETHER,
    TOO_DEEP,
    Why,
    is_telling,
    under_limit,
    why_copied,
    why_in_stream,
)
from shmpool.serialize.tracing import PIECE_BYTES, Piece, trace
from shmpool.serialize.words import print_lines, shorten, type_name

__all__ = ["Explanation", "Part", "explain"]

How = Literal["shared", "copied", "inline"]

#: Lines of parts of one type that go one way for one reason; the rest of them share a line.
ALIKE = 6


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one part of an object that travel one way.

    Attributes
    ----------
    path : str
        The way to the part, as Python would write it: ``obj['model'].weights``.
    type_name : str
        Its type: ``numpy.ndarray``.
    nbytes : int
        How many bytes.  What a part holds that has a line of its own does not count.
    how : {"shared", "copied", "inline"}
        ``"shared"``: they are in the store already and travel by reference.  ``"copied"``: they will be copied into
        the store, once.  ``"inline"``: they are part of the message.
    reason : str
        Why.
    advice : str
        What to do about it; empty if there is nothing.
    """

    path: str
    type_name: str
    nbytes: int
    how: How
    reason: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """How the bytes of an object travel.  ``str()`` makes a table of it.

    Attributes
    ----------
    parts : tuple of Part
        In the order in which a pickler meets them; the last is the object itself, with what is left of the stream.
    bytes_shared, bytes_copied, bytes_inline : int
        Sums over all parts.
    """

    parts: tuple[Part, ...]
    bytes_shared: int
    bytes_copied: int
    bytes_inline: int

    def __str__(self) -> str:
        rows = [
            (f"{part.nbytes:,}", part.how, shorten(part.path), part.type_name, part.reason)
            for part in _fold(self.parts)
        ]
        first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
        lines = []
        for nbytes, *rest, reason in rows:
            texts = (text.ljust(width) for text, width in zip(rest, others, strict=False))
            lines.append("  ".join((nbytes.rjust(first), *texts, reason)))
        lines.append(
            f"{self.bytes_shared:,} bytes shared, {self.bytes_copied:,} copied once, {self.bytes_inline:,} inline"
        )
        advised: dict[str, str] = {}
        for part in self.parts:
            if part.advice:
                advised.setdefault(part.advice, part.path)  # its first path stands for all
        lines += [f"- {shorten(path)}: {advice}" for advice, path in advised.items()]
        return "\n".join(lines)


def explain(
    obj: Any,
    name: str = "obj",
    *,
    located: Callable[[memoryview], bool],
    inline_limit: int,
    main: MainModule | None = None,
    file: TextIO | None = None,
    quiet: bool = False,
) -> Explanation:
    """Say how an object's bytes would travel, and print it.

    It costs what sending the object costs, without the store, and some 10 us for each Python object inside.

    Parameters
    ----------
    obj : object
    name : str
        What to call it in paths.
    located : callable
        Is a buffer in the store already?
    inline_limit : int
        Buffers with fewer bytes ride in the message.
    main : MainModule, optional
        What the receiver has in its ``__main__``; default: nothing.
    file : file, optional
        Where the table is printed; default: ``sys.stdout``.
    quiet : bool, default False
        Print nothing.

    Raises
    ------
    SerializationError
        It cannot be pickled.
    """
    main = main or MainModule.nothing()

    def wanted(buffer: memoryview) -> bool:
        return buffer.nbytes >= inline_limit

    dumped = Pickling(main, wanted).dumps(obj, OBJECT)
    length = sum(len(piece) for piece in dumped.stream)
    table = pickling.dispatch_table()
    deep = False
    try:
        pieces = trace(obj, name, main=main, table=table, wanted=wanted, telling=is_telling)
    except RecursionError:  # Python's own pickler takes several levels for one of the object
        deep, pieces = True, []
    if [piece.nbytes for piece in pieces if piece.out_of_band] != [
        b.nbytes for b in dumped.buffers
    ]:
        # Rather less than something that is not so.
        pieces = [
            Piece(name, type_name(obj), buffer.nbytes, buffer, out_of_band=True, holder=obj)
            for buffer in dumped.buffers
        ]
        pieces.append(Piece(name, type_name(obj), length, None, out_of_band=False, holder=obj))
    del dumped
    explanation = _explanation(pieces, length, located, inline_limit, deep=deep)
    if not quiet:
        print_lines(str(explanation).splitlines(), file)
    return explanation


def _explanation(
    pieces: list[Piece],
    length: int,
    located: Callable[[memoryview], bool],
    inline_limit: int,
    *,
    deep: bool,
) -> Explanation:
    sums: dict[tuple[str, str, How, Why], int] = {}
    totals: dict[How, int] = {"shared": 0, "copied": 0, "inline": 0}
    for piece in pieces:
        last = piece is pieces[-1]
        how: How = "inline"
        if piece.out_of_band:
            assert piece.buffer is not None
            how = "shared" if located(piece.buffer) else "copied"
            why = SHARED if how == "shared" else why_copied(piece.holder)
        elif piece.buffer is not None:
            why = under_limit(inline_limit)
        elif last and (deep or piece.nbytes < PIECE_BYTES):
            why = TOO_DEEP if deep else TOGETHER
        else:
            why = why_in_stream(piece.holder)
            if piece.nbytes < inline_limit:
                why = Why(why.reason)  # nothing else would be better
        # The last has what is left of the stream that is really sent.
        nbytes = max(0, length - totals["inline"]) if last else piece.nbytes
        key = (piece.path, piece.type_name, how, why)
        sums[key] = sums.get(key, 0) + nbytes
        totals[how] += nbytes
    parts = tuple(
        Part(path, kind, nbytes, how, why.reason, why.advice)
        for (path, kind, how, why), nbytes in sums.items()
    )
    return Explanation(parts, totals["shared"], totals["copied"], totals["inline"])


def _fold(parts: tuple[Part, ...]) -> list[Part]:
    """The parts to show: of those that are alike the first few, and one for the sum of the rest."""
    alike: dict[tuple[str, How, str], list[Part]] = {}
    for part in parts:
        alike.setdefault((part.type_name, part.how, part.reason), []).append(part)
    shown = []
    for group in alike.values():
        if len(group) > ALIKE:
            rest = group[ALIKE - 1 :]
            total = sum(part.nbytes for part in rest)
            group[ALIKE - 1 :] = [replace(rest[0], path=f"... {len(rest):,} more", nbytes=total)]
        shown += group
    return shown
