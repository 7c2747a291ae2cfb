"""A shorter way to a pickle for what tasks get most: calls with plain arrays and numbers, and these as results.

numpy has each array, and each number of its own, pickled as a call of a function that is found by name, with a dtype
that is made by a call of another, and has its state set: 5 us to pickle, 3 us to read, and three times as much where
processor caches are cold.  Here their buffers stand in for them, and the stream says what to make of these.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np

from shmpool.serialize.atoms import ATOMS, SIZED

__all__ = ["BARE", "dump_bare", "load_bare"]

#: What such a stream begins with, for :func:`load_bare`; others begin with pickle's PROTO.
BARE = b"A"

#: By a dtype's identity, its letter: numpy has one object for each of these. A dtype with metadata, or of foreign byte
#: order, is another one.
_LETTERS = {id(np.dtype(letter)): letter for letter in "?bBhHiIlLqQefdgFDG"}
_DTYPES = {letter: np.dtype(letter) for letter in _LETTERS.values()}
#: The same by the type of a single number.
_NUMBERS = {dtype.type: letter for letter, dtype in _DTYPES.items()}


def dump_bare(
    obj: Any, in_band: Callable[[pickle.PickleBuffer], bool], limit: int, others: Container[type]
) -> bytes | None:
    """The stream of an array or number of numpy's, or of an (args, kwargs) pair with such and atoms in args; or None.

    None is for all else, and for what takes more words than it is worth: arrays that are not contiguous, not writable,
    empty, given twice, or not of numbers; strings of ``limit`` characters or more, which are not to be copied here; and
    for numbers of types among ``others``, which have another way.
    """
    if type(obj) is np.ndarray or type(obj) in _NUMBERS:
        args: tuple[Any, ...] = (obj,)
    elif type(obj) is tuple and len(obj) == 2:
        args, kwargs = obj
        if type(args) is not tuple or type(kwargs) is not dict or kwargs:
            return None
    else:
        return None
    values: list[Any] = []
    # For each array and number: where it stands among the arguments, its dtype's letter, its shape; None: a number.
    parts: list[tuple[int, str, tuple[int, ...] | None]] = []
    for arg in args:
        kind = type(arg)
        if kind is np.ndarray:
            letter = _LETTERS.get(id(arg.dtype))
            flags = arg.flags
            if not (letter and flags.c_contiguous and flags.writeable and arg.size):
                return None
            for index, _, _ in parts:
                if args[index] is arg:
                    return None  # what is one array arrives as one
            parts.append((len(values), letter, arg.shape))
            values.append(pickle.PickleBuffer(arg))
        elif kind in ATOMS and not (kind in SIZED and len(arg) >= limit):
            values.append(arg)
        elif kind in _NUMBERS and kind not in others:
            parts.append((len(values), _NUMBERS[kind], None))
            values.append(arg.tobytes())
        else:
            return None
    if not parts:
        return None
    is_call = type(obj) is tuple
    return BARE + pickle.dumps((is_call, values, parts), 5, buffer_callback=in_band)


def load_bare(stream: bytes | bytearray | memoryview, buffers: Sequence[memoryview]) -> Any:
    """The object again, from a stream that begins with :data:`BARE`."""
    is_call, values, parts = pickle.loads(memoryview(stream)[len(BARE) :], buffers=buffers)
    for index, letter, shape in parts:
        array = np.frombuffer(values[index], _DTYPES[letter])
        if shape is None:
            values[index] = array[0]
        else:
            values[index] = array if len(shape) == 1 else array.reshape(shape)
    return (tuple(values), {}) if is_call else values[0]
