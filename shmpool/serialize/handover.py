"""Descriptors on their way: what multiprocessing hands over once, however often the stream is unpickled.

A socket or a connection pickles as a ticket (``DupFd``): its descriptor is duplicated, a thread of multiprocessing's
keeps the duplicate, and gives it to the first who comes with the ticket.  Whoever unpickles the same stream again finds
nothing.  So it matters what a stream is for:

========== ====================================== =========================================
use        is unpickled                           sockets, connections, ...
========== ====================================== =========================================
ONCE       by one task, or its caller             as multiprocessing pickles them
AGAIN      by several tasks, or one several times are refused, before a ticket is made
NOWHERE    never: somebody only wants to know     something stands for them
========== ====================================== =========================================

Other classes have reductions that make such tickets as well (torch's for shared storages, the user's).  These are not
known before they have run: then what they have made is withdrawn.  So it is if a stream is given up.

Only tickets made since a :func:`mark` are withdrawn: one that the user holds is the user's.

While a process is spawned, what it is told when it starts takes its descriptors along instead: each is noted down with
the process that is being started, which inherits it.  A stream that is given up must not have noted any.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import get_spawning_popen
from typing import Any, Literal, NamedTuple

__all__ = [
    "AGAIN",
    "NOWHERE",
    "ONCE",
    "Mark",
    "Use",
    "disinherit",
    "mark",
    "refused",
    "refusing",
    "standing_in",
    "withdraw",
]

Use = Literal["once", "again", "nowhere"]
ONCE: Use = "once"
AGAIN: Use = "again"
NOWHERE: Use = "nowhere"

_Reduction = Callable[[Any], Any]

_SHARER = "multiprocessing.resource_sharer"
#: The reductions that are known to make tickets, by module and name.
_KNOWN = {
    ("multiprocessing.reduction", "_reduce_socket"),
    ("multiprocessing.connection", "reduce_connection"),
    ("multiprocessing.heap", "reduce_arena"),
}


class Mark(NamedTuple):
    """A moment: tickets made from now on have a larger number, and descriptors to be inherited come after these."""

    tickets: int
    inherited: int


def mark() -> Mark:
    """Now."""
    sharer = _sharer()
    return Mark(0 if sharer is None else sharer._key, len(_inherited()))


def withdraw(pickler: Any, since: Mark) -> bool:
    """Withdraw the tickets that a pickler has met and that were made since then; True if there were any."""
    disinherit(since)
    sharer = _sharer()
    if sharer is None or sharer._key == since.tickets:
        return False
    ticket = sys.modules[_SHARER].DupFd
    tickets = [obj for _, obj in pickler.memo.copy().values() if type(obj) is ticket]
    return sum(_withdraw_one(sharer, one, since.tickets) for one in tickets) > 0


def disinherit(since: Mark) -> None:
    """A process that is being started inherits nothing of what was noted since then."""
    del _inherited()[since.inherited :]


def refused(kind: str) -> TypeError:
    """What is raised where a descriptor would have to be handed over several times."""
    return TypeError(
        f"a {kind!r} is handed over once, and this may be unpickled several times (the function of a map, an object "
        "that is put, a task with retries): pass it as an argument of a task without retries"
    )


def refusing(table: Mapping[type, _Reduction]) -> dict[type, _Reduction]:
    """For the dispatch table of a stream that is unpickled again: what is refused, of those classes."""
    return dict.fromkeys(_known(table), _refuse)


def standing_in(table: Mapping[type, _Reduction], use: Use) -> dict[type, _Reduction]:
    """For the dispatch table of picklers that only look: nothing is made, or it is withdrawn at once.

    Parameters
    ----------
    table : mapping
        What these go before.
    use : {"once", "again", "nowhere"}
        What the stream would be for, if there were one: ``"again"`` refuses.
    """
    # For all else it is not needed before there is a ticket.
    from multiprocessing.resource_sharer import DupFd

    since = mark().tickets

    def reduce_ticket(ticket: Any) -> Any:
        sharer = _sharer()
        if _withdraw_one(sharer, ticket, since):
            _end_if_idle(sharer)
        return reduce(ticket)

    reduce = _refuse if use == AGAIN else _stand_in
    return {**dict.fromkeys(_known(table), reduce), DupFd: reduce_ticket}


def _known(table: Mapping[type, _Reduction]) -> list[type]:
    return [
        cls
        for cls, reduction in table.items()
        if (getattr(reduction, "__module__", ""), getattr(reduction, "__name__", "")) in _KNOWN
    ]


def _refuse(obj: Any) -> Any:
    raise refused(f"{type(obj).__module__}.{type(obj).__qualname__}")


def _stand_in(obj: Any) -> Any:
    fd = getattr(obj, "fd", None)
    if hasattr(obj, "fileno"):
        fd = obj.fileno()
    if fd is not None:
        os.fstat(fd)  # closed: it could not be duplicated
    return str, ("a descriptor",)


# ---- what is multiprocessing's own -----------------------------------------------------------------------------------


def _sharer() -> Any:
    return getattr(sys.modules.get(_SHARER), "_resource_sharer", None)


def _inherited() -> list[int]:
    """The descriptors that the process which this thread is starting will inherit."""
    popen = get_spawning_popen()
    return [] if popen is None else getattr(popen, "_fds", [])


def _withdraw_one(sharer: Any, ticket: Any, since: int) -> bool:
    _, key = ticket._id
    if key <= since:
        return False
    _, close = sharer._cache.pop(key, (None, None))
    if close is not None:
        close()
    return True


def _end_if_idle(sharer: Any) -> None:
    """End the thread that hands out descriptors, as ``stop()`` does, if there is none: it is started when needed."""
    from multiprocessing import connection, process

    with sharer._lock:
        if sharer._cache or sharer._address is None:
            return
        with connection.Client(sharer._address, authkey=process.current_process().authkey) as end:
            end.send(None)
        sharer._thread.join()
        sharer._listener.close()
        sharer._thread = sharer._address = sharer._listener = None
