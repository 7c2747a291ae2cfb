"""The messages between a parent and a worker, and their bytes.  No I/O.

Parent to worker: :class:`Call`, :class:`Notice`.  Worker to parent: :class:`Ready`, :class:`Failed`, :class:`Answer`.
A payload inside a message is bytes that only the store reads.  All numbers are little-endian; lists of numbers are
preceded by their length.  Whoever decodes checks lengths: a message that is cut short or garbled raises
:class:`~shmpool.errors.WireError`, never anything else.

The hot path is a :class:`Call` or :class:`Answer` without extras: one ``struct`` call and one concatenation.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from shmpool.errors import WireError

__all__ = [
    "Answer",
    "Call",
    "Extras",
    "Failed",
    "FromParent",
    "FromWorker",
    "Notice",
    "Ready",
    "decode",
    "encode",
]

Data = bytes | memoryview

_CALL, _NOTICE, _READY, _FAILED, _ANSWER = range(1, 6)
_HEAD = struct.Struct("<BBQIIQQQ")
_COUNT = struct.Struct("<I")
#: Message flags.
_EXTRAS, _OK, _READONLY = 1, 2, 4
#: Microseconds of a task that are told; more count as these (71 minutes).
_LONGEST = 0xFFFFFFFF


class Extras:
    """What rides along with a message when there is something to say.

    Attributes
    ----------
    arenas : list of (id, size, flags)
        Arenas handed over; their descriptors come with the message, in this order.
    freed : list of (arena, offset, times)
        To a worker: blocks of its that the parent has let go of.
    forgotten : list of int
        To a worker: arenas of no more use.
    kept, released : list of (arena, offset, size)
        From a worker: blocks that it keeps beyond their task; and that it has let go of since.
    """

    __slots__ = ("arenas", "forgotten", "freed", "kept", "released")

    def __init__(
        self,
        arenas: list[tuple[int, int, int]] | None = None,
        freed: list[tuple[int, int, int]] | None = None,
        forgotten: list[int] | None = None,
        kept: list[tuple[int, int, int]] | None = None,
        released: list[tuple[int, int, int]] | None = None,
    ) -> None:
        self.arenas = arenas or []
        self.freed = freed or []
        self.forgotten = forgotten or []
        self.kept = kept or []
        self.released = released or []

    def __repr__(self) -> str:
        said = (f"{name}={getattr(self, name)}" for name in self.__slots__ if getattr(self, name))
        return f"Extras({', '.join(said)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extras) and all(
            getattr(self, name) == getattr(other, name) for name in self.__slots__
        )

    __hash__ = None  # type: ignore[assignment]  # it can be changed

    def __bool__(self) -> bool:
        return bool(self.arenas or self.freed or self.forgotten or self.kept or self.released)


class Call(NamedTuple):
    """Run a function: the payloads of the function and of (args, kwargs).

    ``room`` is how much memory the worker's arenas may take, in bytes.  ``serial`` is the function's number: with the
    same one it is the same, and its blocks have been held since; 0 if it comes once.
    """

    task: int
    function: Data
    arguments: Data
    readonly: bool = False
    room: int = 0
    extras: Extras | None = None
    serial: int = 0


class Notice(NamedTuple):
    """Extras that no call is there to carry; ``room`` as in a call, 0 for nothing new."""

    extras: Extras | None
    room: int = 0


class Ready(NamedTuple):
    """The worker has started and run its initializer."""

    pid: int


class Failed(NamedTuple):
    """The initializer raised; the text is its traceback.  The worker ends."""

    text: str


class Answer(NamedTuple):
    """A task's result, or (if not ``ok``) the exception it raised.

    ``copied`` and ``shared`` count bytes of the result that were copied into the store, and that were there already;
    ``microseconds`` is how long the function ran; ``resident`` is how much memory the worker's arenas cost.
    """

    task: int
    ok: bool
    result: Data
    copied: int = 0
    shared: int = 0
    microseconds: int = 0
    resident: int = 0
    extras: Extras | None = None


FromParent = Call | Notice
FromWorker = Ready | Failed | Answer


def encode_call(
    number: int, function: Data, arguments: Data, readonly: bool, room: int, serial: int
) -> bytes:
    """A :class:`Call` without extras, in bytes: the same as :func:`encode` makes, for the hot path."""
    head = _HEAD.pack(
        _CALL, _READONLY if readonly else 0, number, len(function), len(arguments), room, serial, 0
    )
    return b"".join((head, function, arguments))


def encode_answer(
    number: int,
    ok: bool,
    result: Data,
    copied: int,
    shared: int,
    microseconds: int,
    resident: int,
) -> bytes:
    """An :class:`Answer` without extras, in bytes: the same as :func:`encode` makes, for the hot path."""
    if microseconds > _LONGEST:  # noqa: PLR1730  # min() is a call
        microseconds = _LONGEST
    flags = _OK if ok else 0
    return (
        _HEAD.pack(_ANSWER, flags, number, len(result), microseconds, copied, shared, resident)
        + result
    )


def encode(message: FromParent | FromWorker) -> bytes:
    """Put a message into bytes."""
    if isinstance(message, Call):
        extras = message.extras
        if not extras:
            return encode_call(
                message.task, message.function, message.arguments, message.readonly, message.room, message.serial
            )  # fmt: skip
        flags = (_READONLY if message.readonly else 0) | _EXTRAS
        head = _HEAD.pack(
            _CALL, flags, message.task, len(message.function), len(message.arguments), message.room,
            message.serial, 0,
        )  # fmt: skip
        return b"".join((head, message.function, message.arguments, _encode_extras(extras)))
    if isinstance(message, Answer):
        extras = message.extras
        if not extras:
            return encode_answer(*message[:-1])
        flags = (_OK if message.ok else 0) | _EXTRAS
        head = _HEAD.pack(
            _ANSWER, flags, message.task, len(message.result), min(message.microseconds, _LONGEST),
            message.copied, message.shared, message.resident,
        )  # fmt: skip
        return b"".join((head, message.result, _encode_extras(extras)))
    if isinstance(message, Notice):
        return _HEAD.pack(_NOTICE, _EXTRAS, 0, 0, 0, message.room, 0, 0) + _encode_extras(
            message.extras or Extras()
        )
    if isinstance(message, Ready):
        return _HEAD.pack(_READY, 0, message.pid, 0, 0, 0, 0, 0)
    text = message.text.encode(errors="replace")
    return _HEAD.pack(_FAILED, 0, 0, len(text), 0, 0, 0, 0) + text


def decode(data: Data) -> FromParent | FromWorker:
    """Read a message from bytes; payloads inside are views of them.

    Raises
    ------
    WireError
        The bytes are no message.
    """
    try:
        kind, flags, number, first, second, third, fourth, fifth = _HEAD.unpack_from(data)
    except struct.error:
        raise WireError(f"a message of {len(data)} bytes, shorter than its head") from None
    view = memoryview(data)
    start = _HEAD.size
    if kind == _CALL:
        middle, end = start + first, start + first + second
        extras = _end(view, end, flags) if flags & _EXTRAS or end != len(view) else None
        return Call(
            number,
            view[start:middle],
            view[middle:end],
            bool(flags & _READONLY),
            third,
            extras,
            fourth,
        )
    if kind == _ANSWER:
        end = start + first
        extras = _end(view, end, flags) if flags & _EXTRAS or end != len(view) else None
        return Answer(
            number, bool(flags & _OK), view[start:end], third, fourth, second, fifth, extras
        )
    if kind == _NOTICE:
        return Notice(_end(view, start, flags), third)
    if kind == _READY:
        return Ready(number)
    if kind == _FAILED:
        _end(view, start + first, flags)
        return Failed(bytes(view[start:]).decode(errors="replace"))
    raise WireError(f"a message of unknown kind {kind}")


def _end(view: memoryview, end: int, flags: int) -> Extras | None:
    """Check that the message ends at ``end``, or has its extras there."""
    if flags & _EXTRAS:
        return _decode_extras(view, end)
    if end != len(view):
        raise WireError(f"a message of {len(view)} bytes that should have {end}")
    return None


def _encode_extras(extras: Extras) -> bytes:
    triples = (extras.arenas, extras.freed, extras.kept, extras.released)
    parts = [
        _COUNT.pack(len(extras.forgotten)),
        struct.pack(f"<{len(extras.forgotten)}Q", *extras.forgotten),
    ]
    for group in triples:
        flat = [number for triple in group for number in triple]
        parts += _COUNT.pack(len(group)), struct.pack(f"<{len(flat)}Q", *flat)
    return b"".join(parts)


def _decode_extras(view: memoryview, at: int) -> Extras:
    def numbers(width: int) -> tuple[int, ...]:
        nonlocal at
        (count,) = _COUNT.unpack_from(view, at)
        at += _COUNT.size
        if at + 8 * width * count > len(view):
            raise WireError(f"a message of {len(view)} bytes that lists {count} items")
        found = struct.unpack_from(f"<{width * count}Q", view, at)
        at += 8 * width * count
        return found

    def triples() -> list[tuple[int, int, int]]:
        flat = numbers(3)
        return list(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))

    try:
        forgotten = list(numbers(1))
        extras = Extras(triples(), triples(), forgotten, triples(), triples())
    except struct.error:
        raise WireError(f"a message cut short at {len(view)} bytes") from None
    if at != len(view):
        raise WireError(f"a message of {len(view)} bytes that should have {at}")
    return extras
