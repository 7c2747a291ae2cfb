"""``shmpool.explain``: how an object's bytes would travel through a store."""

from __future__ import annotations

from typing import Any, TextIO

from shmpool.serialize.explain import Explanation, Part
from shmpool.serialize.explain import explain as explain_with
from shmpool.store.current import get_store
from shmpool.store.store import ObjectStore, travelling

__all__ = ["Explanation", "Part", "explain"]


def explain(
    obj: Any, *, store: ObjectStore | None = None, file: TextIO | None = None, quiet: bool = False
) -> Explanation:
    """Say which bytes of an object are shared, which are copied, and why; print it as a table.

    Nothing is sent, and nothing is written into the store.

    Parameters
    ----------
    obj : object
        An argument, a function, a result: anything that can be pickled.  What is defined in ``__main__`` counts as
        travelling by value, as it does with :func:`shmpool.put`; an executor may know better.
    store : ObjectStore, optional
        Default: the process-wide one.
    file : file, optional
        Where the table is printed; default: ``sys.stdout``.
    quiet : bool, default False
        Print nothing.

    Returns
    -------
    Explanation
        Its `parts`, in the order in which a pickler meets them, and sums.

    Raises
    ------
    SerializationError
        The object cannot be pickled.

    Examples
    --------
    >>> import numpy as np
    >>> _ = explain({"a": np.zeros(1000000), "b": np.zeros(1000000)[::2], "n": 3})  # doctest: +SKIP
    8,000,000  copied  obj['a']  numpy.ndarray  not in the store yet: written once, read without a copy
    4,000,000  copied  obj['b']  numpy.ndarray  not contiguous: made contiguous, and written once
    ...
    """
    store = store or get_store()
    outer = travelling.store, travelling.carried
    travelling.store, travelling.carried = store, []  # refs inside may be pickled
    try:
        return explain_with(
            obj,
            located=store.located,
            inline_limit=store.config.inline_limit,
            file=file,
            quiet=quiet,
        )
    finally:
        travelling.store, travelling.carried = outer
