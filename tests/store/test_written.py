"""Copies that are remembered: found by address, gone with the array that owns the memory."""

from __future__ import annotations

import array
import gc

import numpy as np
import pytest

from shmpool.serialize.reductions import window
from shmpool.store.blocks import Block
from shmpool.store.written import Written, owner_of

BLOCK, OTHER = Block(1, 0, 4096), Block(1, 4096, 4096)


def key_of(a: np.ndarray) -> tuple[int, int]:
    return a.__array_interface__["data"][0], a.nbytes


def test_a_copy_is_found_by_address_and_length_while_its_owner_lives():
    gone: list[tuple[int, int]] = []
    written = Written(gone.append)
    a = np.zeros(100, np.uint8)
    key = key_of(a)
    assert written.add(key, a, BLOCK, 64, "epoch", False)
    entry = written.find(key)
    assert entry is not None and (entry.block, entry.start, entry.epoch) == (BLOCK, 64, "epoch")
    assert written.find((key[0], key[1] - 1)) is None
    assert written.find((key[0] + 1, key[1])) is None
    del a
    gc.collect()
    assert gone == [key], "once"
    assert written.find(key) is None, "something else may lie there now"
    assert len(written) == 1, "until it is taken off the books"
    assert written.remove_dead(key) == BLOCK
    assert len(written) == 0 and written.remove_dead(key) is None


def test_a_dead_entry_whose_memory_has_a_new_owner_stays():
    written = Written(lambda _key: None)
    first, second = np.zeros(100, np.uint8), np.zeros(100, np.uint8)
    key = key_of(first)
    written.add(key, first, BLOCK, 0, None, False)
    del first
    assert written.remove(key) == BLOCK
    written.add(key, second, OTHER, 0, None, False)
    assert written.remove_dead(key) is None, "news of the first owner's end, come late"
    entry = written.find(key)
    assert entry is not None and entry.block == OTHER


def test_an_owner_that_cannot_be_watched_is_not_remembered():
    written = Written(lambda _key: None)
    assert not written.add((1, 1), bytearray(1), BLOCK, 0, None, False)
    assert len(written) == 0


def test_what_was_used_the_longest_ago_is_forgotten_first():
    written = Written(lambda _key: None)
    owners = [np.zeros(1) for _ in range(3)]
    for number, owner in enumerate(owners):
        written.add((number, 8), owner, Block(1, 4096 * number, 4096), 0, None, False)
    written.find((0, 8))
    order = []
    while (block := written.take_oldest()) is not None:
        order.append(block.offset // 4096)
    assert order == [1, 2, 0]


def test_the_entries_of_a_block_are_counted_and_forgotten_together():
    written = Written(lambda _key: None)
    owners = [np.zeros(1) for _ in range(6)]
    for number, owner in enumerate(owners):
        written.add((number, 8), owner, BLOCK if number % 2 else OTHER, 0, None, False)
    assert sorted(written.blocks()) == sorted([(BLOCK, 3), (OTHER, 3)])
    written.add((1, 8), owners[0], OTHER, 64, None, False)  # in the place of another
    assert (written.times(BLOCK), written.times(OTHER)) == (2, 4)
    assert written.remove_all_of(BLOCK) == 2
    assert written.remove_all_of(BLOCK) == 0
    assert written.blocks() == [(OTHER, 4)] and len(written) == 4
    for number in (0, 1, 2, 4):
        assert written.remove((number, 8)) == OTHER
    assert written.blocks() == [] and written.times(OTHER) == 0


def test_the_owner_of_a_copy_is_that_of_what_it_was_made_of():
    a = np.zeros((10, 10))
    part = a[:, ::2]
    copy = part.copy("C")
    buffer = memoryview(window(copy, copy.__array_interface__["data"][0], copy.nbytes, part)).obj
    assert owner_of(buffer) == (a, False)
    assert owner_of(memoryview(window(part, 0, 0)).obj)[0] is a


def test_the_owner_is_the_array_at_the_bottom():
    a = np.zeros((10, 10))
    assert owner_of(a[2:, 1:].T.view()) == (a, False)


@pytest.mark.parametrize(
    ("memory", "constant"),
    [(bytes(8), True), (bytearray(8), False), (array.array("q", [0]), False)],
)
def test_only_memory_of_bytes_never_changes(memory, constant):
    a = np.frombuffer(memory, np.uint8)
    assert owner_of(a[1:]) == (a, constant)


def test_a_read_only_array_can_change():
    a = np.zeros(10)
    a.flags.writeable = False
    assert owner_of(a) == (a, False)


def test_memory_that_was_made_writable_to_be_read_belongs_to_whose_it_is():
    a = np.zeros(100, np.uint8)
    view = a[10:]
    address, nbytes = key_of(view)
    assert owner_of(memoryview(window(view, address, nbytes)).obj) == (a, False)
    over_bytes = np.frombuffer(bytes(100), np.uint8)
    assert owner_of(memoryview(window(over_bytes, *key_of(over_bytes))).obj) == (over_bytes, True)
    other = object()
    assert owner_of(memoryview(window(other, *key_of(a))).obj) == (other, False)


def test_what_is_no_array_owns_itself():
    assert owner_of(b"1") == (b"1", False)
