"""pandas' Arrow-backed arrays, without a copy; pandas is neither needed nor imported.

Their own ``__getstate__`` joins the chunks into one, which copies even if there is but one: then that is given as it
is.  All else (``__setstate__``) is theirs.
"""

from __future__ import annotations

import copyreg
import sys
from typing import Any

from shmpool.serialize.reductions import Reduction

__all__ = ["pandas_arrays", "reductions_for_pandas"]


def pandas_arrays() -> Any:
    """The module ``pandas.arrays``, or None if the program has not imported pandas."""
    return getattr(sys.modules.get("pandas"), "arrays", None)


def reductions_for_pandas() -> dict[type, Reduction]:
    """For a dispatch table; empty as long as the program has not imported pandas."""
    arrays = pandas_arrays()
    classes = (getattr(arrays, name, None) for name in ("ArrowExtensionArray", "ArrowStringArray"))
    return {cls: _reduce for cls in classes if cls is not None and hasattr(cls, "__setstate__")}


def _reduce(obj: Any) -> Any:
    state = vars(obj).copy()
    chunks = state.get("_pa_array")
    if getattr(chunks, "num_chunks", 0) != 1:
        return obj.__reduce_ex__(5)
    state["_pa_array"] = chunks.chunk(0)
    if "_cache" in state:
        state["_cache"] = {}
    return copyreg.__newobj__, (type(obj),), state  # type: ignore[attr-defined]  # not in typeshed
