"""Large strings as arguments, results and objects: one copy into the store, by the bytes counted."""

from __future__ import annotations

import pytest

import shmpool

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


class Holder:
    def __init__(self, text):
        self.text = text


def test_text_inside_of_something_is_copied_once_and_stays_one():
    store = shmpool.ObjectStore()
    text, other = "x" * LARGE, "\xe9" * LARGE
    holder = Holder([text, {"again": text, "other": other}])
    ref = shmpool.put((holder, bytes(LARGE)), store=store)
    utf8 = len(other.encode())
    assert 0 <= store.stats().bytes_copied - (2 * LARGE + utf8) < 4096
    back, data = ref.get()
    assert back.text == holder.text and data == bytes(LARGE)
    assert back.text[0] is back.text[1]["again"]


@pytest.mark.parametrize("pickle_debug", ["0", "1"])
def test_text_beside_what_only_cloudpickle_can(monkeypatch, pickle_debug):
    monkeypatch.setenv("SHMPOOL_PICKLE_DEBUG", pickle_debug)
    store = shmpool.ObjectStore()
    text = "x" * LARGE
    ref = shmpool.put([text, lambda: text], store=store)
    assert 0 <= store.stats().bytes_copied - LARGE < 4096
    back, fn = ref.get()
    assert back == text and fn() is back


def test_what_looks_like_the_header_of_a_large_text_is_none():
    looks = b"X" + (LARGE + 1).to_bytes(4, "little"), b"\x8d" + (1 << 40).to_bytes(8, "little")
    for end in looks:
        # A large bytes object is written after a piece that ends with its own header, and is a piece itself.
        data = bytes(LARGE) + end
        assert shmpool.put([data, "small"]).get() == [data, "small"]


def test_other_large_data_in_band_is_no_text(monkeypatch):
    import numpy as np

    monkeypatch.setenv("SHMPOOL_INLINE_LIMIT", "100MB")
    store = shmpool.ObjectStore()
    array = np.arange(200_000)
    back = shmpool.put([array, "x" * LARGE, bytearray(LARGE)], store=store).get()
    assert np.array_equal(back[0], array) and back[1] == "x" * LARGE and back[2] == bytes(LARGE)


def test_subclasses_of_str_keep_their_own_way():
    text = Text("x" * LARGE)
    back = shmpool.put([text]).get()[0]
    assert type(back) is Text and back == text


class Text(str):
    __slots__ = ()


def test_pickles_without_large_text_are_made_once():
    calls = []

    class Counted:
        def __reduce__(self):
            calls.append(1)
            return int, (3,)

    assert shmpool.put([Counted(), bytes(LARGE), "x" * 1000]).get()[0] == 3
    assert len(calls) == 1
    shmpool.put([Counted(), "x" * LARGE])
    assert len(calls) == 3, "once up to the text, and once more"
