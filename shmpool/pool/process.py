"""The context that a pool gives its executor: the user's own, whose processes have the names of pool workers."""

from __future__ import annotations

from typing import Any

__all__ = ["WorkerContext"]


class WorkerContext:
    """A context of multiprocessing or loky; logs and programs know workers as ``ForkPoolWorker-1``, and so on.

    Parameters
    ----------
    context : context
    """

    def __init__(self, context: Any) -> None:
        self._context = context

    def Process(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802  # multiprocessing's name
        """A process that has not been started."""
        process = self._context.Process(*args, **kwargs)
        process.name = process.name.replace("Process", "PoolWorker")
        return process

    def __getattr__(self, name: str) -> Any:
        if name == "_context":  # not yet there, as while being copied
            raise AttributeError(name)
        return getattr(self._context, name)
