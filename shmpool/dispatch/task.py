"""A task: what was submitted, until its future has a result."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from shmpool.store.blocks import Block
from shmpool.store.store import Payload

__all__ = ["Function", "Task"]


class Function:
    """A pickled function, shared by the tasks of one call."""

    __slots__ = ("counted", "name", "payload")

    def __init__(self, payload: Payload, name: str) -> None:
        self.payload = payload
        self.name = name
        self.counted = False  # in the executor's figures

    def __del__(self) -> None:
        # The last of the tasks is gone. Finalizers wait for no lock: the blocks are queued.
        self.payload.release_later()


class Task:
    """One call of a function.

    Attributes
    ----------
    future : concurrent.futures.Future
    function : Function
    arguments : Payload
        The pickled (args, kwargs).
    blocks : list of Block
        Those of the function and of the arguments; held until the task is settled.
    readonly : bool
        How they are mapped in the worker.
    started : bool
        The future is running, from its user's point of view: the task was sent to a worker.
    introduced : list of int
        Arenas whose descriptors went with it: the worker knows them when it has answered.
    """

    __slots__ = (
        "arguments", "blocks", "function", "future", "introduced", "readonly", "started",
    )  # fmt: skip

    def __init__(self, function: Function, arguments: Payload, readonly: bool) -> None:
        self.future: Future[Any] = Future()
        self.function = function
        self.arguments = arguments
        self.blocks: list[Block] = function.payload.blocks + arguments.blocks
        self.readonly = readonly
        self.started = False
        self.introduced: list[int] = []
