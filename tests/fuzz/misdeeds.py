"""Misdeeds: what a task can do to the channel of the worker that runs it, and through it to the parent.

Each is a function of a :class:`Hand`, which has its hand in the worker's channel, and is tried with random numbers that
a seed gives.  Afterwards the task returns, and the worker goes on as if nothing had happened: its own answer comes
behind whatever the misdeed has sent.

Workers import this module, so it imports nothing that is heavy.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import mmap
import os
import pickle
import random
import socket
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from shmpool.memory.segment import Segment
from shmpool.store import current
from shmpool.store import payload as payloads
from shmpool.store.blocks import Block
from shmpool.store.payload import Span
from shmpool.wire import messages
from shmpool.wire.channel import _FRAME, _MARK, WorkerEnd
from shmpool.wire.messages import Answer, Call, Extras, Failed, Notice, Ready

PAGE = mmap.PAGESIZE
#: Numbers at which something may tip over.
EDGES = (
    0,
    1,
    PAGE - 1,
    PAGE,
    1 << 31,
    1 << 32,
    (1 << 62) - 1,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)

Misdeed = Callable[["Hand"], None]
#: By name.
MISDEEDS: dict[str, Misdeed] = {}
#: Those after which the worker cannot be relied upon: the task must fail, and say so.
FATAL: set[str] = set()


def misdeed(function: Misdeed) -> Misdeed:
    MISDEEDS[function.__name__] = function
    return function


def fatal_misdeed(function: Misdeed) -> Misdeed:
    FATAL.add(function.__name__)
    return misdeed(function)


class Hand:
    """A task's hand in its worker's channel.

    Attributes
    ----------
    rng : random.Random
    end : WorkerEnd
    number : int
        What the parent calls the task that is running.
    arguments : list of Block
        The blocks that came with it: the parent's own.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        (self.end,) = [
            o for o in gc.get_objects() if type(o) is WorkerEnd and o.calls.fileno() >= 0
        ]
        call = _running_call()
        self.number = call.task
        self.arguments = payloads.decode(call.arguments).blocks

    def write(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Bytes, as they are."""
        if fds:
            sent = socket.send_fds(self.end._answers, [data], fds)
            data = data[sent:]
        self.end._answers.sendall(data)

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """A message in its frame."""
        self.write(framed(messages.encode(message)), fds)

    def answer(
        self, payload: bytes, fds: Sequence[int] = (), *, ok: bool = True, **more: Any
    ) -> None:
        """An answer to the task that is running."""
        self.send(Answer(self.number, ok, payload, **more), fds)

    def number_64(self) -> int:
        """Of 64 bits, and often at an edge."""
        return self.rng.choice([*EDGES, self.rng.getrandbits(64), self.rng.getrandbits(16)])

    def triple(self) -> tuple[int, int, int]:
        return self.number_64(), self.number_64(), self.number_64()

    def segment(self, nbytes: int = 16 * PAGE) -> tuple[Segment, tuple[int, int, int]]:
        """A good one, and what is to be said of it."""
        segment = Segment.create(nbytes, "memfd")
        segment.reserve(0, nbytes)
        return segment, (self.rng.getrandbits(64), nbytes, 0)

    def hand_over(self, fd: int, arena: tuple[int, int, int], block: Block | None = None) -> None:
        """Answer with an array that lies in an arena which comes with the answer."""
        block = block or Block(arena[0], 0, 4 * PAGE)
        self.answer(array_in(block), [fd], extras=Extras(arenas=[arena]))


def _running_call() -> Call:
    frame = sys._getframe()
    while type(frame.f_locals.get("call")) is not Call:
        assert frame.f_back is not None
        frame = frame.f_back
    return frame.f_locals["call"]


def framed(data: bytes, length: int | None = None) -> bytes:
    """As the channel does it; or with another length than it has."""
    length = len(data) if length is None else length
    return _FRAME.pack(length, length ^ _MARK) + data


def array_in(block: Block, nbytes: int = PAGE) -> bytes:
    """The payload of an array at the start of a block."""
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(np.zeros(nbytes, np.uint8), 5, buffer_callback=buffers.append)
    return b"".join(payloads.encode([stream], [block], [Span(0, 0, nbytes)]))


def commit(name: str, seed: int, *_: Any) -> str:
    """The task."""
    MISDEEDS[name](Hand(seed))
    return name


# ---------------------------------------------------------------- bytes


@fatal_misdeed
def garbage(hand: Hand) -> None:
    hand.write(hand.rng.randbytes(hand.rng.choice([1, 2, 3, 4, 5, 44, 1000, 300_000])))


@fatal_misdeed
def text(hand: Hand) -> None:
    """As of a library that writes its log to the wrong descriptor."""
    hand.write(b"WARNING: something else has this descriptor\n" * hand.rng.choice([1, 100]))


@fatal_misdeed
def zeros(hand: Hand) -> None:
    hand.write(bytes(hand.rng.choice([1, 3, 4, 8, 1000])))


@fatal_misdeed
def garbage_in_a_frame(hand: Hand) -> None:
    for _ in range(hand.rng.randint(1, 3)):
        hand.write(framed(hand.rng.randbytes(hand.rng.choice([0, 1, 43, 44, 45, 1000]))))


@fatal_misdeed
def a_message_that_is_too_long(hand: Hand) -> None:
    length = hand.rng.choice([(1 << 28) + 1, (1 << 32) - 1])
    hand.write(framed(hand.rng.randbytes(hand.rng.choice([0, 1, 100])), length))


@fatal_misdeed
def a_message_that_is_cut_short(hand: Hand) -> None:
    """What comes next is taken for the rest of it, and what is left of that is nothing."""
    data = framed(_some_message(hand))
    hand.write(data[: -hand.rng.randrange(1, 20)])


@misdeed
def a_message_with_flipped_bits(hand: Hand) -> None:
    # Not in the pickle stream: what runs when that is read is pickle's business, and may be the end of any program.
    data = bytearray(_some_message(hand))
    for _ in range(hand.rng.randint(1, 4)):
        bit = hand.rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
    hand.write(framed(bytes(data)))


@fatal_misdeed
def a_message_in_the_wrong_order(hand: Hand) -> None:
    data = framed(_some_message(hand))
    at = hand.rng.randrange(1, len(data))
    hand.write(data[at:] + data[:at])


def _some_message(hand: Hand) -> bytes:
    """Well-formed; a payload in it has no pickle stream."""
    tables = b"".join(payloads.encode([], [Block(*hand.triple())], []))
    extras = Extras(
        arenas=[hand.triple()], kept=[hand.triple()] * 2, released=[hand.triple()], forgotten=[7]
    )
    return messages.encode(
        hand.rng.choice(
            [
                Answer(hand.number, True, tables, extras=extras),
                Answer(hand.number, False, tables),
                Answer(hand.number_64(), True, b"\0"),
                Failed("no"),
                Ready(os.getpid()),
                Notice(extras),
            ]
        )
    )


# ---------------------------------------------------------------- messages


@fatal_misdeed
def an_answer_to_a_task_of_another_worker(hand: Hand) -> None:
    for number in range(max(0, hand.number - 40), hand.number):
        hand.send(Answer(number, True, b"\0" + pickle.dumps("forged")))


@fatal_misdeed
def an_answer_to_no_task(hand: Hand) -> None:
    hand.send(Answer(hand.rng.choice([1 << 40, (1 << 64) - 1]), True, b"\0" + pickle.dumps(1)))


@misdeed
def two_answers(hand: Hand) -> None:
    hand.answer(b"\0" + pickle.dumps("early"))


@fatal_misdeed
def ready_again(hand: Hand) -> None:
    hand.send(Ready(hand.rng.choice([0, 1, os.getpid(), os.getppid()])))


@fatal_misdeed
def the_initializer_is_said_to_have_failed(hand: Hand) -> None:
    hand.send(Failed("it did not"))


@fatal_misdeed
def a_message_of_the_parents(hand: Hand) -> None:
    extras = Extras(freed=[hand.triple()], forgotten=[hand.number_64()])
    hand.send(hand.rng.choice([Call(hand.number, b"\0", b"\0"), Notice(extras)]))


@misdeed
def immense_figures(hand: Hand) -> None:
    figures = {
        name: hand.number_64()
        for name in ("copied", "shared", "microseconds", "resident")
        if hand.rng.random() < 0.5
    }
    hand.answer(b"\0" + pickle.dumps("early"), **figures)


@misdeed
def blocks_are_kept_and_released_that_it_never_had(hand: Hand) -> None:
    segment, arena = hand.segment()
    mine = [*hand.arguments, Block(*hand.triple()), Block(arena[0], 0, 4 * PAGE)]
    extras = Extras(
        arenas=[arena],
        kept=[tuple(hand.rng.choice(mine)) for _ in range(3)],
        released=[tuple(hand.rng.choice(mine)) for _ in range(3)],
    )
    hand.answer(array_in(Block(arena[0], 0, 4 * PAGE)), [segment.fd], extras=extras)


@fatal_misdeed
def a_block_is_kept_that_it_never_had(hand: Hand) -> None:
    segment, arena = hand.segment()
    extras = Extras(arenas=[arena], kept=[(hand.rng.getrandbits(64), 0, PAGE)])
    hand.answer(array_in(Block(arena[0], 0, 4 * PAGE)), [segment.fd], extras=extras)


# ---------------------------------------------------------------- payloads


def _raise() -> NoReturn:
    raise RuntimeError("on purpose")


def _recurse() -> NoReturn:
    _recurse()


class Reduced:
    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def _pickles() -> Iterator[bytes]:
    good = pickle.dumps(["a", {"b": 1.5}, b"c" * 300], 5)
    yield from (good[:n] for n in range(0, len(good), 7))
    yield good + b"more"
    yield b"\x80\x05\x97."  # takes a buffer, and there is none
    yield (
        b"\x80\x05\x8e" + struct.pack("<Q", (1 << 63) - 1) + b"."
    )  # bytes that are longer than the stream
    yield b"\x80\x05\x8d" + struct.pack("<Q", 1 << 40) + b"."
    yield b"\x80\x05\x95" + struct.pack("<Q", 1 << 62) + b"."
    yield b"\x80\xff."
    yield b"cshmpool\nno_such_name\n."
    yield b"cno_such_module\nname\n."
    yield b"\x80\x05" + b"(" * 1000 + b"."
    for thing in (
        Reduced(_raise),
        Reduced(_recurse),
        Reduced(sys.exit, 5),
        Reduced(int, "no number"),
        Reduced(functools.reduce, _raise, ()),
        Reduced(open, "/nonexistent"),
    ):
        yield pickle.dumps(thing, 5)


@misdeed
def a_pickle_that_is_none(hand: Hand) -> None:
    stream = hand.rng.choice(list(_pickles()))
    hand.answer(b"\0" + stream, ok=hand.rng.random() < 0.5)


@misdeed
def an_exception_that_is_none(hand: Hand) -> None:
    what = hand.rng.choice([1, None, "text", [], ValueError, io.StringIO, Reduced(dict)])
    hand.answer(b"\0" + pickle.dumps(what), ok=False)


@fatal_misdeed
def a_payload_that_is_none(hand: Hand) -> None:
    rng = hand.rng
    tables = b"".join(payloads.encode([b"stream"], [Block(1, 0, PAGE)], [Span(0, 0, PAGE)]))
    hand.answer(
        rng.choice([
            b"",
            bytes([rng.randint(3, 255)]) + b"N.",
            tables[: rng.randrange(1, len(tables))],
            b"\1" + struct.pack("<II", rng.getrandbits(32), rng.getrandbits(32)) + bytes(100),
            b"\2" + rng.randbytes(100),
        ])
    )  # fmt: skip


@fatal_misdeed
def a_block_of_an_arena_that_does_not_exist(hand: Hand) -> None:
    hand.answer(array_in(Block(hand.rng.getrandbits(64), 0, 4 * PAGE)))


@misdeed
def a_block_of_the_parents_that_is_not_there(hand: Hand) -> None:
    arena, offset, size = hand.arguments[0]
    rng = hand.rng
    hand.answer(
        array_in(
            rng.choice(
                [
                    Block(arena, offset + PAGE, PAGE),
                    Block(arena, offset, size + PAGE),
                    Block(arena, offset, PAGE),
                    Block(arena, 1 << 40, 4 * PAGE),
                    Block(arena, (1 << 64) - PAGE, 4 * PAGE),
                    Block(arena, offset + (32 << 20), size),
                ]
            )
        )
    )


@misdeed
def a_block_of_another_workers(hand: Hand) -> None:
    """Of an arena that the parent has from somebody else, where no block is known; the neighbours put theirs there."""
    others = [arena for arena in current.get_store()._arenas.values() if arena.origin is not None]
    for arena in others:
        offset = PAGE * hand.rng.randrange(64)
        hand.answer(array_in(Block(arena.info.id, offset, 8 * PAGE)))


@misdeed
def a_block_of_an_odd_shape(hand: Hand) -> None:
    segment, arena = hand.segment()
    rng = hand.rng
    block = rng.choice(
        [
            Block(arena[0], 0, 0),
            Block(arena[0], 1, PAGE),
            Block(arena[0], 0, PAGE + 1),
            Block(arena[0], 15 * PAGE, 2 * PAGE),
            Block(arena[0], hand.number_64(), hand.number_64()),
        ]
    )
    nbytes = rng.choice([0, 1, PAGE])
    hand.answer(array_in(block, nbytes), [segment.fd], extras=Extras(arenas=[arena]))


@misdeed
def blocks_that_overlap(hand: Hand) -> None:
    segment, arena = hand.segment()
    tables = [Block(arena[0], PAGE * i, 8 * PAGE) for i in range(3)]
    spans = [Span(i, 0, 8 * PAGE) for i in range(3)]
    buffers: list[pickle.PickleBuffer] = []
    arrays = [np.zeros(8 * PAGE, np.uint8) for _ in range(3)]
    stream = pickle.dumps(arrays, 5, buffer_callback=buffers.append)
    payload = b"".join(payloads.encode([stream], tables, spans))
    hand.answer(payload, [segment.fd], extras=Extras(arenas=[arena]))


@misdeed
def a_payload_in_the_store_that_is_none(hand: Hand) -> None:
    segment, arena = hand.segment()
    block = Block(arena[0], 0, 4 * PAGE)
    inner = hand.rng.choice([
        b"",
        b"\0" + pickle.dumps("all is well"),
        b"\0cno_such_module\nname\n.",
        array_in(Block(hand.rng.getrandbits(64), 0, PAGE)),
        array_in(Block(*hand.arguments[0])),
        array_in(Block(arena[0], 4 * PAGE, 4 * PAGE)),
        payloads.encode_indirect(block, 100),  # it is where it says that it is
        hand.rng.randbytes(200),
    ])  # fmt: skip
    os.pwrite(segment.fd, inner, 0)
    extras = Extras(arenas=[arena])
    hand.answer(payloads.encode_indirect(block, max(1, len(inner))), [segment.fd], extras=extras)


@misdeed
def a_payload_in_the_store_that_changes(hand: Hand) -> None:
    """It is good when it is looked at first, and then is not; see also test_store.py."""
    segment, arena = hand.segment()
    block, other = Block(arena[0], 0, 4 * PAGE), Block(arena[0], 4 * PAGE, 4 * PAGE)
    good = array_in(other)
    bad = array_in(Block(hand.rng.choice([arena[0], 7]), 0, 4 * PAGE))
    os.pwrite(segment.fd, good, 0)
    extras = Extras(arenas=[arena])
    hand.answer(payloads.encode_indirect(block, len(good)), [segment.fd], extras=extras)
    for _ in range(500):
        os.pwrite(segment.fd, bad, 0)
        os.pwrite(segment.fd, good, 0)


# ---------------------------------------------------------------- descriptors


def _wrong_descriptors(hand: Hand, stack: contextlib.ExitStack) -> Iterator[int]:
    """Of things that are no arena of 16 pages."""

    def closing(fd: int) -> int:
        stack.callback(os.close, fd)
        return fd

    yield from map(closing, os.pipe())
    yield closing(os.open("/", os.O_RDONLY))
    yield closing(os.open("/dev/null", os.O_RDWR))
    yield closing(os.open("/dev/zero", os.O_RDWR))
    yield closing(os.open("/proc/self/status", os.O_RDONLY))
    yield closing(os.open("/", os.O_PATH))
    yield closing(os.eventfd(0))
    yield stack.enter_context(socket.socket()).fileno()
    yield closing(os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR))
    short = closing(os.memfd_create("short", os.MFD_ALLOW_SEALING))
    os.ftruncate(short, 15 * PAGE)
    yield short
    unsealed = closing(os.memfd_create("unsealed", os.MFD_ALLOW_SEALING))
    os.ftruncate(unsealed, 16 * PAGE)
    yield unsealed
    segment, _ = hand.segment()
    yield closing(os.open(f"/proc/self/fd/{segment.fd}", os.O_WRONLY))


@fatal_misdeed
def the_wrong_kind_of_descriptor(hand: Hand) -> None:
    with contextlib.ExitStack() as stack:
        fd = hand.rng.choice(list(_wrong_descriptors(hand, stack)))
        arena = (hand.rng.getrandbits(64), 16 * PAGE, hand.rng.choice([0, 1, 2, 3, 1 << 63]))
        hand.hand_over(fd, arena)


@fatal_misdeed
def a_memfd_that_shrinks(hand: Hand) -> None:
    """To read what is not there any more would be a SIGBUS, in the parent."""
    fd = os.memfd_create("shrinks", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 16 * PAGE)
        hand.hand_over(fd, (hand.rng.getrandbits(64), 16 * PAGE, 0))
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)


@fatal_misdeed
def an_arena_of_another_size(hand: Hand) -> None:
    segment, arena = hand.segment()
    size = hand.rng.choice([0, 1, PAGE, 17 * PAGE, hand.number_64()])
    hand.hand_over(segment.fd, (arena[0], size, 0))


@fatal_misdeed
def arenas_without_descriptors(hand: Hand) -> None:
    arenas = [(hand.rng.getrandbits(64), PAGE, 0) for _ in range(hand.rng.choice([1, 2, 300]))]
    segment, _ = hand.segment()
    fds = [segment.fd] * hand.rng.randrange(min(4, len(arenas)))
    hand.answer(b"\0" + pickle.dumps("early"), fds, extras=Extras(arenas=arenas))


@misdeed
def descriptors_that_nobody_asked_for(hand: Hand) -> None:
    segment, _ = hand.segment()
    fds = [segment.fd] * hand.rng.choice([1, 10, 253])
    hand.answer(b"\0" + pickle.dumps("early"), fds)


@fatal_misdeed
def descriptors_without_end(hand: Hand) -> None:
    """With bytes of a message that never ends."""
    segment, _ = hand.segment()
    data = framed(messages.encode(Answer(hand.number, True, bytes(5000))))
    for i in range(100):
        hand.write(data[i : i + 1], [segment.fd] * 253)


@fatal_misdeed
def one_bad_arena_among_good_ones(hand: Hand) -> None:
    segments = [hand.segment() for _ in range(6)]
    arenas = [arena for _, arena in segments]
    at = hand.rng.randrange(len(arenas))
    arenas[at] = (arenas[at][0], 1 << 40, 0)
    block = Block(arenas[0][0], 0, 4 * PAGE)
    fds = [segment.fd for segment, _ in segments]
    hand.answer(array_in(block), fds, extras=Extras(arenas=arenas))


@misdeed
def an_arena_that_is_the_parents(hand: Hand) -> None:
    segment, arena = hand.segment()
    arena = (hand.arguments[0].arena, *arena[1:])
    hand.hand_over(segment.fd, arena)


@misdeed
def the_same_arena_twice(hand: Hand) -> None:
    segment, arena = hand.segment()
    other, _ = hand.segment()
    block = Block(arena[0], 0, 4 * PAGE)
    hand.answer(array_in(block), [segment.fd, other.fd], extras=Extras(arenas=[arena, arena]))


# ---------------------------------------------------------------- sockets


@misdeed
def no_more_answers(hand: Hand) -> None:
    hand.end._answers.shutdown(hand.rng.choice([socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR]))


@misdeed
def no_more_calls(hand: Hand) -> None:
    hand.end.calls.shutdown(hand.rng.choice([socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR]))


@fatal_misdeed
def everything_is_closed(hand: Hand) -> None:
    """As code does that makes a daemon of its process."""
    os.closerange(3, 4096)


@misdeed
def something_is_closed(hand: Hand) -> None:
    end = hand.end
    os.close(hand.rng.choice([end.calls.fileno(), end._answers.fileno(), end.lifeline]))


@misdeed
def a_message_back_through_the_wrong_socket(hand: Hand) -> None:
    hand.end.calls.setblocking(False)
    with contextlib.suppress(OSError):
        for _ in range(50):
            hand.end.calls.send(messages.encode(Answer(hand.number, True, b"\0N.")))
    hand.end.calls.setblocking(True)
