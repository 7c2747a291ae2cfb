"""Messages: there and back, and whatever else arrives is a message or a WireError."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmpool.errors import WireError
from shmpool.wire.messages import Answer, Call, Extras, Failed, Notice, Ready, decode, encode

u64 = st.integers(0, (1 << 64) - 1)
u32 = st.integers(0, (1 << 32) - 1)
data = st.binary(max_size=200)
triples = st.lists(st.tuples(u64, u64, u64), max_size=4)
extras = st.builds(
    Extras,
    arenas=triples,
    freed=triples,
    forgotten=st.lists(u64, max_size=4),
    kept=triples,
    released=triples,
)
some_extras = st.none() | extras.filter(bool)
messages = st.one_of(
    st.builds(
        Call,
        task=u64,
        function=data,
        arguments=data,
        readonly=st.booleans(),
        room=u64,
        extras=some_extras,
        serial=u64,
    ),
    st.builds(Notice, extras=extras.filter(bool), room=u64),
    st.builds(Ready, u32),
    st.builds(Failed, st.text(max_size=50)),
    st.builds(
        Answer,
        task=u64,
        ok=st.booleans(),
        result=data,
        copied=u64,
        shared=u64,
        microseconds=u32,
        resident=u64,
        extras=some_extras,
    ),
)


@given(messages)
@settings(max_examples=200)
def test_what_is_encoded_comes_back_the_same(message):
    assert decode(encode(message)) == message


@given(messages)
@settings(max_examples=50)
def test_payloads_may_be_views_of_other_memory(message):
    if isinstance(message, Call):
        message = message._replace(arguments=memoryview(message.arguments))
    if isinstance(message, Answer):
        message = message._replace(result=memoryview(message.result))
    assert decode(memoryview(encode(message))) == message


def test_payloads_are_not_copied_when_they_are_decoded():
    encoded = bytearray(encode(Call(1, b"function", b"arguments")))
    call = decode(encoded)
    encoded[-1:] = b"S"
    assert isinstance(call, Call) and bytes(call.arguments) == b"argumentS"


def test_extras_that_say_nothing_are_left_out():
    assert decode(encode(Call(1, b"", b"", extras=Extras()))) == Call(1, b"", b"", extras=None)
    assert len(encode(Call(1, b"f", b"a", extras=Extras()))) == len(encode(Call(1, b"f", b"a")))


def test_extras_show_what_they_say():
    assert repr(Extras()) == "Extras()"
    assert repr(Extras(freed=[(1, 2, 3)], arenas=[(4, 5, 6)])) == (
        "Extras(arenas=[(4, 5, 6)], freed=[(1, 2, 3)])"
    )


def test_a_duration_that_is_too_long_to_be_written_is_cut():
    answer = decode(encode(Answer(1, True, b"", microseconds=1 << 40)))
    assert isinstance(answer, Answer) and answer.microseconds == (1 << 32) - 1


def test_a_text_that_is_no_unicode_arrives_all_the_same():
    failed = decode(encode(Failed("a lone surrogate: \udc80")))
    assert isinstance(failed, Failed) and failed.text.startswith("a lone surrogate: ")


@given(messages)
@settings(max_examples=50)
def test_every_message_that_is_cut_short_is_a_wire_error(message):
    encoded = encode(message)
    for length in range(len(encoded)):
        with pytest.raises(WireError):
            decode(encoded[:length])


@given(messages, st.lists(st.integers(0, 1 << 20), min_size=1, max_size=3))
@settings(max_examples=300)
def test_flipped_bits_give_a_message_or_a_wire_error(message, bits):
    encoded = bytearray(encode(message))
    for bit in bits:
        encoded[bit // 8 % len(encoded)] ^= 1 << bit % 8
    with contextlib.suppress(WireError):
        decode(encoded)


@given(st.binary(max_size=120))
@settings(max_examples=200)
def test_any_bytes_give_a_message_or_a_wire_error(encoded):
    with contextlib.suppress(WireError):
        decode(encoded)


def test_a_message_with_something_after_it_is_a_wire_error():
    for message in (
        Call(1, b"f", b"a"),
        Call(1, b"f", b"a", extras=Extras(forgotten=[1])),
        Answer(1, True, b"r"),
        Failed("why"),
    ):
        with pytest.raises(WireError):
            decode(encode(message) + b"\0")
