"""Payloads as bytes: there and back, and whatever else arrives is a payload or a WireError."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmpool.errors import WireError
from shmpool.store.blocks import Block
from shmpool.store.payload import RIDING, Layout, Span, decode, encode, encode_indirect

u64 = st.integers(0, (1 << 64) - 1)
blocks = st.builds(Block, u64, u64, st.integers(1, 1 << 62))


@st.composite
def payloads(draw):
    stream = draw(st.lists(st.binary(max_size=60), max_size=3))
    held = draw(st.lists(blocks, max_size=4))
    spans = []
    for _ in range(draw(st.integers(0, 4)) if held else 0):
        index = draw(st.integers(0, len(held) - 1))
        start = draw(st.integers(0, held[index].size))
        spans.append(Span(index, start, draw(st.integers(0, held[index].size - start))))
    riding = draw(st.lists(st.binary(min_size=1, max_size=60), max_size=3))
    at = 0
    for buffer in riding:
        spans.insert(draw(st.integers(0, len(spans))), Span(RIDING, at, len(buffer)))
        at += len(buffer)
    return stream, held, spans, riding


@given(payloads())
@settings(max_examples=150)
def test_what_is_encoded_comes_back_the_same(payload):
    stream, held, spans, riding = payload
    layout = decode(b"".join(encode(stream, held, spans, riding)))
    assert (layout.blocks, layout.spans, layout.indirect) == (held, spans, False)
    assert bytes(layout.stream) == b"".join(stream)
    assert bytes(layout.riding) == b"".join(riding)


@given(blocks)
def test_an_indirect_payload_says_where_the_rest_of_it_is(block):
    layout = decode(encode_indirect(block, block.size))
    assert layout == Layout([block], [Span(0, 0, block.size)], b"", indirect=True)


def test_the_stream_is_not_copied():
    encoded = bytearray(b"".join(encode([b"stream"], [Block(1, 0, 4096)], [Span(0, 0, 9)])))
    layout = decode(encoded)
    encoded[-1:] = b"M"
    assert bytes(layout.stream) == b"streaM"


@given(payloads())
@settings(max_examples=50)
def test_every_payload_that_is_cut_short_is_a_wire_error_or_a_shorter_stream(payload):
    stream, held, spans, riding = payload
    encoded = b"".join(encode(stream, held, spans, riding))
    for length in range(len(encoded)):
        if length < len(encoded) - sum(map(len, stream)):
            with pytest.raises(WireError):
                decode(encoded[:length])
        else:
            assert decode(encoded[:length]).blocks == held


@given(payloads(), st.lists(st.integers(0, 1 << 20), min_size=1, max_size=3))
@settings(max_examples=150)
def test_flipped_bits_give_a_payload_or_a_wire_error(payload, bits):
    encoded = bytearray(b"".join(encode(*payload)))
    for bit in bits:
        encoded[bit // 8 % len(encoded)] ^= 1 << bit % 8
    with contextlib.suppress(WireError):
        layout = decode(encoded)
        for block, start, nbytes in layout.spans:
            room = len(layout.riding) if block == RIDING else layout.blocks[block].size
            assert start + nbytes <= room


def test_an_indirect_payload_that_does_not_say_where_it_lies_is_a_wire_error():
    encoded = bytearray(b"".join(encode([b""], [Block(7, 0, 4096)], [])))
    encoded[0] = 2
    with pytest.raises(WireError):
        decode(encoded)


def test_an_empty_payload_is_a_wire_error():
    with pytest.raises(WireError):
        decode(b"")


@pytest.mark.parametrize(
    "span", [Span(0, 0, 4097), Span(0, 4096, 1), Span(1, 0, 1), Span(0, (1 << 64) - 1, 1)]
)
def test_a_span_outside_of_its_block_is_a_wire_error(span):
    with pytest.raises(WireError, match="outside"):
        decode(b"".join(encode([b""], [Block(7, 0, 4096)], [span])))
