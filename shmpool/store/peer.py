"""What two processes at the ends of one channel owe each other: arenas made known, blocks lent.

Seen from a process, arenas are its own, or come from *upstream* (its parent handed them over), or from *downstream*
(a worker of its own did).  Three rules keep blocks alive without a lock between processes, since messages on a
channel stay in order:

* What a parent sends with a task it holds until that task's answer is there.  A worker that keeps a block of it for
  longer (a task stored its argument in a global) says so in the answer (``kept``), and says later when it has let go
  (``released``).
* What a worker sends in an answer and does not have from upstream, it holds until the parent has said as many times
  that it is free (``freed``) as it was sent.
* What a worker sends back that it has from upstream is still held by the parent: the task that brought it is
  answered by the same message.

A peer that died takes its claims with it.  The caller holds the store's lock.
"""

from __future__ import annotations

from shmpool.store.blocks import Block, BlockKey

__all__ = ["Peer"]


class Peer:
    """The process at the other end of a channel, as the store sees it.

    Attributes
    ----------
    upstream : bool
        The other end is our parent, not a worker of ours.
    resident : int
        For a worker: how much memory its arenas cost, in bytes, as it last said.
    knows : set of int
        Ids of the arenas that the other end surely has a descriptor of.
    keeps : set of BlockKey
        Blocks that the other end, a worker, has kept beyond their task; held here for it.
    to_free : list of (arena, offset, times)
        For a worker: blocks of its that this process has let go of.
    to_forget : list of int
        For a worker: arenas that nobody holds a block of any more.
    to_release : list of Block
        For the parent: blocks that were reported as kept and are now let go of.
    """

    __slots__ = (
        "alive",
        "keeps",
        "knows",
        "resident",
        "to_forget",
        "to_free",
        "to_release",
        "upstream",
    )

    def __init__(self, *, upstream: bool) -> None:
        self.upstream = upstream
        self.alive = True
        self.resident = 0
        self.knows: set[int] = set()
        self.keeps: set[BlockKey] = set()
        self.to_free: list[tuple[int, int, int]] = []
        self.to_forget: list[int] = []
        self.to_release: list[Block] = []
