"""The allocator against a trivial model (a list of who owns each granule), and its error cases."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shmpool.memory.allocator import Allocator

GRANULE = 64


class AllocatorAgainstModel(RuleBasedStateMachine):
    """Every call must give what a search through all granules gives."""

    @initialize(granules=st.integers(1, 40))
    def make(self, granules: int) -> None:
        self.allocator = Allocator(granules * GRANULE, GRANULE)
        self.owner: list[int | None] = [None] * granules  # the first granule of the block it is in
        self.live: dict[int, int] = {}

    def free_extents(self) -> list[tuple[int, int]]:
        extents = []
        start = None
        for granule, owner in enumerate([*self.owner, -1]):
            if owner is None and start is None:
                start = granule
            elif owner is not None and start is not None:
                extents.append((start * GRANULE, granule * GRANULE))
                start = None
        return extents

    @rule(nbytes=st.one_of(st.integers(0, 6 * GRANULE), st.integers(0, 50 * GRANULE)))
    def allocate(self, nbytes: int) -> None:
        length = max(1, -(-nbytes // GRANULE)) * GRANULE
        fitting = [(b - a, a) for a, b in self.free_extents() if b - a >= length]
        expected = min(fitting)[1] if fitting else None
        offset = self.allocator.allocate(nbytes)
        assert offset == expected, f"allocate({nbytes}): smallest fitting extent is at {expected}"
        if offset is not None:
            self.live[offset] = length
            for granule in range(offset // GRANULE, (offset + length) // GRANULE):
                self.owner[granule] = offset // GRANULE

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 1000))
    def free(self, pick: int) -> None:
        offset = sorted(self.live)[pick % len(self.live)]
        length = self.live.pop(offset)
        assert self.allocator.free(offset) == length
        for granule in range(offset // GRANULE, (offset + length) // GRANULE):
            self.owner[granule] = None

    @rule(offset=st.integers(-GRANULE, 41 * GRANULE))
    def free_what_is_not_a_block(self, offset: int) -> None:
        if offset not in self.live:
            with pytest.raises(ValueError, match=f"offset {offset}"):
                self.allocator.free(offset)

    @invariant()
    def agrees(self) -> None:
        extents = self.free_extents()
        assert list(self.allocator.free_extents()) == extents
        assert self.allocator.used == sum(self.live.values())
        assert self.allocator.largest_free == max((b - a for a, b in extents), default=0)
        assert len(self.allocator) == len(self.live)
        for offset, length in self.live.items():
            assert self.allocator.size_of(offset) == length
            assert offset in self.allocator
        self.allocator.verify()


AllocatorAgainstModel.TestCase.settings = settings(max_examples=60, stateful_step_count=50)
TestAllocatorAgainstModel = AllocatorAgainstModel.TestCase


def test_a_new_allocator_is_one_free_extent() -> None:
    allocator = Allocator(1024, 64)
    assert (allocator.size, allocator.granule, allocator.used, len(allocator)) == (1024, 64, 0, 0)
    assert allocator.largest_free == 1024
    assert list(allocator.free_extents()) == [(0, 1024)]
    allocator.verify()


def test_lengths_are_rounded_up_to_the_granule() -> None:
    allocator = Allocator(1024, 64)
    assert [allocator.size_of(allocator.allocate(n) or 0) for n in (0, 1, 64, 65)] == [
        64,
        64,
        64,
        128,
    ]
    assert allocator.used == 320


def test_a_granule_need_not_be_a_power_of_two() -> None:
    allocator = Allocator(30, 10)
    assert [allocator.allocate(n) for n in (7, 11, 1)] == [0, 10, None]


def test_the_whole_range_can_be_one_block_and_come_back() -> None:
    allocator = Allocator(1024, 64)
    assert allocator.allocate(1024) == 0
    assert allocator.largest_free == 0
    assert allocator.allocate(1) is None
    assert list(allocator.free_extents()) == []
    allocator.verify()
    assert allocator.free(0) == 1024
    assert allocator.largest_free == 1024
    allocator.verify()


def test_nothing_fits_what_is_larger_than_the_range() -> None:
    assert Allocator(1024, 64).allocate(1025) is None


def test_the_smallest_fitting_gap_is_taken_and_the_lowest_of_equals() -> None:
    allocator = Allocator(64 * 100, 64)
    blocks = [allocator.allocate(64 * n) for n in (3, 1, 2, 1, 2, 1, 5, 1)]
    for index in (0, 2, 4, 6):  # gaps of 3, 2, 2, 5 granules, and the end
        allocator.free(blocks[index] or 0)
    assert allocator.allocate(128) == blocks[2]
    assert allocator.allocate(128) == blocks[4]
    assert allocator.allocate(128) == blocks[0]  # the gap of 3 is now the smallest that fits
    assert allocator.allocate(64 * 4) == blocks[6]


def test_freed_in_any_order_the_neighbours_become_one_extent() -> None:
    for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        allocator = Allocator(256, 64)
        blocks = [allocator.allocate(64) or 0 for _ in range(3)]
        for index in order:
            allocator.free(blocks[index])
            allocator.verify()
        assert list(allocator.free_extents()) == [(0, 256)], f"freed in the order {order}"


def test_a_recycled_block_lies_where_it_lay() -> None:
    allocator = Allocator(1 << 20, 4096)
    first = allocator.allocate(100_000)
    assert first is not None
    for _ in range(5):
        allocator.free(first)
        assert allocator.allocate(100_000) == first


def test_freeing_twice_names_the_offset_and_changes_nothing() -> None:
    allocator = Allocator(1024, 64)
    allocator.allocate(64)
    offset = allocator.allocate(64)
    assert offset == 64
    allocator.free(offset)
    with pytest.raises(ValueError, match=r"offset 64: freed twice.*size 1024, granule 64, 1 live"):
        allocator.free(offset)
    assert allocator.used == 64
    allocator.verify()


def test_the_middle_of_a_block_is_not_a_block() -> None:
    allocator = Allocator(1024, 64)
    assert allocator.allocate(256) == 0
    for call in (allocator.free, allocator.size_of):
        with pytest.raises(ValueError, match="offset 64"):
            call(64)
    allocator.verify()


@pytest.mark.parametrize(("size", "granule"), [(0, 64), (-64, 64), (100, 64), (64, 0), (64, -1)])
def test_impossible_sizes_are_refused(size: int, granule: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        Allocator(size, granule)


@pytest.mark.parametrize("nbytes", [-1, -64, -1000])
def test_a_negative_length_is_refused(nbytes: int) -> None:
    allocator = Allocator(1024, 64)
    with pytest.raises(ValueError, match=str(nbytes)):
        allocator.allocate(nbytes)
    allocator.verify()


def test_free_extents_do_not_change_under_the_one_who_iterates() -> None:
    allocator = Allocator(1024, 64)
    blocks = [allocator.allocate(64) or 0 for _ in range(6)]
    allocator.free(blocks[1])
    allocator.free(blocks[3])
    seen = []
    for start, stop in allocator.free_extents():
        seen.append((start, stop))
        allocator.allocate(64)
    assert seen == [(64, 128), (192, 256), (384, 1024)]


def test_an_allocator_says_how_full_it_is() -> None:
    allocator = Allocator(1024, 64)
    for nbytes in (64, 128):
        allocator.allocate(nbytes)
    assert repr(allocator) == "<Allocator: 2 blocks, 192 of 1024 bytes used, largest free 832>"


def test_ten_thousand_blocks_come_and_go_and_nothing_is_lost() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # pytest shows it on failure
    rng = random.Random(seed)
    allocator = Allocator(1 << 34, 4096)
    live = [allocator.allocate(rng.randrange(1, 400_000)) for _ in range(10_000)]
    for _ in range(10_000):
        index = rng.randrange(len(live))
        old = live[index]
        assert old is not None
        allocator.free(old)
        live[index] = allocator.allocate(rng.randrange(1, 400_000))
    allocator.verify()
    for offset in live:
        assert offset is not None
        allocator.free(offset)
    allocator.verify()
    assert list(allocator.free_extents()) == [(0, 1 << 34)]
    assert (allocator.used, len(allocator)) == (0, 0)


def _shift_a_block(allocator: Allocator) -> None:
    allocator._live[96] = allocator._live.pop(64)


def _split_a_free_extent(allocator: Allocator) -> None:
    stop = max(allocator._by_stop)
    start = stop - allocator._by_stop[stop]
    allocator._by_start[start] -= 64
    allocator._by_start[stop - 64] = 64


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda a: setattr(a, "_used", 1), "counted were 1"),
        (lambda a: a._live.pop(64), "stops at 64"),
        (_shift_a_block, "live extent at 96"),
        (lambda a: a._live.update({64: 65}), "length 65"),
        (
            lambda a: a._live.update({64: 128}),
            "live extent at 128, but the one before stops at 192",
        ),
        (lambda a: a._by_start.pop(192), "extents stop at 192, the range at 1024"),
        (_split_a_free_extent, "not coalesced"),
        (lambda a: a._by_stop.pop(1024), "by stop differ"),
        (lambda a: a._by_length[64].append(0), "extents of length 64"),
        (lambda a: a._lengths.reverse(), "sorted lengths"),
    ],
)
def test_verify_finds_what_is_wrong(corrupt: Callable[[Allocator], object], message: str) -> None:
    allocator = Allocator(1024, 64)
    for _ in range(3):
        allocator.allocate(64)
    allocator.free(0)  # granule 0 free, 1 and 2 live, the rest free
    allocator.free(128)
    allocator.allocate(64)
    allocator.allocate(64)
    allocator.free(0)
    allocator.verify()
    corrupt(allocator)
    with pytest.raises(AssertionError, match=message):
        allocator.verify()
