"""The pickler written in Python: slow, but what goes wrong in it has a traceback with the way through the object.

``save_dict``, ``save_tuple``, ``save_reduce``: each frame has the object that was being pickled in its variables.  It
takes the decisions that the usual pickler takes, and writes what that would write.
"""

from __future__ import annotations

import pickle
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any

import cloudpickle

from shmpool.serialize.mainmodule import MainModule

__all__ = ["DebugPickler"]

PROTOCOL = 5


class DebugPickler(pickle._Pickler):
    """What the receiver's ``__main__`` has goes by name, the rest as cloudpickle decides.

    Parameters
    ----------
    file : object with a method ``write``
    main : MainModule
        What the receiver has in its ``__main__``.
    in_band : callable
        Called with each buffer; says whether it goes into the stream.
    table : mapping
        Reduction functions by class, before those of cloudpickle.
    """

    memo: dict[int, tuple[int, Any]]

    def __init__(
        self,
        file: Any,
        main: MainModule,
        in_band: Callable[[pickle.PickleBuffer], bool],
        table: Mapping[type, Callable[[Any], Any]],
    ) -> None:
        super().__init__(file, PROTOCOL, buffer_callback=in_band)
        self.dispatch_table = ChainMap(dict(table), cloudpickle.Pickler.dispatch_table)
        self._main = main
        self.globals_ref: dict[
            int, dict[str, Any]
        ] = {}  # cloudpickle's: globals that functions share

    def reducer_override(self, obj: Any) -> Any:
        """Functions and classes as cloudpickle reduces them, unless the receiver has them."""
        if self._main.has(obj):
            return NotImplemented  # the pickler then writes module and qualified name
        return cloudpickle.Pickler.reducer_override(self, obj)

    # cloudpickle's reducer_override calls these on the pickler.
    _function_reduce = cloudpickle.Pickler._function_reduce
    _dynamic_function_reduce = cloudpickle.Pickler._dynamic_function_reduce
    _function_getnewargs = cloudpickle.Pickler._function_getnewargs

    def memoize(self, obj: Any) -> None:
        """Remember an object, as the pickler written in C does: it may be known already.

        Python 3.11's own asserts that it is not, which fails for two empty buffers: both are ``b""``.
        """
        if id(obj) not in self.memo:
            super().memoize(obj)  # type: ignore[misc]  # unknown to typeshed, as are save and save_reduce
