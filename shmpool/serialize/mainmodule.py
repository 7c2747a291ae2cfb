"""Which functions and classes of ``__main__`` does the receiver have under the same name?

What is defined in ``__main__`` cannot simply be pickled by name: a worker may have another ``__main__``, or one from
before the definition.  Pickled by value (cloudpickle) it always arrives, but each copy has globals of its own: the
usual pattern of an initializer that sets a global for the tasks to read would break, and a function that refers to a
big global array would carry it along.  So: by name where the receiver is known to have the very same object, else by
value.

* ``fork``: workers have what ``__main__`` had when they were forked.  :meth:`MainModule.snapshot` remembers it.
* ``spawn`` and ``forkserver``: workers run the main script as ``__mp_main__``: they have what stands at the top of
  the file, outside ``if __name__ == "__main__":``.  :meth:`MainModule.script` reads that from the source.
* ``loky``, and a ``__main__`` without a file (a REPL, a notebook): workers have nothing of it.
* A worker that answers: the parent has all that the worker's ``__main__`` has.  :meth:`MainModule.live`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shmpool.serialize.scriptnames import ScriptNames

__all__ = ["MainModule"]


class MainModule:
    """What a receiver has in its ``__main__``.  Made by one of the class methods."""

    __slots__ = ("_has",)

    def __init__(self, has: Callable[[str, object], bool]) -> None:
        self._has = has

    def has(self, obj: object) -> bool:
        """Does the receiver find this very function or class in its ``__main__`` by the same name?"""
        if not isinstance(obj, FunctionType | type) or obj.__module__ != "__main__":
            return False
        name = obj.__qualname__
        return "<" not in name and self._has(name, obj)

    @classmethod
    def nothing(cls) -> MainModule:
        """A receiver that has nothing of our ``__main__``."""
        return cls(lambda _name, _obj: False)

    @classmethod
    def live(cls) -> MainModule:
        """A receiver that has all that this process's ``__main__`` has."""
        return cls(lambda name, obj: _resolve(sys.modules.get("__main__"), name) is obj)

    @classmethod
    def snapshot(cls) -> MainModule:
        """A receiver forked from this process now."""
        module = sys.modules.get("__main__")
        # Functions and classes only: nothing big is kept alive.
        then = {
            name: value
            for name, value in vars(module or object).copy().items()
            if isinstance(value, FunctionType | type)
        }

        def has(name: str, obj: object) -> bool:
            top, _, rest = name.partition(".")
            start = then.get(top)
            # The pickler, too, must find it under this name now.
            return (_resolve(start, rest) if rest else start) is obj is _resolve(module, name)

        return cls(has)

    @classmethod
    def script(cls) -> MainModule:
        """A receiver that imports this process's main script as ``__mp_main__``."""
        module = sys.modules.get("__main__")
        read: list[ScriptNames] = []  # when first asked: few programs need it

        def has(name: str, obj: object) -> bool:
            if not read:
                from shmpool.serialize.scriptnames import ScriptNames  # slow to import (ast)

                read.append(ScriptNames(module))
            top, _, rest = name.partition(".")
            holder = _resolve(module, top)
            found = _resolve(holder, rest) if rest else holder
            return found is obj and read[0].define(top, holder)

        return cls(has)


def _resolve(start: object, path: str) -> object:
    for part in path.split("."):
        start = getattr(start, part, None)
    return start
