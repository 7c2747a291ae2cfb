"""Tensors of torch in CPU memory, without a copy; torch is neither needed nor imported.

A tensor pickles itself as a view of a storage: offset, shape, strides, requires_grad, attributes.  Only how the storage
travels is changed: as an array.  So views of one storage are views of one storage on the other side.

``import torch`` registers reductions with multiprocessing that move a tensor's memory into shared memory, where each
process sees what the others write; here each side has its own, as with arrays.  Tensors that the user has shared
(``share_memory_()``), those of other devices, and what torch refuses (gradients of computations) go torch's way.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from shmpool.serialize.reductions import Reduction, window

__all__ = ["reductions_for_torch"]


def reductions_for_torch(others: Mapping[type, Callable[[Any], Any]]) -> dict[type, Reduction]:
    """For a dispatch table; empty as long as the program has not imported torch.

    Parameters
    ----------
    others : mapping
        Reductions that are registered with multiprocessing, torch's own among them.
    """
    torch = sys.modules.get("torch")
    parameter = getattr(getattr(torch, "nn", None), "Parameter", None)
    storage = getattr(torch, "UntypedStorage", None)
    tensor = getattr(torch, "Tensor", None)
    found: dict[type, Reduction] = {}
    for cls in (tensor, parameter):
        if cls is not None and cls in others:
            found[cls] = functools.partial(_reduce_tensor, others[cls])
    if found and storage is not None and storage in others:
        found[storage] = functools.partial(_reduce_storage, others[storage])
        return found
    return {}


def _reduce_tensor(otherwise: Reduction, tensor: Any) -> Any:
    if (
        tensor.device.type == "cpu"
        and (tensor.is_leaf or not tensor.requires_grad)
        and not tensor.is_nested
        # Sparse tensors that were made by their own reduction are kept for good in a list of torch's.
        and (tensor.layout is sys.modules["torch"].strided or tensor.is_mkldnn)
    ):
        return tensor.__reduce_ex__(5)
    return otherwise(tensor)


def _reduce_storage(otherwise: Reduction, storage: Any) -> Any:
    if storage.device.type != "cpu" or storage.is_shared():
        return otherwise(storage)
    nbytes = storage.nbytes()
    return _make_storage, (window(storage, storage.data_ptr(), nbytes) if nbytes else b"",)


def _make_storage(buffer: Any) -> Any:
    torch: Any = importlib.import_module("torch")
    a = np.frombuffer(buffer, np.uint8)
    if not a.nbytes:
        return torch.UntypedStorage(0)
    if not a.flags.writeable:
        a = a.copy()  # torch knows nothing of read-only memory: to write there would be a crash
    return torch.from_numpy(a).untyped_storage()
