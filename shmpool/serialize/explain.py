"""Which bytes of an object travel by reference, which are copied, which ride in the message, and why.

The object is really pickled, by the code that sends objects, and who would send it says what would become of that:
that gives the totals.  Then it is pickled once more to nowhere, watched part by part
(:mod:`shmpool.serialize.tracing`): that gives the paths.  A buffer that lies somewhere else this time is a copy that
pickling makes.  Only the reasons are knowledge about types, kept in one table, and one is given only for what has been
seen to happen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TextIO

import numpy as np

from shmpool.config import Config
from shmpool.serialize import pickling
from shmpool.serialize.mainmodule import MainModule
from shmpool.serialize.pickling import OBJECT, Pickling
from shmpool.serialize.reasons import (
    SHARED,
    TICKET,
    TOGETHER,
    TOO_DEEP,
    Why,
    is_telling,
    too_long,
    under_limit,
    why_copied,
    why_in_stream,
)
from shmpool.serialize.text import MARK
from shmpool.serialize.tracing import PIECE_BYTES, Piece, trace
from shmpool.serialize.words import print_lines, shorten, type_name

__all__ = ["Explanation", "How", "Part", "Way", "explain"]

How = Literal["shared", "copied", "inline"]

#: Lines of parts of one type that go one way for one reason; the rest of them share a line.
ALIKE = 6


class Way(NamedTuple):
    """How a pickle stream travels, and the buffers beside it; who sends it says so."""

    #: How each buffer travels; "inline": beside the stream.
    buffers: list[How]
    #: Bytes of the stream, of what rides beside it, and of the tables that say where the other buffers are.
    nbytes: int
    #: None: those are the message.  Else they are too many for one, and are copied; the message has this many bytes.
    ticket: int | None = None


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
        the store.  ``"inline"``: they are part of the message.
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
        In the order in which a pickler meets them; then the object itself, with what is left of the stream; then, if
        that is too long for a message and is copied as well, the message, which says where it is.
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
            f"{self.bytes_shared:,} bytes shared, {self.bytes_copied:,} copied, {self.bytes_inline:,} inline"
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
    wanted: Callable[[memoryview], bool],
    way: Callable[[list[bytes | memoryview], list[memoryview]], Way],
    config: Config,
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
    wanted : callable
        Which buffers travel out of band; as for :class:`Pickling`.
    way : callable
        Given a stream and its out-of-band buffers, says how they would travel.
    config : Config
        The limits, for the reasons.
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
    dumped = Pickling(main, wanted).dumps(obj, OBJECT)
    ways = way(*dumped)
    table = pickling.dispatch_table()
    lends = dumped.stream[0][:1] == MARK
    deep = False
    try:
        pieces = trace(
            obj, name, main=main, table=table, wanted=wanted, telling=is_telling, lends=lends
        )
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
        pieces.append(Piece(name, type_name(obj), ways.nbytes, None, out_of_band=False, holder=obj))
    explanation = _explanation(pieces, dumped.buffers, ways, config, deep=deep)
    del dumped
    if not quiet:
        print_lines(str(explanation).splitlines(), file)
    return explanation


def _explanation(
    pieces: list[Piece], sent: list[memoryview], ways: Way, config: Config, *, deep: bool
) -> Explanation:
    """Put together what was seen; ``sent`` are the buffers of the first time, still alive."""
    sums: dict[tuple[str, str, How, Why], int] = {}
    totals: dict[How, int] = {"shared": 0, "copied": 0, "inline": 0}
    # What the stream takes with it, and how that goes, if it is not in the message.
    packed: How = "inline" if ways.ticket is None else "copied"
    left = ways.nbytes
    buffers = zip(ways.buffers, sent, strict=True)

    def add(path: str, kind: str, nbytes: int, how: How, why: Why) -> None:
        key = (path, kind, how, why)
        sums[key] = sums.get(key, 0) + nbytes
        totals[how] += nbytes

    for piece in pieces:
        last = piece is pieces[-1]
        how: How = "inline"
        if piece.out_of_band:
            assert piece.buffer is not None
            how, before = next(buffers)
            if how == "shared":
                why = SHARED
            elif how == "copied":
                is_made = _address(piece.buffer) != _address(before)
                why = why_copied(piece.holder, piece.giver, is_made=is_made)
            else:
                why = under_limit(config.inline_limit)
        elif piece.buffer is not None:
            why = under_limit(config.inline_limit)
        elif last and (deep or piece.nbytes < PIECE_BYTES):
            why = TOO_DEEP if deep else TOGETHER
        else:
            why = why_in_stream(piece.holder)
            if piece.nbytes < config.inline_limit:
                why = Why(why.reason)  # nothing else would be better
        nbytes = piece.nbytes
        if how == "inline":
            how = packed
            if packed == "copied":
                why = too_long(why, config.message_limit)
            # The last has what is left of the stream that is really sent.
            nbytes = left if last else min(nbytes, left)
            left -= nbytes
        add(piece.path, piece.type_name, nbytes, how, why)
    if ways.ticket is not None:
        add(pieces[-1].path, pieces[-1].type_name, ways.ticket, "inline", TICKET)
    parts = tuple(
        Part(path, kind, nbytes, how, why.reason, why.advice)
        for (path, kind, how, why), nbytes in sums.items()
    )
    return Explanation(parts, totals["shared"], totals["copied"], totals["inline"])


def _address(buffer: memoryview) -> int:
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address


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
