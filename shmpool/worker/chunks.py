"""Several calls as one task: what a pool's ``map`` sends to a worker, and runs there.

The items of a chunk are the task's arguments, one by one: so large strings and object refs among them travel as they do
in a call with one argument.

What is there several times in a chunk, as an array or a ref that all its calls are given, is one object there: pickle
makes it one, and a ref is decoded once for a chunk.  A call that writes into it shows that to those after it in the
chunk, here as in the chunks of ``multiprocessing.Pool`` and ``ProcessPoolExecutor``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from shmpool.memory.segment import Mode
from shmpool.store.refs import ObjectRef, Values

__all__ = ["Chunk", "StarChunk"]


class Chunk:
    """Call a function with each item.

    Parameters
    ----------
    fn : callable
    """

    __slots__ = ("__qualname__", "fn")

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        #: What the task is called in errors.
        self.__qualname__ = f"a chunk of {getattr(fn, '__qualname__', repr(type(fn).__name__))}"

    def __call__(self, *items: Any) -> list[Any]:
        """The results, one for each item."""
        results = list(map(self.fn, items))
        if len(results) < len(items):
            # It would end whatever iterates over results, as if there were no more.
            raise RuntimeError(f"the call for {items[len(results)]!r:.100} raised StopIteration")
        return results

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.fn,)


class StarChunk(Chunk):
    """Call a function with the arguments that each item holds: a chunk of ``starmap``.

    Parameters
    ----------
    fn : callable
    mode : {"c", "r"}
        How the values of object refs among the arguments are mapped.
    """

    __slots__ = ("_mode",)

    def __init__(self, fn: Callable[..., Any], mode: Mode) -> None:
        super().__init__(fn)
        self._mode = mode

    def __call__(self, *items: Iterable[Any]) -> list[Any]:
        """The results, one for each item."""
        fn, values = self.fn, Values(self._mode)
        results = []
        for args in items:
            args = tuple(args)  # noqa: PLW2901  # the item may be read once only
            if ObjectRef in map(type, args):
                args = map(values.of, args)  # noqa: PLW2901
            results.append(fn(*args))
        return results

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.fn, self._mode)
