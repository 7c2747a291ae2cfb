"""Arrays that live in the store and are shared by all who receive them, writable ("r+").

They are the exception: everything else in the store is written once, by its maker, and private copies of it are what
others write to.  Nothing locks a shared array.  What one process writes is seen by the others at once, in pieces of
whatever size the hardware writes: two processes that write to the same elements, or read what another is writing,
must agree among themselves who does so when (disjoint slices, or one task after the other, need no more).

A shared array belongs to the store that it was made in: the process-wide one, unless ``store=`` says another.  Give it
the store of the executor that it is for.  An executor with another store refuses it (RefError): its workers could only
be given a private copy.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from shmpool.store.current import get_store
from shmpool.store.store import ObjectStore

__all__ = ["asarray", "empty", "zeros"]

Shape = int | tuple[int, ...]


def empty(
    shape: Shape, dtype: npt.DTypeLike = float, *, store: ObjectStore | None = None
) -> npt.NDArray[Any]:
    """A new array in the store, uninitialised, that every process writes to that receives it.

    Passing it to a task, or returning it from one, copies nothing.  Nothing locks it: see :mod:`shmpool.store.shared`.

    Parameters
    ----------
    shape : int or tuple of int
    dtype : data type
        Not of Python objects.
    store : ObjectStore, optional
        That of the executor whose tasks are to share it: an executor with another store refuses it.  Default: the
        process-wide one, as for executors.

    Returns
    -------
    ndarray
        C-contiguous.  Its contiguous slices and views of it (``reshape``, ``T``) are shared as well; other views
        (``a[::2]``) arrive as private copies.

    Raises
    ------
    ValueError
        The dtype holds Python objects, which have no meaning in another process; or the shape is negative.
    StoreFullError
        There is no room.
    """
    wanted = np.dtype(dtype)
    if wanted.hasobject:
        raise ValueError(
            f"an array of {wanted} holds Python objects, which cannot be shared between processes"
        )
    sizes = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"negative dimensions are not allowed: {shape}")
    count = math.prod(sizes)
    memory = (store or get_store()).new_shared(count * wanted.itemsize)
    return (
        np.frombuffer(memory, np.uint8, count * wanted.itemsize).view(wanted).reshape(sizes)
        if count
        else np.empty(sizes, wanted)
    )


def zeros(
    shape: Shape, dtype: npt.DTypeLike = float, *, store: ObjectStore | None = None
) -> npt.NDArray[Any]:
    """The same as :func:`empty`, of the same parameters, filled with zeros."""
    made = empty(shape, dtype, store=store)
    made.fill(0)
    return made


def asarray(a: npt.ArrayLike, *, store: ObjectStore | None = None) -> npt.NDArray[Any]:
    """``a`` as an array in the store, as :func:`empty` makes them; a copy, unless it is one of that store already.

    Parameters
    ----------
    a : array_like
        Not of Python objects.
    store : ObjectStore, optional
        As for :func:`empty`.
    """
    source = np.asarray(a)
    store = store or get_store()
    if source.nbytes and source.flags.c_contiguous and store.is_shared(source):
        return source
    made = empty(source.shape, source.dtype, store=store)
    np.copyto(made, source)
    return made
