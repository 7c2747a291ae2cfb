"""A task: what was submitted, until its future has a result."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from shmpool.dispatch.future import TaskFuture
from shmpool.store.blocks import Block
from shmpool.store.store import Payload
from shmpool.worker.process import WorkerHandle

__all__ = ["Function", "Limits", "Task"]


_serials = itertools.count(1)


class Function:
    """A pickled function, shared by the tasks of one call.

    Parameters
    ----------
    payload : Payload
    name : str
        For errors.
    once : bool
        There will be one task of it.

    Attributes
    ----------
    serial : int
        No other function of this process has the same; 0 if there will be one task.
    """

    __slots__ = ("counted", "name", "payload", "serial")

    def __init__(self, payload: Payload, name: str, *, once: bool = False) -> None:
        self.payload = payload
        self.name = name
        self.serial = 0 if once else next(_serials)
        self.counted = False  # in the executor's figures

    def __del__(self) -> None:
        # The last of the tasks is gone. Finalizers wait for no lock: the blocks are queued.
        self.payload.release_later()


class Limits(NamedTuple):
    """What the user of a task has set for it.

    Attributes
    ----------
    timeout : float or None
        Seconds that it may run.
    retries : int
        How many times it is run again when its worker died.
    readonly : bool
        How its arguments and result are mapped.
    """

    timeout: float | None = None
    retries: int = 0
    readonly: bool = False


class Task:
    """One call of a function.

    Attributes
    ----------
    future : TaskFuture
    function : Function
    arguments : Payload
        The pickled (args, kwargs).
    blocks : sequence of Block
        Those of the function and of the arguments; held until the task is settled.
    limits : Limits
    started : bool
        The future is running, from its user's point of view: the task was sent to a worker.
    handle : WorkerHandle or None
        The worker that it was sent to.
    introduced : sequence of int
        Arenas whose descriptors went with it: the worker knows them when it has answered.
    doom : BaseException or None
        Its worker was killed because of it: this is why.
    """

    __slots__ = (
        "arguments", "blocks", "doom", "function", "future", "handle", "introduced", "limits", "started",
    )  # fmt: skip

    def __init__(self, function: Function, arguments: Payload, limits: Limits) -> None:
        self.future = TaskFuture()
        self.function = function
        self.arguments = arguments
        mine, its = arguments.blocks, function.payload.blocks
        self.blocks: Sequence[Block] = [*its, *mine] if its and mine else its or mine
        self.limits = limits
        self.started = False
        self.handle: WorkerHandle | None = None
        self.introduced: Sequence[int] = ()
        self.doom: BaseException | None = None
