"""``shmpool.explain``: how an object's bytes would travel through a store."""

from __future__ import annotations

from typing import Any, TextIO

from shmpool.interrupts import heard, whole
from shmpool.serialize.explain import Explanation, Part, Way
from shmpool.serialize.explain import explain as explain_with
from shmpool.store import payload as wire_form
from shmpool.store.blocks import Block
from shmpool.store.current import get_store
from shmpool.store.payload import RIDING, Span
from shmpool.store.store import ObjectStore, travelling

__all__ = ["Explanation", "Part", "explain"]


def explain(
    obj: Any, *, store: ObjectStore | None = None, file: TextIO | None = None, quiet: bool = False
) -> Explanation:
    """Say which bytes of an object are shared, which are copied, and why; print it as a table.

    Nothing is sent, and nothing is written into the store.  It is asked what it would do, so the sums are those that
    :func:`shmpool.put` would count now.  Of a task's arguments they are the same but for some bytes: those are pickled
    together, as a call.

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
    4,000,000  copied  obj['b']  numpy.ndarray  not contiguous: made contiguous, and written
    ...
    """
    store = store or get_store()
    carried: list[Block] = []  # by refs inside
    outer = travelling.store, travelling.carried
    travelling.store, travelling.carried = store, carried
    try:
        return explain_with(
            obj,
            wanted=store.wanted,
            way=lambda stream, buffers: _way(store, stream, buffers, carried),
            config=store.config,
            file=file,
            quiet=quiet,
        )
    finally:
        travelling.store, travelling.carried = outer
        store.let_go(carried)


def _way(
    store: ObjectStore,
    stream: list[bytes | memoryview],
    buffers: list[memoryview],
    carried: list[Block],
) -> Way:
    """What would become of a stream and its buffers, by the store's own plan and the payload's own form."""
    blocks = carried.copy()
    carried.clear()  # the plan lets go of them, if it fails
    with whole, heard():
        plan = store.plan(buffers, blocks)
        store.let_go(blocks)
    # Blocks and places that do not exist yet are as long as others.
    blocks += [Block(0, 0, 0)] * len(plan.groups)
    spans = [span or Span(0, 0, 0) for span in plan.spans]
    nbytes = sum(map(len, wire_form.encode(stream, blocks, spans, plan.riding)))
    ticket = None
    if store.is_too_long(nbytes):
        ticket = len(wire_form.encode_indirect(Block(0, 0, 0), nbytes))
    return Way(
        [
            "copied" if span is None else "inline" if span.block == RIDING else "shared"
            for span in plan.spans
        ],
        nbytes,
        ticket,
    )
