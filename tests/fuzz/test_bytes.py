"""The codecs and the stream: whatever the bytes are, what comes out is a message, a payload, or a ``WireError``."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmpool.errors import WireError
from shmpool.store import payload as payloads
from shmpool.store.blocks import Block
from shmpool.store.payload import Span
from shmpool.wire import messages
from shmpool.wire.channel import make_channel
from shmpool.wire.messages import Answer, Call, Extras, Failed, Notice, Ready

from .misdeeds import EDGES, PAGE, framed

pytestmark = pytest.mark.slow

u64 = st.integers(0, (1 << 64) - 1)
triples = st.lists(st.tuples(u64, u64, u64), max_size=3)
extras = st.builds(
    Extras, arenas=triples, freed=triples, forgotten=st.lists(u64, max_size=3), kept=triples,
    released=triples,
)  # fmt: skip
data = st.binary(max_size=60)
some_message = st.one_of(
    st.builds(Call, u64, data, data, st.booleans(), u64, extras, u64),
    st.builds(Answer, u64, st.booleans(), data, u64, u64, st.integers(0, 9), u64, extras),
    st.builds(Notice, extras, u64),
    st.builds(Ready, u64),
    st.builds(Failed, st.text(max_size=20)),
).map(messages.encode)
some_payload = st.builds(
    lambda stream, n, spans: b"".join(
        payloads.encode(
            [stream],
            [Block(7, PAGE * i, PAGE) for i in range(n)],
            [Span(i % n, 0, PAGE) for i in range(spans)],
        )
    ),
    data,
    st.integers(1, 4),
    st.integers(0, 4),
)


@st.composite
def spoiled(draw: st.DrawFn, good: st.SearchStrategy[bytes]) -> bytes:
    """Bytes that were good, and then something happened to them, more than once maybe."""
    spoilt = bytearray(draw(good))
    for _ in range(draw(st.integers(1, 3))):
        size = len(spoilt)
        at, stop = sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))
        deed = draw(st.sampled_from(["cut", "flip", "number", "drop", "twice", "mix", "move"]))
        if deed == "cut":
            del spoilt[stop:]
        elif deed == "flip" and at < size:
            spoilt[at] ^= 1 << draw(st.integers(0, 7))
        elif deed == "number":
            number, form = draw(st.sampled_from(EDGES)), draw(st.sampled_from(["<I", "<Q"]))
            field = struct.pack(form, number & ((1 << 8 * struct.calcsize(form)) - 1))
            spoilt[at : at + len(field)] = field
        elif deed == "drop":
            del spoilt[at:stop]
        elif deed == "twice":
            spoilt[at:at] = spoilt[at:stop]
        elif deed == "mix":
            spoilt[at:] = draw(good)[at:]
        elif deed == "move":
            spoilt = spoilt[at:] + spoilt[:at]
    return bytes(spoilt)


@contextlib.contextmanager
def in_little_memory():
    """Whatever numbers are in a short message: nobody believes them, and makes room for so many."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20, f"{peak:,} bytes for a message of some hundred"


@given(spoiled(some_message))
@settings(max_examples=400)
def test_a_spoiled_message_is_a_message_or_a_wire_error(encoded: bytes) -> None:
    with in_little_memory(), contextlib.suppress(WireError):
        message = messages.decode(encoded)
        for part in (getattr(message, name, b"") for name in ("function", "arguments", "result")):
            assert len(part) <= len(encoded)
        messages.encode(message)


@given(spoiled(some_payload))
@settings(max_examples=400)
def test_a_spoiled_payload_is_a_payload_or_a_wire_error(encoded: bytes) -> None:
    with in_little_memory(), contextlib.suppress(WireError):
        layout = payloads.decode(encoded)
        for index, start, nbytes in layout.spans:
            assert start + nbytes <= layout.blocks[index].size
        assert len(layout.stream) <= len(encoded)
        assert not layout.indirect or (len(layout.blocks), len(layout.spans)) == (1, 1)


garbage = st.one_of(
    st.binary(min_size=8, max_size=40), data.map(lambda begun: framed(begun, (1 << 28) + 1))
)


@given(
    good=st.lists(data, max_size=6),
    after=st.just(b"") | garbage,
    cuts=st.lists(st.integers(0, 400), max_size=8),
)
@settings(max_examples=200)
def test_from_a_stream_come_the_answers_before_what_is_none(good, after, cuts) -> None:
    parent, worker = make_channel()
    stream = b"".join(map(framed, good)) + after
    got: list[bytes] = []
    refused = False
    try:
        for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), len(stream)], strict=True):
            if stream[start:stop] and not refused:
                worker._answers.sendall(stream[start:stop])
                try:
                    received, _ = parent.receive()
                except WireError:
                    received = []
                got += map(bytes, received)
                refused = parent.problem is not None
    finally:
        parent.close()
        worker.close()
    assert got == good
    assert refused == bool(after)


@pytest.mark.parametrize("count", [(1 << 32) - 1, 1 << 31, 10_000_000])
def test_counts_that_are_not_true_cost_nothing(count: int) -> None:
    answer = bytearray(messages.encode(Answer(1, True, b"", extras=Extras(forgotten=[1]))))
    at = len(messages.encode(Answer(1, True, b"")))
    answer[at : at + 4] = struct.pack("<I", count)
    payload = b"\1" + struct.pack("<II", count, count)
    with in_little_memory():
        with pytest.raises(WireError):
            messages.decode(answer)
        with pytest.raises(WireError):
            payloads.decode(payload)
