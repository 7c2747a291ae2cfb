"""Which lease does an address belong to?  A sorted table of the views that this process has handed out.

The views of one mapping never overlap in part: a view spans a whole block, or lies in a mapping of its own.  Views
that start at the same address are of the same block.  The caller holds the store's lock.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator
from itertools import chain
from typing import Generic, Protocol, TypeVar

__all__ = ["AddressTable"]


class _Range(Protocol):
    address: int
    nbytes: int


R = TypeVar("R", bound=_Range)


class AddressTable(Generic[R]):
    """Ranges of addresses, looked up by an address inside."""

    __slots__ = ("_at", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._at: dict[int, list[R]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._at.values()))

    def __iter__(self) -> Iterator[R]:
        return chain.from_iterable(self._at.values())

    def add(self, item: R) -> None:
        """Enter a range."""
        here = self._at.get(item.address)
        if here is None:
            self._at[item.address] = [item]
            insort(self._starts, item.address)
        else:
            here.append(item)

    def remove(self, item: R) -> None:
        """Take out a range that was entered."""
        here = self._at[item.address]
        here.remove(item)
        if not here:
            del self._at[item.address]
            self._starts.pop(bisect_right(self._starts, item.address) - 1)

    def find(self, address: int, nbytes: int) -> R | None:
        """The range that holds all of ``[address, address + nbytes)``, or None."""
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        item = self._at[self._starts[index]][-1]
        return item if address + nbytes <= item.address + item.nbytes else None
