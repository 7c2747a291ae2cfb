r"""Payloads: an object as it travels.  A pickle stream, and where its out-of-band buffers lie in the store.

As bytes (the only form that crosses a process boundary)::

    b"\0" stream                                        nothing in the store
    b"\1" tables stream                                 buffers in the store
    b"\2" tables                                        too long for a message: the above lies in the one block

    tables:  u32 number of blocks, u32 number of spans,
             then per block   u64 arena, u64 offset, u64 size
             then per span    u64 index of its block, u64 start in the block, u64 bytes

Blocks that no span names are carried along: an object ref inside the stream holds them.

This module is arithmetic on bytes: it maps nothing and holds nothing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from shmpool.errors import WireError
from shmpool.store.blocks import Block

__all__ = ["PLAIN", "Layout", "Span", "decode", "encode", "encode_indirect"]

PLAIN = 0
_WITH_BLOCKS = 1
_INDIRECT = 2
_COUNTS = struct.Struct("<II")

Buffer = bytes | bytearray | memoryview


class Span(NamedTuple):
    """An out-of-band buffer: which of the payload's blocks it lies in, from where, how many bytes."""

    block: int
    start: int
    nbytes: int


@dataclass(slots=True)
class Layout:
    """A decoded payload.  If ``indirect``, it lies in the one span of the one block: read that, and decode it."""

    blocks: list[Block]
    spans: list[Span]
    stream: Buffer
    indirect: bool = False


def encode(
    stream: list[bytes | memoryview], blocks: list[Block], spans: list[Span]
) -> list[bytes | memoryview]:
    """Put a payload into bytes, in pieces to be joined; the stream comes in pieces."""
    if not blocks:
        return [b"\0", *stream]
    return [b"\1" + _tables(blocks, spans), *stream]


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
    if kind not in (_WITH_BLOCKS, _INDIRECT):
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
    for span in spans:
        if span.block >= n_blocks or span.start + span.nbytes > blocks[span.block].size:
            raise WireError(f"a payload whose {span} lies outside of its {n_blocks} blocks")
    if kind == _INDIRECT and (n_blocks, n_spans) != (1, 1):
        raise WireError(f"an indirect payload with {n_blocks} blocks and {n_spans} spans")
    return Layout(blocks, spans, view[stop:], kind == _INDIRECT)
