"""The table of addresses against a list that is searched from end to end."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shmpool.store.addresses import AddressTable


@dataclass(eq=False)
class Range:
    address: int
    nbytes: int


def slot(number: int) -> Range:
    """Ranges that never overlap, some of which touch."""
    return Range(100 * number, 100 - number % 2 * 30)


class AddressesAgainstModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table: AddressTable[Range] = AddressTable()
        self.model: list[Range] = []

    @rule(number=st.integers(0, 12))
    def add(self, number) -> None:
        item = slot(number)
        self.table.add(item)
        self.model.append(item)

    @precondition(lambda self: self.model)
    @rule(number=st.integers(0, 99))
    def remove(self, number) -> None:
        self.table.remove(self.model.pop(number % len(self.model)))

    @rule(address=st.integers(-10, 1400), nbytes=st.integers(1, 120))
    def find(self, address, nbytes) -> None:
        found = self.table.find(address, nbytes)
        holding = [
            r
            for r in self.model
            if r.address <= address and address + nbytes <= r.address + r.nbytes
        ]
        assert (found in holding) if holding else found is None

    @invariant()
    def holds_what_was_entered(self) -> None:
        assert len(self.table) == len(self.model)
        assert sorted(map(id, self.table)) == sorted(map(id, self.model))


TestAddressesAgainstModel = AddressesAgainstModel.TestCase
TestAddressesAgainstModel.settings = settings(max_examples=50, stateful_step_count=30)


def test_two_views_of_one_block_are_told_apart():
    table: AddressTable[Range] = AddressTable()
    first, second = slot(3), slot(3)
    table.add(first)
    table.add(second)
    table.remove(second)
    assert table.find(300, 10) is first
    table.remove(first)
    assert table.find(300, 10) is None and len(table) == 0
