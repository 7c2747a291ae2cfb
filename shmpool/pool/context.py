"""Contexts of multiprocessing whose pools are shmpool's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from shmpool.pool import pool
from shmpool.worker.launch import find_context

__all__ = ["Context", "get_context"]


class Context:
    """A context of multiprocessing or loky whose pools are shmpool's; everything else is the context's own.

    Parameters
    ----------
    method : {"fork", "forkserver", "spawn", "loky"}, context or None
        None: multiprocessing's default.
    """

    def __init__(self, method: Any = None) -> None:
        self._context = find_context(method)

    def Pool(  # noqa: N802  # multiprocessing's name
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        **options: Any,
    ) -> pool.Pool:
        """A :class:`shmpool.Pool` whose workers are started by this context; parameters as there."""
        return pool.Pool(
            processes, initializer, initargs, maxtasksperchild, context=self._context, **options
        )

    def __getattr__(self, name: str) -> Any:
        if name == "_context":  # not yet there, as while being copied
            raise AttributeError(name)
        return getattr(self._context, name)


def get_context(method: Any = None) -> Context:
    """A context whose ``Pool`` is :class:`shmpool.Pool`: ``shmpool.get_context("spawn").Pool(4)``.

    Parameters
    ----------
    method : {"fork", "forkserver", "spawn", "loky"}, context or None
        None: multiprocessing's default.

    Raises
    ------
    ValueError
        There is no such start method.
    """
    return Context(method)
