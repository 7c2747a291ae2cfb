r"""Payloads: an object as it travels.  A pickle stream, and where its out-of-band buffers lie in the store.

As bytes (the only form that crosses a process boundary)::

    b"\0" stream                                        nothing in the store
    b"\1" tables riding stream                          buffers in the store, or riding beside the stream
    b"\2" tables                                        too long for a message: the above lies in the one block

    tables:  u32 number of blocks, u32 number of spans,
             then per block   u64 arena, u64 offset, u64 size
             then per span    u64 index of its block, u64 start in the block, u64 bytes;
                              2**64 - 1 instead of an index: it rides, from start

Blocks that no span names are carried along: an object ref inside the stream holds them.

This module is arithmetic on bytes: it maps nothing and holds nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from shmpool.errors import WireError
from shmpool.store.blocks import Block

__all__ = ["PLAIN", "RIDING", "Layout", "Span", "decode", "encode", "encode_indirect"]

PLAIN = 0
_WITH_BUFFERS = 1
_INDIRECT = 2
_COUNTS = struct.Struct("<II")

#: Instead of a span's block: it lies beside the stream.
RIDING = (1 << 64) - 1

Buffer = bytes | bytearray | memoryview


class Span(NamedTuple):
    """An out-of-band buffer: which of the payload's blocks it lies in (or RIDING), from where, how many bytes."""

    block: int
    start: int
    nbytes: int


class Layout(NamedTuple):
    """A decoded payload.  If ``indirect``, it lies in the one span of the one block: read that, and decode it."""

    blocks: list[Block]
    spans: list[Span]
    stream: Buffer
    riding: Buffer = b""
    indirect: bool = False


def encode(
    stream: list[bytes | memoryview],
    blocks: list[Block],
    spans: list[Span],
    riding: Sequence[memoryview] = (),
) -> list[bytes | memoryview]:
    """Put a payload into bytes, in pieces to be joined; the stream and what rides beside it come in pieces."""
    if not blocks and not spans:
        return [b"\0", *stream]
    return [b"\1" + _tables(blocks, spans), *riding, *stream]


def encode_indirect(block: Block, nbytes: int) -> bytes:
    """A payload whose encoded form is the first ``nbytes`` bytes of ``block``."""
    return b"\2" + _tables([block], [Span(0, 0, nbytes)])


def _tables(blocks: list[Block], spans: list[Span]) -> bytes:
    flat: list[int] = []
    for block in blocks:
        flat += block
    for span in spans:
        flat += span
    return _COUNTS.pack(len(blocks), len(spans)) + struct.pack(f"<{len(flat)}Q", *flat)


def decode(data: Buffer) -> Layout:
    """Read a payload from bytes; the stream is a view of them.

    Raises
    ------
    WireError
        The bytes are no payload.
    """
    view = memoryview(data)
    if len(view) == 0:
        raise WireError("an empty payload")
    kind = view[0]
    if kind == PLAIN:
        return Layout([], [], view[1:])
    if kind not in (_WITH_BUFFERS, _INDIRECT):
        raise WireError(f"a payload of unknown kind {kind}")
    try:
        n_blocks, n_spans = _COUNTS.unpack_from(view, 1)
        start = 1 + _COUNTS.size
        stop = start + 24 * (n_blocks + n_spans)
        if stop > len(view):
            raise WireError(
                f"a payload of {len(view)} bytes with {n_blocks} blocks and {n_spans} spans"
            )
        flat = struct.unpack_from(f"<{3 * (n_blocks + n_spans)}Q", view, start)
    except struct.error as error:
        raise WireError(f"a payload cut short at {len(view)} bytes") from error
    triples = list(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))
    blocks = [Block(*triple) for triple in triples[:n_blocks]]
    spans = [Span(*triple) for triple in triples[n_blocks:]]
    riding = 0
    for span in spans:
        if span.block == RIDING:
            riding = max(riding, span.start + span.nbytes)
        elif span.block >= n_blocks or span.start + span.nbytes > blocks[span.block].size:
            raise WireError(f"a payload whose {span} lies outside of its {n_blocks} blocks")
    if riding > len(view) - stop:
        raise WireError(f"a payload of {len(view)} bytes beside whose stream {riding} ride")
    if kind == _INDIRECT and (n_blocks, n_spans) != (1, 1):
        raise WireError(f"an indirect payload with {n_blocks} blocks and {n_spans} spans")
    stream = view[stop + riding :]
    return Layout(blocks, spans, stream, view[stop : stop + riding], kind == _INDIRECT)
