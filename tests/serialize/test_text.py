"""Large strings as arguments, results and objects: one copy into the store, by the bytes counted."""

from __future__ import annotations

import pytest

import shmpool
from shmpool.serialize.text import lend_text

LARGE = 3 << 20


def measure(text, again=None, *, key=None):
    return len(text), text[:3], again is text, key is text


def make(character):
    return character * LARGE


@pytest.mark.parametrize(
    "character", ["x", "\x7f", "\x00", "\xe9", "\u20ac", "\U0001f40d", "\ud800"]
)
def test_large_text_arrives_whatever_its_characters_are(character):
    text = character * LARGE
    with shmpool.ShmExecutor(1) as executor:
        assert executor.submit(measure, text, text, key=text).result() == (
            LARGE,
            text[:3],
            True,
            True,
        )
        assert executor.submit(make, character).result() == text
    assert shmpool.put(text).get() == text


def test_large_ascii_text_is_copied_into_the_store_once():
    store = shmpool.ObjectStore()
    ref = shmpool.put("x" * LARGE, store=store)
    assert store.stats().bytes_copied == LARGE
    assert ref.get() == "x" * LARGE
    with shmpool.ShmExecutor(1, store=store) as executor:
        copied = executor.stats().bytes_copied
        executor.submit(measure, "y" * LARGE).result()
        assert executor.stats().bytes_copied - copied == LARGE
        executor.submit(make, "z").result()
        assert executor.stats().bytes_copied - copied == 2 * LARGE


def test_nothing_else_is_touched():
    text, pair = "x" * LARGE, (("a", 1), {"k": "b"})
    assert lend_text(pair) is pair
    assert lend_text([text]) == [text]
    assert lend_text("small") == "small"
    assert type(lend_text(text)) is not str


def test_subclasses_of_str_keep_their_own_way():
    class Text(str):
        __slots__ = ()

    text = Text("x" * LARGE)
    assert lend_text(text) is text
