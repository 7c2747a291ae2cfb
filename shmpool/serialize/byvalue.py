"""Cloudpickle's pickler, with our dispatch table, and our rule for ``__main__``."""

from __future__ import annotations

import pickle
from collections import ChainMap
from collections.abc import Callable
from typing import Any

import cloudpickle

from shmpool.serialize.mainmodule import MainModule

__all__ = ["CloudPickler"]


class CloudPickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle is untyped
    """What the receiver's ``__main__`` has goes by name, the rest as cloudpickle decides."""

    def __init__(
        self,
        file: Any,
        main: MainModule,
        in_band: Callable[[pickle.PickleBuffer], bool],
        table: dict[type, Callable[[Any], Any]],
    ) -> None:
        # Before __init__: the C pickler looks for a dispatch table only there.
        self.dispatch_table = ChainMap(table, cloudpickle.Pickler.dispatch_table)
        super().__init__(file, 5, in_band)
        self._main = main

    def reducer_override(self, obj: Any) -> Any:
        """Called for every object that pickle does not know by heart."""
        if self._main.has(obj):
            return NotImplemented  # the pickler then writes module and qualified name
        return super().reducer_override(obj)
