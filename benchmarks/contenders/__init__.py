"""Who competes.  To add one: a subclass of `Contender`, in `CONTENDERS`."""

from .base import Contender, NotInstalled
from .clusters import Dask, DaskScatter, Ray, RayPut
from .executors import Loky, ProcessPool, Shmpool
from .joblibs import Joblib, JoblibPrivate, JoblibShmpool
from .pools import (
    Mpire,
    MpireShared,
    MultiprocessingPool,
    MultiprocessingPoolInitialised,
    Pebble,
    ShmpoolPool,
)

__all__ = ["BASIC", "BOUNDS", "CONTENDERS", "Contender", "NotInstalled", "make"]

#: In the order of the table's columns.
CONTENDERS: dict[str, type[Contender]] = {
    contender.name: contender
    for contender in (
        Shmpool,
        ShmpoolPool,
        ProcessPool,
        MultiprocessingPool,
        MultiprocessingPoolInitialised,
        Loky,
        Joblib,
        JoblibPrivate,
        JoblibShmpool,
        Mpire,
        MpireShared,
        Pebble,
        Ray,
        RayPut,
        Dask,
        DaskScatter,
    )
}
BASIC = ("shmpool", "ppe", "pool", "loky")
#: No pools: what the machine allows, and what it takes without a pool.
BOUNDS = {"limit": "limit", "inline": "one process"}


def make(name: str, workers: int, start_method: str) -> Contender:
    """The adapter of that name, not started yet."""
    if name in BOUNDS:
        from .limit import Inline, Limit  # the only ones that need numpy

        return (Limit if name == "limit" else Inline)(workers, start_method)
    return CONTENDERS[name](workers, start_method)
